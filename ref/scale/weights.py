"""The weights that training moves: by name, copied, overwritten; whole, or in parts on several processes.

A tensor in parts is a DTensor (sharding.py). Everything here works on both kinds, so that optimiser, averages
and checkpoints need not know which they hold.
"""

import torch
from torch import Tensor


def trainable(model) -> dict[str, Tensor]:
    """The weights that training moves, by name."""
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


def copied(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: w.detach().clone() for name, w in weights.items()}


@torch.no_grad()
def assign(weights: dict[str, Tensor], values: dict[str, Tensor]) -> None:
    """Overwrite `weights` in place. `values` may be whole where `weights` are in parts."""
    for name, weight in weights.items():
        weight.copy_(like(values[name], weight))


def in_parts(tensor: Tensor) -> bool:
    """Whether it is a DTensor, told without importing that class, which takes longer than all of `ref`."""
    return hasattr(tensor, "full_tensor")


def whole(tensor: Tensor) -> Tensor:
    """The tensor that the processes hold in parts; all must ask. A tensor that is not in parts is returned as it is."""
    return tensor.full_tensor() if in_parts(tensor) else tensor


def like(value: Tensor, tensor: Tensor) -> Tensor:
    """`value`, which every process has whole, in parts as `tensor` is.

    `value` itself where `tensor` is whole, and where their shapes differ: AdamW's count of steps.
    """
    if not in_parts(tensor) or in_parts(value) or value.shape != tensor.shape:
        return value
    from torch.distributed.tensor import distribute_tensor

    return distribute_tensor(value.to(tensor.device), tensor.device_mesh, tensor.placements, src_data_rank=None)
