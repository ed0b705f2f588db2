"""The training loop on the real small SD3: ratios, entropy, layout, advantages, gradients, determinism."""

import copy
import dataclasses
import math
import time
import warnings
from collections import Counter

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from ref.grpo import advantages, extremes, learning_rate, start, step_weights, train
from ref.methods import METHODS, PEC, FlowGRPO
from ref.metrics import feature_variance
from ref.models import tiny
from ref.models.load import load
from ref.policy import gaussian_log_prob
from ref.presets import PRESETS
from ref.sampling import pick_prompts, sample
from ref.scale.weights import trainable
from ref.schedule import FlowSchedule, time_grid
from ref.scoring.load import WeightedSum
from ref.scoring.reward import Reward
from ref.settings import Settings
from ref.worlds import letters

from .small import PROMPTS, SMALL, a_model, small_model


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
        return torch.tensor([float(letters.label(p)) for p in prompts])

    model, _, phi = small_model()
    state = next(train(model, PROMPTS, reward, phi, METHODS["flow_grpo"](), SMALL))
    expected = [letters.label(p) for p in pick_prompts(PROMPTS, SMALL, 0)]
    assert state.reward.tolist() == [[float(c)] * SMALL.group_size for c in expected]
    assert (state.advantages == 0).all()  # no spread within any group: no advantage, not NaN


def test_advantages_are_z_scores_and_flat_groups_get_exactly_zero():
    reward = torch.tensor([[1.0, 2.0, 3.0], [0.1, 0.1, 0.1]])[..., None].expand(2, 3, 2)
    a = advantages(reward)
    torch.testing.assert_close(a[0, :, 0], torch.tensor([-1.0, 0.0, 1.0]), rtol=1e-3, atol=1e-6)
    assert (a[1] == 0).all()
    assert advantages(torch.tensor([[0.0] * 99 + [1.0]])[..., None]).max() == 5
    torch.testing.assert_close(advantages(reward, std_normalize=False)[0, :, 1], torch.tensor([-1.0, 0.0, 1.0]))


class Thorough(FlowGRPO):
    """Flow-GRPO that trains on every pair: its loss is its own, so nothing may be left out."""

    def loss(self, step):
        return self.pair_loss(step).mean()


def flat_but_for(prompts):
    """A reward that tells only the samples of some prompts apart."""
    return lambda images, asked: images.flatten(1).mean(1) * torch.tensor([float(p in prompts) for p in asked])


@pytest.mark.parametrize("kind, micro_batch, left", [("letters", 5, 7), ("sd3", 2, 6), ("flux", 5, 7)])
def test_samples_without_advantage_are_not_trained_on(kind, micro_batch, left, world):
    """Two groups of four are flat: half the passes, the same gradient, and the ratio exactly 1 in another order.

    Of micro-batches of 5, 5 and 2 one of five stays, filled up, and that of two.
    """
    settings = dataclasses.replace(SMALL, updates=1, iterations=1, steps=3, micro_batch=micro_batch)
    found = {}
    for method in (FlowGRPO, Thorough):
        model, prompts = a_model(kind, world)
        rows, velocity = [], model.velocity

        def counted(x, sigma, conditioning):
            rows.append(len(x) * torch.is_grad_enabled())
            return velocity(x, sigma, conditioning)

        model.velocity = counted
        state = next(train(model, prompts, flat_but_for(pick_prompts(prompts, SMALL, 0)[1::2]),
                           lambda images: images.flatten(1)[:, :3], method(clip=1e-2), settings))  # fmt: skip
        assert state.metrics["ratio_error"] == 0
        found[method] = torch.cat([weight.grad.flatten() for weight in trainable(model).values()]), sum(rows)
    (less, few), (all_of_it, many) = found[FlowGRPO], found[Thorough]
    assert (few, many) == (left * 2, 12 * 2)
    torch.testing.assert_close(less, all_of_it, rtol=0, atol=1e-6 * all_of_it.abs().max().item())


