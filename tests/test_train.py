"""The command, end to end on the letters: what it writes, what it refuses."""

import json

import pytest
import torch

from ref.policy import rollout
from ref.scale import checkpoint
from ref.train import main, run
from ref.worlds import letters

from .small import LETTERS_SETTINGS, command
from .tools import refusal


def test_a_run_leaves_what_its_docstring_lists(finished):
    assert json.loads((finished / "run.json").read_text())["settings"]["group_size"] == 2
    history = json.loads((finished / "metrics.json").read_text())
    assert [m["iteration"] for m in history] == [1, 2, 3, 4]
    assert len({m["policy_entropy"] for m in history}) == 1
    result = json.loads((finished / "evaluation.json").read_text())
    assert result["base"].keys() == result["final"].keys() and "legibility" in result["final"]
    assert [p.name for p in checkpoint.checkpoints(finished)] == ["checkpoint-00000004.pt", "checkpoint-00000003.pt"]


def test_saved_lora_gives_the_same_images_in_the_stock_pipeline(finished):
    """`StableDiffusion3Pipeline.load_lora_weights(folder)` against our ODE rollout: rank, alpha, grid, decode and all."""
    from diffusers import StableDiffusion3Pipeline

    state = checkpoint.load_latest(finished)
    ours, _, _, _ = letters.load()
    ours.add_lora(16, 32)
    with torch.no_grad():
        for name, parameter in ours.named_parameters():
            if name in state["weights"]:
                parameter.copy_(state["weights"][name])
    cond = ours.encode(letters.PROMPTS[:3])
    noise = torch.randn(3, *ours.latent_shape, generator=torch.Generator().manual_seed(0))
    path = rollout(lambda x, sigma: ours.velocity(x, sigma, cond), ours.schedule(6).ode(), noise)

    base, _, _, _ = letters.load()
    missing = ("text_encoder", "text_encoder_2", "text_encoder_3", "tokenizer", "tokenizer_2", "tokenizer_3")
    pipe = StableDiffusion3Pipeline(base.transformer, base.scheduler, base.vae, **dict.fromkeys(missing))
    pipe.set_progress_bar_config(disable=True)

    def images():
        return pipe(
            prompt_embeds=cond["prompt_embeds"], pooled_prompt_embeds=cond["pooled_prompt_embeds"], latents=noise,
            num_inference_steps=6, guidance_scale=1.0, height=32, width=32, output_type="pt",
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
    "a window too long": (
        {},
        ["--window", "3"],
        "window must lie in 1..2 (of 3 steps the last is deterministic; trained is 1), got 3",
    ),
    "a kernel nobody knows": (
        {},
        ["--kind", "ddpm"],
        "invalid choice 'ddpm' for argument '--kind'. Expected one of ('flow_sde', 'dance_sde', 'cps')",
    ),
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
        run("letters", "pec", finished, settings=LETTERS_SETTINGS, resume=True, log_with="clipboard")
    assert sorted(p.name for p in finished.iterdir()) == before


def test_the_mixture_preset_goes_through_the_same_command(tmp_path):
    """Flow-GRPO on six modes, 40 iterations: the reward rises, modes are lost, the exact flow is untouched."""
    command = ["--preset", "mixture", "--method", "flow_grpo", "--iterations", "40", "--output-dir", str(tmp_path)]
    assert main(command) == 0
    result = json.loads((tmp_path / "evaluation.json").read_text())
    assert result["base"]["effective_modes"] > 5.5 > result["final"]["effective_modes"] + 0.2
    assert result["final"]["reward"] > result["base"]["reward"] + 0.1
    assert (tmp_path / "weights" / "residual.safetensors").exists()
