"""One declaration of an option serves the constructor, the command line, its help, run.json and messages."""

import dataclasses
import json
import re
import shutil

import pytest

from ref.options import Pipeline
from ref.options import refusal as in_one_line
from ref.presets import LARGE, PRESETS
from ref.runs import Run, asked, recorded
from ref.settings import Settings
from ref.train import main, run

from .small import LARGE_SETTINGS, TINY, command, options, pipeline, same
from .tools import ROOT, exit_code, flags, refusal

START = ["--method", "pec", "--output-dir", "nowhere"]


def help_of(capsys, *arguments) -> str:
    """--help as one paragraph without its frame."""
    assert exit_code(main, [*arguments, "--help"]) == 0
    return " ".join(re.sub("[│╭╮╰╯─]", " ", capsys.readouterr().out).split())


@pytest.mark.parametrize("preset", PRESETS)
def test_help_shows_every_comment_and_the_presets_defaults(preset, capsys):
    shown = help_of(capsys, "--preset", preset)
    declared = (ROOT / "ref" / "settings.py").read_text()
    for field in dataclasses.fields(Settings):
        [comment] = re.findall(rf"^    {field.name}: .*?(?:  # (.*))?$", declared, re.M)
        name, value = "--" + field.name.replace("_", "-"), getattr(PRESETS[preset].settings, field.name)
        assert comment or field.name == "seed"  # one that a formatter moves to another line is not shown
        of_this = re.search(rf"{name}[ ,].*?\(default: (\S+)\)", shown)
        assert of_this and " ".join(comment.split()) in of_this[0]
        assert of_this[1] == str(value)
    if preset in LARGE:
        for name, value in PRESETS[preset].options:
            assert re.search(rf"--{name.replace('_', '-')}[ ,].*?\(default: (\S+)\)", shown)[1] == str(value), name


@pytest.mark.parametrize("name, value", [("lr", 0.01), ("groups", 7), ("std_normalize", False), ("omega", "variance")])
def test_constructor_and_command_line_are_the_same_declaration(name, value):
    settings = dataclasses.replace(PRESETS["letters"].settings, **{name: value})
    assert asked(Run, "ref.train", ["--preset", "letters", *START, *flags({name: value})]).settings == settings


@pytest.mark.parametrize("name, value", [("height", 768), ("tiling", True), ("shift", 2.5), ("reward", "ocr")])
def test_so_it_is_for_the_options_of_the_large(name, value):
    wanted = Pipeline(**PRESETS["flux_dev"].options.model_dump() | {name: value})
    assert asked(Run, "ref.train", ["--preset", "flux_dev", *START, *flags({name: value})]).options == wanted


@pytest.mark.parametrize(
    "name, value",
    [
        ("group_size", 1),
        ("lr", float("nan")),
        ("lr", float("inf")),
        ("ema", 1.0),
        ("steps", 1),
        ("advantage_clip", -1.0),
    ],
)
def test_constructor_command_line_and_record_refuse_in_the_same_words(name, value, finished, tmp_path, capsys):
    with pytest.raises(ValueError, match=rf"^{name} must be [^\n]*, got {value}$") as caught:
        Settings(**{name: value})
    words = str(caught.value)
    line = refusal(main, ["--preset", "letters", *START, f"--{name.replace('_', '-')}", value], capsys)
    assert words in line
    record = json.loads((finished / "run.json").read_text())
    record["settings"][name] = value
    (tmp_path / "run.json").write_text(json.dumps(record))
    assert words in refusal(main, ["--resume", "--output-dir", tmp_path], capsys)


def test_unknown_names_are_refused_everywhere(finished, tmp_path, capsys):
    with pytest.raises(ValueError, match="^there is no option learning_rate$"):
        Settings(learning_rate=1e-3)
    with pytest.raises(ValueError, match="^there is no option hight$"):
        Pipeline(hight=512)
    line = refusal(main, ["--preset", "letters", *START, "--group-siz", "4"], capsys)
    assert "--group-siz" in line and "Perhaps you meant: --group-size" in line
    record = json.loads((finished / "run.json").read_text())
    (tmp_path / "run.json").write_text(json.dumps(record | {"wieght": 1.0}))
    line = refusal(main, ["--resume", "--output-dir", tmp_path], capsys)
    assert "wieght" in line and str(tmp_path) in line


def test_booleans_are_flags(capsys):
    read = lambda *more: asked(Run, "ref.train", ["--preset", "letters", *START, *more]).settings  # noqa: E731
    assert read().std_normalize and read("--std-normalize").std_normalize
    assert not read("--no-std-normalize").std_normalize and read("--same-noise").same_noise
    assert "True" in refusal(main, ["--preset", "letters", *START, "--std-normalize", "True"], capsys)


