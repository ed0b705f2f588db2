"""GenEval's rules on drawn masks, and the reward on a tiny random Mask2Former and CLIP of the real classes."""

import json
import re

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from ref.models import tiny
from ref.models.prompts import read_prompts
from ref.scoring.encoders import load_encoder
from ref.scoring.geneval import CLASSES, COLORS, Thing, shares, stands
from ref.scoring.load import check_prompts, load_reward
from ref.train import main

from ..small import LARGE_SETTINGS, options
from ..tools import flags

COUNTING = {"tag": "counting", "prompt": "a photo of two dogs", "include": [{"class": "dog", "count": 2}],
            "exclude": [{"class": "dog", "count": 3}]}  # fmt: skip
COLORED = {"tag": "color_attr", "prompt": "a photo of a red cup and a blue dog",
           "include": [{"class": "cup", "count": 1, "color": "red"}, {"class": "dog", "count": 1, "color": "blue"}]}  # fmt: skip
PLACED = {"tag": "position", "prompt": "a photo of a dog left of a cup",
          "include": [{"class": "cup", "count": 1}, {"class": "dog", "count": 1, "position": ["left of", 0]}]}  # fmt: skip


def drawn(left: int, top: int, width: int, height: int, sure: float = 0.5) -> Thing:
    mask = torch.zeros(100, 100, dtype=torch.bool)
    mask[top : top + height, left : left + width] = True
    return Thing(sure, mask)


def blind(thing, kind):
    raise AssertionError("no colour was asked for")


def test_a_box_holds_its_mask():
    ring = drawn(10, 20, 30, 40)
    ring.mask[25:50, 15:35] = False
    assert ring.box == (10, 20, 40, 60)


@pytest.mark.parametrize("there, expected", [(0, [0, 1]), (1, [0.5, 1]), (2, [1, 1]), (3, [1, 2 / 3]), (5, [1, 0.4])])
def test_objects_are_counted_and_those_too_many_are_seen(there, expected):
    found = {"dog": [drawn(10 * n, 0, 5, 5) for n in range(there)]} if there else {}
    assert shares(COUNTING, found, blind) == expected


def test_the_surest_object_has_to_have_the_colour():
    looked = []

    def color(thing, kind):
        looked.append((kind, thing.sure))
        return {"cup": "red", "dog": "blue" if thing.sure > 0.6 else "green"}[kind]

    found = {"cup": [drawn(0, 0, 9, 9)], "dog": [drawn(50, 0, 9, 9, 0.9), drawn(50, 50, 9, 9, 0.4)]}
    assert shares(COLORED, found, color) == [1, 1, 1, 1]
    assert looked == [("cup", 0.5), ("dog", 0.9)]
    found["dog"].reverse()
    assert shares(COLORED, found, color) == [1, 1, 1, 0]
    assert shares(COLORED, {"dog": found["dog"]}, color) == [0, 0, 1, 0]


def test_sides_need_a_tenth_of_both_boxes_and_half_of_the_distance():
    """Boxes of 20 by 20: centres up to 0.1 (20 + 20) = 4 apart are on no side."""
    here = drawn(40, 40, 20, 20)
    for side, dx, dy in (("left of", -1, 0), ("right of", 1, 0), ("above", 0, -1), ("below", 0, 1)):
        for distance in (3, 4, 7, 8, 9, 30):  # (distance - 4) / distance exceeds a half from 8 on
            there = drawn(40 + dx * distance, 40 + dy * distance, 20, 20)
            assert stands(there, side, here) == (distance > 8)
            for other in {"left of", "right of", "above", "below"} - {side}:
                assert not stands(there, other, here)
    corner = drawn(70, 70, 20, 20)  # 26 of 30 sqrt 2, each way
    assert stands(corner, "right of", here) and stands(corner, "below", here)
    assert not stands(corner, "left of", here)


def test_a_place_is_relative_to_its_clause():
    cup, left, right = drawn(40, 40, 20, 20), drawn(5, 40, 20, 20), drawn(75, 40, 20, 20)
    assert shares(PLACED, {"cup": [cup], "dog": [left]}, blind) == [1, 1, 1]
    assert shares(PLACED, {"cup": [cup], "dog": [right, left]}, blind) == [1, 1, 0]  # the surest one alone
    assert shares(PLACED, {"dog": [left]}, blind) == [0, 1, 0]  # nothing to be left of


