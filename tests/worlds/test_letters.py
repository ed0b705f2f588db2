"""The letters: licences and masks, what the judges and rewards see, what the base model draws."""

import csv

import numpy as np
import pytest
import torch

from ref.metrics import feature_variance
from ref.sampling import sample
from ref.worlds import letters
from ref.worlds.letters import data, fonts
from ref.worlds.letters.base import main
from ref.worlds.letters.captions import CaptionEncoder
from ref.worlds.letters.quality import main as quality
from ref.worlds.letters.spoil import jpeg, spoil

PARTS = (
    "vae",
    "transformer",
    *(f"{n}.safetensors" for n in ("captions", "phi", "sharp", "rater", "preference", "held_out", "faces")),
)
MISSING = [part for part in PARTS if not (letters.WEIGHTS / part).exists()]
trained = pytest.mark.skipif(bool(MISSING), reason=f"still in training: {', '.join(MISSING)}")


@pytest.fixture(scope="module")
def heads():
    return letters.read_heads(letters.WEIGHTS)


@pytest.fixture(scope="module")
def judge():
    return letters.Judge()


def drawn(count, seed=3, **options):
    """Renders and their prompts."""
    images, which, faces = letters.renders(count, torch.Generator().manual_seed(seed), **options)
    return images, [letters.PROMPTS[c] for c in which], faces


# the data


def test_packing_keeps_sixteen_levels(rng):
    masks = torch.rand(3, 2, 32, 32, generator=rng).numpy()
    again = data.unpack(data.pack(masks))
    assert np.abs(again - masks).max() <= 0.5 / 15 + 1e-6
    np.testing.assert_array_equal(data.unpack(data.pack(again)), again)


