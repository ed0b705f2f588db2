"""The command: one fine-tuning run from a preset, with checkpoints, exact resume and evaluation.

    python -m ref.train --preset digits --method pec --weight 1.0 --output-dir outputs/pec
    python -m ref.train --output-dir outputs/pec --resume
    python -m ref.train --preset sd35_medium --memory 24 --method pec --output-dir outputs/sd35
    accelerate launch --num_processes 8 -m ref.train --preset flux_dev --method pcvae --output-dir outputs/flux

An output directory holds

    run.json              preset, method, weight, options and settings; `--resume` reads it, nothing is repeated
    checkpoint-*.pt       the last two checkpoints; Ctrl-C, SIGTERM and SIGHUP write one more (scale/signals.py)
    metrics.json          `State.metrics` of every iteration up to the newest checkpoint; where there was an
                          evaluation, its numbers too, with `eval_` before their names
    evaluation.json       base model and fine-tuned model, sampled with the ODE on fixed noise
    images/               the images of periodic evaluations, a line for each prompt
    logs/                 of TensorBoard, where it is asked for
    weights/              the trained weights: a LoRA that stock diffusers loads, or the small network

With several processes the first one writes, and all must see the directory. Evaluated and saved are the
averaged weights where `ema` keeps such.

`--resume` goes on exactly: on the CPU to the bit; on a GPU up to the roundings of attention's backward pass, whose order of
sums is not fixed. A copy of weights, moments and averages is kept on the CPU after every iteration, so that a signal
loses nothing: small for a LoRA; where all weights are trained the first process's host needs 16 bytes a weight twice,
67 GiB for SD3.5-Medium.
"""

import argparse
import os
import shlex
import sys
import threading
import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import asdict, fields, replace
from pathlib import Path
from typing import Annotated, Literal

import torch
from annotated_types import Ge, Le
from tyro import MISSING
from tyro.conf import OmitArgPrefixes

from ref.grpo import calibrate_on, start, train
from ref.methods import METHODS, SPACES
from ref.models.card import model_card
from ref.options import Options, Pipeline, command, near, read
from ref.presets import LARGE, PRESETS
from ref.sampling import name_of
from ref.scale import checkpoint, directory
from ref.scale.directory import Claim, Keeper, save_grid, write_json
from ref.scale.memory import out_of_memory
from ref.scale.microbatch import fitted, refuse_in_parts
from ref.scale.processes import one_voice, processes, rank
from ref.scale.signals import interruptible, stopping
from ref.scale.weights import trainable
from ref.settings import Settings, in_one_line

TRACKERS = ("none", "tensorboard", "wandb")


@in_one_line
class Work(Options):
    """What is trained, with which settings. `Run` adds towards what end; the benchmark adds nothing."""

    preset: Literal[tuple(PRESETS)]  # what is trained on what
    encoder: str | None = None  # the perceptual encoder phi, one of the preset's or FILE.py:NAME (None: its first)
    options: OmitArgPrefixes[Pipeline] = Pipeline()
    settings: OmitArgPrefixes[Settings] = Settings()


@in_one_line
class Run(Work):
    """One fine-tuning run from a preset. With --resume what is not given is read from the directory's run.json."""

    method: Literal[tuple(METHODS)]  # what is added to the reward or the loss
    weight: Annotated[float, Ge(0)] | None = None  # lambda (None: the method's own)
    space: Literal[SPACES] | None = None  # whose entropy the method looks at (None: the method's own)
    output_dir: Path  # a directory belongs to one run
    resume: bool = False  # continue the run in --output-dir
    save_every: Annotated[int, Ge(1), Le(10**6)] = 20  # iterations between checkpoints
    evaluate_every: Annotated[int, Ge(0), Le(10**6)] | None = None  # 0: before and after only (None: 50; 0 on toys)
    log_with: Literal[TRACKERS] | None = None  # (None: tensorboard; none on toys)


def asked(declared: type[Work], program: str, arguments: list[str] | None) -> Work:
    """What a command line asks for, where it is silent the preset's, or with --resume the directory's run.json.

    Raises ValueError for a preset without a variant for --memory, or without the options that are given, and for a
    directory that holds a run of another preset or method.
    """
    early = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    early.add_argument("--preset")
    early.add_argument("--method")
    early.add_argument("--memory", type=int)
    early.add_argument("--output-dir", "--output_dir", type=Path)
    early.add_argument("--resume", action="store_true")
    try:
        given, _ = early.parse_known_args(arguments)
    except argparse.ArgumentError:  # `read` will say what is wrong
        given = argparse.Namespace(preset=None, memory=None, output_dir=None, resume=False)
    values = dict.fromkeys((name for name, field in declared.model_fields.items() if field.is_required()), MISSING)
    if given.resume and given.output_dir and (given.output_dir / directory.RECORD).exists():
        values |= dict(recorded(given.output_dir))
        for name in ("preset", "method"):  # what else run.json says belongs to these
            if getattr(given, name) not in (None, values[name]):
                raise ValueError(
                    f"{given.output_dir} holds a run with {name} = {values[name]}, not {getattr(given, name)}; "
                    "choose another --output-dir"
                )
    elif (preset := given.preset or declared.model_fields["preset"].default) in PRESETS:
        own = PRESETS[preset]
        values |= {"preset": preset, "options": own.options or Pipeline(), "settings": own.settings}
    if "settings" in values:
        preset = PRESETS[values["preset"]]
        values["options"], values["settings"] = preset.within(given.memory, values["options"], values["settings"])
    found = read(declared, program, arguments, declared.model_construct(**values))
    if found.preset not in LARGE:
        for name, value in found.options:
            if value != getattr(Pipeline(), name):
                raise ValueError(f"preset {found.preset} takes no {name}; that is for {', '.join(LARGE)}")
    return found


