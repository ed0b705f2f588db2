"""The command, end to end on the digits: what it writes, how it resumes, what it refuses."""

import dataclasses
import json
import os
import random
import re
import signal
import subprocess
import sys
import time

import pytest
import torch

from ref.scale import checkpoint
from ref.worlds import digits
from ref.__main__ import main as story
from ref.policy import rollout
from ref.train import PRESETS, main, run

from .tools import flags, refusal

TINY = dict(iterations=4, groups=3, group_size=2, updates=1, steps=3, window=1)
SETTINGS = dataclasses.replace(PRESETS["digits"].settings, **TINY)
FLAGS = flags(TINY)


def command(folder, *extra, method="pec", preset="digits"):
    return ["--preset", preset, "--method", method, "--output-dir", str(folder), *FLAGS, *extra]


def same(a, b):
    """Nested equality to the last bit, wall-clock times aside."""
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[k], b[k]) for k in a if not str(k).startswith("seconds"))
    if isinstance(a, list):
        return len(a) == len(b) and all(map(same, a, b))
    return torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """An uninterrupted run."""
    folder = tmp_path_factory.mktemp("finished")
    assert main(command(folder, "--save-every", "1")) == 0
    return folder


def test_a_run_leaves_what_its_docstring_lists(finished):
    assert json.loads((finished / "run.json").read_text())["settings"]["group_size"] == 2
    history = json.loads((finished / "metrics.json").read_text())
    assert [m["iteration"] for m in history] == [1, 2, 3, 4]
    assert len({m["policy_entropy"] for m in history}) == 1
    result = json.loads((finished / "evaluation.json").read_text())
    assert result["base"].keys() == result["final"].keys() and "legibility" in result["final"]
    assert [p.name for p in checkpoint.checkpoints(finished)] == ["checkpoint-00000004.pt", "checkpoint-00000003.pt"]


