"""`python -m ref`."""

import json

from ref.__main__ import main as story


def test_the_main_job_writes_its_table_figures_and_weights(tmp_path, capsys):
    """`python -m ref`, two iterations a method, twice: the second call repeats no training."""
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
        "pcvae/weights",
        "flow_grpo/weights",
    ):
        assert (tmp_path / name).exists(), name
    checkpoints = {file: file.stat().st_mtime_ns for file in tmp_path.glob("*/checkpoint-*.pt")}
    assert story(arguments) == 0
    assert json.loads((tmp_path / "metrics.json").read_text()).keys() == {"base", "flow_grpo", "pec", "pcvae"}
    assert len(checkpoints) >= 3 and all(file.stat().st_mtime_ns == time for file, time in checkpoints.items())
