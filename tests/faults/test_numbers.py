"""Every setting and option has a range: what cannot be meant ends in one line that names it, with exit code 2."""

import contextlib
import io
import math
from dataclasses import fields, replace

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from ref import compare, evaluate, train
from ref.__main__ import main as story
from ref.benchmark.__main__ import main as benchmark
from ref.methods import METHODS
from ref.settings import Settings

MIXTURE = ["--preset", "mixture", "--method", "pec"]


def refused(main, arguments) -> str:
    """The one line with which a command ends; asserts that it is one, and exit code 2."""
    said = io.StringIO()
    with contextlib.redirect_stderr(said):
        try:
            code = main([str(a) for a in arguments])
        except SystemExit as end:
            code = end.code
    lines = said.getvalue().strip().splitlines()
    assert code == 2 and len(lines) == 1 and lines[0].startswith("error: "), said.getvalue()
    return lines[0]


@pytest.mark.parametrize("bad", ["nan", "inf", "-inf", "x", "", "1e400", "--"])
@pytest.mark.parametrize(
    "option", ["lr", "noise-level", "clip", "advantage-clip", "grad-clip", "ema", "trained", "weight"]
)
def test_numbers_are_finite(option, bad, tmp_path):
    line = refused(train.main, [*MIXTURE, "--output-dir", tmp_path / "run", f"--{option}={bad}"])
    assert option in line.replace("_", "-")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    "option, value",
    [
        ("advantage-clip", -1), ("advantage-clip", 0), ("grad-clip", 0), ("clip", 0), ("clip", -0.1), ("lr", 0), ("lr", -1),
        ("noise-level", 0), ("noise-level", -0.7), ("ema", 1), ("ema", -0.1), ("trained", 0), ("trained", 1.1),
        ("groups", 0), ("group-size", 1), ("group-size", -3), ("updates", 0), ("steps", 1), ("window", 0), ("window", 10),
        ("window-stay", 0), ("window-moves", "back"), ("tail-steps", 0), ("best-and-worst", 1),
        ("best-and-worst", 17),
        ("iterations", -1), ("micro-batch", -1), ("save-every", 0), ("evaluate-every", -1), ("weight", -1),
        ("groups", 2.5), ("steps", "ten"), ("kind", "sde"), ("omega", "x"), ("lr-schedule", "linear"), ("space", "pixel"),
        ("group-size", 10**8), ("steps", 10**9), ("groups", 10**5), ("log-with", "paper"),
    ],
)  # fmt: skip
def test_every_setting_has_a_range(option, value, tmp_path):
    line = refused(train.main, [*MIXTURE, "--output-dir", tmp_path / "run", f"--{option}", value])
    assert option in line.replace("_", "-") and str(value)[:4].lower() in line.lower()
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    "option, value",
    [
        ("evaluation-steps", 0), ("images-per-prompt", 1), ("height", 0), ("width", -64), ("guidance-scale", "nan"),
        ("shift", 0), ("lora-rank", -1), ("lora-alpha", 0), ("decode-batch", 0), ("max-sequence-length", 0), ("memory", 32),
    ],
)  # fmt: skip
def test_every_option_of_the_large_presets_has_a_range(option, value, tmp_path):
    arguments = ["--preset", "sd35_medium", "--method", "pec", "--output-dir", tmp_path / "run", f"--{option}", value]
    assert option in refused(train.main, arguments).replace("_", "-")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    "main, arguments, word",
    [
        (compare.main, ["--seeds", 0], "seeds"),
        (compare.main, ["--jobs", -1], "jobs"),
        (compare.main, ["--iterations", "many"], "iterations"),
        (compare.main, ["--runs", "pec:nan"], "pec:nan"),
        (compare.main, ["--runs", "flow_grpo:5"], "weight"),
        (evaluate.main, ["--model", "x", "--images-per-prompt", 1], "images_per_prompt"),
        (evaluate.main, ["--model", "x", "--batch", 0], "batch"),
        (evaluate.main, ["--model", "x", "--guidance-scale", "nan"], "guidance_scale"),
        (evaluate.main, [], "--model"),
        (benchmark, ["--preset", "mixture", "--repeats", 0], "repeats"),
        (benchmark, ["--preset", "mixture", "--threads", 0], "threads"),
        (benchmark, ["--preset", "mixture", "--warmup", -1], "warmup"),
        (story, ["--iterations", 0], "iterations"),
        (story, ["--iterations", "nan"], "iterations"),
        (story, ["--seed", "x"], "seed"),
    ],
)
def test_so_has_every_other_command(main, arguments, word, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert word in refused(main, arguments)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "arguments, meant",
    [
        (["--grup-size", "4"], "--group-size"),
        (["--learning-rat", "1"], "error"),
        (["--std-normalise"], "--std-normalize"),
    ],
)
def test_near_misses_are_suggested(arguments, meant, tmp_path):
    assert meant in refused(train.main, [*MIXTURE, "--output-dir", tmp_path / "run", *arguments])


def test_a_method_without_a_weight_takes_none(tmp_path):
    line = refused(
        train.main, ["--preset", "mixture", "--method", "flow_grpo", "--weight", 5, "--output-dir", tmp_path]
    )
    assert "weight" in line
    assert METHODS["flow_grpo"](0.0).weight == 0


@pytest.mark.parametrize(
    "given, word",
    [
        (["--per-reward"], "sum of rewards"),
        (["--tail-steps", 3], "give --window"),
        (["--window-moves", "sliding"], "give --window"),
        (["--window", 6, "--trained", 0.5], "window must lie in 1..5"),
        (["--trained-at-random"], "below 1"),
        (["--global-std", "--no-std-normalize"], "global_std"),
    ],
)
def test_settings_that_need_each_other_say_so(given, word, tmp_path):
    assert word in refused(train.main, [*MIXTURE, "--output-dir", tmp_path / "run", *given])
    assert not (tmp_path / "run").exists()


def test_a_size_that_cannot_be_meant_is_refused_with_what_it_would_cost():
    with pytest.raises(ValueError, match=r"1\.0e\+08 images an iteration, 1\.0e\+09 passes"):
        Settings(groups=10**4, group_size=10**4)


def test_python_is_held_to_the_same_ranges():
    with pytest.raises(ValueError, match="lr must be"):
        replace(Settings(), lr=math.nan)
    with pytest.raises(ValueError, match="no option learning_rate"):
        Settings(learning_rate=1e-3)


VALUES = st.sampled_from(
    ["", "0", "-1", "1e9", "nan", "None", "true", "ü", "a b", "[1]", "2", "0.5", "--", "'", "\\", "1_0"]
)
NAMES = [f.name.replace("_", "-") for f in fields(Settings)] + [
    "weight",
    "space",
    "encoder",
    "save-every",
    "preset",
    "method",
]


@settings(max_examples=60, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(st.lists(st.tuples(st.sampled_from(NAMES), VALUES), min_size=1, max_size=4))
def test_no_command_line_ends_in_a_traceback(pairs):
    """Any options with any values are read, or refused in one line; nothing is trained here."""
    from ref.options import command
    from ref.runs import Run, asked

    arguments = [*MIXTURE, "--output-dir", "nowhere", *(part for name, value in pairs for part in (f"--{name}", value))]
    said = io.StringIO()
    with contextlib.redirect_stderr(said):
        try:
            code = command(lambda a: asked(Run, "ref.train", a), arguments)
        except SystemExit as end:
            code = end.code
    assert code in (0, 2)
    if code:
        assert len(said.getvalue().strip().splitlines()) == 1, said.getvalue()
