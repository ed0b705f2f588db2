"""Full scale in miniature: `ref.train` and `ref.evaluate` on SD3 and FLUX pipelines of the real classes, random and tiny."""

import csv
import dataclasses
import json
import math
from pathlib import Path

import pytest
import torch

from ref import evaluate
from ref.models import tiny
from ref.models.load import load
from ref.scale import checkpoint
from ref.models.prompts import read_prompts
from ref.options import Pipeline
from ref.presets import LARGE, PRESETS
from ref.train import main, run

from .tools import exit_code, flags, refusal

PRESET = {"sd3": "sd35_medium", "flux": "flux_dev"}
TRAINING = ["a cat on a mat", "two red apples", 'a sign that says "hello"']
SETTINGS = dict(iterations=2, groups=2, group_size=2, updates=1, micro_batch=3, steps=3, lr=1e-2)


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """Tiny pipelines, networks and prompt files. The cache of embeddings is shared by all runs."""
    folder = tmp_path_factory.mktemp("world")
    for name in ("sd3", "flux", "clip", "dino"):
        getattr(tiny, name)(folder / name)
    (folder / "train.txt").write_text("\n".join(TRAINING) + "\n")
    (folder / "evaluation.jsonl").write_text('{"prompt": "a boat at sea"}\n"a house"\n{"prompt": "an owl"}\n')
    return folder


def options(world: Path, kind: str) -> dict:
    return dict(
        model=str(world / kind), reward=f"pickscore={world / 'clip'}", prompts=str(world / "train.txt"),
        evaluation_prompts=str(world / "evaluation.jsonl"), evaluation_steps=2, images_per_prompt=2, height=32,
        width=32, max_sequence_length=16, lora_rank=4, cache_dir=world / "cache",
    )  # fmt: skip


def pipeline(world: Path, kind: str, **changes) -> Pipeline:
    return Pipeline(**options(world, kind) | changes)


@pytest.mark.parametrize("encoder", ["pickscore=clip", "clip=clip", "dino=dino"])
@pytest.mark.parametrize("method", ["flow_grpo", "pec", "pcvae"])
@pytest.mark.parametrize("kind", PRESET)
def test_training_end_to_end(kind, method, encoder, world, tmp_path):
    """Ratio exactly 1 on the first update, policy entropy the same bits, averaged weights saved, images drawn."""
    name, source = encoder.split("=")
    settings = dataclasses.replace(PRESETS[PRESET[kind]].settings, **SETTINGS)
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
    assert (tmp_path / "images" / "iteration-000002.png").stat().st_size > 0
    assert result["images"].shape == (6, 3, 32, 32)


@pytest.mark.parametrize("kind", PRESET)
def test_the_saved_lora_and_its_card_work_in_the_stock_pipeline(kind, world, tmp_path, capsys):
    """The command itself. Its LoRA, loaded as its card says, moves stock diffusers' images."""
    from diffusers import DiffusionPipeline

    command = ["--preset", PRESET[kind], "--method", "pec", "--encoder", f"dino={world / 'dino'}", "--output-dir"]
    arguments = [*command, str(tmp_path), *flags(options(world, kind)), *flags(SETTINGS)]
    assert main([*arguments, "--log-with", "tensorboard"]) == 0
    assert list((tmp_path / "logs").rglob("events.out.tfevents.*"))

    def draw(pipe):
        pipe.set_progress_bar_config(disable=True)
        seed = torch.Generator().manual_seed(0)
        return pipe(TRAINING[0], height=32, width=32, num_inference_steps=2, generator=seed, output_type="pt").images

    pipe = DiffusionPipeline.from_pretrained(world / kind)
    base = draw(pipe)
    card = (tmp_path / "weights" / "README.md").read_text()
    assert f"base_model: {world / kind}" in card and "| weight | `0.05` |" in card and "| ema | `0.9` |" in card
    [line] = [line for line in card.splitlines() if "load_lora_weights" in line]
    exec(line, {"pipe": pipe})
    assert (draw(pipe) - base).abs().max() > 1e-3

    assert main([*arguments, "--resume", "--micro-batch", "2"]) == 0  # finished: nothing is trained again
    assert "holds a run with reward = " in refusal(main, [*arguments, "--resume", "--reward", "jpeg"], capsys)


