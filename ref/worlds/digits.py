"""Text-to-image in miniature: SD3's own classes, trained from scratch on scanned handwritten digits.

Data are the 1,797 digits of scikit-learn (8 x 8 pixels, 17 grey levels; E. Alpaydin and C. Kaynak,
UCI repository, 1998), written by many hands, captioned "a handwritten seven". The model is a real
`SD3Transformer2DModel` on the latents of a real `AutoencoderKL`, only small: 4 x 4 x 4 latents.

    python -m ref.worlds.digits_base       # trains everything again, into outputs/digits_base (minutes)

**Reward.** One writing style among the many in the data, legibly written, in [0, 1]:

    R(x, c) = p_reader(c | x) * sigmoid((slant(x) - q_c) / tau_c)

slant is the shear that would set the digit upright, mu_xy / mu_yy of the ink; q_c is the median and
tau_c an eighth of the standard deviation of the slants of real digits of class c. So half of all
people write the way this reward likes, in all their variety (the right-leaning half of the real
digits has 91 % of the feature variance of all), and beyond q_c the sigmoid saturates: a loss of
diversity is nothing that the reward asks for. Nor does a page without a digit win it.

**Perceptual space.** phi is a small convolutional network trained contrastively (SimCLR, arXiv
2002.05709) to tell each single digit image from every other one under small shifts and noise, so it
keeps what makes one "seven" different from the next. Features have unit norm.

**Judge.** A second reader, of another architecture, trained on the half of the data that the
reward's reader has not seen, and used by nothing but the evaluation, measures legibility.
"""

from functools import cache
from pathlib import Path

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from ref.models.sd3 import SD3
from ref.worlds.captions import CaptionEncoder

WEIGHTS = Path(__file__).parent / "weights" / "digits"
NAMES = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
VOCABULARY = ("", "a", "handwritten", *NAMES)
PROMPTS = [f"a handwritten {name}" for name in NAMES]


@cache
def data() -> tuple[Float[Tensor, "1797 1 8 8"], Int[Tensor, " 1797"]]:
    """Images in [0, 1] (ink is 1) and labels."""
    from sklearn.datasets import load_digits

    digits = load_digits()
    images = torch.tensor(digits.images, dtype=torch.float32)[:, None] / 16
    return images, torch.tensor(digits.target)


def label(prompt: str) -> int:
    """The digit that a caption names. Raises ValueError when it names none or two."""
    found = [i for i, name in enumerate(NAMES) if name in prompt.split()]
    if len(found) != 1:
        raise ValueError(f"the caption {prompt!r} must name exactly one digit, as in {PROMPTS[7]!r}")
    return found[0]


def convolutional(out: int, width: int = 32) -> nn.Sequential:
    """The network of phi and of the reward's reader: [B, 1, 8, 8] -> [B, out]."""
    return nn.Sequential(
        nn.Conv2d(1, width, 3, padding=1), nn.GELU(),
        nn.Conv2d(width, 2 * width, 3, stride=2, padding=1), nn.GELU(),
        nn.Conv2d(2 * width, 2 * width, 3, padding=1), nn.GELU(),
        nn.Flatten(), nn.Linear(2 * width * 16, 128), nn.GELU(), nn.Linear(128, out),
    )  # fmt: skip


def dense(out: int) -> nn.Sequential:
    """The judge's network, deliberately another one."""
    return nn.Sequential(
        nn.Flatten(), nn.Linear(64, 256), nn.ReLU(), nn.Linear(256, 128), nn.ReLU(), nn.Linear(128, out)
    )


class Phi(nn.Module):
    """The perceptual encoder: images [B, 1, 8, 8] -> unit-norm features [B, 32]."""

    name = "digits contrastive"

    def __init__(self, dim: int = 32):
        super().__init__()
        self.net = convolutional(dim)

    def forward(self, images: Float[Tensor, "B C H W"]) -> Float[Tensor, "B D"]:
        return F.normalize(self.net(images * 2 - 1), dim=1)