def test_a_flat_batch_moves_the_weights_by_momentum_alone():
    """No pass at all, and AdamW's step is the one that a gradient of zeros makes."""
    after = []
    for method in (FlowGRPO, Thorough):
        model, reward, phi = small_model()
        asked = iter([reward, lambda images, prompts: images.new_zeros(len(images))])
        loop = train(model, PROMPTS, lambda images, prompts: next(asked)(images, prompts), phi, method(clip=1e-2),
                     dataclasses.replace(SMALL, updates=1))  # fmt: skip
        first = copy.deepcopy(trainable(next(loop).model))
        assert next(loop).metrics["grad_norm"] == 0
        after.append(trainable(model))
    assert all(torch.equal(after[0][name], after[1][name]) for name in first)
    assert any(not torch.equal(after[0][name], first[name]) for name in first)


def test_methods_with_a_term_of_their_own_train_on_every_pair():
    assert {name for name, method in METHODS.items() if not method().skips} == {
        "flow_grpo_kl", "entropy_reg", "kl_cov", "naive_kl",
    }  # fmt: skip


def test_global_std_divides_by_that_of_all_rewards(rng):
    reward = torch.randn(3, 5, 2, generator=rng) * torch.tensor([0.1, 1, 10])[:, None, None]
    found = advantages(reward, clip=1e6, over=(0, 1)).numpy()
    centred = reward.numpy() - reward.numpy().mean(1, keepdims=True)
    np.testing.assert_allclose(found, centred / (reward.numpy().std((0, 1), ddof=1) + 1e-4), rtol=1e-5)
    model, score, phi = small_model()
    settings = dataclasses.replace(SMALL, global_std=True, advantage_clip=1e6)
    state = next(train(model, PROMPTS, score, phi, METHODS["flow_grpo"](), settings))
    expected = advantages(state.reward[..., None], over=(0, 1)).expand_as(state.advantages)
    torch.testing.assert_close(state.advantages, expected)


def test_the_guards_first_gradient_is_the_plain_one_times_s_over_dt():
    found = []
    for guard in (False, True):
        model, reward, phi = small_model()
        settings = dataclasses.replace(
            SMALL, window=1, trained=0.25, guard=guard, updates=1, grad_clip=1e9, iterations=1
        )
        state = next(train(model, PROMPTS, reward, phi, METHODS["flow_grpo"](clip=1e-2), settings))
        assert state.metrics["ratio_error"] == 0 and state.samples.trajectory.steps == (0,)
        found.append(torch.cat([weight.grad.flatten() for weight in trainable(model).values()]))
    schedule = model.schedule(SMALL.steps, noise_level=SMALL.noise_level)
    expected = found[0] * (schedule.std[0] / schedule.dt[0])
    torch.testing.assert_close(found[1], expected, rtol=0, atol=1e-5 * expected.abs().max().item())


class Waiting:
    """A reward behind a slow server; it notes when it is asked, and of how many images."""

    waits, name = True, "slow"

    def __init__(self, reward, events):
        self.reward, self.events = reward, events

    def __call__(self, images, prompts):
        self.events.append(len(images))
        time.sleep(0.05)
        return self.reward(images, prompts)


def test_a_reward_that_waits_does_so_while_the_next_samples_are_drawn():
    """Asked once a micro-batch, before the last one is drawn; the same bits as asked at the end.

    Decoded in threes either way, and with a reward that rounds nothing: other batches may be another kernel's.
    """
    after, events = [], []
    reward = lambda images, prompts: images.flatten(1).amax(1)  # noqa: E731
    for waits in (False, True):
        model, _, phi = small_model()
        velocity, model.decode_batch = model.velocity, 3
        asked = Waiting(reward, events) if waits else reward

        def noted(x, sigma, conditioning):
            events.append("drawn") if waits else None
            return velocity(x, sigma, conditioning)

        model.velocity = noted
        settings = dataclasses.replace(SMALL, micro_batch=3, steps=3, iterations=1)
        state = next(train(model, PROMPTS, asked, phi, METHODS["pec"](clip=1e-2), settings))
        after.append((copy.deepcopy(trainable(model)), state.reward, state.samples.images))
    assert [n for n in events if n != "drawn"] == [3] * 4 and "drawn" in events[events.index(3) :]
    assert torch.equal(after[0][2], after[1][2]) and torch.equal(after[0][1], after[1][1])
    assert all(torch.equal(after[0][0][name], after[1][0][name]) for name in after[0][0])


