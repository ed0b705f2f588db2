"""What a run is: declared for a command line, read from run.json, and said in words before it starts."""

import argparse
from dataclasses import asdict, fields
from pathlib import Path
from typing import Annotated, Literal

from annotated_types import Ge, Le
from tyro import MISSING
from tyro.conf import OmitArgPrefixes

from ref.grpo import refuse_target
from ref.methods import METHODS, SPACES
from ref.options import Options, Pipeline, read
from ref.presets import LARGE, PRESETS
from ref.sampling import name_of
from ref.scale import directory
from ref.scale.processes import DEVICES, processes
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
    device: Literal[DEVICES] | None = None  # (None: the GPU where there is one)
    quiet: bool = False  # no plan and no bars: the result alone, and errors
    push_to_hub: str | None = None  # OWNER/NAME: weights, card and samples go there at the end


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
    there = given.resume and given.output_dir and (given.output_dir / directory.RECORD).exists()
    if given.resume and not there and not given.preset:
        raise ValueError(f"there is no run to continue in {given.output_dir}; give --preset and --method to start one")
    if there:
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
    """What run.json says of a run. Raises ValueError for a weight, a space or a target that the method does not take."""
    policy = METHODS[method](weight, clip=settings.clip, space=space)
    if settings.per_reward and "+" not in (options.reward if options else ""):
        raise ValueError("per_reward needs a sum of rewards, as in --reward pickscore:0.7+ocr:0.3")
    if (target := settings.target_diversity) is not None:
        refuse_target(policy)
        if weight is not None:
            raise ValueError(
                "a target diversity finds its weight itself; give --weight or --target-diversity, not both"
            )
    what = {
        "preset": preset,
        "method": method,
        "weight": policy.weight if target is None else None,
        "space": policy.space,
        "encoder": name_of(encoder) if callable(encoder) else encoder,
    }
    own = {"reward": name_of(reward)} if reward else {}
    more = {"options": options.model_dump(mode="json") | own} if options else own
    return what | more | {"settings": asdict(settings)}


def plan(description: dict, habits: dict, folder: Path) -> str:
    """What is about to be done, in a few lines: what is trained towards what, its size, its memory, where things go."""
    s, o, preset = Settings(**description["settings"]), description.get("options") or {}, description["preset"]
    what, prompts = f"preset {preset}", ""
    if o:
        lora = f"a LoRA of rank {o['lora_rank']}" if o["lora_rank"] else "all weights"
        what, prompts = f"{lora} of {o['model']}, {o['height']} x {o['width']} pixels", f", prompts {o['prompts']}"
    phi = description["encoder"] or "the preset's"
    reward = description.get("reward") or o.get("reward") or "the preset's"
    twice = 2 if preset.startswith("sd35") and o["guidance_scale"] != 1 else 1  # classifier-free guidance
    drawn, chosen = s.groups * s.group_size, s.groups * (s.best_and_worst or s.group_size)
    train = twice * chosen * (s.window or s.trainable_steps)
    memory = f"micro-batch {s.micro_batch}" if s.micro_batch else "the micro-batch is found by trial"
    written = ["metrics.json", "images/", *["best/"] * bool(habits["evaluate_every"]), "weights/"]
    written += ["logs/"] * (habits["log_with"] == "tensorboard")
    lines = {
        "trained": f"{what}, by {description['method']}, {processes()} process{'es' * (processes() > 1)}",
        "towards": f"reward {reward}, phi {phi}{prompts}",
        "iteration": f"{s.groups} prompts x {s.group_size} = {drawn} images; at most {twice * drawn * s.steps} passes of "
        f"the model to draw them, {train} to train, {s.updates} updates",
        "run": f"{s.iterations} iterations, a checkpoint every {habits['save_every']}, "
        + (
            f"an evaluation every {habits['evaluate_every']}"
            if habits["evaluate_every"]
            else "evaluations before and after"
        ),
        "memory": memory + (f", computed for {o['memory']} GB" if o.get("memory") else ""),
        "written": f"{folder}: {', '.join(written)}",
    }
    return "\n".join(f"{name:<10} {line}" for name, line in lines.items())