def recorded(folder: Path) -> Run:
    """The run of run.json. Raises ValueError naming the file where a name is missing or unknown, or a value wrong."""
    settings = [field.name for field in fields(Settings)]
    record = directory.read_record(folder, ("preset", "method", "weight", "space", "encoder"), settings)
    if "reward" in record:
        raise ValueError(f"{folder} holds a run with a reward from Python; continue it there: run(..., resume=True)")
    if record["preset"] in LARGE:
        directory.read_record(folder, ("options",), of_options=Pipeline.model_fields)
    try:
        return Run(**record | {"output_dir": folder, "resume": True})
    except ValueError as error:
        raise directory.unreadable(folder / directory.RECORD, str(error)) from None


def described(
    preset, method, weight, space, encoder, settings: Settings, options: Pipeline | None = None, reward=None
) -> dict:
    """What run.json says of a run. Raises ValueError for a weight or a space that the method does not take."""
    policy = METHODS[method](weight, clip=settings.clip, space=space)
    if (held := settings.target_diversity is not None) and weight is not None:
        raise ValueError("a target diversity finds its weight by itself; give --weight or --target-diversity, not both")
    what = {
        "preset": preset,
        "method": method,
        "weight": None if held else policy.weight,
        "space": policy.space,
        "encoder": name_of(encoder) if callable(encoder) else encoder,
    }
    own = {"reward": name_of(reward)} if reward else {}
    more = {"options": options.model_dump(mode="json") | own} if options else own
    return what | more | {"settings": asdict(settings)}


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
    encoder: str | Callable | None = None,
    options: Pipeline | None = None,
    reward: Callable | None = None,
    evaluate_every: int = 0,
    log_with: str = "none",
    again: str = "continue with resume=True",
) -> dict:
    """Train, save and evaluate one run.

    space            the method's (methods.py)
    encoder          phi by name, or one's own: encoder(images) -> [B, D]
    options          of the large presets (None: the preset's)
    reward           one's own in place of the preset's: reward(images, prompts) -> [B]
    evaluate_every   iterations between evaluations; 0: only before and after
    log_with         none, tensorboard or wandb
    progress         show a bar, and one line when a signal ends the run; `again` says there how to go on

    Returns "base" and "final" (numbers of `Task.evaluate`), "history" (`State.metrics` of every iteration),
    "seconds" (training), "base_images" and "images" (those of `Task.evaluate`, prompt by prompt).

    Raises ValueError with one clear line for an unknown preset or method, a bad setting, or a directory
    that holds another run or in which another process is at work; then the directory is as it was.
    """
    from accelerate import Accelerator
    from accelerate.utils import ProjectConfiguration
    from tqdm import tqdm

    choices = (("preset", preset, PRESETS), ("method", method, METHODS), ("tracker", log_with, TRACKERS))
    for kind, choice, table in choices:
        if choice not in table:
            raise ValueError(f"unknown {kind} {choice!r}; {near(choice, table)}choose one of {', '.join(table)}")
    options, settings = options or PRESETS[preset].options, settings or PRESETS[preset].settings
    description = described(preset, method, weight, space, encoder, settings, options, reward)
    habits = {"save_every": save_every, "evaluate_every": evaluate_every, "log_with": log_with}
    policy = METHODS[method](weight, clip=settings.clip, space=space)
    folder = Path(output_dir)
    project = ProjectConfiguration(str(folder), logging_dir=str(folder / "logs"))
    # accelerate would not join several processes without a GPU, and the small worlds compute on the CPU: NCCL has no use
    cpu = not torch.accelerator.is_available() or (options is None and "LOCAL_RANK" in os.environ)
    accelerator = Accelerator(cpu=cpu, log_with=tracker(log_with), project_config=project)
    first = accelerator.is_main_process
    refuse_in_parts(not settings.micro_batch and processes() > 1 and options and options.lora_rank == 0)
    keeper, said, lock = Keeper(folder), [], threading.Lock()

    def stop() -> None:
        with lock:
            keeper.save()
            if first and progress and not said:
                said.append(directory.farewell(folder, again))
                print(f"\n{said[0]}", file=sys.stderr, flush=True)

    with ExitStack() as stack:
        if torch.get_default_device().type != "cpu":  # what is meant for a GPU is sent there; indices and noise are not
            stack.enter_context(torch.device("cpu"))
        claim = stack.enter_context(Claim(folder, description, resume)) if first else None
        stack.enter_context(stopping(stop, claim.leave if claim else None))
        stack.callback(keeper.save)  # also when something fails
        accelerator.wait_for_everyone()

        task = PRESETS[preset].task(encoder, options, reward)
        keys = dict(getattr(task.model.encode, "keys", {}))  # of cached prompt embeddings
        same = {"run": directory.identity(description), "prompts": [*map(str, task.prompts)], "embeddings": keys}
        saved = directory.load(folder, trainable(task.model), bool(settings.ema), same) if resume else None
        if not settings.micro_batch:
            settings = replace(settings, micro_batch=(saved or {}).get("micro_batch", 0))
            settings = fitted(task.model, task.prompts, settings)
            description["settings"] = asdict(settings)
            if first:
                print(f"micro-batch: {settings.micro_batch}, found by trial", file=sys.stderr)
        state, history = start(task.model, settings), []
        if saved:
            state.bandwidth = saved["bandwidth"]
        else:
            calibrate_on(state, task.prompts, task.encoder, settings)

        evaluate = lambda: map(checkpoint.plain, task.evaluate(settings, state.bandwidth))  # noqa: E731
        base, before = evaluate()
        if saved:
            state.load_state_dict(saved)
            history = saved["history"]
        if first:
            write_json(folder / directory.RECORD, description | habits)
        if log_with != "none":
            accelerator.init_trackers("perceptual-entropy", {k: str(v) for k, v in description.items()})
            stack.callback(lambda: [each.finish() for each in accelerator.trackers])

        loop = train(task.model, task.prompts, task.reward, task.encoder, policy, settings, state)
        shown = dict(desc=f"{method:>12}", total=settings.iterations, initial=state.iteration)
        bar = tqdm(loop, **shown, disable=not (progress and first))
        for state in bar:
            n, entry = state.iteration, checkpoint.plain(state.metrics)
            if evaluate_every and n % evaluate_every == 0:
                with state.averaged():
                    numbers, images = evaluate()
                entry |= {f"eval_{name}": value for name, value in numbers.items()}
                if first:
                    save_grid(folder / "images" / f"iteration-{n:06d}.png", images, task.images_per_prompt)
            history = [*history, entry]
            accelerator.log(entry, step=n)
            bar.set_postfix(reward=f"{entry['reward']:.3f}", variance=f"{entry['feature_variance']:.3f}")
            latest = checkpoint.snapshot(state.state_dict()) | same
            latest |= {"history": history, "micro_batch": settings.micro_batch}
            if first:
                keeper.newest = latest
                if n % save_every == 0 or n == settings.iterations:
                    keeper.save()

        with state.averaged():
            final, after = evaluate()
            seconds = sum(m["seconds"] for m in history)
            result = {"base": base, "final": final, "seconds": seconds, "iterations": state.iteration}
            task.model.save(folder / "weights")
            if first:
                if task.source:
                    card = model_card(task.model, task.source, description, result, folder / "weights")
                    checkpoint.atomic_write(folder / "weights" / "README.md", lambda file: file.write_text(card))
                write_json(folder / "evaluation.json", result)
        accelerator.wait_for_everyone()
    return result | {"history": history, "base_images": before, "images": after}


