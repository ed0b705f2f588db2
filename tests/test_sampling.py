"""Which prompts, which samples, which micro-batches; and networks that return a NaN."""

import dataclasses

import pytest
import torch

from ref.grpo import train
from ref.methods import METHODS
from ref.sampling import chunks, pick_prompts
from ref.settings import Settings
from ref.worlds import digits

from .small import PROMPTS, SMALL, small_model


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
    with pytest.raises(ValueError, match="broken reward returned a NaN.*a handwritten"):
        next(train(model, PROMPTS, broken, phi, METHODS["flow_grpo"](), SMALL))


def test_micro_batch_zero_is_refused_where_nobody_found_it():
    model, reward, phi, _ = digits.load()
    model.add_lora(4, 8)
    with pytest.raises(ValueError, match="let scale.microbatch find it first"):
        next(train(model, digits.PROMPTS, reward, phi, METHODS["flow_grpo"](), Settings(micro_batch=0)))
