"""Every method: its gradient against autograd of the definition, its limit at dial 0, its selection."""

import dataclasses
import itertools

import pytest
import torch
from torch.distributions import MultivariateNormal, kl_divergence

from ref.entropy import gaussian_kl
from ref.grpo import train
from ref.methods import METHODS, SPACES, Group, Step, covariance
from ref.metrics import feature_variance
from ref.policy import gaussian_log_prob
from ref.scale.weights import trainable
from ref.settings import Settings
from ref.worlds.mixture import MixtureFlow, ring, tilted

CLIP = 0.05
WITH_SPACE = [name for name, method in METHODS.items() if method.default_space]


def a_group(seed=0, G=3, K=6, S=4, D=5):
    rng = torch.Generator().manual_seed(seed)
    draw = lambda *shape: torch.randn(shape, generator=rng, dtype=torch.float64)  # noqa: E731
    return Group(draw(G, K), draw(G, K, D), 0.7, draw(G, K, S), 1 + 0.3 * draw(S), torch.Generator().manual_seed(seed))


def a_step(theta, seed=0, B=8, d=3):
    """A micro-batch whose policy mean is theta + const, a little off the sampling policy."""
    rng = torch.Generator().manual_seed(seed)
    draw = lambda *shape: torch.randn(shape, generator=rng, dtype=torch.float64)  # noqa: E731
    std, old_mean = torch.tensor(0.5, dtype=torch.float64), draw(B, d)
    mean, x = old_mean + theta, old_mean + 0.5 * draw(B, d)
    log_prob = lambda m: MultivariateNormal(m, std**2 * torch.eye(d, dtype=m.dtype)).log_prob(x) / d  # noqa: E731
    pair = (draw(B) > 0).double()
    return Step(log_prob(mean), log_prob(old_mean), draw(B), pair, mean, old_mean, draw(B, d), std)


def gradient(loss, at=(0.02, -0.01, 0.03)):
    theta = torch.tensor(at, dtype=torch.float64, requires_grad=True)
    return torch.autograd.grad(loss(theta), theta)[0]


def gaussian(mean, std):
    return MultivariateNormal(mean, std**2 * torch.eye(mean.shape[-1], dtype=mean.dtype))


def clipped(step, low=1 - CLIP, high=1 + CLIP):
    """The PPO objective, pair by pair, by cases: no gradient once the ratio has gone far enough the advantage's way."""
    ratio = (step.log_prob - step.old_log_prob).exp()
    return torch.stack(
        [-a * (high if a > 0 and r > high else low if a < 0 and r < low else r) for r, a in zip(ratio, step.advantage)]
    )


def definition(name, step, weight):
    """The losses as their sources write them, with torch.distributions in place of our own formulas."""
    d, ratio = step.mean.shape[1], (step.log_prob - step.old_log_prob).exp()
    to = lambda other: kl_divergence(gaussian(step.mean, step.std), gaussian(other, step.std)) / d  # noqa: E731
    ppo = clipped(step)
    return {
        "flow_grpo": lambda: ppo.mean(),
        "pec": lambda: ppo.mean(),
        "pcvae": lambda: ppo.mean(),
        "flow_grpo_kl": lambda: (ppo + weight * to(step.reference_mean)).mean(),
        "clip_higher": lambda: clipped(step, high=1 + (1 + weight) * CLIP).mean(),
        "entropy_reg": lambda: (ppo - weight * ratio * step.pair).mean(),
        "clip_cov": lambda: ppo[step.pair == 1].sum() / len(ppo),
        "kl_cov": lambda: ppo.mean() + weight * to(step.old_mean)[step.pair == 1].sum() / len(ppo),
        "naive_kl": lambda: ppo.mean() - weight * step.log_prob.mean(),
        "gardo": lambda: (ppo * step.pair).mean(),
    }[name]()


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("at", [(0.02, -0.01, 0.03), (0.6, -0.5, 0.4)], ids=["near", "clipped"])
def test_gradient_is_that_of_the_definition(name, at):
    method = METHODS[name](0.4 if METHODS[name].largest_weight else None, clip=CLIP)
    ours = gradient(lambda theta: method.loss(a_step(theta)), at)
    torch.testing.assert_close(
        ours, gradient(lambda theta: definition(name, a_step(theta), 0.4), at), rtol=1e-12, atol=0
    )
    if name not in ("flow_grpo", "pec", "pcvae"):
        step = a_step(torch.tensor(at, dtype=torch.float64))
        others = gradient(lambda theta: METHODS["flow_grpo"](clip=CLIP).loss(a_step(theta)), at)
        differs = (ours - others).abs().max() > 1e-6
        room = ((step.ratio > 1 + CLIP) & (step.ratio < 1 + 1.4 * CLIP) & (step.advantage > 0)).any()
        assert differs or (name == "clip_higher" and not room)


