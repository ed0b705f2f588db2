"""P01, P02, P03 and P13: what entropy the policy has, who pays for the marginal's, and where that ends.

False-failure rates: every Monte-Carlo comparison rejects beyond 5.5 standard errors, 4e-8 each; the
largest number of comparisons in one test is 8, so every test stays below 1e-6. Seeds are fixed.
"""

import math

import numpy as np
import pytest
import sympy
import torch
from claims import Z, mlp, normal, z_score
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.distributions import Independent, MultivariateNormal, Normal

from ref.entropy import knn_entropy, log_normalizer, path_entropy, policy_entropy
from ref.worlds.mixture import GaussianMixture, MixtureFlow
from ref.policy import gaussian_log_prob, rollout, sde_step
from ref.schedule import KINDS, FlowSchedule, time_grid

GRIDS = st.builds(
    lambda steps, kind, eta, shift: FlowSchedule(time_grid(steps, shift, torch.float64), kind, eta),
    st.integers(2, 12),
    st.sampled_from(KINDS),
    st.floats(0.05, 0.95),
    st.floats(0.5, 4.0),
)


def steps_of(schedule):
    return list(schedule.steps)


# ---------------------------------------------------------------- P01


@pytest.mark.claim("P01")
def test_p01_sympy_entropy_of_a_gaussian_step():
    """-integral p log p, done by SymPy for one coordinate, is 1/2 - C with C = -log(2 pi s^2)/2: no mean in it."""
    x, mu = sympy.symbols("x mu", real=True)
    s = sympy.symbols("s", positive=True)
    p = sympy.exp(-((x - mu) ** 2) / (2 * s**2)) / sympy.sqrt(2 * sympy.pi * s**2)
    log_p = -((x - mu) ** 2) / (2 * s**2) - sympy.log(2 * sympy.pi * s**2) / 2
    entropy = sympy.simplify(-sympy.integrate(p * log_p, (x, -sympy.oo, sympy.oo)))
    C = -sympy.log(2 * sympy.pi * s**2) / 2
    assert sympy.simplify(sympy.expand_log(entropy - (sympy.Rational(1, 2) - C), force=True)) == 0
    assert sympy.diff(entropy, mu) == 0


@pytest.mark.claim("P01")
@settings(max_examples=25, deadline=None)
@given(GRIDS, st.integers(1, 9), st.integers(0, 2**31))
def test_p01_entropy_is_the_same_for_every_network_and_state(schedule, dim, seed):
    """torch.distributions builds the kernel from the network's own mean; its entropy is d/2 - C_i to 1e-12."""
    i = schedule.steps[seed % len(schedule.steps)]
    x = normal((3, dim), seed)
    means = [schedule.mean(x, mlp(dim, s, scale)(x), i) for s, scale in ((seed, 0.1), (seed + 1, 3.0))]
    assert (means[0] - means[1]).abs().max() > 1e-6
    expected = policy_entropy(schedule, dim)[i]
    assert torch.isclose(expected, dim / 2 - log_normalizer(schedule, dim)[i], rtol=0, atol=1e-12)
    for mean in means:
        kernel = Independent(Normal(mean, schedule.std[i]), 1)
        assert (kernel.entropy() - expected).abs().max() < 1e-12 * max(1, dim * abs(math.log(schedule.std[i])))


@pytest.mark.claim("P01")
def test_p01_entropy_by_quadrature():
    """-integral p log p by SciPy over gaussian_log_prob's own density, one dimension, every kind."""
    from scipy.integrate import quad

    for kind in KINDS:
        s = FlowSchedule(time_grid(5, dtype=torch.float64), kind, 0.6)
        for i in s.steps:
            mean, std = torch.tensor([[0.7]], dtype=torch.float64), s.std[i]

            def integrand(x, mean=mean, std=std):
                log_p = gaussian_log_prob(torch.tensor([[x]], dtype=torch.float64), mean, std, "sum").item()
                return -math.exp(log_p) * log_p

            lo, hi = 0.7 - 12 * std.item(), 0.7 + 12 * std.item()
            entropy, _ = quad(integrand, lo, hi, epsabs=1e-13, epsrel=1e-13, limit=200)
            assert abs(entropy - policy_entropy(s, 1)[i].item()) < 1e-12


def tiny_sd3(seed):
    from diffusers import SD3Transformer2DModel

    torch.manual_seed(seed)
    net = SD3Transformer2DModel(
        sample_size=4, patch_size=2, in_channels=4, out_channels=4, num_layers=1, attention_head_dim=8,
        num_attention_heads=2, joint_attention_dim=8, caption_projection_dim=16, pooled_projection_dim=8,
        pos_embed_max_size=2,
    )  # fmt: skip
    cond = dict(encoder_hidden_states=torch.randn(2, 3, 8), pooled_projections=torch.randn(2, 8))
    return net, (2, 4, 4, 4), lambda x, sigma: net(x, timestep=torch.full((2,), 1000.0 * sigma), **cond).sample


def tiny_flux(seed):
    from diffusers import FluxTransformer2DModel

    torch.manual_seed(seed)
    net = FluxTransformer2DModel(
        patch_size=1, in_channels=4, num_layers=1, num_single_layers=1, attention_head_dim=8, num_attention_heads=2,
        joint_attention_dim=8, pooled_projection_dim=8, axes_dims_rope=(2, 2, 4), guidance_embeds=False,
    )  # fmt: skip
    cond = dict(
        encoder_hidden_states=torch.randn(2, 3, 8), pooled_projections=torch.randn(2, 8),
        txt_ids=torch.zeros(3, 3), img_ids=torch.cartesian_prod(*map(torch.arange, (1, 2, 2))).float(),
    )  # fmt: skip
    return net, (2, 4, 4), lambda x, sigma: net(x, timestep=torch.full((2,), sigma), **cond).sample


