"""Many runs, one table: methods x weights x seeds, cached run by run, summarised as mean ± spread.

    python -m ref.compare --preset letters --seeds 5 --runs flow_grpo pec:1 pec:2 pcvae:1 --jobs 2

    python -m ref.compare --preset sd35_medium --memory 80 --reward pickscore:0.7+ocr:0.3 --prompts ocr --runs flow_grpo pec

A run is named METHOD[@SPACE][/ENCODER][:WEIGHT]: `pec:1`, `clip_cov@perceptual:0.1`, `pec/faces:0.5`; or with a target
diversity in place of the weight, `pec:target=0.9`. What is left out is the method's default, or what --encoder or the preset
says. All options of ref.train are options of all runs.

Every run has a folder of its own under --output-dir, so the command can be stopped and started again:
finished runs are read, broken ones continued; Ctrl-C, SIGTERM and SIGHUP save those at work. It writes

    runs.csv                       a line for each run, and for the base model
    table.md, table.tex, table.csv table 1's twin: mean ± standard deviation over seeds, Norm.Avg, Overall
    front.png                      reward against diversity, with confidence ellipses

On the toys each job uses one CPU thread; on the large presets jobs share the GPU, and its memory.
"""

import csv
import dataclasses
import io
import json
import multiprocessing
import os
import re
import signal
import sys
import threading
from collections.abc import Callable, Iterable
from concurrent.futures import CancelledError, ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from statistics import mean, stdev
from typing import Annotated, Literal

import torch
from annotated_types import Ge, Le
from pydantic import Field

from ref import figures
from ref.methods import METHODS
from ref.metrics import normalized_average, table
from ref.options import command, near
from ref.presets import LARGE, PRESETS
from ref.runs import Work, asked, described
from ref.scale.checkpoint import atomic_write
from ref.scale.directory import Alone, refuse_another, write_json
from ref.scale.signals import ignoring_interrupts, interruptible, stopping
from ref.scoring.encoders import check_name
from ref.scoring.own import is_own
from ref.settings import in_one_line
from ref.train import run

FORMAT = 2  # of summary.json: one of another format is not read, but made again from the run's checkpoint
AGAIN = "the same command goes on"
SPACES = ("contrastive", "preference", "faces")  # of the letters, in which their diversity is measured
ENCODERS = {
    "mixture": ("direction",),
    "letters": (*SPACES, "sharp"),
    "letters_rule": (*SPACES, "sharp"),
}  # the preset's own first

# Quality and diversity columns with their formats; higher is better. The judge, and the spaces other
# than the run's own phi, are seen by nothing in training. A column has one unit for all rows: what is measured in a
# run's own phi is in none of them where runs differ in phi. The first diversity column is the front's.
LETTERS = (
    {"reward": ".3f", "held_out": ".3f", "utility": ".3f", "legibility": ".3f"},
    {f"var_{space}": ".3f" for space in SPACES} | {"typefaces": ".1f", "colour": ".3f", "pixel_variance": ".1f"},
)
COLUMNS = {
    "letters": LETTERS,
    "letters_rule": ({"reward": ".3f", "right": ".2f", "legibility": ".3f"}, LETTERS[1]),
    "mixture": (
        {"reward": ".3f"},
        {"feature_variance": ".3f", "pairwise_distance": ".3f", "effective_modes": ".2f", "pixel_variance": ".2f"},
    ),
}
OUTSIDE = {"vae_variance": ".1f", "pixel_variance": ".2f"}  # of the large presets; whatever phi is
WITHIN = {"feature_variance": ".3f", "pairwise_distance": ".3f", "vendi_score": ".2f"}  # one phi


def columns_of(preset: str, specs: Iterable[str]) -> tuple[dict, dict]:
    """Quality and diversity columns of a table of these runs."""
    if preset in COLUMNS:
        return COLUMNS[preset]
    one_phi = len({parse(spec)["encoder"] for spec in specs if spec != "base"}) < 2
    return {"reward": ".3f"}, (WITHIN if one_phi else {}) | OUTSIDE


