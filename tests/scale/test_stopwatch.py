"""Seconds of an iteration's phases."""

import dataclasses
import json

from ref.presets import PRESETS
from ref.train import run

from ..small import LARGE_SETTINGS, pipeline


def test_metrics_file_is_json_that_others_read(world, tmp_path):
    settings = dataclasses.replace(PRESETS["flux_dev"].settings, **LARGE_SETTINGS | dict(iterations=1))
    run("flux_dev", "flow_grpo", tmp_path, settings=settings, encoder=f"dino={world / 'dino'}", progress=False,
        options=pipeline(world, "flux"))  # fmt: skip
    [entry] = json.loads((tmp_path / "metrics.json").read_text())
    phases = [entry[f"seconds_{phase}"] for phase in ("sample", "decode", "reward", "features", "update")]
    assert min(phases) > 0 and sum(phases) <= entry["seconds"]
