"""The letters' data: capitals of free typefaces in random ink on random paper, drawn as one goes.

`weights/masks.npz` holds the ink of every face and letter, `faces.csv` the faces' names, packages and
licences; fonts.py made both.
"""

from functools import cache
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

WEIGHTS = Path(__file__).parent / "weights"
LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
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