def test_all_weights_can_be_trained(world, tmp_path):
    """lora_rank 0, with Flow-GRPO's KL to a frozen copy."""
    settings = dataclasses.replace(PRESETS["sd35_medium"].settings, **SETTINGS | dict(lr=1e-5))
    result = run(
        "sd35_medium", "flow_grpo_kl", tmp_path, settings=settings, encoder=f"dino={world / 'dino'}", progress=False,
        options=pipeline(world, "sd3", lora_rank=0),
    )  # fmt: skip
    assert [m["ratio_error"] for m in result["history"]] == [0.0, 0.0]
    assert "from diffusers import SD3Transformer2DModel" in (tmp_path / "weights" / "README.md").read_text()
    assert (tmp_path / "weights" / "diffusion_pytorch_model.safetensors").exists()


def test_weights_in_parts_need_a_micro_batch_before_anything_is_loaded(world, tmp_path, monkeypatch):
    monkeypatch.setattr("ref.train.processes", lambda: 2)
    with pytest.raises(ValueError, match="weights in parts cannot try out a micro-batch; give --micro-batch"):
        run("sd35_medium", "pec", tmp_path / "run", options=pipeline(world, "sd3", lora_rank=0), progress=False)
    assert not (tmp_path / "run").exists()


def test_dance_settings_share_the_noise_and_train_the_first_steps(world, tmp_path):
    """flux_dev_720's recipe on the tiny FLUX: one x_0 a group, 60 % of the steps, shift 3."""
    from ref.grpo import start, train
    from ref.methods import METHODS

    preset = PRESETS["flux_dev_720"]
    settings = dataclasses.replace(preset.settings, **SETTINGS | dict(steps=6))
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
    assert len(LARGE) == 3
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
    arguments = [*command, tmp_path / "out", *flags(options(world, "sd3") | changes), *flags(SETTINGS)]
    assert exit_code(main, arguments) == 2
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1 and message in lines[0]


def test_toys_refuse_the_options_of_the_large(tmp_path, capsys):
    command = ["--preset", "digits", "--method", "pec", "--output-dir", tmp_path, "--model", "x"]
    assert "preset digits takes no model" in refusal(main, command, capsys)


def test_out_of_memory_names_what_to_lower(tmp_path, monkeypatch):
    def greedy(images, prompts):
        return torch.empty(10**15).sum()  # four petabytes

    mixture = PRESETS["mixture"]
    build = lambda encoder=None: dataclasses.replace(mixture.task(encoder), reward=greedy)  # noqa: E731
    monkeypatch.setitem(PRESETS, "mixture", dataclasses.replace(mixture, build=build))
    with pytest.raises(OSError, match="out of memory while training; give a smaller --micro-batch"):
        run("mixture", "pec", tmp_path, progress=False)


def test_the_shipped_prompts_are_whole():
    train, evaluation, ocr = map(read_prompts, ("train", "evaluation", "ocr"))
    assert (len(train), len(evaluation), len(ocr)) == (50, 16, 20)
    assert len({*train, *evaluation, *ocr}) == 86
    assert all(prompt.count('"') == 2 for prompt in ocr)


# ------------------------------------------------------------------------------------------ evaluation


