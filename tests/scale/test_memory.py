"""When memory ends, one line says what to lower."""

import dataclasses

import pytest
import torch

from ref.presets import PRESETS
from ref.train import run


def test_out_of_memory_names_what_to_lower(tmp_path, monkeypatch):
    def greedy(images, prompts):
        return torch.empty(10**15).sum()  # four petabytes

    mixture = PRESETS["mixture"]
    build = lambda encoder=None: dataclasses.replace(mixture.task(encoder), reward=greedy)  # noqa: E731
    monkeypatch.setitem(PRESETS, "mixture", dataclasses.replace(mixture, build=build))
    with pytest.raises(OSError, match="out of memory while training; give a smaller --micro-batch"):
        run("mixture", "pec", tmp_path, progress=False)
