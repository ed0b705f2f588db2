"""What saves passes, one thing after the other: passes, seconds and exactness, beside Flow-GRPO's order of work.

    python -m ref.models.tiny outputs/wide --wide
    python -m ref.benchmark.savers --preset sd35_medium --model outputs/wide/sd3 --height 64 --width 64 --json savers.json
    python -m ref.benchmark.savers --preset letters --race 3 --seeds 3

From the preset to its fast twin: each row with a + keeps what the rows above changed. All rows take turns in one process, on
one model, with one optimiser step an iteration; seconds (on a CPU of computing, so take one thread) are medians over rounds,
and the ratio is taken round by round. Passes are counted by a hook: samples times branches of guidance, for each image of an
iteration. Below the twin come what can be set on top, to train on half of each group, and rows in which every second
prompt's rewards are all alike.

With `--race R` preset and twin are trained by Flow-GRPO instead, until five iterations' mean reward reaches R: seconds of
computing, and what an evaluation finds there.
"""

import dataclasses
import math
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from statistics import mean
from typing import Annotated

import torch
from annotated_types import Ge, Le
from tyro.conf import arg

from ref.benchmark.flow_grpo import FAST, differences, iteration, our_iteration, text_encoders, timed
from ref.benchmark.measure import Passes, spread
from ref.grpo import calibrate_on, start, train
from ref.methods import METHODS
from ref.models.sd3 import SD3
from ref.options import command
from ref.presets import LARGE, PRESETS, Task
from ref.runs import Work, asked
from ref.sampling import pick_prompts
from ref.scale.directory import write_json
from ref.scale.microbatch import fitted
from ref.scale.paths import refuse_unwritable
from ref.scale.signals import interruptible
from ref.scale.weights import assign, copied, trainable
from ref.settings import Settings, in_one_line

THEIRS, THEIR_FAST, OURS = "Flow-GRPO's order of work", "Flow-GRPO-Fast (October 2025)", "ours, the same settings"
EXACT = {  # what a row does to the result; tests/test_sampling.py, test_grpo.py and test_policy.py hold it to this
    "no guidance": "another policy: without guidance",
    "window": "exact for the steps it trains; others are not explored",
    "shared start": "exact; a group's members start from one noise",
    "tail": "of second order, with fewer calls",
}
EXTREMES, FLAT = "best and worst half of each group", "half of the groups flat"


@in_one_line
class Savers(Work):
    """What each thing that saves passes saves, from a preset to its fast twin."""

    repeats: Annotated[int, Ge(3), Le(10**6)] = 5  # rounds that count
    race: float | None = None  # train preset and twin until this mean reward instead
    seeds: Annotated[int, Ge(1), Le(1000)] = 5  # of the race
    json_file: Annotated[Path | None, arg(name="json")] = None  # write all numbers here


def steps_to_the_twin(
    preset: str, settings: Settings, guidance: float | None
) -> dict[str, tuple[Settings, float | None]]:
    """For each row what it is run with, (settings, guidance), in the order of EXACT. Guidance is None where there is none.

    Raises ValueError for a preset without a fast twin.
    """
    if f"{preset}_fast" not in PRESETS:
        raise ValueError(f"preset {preset} has no fast twin; take one of {', '.join(p[:-5] for p in PRESETS if p.endswith('_fast'))}")  # fmt: skip
    fast = PRESETS[f"{preset}_fast"]
    asked_for = fast.options and fast.options.guidance_scale
    rows = {"no guidance": (settings, asked_for)} if asked_for else {}
    now = asked_for or guidance
    for name, keys in {
        "window": ("trained", "window"),
        "shared start": ("same_noise",),
        "tail": ("tail_steps",),
    }.items():
        changed = dataclasses.replace(settings, **{key: getattr(fast.settings, key) for key in keys})
        if changed != settings:
            settings = changed
            rows[name] = settings, now
    return rows


@dataclasses.dataclass
class Row:
    """What a row runs, at which scale of guidance; what it does to the result, and what was measured, round by round."""

    work: Callable[[], dict]
    guidance: float | None
    exact: str = ""
    seconds: list[float] = dataclasses.field(default_factory=list)
    passes: list[dict] = dataclasses.field(default_factory=list)


