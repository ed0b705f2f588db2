"""What holds on a GPU, whatever its numbers: torch's real CUDA build on a device that has no kernels (gpu.c).

gcc and the wheels of requirements.txt are all it needs. Nothing here speaks of speed, bits, cuDNN or NCCL.
"""

import json
import os
import re
import shutil
import socket
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest
import torch

from ref import presets
from ref.methods import METHODS

from ..small import PRESET
from ..tools import ROOT

HERE, SITE = Path(__file__).parent, Path(sysconfig.get_paths()["purelib"])
HEADERS = [SITE / "nvidia/cu13/include", SITE / "triton/backends/nvidia/include"]


@pytest.fixture(scope="module")
def gpu(tmp_path_factory) -> Path:
    compiler = shutil.which("gcc") or shutil.which("cc")
    if not compiler or not sys.platform.startswith("linux") or not all(folder.is_dir() for folder in HEADERS):
        pytest.skip("needs gcc, Linux, and torch's wheels for CUDA 13")
    if torch.cuda.is_available():
        pytest.skip("there is a real GPU; python -m ref.benchmark.on_a_gpu is for that")
    library = tmp_path_factory.mktemp("gpu") / "libcuda.so.1"
    options = ["-O1", "-w", "-shared", "-fPIC", "-Wl,-soname,libcuda.so.1", *(f"-I{folder}" for folder in HEADERS)]
    subprocess.run([compiler, *options, "-o", str(library), str(HERE / "gpu.c"), "-lpthread"], check=True)
    return library


def started(gpu: Path, world: Path, *parts: str, **environment) -> subprocess.Popen:
    own = {"LD_PRELOAD": str(gpu), "OMP_NUM_THREADS": "1"} | environment
    command = [sys.executable, "-m", "tests.no_kernels.on_a_gpu", str(world), *parts]
    pipes = dict(stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    return subprocess.Popen(command, env=os.environ | own, cwd=ROOT, **pipes)


def found(process: subprocess.Popen) -> dict:
    said, errors = process.communicate(timeout=540)
    assert process.returncode == 0, errors[-3000:]
    return json.loads(said.splitlines()[-1])


@pytest.fixture(scope="module")
def alone(gpu, world) -> dict:
    """All that one process can find, for most of its time is imports."""
    return found(started(gpu, world, "full_size", "loop", "whole"))


@pytest.fixture(scope="module")
def loop(alone) -> dict:
    return alone["loop"]


@pytest.mark.parametrize("kind", PRESET)
def test_rollout_and_update_are_the_same_operators_and_nothing_trains_on_the_cpu(kind, loop):
    """Names, shapes and types; attention by flash attention in both, which is the same with gradients and without."""
    own = loop[kind]
    assert own["operators"] > 300 and own["other"] == [] and own["on_cpu"] == {}
    assert own["attention"] == ["aten._scaled_dot_product_flash_attention.default"]
    assert own["devices"] == ["cuda"] and own["dtype"] == "torch.bfloat16"
    assert own["methods"].keys() == METHODS.keys() and min(own["methods"].values()) > 0  # GiB


@pytest.mark.parametrize("kind", PRESET)
def test_no_step_waits_for_the_gpu(kind, loop):
    """Neither in velocity nor in rollout, nor in update's loop over steps, which is indented by 12."""
    waits = [line.split(" ", 2) for line in loop[kind]["waits"]]
    assert {"walk", "update"} <= {function for function, _, _ in waits}  # it would be seen
    for function, indent, line in waits:
        assert function not in ("velocity", "rollout", "loss", "gaussian_log_prob"), line
        assert function != "update" or int(indent) < 12, line


@pytest.mark.parametrize("kind", PRESET)
@pytest.mark.parametrize(
    "phase, said",
    [
        ("encode", "while training"), ("sample", "out of memory"), ("decode", "in the VAE"),
        ("reward", "while training"), ("features", "while training"), ("update", "out of memory"),
        ("backward", "while training"), ("step", "while training"),
    ],
)  # fmt: skip
def test_memory_s_end_is_one_line_in_every_phase(kind, phase, said, loop):
    line = loop[kind]["ends"][phase]
    assert line.startswith("out of memory") and said in line and "; give a smaller" in line


@pytest.mark.parametrize("kind", PRESET)
@pytest.mark.parametrize("checkpointing", ["False", "True"])
def test_a_failed_trial_leaves_memory_as_it_was(kind, checkpointing, loop):
    own = loop[kind]["trial"][checkpointing]
    assert min(len(own["fit"]), len(own["failed"])) > 1 and set(own["fit"] + own["failed"]) == {own["before"]}
    assert own["largest"] >= own["micro_batch"] > 1 and own["said"].startswith(
        "out of memory in the VAE; give a smaller --decode-batch"
    )


def test_a_run_its_resume_and_the_stock_pipeline(alone):
    own = alone["whole"]
    assert own["iterations"] == 2 and own["evaluated"] == 0
    assert "peak_gib" in own["phases"] and "seconds_sample" in own["phases"]
    assert own["small"] == []  # the small worlds compute on the CPU, and say so


def test_two_processes_join(gpu, world, tmp_path):
    """On their GPUs by NCCL, for which gloo stands in; the small worlds by gloo."""
    with socket.socket() as one, socket.socket() as other:
        one.bind(("localhost", 0)), other.bind(("localhost", 0))
        ports = dict(MASTER_PORT=str(one.getsockname()[1]), NEXT_PORT=str(other.getsockname()[1]))
    common = dict(WORLD_SIZE="2", LOCAL_WORLD_SIZE="2", MASTER_ADDR="localhost", GPUS="2", FOLDER=str(tmp_path)) | ports
    both = [started(gpu, world, "ranks", RANK=str(n), LOCAL_RANK=str(n), **common) for n in range(2)]
    for n, own in enumerate(found(process)["ranks"] for process in both):
        assert own["joined"] == 2  # once for each run
        for preset, backend in (("flux_dev", "nccl"), ("mixture", "gloo")):
            assert own[preset]["iterations"] == 1 and backend in own[preset]["backend"]
        assert own["flux_dev"]["device"] == n


def test_full_size_presets_stay_below_their_table(alone):
    """Torch's allocator, on empty weights of the real sizes, and 1 GiB for CUDA, beside the table of presets.py."""
    own = alone["full_size"]
    rows = re.findall(r"^\| `(\w+)` +\|(.*)\|$", presets.__doc__, re.M)
    cells = {name: re.findall(r"([\d.]+) GiB", cells) for name, cells in rows if "GiB" in cells}
    table = {}
    for name, numbers in cells.items():
        memories = sorted(presets.PRESETS[name].variants)
        assert len(memories) == len(numbers)
        table |= {f"{name} {memory}": float(number) for memory, number in zip(memories, numbers)}
    assert set(table) <= set(own) and len(table) >= 7
    for name, gib in table.items():
        assert abs(own[name]["reserved"] + 1 - gib) < 0.5, name  # reserved in blocks, as the order of frees has it
        assert gib < 0.93 * own[name]["memory"] * 1e9 / 2**30, name
