"""P02: the path's entropy, and who pays for the image's."""

import math

import pytest
import sympy
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.distributions import Normal

from ref.entropy import knn_entropy, path_entropy, policy_entropy
from ref.policy import gaussian_log_prob, rollout, sde_step
from ref.schedule import FlowSchedule, time_grid
from ref.worlds.mixture import GaussianMixture, MixtureFlow

from .tools import GRIDS, Z, gaussian_entropy, mlp, normal, z_score


def linear_path(schedule, weights):
    """Covariance of the free path states of the policy with v_i(x) = W_i x, and the index of each state.

    Written from the definition of the kernel only: x_{i+1} = (a_i + b_i W_i) x_i + s_i eps_i, where a_i, b_i are
    read off schedule.mean. Deterministic steps add no coordinate. Also returns the map of the image x_N.
    """
    d, S = weights[0].shape[0], len(schedule.steps)
    one, zero = torch.ones(1, 1, dtype=torch.float64), torch.zeros(1, 1, dtype=torch.float64)
    x = torch.cat([torch.eye(d, dtype=torch.float64), torch.zeros(d, d * S, dtype=torch.float64)], 1)
    rows, s = [x], 0
    for i, W in enumerate(weights):
        a, b = schedule.mean(one, zero, i), schedule.mean(zero, one, i)
        x = (a * torch.eye(d, dtype=torch.float64) + b * W) @ x
        if i in schedule.steps:
            x = x.clone()
            x[:, d * (s + 1) : d * (s + 2)] += schedule.std[i] * torch.eye(d, dtype=torch.float64)
            s += 1
            rows.append(x)
    return torch.cat(rows), x


@pytest.mark.claim("P02")
def test_p02_sympy_chain_rule():
    """Joint covariance of (x_0, x_1, x_2) for a linear 1-D policy: its determinant is s_0^2 s_1^2, free of theta."""
    k0, k1 = sympy.symbols("k0 k1", real=True)
    s0, s1 = sympy.symbols("s0 s1", positive=True)
    L = sympy.Matrix([[1, 0, 0], [k0, s0, 0], [k1 * k0, k1 * s0, s1]])
    joint = L * L.T
    assert sympy.simplify(joint.det() - s0**2 * s1**2) == 0
    marginal = joint[2, 2]
    given_image = joint.det() / marginal  # determinant of the conditional covariance (Schur)
    schur = joint[:2, :2] - joint[:2, 2] * joint[2, :2] / joint[2, 2]
    assert sympy.simplify(schur.det() - given_image) == 0
    assert sympy.diff(marginal, k1) != 0


@pytest.mark.claim("P02")
@settings(max_examples=25, deadline=None)
@given(GRIDS, st.integers(1, 4), st.integers(0, 2**31), st.floats(0.1, 1.0))
def test_p02_path_entropy_against_the_joint_covariance(schedule, dim, seed, scale):
    """log det of the joint covariance of a random linear policy = path_entropy; marginal + conditional = the same."""
    weights = [scale * normal((dim, dim), seed + i) / dim**0.5 for i in range(len(schedule))]
    path, image = linear_path(schedule, weights)
    # The path map is block triangular; singular values of L rather than of L L' keep the digits.
    joint = torch.linalg.slogdet(path)[1] + 0.5 * len(path) * math.log(2 * math.pi * math.e)
    expected = path_entropy(schedule, dim)
    assert abs(joint - expected) < 1e-12 * (1 + len(path) * 40)

    last = path[-dim:]  # x_{N-1}, the last noisy state
    marginal = gaussian_entropy(last @ last.T)
    # H(x_0 .. x_{N-2} | x_{N-1}): project the noise onto the complement of the last state's rows
    Q = torch.linalg.qr(last.T, mode="complete")[0][:, dim:]
    conditional = 0.5 * torch.logdet(2 * math.pi * math.e * (path[:-dim] @ Q) @ (path[:-dim] @ Q).T)
    assert abs(marginal + conditional - expected) < 1e-6 * (1 + abs(expected))  # conditioning costs digits

    if len(schedule) - 1 not in schedule.steps:  # the image: one deterministic step more, entropy + log |det F'|
        F = torch.linalg.lstsq(last.T, image.T).solution.T
        assert abs(gaussian_entropy(image @ image.T) - marginal - torch.linalg.slogdet(F)[1]) < 1e-6 * (
            1 + abs(marginal)
        )


@pytest.mark.claim("P02")
def test_p02_a_window_keeps_the_decomposition():
    """Deterministic steps anywhere: the free coordinates are x_0 and the outcomes of the stochastic steps."""
    s = FlowSchedule(time_grid(6, dtype=torch.float64), "flow_sde", 0.7, sde_window=(2, 2))
    weights = [normal((2, 2), i) for i in range(6)]
    path, _ = linear_path(s, weights)
    joint = torch.linalg.slogdet(path)[1] + 0.5 * len(path) * math.log(2 * math.pi * math.e)
    assert len(path) == 2 * (1 + 2) and abs(joint - path_entropy(s, 2)) < 1e-12
    assert torch.isinf(policy_entropy(s, 2)[[0, 1, 4, 5]]).all()


def chain_entropies(schedule, velocity, half_width=7.0, n=1401):
    """1-D Markov chain by quadrature: marginal entropy H(x_i) of the noisy states and H(x_i | x_{i+1})."""
    x = torch.linspace(-half_width, half_width, n, dtype=torch.float64)
    h = x[1] - x[0]
    p = (-0.5 * x.square()).exp() / math.sqrt(2 * math.pi)
    marginals, reverse = [-(h * torch.xlogy(p, p)).sum().item()], []
    for i in schedule.steps:
        mean = schedule.mean(x[:, None], velocity(x[:, None], schedule.sigmas[i]), i)[:, 0]
        kernel = Normal(mean[:, None], schedule.std[i]).log_prob(x[None, :]).exp()
        joint = p[:, None] * kernel
        p = (h * joint).sum(0)
        posterior = joint / p.clamp_min(1e-300)
        reverse.append(-(h * h * torch.xlogy(joint, posterior)).sum().item())
        marginals.append(-(h * torch.xlogy(p, p)).sum().item())
    return marginals, reverse


