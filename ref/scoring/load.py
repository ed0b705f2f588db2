"""Rewards: what the policy is asked for. images [B, 3, H, W] in [0, 1], prompts [B] -> [B], float32.

| name             | R(x, c)                                                              | range       |
|------------------|----------------------------------------------------------------------|-------------|
| `pickscore`      | cosine of PickScore_v1's image and text features                     | about 0.2   |
| `clip_score`     | cosine of a CLIP model's, DFN5B ViT-H/14 at 378 px unless told       | about 0.4   |
| `hpsv2`          | cosine of HPSv2.1's                                                  | about 0.3   |
| `aesthetic`      | Aesthetic Predictor v2.5, an affine head on SigLIP; reads no prompt  | 1 .. 10     |
| `image_reward`   | ImageReward, a BLIP that reads prompt and image together             | about 0 +-1 |
| `unified_reward` | mean of the alignment, coherence and style that a VLM server replies | 1 .. 5      |
| `ocr`            | 1 - edit distance between the prompt's quoted text and what is read  | 0 .. 1      |
| `geneval`        | share of what GenEval's rules ask for, see geneval.py                | 0 .. 1      |
| `geneval_strict` | 1 where all of it is there                                           | 0 or 1      |
| `jpeg`           | 1 - bytes of the JPEG (quality 95) / bytes of the raw pixels         | up to 1     |
| `FILE.py:NAME`   | a function of one's own, see own.py                                  | its own     |
| `http://...`     | a server of one's own, see served.py                                 | its own     |

A specification names one or a weighted sum, NAME[:WEIGHT][=SOURCE], joined by "+":

    pickscore        pickscore:0.7+ocr:0.3        clip_score=clip        hpsv2:0.5=/models/HPSv2+jpeg
    my_file.py:my_reward:0.5+ocr:0.5              http://localhost:8000/score:0.5+jpeg

SOURCE is a local folder or hub repository in place of the default; for `clip_score` it is the name of an
encoder (encoders.py), for `unified_reward` the address of its server, for `geneval` a folder with two models.

Conventions. Cosines are not multiplied by the models' logit scale of 100 (PickScore's own code does, and
Flow-GRPO then divides by 26): the paper's table prints 0.226 for FLUX, which is the cosine. That its CLIP
score of 0.388 comes from the DFN5B model is a reading: ViT-L/14 gives about 0.27. Scores are those of the
image rounded to 8 bits. An image with a NaN scores NaN, and whoever asked is told for which prompt.
"""

import math
import re
from collections.abc import Callable, Iterable
from pathlib import Path

import torch
from jaxtyping import Float
from torch import Tensor

from ref.options import near
from ref.sampling import ask, name_of
from ref.scoring.encoders import Encoder, find, load_encoder, one_line
from ref.scoring.geneval import GenEval
from ref.scoring.own import REWARD, find_own, is_own, load_own
from ref.scoring.preference import Aesthetic, Cosine
from ref.scoring.reward import Reward
from ref.scoring.rules import JPEG, OCR
from ref.scoring.served import HTTPReward

DFN5B = "open_clip:ViT-H-14-378-quickgelu/dfn5b"
AESTHETIC_FILE = "aesthetic_predictor_v2_5.pth"
AESTHETIC_URL = f"https://github.com/discus0434/aesthetic-predictor-v2-5/raw/main/models/{AESTHETIC_FILE}"


class WeightedSum(Reward):
    """sum_i w_i R_i. Raises ValueError naming the component and the prompt when one returns a NaN."""

    def __init__(self, terms: list[tuple[float, Callable]]):
        super().__init__(" + ".join(f"{weight:g} {name_of(reward)}" for weight, reward in terms))
        self.weights, self.rewards = zip(*terms)
        self.waits = all(getattr(reward, "waits", False) for reward in self.rewards)

    def check_prompts(self, prompts: list[str]) -> None:
        for reward in self.rewards:
            getattr(reward, "check_prompts", Reward.check_prompts)(prompts)

    def score(self, images: Float[Tensor, "B 3 H W"], prompts: list[str]) -> Float[Tensor, " B"]:
        values = [ask(reward, images, prompts) for reward in self.rewards]
        return sum(weight * value for weight, value in zip(self.weights, values))


def cosine(name, source, encoder, device, dtype) -> Cosine:
    """pickscore and hpsv2 are encoders' names too."""
    wanted = source or DFN5B if name == "clip_score" else f"{name}={source}" if source else name
    return Cosine(name, encoder(wanted))


