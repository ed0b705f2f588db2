"""A run's directory: whose it is, who works in it, and what is written there.

run.json holds what the run was asked for. A directory belongs to one run, and one process at a time works in it.
A run is there when it has left something: a checkpoint, metrics, an evaluation, weights. What has ended before
that leaves nothing, so the corrected command just runs. With several processes the first one does all this, and
all must see the directory.
"""

import json
import os
import shutil
import threading
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path

import torch
from filelock import FileLock, Timeout
from torch import Tensor

from ref.scale import checkpoint
from ref.scale.checkpoint import atomic_write
from ref.scale.paths import refuse_unwritable
from ref.scale.processes import over_processes, processes

RECORD, LOCK = "run.json", "run.lock"
LEFT = ("metrics.json", "evaluation.json", "weights")  # what a run leaves besides checkpoints
HABITS = ("save_every", "evaluate_every", "log_with")  # in run.json for --resume; they change nothing of the run
# What a resumed run may have otherwise: what moves memory and time, or roundings at most; and its length, see below.
MAY_CHANGE = (
    *HABITS, "iterations", "stop_below_diversity", "micro_batch", "memory", "gradient_checkpointing", "tiling",
    "decode_batch", "compile_blocks", "cache_dir",
)  # fmt: skip


def write_json(path: Path, value) -> None:
    """Write atomically; NumPy's and torch's numbers become plain ones."""
    text = json.dumps(value, indent=1, default=lambda number: number.tolist()) + "\n"
    atomic_write(path, lambda temporary: temporary.write_text(text, encoding="utf-8"))


def left(folder: Path) -> list[Path]:
    """What a run has left in the folder, its newest checkpoint first."""
    return [*checkpoint.checkpoints(folder), *(folder / name for name in LEFT if (folder / name).exists())]


def read_record(
    folder: Path, needed: Iterable[str] = (), of_settings: Iterable[str] = (), of_options: Iterable[str] = ()
) -> dict:
    """run.json. Raises ValueError naming the file where it is damaged, or lacks one of the names."""
    path = folder / RECORD
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, OSError, RecursionError) as error:  # bad JSON and bad UTF-8 are ValueErrors
        raise unreadable(path, " ".join(str(error).split())) from None
    if not isinstance(record, dict):
        raise unreadable(path, f"it holds a {type(record).__name__}, not an object")
    known = {"preset", "method", "weight", "space", "encoder", "reward", "settings", "options", *HABITS}
    for name in record:
        if name not in known:
            raise unreadable(path, f"there is no option {name}")
    for part in ("settings", "options"):
        if not isinstance(record.get(part, {}), dict):
            raise unreadable(path, f"{part} must be an object, got {record[part]!r}")
    parts = (
        (("settings", *needed), record),
        (of_settings, record.get("settings")),
        (of_options, record.get("options")),
    )
    for names, part in parts:
        for name in names:
            if name not in part:
                raise unreadable(path, f"{name} is missing")
    return record


def unreadable(path: Path, reason: str) -> ValueError:
    return ValueError(f"{path} cannot be used: {reason}; mend it or choose another --output-dir")


def identity(description: dict) -> dict:
    """What makes a run this one and no other, options and settings among the rest.

    Its length is a part of it where the learning rate falls to 0 at the last iteration: a longer run would
    have had other learning rates from the start.
    """
    parts = (description, description.get("options") or {}, description["settings"])
    names = {k: v for part in parts for k, v in part.items() if k not in ("options", "settings")}
    fixed = {"iterations"} if names.get("lr_schedule", "constant") != "constant" else set()
    return {k: v for k, v in names.items() if k not in MAY_CHANGE or k in fixed}


def refuse_other(of: str, old: dict, new: dict) -> None:
    """Raise ValueError in one line where two identities differ; `of` is what holds the old one."""
    for name in dict.fromkeys([*new, *old]):
        if old.get(name) != new.get(name):
            why = " and a learning rate that falls until then" if name == "iterations" else ""
            raise ValueError(
                f"{of} holds a run with {name} = {old.get(name)}{why}, not {new.get(name)}; choose another --output-dir"
            )


def refuse_another(folder: Path, description: dict, resume: bool = True) -> None:
    """Raise ValueError where a run of this description cannot be started in the folder, or with `resume` continued."""
    found, record = left(folder), folder / RECORD
    if not found:
        return  # nothing that could be lost
    if not record.exists():
        raise ValueError(
            f"{folder} holds {found[0].name} but no {RECORD}, which tells of what run; "
            f"put {RECORD} back or choose another --output-dir"
        )
    if not resume:
        raise ValueError(f"{folder} holds a run already; continue it with --resume or choose another --output-dir")
    refuse_other(str(folder), identity(read_record(folder)), identity(description))
    saved, asked = checkpoint.checkpoints(folder), description["settings"]["iterations"]
    if not saved and (folder / "metrics.json").exists():
        raise ValueError(
            f"{folder} holds metrics.json but no checkpoint to continue from; put one back or choose another --output-dir"
        )
    if saved and checkpoint.iteration(saved[0]) > asked:
        raise ValueError(
            f"{folder} holds a run that has reached iteration {checkpoint.iteration(saved[0])}, more than {asked}; "
            "give as many --iterations at least, or choose another --output-dir"
        )