def twin(runs: list[dict], preset: str, form: str = "markdown") -> str:
    """Table 1's twin at this scale, from the lines of runs.csv."""
    quality, diversity = columns_of(preset, [row["run"] for row in runs])
    columns = quality | {"quality_norm_avg": ".3f"} | diversity | {"diversity_norm_avg": ".3f", "overall": ".3f"}
    return table(scores(runs, tuple(quality), tuple(diversity)), columns, form)


def parse(spec: str) -> dict:
    """{"method", "space", "encoder", "weight", "target"} of a run's name. Raises ValueError with the remedy."""
    name, asked, target = spec.partition(":target=")
    found = re.fullmatch(figures.RUN, name)
    if asked and not (found and not found["weight"] and re.fullmatch(r"[\d.]+", target)):
        found = None
    if not found:
        raise ValueError(f"cannot read the run {spec!r}; write METHOD[@SPACE][/ENCODER][:WEIGHT or :target=SHARE]")
    if found["method"] not in METHODS:
        guess = near(found["method"], METHODS)
        raise ValueError(f"unknown method in {spec!r}; {guess}choose one of {', '.join(METHODS)}")
    weight = float(found["weight"]) if found["weight"] else None
    chosen = found.groupdict() | {"weight": weight, "target": float(target) if asked else None}
    METHODS[chosen["method"]](chosen["weight"], space=chosen["space"])  # refuses now what it would refuse later
    return chosen


def refuse_doubles(specs: list[str], preset: str, encoder: str | None = None) -> None:
    """Raise ValueError for a run that is there twice, by whatever name, or an encoder that the preset lacks."""
    seen = {}
    for spec in specs:
        chosen = parse(spec)
        phi = chosen["encoder"] or encoder or ENCODERS.get(preset, ("pickscore",))[0]
        if preset in LARGE or is_own(phi):
            check_name(phi)
        elif phi not in ENCODERS[preset]:
            raise ValueError(f"unknown encoder in {spec!r}; {preset} has {', '.join(ENCODERS[preset])}")
        policy = METHODS[chosen["method"]](chosen["weight"], space=chosen["space"])
        dial = policy.weight if chosen["target"] is None else f"target={chosen['target']}"
        name = (chosen["method"], policy.space, phi, dial)
        if name in seen:
            raise ValueError(f"{seen[name]} and {spec} are the same run; give one of them" if seen[name] != spec else
                             f"{spec} is given twice; its spread would be that of one run")  # fmt: skip
        seen[name] = spec


def planned(work: Work, spec: str, seed: int, folder: Path) -> tuple[Path, dict]:
    """The folder of a run, and what `run` is to be called with."""
    chosen = parse(spec)
    settings = dataclasses.replace(work.settings, seed=seed)
    if (target := chosen.pop("target")) is not None:
        settings = dataclasses.replace(settings, target_diversity=target)
    plan = {"preset": work.preset, "settings": settings, **chosen}
    plan["encoder"] = plan["encoder"] or work.encoder
    plan |= {"options": work.options} if work.preset in LARGE else {}
    return folder / (re.sub(r"[^\w.=+-]", "_", spec) + f"_seed{seed}"), plan


def stored(folder: Path, plan: dict) -> dict | None:
    """The result of this very run, None where there is none: summary.json says what made it."""
    try:
        summary = json.loads((folder / "summary.json").read_text(encoding="utf-8"))
        return summary if summary["made_by"] == made_by(plan) and summary["row"] and summary["base"] else None
    except (OSError, ValueError, KeyError, TypeError):
        return None


def made_by(plan: dict) -> dict:
    return {"format": FORMAT, **described(**plan)}


