"""P06: how modes compete."""

import numpy as np
import pytest
import sympy
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.integrate import solve_ivp

from ref.policy import rollout
from ref.worlds import two_modes
from ref.worlds.mixture import MixtureFlow, critical_lambda, effective_modes, fixed_point, replicator, ring

from .tools import Z, normal, z_score

simplex = st.integers(2, 6).flatmap(
    lambda M: st.tuples(
        st.lists(st.floats(-2, 2), min_size=M, max_size=M), st.lists(st.floats(-1, 1), min_size=M, max_size=M)
    )
)


@pytest.mark.claim("P06")
def test_p06_sympy_replicator():
    """p0 exp(tau R)/Z solves the replicator equation; dE/dtau = Var, dH/dtau = -Cov(log p, R), three modes."""
    tau = sympy.symbols("tau", real=True)
    R, w = sympy.symbols("R0:3", real=True), sympy.symbols("w0:3", positive=True)
    un = [a * sympy.exp(tau * r) for a, r in zip(w, R)]
    p = [u / sum(un) for u in un]
    E = sum(a * r for a, r in zip(p, R))
    for a, r in zip(p, R):
        assert sympy.simplify(sympy.diff(a, tau) - a * (r - E)) == 0
    assert sympy.simplify(sympy.diff(E, tau) - (sum(a * r**2 for a, r in zip(p, R)) - E**2)) == 0
    H = -sum(a * sympy.log(a) for a in p)
    cov = sum(a * sympy.log(a) * (r - E) for a, r in zip(p, R))
    point = dict(zip((*R, *w, tau), (0.3, -0.2, 0.9, 0.5, 0.2, 0.3, 0.7)))
    assert abs((sympy.diff(H, tau) + cov).subs(point).evalf(30)) < 1e-12


@pytest.mark.claim("P06")
@settings(max_examples=20, deadline=None)
@given(simplex, st.floats(0.0, 5.0))
def test_p06_replicator_against_an_ode_solver(case, tau):
    """The closed form against SciPy's DOP853 on dp = p (R - E), to 1e-9; softmax-policy gradient is another flow."""
    logits, R = (torch.tensor(v, dtype=torch.float64) for v in case)
    p0 = logits.softmax(0)
    rhs = lambda _, p: p * (R.numpy() - (p * R.numpy()).sum())  # noqa: E731
    oracle = solve_ivp(rhs, (0, tau), p0.numpy(), method="DOP853", rtol=1e-12, atol=1e-14).y[:, -1]
    assert (replicator(p0, R, tau) - torch.from_numpy(oracle)).abs().max() < 1e-9


@pytest.mark.claim("P06")
@settings(max_examples=20, deadline=None)
@given(simplex, st.floats(0.0, 3.0))
def test_p06_rates_and_the_constraint_form(case, tau):
    """Derivatives by autograd to 1e-12, and p_tau maximises E[R] - KL(p || p0)/tau against random rivals."""
    logits, R = (torch.tensor(v, dtype=torch.float64) for v in case)
    p0 = logits.softmax(0)
    t = torch.tensor(tau, dtype=torch.float64, requires_grad=True)
    p = replicator(p0, R, t)
    mean, entropy = (p * R).sum(), effective_modes(p).log()
    d_mean, d_entropy = (torch.autograd.grad(f, t, retain_graph=True)[0] for f in (mean, entropy))
    assert abs(d_mean - (p * (R - mean) ** 2).sum()) < 1e-12
    assert abs(d_entropy + (p * p.log() * (R - mean)).sum()) < 1e-12
    if tau > 0.1:

        def objective(q):
            return (q * R).sum() - (q * (q / p0).log()).sum() / tau

        rivals = [(p.log() + 0.1 * normal(p.shape, k)).softmax(0) for k in range(5)]
        assert all(objective(p) >= objective(q) - 1e-12 for q in rivals)


@pytest.mark.claim("P06")
def test_p06_natural_gradient_is_the_replicator_and_the_plain_one_is_not():
    """One small step of theta along F^-1 grad E[R] moves softmax(theta) by p (R - E); the plain gradient does not."""
    theta, R = normal((4,), 0).requires_grad_(), normal((4,), 1)
    p = theta.softmax(0)
    gradient = torch.autograd.grad((p * R).sum(), theta)[0]
    p = p.detach()
    fisher = p.diag() - torch.outer(p, p)
    jacobian = fisher  # d softmax / d theta
    flow = p * (R - p @ R)
    assert torch.allclose(jacobian @ torch.linalg.pinv(fisher) @ gradient, flow, rtol=0, atol=1e-12)
    plain = jacobian @ gradient
    assert (plain / plain.norm() - flow / flow.norm()).norm() > 0.1


@pytest.mark.claim("P06")
def test_p06_entropy_need_not_fall_at_first():
    """H rises while Cov(log p, R) < 0: where the reward favours a rare mode, diversity comes before collapse."""
    p0, R = torch.tensor([0.95, 0.05], dtype=torch.float64), torch.tensor([0.0, 1.0], dtype=torch.float64)
    H = effective_modes(replicator(p0, R, torch.linspace(0, 12, 200, dtype=torch.float64)))
    assert H.argmax() not in (0, 199) and abs(H.max() - 2) < 1e-3 and H[-1] < 1.01
    flat = replicator(p0, torch.zeros(2, dtype=torch.float64), 50.0)
    assert torch.allclose(flat, p0)  # a flat reward moves nothing


