"""Presets: what is fine-tuned, on which prompts, towards which reward, and with which settings.

A preset is a function that builds a `Task`, and the `Settings` it runs with; the loop is `grpo.train` for all.

| preset         | model                                          | settings of                               |
|----------------|------------------------------------------------|-------------------------------------------|
| `mixture`      | six modes in the plane, exact velocity + MLP   | this project                              |
| `digits`       | SD3's classes on scanned digits, LoRA r16      | this project                              |
| `sd35_medium`  | SD3.5-Medium, 512 px, LoRA r32                 | Flow-GRPO: 10 steps, CFG 4.5, noise 0.7   |
| `flux_dev`     | FLUX.1-dev, 512 px, LoRA r64                   | Flow-GRPO: 6 steps, guidance 3.5, noise 0.9 |
| `flux_dev_720` | FLUX.1-dev, 720 px, LoRA r128                  | DanceGRPO, the paper's: 16 steps, eta 0.3, shift 3, same noise, the first 60 % of the steps |

The large ones take the options of `text_to_image`, among them a folder in place of the model. Their micro-batch
is the largest that fits, found by trial (fit.py), unless `memory` is given, the GPU's in GB: then it is the one of
this table. All variants do the same, up to rounding. The memory is *computed*, not measured: `ref.memory`, plus
PickScore in float32 (3.7 GiB), averaged weights, 1 GiB for CUDA, and a tenth.

|                | 24 GB               | 48 GB               | 80 GB               |
|----------------|---------------------|---------------------|---------------------|
| `sd35_medium`  | 12 ckpt, 15.2 GiB   | 6, 37.7 GiB         | 12, 64.8 GiB        |
| `flux_dev`     | none                | 8 ckpt, 39.4 GiB    | 4, 70.6 GiB         |
| `flux_dev_720` | none                | 4 ckpt, 40.6 GiB    | 2, 66.8 GiB         |

(micro-batch, with gradient checkpointing or without). FLUX.1-dev's 11.9 billion weights alone fill 22.2 GiB.
"""

import json
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path

import torch

from ref import metrics
from ref.grpo import Settings

PROMPTS = Path(__file__).parent / "prompts"  # train.txt, evaluation.txt, ocr.txt: of our own writing


@dataclass
class Task:
    """What is fine-tuned, on what, towards what; and how it is evaluated."""

    model: torch.nn.Module
    prompts: list[str]
    reward: Callable
    encoder: Callable
    measures: dict[str, Callable] = field(default_factory=dict)  # name -> f(images, prompts) -> float
    evaluation: list[str] | None = None  # prompts of the evaluation; None: those of training
    images_per_prompt: int = 64  # in the evaluation
    evaluation_steps: int | None = None  # of the ODE sampler; None: as many as in training
    source: str | None = None  # the base model's folder or hub id, for the model card


def chosen(table: dict[str, Callable], encoder: str | None) -> Callable:
    """The encoder of that name, the first of the table by default. Raises ValueError for an unknown name."""
    if encoder is not None and encoder not in table:
        raise ValueError(f"unknown encoder {encoder!r}; this preset has {', '.join(table)}")
    return table[encoder or next(iter(table))]


def digits(encoder: str | None = None) -> Task:
    """Ten captions; measured, whatever phi is, in all the perceptual spaces of digits.py."""
    from ref import digits

    model, reward, phi, judge = digits.load()
    model.add_lora(rank=16, alpha=32)
    spaces = digits.encoders(reward, phi)
    held_out = digits.SlantReward(judge)  # the reward, read by the network that training never sees
    measures = {
        "legibility": lambda images, prompts: digits.legibility(judge, images, prompts),
        "judge_reward": lambda images, prompts: held_out(images, prompts).mean().item(),
    }
    for space, f in spaces.items():
        measures[f"var_{space}"] = lambda images, prompts, f=f: (
            metrics.feature_variance(grouped(f(images), prompts)).mean().item()
        )
    return Task(model, digits.PROMPTS, reward, chosen(spaces, encoder), measures)


def grouped(features: torch.Tensor, prompts: list[str]) -> torch.Tensor:
    """[B, D] -> [G, K, D] for group-major samples of G different prompts."""
    return features.unflatten(0, (len(set(prompts)), -1))


def mixture(encoder: str | None = None) -> Task:
    """Six modes on a ring, from reward 0 to 1; features are directions, so they are bounded."""
    from ref.mixture import MixtureFlow, effective_modes, ring, tilted

    world = ring(6)
    directions = chosen({"direction": torch.nn.functional.normalize}, encoder)
    modes = lambda images, prompts: effective_modes(world.occupancy(images)).item()  # noqa: E731
    reward = tilted(world, torch.linspace(0, 1, 6))
    return Task(MixtureFlow(world), [""] * 32, reward, directions, {"effective_modes": modes})


def read_prompts(source: str | Path) -> list[str]:
    """The prompts of a file, one a line; in a .jsonl file a line is a string or an object with a "prompt".

    train, evaluation and ocr name the files that come with this package. Raises OSError for a missing
    file, and ValueError that names the line for an empty line, bad JSON or an object without a prompt.
    """
    path = PROMPTS / f"{source}.txt"
    path = path if str(source) in ("train", "evaluation", "ocr") else Path(source)
    prompts = []
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        prompt = line.strip()
        if path.suffix == ".jsonl" and prompt:
            try:
                prompt = json.loads(prompt)
            except json.JSONDecodeError as error:
                raise ValueError(f"{path}, line {number}: bad JSON ({error.msg}); a line is one object") from error
            prompt = prompt.get("prompt") if isinstance(prompt, dict) else prompt
            if not isinstance(prompt, str):
                raise ValueError(f'{path}, line {number}: no prompt; write {{"prompt": "..."}}')
        if not prompt.strip():
            raise ValueError(f"{path}, line {number}: empty line; every line must hold a prompt")
        prompts.append(prompt)
    if not prompts:
        raise ValueError(f"{path} holds no prompts")
    return prompts