def test_every_face_is_listed_with_a_plainly_free_licence():
    with open(letters.WEIGHTS / "faces.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    masks = letters.masks()
    assert masks.shape == (len(rows), 26, 32, 32) and len(rows) >= 300
    assert len({row["face"] for row in rows}) == len(rows)
    assert {row["licence"] for row in rows} <= set(fonts.PLAIN)
    assert all(row["package"] and row["family"] for row in rows)
    assert (masks.amax((2, 3)) > 0.3).all()


@pytest.mark.parametrize(
    "words, expected",
    [
        ("This Font Software is licensed under the SIL Open Font License, Version 1.1.", "OFL-1.1"),
        ("Licensed under the Apache License, Version 2.0", "Apache-2.0"),
        ("This work is released under the GUST Font License", "GFL"),
        ("Copyright 2014. This work is released under the LPPL", "LPPL"),
        ("GPL with font exception and OFL", None),  # two licences: not plain
        ("A nearly free font. The license is based on the SIL Open Font License", None),
        ("SIL Open Font License; free for personal use", None),
        ("All rights reserved.", None),
    ],
)
def test_licences_are_taken_at_their_word(words, expected):
    assert fonts.licence(words) == expected


def make_font(file, name, licence, width):
    """A font whose letters are bars, `width` units wide."""
    from fontTools.fontBuilder import FontBuilder
    from fontTools.pens.ttGlyphPen import TTGlyphPen

    pen = TTGlyphPen(None)
    (
        pen.moveTo((50, 0)),
        pen.lineTo((50, 700)),
        pen.lineTo((50 + width, 700)),
        pen.lineTo((50 + width, 0)),
        pen.closePath(),
    )
    bar, order = pen.glyph(), [".notdef", *letters.LETTERS]
    font = FontBuilder(1000)
    font.setupGlyphOrder(order)
    font.setupCharacterMap({ord(c): c for c in letters.LETTERS})
    font.setupGlyf({c: bar for c in order})
    font.setupHorizontalMetrics({c: (width + 100, 50) for c in order})
    font.setupHorizontalHeader(ascent=800, descent=-200)
    font.setupNameTable({"familyName": name, "styleName": "Regular", "fullName": name, "licenseDescription": licence})
    font.setupOS2(), font.setupPost()
    file.parent.mkdir(parents=True, exist_ok=True)
    font.save(file)


def test_masks_are_drawn_from_free_fonts_only(tmp_path):
    make_font(tmp_path / "one" / "a.ttf", "Bar", "SIL Open Font License", 300)
    make_font(tmp_path / "two" / "b.ttf", "Closed", "All rights reserved", 300)
    (tmp_path / "two" / "broken.otf").write_bytes(b"OTTO")
    (face,) = fonts.free_faces(tmp_path)
    assert face[1:] == ("Bar", "Bar", "one", "OFL-1.1")
    masks = fonts.render(face.file)
    assert masks.shape == (26, 32, 32)
    expected = 20 * 20 * 300 / 700  # H is 20 pixels high
    assert masks.sum((1, 2)) == pytest.approx(expected, rel=0.1)
    x = (masks.sum(1) * np.arange(32)).sum(1) / masks.sum((1, 2))
    assert x == pytest.approx(15.5, abs=0.3)  # centred


def test_of_look_alikes_one_stays(rng):
    masks = torch.rand(6, 26, 32, 32, generator=rng).numpy()
    masks[3], masks[5] = masks[1] + 1e-3, masks[1] - 1e-3
    left = fonts.unlike(masks, 4)
    assert len(left) == 4 and {0, 2, 4} < set(left)


def test_no_fonts_is_one_line(tmp_path, capsys):
    assert fonts.main([str(tmp_path)]) == 2
    assert "no free font" in capsys.readouterr().err


# what is seen of an image


def test_colours_have_contrast_in_both_polarities(rng):
    ink, paper = letters.palettes(4000, rng)
    difference = data.luma(ink) - data.luma(paper)
    assert difference.abs().min() >= data.CONTRAST
    assert 0.4 < (difference > 0).float().mean() < 0.6


def test_ink_is_found_whatever_the_colours(rng):
    """Oracle: the mask and the palette that the image was painted with."""
    mask = letters.masks()[:40, 7]
    mask = mask / mask.amax((1, 2), keepdim=True)
    ink, paper = letters.palettes(40, rng)
    where, contrast = letters.ink(letters.paint(mask, ink, paper))
    assert (where - mask).abs().mean() < 0.05
    torch.testing.assert_close(contrast, data.luma(ink - paper).abs(), rtol=0.15, atol=0)
    blank, none = letters.ink(paper[..., None, None].expand(-1, 3, 32, 32))
    assert blank.max() == 0 and none.max() < 1e-6


def test_right_counts_pixels(rng):
    images, _, _ = drawn(40, letters=torch.full((40,), 8))
    moved = images.roll(2, 3)
    torch.testing.assert_close(letters.right(moved) - letters.right(images), torch.full((40,), 2.0), atol=0.1, rtol=0)
    torch.testing.assert_close(letters.right(images.flip(3)), -letters.right(images), atol=1e-3, rtol=0)


def test_jpeg_loses_nothing_at_step_zero_and_much_at_a_large_one(rng):
    images, _, _ = drawn(8)
    torch.testing.assert_close(jpeg(images, torch.zeros(8, 1, 1, 1)), images, atol=0.02, rtol=0)
    assert (jpeg(images, torch.full((8, 1, 1, 1), 0.5)) - images).square().mean() > 1e-3


def test_captions_must_be_understood():
    assert letters.label("a letter Q") == 16
    with pytest.raises(ValueError, match="unknown word 'digit'"):
        CaptionEncoder().tokens(["a digit Q"])
    for caption in ("a letter", "a letter A B"):
        with pytest.raises(ValueError, match="exactly one capital"):
            letters.label(caption)


# judges and rewards


def test_rapidocr_reads_renders_and_nothing_else(judge):
    images, prompts, _ = drawn(156)
    assert judge(images, prompts) > 0.93
    assert judge(images, prompts[1:] + prompts[:1]) < 0.15
    blank = images[:, :, :1, :1].expand_as(images)
    assert judge(blank, prompts) < 0.05


def test_the_rule_wants_letters_to_the_right(judge):
    reward = letters.Lean(judge)
    images, prompts, _ = drawn(52, letters=torch.arange(26).repeat(2))
    assert reward(images.roll(4, 3), prompts).mean() > 0.6 > 0.2 > reward(images, prompts).mean()
    assert reward(images.roll(4, 3), prompts[1:] + prompts[:1]).mean() < 0.1


@trained
def test_phi_sees_face_and_hue_and_is_blind_to_blotches(heads):
    phi, g = heads["phi"], torch.Generator().manual_seed(5)
    masks = letters.masks()[::6, 0]
    ink, paper = letters.palettes(len(masks), g)
    images = letters.paint(masks, ink, paper)
    features = phi(images)
    torch.testing.assert_close(features.norm(dim=1), torch.ones(len(images)))
    spoilt = (phi(spoil(images, g)) - features).square().sum(1).mean()
    other_face = (phi(letters.paint(masks.roll(1, 0), ink, paper)) - features).square().sum(1).mean()
    other_hue = (phi(letters.paint(masks, ink.roll(1, 0), paper.roll(1, 0))) - features).square().sum(1).mean()
    assert 3 * spoilt < min(other_face, other_hue)


@trained
def test_preference_models_predict_the_rater_on_unseen_pairs(heads):
    which = torch.randint(26, (600,), generator=torch.Generator().manual_seed(1))
    (left, prompts, _), (right, _, _) = (drawn(600, seed, letters=which) for seed in (11, 12))
    better = heads["rater"](left, prompts) > heads["rater"](right, prompts)
    for name in ("preference", "held_out"):
        scores = heads[name](left, prompts)
        assert ((scores > heads[name](right, prompts)) == better).float().mean() > 0.75
        assert abs(scores.mean()) < 0.2 and 0.8 < scores.std() < 1.2


@trained
def test_rater_wants_legible_heavy_contrasty_letters(heads):
    rater = heads["rater"]
    images, prompts, _ = drawn(400)
    values = rater(images, prompts)
    where, contrast = letters.ink(images)
    heavy = (where.mean((1, 2)) > 0.15) & (contrast > 0.5)
    assert values[heavy].mean() > 0.8 > 0.6 > values[~heavy].mean()
    assert rater(images, prompts[1:] + prompts[:1]).mean() < 0.15
    assert rater(images[:, :, :1, :1].expand_as(images).contiguous(), prompts).max() < 0.3


@trained
def test_effective_faces_count_faces(heads):
    faces = heads["faces"]
    which = torch.arange(26).repeat_interleave(60)
    images, prompts, _ = drawn(len(which), letters=which)
    assert faces.effective_number(images, prompts) > 0.5 * len(letters.masks())
    ink, paper = letters.palettes(60, torch.Generator().manual_seed(0))
    two = letters.paint(letters.masks()[:2, 0].repeat(30, 1, 1), ink, paper)
    assert faces.effective_number(two, letters.PROMPTS[:1] * 60) == pytest.approx(2, rel=0.2)


# the base model


@trained
def test_base_model_draws_what_the_caption_says_in_many_faces(heads, judge):
    model, reward, phi, _ = letters.load()
    samples = sample(model, letters.PROMPTS, 6, model.schedule(10).ode(), ("test",))
    which = letters.labels(samples.prompts)
    images, prompts, _ = drawn(len(which), letters=which)
    assert judge(samples.images, samples.prompts) > 0.5
    variance, real = (feature_variance(phi(x).unflatten(0, (26, 6))).mean() for x in (samples.images, images))
    assert variance > 0.85 * real
    assert reward(samples.images, samples.prompts).isfinite().all()


def test_training_in_fast_mode_resumes_and_is_loaded(tmp_path, capsys):
    short = [
        "--output-dir",
        str(tmp_path),
        "--parts",
        "vae",
        "flow",
        "phi",
        "sharp",
        "rater",
        "preference",
        "held_out",
        "faces",
    ]
    assert main([*short, "--scale", "1e-6"]) == 0
    first = torch.load(tmp_path / "training" / "rater.pt", weights_only=True)
    assert first["step"] == 2
    assert main(["--output-dir", str(tmp_path), "--parts", "rater", "--scale", "0.003", "--resume"]) == 0
    again = torch.load(tmp_path / "training" / "rater.pt", weights_only=True)
    assert again["step"] == 3 and again["optimizer"]["state"][0]["step"] == 3
    assert not torch.equal(again["net"]["reader.0.weight"], first["net"]["reader.0.weight"])
    model, reward, phi, judge = letters.load(tmp_path)
    samples = sample(model, letters.PROMPTS[:2], 2, model.schedule(2).ode(), ("test",))
    assert 0 <= judge(samples.images, samples.prompts) <= 1
    capsys.readouterr()
    assert quality([str(tmp_path), "--images", "2", "--steps", "2", "--guidance", "1.0"]) == 0
    assert "guidance 1" in capsys.readouterr().out


def test_missing_weights_name_the_command(tmp_path):
    with pytest.raises(FileNotFoundError, match="python -m ref.worlds.letters.base"):
        letters.load(tmp_path)