@st.composite
def scenes(draw):
    place = st.tuples(st.integers(0, 80), st.integers(0, 80), st.integers(1, 20), st.integers(1, 20))
    return {kind: [drawn_at for drawn_at in draw(st.lists(place, max_size=4))] for kind in ("cup", "dog")}


@given(scenes(), st.integers(1, 3), st.integers(1, 3), st.booleans(), st.sampled_from(["left of", "above"]))
def test_all_shares_are_one_where_genevals_verdict_is_yes(scene, cups, dogs, colored, side):
    """Against the verdict put into a formula of its own: for all, for any, no fractions."""
    found = {kind: [drawn(*place) for place in places] for kind, places in scene.items() if places}
    color = lambda thing, kind: "red" if thing.box[0] % 2 else "blue"  # noqa: E731
    wants = {"include": [{"class": "cup", "count": cups} | ({"color": "red"} if colored else {}),
                         {"class": "dog", "count": dogs, "position": [side, 0]}],
             "exclude": [{"class": "dog", "count": dogs + 1}]}  # fmt: skip
    looked, near = scene["cup"][:cups], scene["dog"][:dogs]
    axis = 0 if side == "left of" else 1

    def before(a, b):
        gap = [(b[i] + b[i + 2] / 2) - (a[i] + a[i + 2] / 2) for i in (0, 1)]
        inner = gap[axis] - 0.1 * (a[axis + 2] + b[axis + 2])
        return gap[axis] > 0 and inner > 0.5 * (gap[0] ** 2 + gap[1] ** 2) ** 0.5 + 1e-9

    yes = len(looked) == cups and len(scene["dog"]) == dogs and all(before(a, b) for a in near for b in looked)
    yes = yes and (not colored or all(place[0] % 2 for place in looked))
    assert (min(shares(wants, found, color)) == 1) == yes


@pytest.fixture(scope="module")
def source(folders):
    tiny.mask2former(folders["clip"].parent / "mask2former")
    return folders["clip"].parent


@pytest.fixture
def prompts(tmp_path):
    path = tmp_path / "evaluation_metadata.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in (COUNTING, COLORED, PLACED)))
    return read_prompts(path)


def test_a_detector_of_the_real_class_finds_draws_and_is_judged(source, images, prompts):
    reward, strict = (load_reward(f"{name}={source}") for name in ("geneval", "geneval_strict"))
    found = reward.find(images, [0.3] * len(images))
    things = [thing for one in found for group in one.values() for thing in group]
    assert things and all(0.3 < thing.sure <= 1 and thing.mask.shape == images.shape[2:] for thing in things)
    assert all(kind in CLASSES for one in found for kind in one)
    assert all([t.sure for t in g] == sorted((t.sure for t in g), reverse=True) for one in found for g in one.values())
    surer = reward.find(images, [0.45] * len(images))
    assert sum(map(len, (g for one in surer for g in one.values()))) < len(things)
    one = sum(map(len, reward.find(images[:2], [0.45, 0.3])[1].values()))  # each has a confidence of its own
    assert one == sum(map(len, found[1].values())) > sum(map(len, surer[1].values()))
    # the same picture in another batch: what is found there does not hang on its neighbours
    alone = reward.find(images[2:3], [0.3])[0]
    assert {k: len(v) for k, v in alone.items()} == {k: len(v) for k, v in found[2].items()}

    there = max(found[0], key=lambda kind: len(found[0][kind]))
    n = len(found[0][there])
    for wanted, (mean, verdict) in {n: (1, 1), 2 * n: (0.5, 0)}.items():
        prompts[0].wants = {"tag": "two", "include": [{"class": there, "count": wanted}]}
        assert reward(images[:1], prompts[:1]).item() == pytest.approx(mean)
        assert strict(images[:1], prompts[:1]).item() == verdict
    prompts[0].wants = {"tag": "counting", "include": [{"class": there, "count": 1}]}  # where 0.9 is wanted
    assert all(thing.sure < 0.9 for thing in things) and reward(images[:1], prompts[:1]).item() == 0
    assert reward(images[:3], prompts).shape == (3,)