def test_what_is_missing_is_named(capsys):
    line = refusal(main, ["--preset", "letters"], capsys)
    assert "missing" in line and "--method" in line and "--output-dir" in line


def test_a_refusal_is_one_line_however_the_box_is_drawn():
    """tyro draws its box with characters that depend on how stdout's encoding is spelled."""
    drawn = "╭─ Invalid value ─╮\n│ lr must be   │\n│ finite       │\n│ ──────────── │\n│ For full helptext, run: │\n│     python -m ref.train --help │\n╰───╯\n"
    plain = " Invalid value\n ------------ \n  lr must be   \n  finite       \n  ------------ \n  For full helptext, run: \n      python -m ref.train --help \n   \n"
    assert in_one_line(drawn) == in_one_line(plain) == "lr must be finite"


def test_a_record_gives_back_the_run_that_was_asked_for(tmp_path, finished):
    wanted = asked(Run, "ref.train", command(tmp_path, "--save-every", "1"))
    found = recorded(finished)
    assert found.settings == wanted.settings and (found.preset, found.method) == ("letters", "pec")


def test_resume_needs_nothing_repeated(finished, tmp_path):
    """Stopped after three of four iterations; continued by a command that names the directory alone."""
    shutil.copy(finished / "run.json", tmp_path)
    shutil.copy(finished / "checkpoint-00000003.pt", tmp_path)
    assert main(["--resume", "--output-dir", str(tmp_path)]) == 0
    mine, whole = (json.loads((folder / "evaluation.json").read_text()) for folder in (tmp_path, finished))
    assert mine["final"] == whole["final"]
    history = [json.loads((folder / "metrics.json").read_text()) for folder in (tmp_path, finished)]
    assert len(history[0]) == TINY["iterations"] and same(*history)


@pytest.mark.parametrize(
    "option, value, was",
    [
        ("lr", 0.1, 0.002),
        ("seed", 5, 0),
        ("std_normalize", False, True),
        ("weight", 0.3, 0.05),
        ("kind", "cps", "flow_sde"),
    ],
)
def test_resume_refuses_what_contradicts_the_record_by_name(option, value, was, finished, capsys):
    before = (finished / "run.json").read_text()
    line = refusal(main, ["--resume", "--output-dir", finished, *flags({option: value})], capsys)
    assert f"holds a run with {option} = {was}, not {value}" in line
    assert (finished / "run.json").read_text() == before


@pytest.mark.parametrize("option, value", [("preset", "mixture"), ("preset", "flux_dev"), ("method", "flow_grpo")])
def test_resume_names_another_preset_or_method(option, value, finished, capsys):
    was = {"preset": "letters", "method": "pec"}[option]
    line = refusal(main, ["--resume", "--output-dir", finished, f"--{option}", value], capsys)
    assert f"holds a run with {option} = {was}, not {value}" in line


@pytest.fixture(scope="module")
def large(world, tmp_path_factory):
    """A run of a large preset that has ended."""
    folder = tmp_path_factory.mktemp("large")
    settings = dataclasses.replace(PRESETS["sd35_medium"].settings, **LARGE_SETTINGS)
    run("sd35_medium", "flow_grpo", folder, settings=settings, encoder=f"dino={world / 'dino'}", progress=False,
        options=pipeline(world, "sd3"))  # fmt: skip
    return folder


def test_resume_may_change_what_moves_memory_and_time_only(large, tmp_path, capsys):
    """Gradient checkpointing among it, which a resumed run was once refused."""
    folder = shutil.copytree(large, tmp_path / "run")
    allowed = dict(gradient_checkpointing=True, tiling=True, decode_batch=1, micro_batch=2)
    assert main(["--resume", "--output-dir", str(folder), *flags(allowed)]) == 0
    assert main(["--resume", "--output-dir", str(folder), "--no-gradient-checkpointing"]) == 0
    line = refusal(main, ["--resume", "--output-dir", folder, "--height", 48], capsys)
    assert "holds a run with height = 32, not 48" in line


def test_a_large_run_is_recorded_with_all_its_options(large, world):
    found = recorded(large)
    assert found.options == pipeline(world, "sd3") and found.options.model == options(world, "sd3")["model"]


@pytest.mark.parametrize("preset", LARGE)
def test_memory_puts_the_variant_under_what_is_given(preset):
    memory, change = next(iter(PRESETS[preset].variants.items()))
    base = ["--preset", preset, *START, "--memory", str(memory)]
    found = asked(Run, "ref.train", base)
    assert found.settings.micro_batch == change["micro_batch"] and found.options.memory == memory
    assert found.options.gradient_checkpointing == change.get("gradient_checkpointing", False)
    own = asked(Run, "ref.train", [*base, "--micro-batch", "3", "--no-gradient-checkpointing"])
    assert own.settings.micro_batch == 3 and not own.options.gradient_checkpointing