def test_a_waiting_rewards_refusal_reaches_the_caller():
    model, reward, phi = small_model()
    broken = Waiting(lambda images, prompts: images.new_full((len(images),), torch.nan), [])
    with pytest.raises(ValueError, match="slow returned a NaN"):
        next(train(model, PROMPTS, broken, phi, METHODS["flow_grpo"](), SMALL))


def test_each_reward_may_be_divided_by_its_own_deviation():
    """A sum of a reward and a hundred times smaller one with the same weight: alone, the second would not be heard."""
    model, reward, phi = small_model()
    small = lambda images, prompts: 0.01 * images.flatten(1).std(1)  # noqa: E731
    both = lambda images, prompts: pytest.fail("each is asked by itself")  # noqa: E731
    both.weights, both.rewards = [1.0, 1.0], [reward, small]
    settings = dataclasses.replace(SMALL, per_reward=True, advantage_clip=1e6)
    state = next(train(model, PROMPTS, both, phi, METHODS["flow_grpo"](), settings))
    each = [f(state.samples.images, state.samples.prompts).unflatten(0, (4, 3)) for f in (reward, small)]
    z = sum((r - r.mean(1, keepdim=True)) / (r.std(1, keepdim=True) + 1e-4) for r in each)
    torch.testing.assert_close(state.reward, each[0] + each[1])
    torch.testing.assert_close(state.advantages[..., 0], advantages(z[..., None], 1e6)[..., 0], rtol=1e-4, atol=1e-4)
    real = WeightedSum([(0.5, Reward("a")), (2.0, Reward("b"))])
    assert list(real.weights) == [0.5, 2.0] and [part.name for part in real.rewards] == ["a", "b"] and not real.waits
    with pytest.raises(ValueError, match="per_reward needs a sum of rewards"):
        next(train(model, PROMPTS, reward, phi, METHODS["flow_grpo"](), settings))


def test_best_and_worst_leave_the_others_without_advantage():
    advantage = torch.tensor([[3.0, -1, 0.5, -2, 1], [0.1, 0.2, 0.3, 0.4, 0.5]])[..., None].expand(2, 5, 3)
    torch.testing.assert_close(
        extremes(advantage, 3)[..., 1], torch.tensor([[3.0, 0, 0, -2, 1], [0.1, 0, 0, 0.4, 0.5]])
    )
    assert torch.equal(extremes(advantage, 5), advantage)
    model, reward, phi = small_model()
    settings = dataclasses.replace(SMALL, best_and_worst=2, micro_batch=1, iterations=1, steps=3)
    rows, velocity = [], model.velocity

    def counted(x, sigma, conditioning):
        rows.append(torch.is_grad_enabled())
        return velocity(x, sigma, conditioning)

    model.velocity = counted
    state = next(train(model, PROMPTS, reward, phi, METHODS["pec"](clip=1e-2), settings))
    assert sum(rows) == 4 * 2 * 2 and state.metrics["ratio_error"] == 0
    assert ((state.advantages != 0).sum(1) == 2).all()


