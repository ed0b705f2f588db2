"""Checkpoints that survive being killed at any moment.

A file is written beside its final name, flushed to the disk and then renamed: a reader sees the old
file or the new one, never half of one. The last two are kept, so a damaged file costs one interval.
"""

import os
import re
import signal
import sys
import threading
from collections.abc import Callable
from contextlib import contextmanager
from pathlib import Path

import torch

from ref.scale.processes import rank
from ref.scale.weights import whole

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


def snapshot(state):
    """A copy of nested dictionaries and lists in which every tensor is whole and a copy of its own, on the CPU.

    All processes must call it, for they may hold tensors in parts; others than the first, which writes, get
    None for a tensor.
    """
    if isinstance(state, torch.Tensor):
        tensor = whole(state.detach())
        return tensor.to("cpu", copy=True) if rank() == 0 else None
    if isinstance(state, dict):
        return {key: snapshot(value) for key, value in state.items()}
    return [snapshot(value) for value in state] if isinstance(state, list) else state


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


@contextmanager
def saving_on_sigterm(save: Callable[[], None]):
    """Within this context SIGTERM calls save() and ends the process with exit code 0.

    A thread of its own does it, at once: an iteration of FLUX takes minutes, a scheduler waits half a
    minute before it kills, and the main thread may be waiting for a process that has ended already.
    Off the main thread, where Python allows no signal handlers, this context does nothing.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    read, write = os.pipe()
    os.set_blocking(write, False)

    def watch():
        while byte := os.read(read, 1):  # empty when the context has ended
            if byte[0] == signal.SIGTERM:
                code = 0
                try:
                    save()
                except OSError as error:
                    code = 2
                    print(f"error: {error}", file=sys.stderr, flush=True)
                os._exit(code)

    thread = threading.Thread(target=watch, daemon=True)
    handler, descriptor = signal.signal(signal.SIGTERM, lambda *_: None), signal.set_wakeup_fd(write)
    thread.start()
    try:
        yield
    finally:
        signal.set_wakeup_fd(descriptor)
        signal.signal(signal.SIGTERM, handler)
        os.close(write)
        thread.join()
        os.close(read)
