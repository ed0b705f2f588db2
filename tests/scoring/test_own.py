"""Rewards and encoders of one's own: a function or a class in a file, by name or handed over in Python."""

import dataclasses
import re

import pytest
import torch

from ref.presets import PRESETS
from ref.sampling import ask
from ref.scoring.encoders import load_encoder
from ref.scoring.load import check_prompts, load_reward, parse
from ref.scoring.own import inside, is_own
from ref.train import main, run

from ..small import LARGE_SETTINGS, options, pipeline
from ..tools import exit_code, flags

FILE = """
import torch

def red(images, prompts):
    return images[:, 0].mean((1, 2)).tolist()

def colours(images):
    return images.mean((2, 3))

class Loaded:
    made = 0
    def __init__(self):
        type(self).made += 1
    @staticmethod
    def check_prompts(prompts):
        if "seven" in prompts:
            raise ValueError("seven cannot be judged")
    def __call__(self, images, prompts):
        return torch.ones(len(images))

class Silent:
    pass

def short(images, prompts):
    return images[:1, 0, 0, 0]

number = 3
"""


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "my_file.py"
    path.write_text(FILE)
    return path


def test_a_sum_holds_one_s_own_rewards(file, images):
    prompts = ["x"] * len(images)
    total = load_reward(f"{file}:red:0.5+jpeg:-2+{file}:Loaded")
    expected = 0.5 * images[:, 0].mean((1, 2)) - 2 * load_reward("jpeg")(images, prompts) + 1
    torch.testing.assert_close(ask(total, images, prompts), expected)
    torch.testing.assert_close(ask(load_reward(f"{file}:red"), images, prompts), images[:, 0].mean((1, 2)))
    torch.testing.assert_close(load_encoder(f"{file}:colours")(images), images.mean((2, 3)))


def test_a_class_is_made_when_it_is_loaded_and_asked_about_prompts_before(file, images):
    check_prompts(f"{file}:Loaded", ["six"])
    with pytest.raises(ValueError, match="seven cannot be judged"):
        check_prompts(f"jpeg+{file}:Loaded:2", ["six", "seven"])
    assert inside(str(file))["Loaded"].made == 0
    load_reward(f"{file}:Loaded")
    assert inside(str(file))["Loaded"].made == 1


@pytest.mark.parametrize(
    "term, parts",
    [
        ("a/b c.py:f", (1.0, "a/b c.py:f", None)),
        (r"C:\x\my.py:f:0.5", (0.5, r"C:\x\my.py:f", None)),
        ("http://x.py:80/score", (1.0, "http://x.py:80/score", None)),
        ("http://localhost:8000", (1.0, "http://localhost:8000", None)),
        ("http://localhost:8000:0.5", (0.5, "http://localhost:8000", None)),
        ("https://[::1]:80/a/b:2", (2.0, "https://[::1]:80/a/b", None)),
        ("http://host/score:0.25", (0.25, "http://host/score", None)),
        ("pickscore:2=http://x:80/y", (2.0, "pickscore", "http://x:80/y")),
    ],
)
def test_names_weights_and_ports_are_told_apart(term, parts):
    assert parse(f"{term}+jpeg") == [parts, (1.0, "jpeg", None)]
    assert is_own(parts[1]) == (".py:" in parts[1] and "://" not in parts[1])


WRONG = {
    "no such file": ("--reward", "{folder}/other.py:red", "there is no file .*other.py; write FILE.py:NAME"),
    "no such name": ("--reward", "{file}:blue", "my_file.py defines no blue"),
    "no function": ("--reward", "{file}:number:0.5", "number is of type int, not a function"),
    "no callables": ("--encoder", "{file}:Silent", "Silent is a class without __call__"),
    "an encoder as a reward": ("--reward", "{file}:colours", r"colours must take \(images, prompts\): too many"),
    "a reward as an encoder": ("--encoder", "{file}:red", r"red must take \(images\): missing .* 'prompts'"),
    "a file that fails": ("--reward", "{broken}:red", "broken.py cannot be run: ZeroDivisionError: division by zero"),
    "a bad weight": ("--reward", "{file}:red:much", "the weight of .*red must be a number"),
    "another number of rewards": ("--reward", "{file}:short", "short must return one number for each of the"),
}


@pytest.mark.parametrize("case", WRONG)
def test_what_is_wrong_gets_one_line_and_leaves_nothing(case, file, world, tmp_path, capsys):
    option, given, message = WRONG[case]
    broken = tmp_path / "broken.py"
    broken.write_text("1 / 0")
    given = {option[2:]: given.format(file=file, folder=tmp_path, broken=broken)}
    arguments = options(world, "sd3") | dict(encoder=f"{file}:colours") | given
    out = tmp_path / "out"
    command = ["--preset", "sd35_medium", "--method", "pec", "--output-dir", out, *flags(arguments | LARGE_SETTINGS)]
    assert exit_code(main, command) == 2
    [line] = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert re.search(message, line), line
    assert not out.exists()


@pytest.mark.parametrize("preset", ["mixture", "sd35_medium"])
def test_python_hands_functions_over(preset, world, tmp_path):
    """The loop trains on them, and a resumed run with others is refused."""
    asked = []

    def bright(images, prompts):
        asked.append(len(prompts))
        return images.flatten(1).mean(1)

    def pixels(images):
        return images.flatten(1)

    small = dict(iterations=1, groups=2, group_size=2, updates=1, micro_batch=4)
    settings = dataclasses.replace(PRESETS[preset].settings, **LARGE_SETTINGS | small)
    given = dict(settings=settings, progress=False, options=None if preset == "mixture" else pipeline(world, "sd3"))
    result = run(preset, "pec", tmp_path, reward=bright, encoder=pixels, **given)
    images = result["images"].flatten(1)
    assert result["final"]["reward"] == pytest.approx(images.mean(1).mean().item(), rel=1e-5)
    groups = images.unflatten(0, (-1, settings.images_per_prompt))
    variance = groups.var(1, correction=1).sum(-1).mean().item()
    assert result["final"]["feature_variance"] == pytest.approx(variance, rel=1e-4)
    assert 4 in asked
    with pytest.raises(
        ValueError, match=f"holds a run with reward = bright, not {'None' if preset == 'mixture' else 'pickscore'}"
    ):
        run(preset, "pec", tmp_path, encoder=pixels, resume=True, **given)
