"""The command: one fine-tuning run from a preset, with checkpoints, exact resume and evaluation.

    python -m ref.train --preset digits --method pec --weight 1.0 --output-dir outputs/pec
    python -m ref.train --preset digits --method pec --weight 1.0 --output-dir outputs/pec --resume
    python -m ref.train --preset sd35_medium --memory 24 --method pec --output-dir outputs/sd35
    accelerate launch --num_processes 8 -m ref.train --preset flux_dev --method pcvae --output-dir outputs/flux

An output directory holds

    run.json              preset, method, weight, options and settings; a directory belongs to one run
    checkpoint-*.pt       the last two checkpoints; SIGTERM writes one more and ends with exit code 0
    metrics.json          `State.metrics` of every iteration up to the newest checkpoint; where there was an
                          evaluation, its numbers too, with `eval_` before their names
    evaluation.json       base model and fine-tuned model, sampled with the ODE on fixed noise
    images/               the images of periodic evaluations, a line for each prompt
    logs/                 of TensorBoard, where it is asked for
    weights/              the trained weights: a LoRA that stock diffusers loads, or the small network

With several processes the first one writes, and all must see the directory. Evaluated and saved are the
averaged weights where `ema` keeps such.
"""

import argparse
import dataclasses
import json
import sys
import threading
import time
from pathlib import Path
from typing import get_type_hints

import torch

from ref import checkpoint, metrics
from ref.card import model_card
from ref.fit import fitted, refuse_in_parts
from ref.grpo import Settings, calibrate_on, sample, scores, start, train
from ref.layout import deal_padded, over_processes, processes, rank
from ref.methods import METHODS
from ref.perceptual import perceptual_entropy
from ref.pipelines import out_of_memory
from ref.presets import PRESETS, VARIANTS, Task, check, settings_of

# What a resumed run may have otherwise: its length, and what moves memory and time, or roundings at most.
MAY_CHANGE = ("iterations", "micro_batch", "memory", "gradient_checkpointing", "tiling", "decode_batch", "cache_dir")
TRACKERS = ("none", "tensorboard", "wandb")


def evaluate(task: Task, settings: Settings, bandwidth: float) -> tuple[dict, torch.Tensor]:
    """Quality and diversity of the model as it stands, and the images [G K, ...]: ODE samples of every prompt.

    The noise is that of seed 0 whatever the run's seed, so rows of a table differ by their models alone.
    """
    steps = task.evaluation_steps or settings.steps
    schedule = task.model.schedule(steps, kind=settings.kind, noise_level=settings.noise_level).ode()
    prompts, K = task.evaluation or task.prompts, task.images_per_prompt
    share = deal_padded(len(prompts))
    layout = list(torch.arange(len(share.mine) * K).split(settings.micro_batch))
    own = sample(task.model, [prompts[g] for g in share.mine], K, schedule, ("evaluate",), layout, share.mine)
    reward = scores(task.reward, own, share, own.images, own.prompts)
    phi = scores(task.encoder, own, share, own.images)
    images, latents = (share.gather(v.unflatten(0, (-1, K))) for v in (own.images, own.latents))
    repeated = [p for p in prompts for _ in range(K)]
    return {
        "reward": reward.mean().item(),
        "perceptual_entropy": perceptual_entropy(phi, bandwidth, "mean").mean().item(),
        "feature_variance": metrics.feature_variance(phi).mean().item(),
        "pairwise_distance": metrics.mean_pairwise_distance(phi).mean().item(),
        "vendi_score": metrics.vendi_score(phi).mean().item(),
        "vae_variance": metrics.feature_variance(latents.flatten(2)).mean().item(),
        "pixel_variance": metrics.feature_variance(images.flatten(2)).mean().item(),
    } | {name: f(images.flatten(0, 1), repeated) for name, f in task.measures.items()}, images.flatten(0, 1)


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
    before, now = json.loads(record.read_text()), dict(description)
    old = before | before.pop("settings") | before.pop("options", {})
    new = now | now.pop("settings") | now.pop("options", {})
    for k in dict.fromkeys([*new, *old]):
        known = k in old or k in OPTIONS  # a directory of an earlier version knows fewer settings
        if known and k not in MAY_CHANGE and old.get(k) != new.get(k):
            raise ValueError(
                f"{folder} holds a run with {k} = {old.get(k)}, not {new.get(k)}; choose another --output-dir"
            )


def load(folder: Path, keys: dict[str, str]) -> dict | None:
    """The newest checkpoint. Raises ValueError when processes see different ones, or prompts are encoded otherwise."""
    saved = checkpoint.load_latest(folder)
    reached = saved["iteration"] if saved else 0
    if processes() > 1:
        device = "cuda" if torch.distributed.get_backend() == "nccl" else "cpu"
        if over_processes(torch.tensor(float(reached), device=device), largest=True) != reached:
            raise ValueError(f"not every process sees the checkpoints in {folder}; it must lie on a shared file system")
    if saved and saved.get("embeddings", keys) != keys:
        raise ValueError(f"the run in {folder} had other prompts or text encoders; choose another --output-dir")
    return saved


