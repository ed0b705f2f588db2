"""Text-to-image in miniature: SD3's own classes, trained from scratch on coloured capitals of free typefaces.

Data are A to Z of some hundred typefaces (`weights/letters/faces.csv` names each with its package and licence)
as masks of 32 x 32 pixels, in random ink on random paper, captioned "a letter A". The model is a real
`SD3Transformer2DModel` on the latents of a real `AutoencoderKL`, only small: 4 x 8 x 8 latents, 16 tokens.

    python -m ref.worlds.letters_base        # trains everything again, into outputs/letters_base (hours)
    python -m ref.worlds.letters_masks DIR   # draws the masks again from Debian's font packages (minutes)
    python -m ref.worlds.letters_quality     # the base model beside its data

**Reward.** What RLHF has: a hidden rater (`utility`: legible, heavy, contrasty) chose among pairs of renders,
and a network learnt to predict the choices (`Preference`). It can be over-optimised. A second network, trained on
other pairs, and the rater's own utility are held out. `Lean` is another reward, a rule: ink to the right of the
middle, read by RapidOCR. The base model rarely meets it, and every face and every hue can.

**Perceptual space.** phi is trained contrastively (SimCLR, arXiv 2002.05709) to tell one picture from others of
the same letter, in the same colours or the same face, whatever noise, blur, compression and blotches do to it:
it sees the face and the hues and is blind to what a policy could spoil a picture with.

**Judges.** RapidOCR's recogniser (recogniser.py), which nobody here trained, says how many letters are
read; a classifier of typefaces says how many faces are drawn.
"""

from functools import cache
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from ref.models.sd3 import SD3
from ref.worlds.recogniser import Recogniser

WEIGHTS = Path(__file__).parent / "weights" / "letters"
LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
VOCABULARY = ("", "a", "letter", *LETTERS)
PROMPTS = [f"a letter {letter}" for letter in LETTERS]
SIDE = 32  # pixels
CONTRAST = 0.35  # least difference of the luma of ink and paper
LUMA = (0.299, 0.587, 0.114)


def pack(masks: np.ndarray) -> np.ndarray:
    """[..., SIDE, SIDE] in [0, 1] -> 16 levels, two pixels a byte, [..., SIDE * SIDE / 2]."""
    levels = np.rint(masks * 15).astype(np.uint8).reshape(*masks.shape[:-2], -1, 2)
    return levels[..., 0] << 4 | levels[..., 1]


def unpack(packed: np.ndarray) -> np.ndarray:
    """The inverse of `pack`, float32."""
    levels = np.stack([packed >> 4, packed & 15], -1).reshape(*packed.shape[:-1], SIDE, SIDE)
    return levels.astype(np.float32) / 15


@cache
def masks() -> Float[Tensor, "faces 26 32 32"]:
    """Ink of every face and letter, in [0, 1]."""
    return torch.from_numpy(unpack(np.load(WEIGHTS / "masks.npz")["masks"]))


def luma(colours: Float[Tensor, "... 3"]) -> Float[Tensor, "..."]:
    return colours @ torch.tensor(LUMA)


def palettes(count: int, generator: torch.Generator) -> tuple[Float[Tensor, "{count} 3"], Float[Tensor, "{count} 3"]]:
    """Random ink and paper, uniform among those whose luma differs by at least CONTRAST."""
    kept = torch.empty(0, 2, 3)
    while len(kept) < count:
        drawn = torch.rand(4 * count, 2, 3, generator=generator)
        kept = torch.cat([kept, drawn[luma(drawn).diff(dim=1).abs()[:, 0] >= CONTRAST]])
    ink, paper = kept[:count].unbind(1)
    return ink, paper


def paint(
    masks: Float[Tensor, "B 32 32"], ink: Float[Tensor, "B 3"], paper: Float[Tensor, "B 3"]
) -> Float[Tensor, "B 3 32 32"]:
    return torch.lerp(paper[..., None, None], ink[..., None, None], masks[:, None])