@pytest.mark.parametrize("kind", PRESET)
def test_a_row_holds_the_paper_s_columns(kind, world, tmp_path):
    arguments = ["--model", str(world / kind), "--prompts", str(world / "evaluation.jsonl"), "--images-per-prompt", "3",
                 "--rewards", f"pickscore={world / 'clip'}", "jpeg", "--encoders", f"dino={world / 'dino'}",
                 f"clip={world / 'clip'}", "--steps", "2", "--height", "32", "--width", "32", "--batch", "2"]  # fmt: skip
    files = [tmp_path / "a.csv", tmp_path / "b.csv"]
    for file in files:
        assert evaluate.main([*arguments, "--output", str(file), "--images", str(tmp_path / "images")]) == 0
    assert files[0].read_text() == files[1].read_text()  # the seeds are the prompts' and images' numbers
    with open("tests/data/paper_table1.csv") as paper:
        columns = set(next(csv.reader(paper))) - {"method", "perceptual_space", "overall"}
    with files[0].open() as file:
        [row] = csv.DictReader(file)
    assert {c for c in columns if "norm_avg" not in c} <= set(row)
    assert row["prompts"] == "3" and row["aesthetic_v2_5"] == ""

    from PIL import Image
    from torchvision.transforms.v2.functional import pil_to_tensor

    from ref.scoring.encoders import load_encoder

    files = [[tmp_path / "images" / f"{n:04d}-{k}.png" for k in range(3)] for n in range(3)]
    images = torch.stack([pil_to_tensor(Image.open(f)) for line in files for f in line]) / 255
    phi = load_encoder(f"dino={world / 'dino'}")(images).view(3, 3, -1).double()
    distance = torch.stack([torch.pdist(group).mean() for group in phi]).mean().item()
    trace = torch.stack([torch.cov(group.T).trace() for group in phi]).mean().item()
    # the saved image is the scored one, up to an 8-bit rounding at exact halves
    assert float(row["dino_diversity"]) == pytest.approx(distance, rel=1e-3)
    assert float(row["var_dino"]) == pytest.approx(100 * trace, rel=1e-3)


def test_rows_of_table_1_give_its_averages(capsys):
    """The paper's own rows: Norm.Avg and Overall as printed, to half a unit of the last digit."""
    assert evaluate.main(["--table", "tests/data/paper_table1.csv", "--form", "csv"]) == 0
    ours = list(csv.DictReader(capsys.readouterr().out.splitlines()))
    with open("tests/data/paper_table1.csv") as file:
        paper = list(csv.DictReader(file))
    assert len(ours) == len(paper) == 18
    for mine, theirs in zip(ours, paper):
        for column in ("quality_norm_avg", "diversity_norm_avg", "overall"):
            assert math.isclose(float(mine[column]), float(theirs[column]), abs_tol=6e-4)


def test_a_table_leaves_empty_columns_out(tmp_path, capsys):
    for name, score in (("base", 0.2), ("tuned", 0.3)):
        (tmp_path / f"{name}.csv").write_text(f"name,pickscore,hps_v2_1,var_dino\n{name},{score},,{1 - score}\n")
    assert evaluate.main(["--table", str(tmp_path / "base.csv"), str(tmp_path / "tuned.csv")]) == 0
    head, _, base, tuned = capsys.readouterr().out.strip().splitlines()
    assert "pickscore" in head and "hps_v2_1" not in head
    assert "**0.300**" in tuned and "**0.70**" not in tuned and "**0.80**" in base


@pytest.mark.parametrize(
    "arguments, message",
    [
        ([], "give --model"),
        (["--model", "/nowhere/x", "--rewards", "jpeg", "--encoders"], "there is no folder /nowhere/x"),
        (["--model", "x", "--images-per-prompt", "1"], "images_per_prompt must be greater than or equal to 2, got 1"),
        (["--table", "/nowhere/row.csv"], "No such file"),
    ],
)
def test_evaluation_names_what_is_wrong(arguments, message, capsys):
    assert message in refusal(evaluate.main, arguments, capsys)


def test_metrics_file_is_json_that_others_read(world, tmp_path):
    settings = dataclasses.replace(PRESETS["flux_dev"].settings, **SETTINGS | dict(iterations=1))
    run("flux_dev", "flow_grpo", tmp_path, settings=settings, encoder=f"dino={world / 'dino'}", progress=False,
        options=pipeline(world, "flux"))  # fmt: skip
    [entry] = json.loads((tmp_path / "metrics.json").read_text())
    phases = [entry[f"seconds_{phase}"] for phase in ("sample", "decode", "reward", "features", "update")]
    assert min(phases) > 0 and sum(phases) <= entry["seconds"]


def test_bfloat16_and_checkpointing_keep_the_ratio_at_exactly_one(world, tmp_path, monkeypatch):
    """The GPU's arithmetic, with the fast variant's settings: a window of two Flow-CPS steps."""
    fast = SETTINGS | dict(kind="cps", noise_level=0.8, window=2, steps=5, clip=1e-5)
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
