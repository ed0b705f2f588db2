"""P10: the naive KL, and the KL as reward."""

import itertools
import math

import numpy as np
import pytest
import sympy
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ref.grpo import advantages
from ref.methods import METHODS, Step
from ref.perceptual import deviations, perceptual_log_prob
from ref.policy import gaussian_log_prob

from .tools import make_group, normal, seeds, shapes


def gaussian_step(theta, old, eps, std, advantage=None):
    """A methods.Step of the policy N(mu_theta, std^2 I), sampled at mean `old`; mu_theta = theta [d]."""
    n, d = eps.shape
    x, mean = old + std * eps, theta.expand(n, d)
    log_prob = gaussian_log_prob(x, mean, std)
    old_log_prob = gaussian_log_prob(x, old.expand(n, d), std)
    advantage = torch.zeros(n, dtype=eps.dtype) if advantage is None else advantage
    return Step(log_prob, old_log_prob, advantage, torch.ones(n), mean, old.expand(n, d), None, torch.tensor(std))


@pytest.mark.claim("P10")
@settings(max_examples=15, deadline=None)
@given(st.floats(-2, 2), st.floats(0.1, 2.0), st.floats(0.01, 3.0))
def test_p10_zero_by_quadrature(mu, std, weight):
    """The loss term's expected gradient by Gauss-Hermite quadrature (exact for polynomials), one dimension."""
    nodes, weights = np.polynomial.hermite_e.hermegauss(12)
    weights = torch.from_numpy(weights / weights.sum())
    eps = torch.from_numpy(nodes)[:, None]
    old, gradient = torch.tensor([mu], dtype=torch.float64), []
    for e in eps:  # node by node, as loss() takes a plain mean
        theta = old.clone().requires_grad_()
        loss = METHODS["naive_kl"](weight).loss(gaussian_step(theta, old, e[None], std))
        gradient.append(torch.autograd.grad(loss, theta)[0])
    gradient = torch.stack(gradient)[:, 0]
    assert abs((weights @ gradient).item()) < 1e-12 * (1 + weight / std)
    fisher = weight**2 / std**2  # not silent: its variance is lambda^2 F
    assert (weights @ gradient.square()).item() == pytest.approx(fisher, rel=1e-9)


@pytest.mark.claim("P10")
def test_p10_odd_moments_sympy():
    """E[grad log p] = 0 and E[log p grad log p] = 0, but E[f grad log p] = grad E[f] for f = x^2."""
    x, mu = sympy.symbols("x mu", real=True)
    s = sympy.Symbol("s", positive=True)
    density = sympy.exp(-((x - mu) ** 2) / (2 * s**2)) / sympy.sqrt(2 * sympy.pi * s**2)
    log_density = -((x - mu) ** 2) / (2 * s**2) - sympy.log(2 * sympy.pi * s**2) / 2
    score = sympy.diff(log_density, mu)

    def expect(f):
        return sympy.simplify(sympy.integrate(f * density, (x, -sympy.oo, sympy.oo)))

    assert expect(score) == 0
    assert expect(log_density * score) == 0
    assert sympy.simplify(expect(x**2 * score) - 2 * mu) == 0


@pytest.mark.claim("P10")
def test_p10_later_updates_pull_back():
    """Off-policy, the term's expected gradient is lambda grad KL(p_old || p_theta) / d: towards the old mean."""
    weight, std = 0.7, 0.4
    nodes, weights = np.polynomial.hermite_e.hermegauss(8)
    weights = torch.from_numpy(weights / weights.sum())
    old, expected = torch.tensor([0.3], dtype=torch.float64), 0.0
    for w, e in zip(weights, torch.from_numpy(nodes)):
        theta = torch.tensor([0.5], dtype=torch.float64, requires_grad=True)
        loss = METHODS["naive_kl"](weight).loss(gaussian_step(theta, old, e.view(1, 1), std))
        expected = expected + w * torch.autograd.grad(loss, theta)[0]
    assert expected.item() == pytest.approx(weight * (0.5 - 0.3) / std**2, rel=1e-9)


