"""Which prompts, which samples, which micro-batches; one walk for a group; and networks that return a NaN."""

import dataclasses

import pytest
import torch

from ref.grpo import start, train
from ref.methods import METHODS
from ref.policy import rollout
from ref.sampling import chunks, generator_for, pick_prompts, placed, sample
from ref.schedule import FlowSchedule, time_grid
from ref.settings import Settings
from ref.worlds import letters

from .small import PROMPTS, SMALL, a_model, small_model


def test_group_layout_is_whole_groups_for_each_update():
    parts = chunks(groups=5, group_size=3, updates=2, micro_batch=4)
    assert [len(c) for part in parts for c in part] == [4, 4, 1, 4, 2]
    assert torch.equal(torch.cat([c for part in parts for c in part]), torch.arange(15))
    assert [sum(map(len, part)) % 3 for part in parts] == [0, 0]


def test_prompts_are_used_up_before_any_comes_again():
    settings = dataclasses.replace(SMALL, groups=4)
    drawn = [p for i in range(3) for p in pick_prompts(PROMPTS, settings, i)]
    assert sorted(drawn[:6]) == sorted(drawn[6:]) == sorted(PROMPTS)


def test_a_nan_reward_or_feature_is_named_with_its_prompt():
    model, reward, phi = small_model()

    def broken(images, prompts):
        values = reward(images, prompts)
        values[4] = float("nan")
        return values

    broken.name = "broken reward"
    with pytest.raises(ValueError, match="broken reward returned a NaN.*a letter"):
        next(train(model, PROMPTS, broken, phi, METHODS["flow_grpo"](), SMALL))


def test_micro_batch_zero_is_refused_where_nobody_found_it():
    model, reward, phi, _ = letters.load()
    model.add_lora(4, 8)
    with pytest.raises(ValueError, match="let scale.microbatch find it first"):
        next(train(model, letters.PROMPTS, reward, phi, METHODS["flow_grpo"](), Settings(micro_batch=0)))


def starts(iterations, **changes):
    settings = Settings(steps=25, window=4, **changes)
    full = FlowSchedule(time_grid(25))
    schedules = [placed(full, settings, n) for n in range(iterations)]
    assert all(schedule.steps == tuple(range(schedule.steps[0], schedule.steps[0] + 4)) for schedule in schedules)
    return [schedule.steps[0] for schedule in schedules]


def test_a_window_lies_where_it_is_told():
    assert set(starts(400)) == set(range(21))  # never over the last step; each of 21 missed with probability 3e-9
    assert set(starts(200, trained=0.5)) == set(range(10))  # within the first 13 steps
    slid = [place for place in range(21) for _ in range(3)]
    assert starts(130, window_moves="sliding", window_stay=3) == (slid * 3)[:130]
    decayed = starts(2000, window_moves="decaying", window_stay=20)
    stays = [20] * 13 + [19, 17, 16, 14, 13, 12, 10, 9]  # 20 exp(-0.1 (place - 12.5)) past the middle
    assert decayed == ([place for place, n in enumerate(stays) for _ in range(n)] * 6)[:2000]


@pytest.mark.parametrize("kind", ["sd3", "flux"])
def test_a_tail_saves_passes_and_leaves_the_ratio_at_exactly_one(kind, world):
    model, prompts = a_model(kind, world)
    settings = dataclasses.replace(SMALL, steps=8, window=2, trained=0.3, tail_steps=2, updates=1, iterations=1)
    reward = lambda images, prompts: images.mean((1, 2, 3))  # noqa: E731
    state = next(train(model, prompts, reward, lambda images: images.mean((2, 3)), METHODS["pec"](), settings))
    path = state.samples.trajectory
    assert path.steps in ((0, 1), (1, 2)) and len(path.x) == path.steps[-1] + 1 + 2 + 1
    assert state.metrics["ratio_error"] == 0 < state.metrics["grad_norm"]


def each_alone(model, prompts, K, schedule, layout):
    """The long way: every member of a group walks every step itself. States [N + 1, B, ...]."""
    shape = (len(schedule) + 1, K, *model.latent_shape)
    noise = torch.stack([torch.randn(shape, generator=generator_for(0, g)) for g in range(len(prompts))], 1)
    noise[0] = noise[0, :, :1]
    noise, conditioning, states = noise.flatten(1, 2), model.encode(prompts), []
    for rows in layout:
        part = {name: value[rows // K] for name, value in conditioning.items()}
        velocity = lambda x, sigma: model.velocity(x, sigma, part)  # noqa: E731
        states.append(rollout(velocity, schedule, noise[0, rows], eps=noise[1:, rows]).x)
    return torch.cat(states, 1)


@pytest.mark.parametrize("micro_batch", [2, 5])
@pytest.mark.parametrize("kind", ["mixture", "letters", "sd3", "flux"])
def test_one_walks_for_its_group_until_the_window(kind, micro_batch, world):
    """The same bits as the long way where the passes have the same shape; else its numbers, and fewer passes.

    float32 rounds a state of size 4 by 2.4e-7 a step, and six steps of slopes up to 2 carry that to 1.5e-5 at most.
    """
    (model, prompts), K = a_model(kind, world), 3
    schedule = model.schedule(6, noise_level=0.7).windowed(2, 2)
    layout, rows, velocity = list(torch.arange(4 * K).split(micro_batch)), [], model.velocity

    def counted(x, sigma, conditioning):
        rows.append(len(x))
        return velocity(x, sigma, conditioning)

    model.velocity = counted
    found = sample(model, prompts, K, schedule, (0,), layout, same_noise=True).trajectory
    assert sum(rows) == 2 * 4 + 4 * 4 * K
    expected = each_alone(model, prompts, K, schedule, layout)
    if micro_batch == 2:  # two groups at once, as two samples
        assert torch.equal(found.x, expected)
    torch.testing.assert_close(found.x, expected, rtol=0, atol=1.5e-5)
    groups = found.x.unflatten(1, (4, K))
    assert torch.equal(groups[:3], groups[:3, :, :1].expand_as(groups[:3]))
    assert not torch.equal(groups[3, :, 0], groups[3, :, 1])
    two = sample(model, prompts[2:], K, schedule, (0,), list(torch.arange(2 * K).split(micro_batch)), [2, 3], True)
    if micro_batch == 2 and kind != "letters":  # another process's groups; the letters' captions are encoded together
        assert torch.equal(two.trajectory.x, found.x[:, 2 * K :])


@pytest.mark.parametrize("kind", ["sd3", "flux"])
def test_a_shared_walk_leaves_the_ratio_at_exactly_one(kind, world):
    model, prompts = a_model(kind, world)
    settings = dataclasses.replace(SMALL, steps=5, window=2, same_noise=True, micro_batch=5, iterations=2)
    reward = lambda images, prompts: images.mean((1, 2, 3))  # noqa: E731
    state = start(model, settings)
    state.bandwidth = state.kernel = 1.0  # not calibrated: that takes longer than all the rest
    states = train(
        model, prompts, reward, lambda images: images.mean((2, 3)), METHODS["pec"](clip=1e-2), settings, state
    )
    seen = [(s.samples.trajectory.steps[0], s.metrics["ratio_error"], s.metrics["grad_norm"]) for s in states]
    assert {first for first, _, _ in seen} > {0} and all(error == 0 < norm for _, error, norm in seen)