def aesthetic(name, source, encoder, device, dtype) -> Aesthetic:
    """SOURCE is a folder with the SigLIP model and the predictor's file."""
    siglip = encoder(f"siglip={source}" if source else "siglip")
    if source:
        file = find(name, source, AESTHETIC_FILE)
        with one_line(name, str(file)):
            weights = torch.load(file, map_location="cpu", weights_only=True)
    else:
        try:
            weights = torch.hub.load_state_dict_from_url(AESTHETIC_URL, map_location="cpu", weights_only=True)
        except OSError as error:
            raise OSError(
                f"cannot load {name}: {AESTHETIC_URL} cannot be reached ({error}); put that file and SigLIP into "
                f"a folder and write {name}=FOLDER"
            ) from error
    with one_line(name, str(file) if source else AESTHETIC_URL):
        return Aesthetic(name, siglip, weights)


def image_reward(name, source, encoder, device, dtype) -> Reward:
    from ref.scoring.image_reward import load

    return load(name, source, device, dtype)


def unified_reward(name, source, encoder, device, dtype) -> Reward:
    from ref.scoring.unified_reward import URL, UnifiedReward

    return UnifiedReward(name, source or URL)


# name -> (name, source, encoder by name, device, dtype) -> Reward. A class is asked what it demands of prompts
REWARDS = {
    "pickscore": cosine,
    "clip_score": cosine,
    "hpsv2": cosine,
    "aesthetic": aesthetic,
    "image_reward": image_reward,
    "unified_reward": unified_reward,
    "geneval": GenEval,
    "geneval_strict": GenEval,
    "ocr": OCR,
    "jpeg": JPEG,
}
RULES = (OCR, JPEG)


FORMS = (  # of a term; digits behind a host are its port
    r"(?P<name>.+?\.py:\w+)(:(?P<weight>[^:=]*))?(?P<source>)",
    r"(?P<name>https?://(\[[^]]*\]|[^/:]+)(:\d+)?(/.*?)?)(:(?P<weight>[^:/]*))?(?P<source>)",
    r"(?P<name>\w+)(:(?P<weight>[^=]*))?(=(?P<source>.+?))?",
)


def parse(specification: str) -> list[tuple[float, str, str | None]]:
    """(weight, name, source) of every term. Raises ValueError for a name or weight that is not understood."""
    terms = []
    for term in specification.split("+"):
        parsed = next(filter(None, (re.fullmatch(rf"\s*{form}\s*", term) for form in FORMS)), None)
        name, weight, source = parsed.group("name", "weight", "source") if parsed else (term.strip(), None, None)
        if maker(name) is None:
            raise ValueError(f"unknown reward {term.strip()!r}; {near(name, REWARDS)}write NAME[:WEIGHT][=SOURCE], NAME one of {', '.join(REWARDS)}, FILE.py:NAME or http://...")  # fmt: skip
        try:
            weight = 1.0 if weight is None else float(weight)
        except ValueError:
            weight = float("nan")
        if not math.isfinite(weight):
            raise ValueError(f"the weight of {name} must be a number, as in {name}:0.5, got {term.strip()!r}")
        if weight == 0:
            raise ValueError(f"{term.strip()!r} has the weight 0 and would be computed for nothing; leave {name} out")
        if source and REWARDS.get(name) in RULES:
            raise ValueError(f"{name} is a rule and loads nothing; write {name} without ={source}")
        late = re.fullmatch(r"(.+):([\d.]+)", source or "")
        if late and "://" not in source and not Path(source).exists():
            raise ValueError(f"a weight stands before its source: {name}:{late[2]}={late[1]}, not {term.strip()!r}")
        terms.append((weight, name, source or None))
    return terms


def maker(name: str) -> Callable | None:
    """(name, source, encoder by name, device, dtype) -> reward, None for an unknown name."""
    if is_own(name):
        return lambda name, *_: load_own(name, REWARD)
    return HTTPReward if name.startswith(("http://", "https://")) else REWARDS.get(name)


def check_prompts(specification: str, prompts: list[str]) -> None:
    """Raises ValueError for a specification that is not understood, or a prompt that one of its rewards cannot judge.

    Nothing is loaded for it.
    """
    for _, name, _ in parse(specification):
        asked = find_own(name, REWARD) if is_own(name) else maker(name)
        getattr(asked, "check_prompts", Reward.check_prompts)(prompts)


def load_reward(
    specification: str,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
    encoders: Iterable[Callable] = (),
) -> Callable:
    """The reward that `specification` names (see the top of this file).

    encoders    loaded already, phi for example: a reward that needs one of the same name shares it, and with
                it the forward pass on the last images
    dtype       of the reward models' weights; float32 unless memory forbids, see `load_encoder`

    Raises ValueError for a name or weight that is not understood, OSError with one line for a model that
    cannot be had or a server that does not answer.
    """
    pool = {getattr(encoder, "name", None): encoder for encoder in encoders}

    def encoder(name: str) -> Encoder:
        if name not in pool:
            pool[name] = load_encoder(name, device, dtype)
        return pool[name]

    terms = [(w, maker(name)(name, source, encoder, device, dtype)) for w, name, source in parse(specification)]
    return terms[0][1] if len(terms) == 1 and terms[0][0] == 1 else WeightedSum(terms)
