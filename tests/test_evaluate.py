"""A row of the tables for any pipeline, and the table of many rows."""

import csv
import json
import math

import pytest
import torch

from ref import evaluate
from ref.models.load import load
from ref.schedule import time_grid

from .small import PRESET, pipeline
from .tools import DATA, refusal


@pytest.mark.parametrize("kind", PRESET)
def test_a_row_holds_the_paper_s_columns(kind, world, tmp_path):
    arguments = ["--model", str(world / kind), "--prompts", str(world / "evaluation.jsonl"), "--images-per-prompt", "3",
                 "--rewards", f"pickscore={world / 'clip'}", "jpeg", "--encoders", f"dino={world / 'dino'}",
                 f"clip={world / 'clip'}", "--steps", "2", "--height", "32", "--width", "32", "--batch", "2"]  # fmt: skip
    files = [tmp_path / "a.csv", tmp_path / "b.csv"]
    for file in files:
        assert evaluate.main([*arguments, "--output", str(file), "--images", str(tmp_path / "images")]) == 0
    assert files[0].read_text() == files[1].read_text()  # the seeds are the prompts' and images' numbers
    with (DATA / "paper_table1.csv").open() as paper:
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
    assert evaluate.main(["--table", str(DATA / "paper_table1.csv"), "--form", "csv"]) == 0
    ours = list(csv.DictReader(capsys.readouterr().out.splitlines()))
    with (DATA / "paper_table1.csv").open() as file:
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


def test_every_reward_and_encoder_asked_for_is_in_the_table(world, tmp_path, capsys):
    """A row's columns, the paper's or not, are the table's: here a rule, a sum, one's own reward and encoder."""
    (tmp_path / "mine.py").write_text("red = lambda images, prompts: images[:, 0].mean((1, 2))\n"
                                      "phi = lambda images: images.mean((2, 3))\n")  # fmt: skip
    red, phi = f"{tmp_path}/mine.py:red", f"{tmp_path}/mine.py:phi"
    arguments = ["--prompts", str(world / "evaluation.jsonl"), "--images-per-prompt", "2", "--steps", "1",
                 "--rewards", "jpeg", f"pickscore:0.5={world / 'clip'}+jpeg:2", red, "--encoders", phi,
                 "--height", "32", "--width", "32"]  # fmt: skip
    files = [str(tmp_path / f"{kind}.csv") for kind in PRESET]
    for kind, file in zip(PRESET, files):
        named = ["--model", str(world / kind), "--name", kind, "--output", file]
        assert evaluate.main([*named, *arguments]) == 0
    capsys.readouterr()
    assert evaluate.main(["--table", *files, "--form", "csv"]) == 0
    said = capsys.readouterr()
    assert "warning: 2 rows" in said.err
    rows = list(csv.DictReader(said.out.splitlines()))
    assert {"jpeg", "pickscore:0.5+jpeg:2", red.casefold(), f"var_{phi}".casefold()} < set(rows[0])
    shares = [sum(float(a[c]) > float(b[c]) for c in ("jpeg", "pickscore:0.5+jpeg:2", red.casefold())) / 3
              for a, b in (rows, rows[::-1])]  # fmt: skip
    assert [float(row["quality_norm_avg"]) for row in rows] == pytest.approx(shares, abs=1e-3)
    assert sorted(float(row["diversity_norm_avg"]) for row in rows) in ([0, 1], [0.5, 0.5])
    assert "has one twice" in refusal(evaluate.main, ["--model", "x", "--rewards", "jpeg", "jpeg"], capsys)


@pytest.mark.parametrize(
    "arguments, message",
    [
        ([], "give --model"),
        (["--model", "/nowhere/x", "--rewards", "jpeg", "--encoders"], "there is no folder /nowhere/x"),
        (["--model", "x", "--images-per-prompt", "1"], "images_per_prompt must be greater than or equal to 2, got 1"),
        (["--table", "/nowhere/row.csv"], "there is no file /nowhere/row.csv"),
    ],
)
def test_evaluation_names_what_is_wrong(arguments, message, capsys):
    assert message in refusal(evaluate.main, arguments, capsys)


@pytest.mark.parametrize("kind, guidance, shift", [("sd3", None, 2.0), ("flux", 2.5, 3.0), ("flux", 2.5, None)])
def test_a_run_s_weights_are_drawn_at_the_guidance_and_shift_of_their_training(
    kind, guidance, shift, world, tmp_path, monkeypatch, capsys
):
    """The stock pipeline would take its own: 7.0 on SD3, 3.5 on FLUX, and its own time grid."""
    options = pipeline(world, kind, guidance_scale=guidance, shift=shift)
    described = {"preset": PRESET[kind], "options": options.model_dump(mode="json"), "settings": {}}
    (tmp_path / "run.json").write_text(json.dumps(described))
    model = load(world / kind, ["an owl"], 32, 32, lora_rank=4, max_sequence_length=16, cache_dir=tmp_path / "cache")
    model.save(tmp_path / "weights")
    model.guidance_scale, model.shift = guidance or model.guidance_scale, shift
    seen = []
    monkeypatch.setattr(evaluate, "evaluate", lambda pipe, *_, **given: seen.append((pipe, given)) or {})
    fixed = dict(
        model=str(world / kind), rewards=["jpeg"], encoders=[], steps=3, prompts=str(world / "evaluation.jsonl")
    )
    for more in (dict(lora=str(tmp_path / "weights")), dict(run=tmp_path)):  # the tuned row, and the base model's
        evaluate.row(evaluate.Evaluation(**fixed, **more))
        pipe, given = seen.pop()
        assert given["guidance_scale"] == model.guidance_scale and given["height"] == options.height
        assert "run.json: " in capsys.readouterr().err
        evaluate.draw(pipe, "an owl", 0, 1, 1, **given)
        torch.testing.assert_close(pipe.scheduler.sigmas, model.schedule(3).sigmas, rtol=0, atol=2e-7)
    evaluate.row(evaluate.Evaluation(**fixed, lora=str(tmp_path / "weights"), guidance_scale=1.5, shift=1.25))
    pipe, given = seen.pop()
    assert given["guidance_scale"] == 1.5  # what is given goes before
    evaluate.draw(pipe, "an owl", 0, 1, 1, **given)
    torch.testing.assert_close(pipe.scheduler.sigmas, time_grid(3, 1.25), rtol=0, atol=2e-7)
    evaluate.row(evaluate.Evaluation(**fixed))
    assert "guidance_scale" not in seen.pop()[1]