def one(work: Work, spec: str, seed: int, folder: Path) -> dict:
    """Train and evaluate one run, or read it when it is there."""
    if work.preset not in LARGE:
        torch.set_num_threads(1)
    folder, plan = planned(work, spec, seed, folder)
    if found := stored(folder, plan):
        return found
    result = run(output_dir=folder, resume=True, progress=False, **plan)
    entropies = len({round(m["policy_entropy"], 12) for m in result["history"]})
    row = {"run": spec, "seed": seed, "policy_entropy_values": entropies, "seconds": result["seconds"]}
    row |= result["final"]
    summary = {"made_by": made_by(plan), "row": row, "base": result["base"]}
    write_json(folder / "summary.json", summary)
    return summary


def begin_worker() -> None:
    """End this process, as SIGTERM does, when the one that started it is gone, however that ended."""
    from tqdm import tqdm

    tqdm.set_lock(threading.RLock())  # its own is the system's, and would be missed when this process is stopped

    def watch():
        multiprocessing.parent_process().join()
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=watch, daemon=True).start()


def finished(plans: list[tuple], jobs: int, leave: Callable[[], None]) -> list[dict]:
    """The results of one(*plan) for each plan, in their order, `jobs` at a time in processes of their own.

    When one fails, or a signal comes, those at work save and end and no other is begun.
    """
    from tqdm import tqdm

    pool = ProcessPoolExecutor(jobs, multiprocessing.get_context("spawn"), initializer=begin_worker)
    lock, said, futures = threading.Lock(), [], []

    def end() -> None:
        pool.shutdown(wait=False, cancel_futures=True)
        workers = multiprocessing.active_children()
        for worker in workers:
            worker.terminate()
        for worker in workers:
            worker.join(30)
            worker.kill()

    def stop() -> None:
        with lock:
            if not said:
                done = sum(job.done() and not job.cancelled() and not job.exception() for job in futures)
                end()
                said.append(f"stopped; {done} of {len(plans)} runs are finished, those begun are saved; {AGAIN}")
                print(f"\n{said[0]}", file=sys.stderr, flush=True)

    with stopping(stop, leave):
        try:
            with ignoring_interrupts():
                futures += [pool.submit(one, *plan) for plan in plans]
            for job in tqdm(as_completed(futures), "runs", len(futures)):
                job.result()
        except (BrokenProcessPool, CancelledError):
            with lock:  # a signal may be the cause
                if said:
                    raise KeyboardInterrupt from None
            end()
            raise OSError(f"a run's process was ended from outside, perhaps for want of memory; {AGAIN}") from None
        except Exception:
            end()
            raise
    pool.shutdown()
    return [job.result() for job in futures]


def by_seed(
    runs: list[dict], quality: Iterable[str], diversity: Iterable[str], over: list[dict] | None = None
) -> dict[str, dict[str, list[float]]]:
    """Column -> {run: its values, seed by seed}, with "quality_norm_avg", "diversity_norm_avg" and "overall" after them.

    Columns are scaled by the range of the means of the table `over` (default: of `runs` itself), base model included, as in
    table 1. Norm.Avg is affine in a run's values, so its mean over seeds is the Norm.Avg of the means.
    """

    def tables(rows: list[dict], names: Iterable[str]) -> dict[str, torch.Tensor]:
        kinds = dict.fromkeys(row["run"] for row in rows)
        return {spec: torch.tensor([[float(r[c]) for c in names] for r in rows if r["run"] == spec]) for spec in kinds}

    columns = {}
    for group, names in (("quality_norm_avg", quality), ("diversity_norm_avg", diversity)):
        means = torch.stack([t.mean(0) for t in tables(over or runs, names).values()])
        mine = tables(runs, names)
        columns |= {c: {spec: t[:, i].tolist() for spec, t in mine.items()} for i, c in enumerate(names)}
        columns[group] = {spec: normalized_average(t, over=means).tolist() for spec, t in mine.items()}
    halves = columns["quality_norm_avg"], columns["diversity_norm_avg"]
    columns["overall"] = {spec: [(q + d) / 2 for q, d in zip(*(half[spec] for half in halves))] for spec in mine}
    return columns


