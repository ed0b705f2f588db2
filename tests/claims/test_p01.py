"""P01: the entropy of a step holds no theta."""

import math

import pytest
import sympy
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.distributions import Independent, Normal

from ref.entropy import log_normalizer, policy_entropy
from ref.policy import gaussian_log_prob, rollout
from ref.schedule import KINDS, FlowSchedule, time_grid

from .tools import GRIDS, Z, mlp, normal, z_score


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
    """-log p along a rollout averages to policy_entropy, 2 kinds of planted error do not. 4 comparisons, < 2e-7."""
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
