"""The training loop on the real small SD3: ratios, entropy, layout, advantages, gradients, determinism."""

import copy
import dataclasses

import pytest
import torch

from ref.worlds import digits
from ref.entropy import gaussian_kl
from ref.grpo import advantages, learning_rate, start, step_weights, train
from ref.sampling import chunks, pick_prompts, sample
from ref.scale.weights import trainable
from ref.settings import Settings
from ref.methods import METHODS, Group, Step
from ref.policy import gaussian_log_prob
from ref.schedule import FlowSchedule, time_grid

SMALL = Settings(iterations=2, groups=4, group_size=3, updates=2, steps=4, lr=3e-3, clip=1e-2, seed=7)
PROMPTS = digits.PROMPTS[:6]


def small_model():
    model, reward, phi, _ = digits.load()
    model.add_lora(4, 8)
    return model, reward, phi


def run(method="flow_grpo", settings=SMALL, weight=None):
    model, reward, phi = small_model()
    return [
        (state.metrics, copy.deepcopy(trainable(state.model)), state)
        for state in train(model, PROMPTS, reward, phi, METHODS[method](weight, clip=settings.clip), settings)
    ]


@pytest.mark.parametrize("micro_batch", [2, 5, 1024])
@pytest.mark.parametrize("kind", ["flow_sde", "dance_sde", "cps"])
def test_ratio_is_exactly_one_on_the_first_update(kind, micro_batch):
    """Stored log-densities against those of the first update's own forward pass, to the last bit."""
    history = run(settings=dataclasses.replace(SMALL, kind=kind, micro_batch=micro_batch))
    assert [metrics["ratio_error"] for metrics, _, _ in history] == [0.0, 0.0]


def test_ratio_watch_sees_a_policy_that_moved():
    """The power of the test above: a model perturbed between rollout and update is caught."""
    model, reward, phi = small_model()

    def disturbing(images, prompts):
        with torch.no_grad():
            for weight in trainable(model).values():
                weight.add_(1e-3)
        return reward(images, prompts)

    state = next(train(model, PROMPTS, disturbing, phi, METHODS["flow_grpo"](clip=0.1), SMALL))
    assert state.metrics["ratio_error"] > 1e-6


def test_policy_entropy_is_the_same_bits_before_and_after_while_the_mean_moves():
    """Logged entropy, and the entropy of the Normal each step really sampled from, before and after training."""
    model, reward, phi = small_model()
    settings = dataclasses.replace(SMALL, lr=3e-2, iterations=4)
    schedule = model.schedule(settings.steps, noise_level=settings.noise_level)

    def kernels():
        path = sample(model, PROMPTS, 3, schedule, (1,)).trajectory
        entropy = torch.stack(
            [torch.distributions.Normal(m, schedule.std[i]).entropy() for m, i in zip(path.mean, path.steps)]
        )
        return entropy, path.mean

    entropy_before, mean_before = kernels()
    logged = [
        s.metrics["policy_entropy"]
        for s in train(model, PROMPTS, reward, phi, METHODS["flow_grpo"](clip=0.1), settings)
    ]
    entropy_after, mean_after = kernels()
    assert torch.equal(entropy_before, entropy_after)
    assert len(set(logged)) == 1
    assert logged[0] == pytest.approx(entropy_before.mean().item(), rel=1e-6)
    assert (mean_after - mean_before).abs().max() > 1e-2


def test_entropy_gradient_is_exactly_zero_while_the_means_gradient_is_not():
    model, _, _ = small_model()
    schedule = model.schedule(4, noise_level=0.7)
    x = torch.randn(3, *model.latent_shape, generator=torch.Generator().manual_seed(0))
    weights = list(trainable(model).values())
    for i in schedule.steps:
        mean = schedule.mean(x, model.velocity(x, schedule.sigmas[i], model.encode(PROMPTS[:3])), i)
        # the kernel's entropy by reparametrisation, E[-log p(mu + s eps)]: theta enters twice and must cancel
        eps = torch.randn(x.shape, generator=torch.Generator().manual_seed(i))
        entropy = -gaussian_log_prob(mean + schedule.std[i] * eps, mean, schedule.std[i], "sum").sum()
        gradient = torch.autograd.grad(entropy, weights, retain_graph=True, allow_unused=True)
        scale = torch.autograd.grad(mean.square().sum(), weights, allow_unused=True)
        assert max(g.abs().max() for g in scale if g is not None) > 1e-3
        assert all(g is None or (g == 0).all() for g in gradient)


def test_lora_starts_at_the_base_model_and_reference_switches_it_off():
    base, _, _, _ = digits.load()
    model, _, _ = small_model()
    cond, x = model.encode(PROMPTS[:2]), torch.randn(2, *model.latent_shape, generator=torch.Generator().manual_seed(0))
    sigma = torch.tensor(0.5)
    with torch.no_grad():
        v = base.velocity(x, sigma, cond)
        assert torch.equal(model.velocity(x, sigma, cond), v)
        for weight in trainable(model).values():
            weight.add_(0.05)
        assert not torch.allclose(model.velocity(x, sigma, cond), v)
        with model.reference():
            assert torch.equal(model.velocity(x, sigma, cond), v)
        assert not torch.allclose(model.velocity(x, sigma, cond), v)


