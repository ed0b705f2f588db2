"""The micro-batch by trial, once a run: `--micro-batch 0`, the default of the large presets.

A trial is what the update does with one denoising step, velocity and gradient, while as much is taken as comes
later: AdamW's two moments, averaged weights, the gradient, which from the second step on is there before the
forward pass, and a twentieth of the GPU, for memory gets fragmented. Beside the same the VAE must decode its batch.
Sizes double until one does not fit, then the gap is halved; the samples of an optimiser step are then cut
into as few micro-batches as fit, equal ones. Reward model and encoder must be on the GPU already. Compiled
blocks are tried uncompiled: every size would take minutes to compile, and they keep no more.

Another micro-batch gives other roundings. A run keeps the one it found in its checkpoints, and a resumed run
takes it from there unless it is given another. A run that must be repeated to the bit elsewhere names its own.
"""

import dataclasses
from collections.abc import Callable

import torch
from torch import Tensor

from ref.scale.memory import OutOfMemory, forget, out_of_memory
from ref.scale.processes import over_processes, processes
from ref.scale.weights import in_parts, trainable
from ref.settings import Settings

MOST_ON_CPU = 64  # where memory ends, the system ends the process; no trial could tell


def largest(does: Callable[[int], bool], most: int) -> int:
    """The largest n in 0..most with does(n), for a `does` that stays false once it is; few calls."""
    low, high = 0, 1  # low does, high is the next to try
    while high <= most and does(high):
        low, high = high, 2 * high
    high = min(high, most + 1)
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if does(middle) else (low, middle)
    return low


def fits(model, conditioning: dict[str, Tensor], samples: int, copies: int = 2) -> bool:
    """Whether an update's forward and backward pass of so many samples finds memory beside `copies` of what is trained.

    conditioning is one sample's, [1, ...]. Of 0 samples the question is whether the VAE can decode its batch.
    """
    device, weights = next(iter(conditioning.values())).device, trainable(model).values()
    held = x = repeated = None
    try:
        with out_of_memory("in a trial", ""), torch.compiler.set_stance("force_eager"):
            held = [torch.empty_like(w) for w in weights for _ in range(copies)]
            if device.type == "cuda":
                total = torch.cuda.get_device_properties(device).total_memory
                held.append(torch.empty(total // 20, dtype=torch.uint8, device=device))
            for weight in weights:
                weight.grad = torch.zeros_like(weight)
            x = torch.zeros(samples or getattr(model, "decode_batch", None) or 1, *model.latent_shape, device=device)
            if samples:
                repeated = {key: value.expand(samples, *value.shape[1:]) for key, value in conditioning.items()}
                model.velocity(x, torch.tensor(0.5), repeated).square().mean().backward()
            else:
                model.decode(x)
        enough = True
    except OutOfMemory:
        enough = False
    finally:
        held = x = repeated = None
        for weight in weights:
            weight.grad = None
    forget(device)
    return enough


def refuse_in_parts(parts: bool) -> None:
    """Raises ValueError when weights are in parts: a process that runs out of memory would leave the others waiting."""
    if parts:
        raise ValueError("weights in parts cannot try out a micro-batch; give --micro-batch, 1 to begin with")


def fitted(model, prompts: list[str], settings: Settings) -> Settings:
    """The settings with their micro-batch found where it is 0, the same on every process.

    Raises OutOfMemory when not even one sample fits, ValueError where weights are in parts (sharding.py).
    """
    if settings.micro_batch:
        return settings
    refuse_in_parts(any(in_parts(weight) for weight in trainable(model).values()))
    conditioning, copies = model.encode(prompts[:1]), 3 if settings.ema else 2
    device = next(iter(conditioning.values())).device
    shared = device if processes() > 1 else "cpu"
    if device.type == "cuda":
        fails = torch.tensor(float(not fits(model, conditioning, 0, copies)), device=shared)
        if over_processes(fails, largest=True):
            raise OutOfMemory("out of memory in the VAE; give a smaller --decode-batch, or add --tiling")
    step = -(-settings.groups // settings.updates // processes()) * settings.group_size  # samples of an optimiser step
    most = min(step, MOST_ON_CPU) if device.type == "cpu" else step
    found = torch.tensor(-largest(lambda n: fits(model, conditioning, n, copies), most), dtype=torch.float32)
    found = -int(over_processes(found.to(shared), largest=True))
    if found == 0:
        raise OutOfMemory("out of memory: not even one sample fits; add --gradient-checkpointing, or take a larger GPU")
    return dataclasses.replace(settings, micro_batch=-(-step // -(-step // found)))
