"""Rewards that a rule computes."""

from functools import cache

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageDraw, ImageFont

from ref.scoring.load import load_reward
from ref.scoring.reward import Reward
from ref.scoring.rules import JPEG, likeness, quoted

from .tools import pil


@cache
def ocr() -> Reward:
    return load_reward("ocr")


def written(text: str, size: int = 192) -> torch.Tensor:
    picture = Image.new("RGB", (size, size), "white")
    ImageDraw.Draw(picture).multiline_text((12, size // 3), text, "black", ImageFont.load_default(size // 8))
    return torch.from_numpy(np.array(picture)).permute(2, 0, 1).float() / 255


def test_ocr_reads_rendered_text():
    images = torch.stack([written("Open Door"), written("Open\nDoor"), written("Closed"), written("")])
    prompts = ['a sign that says "open door"'] * 4
    right, two_lines, wrong, empty = ocr()(images, prompts).tolist()
    assert right == two_lines == 1
    assert 0 <= wrong < 0.5 and empty == 0
    own = ocr()(images[1:3], ["a poster: “OPEN” and “DOOR”", 'the word "closed" in black'])
    assert own.tolist() == [1, 1]


def test_ocr_needs_quoted_text():
    assert quoted('a neon "Blue Note" over "BAR"') == "Blue Note BAR"
    for prompt in ("a sign without text", 'an empty "" quote', 'blank " " quote'):
        with pytest.raises(ValueError, match="needs a prompt with the text in double quotes, got"):
            ocr()(torch.ones(1, 3, 32, 32), [prompt])


letters = st.text("abC ", max_size=7)


@settings(max_examples=150, deadline=None)
@given(letters.filter(str.strip), letters)
def test_likeness_is_one_minus_the_normalised_edit_distance(target, read):
    """Oracle: the recursive definition of Levenshtein's distance."""
    a, b = target.lower().replace(" ", ""), read.lower().replace(" ", "")

    @cache
    def distance(i: int, j: int) -> int:
        if min(i, j) == 0:
            return max(i, j)
        edits = distance(i - 1, j) + 1, distance(i, j - 1) + 1, distance(i - 1, j - 1) + (a[i - 1] != b[j - 1])
        return min(edits)

    assert likeness(target, read) == pytest.approx(1 - distance(len(a), len(b)) / max(len(a), len(b)))


def test_jpeg_prefers_flat_images_and_measures_the_file(rng, tmp_path):
    flat, noise = torch.full((1, 3, 64, 64), 0.4), torch.rand(1, 3, 64, 64, generator=rng)
    smooth = torch.linspace(0, 1, 64).expand(1, 3, 64, 64)
    scores = JPEG("jpeg")(torch.cat([flat, smooth, noise]), [""] * 3)
    assert 1 > scores[0] > scores[1] > scores[2] > 0
    pil(noise)[0].save(tmp_path / "noise.jpg", quality=95)
    size = (tmp_path / "noise.jpg").stat().st_size
    assert scores[2].item() == pytest.approx(1 - size / (3 * 64 * 64))
