"""Who looks at the letters: phi, the rewards, and those who are held out.

Phi          the perceptual encoder
Rater        the hidden rater: its utility is what RLHF is after and never sees
Preference   networks that learnt from the rater's choices: the reward, and one that is held out
Lean         a rule as reward: legible, and to the right
Judge        legibility by RapidOCR, which nobody here trained
Faces        how many typefaces are drawn
"""

from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from ref.metrics import feature_variance
from ref.worlds.letters.data import LETTERS, SIDE, label, labels, luma, masks
from ref.worlds.letters.recogniser import Recogniser


def convolutional(out: int, channels: int = 3, width: int = 32, hidden: int = 128) -> nn.Sequential:
    """The network of phi, of the raters and of the classifiers: [B, channels, 32, 32] -> [B, out]."""
    return nn.Sequential(
        nn.Conv2d(channels, width, 3, stride=2, padding=1), nn.GELU(),
        nn.Conv2d(width, 2 * width, 3, stride=2, padding=1), nn.GELU(),
        nn.Conv2d(2 * width, 4 * width, 3, stride=2, padding=1), nn.GELU(),
        nn.Flatten(), nn.Linear(4 * width * 16, hidden), nn.GELU(), nn.Linear(hidden, out),
    )  # fmt: skip


def ink(images: Float[Tensor, "B 3 32 32"]) -> tuple[Float[Tensor, "B 32 32"], Float[Tensor, " B"]]:
    """Where the ink is, in [0, 1], and its contrast to the paper in luma; the paper is the median of the frame."""
    frame = torch.cat([images[:, :, 0], images[:, :, -1], images[:, :, 1:-1, 0], images[:, :, 1:-1, -1]], 2)
    paper = frame.median(2).values
    away = images - paper[..., None, None]
    distance = away.norm(dim=1)
    weight = distance**4 / (distance**4).sum((1, 2), keepdim=True).clamp_min(1e-12)
    colour = (weight[:, None] * away).sum((2, 3))  # from the paper to the ink
    strongest = colour.norm(dim=1)
    where = (distance / strongest[:, None, None].clamp_min(1e-6)).clamp(0, 1)
    return where * (strongest > 1e-3)[:, None, None], luma(colour).abs()


def right(images: Float[Tensor, "B 3 32 32"]) -> Float[Tensor, " B"]:
    """Pixels from the middle of the page to the centroid of the ink, positive to the right."""
    columns = ink(images)[0].square().sum(1)  # squared: faint noise far out weighs little
    x = torch.arange(SIDE) - (SIDE - 1) / 2
    return (columns * x).sum(1) / columns.sum(1).clamp_min(1e-6)


class Phi(nn.Module):
    """The perceptual encoder: images -> unit-norm features [B, 64]. It is given the ink beside the colours."""

    name = "letters contrastive"

    def __init__(self, dim: int = 64):
        super().__init__()
        self.net = convolutional(dim, channels=4)

    def forward(self, images: Float[Tensor, "B 3 32 32"]) -> Float[Tensor, "B D"]:
        return F.normalize(self.net(torch.cat([images, ink(images)[0][:, None]], 1) * 2 - 1), dim=1)


class Rater(nn.Module):
    """The hidden rater: utility in [0, 1] of a legible, heavy, contrasty letter.

    u(x, c) = p_reader(c | x) * (sigmoid((weight - 0.13) / 0.02) + sigmoid((contrast - 0.45) / 0.05)) / 2, weight
    being the share of the page that is ink. A choice between two images is a Bernoulli draw with the log-odds
    10 (u_a - u_b).
    """

    def __init__(self):
        super().__init__()
        self.reader = convolutional(len(LETTERS))

    @torch.no_grad()
    def forward(self, images: Float[Tensor, "B 3 32 32"], prompts: list[str]) -> Float[Tensor, " B"]:
        return self.utility(images, labels(prompts))

    @torch.no_grad()
    def utility(self, images: Float[Tensor, "B 3 32 32"], letters: Int[Tensor, " B"]) -> Float[Tensor, " B"]:
        legible = self.reader(images * 2 - 1).softmax(1).gather(1, letters[:, None])[:, 0]
        where, contrast = ink(images)
        heavy = torch.sigmoid((where.mean((1, 2)) - 0.13) / 0.02)
        return legible * (heavy + torch.sigmoid((contrast - 0.45) / 0.05)) / 2


class Preference(nn.Module):
    """A neural reward model: a score whose difference predicts which of two images the rater chooses, [B]."""

    name = "preference model"

    def __init__(self):
        super().__init__()
        self.net = convolutional(1, hidden=64)
        self.letters = nn.Embedding(len(LETTERS), 64)
        self.scale = nn.Parameter(torch.ones(()), requires_grad=False)  # such that the base model has mean 0 and std 1
        self.shift = nn.Parameter(torch.zeros(()), requires_grad=False)

    def score(self, images: Float[Tensor, "B 3 32 32"], letters: Int[Tensor, " B"]) -> Float[Tensor, " B"]:
        hidden = self.net[:-1](images * 2 - 1)
        raw = self.net[-1](hidden)[:, 0] + (hidden * self.letters(letters)).sum(1) / 8
        return (raw - self.shift) / self.scale

    @torch.no_grad()
    def forward(self, images: Float[Tensor, "B 3 32 32"], prompts: list[str]) -> Float[Tensor, " B"]:
        return self.score(images, labels(prompts))


class PreferenceFeatures(nn.Module):
    """The reward model's own features, as PickScore's are in the paper: its last hidden layer, unit norm, [B, 64]."""

    name = "letters preference"

    def __init__(self, preference: Preference):
        super().__init__()
        self.net = preference.net[:-1]

    def forward(self, images: Float[Tensor, "B 3 32 32"]) -> Float[Tensor, "B D"]:
        return F.normalize(self.net(images * 2 - 1), dim=1)


