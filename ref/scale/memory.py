"""When memory ends: one line that says where, and what to change."""

from contextlib import contextmanager

import torch


class OutOfMemory(OSError):
    """Memory ended; the message says where, and what to change."""


@contextmanager
def out_of_memory(where: str, remedy: str):
    """Turn running out of memory within this context into an `OutOfMemory` of one line."""
    try:
        yield
    except (
        RuntimeError
    ) as error:  # torch.OutOfMemoryError; the CPU's allocator, CUDA and cuBLAS have no class of their own
        signs = ("DefaultCPUAllocator", "CUDA error: out of memory", "STATUS_ALLOC_FAILED")
        if isinstance(error, torch.OutOfMemoryError) or any(sign in str(error) for sign in signs):
            raise OutOfMemory(f"out of memory {where}; {remedy}") from error
        raise