def test_trained_steps_can_be_drawn_at_random():
    """DanceGRPO's: all steps are stochastic, some of them trained."""
    model, reward, phi = small_model()
    settings = dataclasses.replace(SMALL, steps=6, trained=0.5, trained_at_random=True, iterations=4, groups=2)
    seen = []
    for state in train(model, PROMPTS, reward, phi, METHODS["pec"](clip=1e-2), settings):
        path, schedule = state.samples.trajectory, model.schedule(6, noise_level=settings.noise_level)
        assert len(path.steps) == 3 and list(path.steps) == sorted(path.steps) and path.steps[-1] < 5
        for s, i in enumerate(path.steps):
            assert torch.equal(path.log_prob[s], gaussian_log_prob(path.x[i + 1], path.mean[s], schedule.std[i]))
        assert state.metrics["ratio_error"] == 0 or state.iteration > 1
        seen.append(path.steps)
    assert len(set(seen)) > 2 and any(4 in steps for steps in seen)


def test_a_last_step_that_is_nearly_deterministic_is_warned_of():
    """Coefficients preserving on SD3's grid, which has a level just above 0: the gradients of its log-densities."""
    model, reward, phi = small_model()
    schedule = model.schedule(10, kind="cps", noise_level=0.8)
    v = torch.ones(10, 1, requires_grad=True)
    mean = [schedule.mean(torch.zeros(1, 1), v[i : i + 1], i) for i in schedule.steps]
    far = [m.detach() + schedule.std[i] for i, m in zip(schedule.steps, mean)]  # one standard deviation from the mean
    of = [gaussian_log_prob(x, m, schedule.std[i]) for i, x, m in zip(schedule.steps, far, mean)]
    [gradient] = torch.autograd.grad(torch.cat(of).sum(), v)
    torch.testing.assert_close(schedule.leverage, gradient[:9, 0].abs().double(), rtol=1e-5, atol=0)
    settings = dataclasses.replace(SMALL, steps=10, kind="cps", noise_level=0.8, groups=2, iterations=1)

    def loop(**changes):
        own = dataclasses.replace(settings, **changes)
        return next(train(model, PROMPTS, reward, phi, METHODS["pec"](), own))

    with pytest.warns(UserWarning, match="gradient is [0-9]{2} times as large.*--trained 0.5"):
        loop()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        loop(trained=0.5)


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


def test_averages_wait_for_their_interval():
    """Every third optimiser step, two an iteration: the third and the sixth."""
    model, reward, phi = small_model()
    settings = dataclasses.replace(SMALL, ema=0.75, ema_every=3, iterations=3, steps=3)
    loop = train(model, PROMPTS, reward, phi, METHODS["flow_grpo"](clip=0.1), settings)
    seen = [copy.deepcopy(trainable(model))] + [copy.deepcopy(state.ema) for state in loop]
    changed = [any(not torch.equal(a[key], b[key]) for key in a) for a, b in zip(seen, seen[1:])]
    assert changed == [False, True, True]


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


def test_only_the_lora_is_trained():
    model, _, _ = small_model()
    assert all("lora" in name for name in trainable(model))
    assert sum(map(torch.numel, start(model, SMALL).optimizer.param_groups[0]["params"])) == sum(
        map(torch.numel, trainable(model).values())
    )


class Count(TorchDispatchMode):
    """Counts the operators that make Python wait for a GPU's answer, or copy between devices."""

    def __init__(self):
        super().__init__()
        self.calls = Counter()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.calls[function.overloadpacket.__name__] += 1
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("method", ["flow_grpo", "flow_grpo_kl", "kl_cov", "pcvae"])
@pytest.mark.parametrize("kind", ["sd3", "flux"])
def test_the_update_asks_for_no_number_within_its_loop_over_steps(kind, method, tmp_path, monkeypatch):
    """As many `item` and `nonzero` with two trained steps as with five: none of them is a step's."""
    from ref import grpo

    folder = getattr(tiny, kind)(tmp_path / kind)
    model = load(folder, PROMPTS, 32, 32, max_sequence_length=16, lora_rank=2, device="cpu", cache_dir=tmp_path / "c")
    inside, update = [], grpo.update

    def counted(*arguments):
        with Count() as count:
            result = update(*arguments)
        inside.append({name: count.calls[name] for name in ("_local_scalar_dense", "nonzero", "item")})
        return result

    monkeypatch.setattr(grpo, "update", counted)
    for window in (2, 5):
        settings = Settings(iterations=1, groups=2, group_size=2, updates=1, steps=6, window=window)
        next(train(model, PROMPTS, lambda images, prompts: images.mean((1, 2, 3)), lambda images: images.mean((2, 3)),
                   METHODS[method](), settings))  # fmt: skip
    assert inside[0] == inside[1] and inside[0]["_local_scalar_dense"] > 0


