"""The largest micro-batch that the memory holds, found once, by trying: `--micro-batch 0`.

A trial is what the update does with one denoising step, velocity and gradient, while as much is taken as
comes later: AdamW's two moments, averaged weights, and a twentieth of the GPU, for memory gets fragmented.
Sizes double until one does not fit, then the gap is halved. Reward model and encoder must be there already.

Compiled blocks are tried as they were before: every size would take minutes to compile, and they keep no more.

Another micro-batch gives other roundings. A run keeps the one it found in its checkpoints; one that must be
repeated to the bit elsewhere names its own. So does one that may not fit into a CPU's memory, for there the
system ends the process instead.
"""

import dataclasses
from collections.abc import Callable

import torch
from torch import Tensor

from ref.grpo import Settings, trainable
from ref.layout import in_parts, over_processes, processes
from ref.pipelines import out_of_memory


def largest(fits: Callable[[int], bool], most: int) -> int:
    """The largest n in 0..most with fits(n), for a `fits` that stays false once it is; few calls."""
    low, high = 0, 1  # low fits, high is the next to try
    while high <= most and fits(high):
        low, high = high, 2 * high
    high = min(high, most + 1)
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low


def fits(model, conditioning: dict[str, Tensor], samples: int, copies: int = 2) -> bool:
    """Whether an update's forward and backward pass of so many samples finds memory beside `copies` of what is trained.

    conditioning is one sample's, [1, ...].
    """
    device, weights = next(iter(conditioning.values())).device, trainable(model).values()
    enough = True
    try:
        with out_of_memory("in a trial", ""), torch.compiler.set_stance("force_eager"):
            held = [torch.empty_like(w) for w in weights for _ in range(copies)]
            if device.type == "cuda":
                total = torch.cuda.get_device_properties(device).total_memory
                held.append(torch.empty(total // 20, dtype=torch.uint8, device=device))
            x = torch.zeros(samples, *model.latent_shape, device=device)
            repeated = {key: value.expand(samples, *value.shape[1:]) for key, value in conditioning.items()}
            model.velocity(x, torch.tensor(0.5), repeated).square().mean().backward()
    except OSError:
        enough = False
    held = x = repeated = None
    for weight in weights:
        weight.grad = None
    if device.type == "cuda":
        torch.cuda.empty_cache()
    return enough


def fitted(model, prompts: list[str], settings: Settings) -> Settings:
    """The settings with their micro-batch found where it is 0, the same on every process.

    Raises OSError when not even one sample fits, ValueError where weights are in parts (sharding.py).
    """
    if settings.micro_batch:
        return settings
    if any(in_parts(weight) for weight in trainable(model).values()):
        raise ValueError("micro_batch 0 cannot be tried out on weights in parts; give a number, 1 to begin with")
    conditioning, copies = model.encode(prompts[:1]), 3 if settings.ema else 2
    most = -(-settings.groups // settings.updates // processes()) * settings.group_size
    found = torch.tensor(float(largest(lambda n: fits(model, conditioning, n, copies), most)))
    found = int(-over_processes(-found.to(next(iter(conditioning.values())).device), largest=True))
    if found == 0:
        raise OSError("out of memory: not even one sample fits; add --gradient-checkpointing, or take a larger GPU")
    return dataclasses.replace(settings, micro_batch=found)