def scores(runs: list[dict], quality: tuple[str, ...], diversity: tuple[str, ...]) -> list[dict]:
    """Rows for `metrics.table`: each kind of run with (mean, standard deviation over seeds) in every column of `by_seed`."""
    columns = by_seed(runs, quality, diversity)
    return [
        {"name": figures.label(spec), "reference": spec == "base"}
        | {c: (mean(v[spec]), stdev(v[spec])) if len(v[spec]) > 1 else v[spec][0] for c, v in columns.items()}
        for spec in columns["overall"]
    ]


def front(runs: list[dict], column: str = "feature_variance") -> dict:
    """The points of `figures.reward_diversity_front`: diversity relative to the base model's, reward, by kind."""
    base, points = float(runs[0][column]), {}
    for spec in dict.fromkeys(row["run"] for row in runs[1:]):
        mine = [row for row in runs if row["run"] == spec]
        weight, target = parse(spec)["weight"], parse(spec)["target"]
        kind = spec if weight is None else spec.rpartition(":")[0]
        if target is not None:  # a line of their own
            kind, weight = spec.rpartition("=")[0], target
        point = ([float(row[column]) / base for row in mine], [float(row["reward"]) for row in mine])
        note = "" if weight is None else f"{'λ = ' * (target is None)}{weight:g}"
        points.setdefault(kind, []).append((weight or 0, note, *point))
    return {kind: [tuple(point) for _, *point in sorted(rows)] for kind, rows in points.items()}


@in_one_line
class Comparison(Work):
    """Many runs, one table: methods x weights x seeds, summarised as mean ± spread."""

    preset: Literal[tuple(PRESETS)] = "letters"  # what is trained on what
    runs: list[str] = Field(["flow_grpo", "pec:1", "pcvae:1"], min_length=1)  # METHOD[@SPACE][/ENCODER][:WEIGHT] or
    # ...[:target=SHARE]
    seeds: Annotated[int, Ge(1), Le(1000)] = 5  # this many, from --seed on
    jobs: Annotated[int, Ge(1), Le(1024)] = 1  # runs at a time
    output_dir: Path = Path("outputs/compare")  # finished runs in it are not repeated


def compare(arguments: list[str] | None) -> None:
    given = asked(Comparison, "ref.compare", arguments)
    refuse_doubles(given.runs, given.preset, given.encoder)
    folder, first = given.output_dir, given.settings.seed
    plans = [(given, spec, seed, folder) for seed in range(first, first + given.seeds) for spec in given.runs]
    with Alone(folder) as alone:
        for where, plan in (planned(*plan) for plan in plans):
            if not stored(where, plan):
                refuse_another(where, described(**plan))  # now, not when its turn has come
        results = finished(plans, given.jobs, alone.leave)
        rows = [{"run": "base", "seed": "", "policy_entropy_values": "", "seconds": "", **results[0]["base"]}]
        rows += sorted((r["row"] for r in results), key=lambda row: (given.runs.index(row["run"]), row["seed"]))
        write_results(rows, given.preset, folder)
    print((folder / "table.md").read_text())


def write_results(rows: list[dict], preset: str, folder: Path) -> None:
    text = io.StringIO(newline="")
    writer = csv.DictWriter(text, rows[1].keys(), extrasaction="ignore")
    writer.writeheader()
    writer.writerows(rows)
    files = {"runs.csv": text.getvalue().encode()}
    for form, name in (("markdown", "table.md"), ("latex", "table.tex"), ("csv", "table.csv")):
        files[name] = (twin(rows, preset, form) + "\n").encode()
    for name, content in files.items():
        atomic_write(folder / name, lambda temporary: temporary.write_bytes(content))
    figures.reward_diversity_front(
        front(rows, next(iter(columns_of(preset, [row["run"] for row in rows])[1])))
    ).savefig(folder / "front.png")


def main(arguments: list[str] | None = None) -> int:
    return interruptible(command, compare, arguments)


if __name__ == "__main__":
    sys.exit(main())