def text_to_image(
    encoder: str | None = None,
    *,
    model: str,
    reward: str = "pickscore",
    prompts: str | Path = "train",
    evaluation_prompts: str | Path = "evaluation",
    evaluation_steps: int = 40,
    images_per_prompt: int = 4,
    variants: dict[int, dict],
    memory: int = 80,
    **adapter,
) -> Task:
    """A pipeline of text2image.py, a reward and an encoder by name, prompts from files.

    model, adapter                        as `text2image.load` takes them; lora_rank 0 trains all weights,
                                          in parts where there are several processes (sharding.py)
    reward, encoder                       specifications of rewards.py and encoders.py; phi is PickScore by default
    evaluation_steps, images_per_prompt   of the ODE sampler on `evaluation_prompts`
    variants, memory                      {GPU memory in GB: its adapter options}, and which of them

    What reward and encoder have in common is loaded, and computed, once.
    """
    from accelerate import PartialState

    from ref import text2image
    from ref.encoders import load_encoder
    from ref.rewards import load_reward

    training, evaluation = read_prompts(prompts), read_prompts(evaluation_prompts)
    device = PartialState().device  # this process's GPU; "cpu:0" among several processes on the CPU
    device = torch.device("cpu") if device.type == "cpu" else device
    if adapter.get("lora_rank") == 0:
        adapter["lora_rank"] = None
    adapter = {k: v for k, v in variants[memory].items() if k != "micro_batch"} | adapter
    pipeline = text2image.load(model, training + evaluation, device=device, **adapter)
    phi = load_encoder(encoder or "pickscore", device)
    return Task(
        pipeline,
        training,
        load_reward(reward, device, encoders=[phi]),
        phi,
        evaluation=evaluation,
        evaluation_steps=evaluation_steps,
        images_per_prompt=images_per_prompt,
        source=pipeline.encode.source.model,
    )


CHECKPOINTED = dict(gradient_checkpointing=True, decode_batch=2)
VARIANTS = {  # the table above
    "sd35_medium": {24: CHECKPOINTED | dict(micro_batch=12), 48: dict(micro_batch=6), 80: dict(micro_batch=12)},
    "flux_dev": {48: CHECKPOINTED | dict(micro_batch=8), 80: dict(micro_batch=4)},
    "flux_dev_720": {48: CHECKPOINTED | dict(micro_batch=4), 80: dict(micro_batch=2)},
}


def large(preset: str, **options) -> Callable:
    return partial(text_to_image, variants=VARIANTS[preset], **options)


FLOW_GRPO = Settings(
    iterations=1000, groups=48, group_size=24, updates=2, micro_batch=0, steps=10, noise_level=0.7, lr=3e-4, ema=0.9
)
DANCE_GRPO = Settings(
    iterations=300, groups=8, group_size=12, updates=1, micro_batch=0, steps=16, kind="dance_sde", noise_level=0.3,
    lr=3e-4, trained=0.6, same_noise=True,
)  # fmt: skip
PRESETS = {
    "mixture": (mixture, Settings(iterations=150, groups=32, group_size=16, updates=1, lr=1e-3, clip=0.2)),
    "digits": (
        digits,
        Settings(iterations=100, groups=5, group_size=24, window=4, lr=4e-3, lr_schedule="cosine", clip=1e-2),
    ),
    "sd35_medium": (large("sd35_medium", model="sd35_medium", lora_rank=32, evaluation_steps=40), FLOW_GRPO),
    "flux_dev": (
        large("flux_dev", model="flux_dev", lora_rank=64, evaluation_steps=28),
        replace(FLOW_GRPO, steps=6, noise_level=0.9),
    ),
    "flux_dev_720": (
        large("flux_dev_720", model="flux_dev", lora_rank=128, evaluation_steps=28, height=720, width=720, shift=3.0),
        DANCE_GRPO,
    ),
}


def check(preset: str, options: dict) -> None:
    """Raises ValueError for an unknown preset, and for options of the large ones where it is none of them."""
    if preset not in PRESETS:
        raise ValueError(f"unknown preset {preset!r}; choose one of {', '.join(PRESETS)}")
    if options and preset not in VARIANTS:
        raise ValueError(f"preset {preset} takes no {next(iter(options))}; that is for {', '.join(VARIANTS)}")


def architectures(sizes: Iterable[int] = ()) -> Iterator[tuple[str, str, int, int]]:
    """(preset, model, pixels, LoRA rank) of the large presets, for images of `sizes` or of their own size."""
    for preset in VARIANTS:
        own = PRESETS[preset][0].keywords
        for pixels in sizes or [own.get("height", 512)]:
            yield preset, own["model"], pixels, own["lora_rank"]


def settings_of(preset: str, memory: int | None = None) -> Settings:
    """The preset's settings, in the variant for a GPU of `memory` GB. Raises ValueError where there is none."""
    _, settings = PRESETS[preset]
    if memory is None:
        return settings
    variants = VARIANTS.get(preset, {})
    if memory not in variants:
        why = f"{preset} fits into {' or '.join(map(str, variants))} GB" if variants else f"{preset} needs no GPU"
        raise ValueError(f"no variant for memory {memory}: {why}")
    return replace(settings, micro_batch=variants[memory]["micro_batch"])