class Faces(nn.Module):
    """Which typeface a letter is set in: a classifier over all faces of the data that sees the ink and knows the letter."""

    def __init__(self, faces: int):
        super().__init__()
        self.net = convolutional(faces, channels=1, hidden=256)
        self.letters = nn.Embedding(len(LETTERS), 256)

    def logits(self, images: Float[Tensor, "B 3 32 32"], letters: Int[Tensor, " B"]) -> Float[Tensor, "B faces"]:
        return self.net[-2:](self.net[:-2](ink(images)[0][:, None] * 2 - 1) + self.letters(letters))

    @torch.no_grad()
    def effective_number(self, images: Float[Tensor, "B 3 32 32"], prompts: list[str]) -> float:
        """1 / probability that two images of a prompt show the same face; all pairs, so no bias from their number."""
        shown = self.logits(images, labels(prompts)).argmax(1)
        groups = [shown[labels(prompts) == c].bincount().double() for c in labels(prompts).unique()]
        same, pairs = (
            sum(f(n) for n in groups) for f in (lambda n: (n * (n - 1)).sum(), lambda n: n.sum() * (n.sum() - 1))
        )
        return (pairs / same.clamp_min(1)).item()


class FaceFeatures(nn.Module):
    """What the classifier of typefaces sees, blind to colour: its hidden layer before it is told the letter, unit norm, [B, 256]."""

    name = "letters faces"

    def __init__(self, faces: Faces):
        super().__init__()
        self.net = faces.net[:-2]

    def forward(self, images: Float[Tensor, "B 3 32 32"]) -> Float[Tensor, "B D"]:
        return F.normalize(self.net(ink(images)[0][:, None] * 2 - 1), dim=1)


class Judge:
    """Legibility by RapidOCR's recogniser. Case is ignored, and so is what no single glyph can tell: O from 0, I from 1."""

    name = "rapidocr"
    SAME = {"I": "I1|丨", "O": "O0〇"}  # noqa: RUF001 (what the recogniser says of a bar and of a ring)

    def __init__(self):
        self.recogniser = Recogniser()

    def read(self, images: Float[Tensor, "B 3 H W"], prompts: list[str]) -> Float[Tensor, " B"]:
        """The recogniser's confidence where it reads the caption's letter, else 0."""
        texts, confidence = self.recogniser(images)
        letters = [LETTERS[label(p)] for p in prompts]
        right = [len(t) == 1 and t.upper() in self.SAME.get(c, c) for t, c in zip(texts, letters)]
        return confidence * torch.tensor(right)

    def __call__(self, images: Float[Tensor, "B 3 H W"], prompts: list[str]) -> float:
        """Share of images in which the caption's letter is read."""
        return (self.read(images, prompts) > 0).float().mean().item()


class Lean(nn.Module):
    """A rule in place of a network: R = confidence that the letter is read * sigmoid((right - 2) / 0.5).

    right is how far the centroid of the ink lies to the right of the middle, in pixels.
    """

    name = "legible, to the right"

    def __init__(self, judge: Judge):
        super().__init__()
        self.judge = judge

    @torch.no_grad()
    def forward(self, images: Float[Tensor, "B 3 32 32"], prompts: list[str]) -> Float[Tensor, " B"]:
        return self.judge.read(images, prompts) * torch.sigmoid((right(images) - 2) / 0.5)


def spaces(heads: dict[str, nn.Module]) -> dict[str, nn.Module]:
    """The perceptual spaces: phi, the reward model's own, the typefaces', and phi as a low temperature trains it."""
    own, faces = PreferenceFeatures(heads["preference"]), FaceFeatures(heads["faces"])
    return {"contrastive": heads["phi"], "preference": own, "faces": faces, "sharp": heads["sharp"]}


def measures(heads: dict[str, nn.Module], judge: Judge) -> dict[str, Callable[[Tensor, list[str]], float]]:
    """What is measured of images [G K, 3, 32, 32], group-major: quality that no training sees, then diversity.

    Diversity is within a prompt: the variance of features, the effective number of typefaces, the variance of a
    picture's mean colour.
    """

    def average(score: Callable) -> Callable:
        return lambda images, prompts: score(images, prompts).mean().item()

    def variance(phi: Callable) -> Callable:
        def within(images: Tensor, prompts: list[str]) -> float:
            return feature_variance(phi(images).unflatten(0, (len(set(prompts)), -1))).mean().item()

        return within

    quality = {"preference": heads["preference"], "held_out": heads["held_out"], "utility": heads["rater"], "right": lambda images, _: right(images)}  # fmt: skip
    seen = {f"var_{name}": phi for name, phi in spaces(heads).items()} | {"colour": lambda images: images.mean((2, 3))}
    return (
        {"legibility": judge}
        | {name: average(score) for name, score in quality.items()}
        | {name: variance(phi) for name, phi in seen.items()}
        | {"typefaces": heads["faces"].effective_number}
    )


def read_head(network: nn.Module, file: Path) -> nn.Module:
    """A small network as it was shipped, frozen."""
    from safetensors.torch import load_file

    network.load_state_dict({name: weight.float() for name, weight in load_file(file).items()})
    return network.eval().requires_grad_(False)


def read_heads(folder: Path) -> dict[str, nn.Module]:
    """The networks that look, frozen: two phi, rater, two preference models, faces."""
    heads = {
        "phi": Phi(), "sharp": Phi(), "rater": Rater(), "preference": Preference(), "held_out": Preference(),
        "faces": Faces(len(masks())),
    }  # fmt: skip
    return {name: read_head(module, folder / f"{name}.safetensors") for name, module in heads.items()}
