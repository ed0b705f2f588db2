"""The large presets in miniature: `ref.train` on SD3 and FLUX pipelines of the real classes, random and tiny."""

import dataclasses

import pytest
import torch

from ref.models.load import load
from ref.presets import LARGE, PRESETS
from ref.scale import checkpoint
from ref.train import main, run

from .small import LARGE_SETTINGS, PRESET, TRAINING, options, pipeline
from .tools import exit_code, flags, refusal


@pytest.mark.parametrize("encoder", ["pickscore=clip", "clip=clip", "dino=dino"])
@pytest.mark.parametrize("method", ["flow_grpo", "pec", "pcvae"])
@pytest.mark.parametrize("kind", PRESET)
def test_training_end_to_end(kind, method, encoder, world, tmp_path):
    """Ratio exactly 1 on the first update, policy entropy the same bits, averaged weights saved, images drawn."""
    name, source = encoder.split("=")
    settings = dataclasses.replace(PRESETS[PRESET[kind]].settings, **LARGE_SETTINGS)
    result = run(
        PRESET[kind], method, tmp_path, settings=settings, encoder=f"{name}={world / source}", progress=False,
        options=pipeline(world, kind), evaluate_every=2,
    )  # fmt: skip
    history = result["history"]
    assert [m["ratio_error"] for m in history] == [0.0, 0.0]
    assert len({m["policy_entropy"] for m in history}) == 1
    assert all(m["grad_norm"] > 0 for m in history)
    saved = checkpoint.load_latest(tmp_path)
    trained = [name for name, weight in saved["weights"].items() if not torch.equal(weight, saved["ema"][name])]
    assert trained and all("lora" in name for name in trained)
    assert set(saved["embeddings"]) >= {*TRAINING, "a boat at sea"}
    assert "eval_reward" in history[1] and "eval_reward" not in history[0]
    assert history[1]["eval_reward"] == result["final"]["reward"]  # the same weights, prompts and noise
    pictures = sorted(path.name for path in (tmp_path / "images").iterdir())
    assert pictures == ["iteration-000000.png", "iteration-000002.png"]  # the base model's, and the last one's
    assert result["best"] == {"iteration": 2, "reward": result["final"]["reward"]}
    assert (tmp_path / "best" / "pytorch_lora_weights.safetensors").exists()
    assert result["images"].shape == (6, 3, 32, 32)


def test_all_weights_can_be_trained(world, tmp_path):
    """lora_rank 0, with Flow-GRPO's KL to a frozen copy."""
    settings = dataclasses.replace(PRESETS["sd35_medium"].settings, **LARGE_SETTINGS | dict(lr=1e-5))
    result = run(
        "sd35_medium", "flow_grpo_kl", tmp_path, settings=settings, encoder=f"dino={world / 'dino'}", progress=False,
        options=pipeline(world, "sd3", lora_rank=0),
    )  # fmt: skip
    assert [m["ratio_error"] for m in result["history"]] == [0.0, 0.0]
    assert "from diffusers import SD3Transformer2DModel" in (tmp_path / "weights" / "README.md").read_text()
    assert (tmp_path / "weights" / "diffusion_pytorch_model.safetensors").exists()


def test_dance_settings_share_the_noise_and_train_the_first_steps(world, tmp_path):
    """flux_dev_720's recipe on the tiny FLUX: one x_0 a group, 60 % of the steps, shift 3."""
    from ref.grpo import start, train
    from ref.methods import METHODS

    preset = PRESETS["flux_dev_720"]
    settings = dataclasses.replace(preset.settings, **LARGE_SETTINGS | dict(steps=6))
    task = preset.task(f"dino={world / 'dino'}", preset.options.model_copy(update=options(world, "flux")))
    state = start(task.model, settings)
    state = next(train(task.model, task.prompts, task.reward, task.encoder, METHODS["pec"](), settings, state))
    path = state.samples.trajectory
    first = path.x[0].unflatten(0, (2, 2))
    assert torch.equal(first[:, 0], first[:, 1]) and not torch.equal(first[0], first[1])
    assert not torch.equal(path.x[1, 0], path.x[1, 1])
    assert path.steps == (0, 1, 2, 3) and path.log_prob.shape == (4, 4) and state.advantages.shape == (2, 2, 4)
    sigmas = task.model.schedule(6).sigmas
    torch.testing.assert_close(sigmas[3].item(), 3 * 0.5 / (1 + 2 * 0.5))


def test_every_variant_says_what_it_is_and_the_others_are_refused():
    assert len(LARGE) == 6
    for name in LARGE:
        preset = PRESETS[name]
        for memory, change in preset.variants.items():
            options, settings = preset.within(memory, preset.options, preset.settings)
            assert settings.micro_batch == change["micro_batch"]
            assert settings.group_size % settings.micro_batch == 0  # rows of a micro-batch share a prompt
            assert options.memory == memory
            assert options.gradient_checkpointing == change.get("gradient_checkpointing", False)
        options, settings = preset.within(None, preset.options, preset.settings)
        assert settings.micro_batch == 0  # found by trial
        assert options == preset.options
    flux = PRESETS["flux_dev"]
    with pytest.raises(ValueError, match="no variant for memory 24: it fits into 48 or 80 GB"):
        flux.within(24, flux.options, flux.settings)


