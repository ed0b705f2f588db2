"""The benchmark: its baseline gives our numbers, its FLOPs are those of the modules, its command runs and refuses."""

import dataclasses
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import ref
from ref.models import tiny
from ref.benchmark import on_paper
from ref.benchmark.__main__ import main
from ref.benchmark.measure import benchmark, flops, phase_flops
from ref.settings import Settings
from ref.methods import METHODS
from ref.benchmark.naive import against_naive, text_encoders
from ref.options import Pipeline
from ref.presets import PRESETS, text_to_image

from .tools import refusal

SMALL = dict(groups=2, group_size=6, updates=1, micro_batch=12, steps=4, lr=1e-3)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tiny")
    for name in ("sd3", "flux", "clip"):
        getattr(tiny, name)(folder / name)
    (folder / "prompts.txt").write_text("a cat on a mat\ntwo red apples\n")
    return folder


def task(folder, kind):
    """Smooth reward and features: CLIP's own input is rounded to 8 bits, so there 1e-6 may become a whole grey level."""
    phi = f"pickscore={folder / 'clip'}"
    prompts = str(folder / "prompts.txt")
    options = Pipeline(
        model=str(folder / kind), reward=phi, prompts=prompts, evaluation_prompts=prompts, height=32, width=32,
        max_sequence_length=16, lora_rank=4, cache_dir=folder / "cache",
    )  # fmt: skip
    whole = text_to_image(phi, options)
    w = torch.randn(3 * 32 * 32, 8, generator=torch.Generator().manual_seed(0))
    project = lambda images: (images.flatten(1) - 0.5) @ w / 32  # noqa: E731
    return dataclasses.replace(whole, reward=lambda images, prompts: project(images)[:, 0], encoder=project)


@pytest.mark.parametrize("method", ["flow_grpo", "pec"])
@pytest.mark.parametrize("kind", ["sd3", "flux"])
def test_at_least_twice_as_fast_as_the_usual_way_with_equal_results(kind, method, folder):
    whole = task(folder, kind)
    found = against_naive(whole, Settings(**SMALL), METHODS[method](1.0), 3, text_encoders(whole.model))
    assert all(value < 1e-5 for value in found["difference"].values()), found["difference"]
    assert sorted(found["speedup"])[1] > 2, found["speedup"]


def test_the_comparison_sees_a_difference(folder, monkeypatch):
    """A planted error in the baseline, the log-density's 1/2 forgotten, shows up."""
    from ref.benchmark import naive

    right = naive.gaussian_log_prob
    monkeypatch.setattr(naive, "gaussian_log_prob", lambda x, mean, std: 2 * right(x, mean, std))
    whole = task(folder, "sd3")
    found = against_naive(whole, Settings(**SMALL), METHODS["flow_grpo"](), 1, text_encoders(whole.model))
    assert found["difference"]["log_prob"] > 1e-2 and found["difference"]["gradient"] > 1e-2


def test_flops_of_a_linear_model():
    """2 n m a forward pass of n x m weights; the backward pass as much again for the weights' gradient."""

    class Linear(torch.nn.Module):
        latent_shape = (8,)

        def __init__(self):
            super().__init__()
            self.layer = torch.nn.Linear(8, 8, bias=False)

        def velocity(self, x, sigma, conditioning):
            return self.layer(x)

    model, conditioning = Linear(), {"prompt": torch.zeros(1, 0)}
    assert flops(model, conditioning) == 2 * 8 * 8
    assert flops(model, conditioning, backward=True) == 4 * 8 * 8
    work = phase_flops(Settings(groups=2, group_size=3, steps=5), forward=10, both=30)
    assert work == {"sample": 2 * 3 * 5 * 10, "update": 2 * 3 * 4 * 30}  # the last of five steps is deterministic
    assert phase_flops(Settings(groups=2, group_size=3, steps=5, window=2), 10, 30)["update"] == 2 * 3 * 2 * 30