def renders(
    count: int, generator: torch.Generator, letters: Int[Tensor, " {count}"] | None = None
) -> tuple[Float[Tensor, "{count} 3 32 32"], Int[Tensor, " {count}"], Int[Tensor, " {count}"]]:
    """Images, their letters (random ones unless given) and their faces: the data, drawn as one goes."""
    every = masks()
    if letters is None:
        letters = torch.randint(len(LETTERS), (count,), generator=generator)
    faces = torch.randint(len(every), (count,), generator=generator)
    return paint(every[faces, letters], *palettes(count, generator)), letters, faces


def label(prompt: str) -> int:
    """The letter that a caption names. Raises ValueError when it names none or two."""
    found = [LETTERS.index(word) for word in prompt.split() if len(word) == 1 and word in LETTERS]
    if len(found) != 1:
        raise ValueError(f"the caption {prompt!r} must name exactly one capital, as in {PROMPTS[7]!r}")
    return found[0]


def labels(prompts: list[str]) -> Int[Tensor, " B"]:
    return torch.tensor([label(p) for p in prompts])


class CaptionEncoder(nn.Module):
    """Word embeddings in place of SD3's CLIP and T5. The empty caption serves guidance."""

    def __init__(self, dim: int = 64, length: int = 3):
        super().__init__()
        self.length = length
        self.words = nn.Embedding(len(VOCABULARY), dim)
        self.position = nn.Parameter(torch.zeros(length, dim))
        self.pool = nn.Linear(dim, dim)

    def tokens(self, prompts: list[str]) -> Int[Tensor, "B L"]:
        unknown = {w for p in prompts for w in p.split()} - set(VOCABULARY)
        if unknown:
            raise ValueError(f"unknown word {min(unknown)!r}; this model knows {', '.join(VOCABULARY[1:])}")
        rows = [[VOCABULARY.index(w) for w in p.split()][: self.length] for p in prompts]
        return torch.tensor([row + [0] * (self.length - len(row)) for row in rows])

    def embed(self, tokens: Int[Tensor, "B L"]) -> dict[str, Tensor]:
        embeds = self.words(tokens) + self.position
        return {"prompt_embeds": embeds, "pooled_prompt_embeds": self.pool(embeds.mean(1))}

    @torch.no_grad()
    def forward(self, prompts: list[str]) -> dict[str, Tensor]:
        """Captions -> prompt_embeds [B, L, E] and pooled_prompt_embeds [B, E], and the negative pair."""
        negative = self.embed(self.tokens([""] * len(prompts)))
        return self.embed(self.tokens(prompts)) | {f"negative_{k}": v for k, v in negative.items()}


def convolutional(out: int, channels: int = 3, width: int = 32, hidden: int = 128) -> nn.Sequential:
    """The network of phi, of the raters and of the classifiers: [B, channels, 32, 32] -> [B, out]."""
    return nn.Sequential(
        nn.Conv2d(channels, width, 3, stride=2, padding=1), nn.GELU(),
        nn.Conv2d(width, 2 * width, 3, stride=2, padding=1), nn.GELU(),
        nn.Conv2d(2 * width, 4 * width, 3, stride=2, padding=1), nn.GELU(),
        nn.Flatten(), nn.Linear(4 * width * 16, hidden), nn.GELU(), nn.Linear(hidden, out),
    )  # fmt: skip


class Preference(nn.Module):
    """A neural reward model: a score whose difference predicts which of two images the rater chooses, [B]."""

    name = "preference model"

    def __init__(self):
        super().__init__()
        self.net = convolutional(1, hidden=64)
        self.letters = nn.Embedding(len(LETTERS), 64)
        self.scale = nn.Parameter(torch.ones(()), requires_grad=False)  # such that renders have mean 0 and std 1
        self.shift = nn.Parameter(torch.zeros(()), requires_grad=False)

    def score(self, images: Float[Tensor, "B 3 32 32"], letters: Int[Tensor, " B"]) -> Float[Tensor, " B"]:
        hidden = self.net[:-1](images * 2 - 1)
        raw = self.net[-1](hidden)[:, 0] + (hidden * self.letters(letters)).sum(1) / 8
        return (raw - self.shift) / self.scale

    @torch.no_grad()
    def forward(self, images: Float[Tensor, "B 3 32 32"], prompts: list[str]) -> Float[Tensor, " B"]:
        return self.score(images, labels(prompts))


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


