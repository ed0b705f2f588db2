"""The table of savers: rows from a preset to its twin, passes that fall, results that stay where they must."""

import dataclasses
import json

import pytest

from ref.benchmark.savers import EXACT, EXTREMES, FLAT, OURS, THEIR_FAST, THEIRS, main, steps_to_the_twin
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
    small = "--groups 2 --group-size 4 --micro-batch 4 --steps 7 --window 3 --repeats 3".split()
    assert main(["--preset", "letters", *small, "--json", str(tmp_path / "s.json")]) == 0
    found = json.loads((tmp_path / "s.json").read_text())
    rows = {row["name"]: row for row in found["rows"]}
    assert list(rows)[:3] == [THEIRS, THEIR_FAST, OURS] and list(rows)[-2:] == [f"{THEIR_FAST}, {FLAT}", FLAT]
    passes = {name: sum(row["passes"].values()) for name, row in rows.items()}
    assert passes[THEIRS] == passes[OURS] == passes[THEIR_FAST] == 10
    assert passes["window"] == 9 >= passes["shared start"] > passes["tail"]
    assert rows["tail"]["passes"]["trained"] == 2 * rows[FLAT]["passes"]["trained"] == 2  # one of two groups is flat
    assert rows[EXTREMES]["passes"] == rows["tail"]["passes"] | {"trained": 1}  # two of four members
    assert rows[f"{THEIR_FAST}, {FLAT}"]["passes"]["trained"] == 1.5
    assert "gradients differ by" in rows[OURS]["exact"]  # by how much, test_flow_grpo tests
    shown = capsys.readouterr().out.splitlines()
    assert "2 x 4 images" in shown[0] and "micro-batch 4" in shown[0]
    assert len(shown) == len(rows) + 4 and all(line.count("|") == 6 for line in shown[2:])


def test_the_race_stops_where_the_reward_is_reached(tmp_path, capsys):
    """At once for a target that the first iteration meets; never for one that no reward reaches."""
    small = "--groups 2 --group-size 2 --steps 4 --window 2 --iterations 2 --seeds 1 --images-per-prompt 2".split()
    for target, iterations, said in (("-100", 1, "of the seconds"), ("1000", 2, "not reached")):
        assert main(["--preset", "letters", *small, f"--race={target}", "--json", str(tmp_path / "r.json")]) == 0
        [row] = json.loads((tmp_path / "r.json").read_text())
        assert [row[name]["iterations"] for name in ("preset", "twin")] == [iterations] * 2
        assert all((row[name]["seconds"] is None) == (iterations == 2) for name in ("preset", "twin"))
        assert said in capsys.readouterr().out


def test_a_preset_without_a_twin_is_refused(capsys):
    assert "mixture has no fast twin" in refusal(main, ["--preset", "mixture"], capsys)
