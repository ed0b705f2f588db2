"""The plan of an iteration: which prompts, which process, which micro-batch, which noise.

All of it is a function of (seed, iteration, group): there is no generator state to save, no member of a
group can get another's noise, and P processes draw the samples that one would.

    accelerate launch --num_processes 8 -m ref.train ...

Every process owns G / P whole groups of every optimiser step. Two things are exchanged:

    rewards, features, log-densities   gathered into [G, ...] on every process, in the order of the groups:
                                       methods that choose among all pairs of the batch (Clip-Cov, KL-Cov)
                                       choose the same everywhere, and everyone logs the same numbers
    gradients                          summed; each process's loss is its share of the mean over all samples

A LoRA's gradient is summed once per optimiser step, when all backward passes of its micro-batches and
denoising steps are done. (DistributedDataParallel counts on one forward per backward; here there are
many.) Full fine-tuning sums it within the backward passes, see sharding.py. `Accelerator` in train.py has
set `torch.distributed` up; without it there is one process, and nothing is exchanged.
"""

import hashlib
from collections.abc import Iterable
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor


def generator_for(*key) -> torch.Generator:
    """A CPU generator whose seed is a hash of the key."""
    digest = hashlib.sha256("/".join(map(str, key)).encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:7], "big"))


def pick_prompts(prompts: list[str], settings, iteration: int) -> list[str]:
    """The G prompts of an iteration (settings is `grpo.Settings`): the list shuffled anew each time it is used up."""
    first = iteration * settings.groups
    picked, shuffled = [], {}
    for n in range(first, first + settings.groups):
        epoch, place = divmod(n, len(prompts))
        if epoch not in shuffled:
            shuffled[epoch] = torch.randperm(
                len(prompts), generator=generator_for(settings.seed, "epoch", epoch)
            ).tolist()
        picked.append(prompts[shuffled[epoch][place]])
    return picked


def chunks(groups: int, group_size: int, updates: int, micro_batch: int) -> list[list[Tensor]]:
    """Sample indices, first by optimiser step (whole groups), then by micro-batch. Raises ValueError for micro_batch 0."""
    if micro_batch < 1:
        raise ValueError("micro_batch 0 means the largest that fits; let fit.fitted find it first")
    parts = torch.arange(groups * group_size).view(groups, group_size).tensor_split(updates)
    return [list(part.flatten().split(micro_batch)) for part in parts]


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
        mine = values.contiguous().to("cuda" if dist.get_backend() == "nccl" else "cpu")
        parts = [torch.empty_like(mine) for _ in self.owners]
        dist.all_gather(parts, mine)
        place = {g: n for n, g in enumerate(g for groups in self.owners for g in groups)}
        return torch.cat(parts).to(values.device)[[place[g] for g in range(len(place))]]


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


def in_parts(tensor: Tensor) -> bool:
    """Whether it is a DTensor, told without importing that class, which takes longer than all of `ref`."""
    return hasattr(tensor, "full_tensor")


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
