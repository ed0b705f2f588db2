"""The command: one fine-tuning run from a preset, with checkpoints, exact resume and evaluation.

    python -m ref.train --preset digits --method pec --weight 1.0 --output-dir outputs/pec
    python -m ref.train --preset digits --method pec --weight 1.0 --output-dir outputs/pec --resume

An output directory holds

    run.json              preset, method, weight and settings; a directory belongs to one run
    checkpoint-*.pt       the last two checkpoints
    metrics.json          `State.metrics` of every iteration up to the newest checkpoint
    evaluation.json       base model and fine-tuned model, sampled with the ODE on fixed noise
    weights/              the trained weights: a LoRA that stock diffusers loads, or the small network

A preset is a function that returns a `Task` and its `Settings`; the loop is `grpo.train` for all.
"""

import argparse
import dataclasses
import json
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import get_type_hints

import torch

from ref import checkpoint, metrics
from ref.grpo import Samples, Settings, calibrate_on, sample, start, train
from ref.methods import METHODS
from ref.perceptual import perceptual_entropy


@dataclass
class Task:
    """What is fine-tuned, on what, towards what."""

    model: torch.nn.Module
    prompts: list[str]
    reward: Callable
    encoder: Callable
    measures: dict[str, Callable] = field(default_factory=dict)  # name -> f(images, prompts) -> float


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


PRESETS = {
    "mixture": (mixture, Settings(iterations=150, groups=32, group_size=16, updates=1, lr=1e-3, clip=0.2)),
    "digits": (
        digits,
        Settings(iterations=100, groups=5, group_size=24, window=4, lr=4e-3, lr_schedule="cosine", clip=1e-2),
    ),
}


def evaluate(task: Task, settings: Settings, bandwidth: float, group_size: int = 64) -> tuple[dict, Samples]:
    """Quality and diversity of the model as it stands: group_size ODE samples of every prompt.

    The noise is that of seed 0 whatever the run's seed, so rows of a table differ by their models alone.
    """
    schedule = task.model.schedule(settings.steps, kind=settings.kind, noise_level=settings.noise_level)
    samples = sample(task.model, task.prompts, group_size, schedule.ode(), ("evaluate",))
    groups = (len(task.prompts), group_size)
    phi = task.encoder(samples.images).unflatten(0, groups)
    flat = {k: v.flatten(1).unflatten(0, groups) for k, v in (("vae", samples.latents), ("pixel", samples.images))}
    return {
        "reward": task.reward(samples.images, samples.prompts).mean().item(),
        "perceptual_entropy": perceptual_entropy(phi, bandwidth, "mean").mean().item(),
        "feature_variance": metrics.feature_variance(phi).mean().item(),
        "pairwise_distance": metrics.mean_pairwise_distance(phi).mean().item(),
        "vendi_score": metrics.vendi_score(phi).mean().item(),
        "vae_variance": metrics.feature_variance(flat["vae"]).mean().item(),
        "pixel_variance": metrics.feature_variance(flat["pixel"]).mean().item(),
    } | {name: f(samples.images, samples.prompts) for name, f in task.measures.items()}, samples


def write_json(path: Path, value) -> None:
    checkpoint.atomic_write(path, lambda temporary: temporary.write_text(json.dumps(value, indent=1) + "\n"))


def claim_directory(folder: Path, description: dict, resume: bool) -> None:
    """Make `folder` this run's, or raise ValueError when it holds another run."""
    record = folder / "run.json"
    if not record.exists():
        folder.mkdir(parents=True, exist_ok=True)
        return write_json(record, description)
    if not resume:
        raise ValueError(f"{folder} holds a run already; continue it with --resume or choose another --output-dir")
    before = json.loads(record.read_text())
    old, new = before | before.pop("settings"), description | description["settings"]
    changed = [k for k, v in new.items() if k not in ("settings", "iterations") and old.get(k) != v]
    if changed:
        k = changed[0]
        raise ValueError(f"{folder} holds a run with {k} = {old.get(k)}, not {new[k]}; choose another --output-dir")


