"""A run's directory: whose it is, and what is written there.

run.json holds what the run was asked for; a directory belongs to one run. With several processes the first one
writes, and all must see the directory.
"""

import json
from pathlib import Path

from torch import Tensor

from ref.scale.checkpoint import atomic_write

# What a resumed run may have otherwise: its length, and what moves memory and time, or roundings at most.
MAY_CHANGE = ("iterations", "micro_batch", "memory", "gradient_checkpointing", "tiling", "decode_batch", "cache_dir")


def write_json(path: Path, value) -> None:
    atomic_write(path, lambda temporary: temporary.write_text(json.dumps(value, indent=1) + "\n"))


def claim(folder: Path, description: dict, resume: bool) -> None:
    """Make `folder` this run's, or raise ValueError when it holds another run."""
    record = folder / "run.json"
    if not record.exists():
        folder.mkdir(parents=True, exist_ok=True)
        return write_json(record, description)
    if not resume:
        raise ValueError(f"{folder} holds a run already; continue it with --resume or choose another --output-dir")
    old, new = flat(json.loads(record.read_text())), flat(description)
    for name in dict.fromkeys([*new, *old]):
        if name in old and name not in MAY_CHANGE and old[name] != new.get(name):  # an earlier version knew fewer
            raise ValueError(
                f"{folder} holds a run with {name} = {old[name]}, not {new.get(name)}; choose another --output-dir"
            )


def flat(description: dict) -> dict:
    """What run.json holds, options and settings among the rest."""
    parts = (description, description.get("options") or {}, description["settings"])
    return {k: v for part in parts for k, v in part.items() if k not in ("options", "settings")}


def save_grid(path: Path, images: Tensor, columns: int) -> None:
    """One PNG, a line for each prompt."""
    from torchvision.utils import save_image

    path.parent.mkdir(exist_ok=True)
    atomic_write(path, lambda temporary: save_image(images, temporary, nrow=columns, format="png"))