def tiny_mlp(seed):
    net = mlp(6, seed).float()
    return net, (2, 6), lambda x, sigma: net(x)


@pytest.mark.claim("P01")
@pytest.mark.parametrize("build", [tiny_mlp, tiny_sd3, tiny_flux], ids=["mlp", "sd3", "flux"])
def test_p01_gradient_is_exactly_zero_on_real_networks(build):
    """The sampled entropy -log p(mu + s eps; mu, s) is differentiated through samples and mean, as training would.

    The gradient is 0 in every bit, although the mean moves with theta; and the value does not depend on theta or
    x. Two planted wrong variants must show a gradient: samples held fixed, and a std that a network sets (P13).
    """
    s = FlowSchedule(time_grid(4), "flow_sde", 0.7)
    values = []
    for seed in (0, 1):
        net, shape, velocity = build(seed)
        with torch.no_grad():
            for p in net.parameters():
                p.add_(0.2 * torch.randn(p.shape))
        x, eps = torch.randn(shape), torch.randn(shape, generator=torch.Generator().manual_seed(5))
        mean = s.mean(x, velocity(x, s.sigmas[2].item()), 2)
        sampled = mean + s.std[2] * eps
        entropy = -gaussian_log_prob(sampled, mean, s.std[2], "sum").mean()
        weights = [p for p in net.parameters()]
        grads = torch.autograd.grad(entropy, weights, retain_graph=True, allow_unused=True)
        assert all(g is None or torch.count_nonzero(g) == 0 for g in grads)
        exact = Normal(mean, s.std[2]).entropy()
        assert not exact.requires_grad  # no path leads from theta to the closed form at all
        assert torch.allclose(exact.flatten(1).sum(1).double(), policy_entropy(s, mean[0].numel())[2], atol=1e-3)
        values.append(entropy.item())

        moved = torch.autograd.grad(mean.square().sum(), weights, retain_graph=True, allow_unused=True)
        assert sum(g.abs().sum() for g in moved if g is not None) > 0
        fixed = -gaussian_log_prob(sampled.detach(), mean, s.std[2], "sum").mean()
        wrong = torch.autograd.grad(fixed, weights, retain_graph=True, allow_unused=True)
        assert sum(g.abs().sum() for g in wrong if g is not None) > 0
        learned = s.std[2] * (0.1 * mean.mean()).exp()
        wrong = torch.autograd.grad(
            -gaussian_log_prob(mean + learned * eps, mean, learned, "sum").mean(), weights, allow_unused=True
        )
        assert sum(g.abs().sum() for g in wrong if g is not None) > 0
    assert abs(values[0] - values[1]) < 1e-3 * max(1, abs(values[0]))  # same eps: another theta and x, one value


@pytest.mark.claim("P01")
@pytest.mark.parametrize("kind", KINDS)
def test_p01_monte_carlo(kind):
    """-log p along a rollout averages to policy_entropy, 2 kinds of planted error do not. 8 comparisons, < 4e-7."""
    dim, s = 3, FlowSchedule(time_grid(5, dtype=torch.float64), kind, 0.7)
    net = mlp(dim, 3)
    t = rollout(lambda x, sigma: net(x), s, normal((20000, dim), 1), torch.Generator().manual_seed(2), "sum")
    H = policy_entropy(s, dim)
    for row, i in zip(-t.log_prob, s.steps):
        assert z_score(row, H[i].item()) < Z
        no_normaliser = row - 0.5 * dim * math.log(2 * math.pi)  # DanceGRPO's log-density
        assert z_score(no_normaliser, H[i].item()) > Z
        if kind != "cps":
            no_dt = H[i] - 0.5 * dim * s.dt[i].log()  # entropy of N(mu, g^2 I)
            assert z_score(row, no_dt.item()) > Z


# ---------------------------------------------------------------- P02


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


def gaussian_entropy(covariance):
    return 0.5 * torch.logdet(2 * math.pi * math.e * covariance)


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


@pytest.mark.claim("P02")
def test_p02_knn_sees_the_path_entropy():
    """Kozachenko-Leonenko on sampled paths (x_0, x_1, x_2) of two random policies, 2000 repeated subsets apart.

    40 independent batches; rejects beyond 5.5 standard errors plus the estimator's bias bound 0.05: < 1e-7.
    A path entropy without the 1/2 or without one step's term is further off than that.
    """
    s = FlowSchedule(time_grid(3, dtype=torch.float64), "flow_sde", 0.9)
    total = path_entropy(s, 1).item()
    for seed in (0, 1):
        net = mlp(1, seed, 0.5)
        noise = normal((40 * 2000, 1), seed + 10)
        t = rollout(lambda x, sigma: net(x), s, noise, torch.Generator().manual_seed(seed))
        paths = t.x[:3, :, 0].T.reshape(40, 2000, 3)
        estimates = torch.stack([knn_entropy(p) for p in paths])
        error = estimates.std() / 40**0.5 * Z + 0.05
        assert abs(estimates.mean() - total) < error
        assert abs(estimates.mean() - (total - policy_entropy(s, 1)[1])) > error


# ---------------------------------------------------------------- P03


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


# ---------------------------------------------------------------- P13


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
