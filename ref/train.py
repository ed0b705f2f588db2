"""The command: one fine-tuning run from a preset, with checkpoints, exact resume and evaluation.

    python -m ref.train --preset letters --method pec --weight 1.0 --output-dir outputs/pec
    python -m ref.train --output-dir outputs/pec --resume
    python -m ref.train --preset sd35_medium --memory 24 --method pec --output-dir outputs/sd35
    accelerate launch --num_processes 8 -m ref.train --preset flux_dev --method pcvae --output-dir outputs/flux

An output directory holds

    run.json              preset, method, weight, options and settings; `--resume` reads it, nothing is repeated
    checkpoint-*.pt       the last two checkpoints; Ctrl-C, SIGTERM and SIGHUP write one more (scale/signals.py)
    metrics.json          `State.metrics` of every iteration up to the newest checkpoint; where there was an
                          evaluation, its numbers too, with `eval_` before their names
    evaluation.json       base model and fine-tuned model, sampled with the ODE on fixed noise
    images/               the images of all evaluations, a line for each prompt; iteration-000000 is the base model's
    best/                 the weights of the evaluation with the highest reward, where evaluations are asked for
    logs/                 of TensorBoard, where it is asked for
    weights/              the trained weights: a LoRA that stock diffusers loads, or the small network

With several processes the first one writes, and all must see the directory. Evaluated and saved are the
averaged weights where `ema` keeps such.

`--resume` goes on exactly: on the CPU to the bit; on a GPU up to the roundings of attention's backward pass, whose order of
sums is not fixed. A copy of weights, moments and averages is kept on the CPU after every iteration, so that a signal
loses nothing: small for a LoRA; where all weights are trained the first process's host needs 16 bytes a weight twice,
67 GiB for SD3.5-Medium.
"""

import os
import shlex
import sys
import threading
import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import asdict, replace
from pathlib import Path

import torch

