"""Rewards by name, and their weighted sums."""

import pytest
import torch

from ref.scoring.encoders import load_encoder
from ref.scoring.load import WeightedSum, load_reward
from ref.scoring.reward import Reward
from ref.scoring.rules import JPEG

from .tools import PROMPTS, Calls


def test_each_image_is_scored_with_its_own_prompt_whatever_the_batch(folders, hps, images):
    for name in (f"pickscore={folders['clip']}", hps, f"aesthetic={folders['siglip']}", "jpeg"):
        reward = load_reward(name)
        whole, order = reward(images, PROMPTS), [4, 2, 0, 1, 3]
        shuffled = reward(images[order], [PROMPTS[i] for i in order])
        # Another batch is another kernel, which adds up in another order. The longest chains of sums: in a tower 2
        # layers of (32 width + 17 or 77 tokens + 64), behind 3 x 8 x 8 pixels a patch, and in the aesthetic head
        # 32 + 1024 + 128 + 64 + 16; each of numbers whose sizes add up to a few times the result's, 4 here.
        terms, size = 2 * (32 + 77 + 64) + 192 + 1264 * name.startswith("aesthetic"), max(1.0, whole.abs().max().item())
        tolerance = terms * torch.finfo(torch.float32).eps * 4 * size
        torch.testing.assert_close(shuffled, whole[order], atol=tolerance, rtol=0)
        halves = torch.cat([reward(images[:2], PROMPTS[:2]), reward(images[2:], PROMPTS[2:])])
        torch.testing.assert_close(halves, whole, atol=tolerance, rtol=0)
        mistaken = reward(images, PROMPTS[1:] + PROMPTS[:1]) if name not in ("jpeg",) and "siglip" not in name else reward(images.flip(0), PROMPTS)  # fmt: skip
        assert (mistaken - whole).abs().max() > 3 * tolerance, name  # what a mistake would look like
    with pytest.raises(ValueError, match="one prompt for each image, got 5 and 4"):
        reward(images, PROMPTS[:4])


def test_phi_and_a_reward_of_the_same_model_share_one_forward_pass(folders, images):
    name = f"pickscore={folders['clip']}"
    phi = load_encoder(name)
    shared, separate = load_reward(f"{name}+jpeg:0.5", encoders=[phi]), load_reward(f"{name}+jpeg:0.5")
    calls, text = Calls(phi.model.vision_model), Calls(phi.model.text_model)
    for iteration in range(3):
        batch = images + 0.01 * iteration
        value = shared(batch, PROMPTS)
        phi(batch)
        assert calls.count == iteration + 1 and text.count == len(set(PROMPTS))  # a prompt is read once
        torch.testing.assert_close(value, separate(batch, PROMPTS))
    assert separate.rewards[0].encoder is not phi
    other = load_reward(f"clip_score=clip={folders['clip']}", encoders=[phi])
    assert other.encoder is not phi  # another name is another model


def test_a_weighted_sum_is_the_sum_and_names_what_went_wrong(folders, images):
    name = f"pickscore={folders['clip']}"
    total = load_reward(f"pickscore:0.7={folders['clip']}+jpeg:-0.3")
    expected = 0.7 * load_reward(name)(images, PROMPTS) - 0.3 * load_reward("jpeg")(images, PROMPTS)
    torch.testing.assert_close(total(images, PROMPTS), expected)
    assert total.name == "0.7 pickscore + -0.3 jpeg"

    class Broken(Reward):
        def score(self, images, prompts):
            return torch.tensor([torch.nan if prompt == "seven" else 1.0 for prompt in prompts])

    with pytest.raises(ValueError, match="broken returned a NaN or infinite value for the prompt 'seven'"):
        WeightedSum([(1.0, JPEG("jpeg")), (0.0, Broken("broken"))])(images, PROMPTS)


def test_a_nan_image_has_a_nan_score_in_every_reward(folders, images):
    images[1] = torch.nan
    for name in (f"pickscore={folders['clip']}", "jpeg"):
        assert load_reward(name)(images, PROMPTS).isnan().tolist() == [False, True, False, False, False]


@pytest.mark.parametrize(
    "specification, message",
    [
        ("", "unknown reward ''"),
        ("pikscore", "unknown reward 'pikscore'; did you mean pickscore\\? write NAME"),
        ("jpeg+", "unknown reward ''"),
        ("jpeg:half", "the weight of jpeg must be a number, as in jpeg:0.5"),
        ("jpeg:nan", "the weight of jpeg must be a number"),
        ("jpeg:", "the weight of jpeg must be a number"),
        ("jpeg:0.3+ocr:0,7", "the weight of ocr must be a number"),
        ("jpeg:0", "'jpeg:0' has the weight 0 and would be computed for nothing; leave jpeg out"),
        ("pickscore+ocr:-0.0", "has the weight 0"),
        (
            "pickscore=/no/such:0.7+jpeg",
            "a weight stands before its source: pickscore:0.7=/no/such, not 'pickscore=/no/such:0.7'",
        ),
        ("ocr=/models/ocr", "ocr is a rule and loads nothing; write ocr without =/models/ocr"),
        ("jpeg:0.5=x", "jpeg is a rule"),
        ("pickscore=/nowhere", "there is no folder /nowhere"),
        ("aesthetic={clip}", "holds a model of type clip, not siglip"),
        ("image_reward={clip}", "has no med_config.json"),
    ],
)
def test_a_wrong_specification_gets_one_line(specification, message, folders):
    with pytest.raises((ValueError, OSError), match=message) as caught:
        load_reward(specification.format(**folders))
    assert "\n" not in str(caught.value)