def test_clip_higher_leaves_room_upwards_only():
    method = METHODS["clip_higher"](0.4, clip=0.1)
    one = torch.ones(1, dtype=torch.float64)

    def slope(ratio, advantage):
        log_prob = torch.tensor([ratio], dtype=torch.float64).log().requires_grad_()
        step = Step(log_prob, 0 * one, advantage * one, one, one, one, None, one[0])
        return torch.autograd.grad(method.loss(step), log_prob)[0].item()

    assert slope(1.12, 1) != 0 and slope(1.15, 1) == 0  # up to 1 + 1.4 eps
    assert slope(0.92, -1) != 0 and slope(0.88, -1) == 0  # down to 1 - eps
    assert METHODS["flow_grpo"](clip=0.1).high < 1.12


@pytest.mark.parametrize("name, space", [(n, s) for n in METHODS for s in (SPACES if n in WITH_SPACE else [None])])
def test_dial_zero_is_flow_grpo_to_the_bit(name, space):
    """Three iterations on the mixture: every trained weight has the same bits."""

    def weights(method):
        world = ring(4)
        model = MixtureFlow(world)
        settings = Settings(iterations=3, groups=2, group_size=6, lr=1e-2, clip=0.2, steps=4)
        encoder = torch.nn.functional.normalize
        for _ in train(model, [""] * 2, tilted(world, torch.linspace(0, 1, 4)), encoder, method, settings):
            pass
        return {k: v.detach().clone() for k, v in trainable(model).items()}

    plain = weights(METHODS["flow_grpo"](clip=0.2))
    dialled = weights(METHODS[name](0.0, clip=0.2, space=space))
    assert all(torch.equal(plain[k], dialled[k]) for k in plain)


def test_entropy_regularisation_follows_the_entropy_gradient():
    """The bonus's mean of b dlog p_theta/dtheta is dH_perc/dtheta in closed form.

    One latent, x ~ N(theta, s^2), feature phi = x^2: H_perc = Var(phi) / (2 h^2) + const, and with the
    large group's mean m as a constant, d Var / d theta = E[(phi - m)^2 (x - theta) / s^2].
    """
    theta, s, h = 0.7, 0.4, 0.9
    x = torch.linspace(theta - 8 * s, theta + 8 * s, 20001, dtype=torch.float64)
    p = torch.exp(-0.5 * ((x - theta) / s) ** 2)
    p = p / p.sum()
    phi = x.square()
    exact = (8 * theta * s**2) / (2 * h**2)  # Var(x^2) = 2 s^4 + 4 theta^2 s^2
    n = 400_000  # a group whose empirical law is p, by quantiles
    quantiles = torch.distributions.Normal(theta, s).icdf((torch.arange(n, dtype=torch.float64) + 0.5) / n)
    score = (quantiles - theta) / s**2
    group = Group(torch.zeros(1, n), quantiles.square()[None, :, None], h, score[None, :, None], torch.ones(1))
    bonus = METHODS["entropy_reg"](space="perceptual").select(group, torch.zeros(1, n, 1))[0, :, 0]
    assert (bonus * score).mean().item() == pytest.approx(exact, rel=1e-4)
    mean = (p * phi).sum()
    assert (p * (phi - mean) ** 2 * (x - theta) / s**2).sum().item() / (2 * h**2) == pytest.approx(exact, rel=1e-9)
    plain = METHODS["entropy_reg"](space="latent").select(group, torch.zeros(1, n, 1))[0, :, 0]
    assert abs((plain - bonus).abs().max().item()) > 0.1  # the space matters


