"""P13: noise that depends on theta or on the state."""

import math

import pytest
import sympy
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.distributions import Independent, MultivariateNormal, Normal

from ref.policy import gaussian_log_prob

from .tools import Z, gaussian_entropy, mlp, normal, z_score


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
    """s(x) fixed but not constant: the average entropy E H(x_i) follows the states' law, hence theta.

    Monte Carlo: two policies, same s(x) = exp(-x^2/4); their mean step entropies differ by more than 5.5
    standard errors (power), while the planted constant s gives two identical numbers.
    """
    x0 = normal((50_000, 1), 0)
    states = [x0 + 0.1 * normal((50_000, 1), 1), 2 * x0 + 0.1 * normal((50_000, 1), 1)]  # two thetas
    entropies = [(0.5 * math.log(2 * math.pi * math.e) - x.square() / 4)[:, 0] for x in states]
    assert z_score(entropies[0] - entropies[1], 0) > Z
    # closed form: E x^2 = 1 + .01 and 4 + .01
    assert z_score(entropies[0], 0.5 * math.log(2 * math.pi * math.e) - 1.01 / 4) < Z
    assert z_score(entropies[1], 0.5 * math.log(2 * math.pi * math.e) - 4.01 / 4) < Z


@pytest.mark.claim("P13")
def test_p13_anisotropic_but_fixed_noise_is_no_exception():
    """A full covariance that theta does not touch keeps the theorem: what matters is who sets it, not its shape."""
    A = normal((3, 3), 0)
    cov = A @ A.T + torch.eye(3, dtype=torch.float64)
    mean = mlp(3, 0)(normal((5, 3), 1))
    entropy = MultivariateNormal(mean, cov).entropy()
    assert (entropy - gaussian_entropy(cov)).abs().max() < 1e-12
