"""What the tests with two processes share."""

import os
import socket
import subprocess
import sys
from pathlib import Path

import torch

from ..tools import ROOT

PROMPTS = ["a cat on a mat", "two red apples", 'a sign that says "hello"', "a boat at sea"]


def launch(arguments: list[str], folders: tuple[Path | None, ...] = (None,)) -> subprocess.CompletedProcess:
    """`accelerate launch` with two processes. Its --cpu would start only one, so it is told --multi_gpu.

    With two folders it is launched in each of them, as on two machines of one process. Returned is what all say.
    """
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    launcher = ["--multi_gpu", "--num_processes", "2", "--num_machines", str(len(folders)), "--mixed_precision", "no",
                "--dynamo_backend", "no", "--main_process_ip", "127.0.0.1", "--main_process_port", str(port)]  # fmt: skip
    launched = [
        subprocess.Popen(
            [sys.executable, "-m", "accelerate.commands.launch", *launcher, "--machine_rank", str(n), *arguments],
            env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "CUDA_VISIBLE_DEVICES": ""},
            cwd=folder, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        )
        for n, folder in enumerate(folders)
    ]  # fmt: skip
    said = [process.communicate(timeout=300) for process in launched]
    code = max(process.returncode for process in launched)
    return subprocess.CompletedProcess(arguments, code, *map("".join, zip(*said)))


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