def test_a_colour_is_that_of_what_is_under_the_mask(source, images):
    reward, clip = load_reward(f"geneval={source}"), load_encoder(f"clip={source / 'clip'}")
    image, thing = images[0].clone(), drawn(8, 8, 16, 8)
    thing = Thing(1.0, thing.mask[: image.shape[1], : image.shape[2]])
    said = reward.color(image, thing, "dog")
    cut = image[None, :, 8:16, 8:24]
    texts = [[f"a photo of a {c} dog", f"a photo of a {c}-colored dog", f"a photo of a {c} object"] for c in COLORS]
    mean = torch.stack([clip.text(forms).mean(0) for forms in texts])
    assert said == COLORS[(mean / mean.norm(dim=1, keepdim=True) @ clip(cut)[0]).argmax()]
    image[:, ~thing.mask] = 0  # what is around it does not count
    assert reward.color(image, thing, "dog") == said
    thing.mask[8:16, 8:16] = False  # half of the box is the background's grey now
    thing.mask[8, 8] = True
    grey = torch.where(thing.mask, image, 0x99 / 255)[None, :, 8:16, 8:24]
    assert reward.color(image, thing, "dog") == COLORS[(mean / mean.norm(dim=1, keepdim=True) @ clip(grey)[0]).argmax()]


def test_a_run_is_trained_on_it_and_resumed(source, prompts, world, tmp_path):
    """Prompts keep what they want on their way to the reward; checkpoints hold plain text."""
    given = options(world, "sd3") | LARGE_SETTINGS
    given |= dict(prompts=tmp_path / "evaluation_metadata.jsonl", reward=f"geneval={source}+jpeg", iterations=1)
    del given["evaluation_prompts"]
    command = ["--preset", "sd35_medium", "--method", "flow_grpo", "--encoder", f"clip={source / 'clip'}"]
    command += ["--output-dir", str(tmp_path / "out"), *flags(given)]
    assert main(command) == 0
    assert main(["--output-dir", str(tmp_path / "out"), "--resume", "--iterations", "2"]) == 0
    assert len(json.loads((tmp_path / "out" / "metrics.json").read_text())) == 2


WRONG = {
    "no include": ({"prompt": "a cat"}, "needs what a prompt asks for, its \"include\" in a .jsonl file"),
    "an unknown class": ({"include": [{"class": "mouse", "count": 1}]}, "no object is called 'mouse'"),
    "a spelling": ({"include": [{"class": "zebras", "count": 1}]}, "did you mean zebra"),
    "no count": ({"include": [{"class": "dog"}]}, "count is missing"),
    "count 0": ({"include": [{"class": "dog", "count": 0}]}, "count must be a number from 1, got 0"),
    "a colour": ({"include": [{"class": "dog", "count": 1, "color": "beige"}]}, "color must be one of red, .*'beige'"),
    "a place": ({"include": [{"class": "dog", "count": 1, "position": ["on", 0]}]}, "position must be one of left of"),
    "a place by itself": ({"include": [{"class": "dog", "count": 1, "position": ["above", 0]}]}, "an earlier clause"),
    "nothing": ({"include": []}, "include is empty"),
    "no list": ({"include": 3}, "cannot read 'a photo'"),
}  # fmt: skip


@pytest.mark.parametrize("case", WRONG)
def test_a_prompt_that_cannot_be_judged_is_refused_before_anything_is_loaded(case, tmp_path):
    line, message = WRONG[case]
    (tmp_path / "p.jsonl").write_text(json.dumps({"prompt": "a photo"} | line) + "\n")
    prompts = read_prompts(tmp_path / "p.jsonl")
    with pytest.raises(ValueError, match=message) as caught:
        check_prompts("jpeg+geneval:0.5=/nowhere", prompts)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "source, message",
    [
        ("/nowhere", "there is no folder /nowhere/mask2former"),
        ("{twisted}", "holds a model of type clip, not mask2former"),
    ],
)
def test_a_wrong_folder_gets_one_line(source, message, folders, tmp_path):
    (tmp_path / "mask2former").symlink_to(folders["clip"])
    with pytest.raises((ValueError, OSError), match=re.escape(message)):
        load_reward(f"geneval={source.format(twisted=tmp_path)}")
