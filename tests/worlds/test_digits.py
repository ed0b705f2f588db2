"""The digits: what the reward likes, what phi sees, what the base model draws."""

import numpy as np
import pytest
import torch

from ref.metrics import feature_variance
from ref.sampling import sample
from ref.worlds import digits


@pytest.fixture(scope="module")
def parts():
    return digits.load()


def test_slant_is_the_shear_that_was_put_in():
    """A vertical bar sheared by k pixels a row has slant k; mirrored, -k. Oracle: the regression slope of its ink."""
    image = torch.zeros(1, 1, 8, 8)
    for row in range(8):
        image[0, 0, row, 5 - row // 2] = 1  # leans right: higher rows lie further right
    ink = np.argwhere(image[0, 0].numpy() > 0)
    slope = np.polyfit(-ink[:, 0], ink[:, 1], 1)[0]
    assert digits.slant(image).item() == pytest.approx(-slope if slope < 0 else slope, rel=1e-5)
    assert digits.slant(image.flip(3)).item() == pytest.approx(-digits.slant(image).item(), rel=1e-5)


def test_reward_is_bounded_prefers_the_slant_and_no_blank_page_wins(parts):
    _, reward, _, _ = parts
    images, labels = digits.data()
    captions = [digits.PROMPTS[c] for c in labels]
    values = reward(images, captions)
    assert 0 <= values.min() and values.max() <= 1
    for c in range(10):
        mine = values[labels == c]
        right = digits.slant(images[labels == c]) > digits.slant_scale()[0][c]
        assert mine[right].mean() > mine[~right].mean() + 0.5
        for page in (torch.zeros, torch.ones):
            assert reward(page(1, 1, 8, 8), [digits.PROMPTS[c]]).item() < mine.mean()
    wrong = [digits.PROMPTS[(c + 1) % 10] for c in labels]
    assert reward(images, wrong).mean() < 0.05


def test_judge_and_reader_read_digits_that_they_never_saw(parts):
    """Both were trained on half of the data; over all of it at least 97 % are read."""
    _, reward, _, judge = parts
    images, labels = digits.data()
    captions = [digits.PROMPTS[c] for c in labels]
    assert digits.legibility(judge, images, captions) > 0.97
    assert digits.legibility(reward.reader, images, captions) > 0.97


def test_features_have_unit_norm_and_tell_writers_apart(parts):
    _, _, phi, _ = parts
    images, labels = digits.data()
    features = phi(images)
    torch.testing.assert_close(features.norm(dim=1), torch.ones(len(images)))
    sevens = features[labels == 7]
    A = np.c_[sevens.numpy(), np.ones(len(sevens))]
    target = digits.slant(images[labels == 7]).numpy()
    residual = target - A @ np.linalg.lstsq(A, target, rcond=None)[0]
    assert 1 - residual.var() / target.var() > 0.8  # the slant can be read off phi


def test_base_model_draws_what_the_caption_says_in_many_hands(parts):
    model, _, phi, judge = parts
    images, labels = digits.data()
    samples = sample(model, digits.PROMPTS, 32, model.schedule(10).ode(), ("test",))
    assert digits.legibility(judge, samples.images, samples.prompts) > 0.97
    variance = feature_variance(phi(samples.images).unflatten(0, (10, 32))).mean()
    real = torch.stack([feature_variance(phi(images[labels == c])[None])[0] for c in range(10)]).mean()
    assert variance > 0.85 * real


def test_captions_must_be_understood(parts):
    with pytest.raises(ValueError, match="unknown word 'typed'"):
        parts[0].encode(["a typed seven"])
    for caption in ("a handwritten", "seven or eight"):
        with pytest.raises(ValueError, match="exactly one digit"):
            digits.label(caption)


def test_missing_base_weights_name_the_command_that_makes_them(tmp_path):
    with pytest.raises(FileNotFoundError, match="python -m ref.worlds.digits_base"):
        digits.load(tmp_path)