def tracker(name: str) -> str | None:
    """What `Accelerator` takes; it would leave a tracker that is not installed out without a word."""
    from accelerate.tracking import get_available_trackers as available

    if name != "none" and name not in [str(t.value) for t in available()]:
        raise ValueError(f"{name} is not installed; pip install {name}, or choose another --log-with")
    return None if name == "none" else name


def main(arguments: list[str] | None = None) -> int:
    return one_voice(interruptible, command, train_as_asked, arguments)


def train_as_asked(arguments: list[str] | None) -> None:
    given, began = asked(Run, "ref.train", arguments), time.perf_counter()
    large = given.preset in LARGE
    what = ("preset", "method", "output_dir", "weight", "settings", "resume", "save_every", "space", "encoder")
    result = run(
        **{name: getattr(given, name) for name in what},
        options=given.options if large else None,
        evaluate_every=50 * large if given.evaluate_every is None else given.evaluate_every,
        log_with=given.log_with or ("tensorboard" if large else "none"),
        again=f"continue with: python -m ref.train --output-dir {shlex.quote(str(given.output_dir))} --resume",
    )
    if processes() > 1:
        others = rank() > 0
        torch.distributed.destroy_process_group()
        if others:
            return
    for name, value in result["final"].items():
        print(f"{name:>20}  {result['base'][name]:9.4f} -> {value:9.4f}")
    print(f"{time.perf_counter() - began:.0f} s; results in {given.output_dir}")


if __name__ == "__main__":
    sys.exit(main())