def test_every_phase_is_measured():
    digits = PRESETS["digits"]
    result = benchmark(digits.task(), dataclasses.replace(digits.settings, groups=2, group_size=2, steps=3, window=1), 3, 1)
    for phases in result["phases"].values():
        assert set(phases) >= {"seconds", "encode", "sample", "decode", "reward", "features", "update", "checkpoint"}
        parts = sum(phases[name]["median"] for name in ("encode", "sample", "decode", "reward", "features", "update"))
        assert 0 < parts < 1.5 * phases["seconds"]["median"]
    assert set(result["ratio"]) == {"pec", "pcvae"} and result["flops"]["sample"] > 0
    assert all(0 < use["median"] < 1 for use in result["utilisation"].values())


def test_the_command_writes_json(tmp_path, capsys):
    small = ["--groups", "2", "--group-size", "2", "--steps", "3", "--repeats", "3", "--warmup", "1"]
    assert main(["--preset", "mixture", *small, "--json", str(tmp_path / "b.json")]) == 0
    assert json.loads((tmp_path / "b.json").read_text())["preset"] == "mixture"
    assert "images a second" in capsys.readouterr().out


def test_flops_on_paper(monkeypatch, capsys):
    """A preset's own size by default; a guided pass of SD3.5-Medium against a count by hand, a LoRA's few per cent aside."""
    monkeypatch.setattr("ref.presets.LARGE", ("sd35_medium",))
    assert on_paper.main([]) == 0
    _, size, forward, both, _, images, rollout, update, total = capsys.readouterr().out.splitlines()[1].split()
    assert (size, images) == ("512", "1152")
    T, L, w = 1024, 333, 1536  # image tokens, text tokens, width; each stream of a block has 12 w^2 weights
    linear = 2 * 12 * w**2 * (24 * T + 23 * L) + 2 * 3 * w**2 * L  # the last block's text ends at query, key, value
    attention = 24 * 4 * w * (T + L) ** 2
    second = 13 * (2 * 4 * w**2 * T + 4 * w * T**2)  # 13 blocks let the image look at itself once more
    assert float(forward) == pytest.approx(2 * (linear + attention + second) / 1e12, rel=0.03)
    assert float(rollout) == pytest.approx(1152 * 10 * float(forward) / 1e3, rel=0.01)
    assert float(update) == pytest.approx(1152 * 9 * float(both) / 1e3, rel=0.01)
    assert float(total) == pytest.approx(float(rollout) + float(update), abs=0.1)


@pytest.mark.parametrize(
    "command, arguments, words",
    [
        (main, ["--preset", "nothing"], "invalid choice 'nothing' for argument '--preset'"),
        (main, ["--preset", "mixture", "--repeats", "2"], "repeats must be greater than or equal to 3, got 2"),
        (main, ["--preset", "mixture", "--warmup", "0"], "warmup must be greater than or equal to 1, got 0"),
        (main, ["--preset", "mixture", "--height", "64"], "takes no height"),
        (on_paper.main, ["500"], "must be a multiple of 16"),
    ],
)
def test_bad_input_gets_one_line(command, arguments, words, capsys):
    assert words in refusal(command, arguments, capsys)


def test_too_few_rounds_are_refused():
    with pytest.raises(ValueError, match="repeats must be at least 3"):
        benchmark(None, None, repeats=1)


LARGE = "accelerate diffusers matplotlib onnxruntime open_clip peft scipy sklearn torchvision transformers".split()
LARGE += ["torch._dynamo", "torch.distributed.tensor"]


def loaded_by(modules: list[str]) -> set[str]:
    """Which of the large libraries a fresh interpreter has loaded once it has imported torch and these modules."""
    code = f"import importlib, sys\nfor m in ['torch', *{modules}]: importlib.import_module(m)\n"
    code += f"print(*(m for m in {LARGE} if m in sys.modules))"
    return set(subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split())


def test_importing_ref_takes_little_beyond_torch():
    """Large libraries are imported where they are needed (0.12 s in all on the machine of the README's numbers)."""
    root = Path(ref.__file__).parent
    paths = [path.relative_to(root.parent).with_suffix("") for path in root.rglob("*.py")]
    names = [".".join(path.parts) for path in paths if not path.stem.startswith("__")]
    assert len(names) > 45
    plots = ["ref.figures", "ref.worlds.figures", "ref.compare"]
    assert loaded_by([name for name in names if name not in plots]) == set()
    assert loaded_by(plots) == {"matplotlib"}  # it does see them
