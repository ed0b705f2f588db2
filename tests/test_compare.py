"""The comparison: names of runs, the cache, the columns of table 1's twin."""

import csv
import json
import math
import pickle

import pytest
import torch

from ref import figures
from ref.compare import (
    COLUMNS,
    Comparison,
    by_seed,
    front,
    main,
    one,
    parse,
    refuse_doubles,
    scores,
    twin,
    write_results,
)
from ref.metrics import normalized_average, overall
from ref.runs import asked

from .small import LARGE_SETTINGS, options
from .tools import flags, refusal


def test_a_runs_name_is_read_whole():
    assert parse("pec") == {"method": "pec", "space": None, "encoder": None, "weight": None, "target": None}
    assert parse("clip_cov@perceptual/reader:0.1") == {
        "method": "clip_cov",
        "space": "perceptual",
        "encoder": "reader",
        "weight": 0.1,
        "target": None,
    }
    assert figures.label("pec@kernel/reader:0.5") == "PEC, kernel, φ = reader, λ = 0.5"
    assert parse("pec@kernel/reader:target=0.9") == parse("pec@kernel/reader") | {"target": 0.9}
    assert figures.label("pec@kernel/reader:target=0.9") == "PEC, kernel, φ = reader, target 0.9"
    with pytest.raises(ValueError, match="unknown method in 'ppo:1'"):
        parse("ppo:1")
    for spec in ("pec:one", "pec:target=high", "pec:0.5:target=0.9"):
        with pytest.raises(ValueError, match=r"METHOD\[@SPACE\]"):
            parse(spec)


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--runs", "pec@pixels:1"], "got space 'pixels'"),
        (["--runs", "pec:-1"], "the weight of PEC must be a number from 0"),
        (["--runs", "pec:target=20"], "target_diversity must be less than 10, got 20"),
        (["--runs", "clip_cov:target=0.9"], "ClipCov cannot hold a target diversity; take pec"),
        (["--runs", "pec:target=0.9", "pec:target=0.90"], "pec:target=0.9 and pec:target=0.90 are the same run"),
        (["--seeds", "0"], "seeds must be greater than or equal to 1, got 0"),
    ],
)
def test_bad_input_gets_one_line(arguments, message, tmp_path, capsys):
    command = ["--preset", "mixture", "--output-dir", tmp_path, "--iterations", "1", *arguments]
    assert message in refusal(main, command, capsys)


def some_runs():
    rng = torch.Generator().manual_seed(0)
    columns = [c for group in COLUMNS["mixture"] for c in group]
    rows = [{"run": "base", "seed": ""} | {c: 0.5 for c in columns}]
    for run in ("flow_grpo", "pec:2", "pec:0.5", "pec/direction:1", "pec:target=0.9", "pec:target=0.8"):
        for seed in range(4):
            rows.append({"run": run, "seed": seed} | {c: torch.rand((), generator=rng).item() for c in columns})
    return rows


def test_one_table_s_runs_on_the_scale_of_another():
    """A column from 0 to 4 in the means of the other table: its runs are worth a quarter of what they measure."""
    value = lambda run, seed, v: {"run": run, "seed": seed, "q": v, "d": 3 * v}  # noqa: E731
    other = [value("base", "", 0), value("pec", 0, 3), value("pec", 1, 5)]
    columns = by_seed([value("base", "", 0), value("kl", 0, 1), value("kl", 1, 2)], ("q",), ("d",), other)
    assert columns["q"] == {"base": [0], "kl": [1, 2]}
    assert columns["overall"] == {"base": [0], "kl": [0.25, 0.5]}


def test_scores_are_the_norm_avg_of_the_means_and_their_spread():
    rows = some_runs()
    quality, diversity = (tuple(group) for group in COLUMNS["mixture"])
    ours = scores(rows, quality, diversity)
    runs = list(dict.fromkeys(row["run"] for row in rows))
    mean = lambda run, c: sum(v := [row[c] for row in rows if row["run"] == run]) / len(v)  # noqa: E731
    q, d = (torch.tensor([[mean(run, c) for c in group] for run in runs]) for group in (quality, diversity))
    first = lambda v: v[0] if isinstance(v, tuple) else v  # noqa: E731
    for name, expected in (
        ("quality_norm_avg", normalized_average(q)),
        ("diversity_norm_avg", normalized_average(d)),
        ("overall", overall(q, d)),
    ):
        assert [first(row[name]) for row in ours] == pytest.approx(expected.tolist(), abs=1e-6)
    values = torch.tensor([row["reward"] for row in rows if row["run"] == "pec:2"])
    assert ours[2]["reward"] == pytest.approx((values.mean().item(), values.std().item()), rel=1e-5)
    assert ours[0]["reference"] and twin(rows, "mixture").count("**") >= 2


