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
from ref.worlds.mixture import GaussianMixture, ring


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


def mixture_velocity():
    mixture = GaussianMixture(ring(6).means.double(), 0.5)
    return lambda x, sigma: mixture.velocity(x.double(), float(sigma))


@pytest.mark.parametrize("steps, shift", [(5, 1.0), (10, 3.0), (20, 1.0)])
def test_multistep_is_diffusers_solver(steps, shift, rng):
    """`DPMSolverMultistepScheduler` with flow sigmas, from the same noise, on the same velocity; float32 levels."""
    from diffusers import DPMSolverMultistepScheduler

    stock = DPMSolverMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=shift)
    stock.set_timesteps(steps)
    x, velocity = torch.randn(64, 2, dtype=torch.float64, generator=rng), mixture_velocity()
    ours = rollout(velocity, FlowSchedule(stock.sigmas.clone(), noise_level=0.0, multistep=True), x).x[-1]
    for i, t in enumerate(stock.timesteps):
        x = stock.step(velocity(x, stock.sigmas[i]), t, x).prev_sample
    torch.testing.assert_close(ours, x, rtol=0, atol=1e-5)
    euler = rollout(velocity, FlowSchedule(stock.sigmas.clone(), noise_level=0.0), ours).x[-1]
    assert (euler - x).abs().max() > 1e-2


def test_multistep_converges_with_order_two(rng):
    """From sigma 0.9 to 0.1 twice the steps leave a quarter of the error; of Euler's, half."""
    velocity, x = mixture_velocity(), torch.randn(256, 2, dtype=torch.float64, generator=rng)

    def end(steps, multistep):
        inner = torch.linspace(0.9, 0.1, steps + 1, dtype=torch.float64)
        schedule = FlowSchedule(torch.cat([inner, inner.new_zeros(1)]), noise_level=0.0, multistep=multistep)
        return rollout(velocity, schedule, x).x[-2]

    exact = end(1024, True)
    for multistep, factor in ((True, 4), (False, 2)):
        errors = [(end(n, multistep) - exact).square().mean().sqrt() for n in (32, 64)]
        assert errors[0] / errors[1] == pytest.approx(factor, rel=0.1)


def test_a_tail_leaves_the_window_alone_and_needs_fewer_calls(rng):
    """Against 2000 Euler steps from where the window ends, on a mixture: 3 calls err 1.2 times as Euler's 6 do at most, 4 calls 0.6."""
    full = FlowSchedule(time_grid(11, shift=3.0), noise_level=0.7).windowed(2, 3)
    x, velocity, eps = torch.randn(256, 2, generator=rng), mixture_velocity(), torch.randn(11, 256, 2, generator=rng)
    path = rollout(velocity, full, x, eps=eps)
    fine = FlowSchedule(full.sigmas[5] * torch.linspace(1, 0, 2001), noise_level=0.0)
    exact = rollout(velocity, fine, path.x[5]).x[-1]
    error = {0: (path.x[-1] - exact).square().mean().sqrt()}
    for calls in (3, 4, 100):
        short = full.tailed(calls)
        assert short.steps == full.steps == (2, 3, 4) and len(short) == 5 + min(calls, 6)
        assert torch.equal(short.sigmas[:6], full.sigmas[:6]) and torch.equal(short.std[:5], full.std[:5])
        found = rollout(velocity, short, x, eps=eps)
        assert torch.equal(found.x[:6], path.x[:6]) and torch.equal(found.log_prob, path.log_prob)
        error[calls] = (found.x[-1] - exact).square().mean().sqrt()
    assert error[3] < 1.2 * error[0] and error[4] < 0.6 * error[0] and error[100] < 0.4 * error[0]


def test_a_tail_alone_starts_from_pure_noise():
    """No stochastic step, levels from 1 on: a straight flow ends exactly where it leads."""
    schedule = FlowSchedule(torch.linspace(1, 0, 5)).tailed(2).ode()
    noise, image = torch.ones(2, 3), torch.full((2, 3), 0.25)
    path = rollout(lambda x, sigma: noise - image, schedule, noise)
    assert schedule.multistep and not schedule.steps
    torch.testing.assert_close(path.x[-1], image)
