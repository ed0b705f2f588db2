r"""Many processes: who owns which groups, and the two things that are exchanged.

    accelerate launch --num_processes 8 -m ref.train ...

On two nodes of eight GPUs this line on each, with its own --machine_rank:

    accelerate launch --multi_gpu --num_machines 2 --num_processes 16 --machine_rank 0 --main_process_ip NODE0 \
        --main_process_port 29500 -m ref.train --preset flux_dev_720 --groups 16 --output-dir /shared/flux ...

Both must see --output-dir, the model's folder and one's own files; the cache of prompts' embeddings may be each node's own.
A resumed run is refused where a node does not see its checkpoints. When a launch of one process fails, accelerate prints a
traceback of its own below our line; `accelerate launch -q` leaves it out, and for one process no launch is needed.

Every process owns G / P whole groups of every optimiser step and draws the samples that one process would.
Two things are exchanged:

    rewards, features, log-densities   gathered into [G, ...] on every process, in the order of the groups:
                                       methods that choose among all pairs of the batch (Clip-Cov, KL-Cov)
                                       choose the same everywhere, and everyone logs the same numbers
    gradients                          summed; each process's loss is its share of the mean over all samples

A LoRA's gradient is summed once per optimiser step, when all backward passes of its micro-batches and
denoising steps are done. (DistributedDataParallel counts on one forward per backward; here there are
many.) Full fine-tuning sums it within the backward passes, see sharding.py. `Accelerator` in train.py has
set `torch.distributed` up; without it there is one process, and nothing is exchanged.
"""

import io
import json
import os
import sys
import time
from collections.abc import Callable, Iterable
from contextlib import redirect_stderr, suppress
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor

from ref.scale.weights import in_parts

LOST = ("closed by peer", "Connection reset", "NCCL", "Broken pipe")  # gloo has no class of its own for it
AT_ONCE = 2**26  # bytes of each process on the GPU while tensors are gathered
PATIENCE = 3.0  # seconds in which a launcher ends all processes when one has failed


DEVICES = ("cuda", "mps", "cpu")


def device_type(wanted: str | None = None) -> str:
    """cuda, mps or cpu: the accelerator where there is one, unless another is wanted. Raises ValueError for one that is not there."""
    there = torch.accelerator.current_accelerator().type if torch.accelerator.is_available() else "cpu"
    if wanted not in (None, "cpu", there):
        raise ValueError(
            f"there is no {wanted} device here; choose --device {' or '.join(dict.fromkeys((there, 'cpu')))}"
        )
    return wanted or there


def processes() -> int:
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def rank() -> int:
    return dist.get_rank() if processes() > 1 else 0


@dataclass(frozen=True)
class Share:
    """The groups 0..G-1 as they are dealt out: `owners[r]` lists those of process r, in its own order."""

    owners: list[list[int]]

    @property
    def mine(self) -> list[int]:
        return self.owners[rank()]

    def gather(self, values: Tensor) -> Tensor:
        """[len(mine), ...] on every process -> [G, ...] in the order of the groups, on every process."""
        if len(self.owners) == 1:
            return values
        gathered, device = [], "cuda" if dist.get_backend() == "nccl" else "cpu"
        for mine in values.split(max(1, AT_ONCE // max(1, values[:1].nbytes))):  # images of an evaluation are gigabytes
            mine = mine.contiguous().to(device)
            parts = [torch.empty_like(mine) for _ in self.owners]
            dist.all_gather(parts, mine)
            gathered.append(torch.stack(parts).to(values.device))
        place = {g: n for n, g in enumerate(g for groups in self.owners for g in groups)}
        return torch.cat(gathered, 1).flatten(0, 1)[[place[g] for g in range(len(place))]]


def deal(groups: int, updates: int) -> Share:
    """An equal part of the groups of each optimiser step for every process.

    Raises ValueError when the groups of a step cannot be divided evenly.
    """
    n = processes()
    if n > 1 and groups % (updates * n):
        raise ValueError(
            f"groups ({groups}) must be a multiple of updates x processes ({updates} x {n}): "
            "each process takes whole groups, equally many for every optimiser step"
        )
    parts = torch.arange(groups).tensor_split(updates)
    return Share([[g for part in parts for g in part.tensor_split(n)[r].tolist()] for r in range(n)])


def deal_padded(groups: int) -> Share:
    """For evaluation: any number of groups; the last is repeated where a process would get one less."""
    n = processes()
    each = -(-groups // n)
    return Share([[min(g, groups - 1) for g in range(r * each, (r + 1) * each)] for r in range(n)])


def sum_gradients(parameters: Iterable[Tensor]) -> None:
    """Replace every gradient by its sum over the processes, in one exchange; those in parts (DTensor) are sums."""
    gradients = [p.grad for p in parameters if p.grad is not None and not in_parts(p.grad)]
    if processes() == 1 or not gradients:
        return
    flat = torch.cat([g.flatten() for g in gradients])
    dist.all_reduce(flat)
    for g, summed in zip(gradients, flat.split([g.numel() for g in gradients])):
        g.copy_(summed.view_as(g))


def over_processes(value: Tensor, largest: bool = False) -> float:
    """The sum (or the largest) of a number over the processes."""
    if processes() > 1:
        dist.all_reduce(value, dist.ReduceOp.MAX if largest else dist.ReduceOp.SUM)
    return value.item()


class Heard(io.TextIOBase):
    """Standard error that remembers its end: torch's launcher says last, below tracebacks of its own, what it is told."""

    def __init__(self, stream):
        self.stream, self.end = stream, ""

    def write(self, text: str) -> int:
        self.end = (self.end + text)[-2000:]
        return self.stream.write(text)

    def flush(self) -> None:
        self.stream.flush()

    def isatty(self) -> bool:
        return self.stream.isatty()

    def tell_launcher(self) -> None:
        if file := os.environ.get("TORCHELASTIC_ERROR_FILE"):
            line = self.end.strip().splitlines()[-1:] or ["no error was said"]
            message = {"message": line[0], "extraInfo": {"py_callstack": line[0], "timestamp": str(int(time.time()))}}
            with suppress(OSError):
                Path(file).write_text(json.dumps({"message": message}))


def one_voice(command: Callable[..., int], *arguments) -> int:
    """What command(*arguments) returns. Of several processes that were launched the first one speaks.

    What is wrong with one is wrong with all, mostly: when the first has said so and ended, the launcher ends the
    others. Where it is wrong with another one alone, that speaks after a while. One that lost the others says so last.
    """
    if "RANK" not in os.environ:
        return command(*arguments)
    first = int(os.environ["RANK"]) == 0
    said, code = Heard(sys.stderr) if first else io.StringIO(), 2
    try:
        with redirect_stderr(said):
            code = command(*arguments)
    except SystemExit as end:  # of the command line
        code = end.code
    except RuntimeError as error:
        if processes() == 1 or not any(words in str(error) for words in LOST):
            raise
        time.sleep(2 * PATIENCE)
        said.write("error: another process has ended, and this one cannot go on without it\n")
    if code:
        if first:
            said.tell_launcher()
        else:
            time.sleep(PATIENCE)
            sys.stderr.write("\n" + said.getvalue())  # below the bar of the first
        sys.stderr.flush()
        os._exit(code)  # Python's own end takes seconds, and may wait for the others
    return code
