"""Every phase is measured; FLOPs are those of the modules."""

import dataclasses

import pytest
import torch

from ref.benchmark.measure import benchmark, expected_passes, flops, phase_flops
from ref.presets import PRESETS
from ref.settings import Settings


def test_flops_of_a_linear_model():
    """2 n m a forward pass of n x m weights; the backward pass as much again for the weights' gradient."""

    class Linear(torch.nn.Module):
        latent_shape = (8,)

        def __init__(self):
            super().__init__()
            self.layer = torch.nn.Linear(8, 8, bias=False)

        def velocity(self, x, sigma, conditioning):
            return self.layer(x)

    model, conditioning = Linear(), {"prompt": torch.zeros(1, 0)}
    assert flops(model, conditioning) == 2 * 8 * 8
    assert flops(model, conditioning, backward=True) == 4 * 8 * 8
    work = phase_flops(Settings(groups=2, group_size=3, steps=5), forward=10, both=30)
    assert work == {"sample": 2 * 3 * 5 * 10, "update": 2 * 3 * 4 * 30}  # the last of five steps is deterministic
    assert phase_flops(Settings(groups=2, group_size=3, steps=5, window=2), 10, 30)["update"] == 2 * 3 * 2 * 30


def test_every_phase_is_measured():
    letters = PRESETS["letters"]
    result = benchmark(
        letters.task(), dataclasses.replace(letters.settings, groups=2, group_size=2, steps=3, window=1), 3, 1
    )
    for phases in result["phases"].values():
        assert set(phases) >= {"seconds", "encode", "sample", "decode", "reward", "features", "update", "checkpoint"}
        parts = sum(phases[name]["median"] for name in ("encode", "sample", "decode", "reward", "features", "update"))
        assert 0 < parts < 1.5 * phases["seconds"]["median"]
    assert set(result["ratio"]) == {"pec", "pcvae"} and result["flops"]["sample"] > 0
    assert all(0 < use["median"] < 1 for use in result["utilisation"].values())


@pytest.mark.parametrize(
    "changes, drawn, trained",
    [
        ({}, 10, 9),
        (dict(trained=0.6), 10, 6),
        (dict(window=3), 10, 3),
        (dict(window=3, trained=0.5), 10, 3),
        (dict(window=3, trained=0.5, same_noise=True), (0 + 1 / 4 + 2 / 4) / 3 + (10 + 9 + 8) / 3, 3),
        (dict(window=3, trained=0.5, tail_steps=2), (0 + 1 + 2) / 3 + 5, 3),
        (dict(window=3, trained=0.5, tail_steps=6), (0 + 1 + 2) / 3 + 3 + (6 + 6 + 5) / 3, 3),
        (dict(best_and_worst=2), 10, 4.5),
    ],
)
def test_expected_passes_counted_by_hand(changes, drawn, trained):
    assert expected_passes(Settings(group_size=4, **changes)) == pytest.approx((drawn, trained))


def test_the_hook_counts_what_is_expected():
    """The letters, whose one place for a window leaves nothing to chance."""
    letters = PRESETS["letters"]
    own = dict(
        groups=2, group_size=4, updates=1, steps=4, window=2, trained=0.5, tail_steps=1, micro_batch=4, same_noise=True
    )
    settings = dataclasses.replace(letters.settings, best_and_worst=2, **own)
    result = benchmark(letters.task(), settings, 3, 1)
    assert tuple(result["passes"].values()) == expected_passes(settings) == (3, 1)


def test_too_few_rounds_are_refused():
    with pytest.raises(ValueError, match="repeats must be at least 3"):
        benchmark(PRESETS["mixture"].task(), PRESETS["mixture"].settings, repeats=1)