@pytest.mark.claim("P06")
def test_p06_monte_carlo_resampling():
    """Weights exp(tau R) on samples of p0 (self-normalised) reproduce p_tau; wrong sign is rejected. < 3e-7.

    8 modes; the delta-method standard error of a self-normalised ratio is used, so 8 comparisons.
    """
    n, world, tau = 100_000, ring(8), 1.5
    R = torch.linspace(0, 1, 8, dtype=torch.float64)
    mode = world.mode(world.sample(n, torch.Generator().manual_seed(0)))
    w = (tau * R[mode]).exp()
    for sign, ok in ((1, True), (-1, False)):
        p = replicator(torch.full((8,), 1 / 8, dtype=torch.float64), R, sign * tau)
        z = [z_score(w * ((mode == m).double() - p[m]), 0) for m in range(8)]
        assert (max(z) < Z) == ok


@pytest.mark.claim("P06")
def test_p06_the_base_model_of_the_toy_is_exact_and_starts_at_zero():
    """MixtureFlow before training is the mixture's velocity bit for bit, has gradients, and can be switched off."""
    world = ring(5)
    flow = MixtureFlow(world)
    x = torch.randn(7, 2, generator=torch.Generator().manual_seed(0))
    assert torch.equal(flow.velocity(x, 0.4), world.velocity(x, 0.4))
    torch.nn.init.normal_(flow.residual[-1].weight)
    assert not torch.equal(flow.velocity(x, 0.4), world.velocity(x, 0.4))
    with flow.reference():
        assert torch.equal(flow.velocity(x, 0.4), world.velocity(x, 0.4))
    samples = rollout(world.velocity, flow.schedule(100).ode(), torch.randn(4000, 2, generator=torch.Generator())).x[-1]
    assert (world.occupancy(samples) - 0.2).abs().max() < 5.5 * (0.2 * 0.8 / 4000) ** 0.5
    assert critical_lambda(0.6, 2.0, 1.0) == pytest.approx(0.3)
    assert fixed_point(0.3, 0.6, 2.0, 1.0) == 1.0 and fixed_point(0.6, 0.6, 2.0, 1.0) == pytest.approx(0.75)


@pytest.mark.claim("P06")
def test_p06_the_last_minority_dies_in_finite_time_with_the_population_s_spread_only():
    """Std-normalised two modes, no bonus (two_modes.drift, weight 0): for K -> inf dp/dt = -sqrt(p (1 - p)), which is
    0 at 2 arcsin sqrt(p_0); at finite K the rate lies between (K-1)/sqrt K p (1-p)^(K-1) and (K-1)/sqrt K p (1-p).

    The 1e-4 beside the std s_j >= delta sqrt((K-1)/K) / sqrt K lowers the rate by at most the share 1e-4 / s_j.
    """
    gap = 0.5
    for K in (3, 4, 16, 64):
        share = 1e-4 / (gap * ((K - 1) / K) ** 0.5 / K**0.5)
        for p in (0.5, 0.1, 1e-2, 1e-4, 1e-8):
            rate = two_modes.drift(1 - p, 0.0, gap, 1.0, 1.0, K)
            most = (K - 1) / K**0.5 * p * (1 - p)
            assert (1 - share) * most * (1 - p) ** (K - 2) * (1 - 1e-9) <= rate <= most * (1 + 1e-9)  # 1 - p rounds
    # K = 4000: Jensen's gap of sqrt(q (1 - q)) is 1 / (8 K p (1 - p)) of it to leading order, 1/2K is sqrt((K-1)/K)'s
    # part, and the 1e-4 has the share 1e-4 / (gap sqrt(p (1 - p))): twice their sum bounds the difference
    K = 4000
    for p in (0.5, 0.2, 0.05):
        rate, limit = two_modes.drift(1 - p, 0.0, gap, 1.0, 1.0, K), (p * (1 - p)) ** 0.5
        small = 1 / (8 * K * p * (1 - p)) + 1 / (2 * K) + 1e-4 / (gap * limit)
        assert 0 < 1 - rate / limit < 2 * small
    # that flow is over at 2 arcsin sqrt(p_0), in SciPy's integration, where the plain flow has lost almost nothing
    p0 = 0.3
    end = lambda _, p: p[0] - 1e-12  # noqa: E731
    end.terminal = True
    flow = lambda _, p: -((p.clip(0) * (1 - p)) ** 0.5)  # noqa: E731
    time = solve_ivp(flow, (0, 10), [p0], events=end, rtol=1e-10, atol=1e-14).t_events[0][0]
    assert abs(time - 2 * np.arcsin(p0**0.5)) < 1e-5  # 2 sqrt(1e-12) = 2e-6 is left when it stops
    plain = replicator(torch.tensor([p0, 1 - p0], dtype=torch.float64), torch.tensor([0.0, gap]), time)[0]
    assert plain > 0.1
