"""What the tests with two processes share."""

import os
import subprocess
import sys
from pathlib import Path

import torch

from ..tools import ROOT

PROMPTS = ["a cat on a mat", "two red apples", 'a sign that says "hello"', "a boat at sea"]


def launch(arguments: list[str]) -> subprocess.CompletedProcess:
    """`accelerate launch` with two processes. Its --cpu would start only one, so it is told --multi_gpu."""
    launcher = ["--multi_gpu", "--num_processes", "2", "--num_machines", "1", "--mixed_precision", "no"]
    return subprocess.run(
        [sys.executable, "-m", "accelerate.commands.launch", *launcher, "--dynamo_backend", "no", "--main_process_port",
         "0", *arguments],
        env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "CUDA_VISIBLE_DEVICES": ""},
        capture_output=True, text=True, timeout=300,
    )  # fmt: skip


def order_of_sums(terms: int, size: float) -> float:
    """By how much two sums in float32 of the same `terms` numbers can differ that are added up in another order.

    A sum's error is at most (terms - 1) eps / 2 times the sum of its terms' sizes, in any order; so two differ by at
    most terms * eps * terms * size, where no term is larger than `size`.
    """
    return terms * torch.finfo(torch.float32).eps * terms * size


def gradients(folder: Path) -> torch.Tensor:
    """Those of the first optimiser step: AdamW's first moment after it is a tenth of them."""
    saved = torch.load(folder / "checkpoint-00000001.pt", weights_only=True)
    return torch.cat([s["exp_avg"].flatten() for s in saved["optimizer"]["state"].values()]) / (1 - 0.9)
