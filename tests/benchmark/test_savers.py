"""The table of savers: rows from a preset to its twin, passes that fall, results that stay where they must."""

import dataclasses
import json

import pytest

from ref.benchmark.savers import EXACT, OURS, THEIRS, main, steps_to_the_twin
from ref.presets import PRESETS

from ..tools import refusal


@pytest.mark.parametrize("preset", ["letters", "sd35_medium", "flux_dev"])
def test_the_last_row_is_the_twin(preset):
    """What the preset says, row by row, until nothing is left of the difference."""
    own, fast = PRESETS[preset], PRESETS[f"{preset}_fast"]
    rows = steps_to_the_twin(preset, own.settings, 4.5)
    assert list(rows) == [name for name in EXACT if name in rows]
    settings, guidance = list(rows.values())[-1]
    assert settings == fast.settings
    if fast.options:
        assert guidance == (fast.options.guidance_scale or 4.5)
    changed = [sum(a != b for a, b in zip(*map(dataclasses.astuple, pair))) for pair in zip(
        [own.settings, *(s for s, _ in rows.values())], [s for s, _ in rows.values()])]  # fmt: skip
    assert all(n <= 2 for n in changed)


def test_the_command_prints_and_writes_the_table(tmp_path, capsys):
    small = ["--groups", "2", "--group-size", "3", "--steps", "7", "--window", "3", "--repeats", "3"]
    assert main(["--preset", "letters", *small, "--json", str(tmp_path / "s.json")]) == 0
    rows = {row["name"]: row for row in json.loads((tmp_path / "s.json").read_text())}
    assert list(rows)[0] == THEIRS and set(rows) - set(EXACT) == {THEIRS, OURS, f"{THEIRS}, fast recipe"}
    passes = {name: sum(row["passes"].values()) for name, row in rows.items()}
    assert passes[THEIRS] == passes[OURS] == 10 and passes["window"] == 9 >= passes["shared start"] > passes["tail"]
    assert rows["half of the groups flat"]["passes"]["trained"] <= 3
    assert float(rows[OURS]["exact"].split("by ")[1].split()[0]) < 1e-5
    shown = capsys.readouterr().out.splitlines()
    assert len(shown) == len(rows) + 2 and all(line.count("|") == 6 for line in shown)


def test_a_preset_without_a_twin_is_refused(capsys):
    assert "mixture has no fast twin" in refusal(main, ["--preset", "mixture"], capsys)