def test_guidance_is_one_forward_of_both_and_reduces_to_its_parts():
    model, _, _, _ = digits.load()
    cond, x = model.encode(PROMPTS[:2]), torch.randn(2, *model.latent_shape, generator=torch.Generator().manual_seed(0))
    sigma = torch.tensor(0.7)
    negative = {k.removeprefix("negative_"): v for k, v in cond.items() if k.startswith("negative_")}
    with torch.no_grad():
        positive, empty = model.velocity(x, sigma, cond), model.velocity(x, sigma, negative)
        model.guidance_scale = 2.5
        guided = model.velocity(x, sigma, cond)
    torch.testing.assert_close(guided, empty + 2.5 * (positive - empty), rtol=1e-4, atol=1e-5)


def test_same_seed_same_bits_and_micro_batches_change_only_rounding():
    (_, a, _), (_, b, _) = run()[-1], run()[-1]
    assert all(torch.equal(a[k], b[k]) for k in a)
    whole, cut = run()[0], run(settings=dataclasses.replace(SMALL, micro_batch=4))[0]
    torch.testing.assert_close(cut[2].samples.images, whole[2].samples.images, rtol=1e-4, atol=1e-4)


def test_every_member_of_a_group_is_scored_for_its_own_prompt():
    """A reward that knows its prompt alone, and images tagged by the prompt that made them."""
    seen = []

    def reward(images, prompts):
        seen.append(prompts)
        return torch.tensor([float(digits.label(p)) for p in prompts])

    model, _, phi = small_model()
    state = next(train(model, PROMPTS, reward, phi, METHODS["flow_grpo"](), SMALL))
    expected = [digits.label(p) for p in pick_prompts(PROMPTS, SMALL, 0)]
    assert state.reward.tolist() == [[float(c)] * SMALL.group_size for c in expected]
    assert (state.advantages == 0).all()  # no spread within any group: no advantage, not NaN


def test_group_layout_is_whole_groups_for_each_update():
    parts = chunks(groups=5, group_size=3, updates=2, micro_batch=4)
    assert [len(c) for part in parts for c in part] == [4, 4, 1, 4, 2]
    assert torch.equal(torch.cat([c for part in parts for c in part]), torch.arange(15))
    assert [sum(map(len, part)) % 3 for part in parts] == [0, 0]


def test_prompts_are_used_up_before_any_comes_again():
    settings = dataclasses.replace(SMALL, groups=4)
    drawn = [p for i in range(3) for p in pick_prompts(PROMPTS, settings, i)]
    assert sorted(drawn[:6]) == sorted(drawn[6:]) == sorted(PROMPTS)


def test_advantages_are_z_scores_and_flat_groups_get_exactly_zero():
    reward = torch.tensor([[1.0, 2.0, 3.0], [0.1, 0.1, 0.1]])[..., None].expand(2, 3, 2)
    a = advantages(reward)
    torch.testing.assert_close(a[0, :, 0], torch.tensor([-1.0, 0.0, 1.0]), rtol=1e-3, atol=1e-6)
    assert (a[1] == 0).all()
    assert advantages(torch.tensor([[0.0] * 99 + [1.0]])[..., None]).max() == 5
    torch.testing.assert_close(advantages(reward, std_normalize=False)[0, :, 1], torch.tensor([-1.0, 0.0, 1.0]))


def test_a_nan_reward_or_feature_is_named_with_its_prompt():
    model, reward, phi = small_model()

    def broken(images, prompts):
        values = reward(images, prompts)
        values[4] = float("nan")
        return values

    broken.name = "broken reward"
    with pytest.raises(ValueError, match="broken reward returned a NaN.*a handwritten"):
        next(train(model, PROMPTS, broken, phi, METHODS["flow_grpo"](), SMALL))


def test_window_is_shared_drawn_anew_and_never_reaches_the_last_step():
    settings = dataclasses.replace(SMALL, window=1, iterations=8, groups=2, group_size=2)
    steps = [state.samples.trajectory.steps for _, _, state in run(settings=settings)[:1]]
    model, reward, phi = small_model()
    steps = [s.samples.trajectory.steps for s in train(model, PROMPTS, reward, phi, METHODS["flow_grpo"](), settings)]
    assert all(len(s) == 1 for s in steps) and {s[0] for s in steps} == {0, 1, 2}


def test_cosine_learning_rate_falls_from_lr_towards_zero():
    settings = dataclasses.replace(SMALL, lr_schedule="cosine", iterations=10)
    rates = [learning_rate(settings, i) for i in range(10)]
    assert rates[0] == settings.lr and rates[5] == pytest.approx(settings.lr / 2) and rates[9] < 0.03 * settings.lr