def load(folder: Path, weights: dict[str, Tensor], averaged: bool, same: dict) -> dict | None:
    """The newest checkpoint of a run, None where it has none yet.

    weights, averaged   what is trained, and whether averages of it are kept
    same                "run" (an identity), "prompts" and "embeddings" (their keys), which must be those that were saved

    Raises ValueError in one line when a checkpoint is of something else, or processes see different ones.
    """

    def check(path: Path, saved: dict) -> None:
        if len(saved.get("history", ())) != saved["iteration"]:
            raise checkpoint.foreign(path, "its history is not that of its iterations")
        refuse_other(str(path), saved.get("run", same["run"]), same["run"])
        if any(saved.get(name, same[name]) != same[name] for name in ("prompts", "embeddings")):
            raise ValueError(f"the run in {folder} had other prompts or text encoders; choose another --output-dir")
        checkpoint.compatible(path, saved, weights, averaged)

    saved = checkpoint.load_latest(folder, check=check)
    reached = saved["iteration"] if saved else 0
    if processes() > 1:
        device = "cuda" if torch.distributed.get_backend() == "nccl" else "cpu"
        both = torch.tensor([[reached], [-reached]], dtype=torch.float32, device=device)
        if sum(over_processes(each, largest=True) for each in both):  # the most and the least: all of them say so
            raise ValueError(f"not every process sees the checkpoints in {folder}; it must lie on a shared file system")
    return saved


def farewell(folder: Path, again: str) -> str:
    """What to say when a run has been stopped."""
    saved = checkpoint.checkpoints(folder)
    if not saved:
        return "stopped before an iteration was finished, nothing is left behind; the same command starts again"
    return f"stopped; iteration {checkpoint.iteration(saved[0])} is saved in {folder}; {again}"


class Alone:
    """The only process at work in a folder, which is made where it is missing. A context, or ended by `leave`.

    The lock is the operating system's and ends with the process, however that ends. Raises ValueError when another
    process holds it, OSError when the folder cannot be written. An empty folder that was made is taken away again.
    """

    def __init__(self, folder: Path):
        refuse_unwritable(folder / RECORD, "--output-dir")
        self.folder, self.made = folder, [f for f in (folder, *folder.parents) if not f.exists()]
        folder.mkdir(parents=True, exist_ok=True)
        self.lock = FileLock(folder / LOCK, timeout=0, thread_local=False)
        try:
            self.lock.acquire()
        except Timeout:
            raise ValueError(
                f"another process{self.holder()} is at work in {folder}; wait for its end or choose another --output-dir"
            ) from None
        with suppress(OSError):  # Windows locks the content too
            (folder / LOCK).write_text(f"{os.getpid()}\n")

    def holder(self) -> str:
        with suppress(OSError, ValueError):
            return f" ({int((self.folder / LOCK).read_text())})"
        return ""

    def leave(self) -> None:
        if self.lock.is_locked:
            checkpoint.remove(self.folder / LOCK)  # while it is held: who opened it meanwhile sees that it is gone
            self.lock.release()
            with suppress(OSError):  # not empty
                for folder in self.made:
                    folder.rmdir()

    def __enter__(self) -> "Alone":
        return self

    def __exit__(self, *_) -> None:
        self.leave()


class Claim(Alone):
    """A folder that belongs to one run, as described. Raises ValueError also where it holds another one."""

    def __init__(self, folder: Path, description: dict, resume: bool):
        super().__init__(folder)
        self.had_record = (folder / RECORD).exists()
        try:
            refuse_another(folder, description, resume)
            for torn in (*folder.glob("checkpoint-*.pt.tmp"), *folder.glob("*.json.tmp")):  # of one that was killed
                torn.unlink()
        except BaseException:
            self.leave()
            raise

    def leave(self) -> None:
        if self.lock.is_locked and not self.had_record and not left(self.folder):
            checkpoint.remove(self.folder / RECORD)
            if self.made:
                for part in ("logs", "images"):
                    shutil.rmtree(self.folder / part, ignore_errors=True)
        super().leave()


class Keeper:
    """The last finished iteration as it was, on the CPU, to be written at any time and by any thread."""

    def __init__(self, folder: Path):
        self.folder, self.newest, self.written, self.lock = folder, {}, None, threading.Lock()

    def save(self) -> int | None:
        """Write what has not been written yet. Returns the iteration, None where none is finished."""
        with self.lock:
            newest = self.newest
            if newest and self.written != newest["iteration"]:
                checkpoint.save(self.folder, newest)
                write_json(self.folder / "metrics.json", newest["history"])
                self.written = newest["iteration"]
            return newest.get("iteration")
