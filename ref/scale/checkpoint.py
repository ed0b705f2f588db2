"""Checkpoints that survive being killed at any moment, and are trusted no further than they deserve.

A file is written beside its final name, flushed to the disk and then renamed: a reader sees the old
file or the new one, never half of one. The last two are kept, so a damaged file costs one interval.

    damaged        a byte differs from what was written (the zip's CRC): named, and the one before it is taken
    foreign        whole, but not of this project: refused
    incompatible   of other weights than the model's: refused, naming the first that differs
"""

import os
import re
import sys
import zipfile
from collections.abc import Callable
from numbers import Integral, Number
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from ref.scale.processes import rank
from ref.scale.weights import whole

KEEP = 2
PARTS = {"iteration": int, "bandwidth": float, "weights": dict, "optimizer": dict, "ema": (dict, type(None))}
LATER = {  # not in all versions
    "kernel": (float, type(None)),
    "places": (list, type(None)),
    "multiplier": tuple,
    "history": list,
    "run": dict,
}


def atomic_write(path: Path, write: Callable[[Path], object]) -> None:
    """Call write(temporary_path), then move the result to `path` in one step. A missing folder is made.

    Raises OSError naming `path` and the remedy when the disk is full or read-only; `path` is then untouched.
    """
    temporary = path.with_name(path.name + ".tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write(temporary)
        with open(temporary, "rb") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except (OSError, RuntimeError) as error:  # torch reports a full disk as RuntimeError
        remove(temporary)
        raise OSError(f"cannot write {path}: {error}; free disk space or choose another --output-dir") from error
    except BaseException:  # Ctrl-C
        remove(temporary)
        raise


def remove(path: Path) -> None:
    """Remove a file where that is possible; where it is not, there is something worse to report."""
    try:
        path.unlink(missing_ok=True)
    except OSError:
        pass


def checkpoints(folder: Path) -> list[Path]:
    """The checkpoint files of a run, newest first."""
    found = [p for p in folder.glob("checkpoint-*.pt") if re.fullmatch(r"checkpoint-\d+", p.stem)]
    return sorted(found, key=iteration, reverse=True)


def iteration(path: Path) -> int:
    """The iteration that a checkpoint's name tells."""
    return int(path.stem.partition("-")[2])


def snapshot(state):
    """A copy of nested dictionaries and lists in which every tensor is whole and a copy of its own, on the CPU.

    All processes must call it, for they may hold tensors in parts; others than the first, which writes, get
    None for a tensor.
    """
    if isinstance(state, Tensor):
        tensor = whole(state.detach())
        return tensor.to("cpu", copy=True) if rank() == 0 else None
    if isinstance(state, dict):
        return {key: snapshot(value) for key, value in state.items()}
    return [snapshot(value) for value in state] if isinstance(state, list) else state


def plain(state, name: str | int = ""):
    """Nested values with all numbers as Python's own: NumPy's would make a checkpoint unreadable, and are no JSON.

    Raises ValueError naming what a checkpoint cannot hold.
    """
    if isinstance(state, dict):
        return {key: plain(value, key) for key, value in state.items()}
    if isinstance(state, (list, tuple)) and type(state) in (list, tuple):
        return type(state)(plain(value, name) for value in state)
    if state is None or isinstance(state, Tensor) or type(state) in (bool, int, float, str):
        return state
    if isinstance(state, (np.generic, np.ndarray)):
        return plain(state.tolist(), name)
    if isinstance(state, Number) and not isinstance(state, complex):
        return int(state) if isinstance(state, Integral) else float(state)
    raise ValueError(f"{name} must be a number, got {type(state).__name__}")


def save(folder: Path, state: dict) -> Path:
    """Write `state` (tensors and plain Python values) as checkpoint-<iteration>.pt and prune old ones."""
    path, state = folder / f"checkpoint-{state['iteration']:08d}.pt", plain(state)
    atomic_write(path, lambda temporary: torch.save(state, temporary))
    for old in checkpoints(folder)[KEEP:]:
        old.unlink()
    return path


def load_latest(folder: Path, device: str = "cpu", check: Callable[[Path, dict], None] | None = None) -> dict | None:
    """The newest readable checkpoint, or None where a run has none yet.

    A damaged file is named on stderr and the one before it is taken. Raises ValueError when all are damaged, for
    a file that is not of this project, and where check(path, state) does.
    """
    files = checkpoints(folder)
    for path in files:
        try:
            with zipfile.ZipFile(path) as parts:
                torn = parts.testzip()  # torch.load does not look at the checksums
            if torn:
                raise ValueError(f"wrong checksum of {torn}")
        except Exception as error:  # a torn zip and a short read raise different types
            reason = (str(error).splitlines() or [type(error).__name__])[0]
            print(f"warning: {path} is damaged ({reason}); trying the checkpoint before it", file=sys.stderr)
            continue
        state = read(path, device)
        if check:
            check(path, state)
        return state
    if files:
        raise ValueError(f"no readable checkpoint in {folder}; put a copy back, or choose another --output-dir")
    return None


def read(path: Path, device: str = "cpu") -> dict:
    """What an undamaged file holds. Raises ValueError where that is not a checkpoint of this project."""
    try:
        state = torch.load(path, map_location=device, weights_only=True)
    except Exception as error:  # whole, yet not what torch.save wrote of plain values
        raise foreign(path, str(error).splitlines()[0] if str(error) else type(error).__name__) from None
    if not isinstance(state, dict):
        raise foreign(path, f"it holds a {type(state).__name__}")
    for name, kind in (PARTS | LATER).items():
        if name in PARTS and name not in state:
            raise foreign(path, f"it lacks {name!r}")
        if name in state and not isinstance(state[name], kind):
            raise foreign(path, f"its {name} is a {type(state[name]).__name__}")
    if {kind: type(value) for kind, value in state["optimizer"].items()} != {"state": dict, "param_groups": list}:
        raise foreign(path, "its optimizer is not one of torch's")
    if state["iteration"] != iteration(path):
        raise foreign(path, f"it is of iteration {state['iteration']}")
    return state


def foreign(path: Path, reason: str) -> ValueError:
    return ValueError(
        f"{path} is not a checkpoint of this project ({reason}); move it out of the folder, or choose another --output-dir"
    )


def compatible(path: Path, saved: dict, weights: dict[str, Tensor], averaged: bool) -> None:
    """Raise ValueError in one line where a checkpoint is of other weights than `weights`, or has no averages of them."""
    moments = saved["optimizer"]["state"]
    if any(group.get("params") != list(range(len(saved["weights"]))) for group in saved["optimizer"]["param_groups"]):
        raise foreign(path, "its optimizer is not that of its weights")
    held = {
        "": saved["weights"],
        "the average of ": (saved["ema"] or {}) if averaged else None,
        **{f"the {kind} of ": {name: moments[n].get(kind) for n, name in enumerate(weights) if n in moments}
           for kind in ("exp_avg", "exp_avg_sq")},
    }  # fmt: skip
    for what, tensors in held.items():
        if tensors is None:
            continue
        partly = what.startswith("the exp_avg")  # a weight that never had a gradient has no moments
        for name in tensors if partly else dict.fromkeys([*weights, *tensors]):
            mine, theirs = described(weights.get(name)), described(tensors.get(name))
            if mine != theirs:
                raise ValueError(
                    f"{path} does not fit the model: {what}{name} is {theirs} there, {mine} in the model; "
                    "continue with the model it was saved from, or choose another --output-dir"
                )


def described(tensor) -> str:
    if isinstance(tensor, Tensor):
        return f"{list(tensor.shape)} {str(tensor.dtype).removeprefix('torch.')}"
    return "missing" if tensor is None else f"a {type(tensor).__name__}"