def test_averages_that_would_stay_the_base_model_are_warned_of():
    short = dataclasses.replace(SMALL, iterations=1, updates=2, ema=0.9)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        run(settings=dataclasses.replace(short, ema_every=2))
    with pytest.warns(UserWarning, match="2 optimiser steps and ema_every is 3: .*--ema 0"):
        run(settings=dataclasses.replace(short, ema_every=3))


@pytest.mark.parametrize("bound", ["target_diversity", "stop_below_diversity"])
def test_a_bound_beside_a_shared_start_and_a_window_is_warned_of(bound):
    settings = dataclasses.replace(SMALL, iterations=1, same_noise=True, window=1, trained=0.25, **{bound: 0.8})
    with pytest.warns(UserWarning, match="independent samples keep less"):
        run("pec", settings)


def test_the_base_model_has_all_of_its_diversity_wherever_the_window_lies():
    """Groups from one start, three iterations at each place, nothing learned: a share of 1, lambda's unit, at every one.

    Tolerance: 5.3 standard errors (1e-7) of the mean of 3 x 256 groups over that of the 256 that calibrated, from the spread of
    the groups. By the full schedule's bandwidth the shares would be 0.9, 0.75, 0.6 and 0.4.
    """
    task = PRESETS["mixture"].task()
    settings = Settings(
        iterations=12, groups=256, group_size=6, updates=1, steps=10, same_noise=True, trained=0.5, window=2, tail_steps=3,
        window_moves="sliding", window_stay=3, lr=1e-12,
    )  # fmt: skip
    shares, groups, bonus = {}, {}, []
    loop = train(task.model, task.prompts, lambda x, prompts: 0 * x[:, 0], task.encoder, Noted(bonus), settings)
    for state in loop:
        place = state.samples.trajectory.steps[0]
        shares.setdefault(place, []).append(state.metrics["diversity"])
        groups.setdefault(place, []).append(feature_variance(state.features))
    assert list(shares) == [0, 1, 2, 3]
    for place, own in shares.items():
        v = torch.cat(groups[place])
        error = (v.std() / v.mean() * (1 / len(v) + 1 / settings.groups) ** 0.5).item()
        assert abs(np.mean(own) - 1) < 5.3 * error < 0.35
        paid = np.mean(bonus[3 * place : 3 * place + 3])  # half a base variance on average, less what K takes of it
        assert paid == pytest.approx(np.mean(own) / 2, rel=1e-4)


class Noted(PEC):
    """PEC of weight 1 that notes the mean bonus of each iteration, but for its constant."""

    def __init__(self, bonus):
        super().__init__(1.0)
        self.bonus = bonus

    def shape(self, group):
        h = group.bandwidth
        self.bonus.append((super().shape(group).mean() - math.log(2 * math.pi * h**2) / 2).item())
        return super().shape(group)


@pytest.mark.parametrize("method, warned", [("pec", 0), ("gardo", 0), ("entropy_reg", 1), ("naive_kl", 1)])
def test_best_and_worst_that_save_nothing_are_warned_of(method, warned, recwarn):
    run(method, dataclasses.replace(SMALL, iterations=1, best_and_worst=2))
    assert sum("saves no pass here" in str(w.message) for w in recwarn) == warned