def slant(images: Float[Tensor, "B C H W"]) -> Float[Tensor, " B"]:
    """Shear of the ink in pixels per pixel: positive leans right, 0 is upright."""
    w = images[:, 0]
    w = w / w.sum((1, 2), keepdim=True).clamp_min(1e-6)
    y = torch.arange(w.shape[1], 0, -1, dtype=w.dtype).view(1, -1, 1)  # upwards
    x = torch.arange(w.shape[2], dtype=w.dtype).view(1, 1, -1)
    x = x - (w * x).sum((1, 2), keepdim=True)
    y = y - (w * y).sum((1, 2), keepdim=True)
    return (w * x * y).sum((1, 2)) / (w * y * y).sum((1, 2)).clamp_min(1e-6)


@cache
def slant_scale() -> tuple[Tensor, Tensor]:
    """(q_c, tau_c), both [10]: the reward's threshold and softness for each digit, from the data."""
    images, labels = data()
    per_class = [slant(images[labels == c]) for c in range(10)]
    return torch.stack([s.median() for s in per_class]), torch.stack([s.std() / 8 for s in per_class])


class SlantReward(nn.Module):
    """R = p_reader(c | x) sigmoid((slant - q_c) / tau_c), [B] in [0, 1]."""

    name = "legible slant"

    def __init__(self, reader: nn.Module):
        super().__init__()
        self.reader = reader

    @torch.no_grad()
    def forward(self, images: Float[Tensor, "B C H W"], prompts: list[str]) -> Float[Tensor, " B"]:
        c = torch.tensor([label(p) for p in prompts])
        q, tau = (scale[c] for scale in slant_scale())
        legible = self.reader(images * 2 - 1).softmax(1)[torch.arange(len(c)), c]
        return legible * torch.sigmoid((slant(images) - q) / tau)


class ReaderFeatures(nn.Module):
    """The reward model's own features: the last hidden layer of its reader, [B, 1, 8, 8] -> unit-norm [B, 128]."""

    name = "digits reader"

    def __init__(self, reader: nn.Sequential):
        super().__init__()
        self.net = reader[:-1]

    def forward(self, images: Float[Tensor, "B C H W"]) -> Float[Tensor, "B D"]:
        return F.normalize(self.net(images * 2 - 1), dim=1)


def encoders(reward: SlantReward, phi: Phi) -> dict[str, nn.Module]:
    """The perceptual spaces: phi, the reward model's features, and as a control an untrained network."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        untrained = Phi().eval().requires_grad_(False)
    untrained.name = "digits random"
    return {"contrastive": phi, "reader": ReaderFeatures(reward.reader), "random": untrained}


@torch.no_grad()
def legibility(judge: nn.Module, images: Tensor, prompts: list[str]) -> float:
    """Share of images in which the judge reads the digit that the caption asked for."""
    c = torch.tensor([label(p) for p in prompts])
    return (judge(images * 2 - 1).argmax(1) == c).float().mean().item()


def load(folder: Path | str = WEIGHTS) -> tuple[SD3, SlantReward, Phi, nn.Module]:
    """(model, reward, encoder, judge), frozen and in eval mode. Raises FileNotFoundError with the remedy."""
    from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, SD3Transformer2DModel
    from safetensors.torch import load_file

    folder = Path(folder)
    if not (folder / "heads.safetensors").exists():
        raise FileNotFoundError(
            f"no digits weights in {folder}; make them with: python -m ref.worlds.digits_base --output-dir {folder}"
        )
    heads = {"captions": CaptionEncoder(VOCABULARY), "phi": Phi(), "reader": convolutional(10), "judge": dense(10)}
    weights = load_file(folder / "heads.safetensors")
    for key, module in heads.items():
        module.load_state_dict({k.removeprefix(key + "."): v for k, v in weights.items() if k.startswith(key + ".")})
        module.eval().requires_grad_(False)
    transformer = SD3Transformer2DModel.from_pretrained(folder / "transformer")
    vae = AutoencoderKL.from_pretrained(folder / "vae")
    scheduler = FlowMatchEulerDiscreteScheduler.from_pretrained(folder / "scheduler")
    return (
        SD3(transformer, vae, scheduler, heads["captions"]),
        SlantReward(heads["reader"]),
        heads["phi"],
        heads["judge"],
    )
