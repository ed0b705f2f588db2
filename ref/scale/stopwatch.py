"""Where the time of an iteration goes, and how much of the GPU's memory it takes.

A GPU works through a queue, so a phase ends when the queue is empty, not when Python has filled it.
"""

import time

import torch


class Stopwatch:
    """Seconds of an iteration's phases, and the GPU's peak memory in GiB where there is one."""

    def __init__(self):
        self.began = self.last = time.perf_counter()
        self.seconds = {}
        if torch.cuda.is_available():
            torch.cuda.reset_peak_memory_stats()

    def __call__(self, phase: str) -> None:
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        now = time.perf_counter()
        self.seconds[f"seconds_{phase}"], self.last = now - self.last, now

    def metrics(self) -> dict[str, float]:
        peak = {"peak_gib": torch.cuda.max_memory_allocated() / 2**30} if torch.cuda.is_available() else {}
        return {"seconds": time.perf_counter() - self.began} | self.seconds | peak
