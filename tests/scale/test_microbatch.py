"""Micro-batches by trial."""

import dataclasses
import json

import pytest
import torch

from ref.scale.microbatch import fits, fitted, largest
from ref.settings import Settings
from ref.train import run

from ..small import pipeline


@pytest.mark.parametrize("most", [1, 2, 7, 8, 100])
@pytest.mark.parametrize("limit", [0, 1, 2, 3, 7, 8, 99, 1000])
def test_largest_is_the_last_that_fits_and_asks_seldom(limit, most):
    asked = []
    assert largest(lambda n: not asked.append(n) and n <= limit, most) == min(limit, most)
    assert max(asked, default=0) <= most and len(asked) <= 2 * most.bit_length() + 1


class Limited(torch.nn.Module):
    """A model whose memory ends at so many samples, in the forward or in the backward pass."""

    latent_shape = (3,)

    def __init__(self, limit, where):
        super().__init__()
        self.weight, self.limit, self.where = torch.nn.Parameter(torch.ones(3)), limit, where

    def encode(self, prompts):
        return {"prompt": torch.zeros(len(prompts), 0)}

    def velocity(self, x, sigma, conditioning):
        assert len(conditioning["prompt"]) == len(x)
        v = self.weight * x
        if len(x) > self.limit and self.where == "forward":
            raise torch.OutOfMemoryError("CUDA out of memory")
        if len(x) > self.limit:
            v.register_hook(self.end)
        return v

    def end(self, gradient):
        raise torch.OutOfMemoryError("CUDA out of memory")


@pytest.mark.parametrize("where", ["forward", "backward"])
def test_fitted_finds_where_memory_ends_and_leaves_no_gradient(where):
    settings = Settings(groups=4, group_size=8, updates=2, micro_batch=0)
    model = Limited(11, where)
    assert fitted(model, ["p"], settings) == dataclasses.replace(settings, micro_batch=8)  # 16 in as few as fit, equal
    assert fitted(Limited(7, where), ["p"], settings).micro_batch == 6  # 6 + 6 + 4
    assert model.weight.grad is None
    assert fitted(Limited(999, where), ["p"], settings).micro_batch == 16  # all of an optimiser step's
    assert fitted(model, ["p"], dataclasses.replace(settings, micro_batch=5)).micro_batch == 5  # as the user says
    assert fitted(Limited(999, where), ["p"], dataclasses.replace(settings, group_size=99)).micro_batch == 50  # of 198
    with pytest.raises(OSError, match="not even one sample fits; add --gradient-checkpointing"):
        fitted(Limited(0, where), ["p"], settings)


@pytest.mark.parametrize("ema, copies", [(0.0, 2), (0.9, 3)])
def test_a_trial_leaves_room_for_moments_and_averages(ema, copies, monkeypatch):
    from ref.scale import microbatch as fit

    taken = []
    monkeypatch.setattr(fit.torch, "empty_like", lambda w: taken.append(w.numel()) or w.clone())
    model = Limited(99, "forward")
    assert fitted(model, ["p"], Settings(groups=1, group_size=2, updates=1, micro_batch=0, ema=ema)).micro_batch == 2
    assert taken == [3] * copies * 2  # two trials


def test_a_run_finds_its_micro_batch_once(tmp_path, monkeypatch):
    """Continued where more would fit, it keeps to what it found, and ends bit for bit as if never interrupted."""
    from ref.scale import microbatch as fit
    from ref.train import run

    small = Settings(groups=2, group_size=8, updates=1, steps=4, lr=1e-2, clip=0.2, iterations=4)

    def weights(name, **changes):
        run("mixture", "pec", tmp_path / name, 1.0, dataclasses.replace(small, **changes), progress=False, resume=True)
        return torch.load(sorted((tmp_path / name).glob("checkpoint-*.pt"))[-1])

    named, other = weights("named", micro_batch=4), weights("other", micro_batch=8)
    monkeypatch.setattr(fit, "fits", lambda model, conditioning, samples, copies: samples <= 5)
    assert weights("found", micro_batch=0, iterations=2)["micro_batch"] == 4
    assert json.loads((tmp_path / "found" / "run.json").read_text())["settings"]["micro_batch"] == 4
    monkeypatch.setattr(fit, "fits", lambda model, conditioning, samples, copies: samples <= 9)
    found = weights("found", micro_batch=0)
    assert found["micro_batch"] == 4
    assert all(torch.equal(w, named["weights"][name]) for name, w in found["weights"].items())
    assert not all(torch.equal(w, other["weights"][name]) for name, w in found["weights"].items())


def test_other_errors_of_a_trial_are_not_taken_for_memory():
    model = Limited(11, "forward")
    model.velocity = lambda *_: torch.zeros(2) + torch.zeros(3)
    with pytest.raises(RuntimeError, match="size of tensor"):
        fits(model, model.encode(["p"]), 1)


def test_weights_in_parts_need_a_micro_batch_before_anything_is_loaded(world, tmp_path, monkeypatch):
    monkeypatch.setattr("ref.train.processes", lambda: 2)
    with pytest.raises(ValueError, match="weights in parts cannot try out a micro-batch; give --micro-batch"):
        run("sd35_medium", "pec", tmp_path / "run", options=pipeline(world, "sd3", lora_rank=0), progress=False)
    assert not (tmp_path / "run").exists()