def run(
    preset: str,
    method: str,
    output_dir: Path | str,
    weight: float | None = None,
    settings: Settings | None = None,
    resume: bool = False,
    save_every: int = 20,
    progress: bool = True,
    space: str | None = None,
    encoder: str | None = None,
) -> dict:
    """Train, save and evaluate one run. `space` is the method's (methods.py), `encoder` the preset's phi by name.

    Returns "base" and "final" (numbers of `evaluate`), "history" (`State.metrics` of every iteration),
    "seconds" (training), "base_images" and "images" (those of `evaluate`, prompt by prompt).

    Raises ValueError with one clear line for an unknown preset or method, a bad setting, or a directory
    that holds another run.
    """
    from tqdm import tqdm

    for kind, choice, table in (("preset", preset, PRESETS), ("method", method, METHODS)):
        if choice not in table:
            raise ValueError(f"unknown {kind} {choice!r}; choose one of {', '.join(table)}")
    build, default = PRESETS[preset]
    settings = settings or default
    policy = METHODS[method](weight, clip=settings.clip, space=space)
    folder = Path(output_dir)
    description = {
        "preset": preset,
        "method": method,
        "weight": policy.weight,
        "space": policy.space,
        "encoder": encoder,
        "settings": dataclasses.asdict(settings),
    }
    claim_directory(folder, description, resume)

    task = build(encoder)
    state, history = start(task.model, settings), []
    state.bandwidth = calibrate_on(task.model, task.prompts, task.encoder, settings)
    base, before = evaluate(task, settings, state.bandwidth)
    saved = checkpoint.load_latest(folder) if resume else None
    if saved is not None:
        state.load_state_dict(saved)
        history = saved["history"]

    loop = train(task.model, task.prompts, task.reward, task.encoder, policy, settings, state)
    bar = tqdm(loop, f"{method:>12}", settings.iterations, initial=state.iteration, disable=not progress)
    for state in bar:
        history.append(state.metrics)
        bar.set_postfix(reward=f"{state.metrics['reward']:.3f}", variance=f"{state.metrics['feature_variance']:.3f}")
        if state.iteration % save_every == 0 or state.iteration == settings.iterations:
            checkpoint.save(folder, state.state_dict() | {"history": history})
            write_json(folder / "metrics.json", history)

    final, after = evaluate(task, settings, state.bandwidth)
    task.model.save(folder / "weights")
    result = {"base": base, "final": final, "seconds": sum(m["seconds"] for m in history)}
    write_json(folder / "evaluation.json", result)
    return result | {"history": history, "base_images": before.images, "images": after.images}


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m ref.train", description="One fine-tuning run from a preset.")
    parser.add_argument("--preset", required=True, help=f"one of {', '.join(PRESETS)}")
    parser.add_argument("--method", required=True, help=f"one of {', '.join(METHODS)}")
    parser.add_argument("--weight", type=float, help="lambda of the method (default: the method's own)")
    parser.add_argument("--space", help="latent, perceptual or kernel: whose entropy the method looks at")
    parser.add_argument("--encoder", help="the perceptual encoder phi, one of the preset's (default: its first)")
    parser.add_argument("--output-dir", type=Path, required=True)
    parser.add_argument("--resume", action="store_true", help="continue the run in --output-dir")
    parser.add_argument("--save-every", type=int, default=20, help="iterations between checkpoints (default: 20)")
    hints = get_type_hints(Settings)
    for f in dataclasses.fields(Settings):
        kind = {int | None: int, bool: lambda text: text.lower() in ("1", "true", "yes")}.get(
            hints[f.name], hints[f.name]
        )
        parser.add_argument(f"--{f.name.replace('_', '-')}", type=kind, help="setting; default from the preset")
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> int:
    options = parse(arguments)
    try:
        _, default = PRESETS.get(options.preset, (None, Settings()))
        given = {f.name: getattr(options, f.name) for f in dataclasses.fields(Settings)}
        settings = dataclasses.replace(default, **{k: v for k, v in given.items() if v is not None})
        if options.save_every < 1:
            raise ValueError(f"save_every must be at least 1, got {options.save_every}")
        began = time.perf_counter()
        result = run(
            options.preset,
            options.method,
            options.output_dir,
            options.weight,
            settings,
            options.resume,
            options.save_every,
            space=options.space,
            encoder=options.encoder,
        )
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    for name, value in result["final"].items():
        print(f"{name:>20}  {result['base'][name]:9.4f} -> {value:9.4f}")
    print(f"{time.perf_counter() - began:.0f} s; results in {options.output_dir}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
