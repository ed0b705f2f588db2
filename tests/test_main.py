"""`python -m ref`."""

import json
from dataclasses import replace

from ref.__main__ import main as story
from ref.presets import PRESETS


def test_the_main_job_writes_its_table_figures_and_weights(tmp_path, capsys, monkeypatch):
    """`python -m ref`, two iterations a method, twice: the second call repeats no training."""
    small = replace(PRESETS["letters"].settings, group_size=4, images_per_prompt=5)
    monkeypatch.setitem(PRESETS, "letters", replace(PRESETS["letters"], settings=small))
    arguments = ["--output-dir", str(tmp_path), "--iterations", "2"]
    assert story(arguments) == 0
    first = capsys.readouterr().out
    assert [line.split("  ")[0].strip() for line in first.splitlines() if "Flow-GRPO" in line or "PEC" in line]
    for name in (
        "collapse.png",
        "grid.png",
        "curves.png",
        "paradox.png",
        "metrics.json",
        "pec/weights",
        "flow_grpo_kl/weights",
        "flow_grpo/weights",
    ):
        assert (tmp_path / name).exists(), name
    checkpoints = {file: file.stat().st_mtime_ns for file in tmp_path.glob("*/checkpoint-*.pt")}
    assert story(arguments) == 0
    assert json.loads((tmp_path / "metrics.json").read_text()).keys() == {"base", "flow_grpo", "flow_grpo_kl", "pec"}
    assert len(checkpoints) >= 3 and all(file.stat().st_mtime_ns == time for file, time in checkpoints.items())
