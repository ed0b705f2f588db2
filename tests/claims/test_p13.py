"""P13: noise that depends on theta or on the state."""

import math

import pytest
import sympy
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.distributions import Independent, MultivariateNormal, Normal

from ref.entropy import policy_entropy
from ref.policy import gaussian_log_prob, sde_step
from ref.schedule import FlowSchedule, time_grid

from .tools import Z, mlp, normal, z_score


@pytest.mark.claim("P13")
def test_p13_sympy_learned_sigma():
    """With log s = theta, dH/dtheta = 1 per dimension, and the entropy reward's expected gradient is the same 1."""
    e, theta, mu, x = sympy.symbols("e theta mu x", real=True)
    H = sympy.log(2 * sympy.pi * sympy.E * sympy.exp(2 * theta)) / 2
    assert sympy.simplify(sympy.diff(H, theta)) == 1
    log_p = -((x - mu) ** 2) / (2 * sympy.exp(2 * theta)) - theta - sympy.log(2 * sympy.pi) / 2
    at_sample = {x: mu + sympy.exp(theta) * e}
    estimator = sympy.simplify((-log_p * sympy.diff(log_p, theta)).subs(at_sample))
    density = sympy.exp(-(e**2) / 2) / sympy.sqrt(2 * sympy.pi)
    mean = sympy.integrate(sympy.expand(estimator) * density, (e, -sympy.oo, sympy.oo))
    assert sympy.simplify(mean) == 1


@pytest.mark.claim("P13")
@settings(max_examples=20, deadline=None)
@given(st.integers(1, 8), st.integers(0, 1000))
def test_p13_a_learned_sigma_moves_the_entropy(dim, seed):
    """A network that sets log s has dH/dtheta = d dlog s/dtheta; the policy's own kernel gives none."""
    net, x = mlp(dim, seed, 0.3, out=dim + 1), normal((4, dim), seed)
    out = net(x)
    log_s = out[:, dim].mean()
    entropy = Independent(Normal(out[:, :dim], log_s.exp()), 1).entropy().mean()
    weights = list(net.parameters())
    grads = torch.autograd.grad(entropy, weights, retain_graph=True)
    expected = torch.autograd.grad(dim * log_s, weights, retain_graph=True)
    for g, e in zip(grads, expected):
        assert torch.allclose(g, e, rtol=1e-12, atol=1e-12)
    assert max(g.abs().max() for g in grads) > 1e-6

    eps = normal(x.shape, seed + 1)
    x_next = out[:, :dim] + log_s.exp() * eps
    mc = -gaussian_log_prob(x_next, out[:, :dim], log_s.exp(), "sum").mean()
    for g, e in zip(torch.autograd.grad(mc, weights), expected):
        assert torch.allclose(g, e, rtol=1e-9, atol=1e-9)


@pytest.mark.claim("P13")
def test_p13_noise_that_depends_on_the_state():
    """s(x) = exp(-x^2/4), fixed but not constant: the average entropy E H(x_1) follows the states' law, hence theta.

    x_1 comes from one library step of v = k x, so E x_1^2 = (a + b k)^2 + s_0^2 in closed form, with a and b read off
    `mean`. Two policies, k = +-1: the mean surprise -log p(x_2 | x_1) of `gaussian_log_prob` is compared with
    (log 2 pi e)/2 - E x_1^2 / 4, and with the schedule's own std in place of s(x) with `policy_entropy`. Four
    comparisons, < 2e-7. The first pair must differ from each other.
    """
    n, s = 100_000, FlowSchedule(time_grid(4, dtype=torch.float64), "flow_sde", 0.7)
    one, zero = torch.ones(1, dtype=torch.float64), torch.zeros(1, dtype=torch.float64)
    a, b, surprises = s.mean(one, zero, 0).item(), s.mean(zero, one, 0).item(), []
    for k in (1.0, -1.0):
        x0, generator = normal((n, 1), 0), torch.Generator().manual_seed(1)
        x1, _ = sde_step(s, x0, k * x0, 0, generator)
        mean, eps = s.mean(x1, k * x1, 1), normal((n, 1), 2)
        own = (-x1.square() / 4).exp()
        surprises.append(-gaussian_log_prob(mean + own * eps, mean, own, "sum"))
        expected = 0.5 * math.log(2 * math.pi * math.e) - ((a + b * k) ** 2 + s.std[0].item() ** 2) / 4
        assert z_score(surprises[-1], expected) < Z
        x2, mean = sde_step(s, x1, k * x1, 1, generator)
        assert z_score(-gaussian_log_prob(x2, mean, s.std[1], "sum"), policy_entropy(s, 1)[1].item()) < Z
    assert z_score(surprises[0] - surprises[1], 0) > Z


@pytest.mark.claim("P13")
def test_p13_anisotropic_but_fixed_noise_is_no_exception():
    """A full covariance that theta does not touch keeps the theorem: what matters is who sets it, not its shape.

    The kernel N(A mu, s^2 A A') is the image of the library's under the fixed matrix A, so its log-density is
    `gaussian_log_prob` - log |det A|; torch's MultivariateNormal is the oracle. The sampled entropy is the same for
    two networks and has gradient 0 in every bit; with a network's factor on the std it has not.
    """
    s, A = FlowSchedule(time_grid(4, dtype=torch.float64), "flow_sde", 0.7), normal((3, 3), 0)
    x, eps, values = normal((5, 3), 1), normal((5, 3), 2), []
    for seed in (0, 1):
        net = mlp(3, seed)
        mean = s.mean(x, net(x), 1)
        y = mean + s.std[1] * eps
        entropy = -gaussian_log_prob(y, mean, s.std[1], "sum") + torch.linalg.slogdet(A)[1]
        law = MultivariateNormal(mean @ A.T, s.std[1] ** 2 * A @ A.T)
        # the oracle solves with A A': rounding times its condition number times |eps|^2, in sums of a dozen terms
        tolerance = 12 * torch.finfo(torch.float64).eps * torch.linalg.cond(A @ A.T) * (1 + eps.square().sum(1).max())
        assert (entropy + law.log_prob(y @ A.T)).abs().max() < tolerance
        exact = policy_entropy(s, 3)[1] + torch.linalg.slogdet(A)[1]
        assert (law.entropy() - exact).abs().max() < 1e-12
        grads = torch.autograd.grad(entropy.sum(), list(net.parameters()), retain_graph=True)
        assert all(torch.count_nonzero(g) == 0 for g in grads)
        values.append(entropy.detach())
    assert (values[0] - values[1]).abs().max() < 1e-12  # |eps|^2/2 + const, of size 10
    learned = s.std[1] * (0.1 * net(x).mean()).exp()
    wrong = -gaussian_log_prob(mean + learned * eps, mean, learned, "sum").sum()
    wrong = torch.autograd.grad(wrong, list(net.parameters()))
    assert max(g.abs().max() for g in wrong) > 1e-6
