"""Checkpoints that survive being killed at any moment.

A file is written beside its final name, flushed to the disk and then renamed: a reader sees the old
file or the new one, never half of one. The last two are kept, so a damaged file costs one interval.
"""

import os
import re
import sys
from pathlib import Path

import torch

KEEP = 2


def atomic_write(path: Path, write) -> None:
    """Call write(temporary_path), then move the result to `path` in one step.

    Raises OSError naming `path` and the remedy when the disk is full or read-only; `path` is then untouched.
    """
    temporary = path.with_name(path.name + ".tmp")
    try:
        write(temporary)
        with open(temporary, "rb") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except (OSError, RuntimeError) as error:  # torch reports a full disk as RuntimeError
        temporary.unlink(missing_ok=True)
        raise OSError(f"cannot write {path}: {error}; free disk space or choose another --output-dir") from error


def checkpoints(folder: Path) -> list[Path]:
    """The checkpoint files of a run, newest first."""
    found = [p for p in folder.glob("checkpoint-*.pt") if re.fullmatch(r"checkpoint-\d+", p.stem)]
    return sorted(found, reverse=True)


def save(folder: Path, state: dict) -> Path:
    """Write `state` (tensors and plain Python values) as checkpoint-<iteration>.pt and prune old ones."""
    path = folder / f"checkpoint-{state['iteration']:08d}.pt"
    atomic_write(path, lambda temporary: torch.save(state, temporary))
    for old in checkpoints(folder)[KEEP:]:
        old.unlink()
    return path


def load_latest(folder: Path, device: str = "cpu") -> dict | None:
    """The newest readable checkpoint, or None where a run has none yet.

    A damaged file is named on stderr and the one before it is taken. Raises ValueError when all are damaged.
    """
    files = checkpoints(folder)
    for path in files:
        try:
            return torch.load(path, map_location=device, weights_only=True)
        except Exception as error:  # a torn zip, a short read and a bad pickle all raise different types
            reason = (str(error).splitlines() or [type(error).__name__])[0]
            print(f"warning: {path} is damaged ({reason}); trying the checkpoint before it", file=sys.stderr)
    if files:
        raise ValueError(f"no readable checkpoint in {folder}; delete the folder and start again")
    return None
