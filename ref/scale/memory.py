"""When memory ends: one line that says where, and what to change."""

from contextlib import contextmanager

import torch


class OutOfMemory(OSError):
    """Memory ended; the message says where, and what to change."""


def ended(error: BaseException) -> bool:
    """Whether this is memory's end: the CPU's allocator, CUDA and cuBLAS have no class of their own for it."""
    signs = ("DefaultCPUAllocator", "CUDA error: out of memory", "STATUS_ALLOC_FAILED")
    memory = isinstance(error, (torch.OutOfMemoryError, OutOfMemory))
    return memory or isinstance(error, RuntimeError) and any(sign in str(error) for sign in signs)


@contextmanager
def out_of_memory(where: str, remedy: str):
    """Turn running out of memory within this context into an `OutOfMemory` of one line."""
    try:
        yield
    except RuntimeError as error:
        if ended(error):
            raise OutOfMemory(f"out of memory {where}; {remedy}") from error
        raise
