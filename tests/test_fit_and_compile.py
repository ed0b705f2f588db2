"""Micro-batches by trial, compiled blocks, and an update that does not wait for the GPU."""

import dataclasses
import json
import shutil
from collections import Counter

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from ref.models import tiny
from ref.worlds import digits
from ref.benchmark.measure import flops
from ref.scale.microbatch import fits, fitted, largest
from ref.grpo import train
from ref.scale.weights import trainable
from ref.settings import Settings
from ref.methods import METHODS
from ref.models.load import load

PROMPTS = ["a red cat", "two blue dogs on a boat"]


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


def test_micro_batch_zero_is_refused_where_nobody_found_it():
    model, reward, phi, _ = digits.load()
    model.add_lora(4, 8)
    with pytest.raises(ValueError, match="let scale.microbatch find it first"):
        next(train(model, digits.PROMPTS, reward, phi, METHODS["flow_grpo"](), Settings(micro_batch=0)))


class Count(TorchDispatchMode):
    """Counts the operators that make Python wait for a GPU's answer, or copy between devices."""

    def __init__(self):
        super().__init__()
        self.calls = Counter()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.calls[function.overloadpacket.__name__] += 1
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("method", ["flow_grpo", "flow_grpo_kl", "kl_cov", "pcvae"])
@pytest.mark.parametrize("kind", ["sd3", "flux"])
def test_the_update_asks_for_no_number_within_its_loop_over_steps(kind, method, tmp_path, monkeypatch):
    """As many `item` and `nonzero` with two trained steps as with five: none of them is a step's."""
    from ref import grpo

    folder = getattr(tiny, kind)(tmp_path / kind)
    model = load(folder, PROMPTS, 32, 32, max_sequence_length=16, lora_rank=2, device="cpu", cache_dir=tmp_path / "c")
    inside, update = [], grpo.update

    def counted(*arguments):
        with Count() as count:
            result = update(*arguments)
        inside.append({name: count.calls[name] for name in ("_local_scalar_dense", "nonzero", "item")})
        return result

    monkeypatch.setattr(grpo, "update", counted)
    for window in (2, 5):
        settings = Settings(iterations=1, groups=2, group_size=2, updates=1, steps=6, window=window)
        next(train(model, PROMPTS, lambda images, prompts: images.mean((1, 2, 3)), lambda images: images.mean((2, 3)),
                   METHODS[method](), settings))  # fmt: skip
    assert inside[0] == inside[1] and inside[0]["_local_scalar_dense"] > 0


@pytest.mark.skipif(not (shutil.which("c++") or shutil.which("g++")), reason="torch.compile needs a C++ compiler")
@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("kind, micro_batch", [("sd3", 4), ("sd3", 6), ("flux", 4)])
def test_compiled_blocks_keep_the_ratio_exactly_one(kind, micro_batch, checkpointing, tmp_path):
    """Rollout without and update with gradients, one size of micro-batches and two; the numbers are the plain blocks'."""
    folder = getattr(tiny, kind)(tmp_path / kind)
    options = dict(max_sequence_length=16, lora_rank=2, device="cpu", cache_dir=tmp_path / "cache")
    options |= dict(gradient_checkpointing=checkpointing)
    settings = Settings(
        iterations=2, groups=2, group_size=3, updates=1, steps=3, micro_batch=micro_batch, lr=1e-2, clip=0.1
    )
    histories = []
    for compiled in (False, True):
        model = load(folder, PROMPTS, 32, 32, compile_blocks=compiled, **options)
        run = train(model, PROMPTS, lambda images, prompts: images.mean((1, 2, 3)), lambda images: images.mean((2, 3)),
                    METHODS["flow_grpo"](clip=0.1), settings)  # fmt: skip
        histories.append([(dict(s.metrics), s.samples.latents) for s in run])
        with torch.no_grad():
            conditioning = {
                key: value[[0, 1] * (settings.micro_batch // 2)] for key, value in model.encode(PROMPTS).items()
            }
            x = torch.zeros(settings.micro_batch, *model.latent_shape)
            v = model.velocity(x, torch.tensor(0.5), conditioning)
        assert not v.requires_grad and trainable(model)
    for (plain, x), (fast, y) in zip(*histories):
        assert plain["ratio_error"] == fast["ratio_error"] == 0.0
        torch.testing.assert_close(y, x, rtol=1e-3, atol=1e-3)
        assert fast["grad_norm"] == pytest.approx(plain["grad_norm"], rel=1e-2)
    graphs = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    assert graphs > 0
    assert fitted(model, PROMPTS, dataclasses.replace(settings, micro_batch=0)).micro_batch == 6
    plain, one = load(folder, PROMPTS, 32, 32, **options), {key: value[:1] for key, value in conditioning.items()}
    assert flops(model, one, backward=True) == flops(plain, one, backward=True) > 0
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == graphs  # trials and counts compile nothing
    blocks = [m for m in model.transformer.modules() if type(m).__name__ in model.transformer._no_split_modules]
    assert blocks and all(m._compiled_call_impl is not None for m in blocks)
