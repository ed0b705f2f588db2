"""Whatever a reward or an encoder returns: the right numbers in any form, or one line that says what is asked."""

import numpy as np
import pytest
import torch
from torch import nn

from ref.grpo import start, train
from ref.methods import METHODS
from ref.sampling import ask
from ref.scale.weights import trainable
from ref.settings import Settings
from ref.worlds.mixture import MixtureFlow, coordinates, ring

SMALL = Settings(iterations=1, groups=2, group_size=3, updates=1, steps=3, lr=1e-2, clip=0.2)
IMAGES, PROMPTS = torch.linspace(-1, 1, 12).view(6, 2), [f"prompt {n}" for n in range(6)]
NUMBERS = [0.5, 1.0, -2.0, 0.25, 4.0, 0.0]


@pytest.mark.parametrize(
    "answer",
    [
        torch.tensor(NUMBERS),
        torch.tensor(NUMBERS).double(),
        torch.tensor(NUMBERS).half(),
        torch.tensor(NUMBERS)[:, None],
        torch.tensor(NUMBERS, requires_grad=True),
        np.array(NUMBERS),
        NUMBERS,
        tuple(NUMBERS),
    ],
    ids=["float32", "float64", "float16", "column", "with gradient", "numpy", "list", "tuple"],
)
def test_the_right_numbers_in_any_form(answer):
    values = ask(lambda images, prompts: answer, IMAGES, PROMPTS)
    assert values.dtype == torch.float32 and not values.requires_grad and values.tolist() == NUMBERS


@pytest.mark.parametrize("answer", [[1, 0, 1, 1, 0, 0], torch.tensor([True, False] * 3), torch.arange(6)])
def test_integers_and_booleans_are_numbers(answer):
    assert ask(lambda images, prompts: answer, IMAGES, PROMPTS).tolist() == [float(n) for n in answer]


@pytest.mark.parametrize(
    "answer, word",
    [
        (torch.zeros(2), r"\[2\]"),  # one value a prompt in place of one a sample
        (0.5, r"\[\]"),
        (torch.zeros(6, 2), r"\[6, 2\]"),
        (torch.zeros(1, 6), r"\[1, 6\]"),
        (torch.zeros(6, dtype=torch.complex64), "complex"),
        (None, "NoneType"),
        ("good", "str"),
        ([1.0, None, 2.0, 3.0, 4.0, 5.0], "list"),
        ({"reward": 1.0}, "dict"),
    ],
)
def test_a_reward_that_returns_something_else_is_named(answer, word):
    def my_reward(images, prompts):
        return answer

    with pytest.raises(
        ValueError, match=rf"^my_reward must return one number for each of the 6 images.*{word}"
    ) as error:
        ask(my_reward, IMAGES, PROMPTS)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "answer, word",
    [
        (torch.zeros(3, 5), r"\[3, 5\]"),  # half of the rows
        (torch.zeros(6), r"\[6\]"),
        (torch.zeros(6, 0), r"\[6, 0\]"),
        (torch.zeros(6, 4, 4), r"\[6, 4, 4\]"),
        (torch.zeros(6, 2, dtype=torch.complex64), "complex"),
        ("good", "str"),
    ],
)
def test_an_encoder_that_returns_something_else_is_named(answer, word):
    def my_phi(images):
        return answer

    with pytest.raises(ValueError, match=rf"^my_phi must return a row of features for each of the 6 images.*{word}"):
        ask(my_phi, IMAGES, PROMPTS, features=True)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("features", [False, True])
def test_a_nan_is_named_with_its_prompt(bad, features):
    values = torch.ones(6, 2) if features else torch.ones(6)
    values[4] = bad
    with pytest.raises(ValueError, match="NaN or infinite value for the prompt 'prompt 4'"):
        ask(lambda *_: values, IMAGES, PROMPTS, features)


def test_images_that_a_network_writes_on_are_named():
    with pytest.raises(ValueError, match="changed the images in place"):
        ask(lambda images, prompts: images.mul_(2).sum(1), IMAGES.clone(), PROMPTS)


def test_an_unfrozen_network_costs_no_gradient_and_trains_the_policy_only():
    """It used to end in 'backward a second time'."""
    judge, model = nn.Linear(2, 1), MixtureFlow(ring(3))
    before = [w.detach().clone() for w in trainable(model).values()]
    phi = nn.Linear(2, 4)
    reward = lambda images, prompts: judge(images)  # noqa: E731
    for _ in train(model, [""] * 2, reward, phi, METHODS["pec"](0.1, clip=0.2), SMALL):
        pass
    assert judge.weight.grad is None and phi.weight.grad is None
    assert any(not torch.equal(a, b) for a, b in zip(before, trainable(model).values()))


@pytest.mark.parametrize("method, space, warned", [("pec", None, True), ("pcvae", "kernel", True), ("entropy_reg", "perceptual", True), ("gardo", None, True), ("pec", "latent", False), ("flow_grpo", None, False)])  # fmt: skip
def test_a_group_of_two_is_warned_of_where_the_bonus_is_dead(method, space, warned, recwarn):
    model, settings = MixtureFlow(ring(3)), Settings(**{**vars(SMALL), "group_size": 2})
    reward = lambda images, prompts: images[:, 0]  # noqa: E731
    next(
        train(
            model,
            [""] * 2,
            reward,
            coordinates,
            METHODS[method](space=space, clip=0.2),
            settings,
            start(model, settings),
        )
    )
    assert any("group_size 2" in str(w.message) for w in recwarn) == warned
