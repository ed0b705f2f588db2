"""The baseline in Flow-GRPO's order of work gives our numbers, from as many passes."""

import dataclasses

import pytest
import torch

from ref.benchmark.flow_grpo import against, text_encoders
from ref.methods import METHODS
from ref.options import Pipeline
from ref.presets import text_to_image
from ref.settings import Settings

SMALL = dict(groups=2, group_size=6, updates=1, micro_batch=12, steps=4, lr=1e-3)


def task(folder, kind):
    """Smooth reward and features: CLIP's own input is rounded to 8 bits, so there 1e-6 may become a whole grey level."""
    phi = f"pickscore={folder / 'clip'}"
    prompts = str(folder / "prompts.txt")
    options = Pipeline(
        model=str(folder / kind), reward=phi, prompts=prompts, evaluation_prompts=prompts, height=32, width=32,
        max_sequence_length=16, lora_rank=4, cache_dir=folder / "cache",
    )  # fmt: skip
    whole = text_to_image(phi, options)
    w = torch.randn(3 * 32 * 32, 8, generator=torch.Generator().manual_seed(0))
    project = lambda images: (images.flatten(1) - 0.5) @ w / 32  # noqa: E731
    return dataclasses.replace(whole, reward=lambda images, prompts: project(images)[:, 0], encoder=project)


@pytest.mark.parametrize(
    "method, changes", [("flow_grpo", {}), ("pec", dict(window=2, same_noise=True, global_std=True))]
)
@pytest.mark.parametrize("kind", ["sd3", "flux"])
def test_equal_results(kind, method, changes, folder):
    whole = task(folder, kind)
    weight = 1.0 if METHODS[method].largest_weight else None
    found = against(whole, Settings(**SMALL | changes), METHODS[method](weight), 1, text_encoders(whole.model))
    assert all(value < 1e-5 for value in found["difference"].values()), found["difference"]
    assert 0.2 < found["ratio"][0] < 5  # the same work; how fast is measured, not tested


@pytest.mark.parametrize("kind, difference", [("sd3", 0.5), ("flux", 0.0)])
def test_flat_samples_are_left_out_where_its_trainers_do(kind, difference, folder):
    """SD3's average over the rest: with one of two groups flat our gradient, divided by all, is half as large."""
    whole = task(folder, kind)
    flat = whole.prompts[0]
    reward = lambda images, prompts: whole.reward(images, prompts) * torch.tensor([p != flat for p in prompts])  # noqa: E731
    one_flat = dataclasses.replace(whole, reward=reward)
    settings = Settings(**SMALL | dict(grad_clip=1e6))
    found = against(one_flat, settings, METHODS["flow_grpo"](), 1, text_encoders(whole.model))["difference"]
    assert found.pop("gradient") == pytest.approx(difference, abs=1e-5)
    assert all(value < 1e-5 for value in found.values())


def test_the_comparison_sees_a_difference(folder, monkeypatch):
    """A planted error in the baseline, the log-density's 1/2 forgotten, shows up."""
    from ref.benchmark import flow_grpo

    right = flow_grpo.gaussian_log_prob
    monkeypatch.setattr(flow_grpo, "gaussian_log_prob", lambda x, mean, std: 2 * right(x, mean, std))
    whole = task(folder, "sd3")
    found = against(whole, Settings(**SMALL), METHODS["flow_grpo"](), 1, text_encoders(whole.model))
    assert found["difference"]["gradient"] > 1e-2


def test_the_baseline_encodes_as_its_cache_does(folder):
    """Prompts in a batch, each as often as it comes, with the empty one for guidance."""
    model = task(folder, "sd3").model
    prompts = ["a cat on a mat", "a cat on a mat", "two red apples"]
    found, expected = text_encoders(model)(prompts), model.encode(prompts)
    assert found.keys() == expected.keys()
    for name in found:
        torch.testing.assert_close(found[name], expected[name], rtol=1e-5, atol=1e-5)
