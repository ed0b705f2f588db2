"""P05: what the KL divergence of two policies is."""

import pytest
import sympy
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.distributions import Normal

from ref.entropy import gaussian_kl
from ref.policy import gaussian_log_prob, rollout
from ref.schedule import KINDS, FlowSchedule, time_grid

from .tools import Z, mlp, normal, z_score

ONE, ZERO = torch.ones(1, dtype=torch.float64), torch.zeros(1, dtype=torch.float64)


@pytest.mark.claim("P05")
def test_p05_sympy_kl():
    x, a, b = sympy.symbols("x a b", real=True)
    s = sympy.symbols("s", positive=True)
    p = sympy.exp(-((x - a) ** 2) / (2 * s**2)) / sympy.sqrt(2 * sympy.pi * s**2)
    log_ratio = ((x - b) ** 2 - (x - a) ** 2) / (2 * s**2)
    kl = sympy.integrate(sympy.expand(log_ratio) * p, (x, -sympy.oo, sympy.oo))
    assert sympy.simplify(kl - (a - b) ** 2 / (2 * s**2)) == 0


@pytest.mark.claim("P05")
@settings(max_examples=25, deadline=None)
@given(st.integers(2, 10), st.sampled_from(KINDS), st.floats(0.1, 0.9), st.integers(1, 6), st.integers(0, 10_000))
def test_p05_kl_of_a_step_against_torch(steps, kind, eta, dim, seed):
    """torch.distributions' KL of the two kernels, both reductions; the peers' form without dt must differ."""
    s = FlowSchedule(time_grid(steps, dtype=torch.float64), kind, eta)
    i = s.steps[seed % len(s.steps)]
    x = normal((3, dim), seed)
    v, w = mlp(dim, seed)(x), mlp(dim, seed + 1)(x)
    p, q = s.mean(x, v, i), s.mean(x, w, i)
    oracle = torch.distributions.kl_divergence(Normal(p, s.std[i]), Normal(q, s.std[i])).sum(1)
    kl = gaussian_kl(p, q, s.std[i], "sum")
    assert torch.allclose(kl, oracle, rtol=1e-12)
    assert torch.allclose(gaussian_kl(p, q, s.std[i]) * dim, oracle, rtol=1e-12)
    if kind != "cps":  # in velocities, with the weight that the SDE gives them
        g2 = s.std[i] ** 2 / s.dt[i]
        t = s.sigmas[i]
        weight = (1 + g2 * (1 - t) / (2 * t)) ** 2 / (2 * g2) * s.dt[i]
        assert torch.allclose(kl, weight * (v - w).square().sum(1), rtol=1e-10)
        assert not torch.allclose(kl * s.dt[i], oracle, rtol=0.01)


@pytest.mark.claim("P05")
def test_p05_kl_along_the_path_for_linear_policies():
    """Path KL as the KL of two joint Gaussians (torch) = sum of E_p of the steps' gaussian_kl (closed form), to 1e-10."""
    s = FlowSchedule(time_grid(4, dtype=torch.float64), "flow_sde", 0.6)

    def maps(k):
        rows, variances = [torch.tensor([1.0, 0, 0, 0], dtype=torch.float64)], [1.0]
        for n, i in enumerate(s.steps):
            row = s.mean(ONE, k * ONE, i) * rows[-1]
            row[n + 1] += s.std[i]
            rows.append(row)
            variances.append(row.square().sum().item())
        return torch.stack(rows), variances

    (P, second), (Q, _) = maps(0.4), maps(-0.3)
    joint = torch.distributions.kl_divergence(
        *[torch.distributions.MultivariateNormal(torch.zeros(4, dtype=torch.float64), L @ L.T) for L in (P, Q)]
    )
    total = 0.0
    for n, i in enumerate(s.steps):
        unit = gaussian_kl(s.mean(ONE, 0.4 * ONE, i)[None], s.mean(ONE, -0.3 * ONE, i)[None], s.std[i], "sum").item()
        total += unit * second[n]  # the KL is unit * x^2, averaged over x_i of the first policy
    assert abs(joint.item() - total) < 1e-10 * (1 + total)


@pytest.mark.claim("P05")
@pytest.mark.parametrize("kind", KINDS)
def test_p05_monte_carlo_path_kl(kind):
    """E_p[log p(path) - log q(path)] from rollouts = E_p sum of gaussian_kl; 2 planted errors must be rejected.

    One comparison, < 4e-8. Planted: KL without the 1/2, and KL without dt.
    """
    dim, s = 2, FlowSchedule(time_grid(4, dtype=torch.float64), kind, 0.7)
    f, g = mlp(dim, 0, 0.5), mlp(dim, 1, 0.5)
    t = rollout(lambda x, sigma: f(x), s, normal((20_000, dim), 2), torch.Generator().manual_seed(3), "sum")
    ratio, kl, without_dt = 0, 0, 0
    with torch.no_grad():
        for n, i in enumerate(s.steps):
            other = s.mean(t.x[i], g(t.x[i]), i)
            ratio = ratio + t.log_prob[n] - gaussian_log_prob(t.x[i + 1], other, s.std[i], "sum")
            step = gaussian_kl(t.mean[n], other, s.std[i], "sum")
            kl, without_dt = kl + step, without_dt + step * s.dt[i]
    assert z_score(ratio - kl, 0) < Z
    assert z_score(ratio - 2 * kl, 0) > Z
    assert z_score(ratio - without_dt, 0) > Z
