"""What the tests train: the letters with few samples and steps, and the large presets on tiny pipelines."""

import dataclasses
from pathlib import Path

import torch

from ref.models.load import load
from ref.options import Pipeline
from ref.presets import PRESETS
from ref.settings import Settings
from ref.worlds import letters

from .tools import flags

# the letters as Python trains them
SMALL = Settings(iterations=2, groups=4, group_size=3, updates=2, steps=4, lr=3e-3, clip=1e-2, seed=7)
PROMPTS = letters.PROMPTS[:6]

# the letters as the command trains them
TINY = dict(iterations=4, groups=3, group_size=2, updates=1, steps=3, window=1, images_per_prompt=2)
LETTERS_SETTINGS = dataclasses.replace(PRESETS["letters"].settings, **TINY)

# the large presets, on the fixture `world`
PRESET = {"sd3": "sd35_medium", "flux": "flux_dev"}
TRAINING = ["a cat on a mat", "two red apples", 'a sign that says "hello"']
LARGE_SETTINGS = dict(
    iterations=2, groups=2, group_size=2, updates=1, micro_batch=3, steps=3, lr=1e-2, images_per_prompt=2
)


def small_model():
    model, reward, phi, _ = letters.load()
    model.add_lora(4, 8)
    return model, reward, phi


def a_model(kind, world):
    """A model and four prompts. The tiny SD3 is guided: two branches in one pass."""
    if kind == "mixture":
        return PRESETS["mixture"].task().model, [""] * 4
    if kind == "letters":
        return small_model()[0], PROMPTS[:4]
    prompts = [*TRAINING, "a house"]
    return load(
        world / kind, prompts, 32, 32, max_sequence_length=16, lora_rank=2, device="cpu", cache_dir=world / "cache"
    ), prompts


def command(folder, *extra, method="pec", preset="letters"):
    return ["--preset", preset, "--method", method, "--output-dir", str(folder), *flags(TINY), *extra]


def same(a, b):
    """Nested equality to the last bit, wall-clock times aside."""
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[k], b[k]) for k in a if not str(k).startswith("seconds"))
    if isinstance(a, list):
        return len(a) == len(b) and all(map(same, a, b))
    return torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b


def options(world: Path, kind: str) -> dict:
    return dict(
        model=str(world / kind), reward=f"pickscore={world / 'clip'}", prompts=str(world / "train.txt"),
        evaluation_prompts=str(world / "evaluation.jsonl"), evaluation_steps=2, height=32, width=32,
        max_sequence_length=16, lora_rank=4, cache_dir=world / "cache",
    )  # fmt: skip


def pipeline(world: Path, kind: str, **changes) -> Pipeline:
    return Pipeline(**options(world, kind) | changes)
