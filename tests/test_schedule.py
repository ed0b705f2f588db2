"""The kernels and their log-densities, against other people's code and other derivations."""

import json

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ref.policy import gaussian_log_prob, sde_step
from ref.schedule import KINDS, FlowSchedule, time_grid

from .tools import DATA

GOLDEN = json.loads((DATA / "golden_steps.json").read_text())


@pytest.mark.parametrize("golden", GOLDEN, ids=lambda g: f"{g['kind']}-{g['index']}-of-{len(g['sigmas']) - 1}")
def test_golden_steps_of_public_implementations(golden):
    """Mean, std and log-density of Flow-GRPO, DanceGRPO and Flow-CPS, to 1e-5 relative in float32."""
    i, shape = golden["index"], golden["shape"]
    schedule = FlowSchedule(torch.tensor(golden["sigmas"]), golden["kind"], golden["noise_level"])
    x, v, x_next, mean = (torch.tensor(golden[k]).reshape(shape) for k in ("x", "velocity", "x_next", "mean"))
    torch.testing.assert_close(schedule.mean(x, v, i), mean, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(schedule.std[i : i + 1], torch.tensor(golden["std"]), rtol=1e-5, atol=0)
    if "log_prob_mean" in golden:
        ours = gaussian_log_prob(x_next, schedule.mean(x, v, i), schedule.std[i])
        torch.testing.assert_close(ours, torch.tensor(golden["log_prob_mean"]), rtol=1e-5, atol=2e-6)


@st.composite
def grids(draw):
    steps = draw(st.integers(2, 30))
    return time_grid(steps, draw(st.floats(0.5, 5)), torch.float64), draw(st.integers(0, steps - 2))


@given(grids(), st.floats(0.05, 1.0), st.integers(0, 2**31), st.sampled_from(KINDS))
@settings(max_examples=100, deadline=None)
def test_mean_against_an_independent_derivation(grid, eta, seed, kind):
    """float64 to 1e-12. Oracle: predict image and noise, take the score from Tweedie's formula, step the SDE.

    schedule.py multiplies x and v by two precomputed numbers; this builds mu from (x_hat, eps_hat).
    """
    sigmas, i = grid
    generator = torch.Generator().manual_seed(seed)
    x, v = torch.randn(2, 3, 5, generator=generator, dtype=torch.float64)
    s, t = sigmas[i].item(), sigmas[i + 1].item()
    x_hat, eps_hat = x - s * v, x + (1 - s) * v  # x = (1 - s) x_hat + s eps_hat, v = eps_hat - x_hat
    score = ((1 - s) * x_hat - x) / s**2  # Tweedie: grad log p = (E[(1-s) x_data | x] - x) / s^2
    if kind == "cps":
        std = t * np.sin(eta * np.pi / 2)
        mean = (1 - t) * x_hat + np.sqrt(t**2 - std**2) * eps_hat
    else:
        g2 = eta**2 * (s / (1 - (s if s < 1 else sigmas[1].item())) if kind == "flow_sde" else 1)
        std = np.sqrt(g2 * (s - t))
        drift = -(eps_hat - x_hat) + g2 / 2 * score  # per unit of falling sigma
        mean = x + drift * (s - t)
    schedule = FlowSchedule(sigmas, kind, eta)
    scale = mean.abs().max().item() + 1
    torch.testing.assert_close(schedule.mean(x, v, i), mean, rtol=1e-12, atol=1e-12 * scale)
    assert schedule.std[i].item() == pytest.approx(std, rel=1e-12)


@pytest.mark.parametrize("kind", KINDS)
def test_last_step_is_deterministic_and_a_window_moves_the_noise(kind, rng):
    schedule = FlowSchedule(time_grid(6), kind, 0.7)
    assert schedule.steps == (0, 1, 2, 3, 4) and schedule.std[5] == 0
    window = schedule.windowed(2, 3)
    assert window.steps == (2, 3, 4)
    assert torch.equal(window.std[2:5], schedule.std[2:5]) and (window.std[[0, 1, 5]] == 0).all()
    x, v = torch.randn(2, 3, 4, generator=rng)
    x_next, mean = sde_step(window, x, v, 0, rng)
    assert torch.equal(x_next, mean)
    torch.testing.assert_close(mean, x - v * window.dt[0])  # Euler's method


def test_half_precision_input_is_stepped_in_float32(rng):
    schedule = FlowSchedule(time_grid(4), "flow_sde", 0.7)
    x, v = torch.randn(2, 3, 4, generator=rng).bfloat16()
    assert schedule.mean(x, v, 1).dtype == torch.float32


@pytest.mark.parametrize(
    "arguments",
    [
        dict(sigmas=torch.tensor([1.0, 0.5])),
        dict(sigmas=torch.tensor([0.0])),
        dict(sigmas=torch.tensor([1.0, 0.5, 0.5, 0.0])),
        dict(sigmas=time_grid(4), kind="ddpm"),
        dict(sigmas=time_grid(4), noise_level=-1.0),
        dict(sigmas=time_grid(4), kind="cps", noise_level=1.1),
        dict(sigmas=time_grid(4), sde_window=(2, 3)),
    ],
)
def test_bad_schedules_are_refused(arguments):
    with pytest.raises(ValueError):
        FlowSchedule(**arguments)