def test_averaged_weights_move_once_an_optimiser_step_and_are_lent_not_given():
    settings = dataclasses.replace(SMALL, ema=0.75, iterations=1, updates=1, micro_batch=4)
    model, reward, phi = small_model()
    before = copy.deepcopy(trainable(model))
    state = next(train(model, PROMPTS, reward, phi, METHODS["flow_grpo"](clip=0.1), settings))
    after = copy.deepcopy(trainable(model))
    for key, weight in after.items():
        torch.testing.assert_close(state.ema[key], 0.75 * before[key] + 0.25 * weight)
    assert any((after[key] != before[key]).any() for key in after)
    with state.averaged():
        assert all(torch.equal(weight, state.ema[key]) for key, weight in trainable(model).items())
    assert all(torch.equal(weight, after[key]) for key, weight in trainable(model).items())


def test_same_noise_and_trained_share_change_what_they_name_and_nothing_else():
    model, reward, phi = small_model()

    def first(**changes):
        settings = dataclasses.replace(SMALL, steps=6, **changes)
        return next(train(small_model()[0], PROMPTS, reward, phi, METHODS["pec"](), settings)).samples.trajectory

    plain, same, part = first(), first(same_noise=True), first(trained=0.5)
    groups = same.x[0].unflatten(0, (4, 3))
    assert (groups == groups[:, :1]).all() and not torch.equal(groups[0], groups[1])
    assert torch.equal(same.x[0, ::3], plain.x[0, ::3]) and not torch.equal(same.x[-1, 0], same.x[-1, 1])
    assert plain.steps == (0, 1, 2, 3, 4) and part.steps == (0, 1, 2)
    assert torch.equal(part.x, plain.x) and torch.equal(part.log_prob, plain.log_prob[:3])


def test_step_weights_have_mean_one():
    schedule = FlowSchedule(time_grid(6), noise_level=0.7)
    for omega in ("uniform", "variance"):
        assert step_weights(schedule, omega).mean().item() == pytest.approx(1)
    assert len(set(step_weights(schedule, "variance").tolist())) > 1


# ------------------------------------------------------------------------------------------- methods


def a_group(seed=0, G=2, K=5, S=3, D=4):
    g = torch.Generator().manual_seed(seed)
    draw = lambda *shape: torch.randn(*shape, generator=g, dtype=torch.float64)  # noqa: E731
    return Group(draw(G, K), draw(G, K, D), 0.7, draw(G, K, S), torch.ones(S, dtype=torch.float64))


def a_step(seed=0, B=6, d=5):
    g = torch.Generator().manual_seed(seed)
    draw = lambda *shape: torch.randn(*shape, generator=g, dtype=torch.float64)  # noqa: E731
    mean, std = draw(B, d).requires_grad_(), torch.tensor(0.3, dtype=torch.float64)
    log_prob = gaussian_log_prob(draw(B, d), mean, std)
    old = log_prob.detach() + 0.02 * draw(B)
    return Step(log_prob, old, draw(B), torch.ones(B), mean, draw(B, d), draw(B, d), std)


@pytest.mark.parametrize("name", METHODS)
def test_dial_zero_is_flow_grpo_to_the_bit(name):
    method, plain = METHODS[name](weight=0.0, clip=0.01), METHODS["flow_grpo"](clip=0.01)
    assert torch.equal(method.shape(a_group()), plain.shape(a_group()))
    (a := a_step()), (b := a_step())
    method.loss(a).backward()
    plain.loss(b).backward()
    assert torch.equal(a.mean.grad, b.mean.grad)


def test_clipped_policy_gradient_by_its_definition():
    step = a_step()
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
    step, plain = a_step(), a_step()
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
    group = a_group()
    deviation = (group.features - group.features.mean(1, keepdim=True)).square().sum(-1)
    D, h = group.features.shape[-1], group.bandwidth
    bonus = METHODS["pec"](0.3).shape(group) - group.reward[..., None]
    expected = 0.3 * deviation / (2 * h**2 * D)
    constant = (bonus[..., 0] - expected)[0, 0]
    torch.testing.assert_close(bonus, (expected + constant)[..., None].expand_as(bonus))


def test_pcvae_is_pec_plus_the_latent_log_density():
    group = a_group()
    difference = METHODS["pcvae"](0.3).shape(group) - METHODS["pec"](0.3).shape(group)
    torch.testing.assert_close(difference, 0.3 * group.policy_log_prob)


@pytest.mark.parametrize("weight", [-1.0, float("nan"), float("inf")])
def test_a_weight_out_of_range_is_refused(weight):
    with pytest.raises(ValueError, match="weight of PEC must be a number from 0"):
        METHODS["pec"](weight)


@pytest.mark.parametrize(
    "change",
    [
        dict(group_size=1),
        dict(steps=1),
        dict(updates=9),
        dict(window=4),
        dict(lr=-1.0),
        dict(omega="x"),
        dict(ema=1.0),
        dict(trained=0.0),
        dict(window=1, trained=0.5),
    ],
)
def test_bad_settings_are_refused(change):
    with pytest.raises(ValueError, match=next(iter(change))):
        dataclasses.replace(SMALL, **change)


def test_only_the_lora_is_trained():
    model, _, _ = small_model()
    assert all("lora" in name for name in trainable(model))
    assert sum(map(torch.numel, start(model, SMALL).optimizer.param_groups[0]["params"])) == sum(
        map(torch.numel, trainable(model).values())
    )