@out_of_memory("while training", "give a smaller --micro-batch or --decode-batch, or add --gradient-checkpointing")
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
    options: dict | None = None,
    evaluate_every: int = 0,
    log_with: str = "none",
) -> dict:
    """Train, save and evaluate one run.

    space            the method's (methods.py)
    encoder          phi by name
    options          of the large presets: keyword arguments of `presets.text_to_image`
    evaluate_every   iterations between evaluations; 0: only before and after
    log_with         none, tensorboard or wandb

    Returns "base" and "final" (numbers of `evaluate`), "history" (`State.metrics` of every iteration),
    "seconds" (training), "base_images" and "images" (those of `evaluate`, prompt by prompt).

    Raises ValueError with one clear line for an unknown preset or method, a bad setting, or a directory
    that holds another run.
    """
    from accelerate import Accelerator
    from accelerate.utils import ProjectConfiguration
    from tqdm import tqdm

    options = options or {}
    check(preset, options)
    for kind, choice, table in (("method", method, METHODS), ("tracker", log_with, TRACKERS)):
        if choice not in table:
            raise ValueError(f"unknown {kind} {choice!r}; choose one of {', '.join(table)}")
    build = PRESETS[preset][0]
    default = settings_of(preset, options.get("memory"))
    settings = settings or default
    policy = METHODS[method](weight, clip=settings.clip, space=space)
    folder = Path(output_dir)
    description = {
        "preset": preset,
        "method": method,
        "weight": policy.weight,
        "space": policy.space,
        "encoder": encoder,
        **({"options": {k: v if v is None else str(v) for k, v in options.items()}} if options else {}),
        "settings": dataclasses.asdict(settings),
    }
    project = ProjectConfiguration(str(folder), logging_dir=str(folder / "logs"))
    cpu = not torch.accelerator.is_available()  # accelerate would not join several processes without a GPU
    accelerator = Accelerator(cpu=cpu, log_with=tracker(log_with), project_config=project)
    first = accelerator.is_main_process
    refuse_in_parts(not settings.micro_batch and processes() > 1 and options.get("lora_rank") == 0)
    if first:
        claim_directory(folder, description, resume)
    accelerator.wait_for_everyone()

    task = build(encoder, **options)
    keys = dict(getattr(task.model.encode, "keys", {}))  # of cached prompt embeddings
    saved = load(folder, keys) if resume else None
    if not settings.micro_batch:
        settings = dataclasses.replace(settings, micro_batch=(saved or {}).get("micro_batch", 0))
        settings = fitted(task.model, task.prompts, settings)
        description["settings"] = dataclasses.asdict(settings)
        if first:
            print(f"micro-batch: {settings.micro_batch}, found by trial", file=sys.stderr)
            write_json(folder / "run.json", description)
    state, history = start(task.model, settings), []
    state.bandwidth = saved["bandwidth"] if saved else calibrate_on(task.model, task.prompts, task.encoder, settings)
    base, before = evaluate(task, settings, state.bandwidth)
    if saved:
        state.load_state_dict(saved)
        history = saved["history"]
    if log_with != "none":
        accelerator.init_trackers("perceptual-entropy", {k: str(v) for k, v in description.items()})

    newest, lock = {}, threading.Lock()  # the last finished iteration as it was, for SIGTERM comes at any time

    def save() -> None:
        with lock:
            if newest:
                checkpoint.save(folder, newest)
                write_json(folder / "metrics.json", newest["history"])

    loop = train(task.model, task.prompts, task.reward, task.encoder, policy, settings, state)
    bar = tqdm(loop, f"{method:>12}", settings.iterations, initial=state.iteration, disable=not (progress and first))
    with checkpoint.saving_on_sigterm(save):
        for state in bar:
            n, entry = state.iteration, dict(state.metrics)
            if evaluate_every and n % evaluate_every == 0:
                with state.averaged():
                    numbers, images = evaluate(task, settings, state.bandwidth)
                entry |= {f"eval_{name}": value for name, value in numbers.items()}
                if first:
                    save_grid(folder / "images" / f"iteration-{n:06d}.png", images, task.images_per_prompt)
            history = [*history, entry]
            accelerator.log(entry, step=n)
            bar.set_postfix(reward=f"{entry['reward']:.3f}", variance=f"{entry['feature_variance']:.3f}")
            latest = checkpoint.snapshot(state.state_dict())
            latest |= {"history": history, "embeddings": keys, "micro_batch": settings.micro_batch}
            if first:
                newest = latest
                if n % save_every == 0 or n == settings.iterations:
                    save()

        with state.averaged():
            final, after = evaluate(task, settings, state.bandwidth)
            result = {"base": base, "final": final, "seconds": sum(m["seconds"] for m in history)}
            task.model.save(folder / "weights")
            if first:
                if task.source:
                    card = model_card(task.model, task.source, description, result, folder / "weights")
                    checkpoint.atomic_write(
                        folder / "weights" / "README.md", lambda temporary: temporary.write_text(card)
                    )
                write_json(folder / "evaluation.json", result)
    for each in accelerator.trackers:
        each.finish()
    accelerator.wait_for_everyone()
    return result | {"history": history, "base_images": before, "images": after}