@pytest.mark.parametrize("kind", ["sd3", "flux"])
def test_fast_twins_run_and_keep_the_ratio_at_exactly_one(kind, world, tmp_path):
    name = f"{PRESET[kind]}_fast"
    preset = PRESETS[name]
    small = LARGE_SETTINGS | dict(steps=preset.settings.steps, group_size=4)
    own = options(world, kind) | dict(guidance_scale=preset.options.guidance_scale)
    result = run(
        name, "pec", tmp_path, settings=dataclasses.replace(preset.settings, **small), encoder=f"dino={world / 'dino'}",
        progress=False, options=preset.options.model_copy(update=own),
    )  # fmt: skip
    assert [m["ratio_error"] for m in result["history"]] == [0.0, 0.0]
    assert all(m["grad_norm"] > 0 for m in result["history"])


def test_presets_are_what_they_are_named_after():
    """Flow-GRPO's tokens, averages and deviation; DanceGRPO's 9 of 16 steps; and twins that differ as they say."""
    for name, micro_batches in (("sd35_medium", 48 * 24 // 2 // 32 // 9), ("flux_dev", 48 * 24 // 2 // 32 // 3)):
        own = PRESETS[name]
        assert own.options.max_sequence_length == 128
        assert own.settings.ema == 0.9**micro_batches  # of an optimiser step, of 9 and 3 samples on each of 32 GPUs
        assert (own.settings.ema_every, own.settings.global_std) == (8, True)
    assert PRESETS["flux_dance"].settings.trainable_steps == 9 and PRESETS["flux_dance"].settings.trained_at_random
    assert PRESETS["flux_dev_720"].settings.trainable_steps == 10
    targets = {name: PRESETS[name].options.lora_targets for name in LARGE}
    assert {name for name, chosen in targets.items() if chosen == "attention"} == {"flux_dance"}
    for name in ("letters", "sd35_medium", "flux_dev"):
        base, fast = (dataclasses.asdict(PRESETS[n].settings) for n in (name, f"{name}_fast"))
        differ = {key for key in base if base[key] != fast[key]}
        assert differ <= {"same_noise", "trained", "window", "tail_steps"}
    assert PRESETS["sd35_medium_fast"].options.guidance_scale == 1


REFUSED = {
    "an empty line": (dict(prompts="a cat\n\na dog\n"), "line 2: empty line"),
    "bad JSON": (dict(prompts='{"prompt": "a"}\n{"prompt": \n', suffix=".jsonl"), "line 2: bad JSON"),
    "no prompt in the object": (dict(prompts='{"text": "a"}\n', suffix=".jsonl"), "line 1: no prompt"),
    "an empty file": (dict(prompts=""), "holds no prompts"),
    "a size the model refuses": (dict(height=40), "height must be a multiple of 16"),
    "a model that is not there": (dict(model="/nowhere/sd3"), "there is no folder /nowhere/sd3"),
    "an unknown reward": (dict(reward="beauty"), "unknown reward 'beauty'"),
    "no such variant": (dict(memory=16), "no variant for memory 16"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_bad_input_gets_one_line(case, world, tmp_path, capsys):
    changes, message = REFUSED[case]
    if "prompts" in changes:
        path = tmp_path / f"prompts{changes.pop('suffix', '.txt')}"
        path.write_text(changes["prompts"])
        changes = changes | dict(prompts=str(path))
    command = ["--preset", "sd35_medium", "--method", "pec", "--encoder", f"dino={world / 'dino'}", "--output-dir"]
    arguments = [*command, tmp_path / "out", *flags(options(world, "sd3") | changes), *flags(LARGE_SETTINGS)]
    assert exit_code(main, arguments) == 2
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1 and message in lines[0]


def test_toys_refuse_the_options_of_the_large(tmp_path, capsys):
    command = ["--preset", "letters", "--method", "pec", "--output-dir", tmp_path, "--model", "x"]
    assert "preset letters takes no model" in refusal(main, command, capsys)


def test_bfloat16_and_checkpointing_keep_the_ratio_at_exactly_one(world, tmp_path, monkeypatch):
    """The GPU's arithmetic, with the fast variant's settings: a window of two Flow-CPS steps."""
    fast = LARGE_SETTINGS | dict(kind="cps", noise_level=0.8, window=2, steps=5, clip=1e-5)
    settings = dataclasses.replace(PRESETS["flux_dev"].settings, **fast)
    models = []

    def in_bfloat16(*arguments, **options):
        models.append(load(*arguments, **options, dtype=torch.bfloat16))
        return models[-1]

    monkeypatch.setattr("ref.models.load.load", in_bfloat16)
    build = pipeline(world, "flux", gradient_checkpointing=True)
    result = run("flux_dev", "pec", tmp_path, settings=settings, encoder=f"dino={world / 'dino'}", progress=False,
                 options=build)  # fmt: skip
    assert [m["ratio_error"] for m in result["history"]] == [0.0, 0.0]
    assert models[0].dtype == torch.bfloat16 and models[0].transformer.is_gradient_checkpointing
    saved = checkpoint.load_latest(tmp_path)
    assert {weight.dtype for weight in saved["weights"].values()} == {torch.float32}
