"""When memory ends: one line that says where, and what to change."""

import gc
from contextlib import contextmanager

import torch

SIGNS = (  # the allocators of CPU, CUDA and MPS have no class of their own for it, nor has any library
    "DefaultCPUAllocator",
    "CUDA error: out of memory",
    "MPS backend out of memory",
    "STATUS_ALLOC_FAILED",  # cuBLAS, cuDNN
    "CUBLAS_STATUS_NOT_INITIALIZED",  # cuBLAS finds no room for itself
    "unable to find an engine",  # cuDNN, when no workspace fits
    "Failed to CUDA calloc",  # NCCL
    "Cuda failure 2",
)


class OutOfMemory(OSError):
    """Memory ended; the message says where, and what to change."""


def ended(error: BaseException) -> bool:
    """Whether this is memory's end."""
    memory = isinstance(error, (torch.OutOfMemoryError, OutOfMemory))
    return memory or isinstance(error, RuntimeError) and any(sign in str(error) for sign in SIGNS)


def forget(device: torch.device) -> None:
    """Give back what a pass on a GPU held that ran out of memory; to be called when its error is gone.

    With gradient checkpointing a backward pass that ends so leaves a circle of references, and autograd's thread for
    the device keeps its last task until it has another. Both hold activations: tens of GiB on a large model.
    """
    if device.type == "cuda":
        torch.ones((), device=device, requires_grad=True).square().backward()
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


@contextmanager
def out_of_memory(where: str, remedy: str):
    """Turn running out of memory within this context into an `OutOfMemory` of one line."""
    try:
        yield
    except RuntimeError as error:
        if ended(error):
            raise OutOfMemory(f"out of memory {where}; {remedy}") from error
        raise