from ref.constraint import held
from ref.grpo import calibrate_on, collapsed, start, train
from ref.methods import METHODS
from ref.models import push
from ref.models.card import model_card
from ref.options import Pipeline, command, near
from ref.presets import LARGE, PRESETS
from ref.runs import TRACKERS, Run, asked, described, plan
from ref.scale import checkpoint, directory
from ref.scale.directory import Claim, Keeper, write_json
from ref.scale.memory import out_of_memory
from ref.scale.microbatch import fitted, refuse_in_parts
from ref.scale.processes import device_type, one_voice, processes, rank
from ref.scale.shown import bar, clock, log_grid, save_grid, say, showing
from ref.scale.signals import interruptible, stopping
from ref.scale.weights import trainable
from ref.settings import Settings


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
    device: str | None = None,
    push_to_hub: str | None = None,
) -> dict:
    """Train, save and evaluate one run.

    space            the method's (methods.py)
    encoder          phi by name, or one's own: encoder(images) -> [B, D]
    options          of the large presets (None: the preset's)
    reward           one's own in place of the preset's: reward(images, prompts) -> [B]
    evaluate_every   iterations between evaluations; 0: only before and after
    log_with         none, tensorboard or wandb
    progress         show a plan, bars, and one line when a signal ends the run; `again` says there how to go on
    device           cuda, mps or cpu (None: the GPU where there is one)
    push_to_hub      OWNER/NAME of a repository of the hub for weights, card and samples

    Returns "base" and "final" (numbers of `Task.evaluate` and of `held`), "history" (`State.metrics` of every iteration),
    "seconds" (training), "best" where there were evaluations (its iteration and reward), "base_images" and "images" (those of `Task.evaluate`, prompt by prompt).

    Raises ValueError with one clear line for an unknown preset or method, a bad setting, or a directory
    that holds another run or in which another process is at work; then the directory is as it was.
    """
    from accelerate import Accelerator
    from accelerate.utils import ProjectConfiguration

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
    if push_to_hub:
        push.refuse(push_to_hub, preset if options is None else None)
    # accelerate would not join several processes without a GPU, and the small worlds compute on the CPU: NCCL has no use
    cpu = device_type(device) == "cpu" or (options is None and "LOCAL_RANK" in os.environ)
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
        stack.enter_context(showing(progress and first))
        accelerator.wait_for_everyone()
        say(plan(description, habits, folder), sys.stdout)

        task = PRESETS[preset].task(encoder, options, reward)
        task = replace(task, images_per_prompt=settings.images_per_prompt or task.images_per_prompt)
        keys = dict(getattr(task.model.encode, "keys", {}))  # of cached prompt embeddings
        same = {"run": directory.identity(description), "prompts": [*map(str, task.prompts)], "embeddings": keys}
        saved = directory.load(folder, trainable(task.model), bool(settings.ema), same) if resume else None
        if not settings.micro_batch:
            settings = replace(settings, micro_batch=(saved or {}).get("micro_batch", 0))
            settings = fitted(task.model, task.prompts, settings)
            description["settings"] = asdict(settings)
            say(f"micro-batch: {settings.micro_batch}, found by trial")
        state, history = start(task.model, settings), []
        if saved:
            state.bandwidth = saved["bandwidth"]
        else:
            calibrate_on(state, task.prompts, task.encoder, settings)

        def evaluate(n: int) -> tuple[dict, torch.Tensor]:
            numbers, images = map(checkpoint.plain, task.evaluate(settings, state.bandwidth))
            if first and images.ndim == 4:
                save_grid(folder / "images" / f"iteration-{n:06d}.png", images, task.images_per_prompt)
                log_grid(accelerator.trackers, images, task.images_per_prompt, n)
            return numbers, images

        if log_with != "none":
            accelerator.init_trackers("perceptual-entropy", {k: str(v) for k, v in description.items()})
            stack.callback(lambda: [each.finish() for each in accelerator.trackers])
        base, before = evaluate(0)
        if saved:
            state.load_state_dict(saved)
            history = saved["history"]
        if first:
            write_json(folder / directory.RECORD, description | habits)

        evaluated = {n: m["eval_reward"] for n, m in enumerate(history, 1) if "eval_reward" in m}

        def judge(n: int) -> tuple[dict, torch.Tensor]:
            """An evaluation of the averaged weights, which are kept where none was better."""
            with state.averaged():
                numbers, images = evaluate(n)
                if evaluate_every and numbers["reward"] > max(
                    (r for i, r in evaluated.items() if i != n), default=-1e30
                ):
                    task.model.save(folder / "best")
            evaluated[n] = numbers["reward"]
            return numbers, images

        began, begun, judged = time.perf_counter(), state.iteration, None
        loop = train(task.model, task.prompts, task.reward, task.encoder, policy, settings, state)
        for state in (bars := bar(loop, f"{method:>12}", logged=True, total=settings.iterations, initial=begun)):
            n, entry = state.iteration, checkpoint.plain(state.metrics)
            if n == begun + 1 < settings.iterations:
                say(clock(time.perf_counter() - began, settings.iterations - n))
            judged = judge(n) if evaluate_every and n % evaluate_every == 0 else None
            if judged:
                entry |= {f"eval_{name}": value for name, value in judged[0].items()}
            history = [*history, entry]
            accelerator.log(entry, step=n)
            bars.set_postfix(reward=f"{entry['reward']:.3f}", variance=f"{entry['feature_variance']:.3f}")
            latest = checkpoint.snapshot(state.state_dict()) | same
            latest |= {"history": history, "micro_batch": settings.micro_batch}
            if first:
                keeper.newest = latest
                if n % save_every == 0 or n == settings.iterations:
                    keeper.save()

        if collapsed(state, settings):
            keeper.save()
            why = f"the groups keep {state.kept:.3f} of the base model's feature variance"
            say(f"{why}: {directory.farewell(folder, again)} and a smaller --stop-below-diversity")
        final, after = judged or judge(state.iteration)
        base |= {"diversity": 1.0, "diversity_sde": 1.0, "weight": 0.0}
        final |= held(base, final, history)
        seconds = sum(m["seconds"] for m in history)
        result = {"base": base, "final": final, "seconds": seconds, "iterations": state.iteration}
        if evaluate_every:
            best = max(evaluated, key=evaluated.get)
            result["best"] = {"iteration": best, "reward": evaluated[best]}
        with state.averaged():
            task.model.save(folder / "weights")
        if first:
            if task.source:
                for name, images in (("before", before), ("after", after)):
                    save_grid(folder / "weights" / f"{name}.png", images, task.images_per_prompt, widest=1536)
                card = model_card(task.model, task.source, description, result, folder / "weights")
                checkpoint.atomic_write(folder / "weights" / "README.md", lambda file: file.write_text(card))
            write_json(folder / "evaluation.json", result)
            if push_to_hub:
                say(f"pushed to {push.push(push_to_hub, folder / 'weights')}")
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
    what += ("device", "push_to_hub")
    result = run(
        **{name: getattr(given, name) for name in what},
        options=given.options if large else None,
        progress=not given.quiet,
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
    if (target := given.settings.target_diversity) is not None:
        ode, sde = result["final"]["diversity"], result["final"]["diversity_sde"]
        print(f"of the base model's diversity {target} was asked for: {ode:.3f} by the ODE, {sde:.3f} by the SDE in the "
              f"last quarter of training, a gap of {ode - sde:+.3f} between the samplers")  # fmt: skip
    print(f"{time.perf_counter() - began:.0f} s; results in {given.output_dir}")


if __name__ == "__main__":
    sys.exit(main())
