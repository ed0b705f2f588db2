"""Where the time of an iteration goes, and how much of the GPU's memory it takes.

A GPU works through a queue, so a phase ends when the queue is empty, not when Python has filled it.
"""

import time

import torch


class Stopwatch:
    """Seconds of an iteration's phases, and the peak memory in GiB of the GPU that `device` is, if it is one."""

    clock = staticmethod(time.perf_counter)  # the benchmark may count seconds of computing instead

    def __init__(self, device: torch.device | str = "cpu"):
        self.gpu = torch.device(device).type == "cuda"
        self.seconds = {}
        if self.gpu:
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
        self.began = self.last = self.clock()

    def __call__(self, phase: str) -> None:
        if self.gpu:
            torch.cuda.synchronize()
        now = self.clock()
        self.seconds[f"seconds_{phase}"], self.last = now - self.last, now

    def metrics(self) -> dict[str, float]:
        peak = {"peak_gib": torch.cuda.max_memory_allocated() / 2**30} if self.gpu else {}
        return {"seconds": self.clock() - self.began} | self.seconds | peak