def savers(task: Task, preset: str, settings: Settings, repeats: int, encode: Callable) -> dict:
    """{"setting": in words, "rows": for each saver its name, passes, seconds an image, ratio, exactness}.

    encode: as `against`'s.
    """
    model, images = task.model, settings.groups * settings.group_size
    settings = dataclasses.replace(settings, updates=1, iterations=10**9, ema=0)
    guided = getattr(model, "guidance_scale", None)
    steps = steps_to_the_twin(preset, settings, guided)
    twin, scale = list(steps.values())[-1]
    fast = dataclasses.replace(settings, **FAST)
    method, state = METHODS["flow_grpo"](clip=settings.clip), start(model, settings)
    calibrate_on(state, task.prompts, task.encoder, settings)

    def judged(images, prompts):  # every second of the iteration's prompts has one reward for all
        flat = list(dict.fromkeys(pick_prompts(task.prompts, settings, state.iteration)))[::2]
        return task.reward(images, prompts) * images.new_tensor([p not in flat for p in prompts])

    def theirs(own: Settings, reward: Callable = task.reward) -> Callable:
        return lambda: iteration(dataclasses.replace(task, reward=reward), encode, method, own, state)

    def ours(own: Settings, reward: Callable = task.reward) -> Callable:
        loop = train(model, task.prompts, reward, task.encoder, method, own, state)
        return lambda: our_iteration(loop, own)

    rows = {
        THEIRS: Row(theirs(settings), guided),
        THEIR_FAST: Row(theirs(fast), scale, "another policy: a window" + ", without guidance" * (scale != guided)),
        OURS: Row(ours(settings), guided),
    }
    rows |= {name: Row(ours(own), scale, EXACT[name]) for name, (own, scale) in steps.items()}
    half = dataclasses.replace(twin, best_and_worst=max(2, settings.group_size // 2))
    rows[EXTREMES] = Row(ours(half), scale, "biased: the middle of a group is left out")
    if settings.groups > 1:
        left_out = "left out, the mean is over the rest" if isinstance(model, SD3) else "trained all the same"
        rows[f"{THEIR_FAST}, {FLAT}"] = Row(theirs(fast, judged), scale, left_out)
        rows[FLAT] = Row(ours(twin, judged), scale, "exact to 1e-6: they have no gradient")
    counter, weights, values = Passes(model), copied(trainable(model)), {}
    for n in range(repeats + 1):  # the first warms up, and shows that two rows are the same
        for name, row in rows.items() if n else [(name, rows[name]) for name in (THEIRS, OURS)]:
            if row.guidance is not None:
                model.guidance_scale = row.guidance
            assign(trainable(model), weights)  # the same work in every row
            state.iteration = n
            counter.since(images)
            seconds, made = timed(row.work)
            if n == 0:
                values[name] = made
            else:
                row.seconds.append(seconds / images)
                row.passes.append(counter.since(images))
    counter.hook.remove()
    if guided is not None:
        model.guidance_scale = guided
    error = differences(values[OURS], values[THEIRS])["gradient"]
    rows[OURS].exact = f"the same: gradients differ by {error:.0e} of the largest"
    size = "x".join(map(str, model.latent_shape))
    tokens = model.encode(task.prompts[:1])["prompt_embeds"].shape[1]
    return {
        "setting": f"{preset}, {settings.groups} x {settings.group_size} images, {size} latents, {tokens} text tokens, "
        f"micro-batch {settings.micro_batch}, {repeats} rounds, {torch.get_num_threads()} threads",
        "rows": [
            {
                "name": name,
                "passes": {kind: mean(p[kind] for p in row.passes) for kind in ("forward", "trained")},
                "seconds": spread(row.seconds),
                "faster": spread([a / b for a, b in zip(rows[THEIRS].seconds, row.seconds)]),
                "exact": row.exact,
            }
            for name, row in rows.items()
        ],
    }


def figures(s: dict[str, float], form: str) -> str:
    return f"{s['median']:{form}} ({s['low']:{form}} .. {s['high']:{form}})"


def table(*several: dict) -> str:
    """What `savers` found as Markdown, several presets side by side: seconds as medians, ratios with quartiles."""
    found = {each["setting"].split(",")[0]: {row["name"]: row for row in each["rows"]} for each in several}
    heads = "".join(f" {preset}: passes, forward + trained | seconds an image | times as fast |" for preset in found)
    lines = [f"| |{heads} exactness |", "|---|" + "---|" * (3 * len(found) + 1)]
    for name in max(found.values(), key=len):
        cells, there = [], [rows[name] for rows in found.values() if name in rows]
        for rows in found.values():
            if name in rows:
                p, seconds = rows[name]["passes"], rows[name]["seconds"]["median"]
                cells += [
                    f"{p['forward']:.1f} + {p['trained']:.1f}",
                    f"{seconds:.3g}",
                    figures(rows[name]["faster"], ".2f"),
                ]
            else:
                cells += [""] * 3
        exact = " / ".join(dict.fromkeys(row["exact"] for row in there))
        lines.append(f"| {'+ ' * (name in EXACT)}{name} | {' | '.join(cells)} | {exact} |")
    return "\n".join(lines)


def race(task: Task, preset: str, settings: Settings, target: float, seeds: int) -> Iterator[dict]:
    """For each seed, of "preset" and "twin": seconds of computing until the mean reward of 5 iterations is `target` (None:
    never), iterations, and the evaluation's reward and feature variance there."""
    task = dataclasses.replace(task, images_per_prompt=settings.images_per_prompt or task.images_per_prompt)
    guided, weights = getattr(task.model, "guidance_scale", None), copied(trainable(task.model))
    twin = list(steps_to_the_twin(preset, settings, guided).values())[-1]
    for seed in range(settings.seed, settings.seed + seeds):
        row = {"seed": seed}
        for name, (own, scale) in {"preset": (settings, guided), "twin": twin}.items():
            if scale is not None:
                task.model.guidance_scale = scale
            assign(trainable(task.model), weights)
            own = dataclasses.replace(own, seed=seed)
            state, rewards, spent = start(task.model, own), [], 0.0
            calibrate_on(state, task.prompts, task.encoder, settings)  # which Flow-GRPO does not need: not timed
            loop = train(
                task.model, task.prompts, task.reward, task.encoder, METHODS["flow_grpo"](clip=own.clip), own, state
            )
            while (reached := mean(rewards[-5:] or [-math.inf])) < target and state.iteration < own.iterations:
                seconds, _ = timed(lambda: next(loop))
                spent += seconds
                rewards.append(state.metrics["reward"])
            there = task.evaluate(own, state.bandwidth)[0]
            row[name] = {"seconds": spent if reached >= target else None, "iterations": state.iteration}
            row[name] |= {key: there[key] for key in ("reward", "feature_variance")}
        yield row


def print_race(rows: list[dict]) -> None:
    for row in rows:
        preset, twin = row["preset"], row["twin"]
        both = preset["seconds"] and twin["seconds"]
        print(
            f"seed {row['seed']}: "
            + (f"{twin['seconds'] / preset['seconds']:.2f} of the seconds" if both else "not reached")
        )
        for name, one in (("preset", preset), ("twin", twin)):
            print(
                f"  {name:<6} {one['seconds'] or math.nan:.1f} s, {one['iterations']} iterations; evaluated there: reward "
                f"{one['reward']:.3f}, feature variance {one['feature_variance']:.3f}"
            )


def print_savers(arguments: list[str] | None) -> None:
    given = asked(Savers, "ref.benchmark.savers", arguments)
    if given.json_file:
        refuse_unwritable(given.json_file, "--json")
    steps_to_the_twin(given.preset, given.settings, None)  # refuses before anything is loaded
    task = PRESETS[given.preset].task(given.encoder, given.options if given.preset in LARGE else None)
    settings = fitted(task.model, task.prompts, given.settings)
    if given.race is not None:
        found = list(race(task, given.preset, settings, given.race, given.seeds))
        print_race(found)
    else:
        found = savers(task, given.preset, settings, given.repeats, text_encoders(task.model))
        print(f"{found['setting']}\n\n{table(found)}")
    if given.json_file:
        write_json(given.json_file, found)


def main(arguments: list[str] | None = None) -> int:
    return interruptible(command, print_savers, arguments)


if __name__ == "__main__":
    sys.exit(main())