def right(images: Float[Tensor, "B 3 32 32"]) -> Float[Tensor, " B"]:
    """Pixels from the middle of the page to the centroid of the ink, positive to the right."""
    columns = ink(images)[0].square().sum(1)  # squared: faint noise far out weighs little
    x = torch.arange(SIDE) - (SIDE - 1) / 2
    return (columns * x).sum(1) / columns.sum(1).clamp_min(1e-6)


class Faces(nn.Module):
    """Which typeface a letter is set in: a classifier over all faces of the data that sees the ink and knows the letter."""

    def __init__(self, faces: int):
        super().__init__()
        self.net = convolutional(faces, channels=1, hidden=256)
        self.letters = nn.Embedding(len(LETTERS), 256)

    def logits(self, images: Float[Tensor, "B 3 32 32"], letters: Int[Tensor, " B"]) -> Float[Tensor, "B faces"]:
        return self.net[-2:](self.net[:-2](ink(images)[0][:, None] * 2 - 1) + self.letters(letters))

    @torch.no_grad()
    def forward(self, images: Float[Tensor, "B 3 32 32"], prompts: list[str]) -> Float[Tensor, "B faces"]:
        return self.logits(images, labels(prompts))

    def effective_number(self, images: Float[Tensor, "B 3 32 32"], prompts: list[str]) -> float:
        """1 / probability that two images of a prompt show the same face; all pairs, so no bias from their number."""
        shown = self(images, prompts).argmax(1)
        groups = [shown[labels(prompts) == c].bincount().double() for c in labels(prompts).unique()]
        same, pairs = (
            sum(f(n) for n in groups) for f in (lambda n: (n * (n - 1)).sum(), lambda n: n.sum() * (n.sum() - 1))
        )
        return (pairs / same.clamp_min(1)).item()


def read_heads(folder: Path) -> dict[str, nn.Module]:
    """The small networks beside the model, frozen: captions, phi, rater, two preference models, faces."""
    from safetensors.torch import load_file

    heads = {
        "captions": CaptionEncoder(), "phi": Phi(), "rater": Rater(), "preference": Preference(),
        "held_out": Preference(), "faces": Faces(len(masks())),
    }  # fmt: skip
    for name, module in heads.items():
        module.load_state_dict({k: v.float() for k, v in load_file(folder / f"{name}.safetensors").items()})
        module.eval().requires_grad_(False)
    return heads


def load_model(folder: Path | str = WEIGHTS, guidance_scale: float = 1.0) -> SD3:
    """The text-to-image model alone, frozen. Raises FileNotFoundError with the remedy."""
    from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, SD3Transformer2DModel
    from safetensors.torch import load_file

    folder = Path(folder)
    if not (folder / "captions.safetensors").exists():
        raise FileNotFoundError(
            f"no letters weights in {folder}; make them with: python -m ref.worlds.letters_base --output-dir {folder}"
        )
    captions = CaptionEncoder()
    captions.load_state_dict({k: v.float() for k, v in load_file(folder / "captions.safetensors").items()})
    transformer = SD3Transformer2DModel.from_pretrained(folder / "transformer").float()
    vae = AutoencoderKL.from_pretrained(folder / "vae").float()
    scheduler = FlowMatchEulerDiscreteScheduler.from_pretrained(folder / "scheduler")
    return SD3(transformer, vae, scheduler, captions.eval().requires_grad_(False), guidance_scale=guidance_scale)


def load(folder: Path | str = WEIGHTS, guidance_scale: float = 1.0) -> tuple[SD3, Preference, Phi, Judge]:
    """(model, reward, encoder, judge), frozen and in eval mode. Raises FileNotFoundError with the remedy."""
    model, heads = load_model(folder, guidance_scale), read_heads(Path(folder))
    return model, heads["preference"], heads["phi"], Judge()