@pytest.mark.parametrize("space", SPACES)
@pytest.mark.parametrize("weight", [0.0, 0.02, 0.1, 0.5, 1.0])
def test_clip_cov_drops_an_exact_fraction_of_high_covariance(space, weight):
    group = a_group(G=5, K=10, S=4)
    advantages = torch.randn(5, 10, 4, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    keep = METHODS["clip_cov"](weight, space=space).select(group, advantages)
    assert (keep == 0).sum() == round(weight * 200) and ((keep == 0) | (keep == 1)).all()
    value = covariance(group.log_prob(space), advantages).flatten()
    threshold = value.sort(descending=True).values[round(max(0.2, weight) * 200) - 1]
    assert (value[keep.flatten() == 0] >= threshold).all()


@pytest.mark.parametrize("space", SPACES)
def test_kl_cov_takes_the_top_fifth(space):
    group = a_group(G=5, K=10, S=4)
    advantages = torch.randn(5, 10, 4, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    chosen = METHODS["kl_cov"](space=space).select(group, advantages).flatten() == 1
    value = covariance(group.log_prob(space), advantages).flatten()
    assert chosen.sum() == 40 and value[chosen].min() >= value[~chosen].max()


def test_covariances_are_centred_per_step():
    """A step's own log-density scale, a constant added to all its pairs, cannot attract the selection."""
    group, advantages = a_group(), torch.randn(3, 6, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    shift = torch.tensor([100.0, -3.0, 0.0, 7.0], dtype=torch.float64)
    moved = dataclasses.replace(group, policy_log_prob=group.policy_log_prob + shift)
    chosen = METHODS["kl_cov"]().select(group, advantages)
    assert torch.equal(chosen, METHODS["kl_cov"]().select(moved, advantages + 5 * shift))
    value = covariance(group.policy_log_prob, advantages)
    covariances = [
        torch.cov(torch.stack([group.policy_log_prob[..., s].flatten(), advantages[..., s].flatten()]), correction=0)[
            0, 1
        ]
        for s in range(4)
    ]
    torch.testing.assert_close(value.mean((0, 1)), torch.stack(covariances))


def test_perceptual_twins_look_at_features():
    advantages = torch.randn(3, 6, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    for name in ("entropy_reg", "clip_cov", "kl_cov"):
        picks = [METHODS[name](0.1, space=space).select(a_group(), advantages) for space in SPACES]
        assert all(not torch.equal(p, q) for p, q in itertools.combinations(picks, 2))


@pytest.mark.parametrize("space", ["perceptual", "kernel"])
def test_pec_pays_for_being_unlike_the_group(space):
    group = a_group()
    group.features[:, 0] += 50  # the first sample of each group stands apart
    gain = METHODS["pec"](1.0, space=space).shape(group) - group.reward[..., None]
    assert (gain.argmax(1) == 0).all()
    assert feature_variance(group.features).min() > 100


def test_spaces_and_weights_out_of_range():
    with pytest.raises(ValueError, match="takes no space, got space 'latent'"):
        METHODS["flow_grpo"](space="latent")
    with pytest.raises(ValueError, match="latent or perceptual or kernel, got space 'pixels'"):
        METHODS["pec"](space="pixels")
    with pytest.raises(ValueError, match="from 0 to 1, got 1.5"):
        METHODS["clip_cov"](1.5)


def drawn_group(seed=0, G=2, K=5, S=3, D=4):
    g = torch.Generator().manual_seed(seed)
    draw = lambda *shape: torch.randn(*shape, generator=g, dtype=torch.float64)  # noqa: E731
    return Group(draw(G, K), draw(G, K, D), 0.7, draw(G, K, S), torch.ones(S, dtype=torch.float64))


def drawn_step(seed=0, B=6, d=5):
    g = torch.Generator().manual_seed(seed)
    draw = lambda *shape: torch.randn(*shape, generator=g, dtype=torch.float64)  # noqa: E731
    mean, std = draw(B, d).requires_grad_(), torch.tensor(0.3, dtype=torch.float64)
    log_prob = gaussian_log_prob(draw(B, d), mean, std)
    old = log_prob.detach() + 0.02 * draw(B)
    return Step(log_prob, old, draw(B), torch.ones(B), mean, draw(B, d), draw(B, d), std)


@pytest.mark.parametrize("name", METHODS)
def test_dial_zero_has_flow_grpo_s_rewards_and_gradient_to_the_bit(name):
    method, plain = METHODS[name](weight=0.0, clip=0.01), METHODS["flow_grpo"](clip=0.01)
    assert torch.equal(method.shape(drawn_group()), plain.shape(drawn_group()))
    (a := drawn_step()), (b := drawn_step())
    method.loss(a).backward()
    plain.loss(b).backward()
    assert torch.equal(a.mean.grad, b.mean.grad)


def test_clipped_policy_gradient_by_its_definition():
    step = drawn_step()
    expected = torch.zeros_like(step.mean)
    for b in range(len(step.mean)):
        ratio = (step.log_prob[b] - step.old_log_prob[b]).exp().item()
        A = step.advantage[b].item()
        clipped = (A > 0 and ratio > 1.01) or (A < 0 and ratio < 0.99)
        if not clipped:
            gradient = torch.autograd.grad(step.log_prob[b], step.mean, retain_graph=True)[0]
            expected -= ratio * A * gradient / len(step.mean)
    METHODS["flow_grpo"](clip=0.01).loss(step).backward()
    torch.testing.assert_close(step.mean.grad, expected, rtol=1e-12, atol=1e-14)
    assert 0 < (expected.abs().sum(1) == 0).sum() < len(expected)  # some pairs are clipped, some are not


def test_kl_term_has_the_gradient_of_the_gaussian_kl():
    step, plain = drawn_step(), drawn_step()
    METHODS["flow_grpo_kl"](weight=0.5, clip=0.01).loss(step).backward()
    METHODS["flow_grpo"](clip=0.01).loss(plain).backward()
    kl = (step.mean - step.reference_mean).detach() / step.std**2 / step.mean.shape[1] / len(step.mean)
    torch.testing.assert_close(step.mean.grad - plain.mean.grad, 0.5 * kl, rtol=1e-9, atol=1e-12)
    oracle = torch.distributions.kl_divergence(
        torch.distributions.Normal(step.mean, step.std), torch.distributions.Normal(step.reference_mean, step.std)
    )
    torch.testing.assert_close(gaussian_kl(step.mean, step.reference_mean, step.std, "sum"), oracle.sum(1))


def test_clip_higher_clips_at_one_point_four_epsilon():
    method = METHODS["clip_higher"](clip=0.01)
    assert (method.low, method.high) == pytest.approx((0.99, 1.014))


def test_pec_rewards_distance_from_the_group_mean():
    group = drawn_group()
    deviation = (group.features - group.features.mean(1, keepdim=True)).square().sum(-1)
    D, h = group.features.shape[-1], group.bandwidth
    bonus = METHODS["pec"](0.3).shape(group) - group.reward[..., None]
    expected = 0.3 * deviation / (2 * h**2 * D)
    constant = (bonus[..., 0] - expected)[0, 0]
    torch.testing.assert_close(bonus, (expected + constant)[..., None].expand_as(bonus))


def test_pcvae_is_pec_plus_the_latent_log_density():
    group = drawn_group()
    difference = METHODS["pcvae"](0.3).shape(group) - METHODS["pec"](0.3).shape(group)
    torch.testing.assert_close(difference, 0.3 * group.policy_log_prob)


@pytest.mark.parametrize("weight", [-1.0, float("nan"), float("inf")])
def test_a_weight_out_of_range_is_refused(weight):
    with pytest.raises(ValueError, match="weight of PEC must be a number from 0"):
        METHODS["pec"](weight)


def test_gardo_scales_positive_advantages_by_the_nearest_neighbour():
    """Four features on a line, at 0, 1, 3 and 7: their nearest neighbours are 1, 1, 2 and 4 away, 2 on average."""
    group = a_group(G=1, K=4, S=2, D=3)
    group.features = torch.zeros(1, 4, 3)
    group.features[0, :, 1] = torch.tensor([0.0, 1, 3, 7])
    advantages = torch.tensor([1.0, -1, 2, 0.5])[None, :, None].expand(1, 4, 2)
    assert METHODS["gardo"]().select(group, advantages)[0, :, 1].tolist() == [0.5, 1, 1, 2]
    assert METHODS["gardo"](2.0).select(group, advantages)[0, :, 0].tolist() == [0.25, 1, 1, 4]
    group.features = torch.ones(1, 4, 3)
    assert METHODS["gardo"]().select(group, advantages).isfinite().all()


def test_a_guarded_ratio_is_unbiased_and_knows_no_scale(rng):
    """x = mu_old + s eps: the guarded log-ratio is mean(eps (mu - mu_old)) whatever s is; the plain one lacks the KL."""
    mean, drift, eps = (torch.randn(5, 64, dtype=torch.float64, generator=rng) for _ in range(3))
    for s in (0.01, 0.3, 2.0):
        std, new = torch.tensor(s, dtype=torch.float64), mean + 0.1 * s * drift
        x = mean + s * eps
        numbers = gaussian_log_prob(x, new, std), gaussian_log_prob(x, mean, std), torch.ones(5).double(), torch.ones(5)
        step = Step(*numbers, new, mean, None, std, guard=0.5)
        torch.testing.assert_close(step.ratio.log(), 0.1 * s * (eps * drift).mean(1), rtol=1e-9, atol=1e-12)
        plain = dataclasses.replace(step, guard=None)
        torch.testing.assert_close(plain.ratio.log(), 0.1 * (eps * drift).mean(1) - 0.005 * drift.square().mean(1))
        torch.testing.assert_close(METHODS["flow_grpo"](clip=10.0).pair_loss(step), -step.ratio / 0.5)


@pytest.mark.parametrize("name", METHODS)
def test_the_guard_scales_every_policy_gradient_alike_and_no_kl(name):
    """At the first update, where the mean is the old one: s / dt times the plain gradient, but for a KL's own or naive KL's."""
    method = METHODS[name](0.4 if METHODS[name].largest_weight else None, clip=CLIP)
    plain, dt = METHODS["flow_grpo"](), 0.1

    def of(method, guard):
        return gradient(lambda theta: method.loss(dataclasses.replace(a_step(theta), guard=guard)), (0.0, 0.0, 0.0))

    scale, own = 0.5 / dt, torch.zeros(3, dtype=torch.float64)
    if name in ("flow_grpo_kl", "naive_kl"):
        own = of(method, None) - of(plain, None)
        assert own.abs().max() > 0.01
    torch.testing.assert_close(of(method, dt), scale * (of(method, None) - own) + own, rtol=1e-10, atol=1e-12)
