"""The Gaussian step and rollouts, against SciPy and diffusers' own sampler."""

import numpy as np
import pytest
import scipy.stats
import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from hypothesis import given, settings
from hypothesis import strategies as st

from ref.policy import gaussian_log_prob, rollout
from ref.schedule import KINDS, FlowSchedule, time_grid


@pytest.mark.parametrize("shift", [1.0, 3.0])
@pytest.mark.parametrize("kind", KINDS)
def test_noise_free_limit_is_diffusers_euler_sampler(kind, shift, rng):
    """With noise_level 0 a rollout is diffusers' FlowMatchEulerDiscreteScheduler, step for step."""
    scheduler = FlowMatchEulerDiscreteScheduler(shift=shift)
    scheduler.set_timesteps(8)
    velocity = torch.nn.Sequential(torch.nn.Linear(6, 16), torch.nn.Tanh(), torch.nn.Linear(16, 6)).requires_grad_(
        False
    )
    noise = torch.randn(4, 6, generator=rng)
    schedule = FlowSchedule(scheduler.sigmas, kind, noise_level=0.0)
    path = rollout(lambda x, sigma: velocity(x) * (1 + sigma), schedule, noise, rng)
    x = noise
    for i, t in enumerate(scheduler.timesteps):
        x = scheduler.step(velocity(x) * (1 + scheduler.sigmas[i]), t, x, return_dict=False)[0]
        torch.testing.assert_close(path.x[i + 1], x, rtol=1e-5, atol=1e-5)
    assert schedule.steps == () and path.log_prob.shape == (0, 4)


@given(st.integers(1, 6), st.integers(1, 40), st.floats(1e-3, 1e3), st.integers(0, 2**31))
@settings(max_examples=50, deadline=None)
def test_log_density_is_scipys(B, d, std, seed):
    generator = torch.Generator().manual_seed(seed)
    x, mean = torch.randn(2, B, d, generator=generator, dtype=torch.float64)
    oracle = scipy.stats.norm(mean, std).logpdf(x)
    np.testing.assert_allclose(gaussian_log_prob(x, mean, std, "sum"), oracle.sum(1), rtol=1e-12, atol=1e-12 * d)
    np.testing.assert_allclose(gaussian_log_prob(x, mean, std, "mean"), oracle.mean(1), rtol=1e-12, atol=1e-12)


def test_rollout_log_density_is_that_of_its_own_states(rng):
    schedule = FlowSchedule(time_grid(5), "flow_sde", 0.7)
    path = rollout(lambda x, sigma: torch.tanh(x) * sigma, schedule, torch.randn(3, 2, 2, generator=rng), rng)
    for s, i in enumerate(path.steps):
        mean = schedule.mean(path.x[i], torch.tanh(path.x[i]) * schedule.sigmas[i], i)
        assert torch.equal(path.mean[s], mean)
        assert torch.equal(path.log_prob[s], gaussian_log_prob(path.x[i + 1], mean, schedule.std[i]))