def tracker(name: str) -> str | None:
    """What `Accelerator` takes; it would leave a tracker that is not installed out without a word."""
    from accelerate.tracking import get_available_trackers

    if name != "none" and name not in [str(t.value) for t in get_available_trackers()]:
        raise ValueError(f"{name} is not installed; pip install {name}, or choose another --log-with")
    return None if name == "none" else name


def save_grid(path: Path, images: torch.Tensor, columns: int) -> None:
    """One PNG, a line for each prompt."""
    from torchvision.utils import save_image

    path.parent.mkdir(exist_ok=True)
    checkpoint.atomic_write(path, lambda temporary: save_image(images, temporary, nrow=columns, format="png"))


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
    parser.add_argument("--evaluate-every", type=int, help="iterations between evaluations (default: 50; 0 on toys)")
    parser.add_argument("--log-with", help="none, tensorboard or wandb (default: tensorboard; none on toys)")
    large = parser.add_argument_group(f"options of {', '.join(VARIANTS)}")
    for name, (kind, text) in OPTIONS.items():
        how = dict(action="store_true", default=None) if kind is bool else dict(type=kind)
        large.add_argument(f"--{name.replace('_', '-')}", **how, help=text)
    hints = get_type_hints(Settings)
    table = parser.add_argument_group("settings (default: the preset's)")
    for f in dataclasses.fields(Settings):
        kind = {int | None: int, bool: lambda text: text.lower() in ("1", "true", "yes")}.get(
            hints[f.name], hints[f.name]
        )
        table.add_argument(f"--{f.name.replace('_', '-')}", type=kind, metavar=f.name.upper())
    return parser.parse_args(arguments)


OPTIONS = {
    "memory": (int, "of the GPU in GB, 24, 48 or 80: computed settings in place of a trial"),
    "model": (str, "a diffusers folder or hub id in place of the preset's"),
    "reward": (str, "what to raise, as rewards.py reads it: pickscore, or pickscore:0.7+ocr:0.3 (default: pickscore)"),
    "prompts": (str, "a .txt or .jsonl file, or train, evaluation or ocr (default: train)"),
    "evaluation_prompts": (str, "likewise, for evaluations (default: evaluation)"),
    "evaluation_steps": (int, "denoising steps of evaluations"),
    "images_per_prompt": (int, "of evaluations (default: 4)"),
    "height": (int, "of the images in pixels"),
    "width": (int, "likewise"),
    "guidance_scale": (float, "1 is off on SD3"),
    "shift": (float, "of the time grid (default: the pipeline's)"),
    "lora_rank": (int, "0 trains all weights, which several processes hold in parts (FSDP)"),
    "lora_alpha": (float, "default: twice the rank"),
    "gradient_checkpointing": (bool, "less memory, a third more time"),
    "tiling": (bool, "decode in tiles"),
    "compile_blocks": (bool, "compile the transformer's repeated blocks: minutes at first, then faster steps"),
    "decode_batch": (int, "images at once through the VAE"),
    "max_sequence_length": (int, "T5 tokens"),
    "cache_dir": (Path, "of prompt embeddings"),
}


def asked(given: argparse.Namespace) -> tuple[dict, Settings]:
    """The options and settings of a command line that `parse` has read. Raises ValueError where they do not fit."""
    values = {name: value for name, value in vars(given).items() if value is not None}
    options = {name: values[name] for name in OPTIONS if name in values}
    check(given.preset, options)
    changes = {f.name: values[f.name] for f in dataclasses.fields(Settings) if f.name in values}
    return options, dataclasses.replace(settings_of(given.preset, options.get("memory")), **changes)


def main(arguments: list[str] | None = None) -> int:
    parsed = parse(arguments)
    given, large = vars(parsed), parsed.preset in VARIANTS
    try:
        options, settings = asked(parsed)
        every = given["evaluate_every"] if given["evaluate_every"] is not None else 50 * large
        if given["save_every"] < 1:
            raise ValueError(f"save_every must be at least 1, got {given['save_every']}")
        began = time.perf_counter()
        result = run(
            given["preset"],
            given["method"],
            given["output_dir"],
            given["weight"],
            settings,
            given["resume"],
            given["save_every"],
            space=given["space"],
            encoder=given["encoder"],
            options=options,
            evaluate_every=every,
            log_with=given["log_with"] or ("tensorboard" if large else "none"),
        )
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    if processes() > 1:
        others = rank() > 0
        torch.distributed.destroy_process_group()
        if others:
            return 0
    for name, value in result["final"].items():
        print(f"{name:>20}  {result['base'][name]:9.4f} -> {value:9.4f}")
    print(f"{time.perf_counter() - began:.0f} s; results in {given['output_dir']}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
