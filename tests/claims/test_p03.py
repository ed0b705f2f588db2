"""P03: an entropy bonus in latent space is noise."""

import math

import numpy as np
import pytest
import sympy
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ref.entropy import policy_entropy
from ref.grpo import advantages
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
    """Reward -sum_i log p_i, gradient of sum_i log p_i in one weight theta, v = theta x, d = 1: its mean is 0.

    The score is done by hand from the path. One comparison beyond 5.5 standard errors, 4e-8; a reward on the image,
    x_N^2, must be rejected. Then one step with unit Jacobian in d = 5: variance (d + 4)/2, one comparison more; the
    estimator's square has a skewness of about 35, which at n = 200,000 and 5.5 standard errors costs a factor
    exp(35 * 5.5^3 / 6 sqrt(n)) = 9 in its rate: 4e-7 in all.
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
@pytest.mark.parametrize("dim", [1, 2])
def test_p03_covariance_of_a_step_and_of_the_path(dim):
    """((d + 4)/2 + (S - 1) d/2) sum_i J_i^2 for S = 2 steps, exactly; a step's own reward has (d + 4)/2.

    The velocity is theta in every coordinate, so each J_i = b_i / s_i is constant. The noise of the rollout runs over
    the nodes of a Gauss-Hermite rule with 6 nodes a coordinate, exact for degree 11; the integrand has degree 6.
    """
    s = FlowSchedule(time_grid(3, dtype=torch.float64), "flow_sde", 0.7)
    (nodes, weights), S = np.polynomial.hermite_e.hermegauss(6), len(s.steps)
    grid = torch.cartesian_prod(*[torch.tensor(nodes)] * (S * dim)).view(-1, S, dim)
    w = torch.cartesian_prod(*[torch.tensor(weights / weights.sum())] * (S * dim)).view(len(grid), -1).prod(1)
    eps = torch.cat([grid.transpose(0, 1), torch.zeros(1, len(grid), dim, dtype=torch.float64)])
    t = rollout(
        lambda x, sigma: torch.full_like(x, 0.3), s, normal((1, dim), 0).expand(len(grid), dim), None, "sum", eps
    )
    zero, one = torch.zeros(1, dtype=torch.float64), torch.ones(1, dtype=torch.float64)
    J = [(s.mean(zero, one, i) / s.std[i]).item() for i in s.steps]
    score = torch.stack([J[k] * (t.x[i + 1] - t.mean[k]).sum(1) / s.std[i] for k, i in enumerate(s.steps)])
    reward = -t.log_prob - policy_entropy(s, dim)[list(s.steps)][:, None]  # centred
    # theta moves all d coordinates, so J'J is d J_i^2. Sums of n = 6^(S d) <= 1296 terms are off by at most n eps =
    # 3e-13 times the mean size of a term, which is below 3 in the first and of the order of the sum in the others.
    for k in range(S):
        assert abs((w @ (reward[k] * score[k])).item()) < 1e-12
        assert (w @ (reward[k] * score[k]).square()).item() == pytest.approx((dim + 4) / 2 * dim * J[k] ** 2, rel=1e-11)
    path = ((dim + 4) / 2 + (S - 1) * dim / 2) * dim * sum(j**2 for j in J)
    second = (w @ (reward.sum(0) * score.sum(0)).square()).item()
    assert second == pytest.approx(path, rel=1e-11)
    assert second != pytest.approx((dim + 4) / 2 * dim * sum(j**2 for j in J), rel=1e-2)  # planted: the first wording


@pytest.mark.claim("P03")
def test_p03_group_normalised_advantages_keep_the_zero():
    """Rewards -log p of a step and of the path, normalised and clipped in groups of 4: the gradient's mean is 0.

    Two comparisons, < 8e-8. Planted: rewards with a tenth of the (odd) score added are rejected.
    """
    G, K, theta, s = 40_000, 4, 0.3, FlowSchedule(time_grid(4, dtype=torch.float64), "flow_sde", 0.7)
    t = rollout(lambda x, sigma: theta * x, s, normal((G * K, 1), 0), torch.Generator().manual_seed(1), "sum")
    zero, one = torch.zeros(1, dtype=torch.float64), torch.ones(1, dtype=torch.float64)
    eps = torch.stack([(t.x[i + 1] - t.mean[k])[:, 0] / s.std[i] for k, i in enumerate(s.steps)], 1)
    score = torch.stack([s.mean(zero, one, i) / s.std[i] * t.x[i][:, 0] for i in s.steps], 1) * eps
    eps, score = (v.view(G, K, -1) for v in (eps, score))
    surprise = -t.log_prob.T.reshape(G, K, -1)
    for reward in (surprise, surprise.sum(2, keepdim=True).expand_as(surprise)):
        A = advantages(reward)
        assert z_score((A * score).mean((1, 2)), 0) < Z
        assert z_score((advantages(reward + 0.1 * score) * score).mean((1, 2)), 0) > Z
        # they are the normalised ones; the clip is idle at K = 4. Rounding: eps |R| / s = 1e-11 where s = 1e-4, |R| = 5
        std = reward.std(1)
        assert torch.allclose(A.std(1), std / (std + 1e-4), rtol=1e-9, atol=0)


@pytest.mark.claim("P03")
def test_p03_added_to_another_reward_the_zero_does_not_survive_normalisation():
    """dA/dlambda of R + lambda b through `advantages` is P03's formula, and its gradient is 0 only for R of a parity.

    b = |eps|^2/2, d = 2, K = 4, R the angle of eps: independent of |eps|, neither odd nor even. Forward-mode
    derivatives against the formula: b and R are known to eps times their largest in the group, b - mean and the
    standard deviation S no better; so 100 roundings of size max|b| (1 + max|R| / S)^2 / S,
    far below any mistake. Then z-scores, three comparisons (1.2e-7): centred
    advantages keep the zero, so does an odd R, the angle does not.
    """
    G, K = 100_000, 4
    eps = normal((G, K, 2), 0)
    b, angle, odd = eps.square().sum(2) / 2, torch.atan2(eps[..., 1], eps[..., 0]), eps[..., 0] / eps.norm(dim=2)

    def derivative(R, **options):
        f = lambda r: advantages(r[..., None], clip=math.inf, **options)[..., 0]  # noqa: E731
        return torch.func.jvp(f, (R,), (b,))[1]

    for R in (angle, odd):
        S, r, c = R.std(1, keepdim=True), R - R.mean(1, keepdim=True), b - b.mean(1, keepdim=True)
        covariance = (r * c).sum(1, keepdim=True) / (K - 1)
        formula = c / (S + 1e-4) - r * covariance / (S * (S + 1e-4) ** 2)
        B, largest = b.abs().amax(1, keepdim=True), R.abs().amax(1, keepdim=True)
        size = B * (1 + largest / S) ** 2 / S
        assert ((derivative(R) - formula).abs() <= 100 * torch.finfo(torch.float64).eps * size).all()
    gradient = (derivative(angle)[..., None] * eps).mean(1)[:, 0]
    assert z_score(gradient, 0) > Z and abs(gradient.mean().item() - 0.039) < 0.004
    assert z_score((derivative(angle, std_normalize=False)[..., None] * eps).mean(1)[:, 0], 0) < Z
    assert z_score((derivative(odd)[..., None] * eps).mean(1)[:, 0], 0) < Z