@pytest.mark.claim("P10")
def test_p10_monte_carlo_through_the_methods():
    """A network's gradient of the naive term has mean 0 (27 coordinates beyond 6 standard errors,
    5e-8 together); the KL as reward has not.
    """
    n, std, d = 20_000, 0.5, 2
    net = torch.nn.Sequential(torch.nn.Linear(d, 5), torch.nn.Tanh(), torch.nn.Linear(5, d)).double()
    with torch.no_grad():
        for i, parameter in enumerate(net.parameters()):
            parameter.copy_(normal(parameter.shape, i))
    x0, eps = normal((n, d), 11), normal((n, d), 12)
    with torch.no_grad():
        x = net(x0) + std * eps

    def per_sample(function):
        params = dict(net.named_parameters())

        def one(params, x0, x, w):
            mean = torch.func.functional_call(net, params, (x0[None],))
            return function(gaussian_log_prob(x[None], mean, std)[0], w)

        phi = x.unflatten(0, (-1, 20))
        reward = -perceptual_log_prob(phi, 1.0).flatten()
        reward = reward - reward.mean()
        gradients = torch.func.vmap(torch.func.grad(one), (None, 0, 0, 0))(params, x0, x, reward)
        return torch.cat([g.flatten(1) for g in gradients.values()], 1)

    def worst(g):
        return (g.mean(0) / (g.std(0) / math.sqrt(n))).abs().max().item()

    assert worst(per_sample(lambda log_prob, w: -0.1 * log_prob)) < 6
    assert worst(per_sample(lambda log_prob, w: w * log_prob)) > 6  # power, and the claim's second half
    # the method's own loss term is the first of the two
    theta, old = normal((d,), 3).requires_grad_(), normal((d,), 4)
    extra = METHODS["naive_kl"](0.1).loss(gaussian_step(theta, old, eps[:9], std)) - METHODS["flow_grpo"]().loss(
        gaussian_step(theta, old, eps[:9], std)
    )
    direct = -0.1 * gaussian_log_prob(old + std * eps[:9], theta.expand(9, d), std).mean()
    torch.testing.assert_close(torch.autograd.grad(extra, theta)[0], torch.autograd.grad(direct, theta)[0])


@pytest.mark.claim("P10")
@pytest.mark.parametrize(("K", "d"), [(3, 1), (4, 1), (3, 2)])
def test_p10_kl_as_reward_by_quadrature(K, d):
    """PCVAE's expected centred gradient is PEC's, with the true log p_theta of every sample; and its noise is P10's.

    Policy N(mu, s^2 I_d), x = mu + s eps, score eps / s, features phi(x) = (x, x_1^2 / 2). Groups of K run over the
    nodes of a Gauss-Hermite rule with 6 nodes a coordinate, exact for degree 11; no integrand has more than 6 in a
    coordinate (bonus 4 and score 1; squared noise 2 + 1, twice). Sums of n <= 6^6 terms: n eps = 1e-11 of their size.
    """
    h, std, weight, mu = 0.9, 0.7, 0.6, torch.linspace(0.3, -0.4, d, dtype=torch.float64)
    nodes, weights = np.polynomial.hermite_e.hermegauss(6)
    one = torch.cartesian_prod(*[torch.tensor(nodes)] * d).view(-1, d)
    one_weight = torch.cartesian_prod(*[torch.tensor(weights / weights.sum())] * d).view(len(one), -1).prod(1)
    index = torch.tensor(list(itertools.product(range(len(one)), repeat=K)))
    eps, probability = one[index], one_weight[index].prod(1)

    def features(x):
        return torch.cat([x, x[..., :1].square() / 2], -1)

    x = mu + std * eps
    log_prob = gaussian_log_prob(x.flatten(0, 1), mu.expand(len(x) * K, d), std, "sum").view(len(x), K, 1)
    group = make_group(features(x), h, policy_log_prob=log_prob)

    def gradients(method):  # of every group, [n, d]
        A = advantages(METHODS[method](weight).shape(group), clip=math.inf, std_normalize=False)
        return (A * eps / std).mean(1)

    def variance(mu):
        phi = features(mu + std * one)
        return one_weight @ (phi - one_weight @ phi).square().sum(1)

    dV = torch.autograd.functional.jacobian(variance, mu)
    right = weight * (K - 1) * (K - 2) / (K**2 * 2 * h**2 * (d + 1)) * dV
    pec, pcvae = gradients("pec"), gradients("pcvae")
    torch.testing.assert_close(probability @ pec, right, rtol=1e-9, atol=1e-11)
    torch.testing.assert_close(probability @ pcvae, right, rtol=1e-9, atol=1e-11)
    assert right.norm() > 1e-3
    noise = probability @ (pcvae - pec).square()
    size = (weight / (K * std)) ** 2 * ((K - 2) * (d + 4) / 2 + ((d + 4) + (K - 1) * d) / (2 * K))
    torch.testing.assert_close(noise, torch.full_like(noise, size), rtol=1e-9, atol=0)


@pytest.mark.claim("P10")
@settings(max_examples=15, deadline=None)
@given(shapes, seeds, st.floats(0.1, 3.0))
def test_p10_kl_as_reward_signs(shape, seed, weight):
    """PCVAE's reward falls where p_perc is dense and rises with log p_theta: checked by finite differences."""
    phi, D = normal(shape, seed), shape[2]
    policy = normal((*shape[:2], 3), seed + 1)
    reward = METHODS["pcvae"](weight).shape(make_group(phi, 0.8, policy_log_prob=policy))
    raised = METHODS["pcvae"](weight).shape(make_group(phi, 0.8, policy_log_prob=policy + 0.5))
    torch.testing.assert_close(raised - reward, torch.full_like(reward, 0.5 * weight), rtol=1e-6, atol=1e-6)
    spread = METHODS["pcvae"](weight).shape(make_group(2 * phi, 0.8, policy_log_prob=policy))
    extra = 3 * weight * deviations(phi).square().sum(-1) / (2 * 0.8**2 * D)
    torch.testing.assert_close(spread - reward, extra[..., None].expand_as(reward), rtol=1e-6, atol=1e-6)