@pytest.mark.claim("P02")
@pytest.mark.parametrize("scale", [0.0, 0.5, 1.0])
def test_p02_nonlinear_policies_by_quadrature(scale):
    """A 1-D mixture policy with a random network on top: what H(x_{N-1}) loses, H(path | x_{N-1}) gains."""
    mixture = GaussianMixture(torch.tensor([[-1.5], [1.5]], dtype=torch.float64), 0.3)
    net = mlp(1, 4)
    s = FlowSchedule(time_grid(4, dtype=torch.float64), "flow_sde", 0.9)
    marginals, reverse = chain_entropies(s, lambda x, sigma: mixture.velocity(x, sigma) + scale * net(x).tanh())
    total = path_entropy(s, 1).item()
    assert abs(marginals[-1] + sum(reverse) - total) < 1e-8
    assert abs(marginals[-1] + sum(reverse[:-1]) - total) > 0.05  # planted: one step of the path forgotten
    assert marginals[-1] > policy_entropy(s, 1)[s.steps[-1]] + 0.01  # I(path; z) = H(z) - H_last > 0: the floor
    if scale:
        base, _ = chain_entropies(s, mixture.velocity)
        assert abs(base[-1] - marginals[-1]) > 0.01  # the marginal did move


@pytest.mark.claim("P02")
def test_p02_the_deterministic_last_step_pays_with_its_jacobian():
    """H(x_N) = H(x_{N-1}) + E log |F'| for the exact flow's last Euler step, whose F' > 0, by quadrature."""
    mixture = GaussianMixture(torch.tensor([[-1.5], [1.5]], dtype=torch.float64), 0.5)
    x = torch.linspace(-8, 8, 40001, dtype=torch.float64)[:, None].requires_grad_()
    sigma = 0.25
    p = mixture.log_prob(x, sigma).exp()
    y = x - sigma * mixture.velocity(x, sigma)
    slope = torch.autograd.grad(y.sum(), x)[0][:, 0]
    assert (slope > 0).all()
    h = (x[1] - x[0]).item()
    before = -(h * torch.xlogy(p, p)).sum()
    q = p / slope  # density of y on the (uneven) grid y
    after = -torch.trapezoid(torch.xlogy(q, q), y[:, 0])
    assert abs(after - before - (h * p * slope.log()).sum()) < 1e-6
    assert abs(after - before) > 1e-2  # forgetting the term is an error 10^4 times the tolerance (0.046 nats)
    # at sigma = 1 the map is not one to one: all noise goes to the data's mean (sums of M = 2 terms below 10)
    skew = GaussianMixture(mixture.means, 0.5, torch.tensor([0.2, 0.8], dtype=torch.float64))
    image = (x - skew.velocity(x, 1.0)).detach()
    assert (image - (0.2 * -1.5 + 0.8 * 1.5)).abs().max() < 10 * 8 * torch.finfo(torch.float64).eps


@pytest.mark.claim("P02")
def test_p02_knn_sees_the_path_entropy():
    """Kozachenko-Leonenko on sampled paths (x_0, x_1, x_2) of two random policies, 2000 paths a batch.

    100 independent batches; rejects beyond 5.5 standard errors (estimated from the batches: Student's t with 99
    degrees of freedom, 3e-7) plus 0.05 for the estimator's bias; two comparisons, < 6e-7. A path entropy without
    the last noisy step's term is further off than that.
    """
    s = FlowSchedule(time_grid(3, dtype=torch.float64), "flow_sde", 0.9)
    total = path_entropy(s, 1).item()
    for seed in (0, 1):
        net = mlp(1, seed, 0.5)
        noise = normal((100 * 2000, 1), seed + 10)
        t = rollout(lambda x, sigma: net(x), s, noise, torch.Generator().manual_seed(seed))
        paths = t.x[:3, :, 0].T.reshape(100, 2000, 3)
        estimates = torch.stack([knn_entropy(p) for p in paths])
        error = estimates.std() / 100**0.5 * Z + 0.05
        assert abs(estimates.mean() - total) < error
        assert abs(estimates.mean() - (total - policy_entropy(s, 1)[1])) > error


@pytest.mark.claim("P02")
def test_p02_the_flow_model_obeys_it_through_the_library():
    """MixtureFlow, sde_step and Trajectory: -sum log p along sampled paths averages to path_entropy. < 1e-7."""
    flow = MixtureFlow(GaussianMixture(torch.tensor([[-1.0, 0.0], [1.0, 0.5]], dtype=torch.float64), 0.3))
    s = FlowSchedule(time_grid(5, dtype=torch.float64), "cps", 0.6)
    noise = normal((40_000, 2), 0)
    t = rollout(flow.velocity, s, noise, torch.Generator().manual_seed(0), "sum")
    surprise = -t.log_prob.sum(0) - gaussian_log_prob(noise, torch.zeros_like(noise), 1.0, "sum")
    assert z_score(surprise, path_entropy(s, 2).item()) < Z
    assert z_score(surprise, path_entropy(s, 1).item()) > Z
    x, mean = sde_step(s, noise, flow.velocity(noise, s.sigmas[4]), 4)
    assert torch.equal(x, mean)
