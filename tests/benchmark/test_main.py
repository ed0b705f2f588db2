"""`python -m ref.benchmark`."""

import json

import pytest

from ref.benchmark import on_paper
from ref.benchmark.__main__ import main

from ..tools import refusal


def test_the_command_writes_json(tmp_path, capsys):
    small = ["--groups", "2", "--group-size", "2", "--steps", "3", "--repeats", "3", "--warmup", "1"]
    assert main(["--preset", "mixture", *small, "--json", str(tmp_path / "b.json")]) == 0
    assert json.loads((tmp_path / "b.json").read_text())["preset"] == "mixture"
    assert "images a second" in capsys.readouterr().out


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