def started(folder, *extra):
    return subprocess.Popen(
        [sys.executable, "-m", "ref.train", *command(folder, *extra)],
        env=os.environ | {"OMP_NUM_THREADS": "1"}, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip


def test_killed_at_random_and_resumed_ends_bit_for_bit_as_the_uninterrupted_run(finished, tmp_path):
    process = started(tmp_path, "--save-every", "1")
    deadline = time.time() + 120
    while not checkpoint.checkpoints(tmp_path) and time.time() < deadline:
        time.sleep(0.01)
    time.sleep(random.uniform(0, 0.3))  # anywhere in the next iterations, in a write, in the evaluation
    process.send_signal(signal.SIGKILL)
    process.wait()
    process.stderr.close()
    reached = checkpoint.load_latest(tmp_path)["iteration"]
    assert 1 <= reached <= 4
    if reached == 4:  # the machine was faster than the kill: go back to an earlier checkpoint
        checkpoint.checkpoints(tmp_path)[0].unlink()
    assert main(command(tmp_path, "--resume")) == 0
    assert same(checkpoint.load_latest(tmp_path), checkpoint.load_latest(finished))
    final = [json.loads((folder / "evaluation.json").read_text())["final"] for folder in (tmp_path, finished)]
    assert final[0] == final[1]


def test_sigterm_saves_at_once_and_ends_with_exit_code_0(tmp_path):
    """Between checkpoints that are far apart; resumed, the run ends as if nothing had happened."""
    endless = ["--lr-schedule", "constant", "--save-every", "1000000", "--ema", "0.5"]
    process = started(tmp_path / "stopped", *endless, "--iterations", "1000000")
    shown = ""
    while not re.search(r" [1-9]\d*/1000000", shown):  # the progress bar counts a finished iteration
        shown += process.stderr.read(1)
    process.send_signal(signal.SIGTERM)
    process.stderr.read()
    assert process.wait() == 0
    process.stderr.close()
    [saved] = checkpoint.checkpoints(tmp_path / "stopped")
    reached = int(saved.stem.partition("-")[2])
    assert len(json.loads((tmp_path / "stopped" / "metrics.json").read_text())) == reached >= 1
    more = [*endless, "--iterations", str(reached + 2)]
    assert main(command(tmp_path / "stopped", *more, "--resume")) == 0
    assert main(command(tmp_path / "whole", *more)) == 0
    states = [checkpoint.load_latest(tmp_path / name) for name in ("stopped", "whole")]
    assert states[0]["iteration"] == reached + 2 and states[0]["ema"] and same(*states)


def test_a_truncated_checkpoint_is_named_and_the_one_before_it_used(finished, tmp_path, capsys):
    run("digits", "pec", tmp_path, settings=SETTINGS, save_every=1, progress=False)
    newest = checkpoint.checkpoints(tmp_path)[0]
    newest.write_bytes(newest.read_bytes()[:1000])
    assert main(command(tmp_path, "--resume")) == 0
    warning = [line for line in capsys.readouterr().err.splitlines() if "damaged" in line]
    assert len(warning) == 1 and str(newest) in warning[0]
    assert same(checkpoint.load_latest(tmp_path), checkpoint.load_latest(finished))


def test_all_checkpoints_damaged_is_an_error_not_a_fresh_start(tmp_path, capsys):
    (tmp_path / "checkpoint-00000001.pt").write_bytes(b"half a file")
    with pytest.raises(ValueError, match="no readable checkpoint"):
        checkpoint.load_latest(tmp_path)


def test_a_failed_write_leaves_the_old_file_and_says_what_to_do(tmp_path):
    path = tmp_path / "metrics.json"
    path.write_text("old")

    def full(temporary):
        temporary.write_text("half")
        raise OSError(28, "No space left on device")

    with pytest.raises(OSError, match="free disk space"):
        checkpoint.atomic_write(path, full)
    assert path.read_text() == "old" and list(tmp_path.iterdir()) == [path]


def test_saved_lora_gives_the_same_images_in_the_stock_pipeline(finished):
    """`StableDiffusion3Pipeline.load_lora_weights(folder)` against our ODE rollout: rank, alpha, grid, decode and all."""
    from diffusers import StableDiffusion3Pipeline

    state = checkpoint.load_latest(finished)
    ours, _, _, _ = digits.load()
    ours.add_lora(16, 32)
    with torch.no_grad():
        for name, parameter in ours.named_parameters():
            if name in state["weights"]:
                parameter.copy_(state["weights"][name])
    cond = ours.encode(digits.PROMPTS[:3])
    noise = torch.randn(3, *ours.latent_shape, generator=torch.Generator().manual_seed(0))
    path = rollout(lambda x, sigma: ours.velocity(x, sigma, cond), ours.schedule(6).ode(), noise)

    base, _, _, _ = digits.load()
    missing = ("text_encoder", "text_encoder_2", "text_encoder_3", "tokenizer", "tokenizer_2", "tokenizer_3")
    pipe = StableDiffusion3Pipeline(base.transformer, base.scheduler, base.vae, **dict.fromkeys(missing))
    pipe.set_progress_bar_config(disable=True)

    def images():
        return pipe(
            prompt_embeds=cond["prompt_embeds"], pooled_prompt_embeds=cond["pooled_prompt_embeds"], latents=noise,
            num_inference_steps=6, guidance_scale=1.0, height=8, width=8, output_type="pt",
        ).images  # fmt: skip

    before = images()
    pipe.load_lora_weights(str(finished / "weights"))
    torch.testing.assert_close(images(), ours.decode(path.x[-1]), rtol=0, atol=1e-5)
    assert (before - images()).abs().max() > 1e-3


REFUSED = {
    "unknown preset": (dict(preset="sdxl"), [], "invalid choice 'sdxl' for argument '--preset'"),
    "unknown method": (dict(method="ppo"), [], "invalid choice 'ppo' for argument '--method'"),
    "a group of one": ({}, ["--group-size", "1"], "group_size must be greater than or equal to 2, got 1"),
    "a negative weight": ({}, ["--weight", "-1"], "weight must be greater than or equal to 0, got -1.0"),
    "a weight that is no number": ({}, ["--weight", "nan"], "weight must be a finite number, got nan"),
    "no steps": ({}, ["--steps", "0"], "steps must be greater than or equal to 2, got 0"),
    "a window too long": ({}, ["--window", "3"], "window must lie in 1..2 (the last step is deterministic), got 3"),
    "a kernel nobody knows": ({}, ["--kind", "ddpm"], "invalid choice 'ddpm' for argument '--kind'. Expected one of ('flow_sde', 'dance_sde', 'cps')"),
    "no interval": ({}, ["--save-every", "0"], "save_every must be greater than or equal to 1, got 0"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_bad_input_gets_one_line_and_exit_code_2(case, tmp_path, capsys):
    options, extra, message = REFUSED[case]
    assert message in refusal(main, command(tmp_path / "out", *extra, **options), capsys)
    assert not (tmp_path / "out").exists()


def test_a_directory_with_another_run_is_refused(finished, capsys):
    before = sorted(p.name for p in finished.iterdir())
    assert "continue it with --resume" in refusal(main, command(finished), capsys)
    for method, extra, message in (
        ("flow_grpo", [], "holds a run with method = pec, not flow_grpo"),
        ("pec", ["--seed", "5"], "holds a run with seed = 0, not 5"),
        ("pec", ["--log-with", "clipboard"], "invalid choice 'clipboard' for argument '--log-with'"),
    ):
        assert message in refusal(main, command(finished, "--resume", *extra, method=method), capsys)
    with pytest.raises(ValueError, match="unknown tracker 'clipboard'"):
        run("digits", "pec", finished, settings=SETTINGS, resume=True, log_with="clipboard")
    assert sorted(p.name for p in finished.iterdir()) == before


def test_the_main_job_writes_its_table_figures_and_weights(tmp_path, capsys):
    """`python -m ref`, two iterations a method, twice: the second call repeats no training."""
    arguments = ["--output-dir", str(tmp_path), "--iterations", "2"]
    assert story(arguments) == 0
    first = capsys.readouterr().out
    assert [line.split("  ")[0].strip() for line in first.splitlines() if "Flow-GRPO" in line or "PEC" in line]
    for name in (
        "collapse.png",
        "grid.png",
        "curves.png",
        "paradox.png",
        "metrics.json",
        "pec/weights",
        "pcvae/weights",
        "flow_grpo/weights",
    ):
        assert (tmp_path / name).exists(), name
    began = time.time()
    assert story(arguments) == 0
    assert json.loads((tmp_path / "metrics.json").read_text()).keys() == {"base", "flow_grpo", "pec", "pcvae"}
    assert time.time() - began < 60


def test_the_mixture_preset_goes_through_the_same_command(tmp_path):
    """Flow-GRPO on six modes, 40 iterations: the reward rises, modes are lost, the exact flow is untouched."""
    command = ["--preset", "mixture", "--method", "flow_grpo", "--iterations", "40", "--output-dir", str(tmp_path)]
    assert main(command) == 0
    result = json.loads((tmp_path / "evaluation.json").read_text())
    assert result["base"]["effective_modes"] > 5.5 > result["final"]["effective_modes"] + 0.2
    assert result["final"]["reward"] > result["base"]["reward"] + 0.1
    assert (tmp_path / "weights" / "residual.safetensors").exists()


def test_base_weights_command_makes_a_loadable_model(tmp_path, capsys):
    """`python -m ref.worlds.digits_base`, a thousandth of its length: every part trains, saves and loads."""
    from ref.worlds.digits_base import main as make

    assert make(["--output-dir", str(tmp_path), "--scale", "0.001"]) == 0
    assert "of unseen digits read" in capsys.readouterr().out
    model, reward, phi, judge = digits.load(tmp_path)
    cond = model.encode(digits.PROMPTS)
    v = model.velocity(torch.zeros(10, *model.latent_shape), torch.tensor(1.0), cond)
    assert v.shape == (10, *model.latent_shape) and v.isfinite().all()


def test_missing_base_weights_name_the_command_that_makes_them(tmp_path):
    with pytest.raises(FileNotFoundError, match="python -m ref.worlds.digits_base"):
        digits.load(tmp_path)