def test_front_orders_weights_and_keeps_variants_apart():
    points = front(some_runs())
    assert list(points) == ["flow_grpo", "pec", "pec/direction", "pec:target"]
    assert [note for note, *_ in points["pec"] + points["pec:target"]] == ["λ = 0.5", "λ = 2", "0.8", "0.9"]
    figure = figures.reward_diversity_front(points)
    assert len(figure.axes[0].patches) == 6  # an ellipse for each point


@pytest.mark.parametrize("method, phi", [("pec/dino=/models/dino:0.5", "dino"), ("pec/a b/my.py:phi:0.5", "my.py:phi")])
def test_an_encoder_s_name_may_hold_a_folder_or_a_file(method, phi):
    assert parse(method) | {"encoder": None} == parse("pec:0.5")
    assert parse(method)["encoder"] == method[4:-4]
    assert figures.label(method) == f"PEC, φ = {phi}, λ = 0.5"


def test_the_large_presets_are_compared(world, tmp_path):
    """With model, reward and encoder of the command line; what is measured in phi is left out where runs differ in it."""
    given = options(world, "sd3") | LARGE_SETTINGS | dict(iterations=1, updates=1, group_size=3, seed=5)
    given |= dict(preset="sd35_medium", encoder=f"dino={world / 'dino'}", output_dir=tmp_path, reward="jpeg")
    other = f"pec/clip={world / 'clip'}:0.5"
    work = asked(Comparison, "ref.compare", [*flags(given), "--runs", "pec", "flow_grpo", other])
    work = pickle.loads(pickle.dumps(work))  # as it goes to a job
    assert work.settings.iterations == 1 and work.options.reward == "jpeg"
    refuse_doubles(work.runs, work.preset, work.encoder)
    found = [one(work, spec, 5, tmp_path) for spec in (*work.runs, "pec")]
    assert found[0] == found[3]  # read, not trained again
    record = json.loads(next(tmp_path.glob("pec_clip*_seed5/run.json")).read_text())
    assert record["encoder"] == f"clip={world / 'clip'}" and record["options"]["reward"] == "jpeg"
    rows = [{"run": "base", "seed": "", **found[0]["base"]}, *(each["row"] for each in found[:3])]
    write_results(rows, work.preset, tmp_path)
    head = (tmp_path / "table.md").read_text().splitlines()[0]
    assert "pixel_variance" in head and "feature_variance" not in head
    write_results(rows[:3], work.preset, tmp_path)
    assert "feature_variance" in (tmp_path / "table.md").read_text().splitlines()[0]


def test_a_large_run_s_encoder_is_checked_before_anything_is_trained(capsys):
    command = ["--preset", "sd35_medium", "--runs", "pec/dion=x"]
    assert "unknown encoder 'dion=x'; did you mean dino?" in refusal(main, command, capsys)
    command = ["--preset", "flux_dev", "--encoder", "dino", "--runs", "pec", "pec/dino"]
    assert "pec and pec/dino are the same run" in refusal(main, command, capsys)


def test_the_command_writes_its_files_and_repeats_nothing(tmp_path, capsys):
    command = ["--preset", "mixture", "--iterations", "2", "--seeds", "2", "--output-dir", str(tmp_path)]
    command += ["--runs", "flow_grpo", "kl_cov@perceptual:1"]
    assert main(command) == 0
    first = capsys.readouterr().out
    assert "KL-Cov, perceptual, λ = 1" in first
    rows = list(csv.DictReader((tmp_path / "runs.csv").open()))
    assert [(row["run"], row["seed"]) for row in rows[1:3]] == [("flow_grpo", "0"), ("flow_grpo", "1")] and len(
        rows
    ) == 5
    assert all(math.isfinite(float(row["effective_modes"])) for row in rows)
    for name in ("table.md", "table.tex", "table.csv", "front.png"):
        assert (tmp_path / name).stat().st_size > 0
    summary = tmp_path / "flow_grpo_seed0" / "summary.json"
    saved = json.loads(summary.read_text())
    saved["row"]["reward"] = 123.0
    summary.write_text(json.dumps(saved))
    assert main(command) == 0
    assert "123.0" in (tmp_path / "runs.csv").read_text()  # read, not trained again
