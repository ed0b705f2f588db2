"""The script for a real GPU, rehearsed on the CPU."""

import json

import pytest

from ref.benchmark import on_a_gpu

from ..small import PRESET
from ..tools import refusal


@pytest.mark.parametrize("kind", PRESET)
def test_a_rehearsal_reports_ratio_seconds_and_use(kind, world, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))  # where embeddings are kept
    file = tmp_path / "found.json"
    assert on_a_gpu.main([PRESET[kind], "--model", str(world / kind), "--json", str(file)]) == 0
    assert f"{PRESET[kind]}: ratio off by 0" in capsys.readouterr().out
    [row] = json.loads(file.read_text()).values()
    assert row["ratio_error"] == 0 and row["seconds_sample"] > 0 and 0 < row["use_update"] < 1


def test_without_a_gpu_the_full_size_is_refused(capsys):
    assert "there is no GPU; rehearse with --model FOLDER" in refusal(on_a_gpu.main, [], capsys)
    assert "unknown preset flux; choose of" in refusal(on_a_gpu.main, ["flux"], capsys)
