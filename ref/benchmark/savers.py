"""What saves passes, one thing after the other: passes, seconds and exactness, beside Flow-GRPO's order of work.

    python -m ref.models.tiny outputs/wide --wide
    python -m ref.benchmark.savers --preset sd35_medium --model outputs/wide/sd3 --height 64 --width 64 --json savers.json

From the preset to its fast twin: each row keeps what the rows above changed. All rows take turns in one process, on one
model, with one optimiser step an iteration; seconds (on a CPU of computing, so take one thread) are medians over rounds,
and the ratio is taken round by round.
Passes are counted by a hook: samples times branches of guidance, for each image of an iteration.
"""

import dataclasses
import sys
from collections.abc import Callable
from pathlib import Path
from statistics import mean
from typing import Annotated

from annotated_types import Ge, Le
from tyro.conf import arg

from ref.benchmark.flow_grpo import differences, iteration, our_iteration, text_encoders, timed
from ref.benchmark.measure import Passes, spread
from ref.grpo import calibrate_on, start, train
from ref.methods import METHODS
from ref.options import command
from ref.presets import LARGE, PRESETS, Task
from ref.runs import Work, asked
from ref.scale.directory import write_json
from ref.scale.microbatch import fitted
from ref.scale.paths import refuse_unwritable
from ref.scale.signals import interruptible
from ref.scale.weights import assign, copied, trainable
from ref.settings import Settings, in_one_line

THEIRS, OURS = "Flow-GRPO's order of work", "ours, the same settings"
EXACT = {  # what a row does to the result; tests/test_sampling.py, test_grpo.py and test_policy.py hold it to this
    "guidance": "another policy: without guidance",
    "window": "exact for the steps it trains; others are not explored",
    "shared start": "exact; a group's members start from one noise",
    "tail": "second order; errs like Euler's with more calls",
    "best and worst": "biased: the middle of a group is left out",
    "half of the groups flat": "exact to 1e-6: they have no gradient",
}


@in_one_line
class Savers(Work):
    """What each thing that saves passes saves, from a preset to its fast twin."""

    repeats: Annotated[int, Ge(3), Le(10**6)] = 5  # rounds that count
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
    rows = {"guidance": (settings, asked_for)} if asked_for else {}
    now = asked_for or guidance
    for name, keys in {
        "window": ("trained", "window"), "shared start": ("same_noise",), "tail": ("tail_steps",),
        "best and worst": ("best_and_worst",),
    }.items():  # fmt: skip
        changes = {key: getattr(fast.settings, key) for key in keys}
        if changes.get("best_and_worst"):  # the same share of the group
            changes["best_and_worst"] = max(
                2, changes["best_and_worst"] * settings.group_size // fast.settings.group_size
            )
        changed = dataclasses.replace(settings, **changes)
        if changed != settings:
            settings = changed
            rows[name] = settings, now
    return rows


def savers(task: Task, preset: str, settings: Settings, repeats: int, encode: Callable) -> list[dict]:
    """A row for each saver: name, passes, seconds an image, ratio to the baseline, exactness; `encode` as `against`'s."""
    model, images = task.model, settings.groups * settings.group_size
    settings = dataclasses.replace(settings, updates=1, iterations=10**9, ema=0)
    guided = getattr(model, "guidance_scale", None)
    rows = steps_to_the_twin(preset, settings, guided)
    plain = {OURS: (settings, guided)} | (
        {"half of the groups flat": (settings, guided)} if settings.groups > 1 else {}
    )
    fast = {f"{THEIRS}, fast recipe": rows["window"]} if "window" in rows else {}
    everything = {THEIRS: (settings, guided)} | fast | plain | rows
    method, state = METHODS["flow_grpo"](clip=settings.clip), start(model, settings)
    calibrate_on(state, task.prompts, task.encoder, settings)
    flat = set(task.prompts[::2])
    judged = lambda images, prompts: task.reward(images, prompts) * images.new_tensor([p not in flat for p in prompts])  # noqa: E731
    loops = {
        name: train(model, task.prompts, judged if "flat" in name else task.reward, task.encoder, method, own, state)
        for name, (own, _) in (plain | rows).items()
    }
    counter, weights = Passes(model), copied(trainable(model))
    found = {name: {"seconds": [], "passes": []} for name in everything}
    values = {}
    for n in range(repeats + 1):  # the first warms up, and shows that two rows are the same
        for name, (own, scale) in everything.items():
            if scale is not None:
                model.guidance_scale = scale
            assign(trainable(model), weights)  # the same work in every row
            state.iteration = n
            work = (lambda: our_iteration(loops[name], own)) if name in loops else (lambda: iteration(task, encode, method, own, state))  # fmt: skip
            counter.since(images)
            seconds, made = timed(work)
            values |= {name: made} if n == 0 and name in (THEIRS, OURS) else {}
            if n:
                found[name]["seconds"].append(seconds / images)
                found[name]["passes"].append(counter.since(images))
    counter.hook.remove()
    if guided is not None:
        model.guidance_scale = guided
    error = differences(values[OURS], values[THEIRS])["gradient"]
    return [
        {
            "name": name,
            "passes": {kind: mean(p[kind] for p in row["passes"]) for kind in ("forward", "trained")},
            "seconds": spread(row["seconds"]),
            "faster": spread([a / b for a, b in zip(found[THEIRS]["seconds"], row["seconds"])]),
            "exact": EXACT.get(name, f"the same: gradients differ by {error:.0e} of the largest" if name == OURS else ""),
        }
        for name, row in found.items()
    ]  # fmt: skip


def table(rows: list[dict]) -> str:
    """As Markdown."""
    lines = [
        "| | passes an image, forward + trained | seconds an image | times as fast | exactness |",
        "|---|---|---|---|---|",
    ]
    for row in rows:
        p, s, f = row["passes"], row["seconds"], row["faster"]
        name = ("+ " if row["name"] in list(EXACT)[:5] else "") + row["name"]
        lines.append(
            f"| {name} | {p['forward']:.1f} + {p['trained']:.1f} | {s['median']:.3g} ({s['low']:.3g} .. {s['high']:.3g}) | "
            f"{f['median']:.2f} ({f['low']:.2f} .. {f['high']:.2f}) | {row['exact']} |"
        )
    return "\n".join(lines)


def print_savers(arguments: list[str] | None) -> None:
    given = asked(Savers, "ref.benchmark.savers", arguments)
    if given.json_file:
        refuse_unwritable(given.json_file, "--json")
    steps_to_the_twin(given.preset, given.settings, None)  # refuses before anything is loaded
    task = PRESETS[given.preset].task(given.encoder, given.options if given.preset in LARGE else None)
    encode = text_encoders(task.model)
    rows = savers(task, given.preset, fitted(task.model, task.prompts, given.settings), given.repeats, encode)
    print(table(rows))
    if given.json_file:
        write_json(given.json_file, rows)


def main(arguments: list[str] | None = None) -> int:
    return interruptible(command, print_savers, arguments)


if __name__ == "__main__":
    sys.exit(main())
