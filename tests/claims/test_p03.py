"""P03: an entropy bonus in latent space is noise."""

import math

import numpy as np
import pytest
import sympy
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ref.policy import gaussian_log_prob, rollout
from ref.schedule import FlowSchedule, time_grid

from .tools import Z, mlp, normal, z_score


@pytest.mark.claim("P03")
def test_p03_sympy_moments():
    """E[eps (eps^2 - 1)/2] = 0, and in d dimensions the estimator's variance is (d + 4)/2 |u|^2."""
    e = sympy.symbols("e", real=True)
    d = sympy.symbols("d", positive=True)
    density = sympy.exp(-(e**2) / 2) / sympy.sqrt(2 * sympy.pi)
    assert sympy.integrate(e * (e**2 - 1) / 2 * density, (e, -sympy.oo, sympy.oo)) == 0
    m1, m2, m3 = d, d * (d + 2), d * (d + 2) * (d + 4)  # moments of chi^2_d
    assert sympy.simplify((m3 - 2 * d * m2 + d**2 * m1) / (4 * d) - (d + 4) / 2) == 0
    one = sympy.integrate((e * (e**2 - 1) / 2) ** 2 * density, (e, -sympy.oo, sympy.oo))
    assert one == sympy.Rational(5, 2)  # d = 1


@pytest.mark.claim("P03")
@settings(max_examples=20, deadline=None)
@given(st.integers(1, 3), st.floats(0.1, 2.0), st.integers(0, 1000))
def test_p03_expected_gradient_by_quadrature(dim, std, seed):
    """E[-log p grad_theta log p] by Gauss-Hermite quadrature (exact for polynomials) through gaussian_log_prob."""
    nodes, weights = np.polynomial.hermite_e.hermegauss(8)
    eps = torch.cartesian_prod(*[torch.tensor(nodes)] * dim).reshape(-1, dim)
    w = torch.cartesian_prod(*[torch.tensor(weights / weights.sum())] * dim).reshape(-1, dim).prod(1)
    net = mlp(dim, seed)
    x0 = normal((1, dim), seed)
    mean = net(x0).expand(len(eps), dim)
    sample = (mean + std * eps).detach()
    log_p = gaussian_log_prob(sample, mean, std, "sum")
    parameters = list(net.parameters())
    grads = torch.autograd.grad((w * -log_p.detach() * log_p).sum(), parameters, retain_graph=True)
    size = torch.autograd.grad((w * sample.sum(1) * log_p).sum(), parameters)  # a reward that does see theta
    scale = max(g.abs().max() for g in size)
    assert scale > 1e-6 and max(g.abs().max() for g in grads) < 1e-11 * scale * (1 + abs(log_p.detach()).max())


@pytest.mark.claim("P03")
def test_p03_monte_carlo_over_whole_trajectories():
    """Reward -sum_i log p_i, gradient of sum_i log p_i for one weight per sample: mean 0, the stated variance.

    Planted: the same reward with one step's squared noise replaced by the noise itself has a gradient.
    2 comparisons beyond 5.5 standard errors: < 1e-7. Dimension 1, v = theta x, done by hand from the path.
    """
    n, s = 200_000, FlowSchedule(time_grid(4, dtype=torch.float64), "flow_sde", 0.7)
    theta = 0.3
    noise = normal((n, 1), 0)
    t = rollout(lambda x, sigma: theta * x, s, noise, torch.Generator().manual_seed(1), "sum")
    score = torch.zeros(n, dtype=torch.float64)
    for k, i in enumerate(s.steps):
        b = s.mean(torch.zeros(1, dtype=torch.float64), torch.ones(1, dtype=torch.float64), i)
        score += ((t.x[i + 1] - t.mean[k]) / s.std[i] ** 2 * b * t.x[i])[:, 0]  # d log p / d theta
    assert z_score(-t.log_prob.sum(0) * score, 0) < Z
    assert z_score(t.x[-1, :, 0] ** 2 * score, 0) > Z  # a reward on the image does steer

    # one step, unit Jacobian: variance (d + 4)/2 for the centred reward
    d = 5
    eps = normal((n, d), 3)
    log_p = gaussian_log_prob(eps, torch.zeros_like(eps), 1.0, "sum")
    estimator = (-log_p - d / 2 * math.log(2 * math.pi * math.e)) * eps[:, 0]
    assert z_score(estimator.square(), (d + 4) / 2) < Z
    assert z_score(estimator.square(), d / 2) > Z


@pytest.mark.claim("P03")
def test_p03_group_normalised_advantages_keep_the_zero():
    """Advantages of -log p normalised in groups: flipping every eps flips the gradient and not the advantage."""
    from ref.grpo import advantages

    eps = normal((50, 8, 3), 0)
    reward = -gaussian_log_prob(eps.flatten(0, 1), torch.zeros(400, 3, dtype=torch.float64), 1.0).view(50, 8, 1)
    flipped = -gaussian_log_prob(-eps.flatten(0, 1), torch.zeros(400, 3, dtype=torch.float64), 1.0).view(50, 8, 1)
    assert torch.equal(advantages(reward), advantages(flipped))
    gradient = (advantages(reward) * eps).sum((0, 1)) + (advantages(flipped) * -eps).sum((0, 1))
    assert torch.count_nonzero(gradient) == 0
