"""Many runs, one table: methods x weights x seeds, cached run by run, summarised as mean ± spread.

    python -m ref.compare --preset digits --seeds 5 --runs flow_grpo pec:1 pec:2 pcvae:1 --jobs 2

A run is named METHOD[@SPACE][/ENCODER][:WEIGHT]: `pec:1`, `clip_cov@perceptual:0.1`, `pec/reader:0.5`. What
is left out is the method's or the preset's default.

Every run has a folder of its own under --output-dir, so the command can be stopped and started again:
finished runs are read, broken ones continued. It writes

    runs.csv                       a line for each run, and for the base model
    table.md, table.tex, table.csv table 1's twin: mean ± standard deviation over seeds, Norm.Avg, Overall
    front.png                      reward against diversity, with confidence ellipses

Each job uses one CPU thread.
"""

import csv
import dataclasses
import json
import re
import sys
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from statistics import mean, stdev
from typing import Annotated, Literal

import torch
from annotated_types import Ge, Le
from pydantic import Field

from ref import figures
from ref.methods import METHODS
from ref.metrics import normalized_average, table
from ref.options import Options, command, read
from ref.presets import PRESETS
from ref.scale.directory import write_json
from ref.settings import in_one_line
from ref.train import run

# Quality and diversity columns with their formats; higher is better. The judge, and the spaces other
# than the run's own phi, are seen by nothing in training. A column has one unit for all rows: distances in a
# run's own phi are in none of them where runs may differ in phi. The first diversity column is the front's.
COLUMNS = {
    "mixture": (
        {"reward": ".3f"},
        {"feature_variance": ".3f", "pairwise_distance": ".3f", "effective_modes": ".2f", "pixel_variance": ".2f"},
    ),
    "digits": (
        {"reward": ".3f", "judge_reward": ".3f", "legibility": ".3f"},
        {"var_contrastive": ".3f", "var_reader": ".3f", "var_random": ".5f"}
        | {"vae_variance": ".1f", "pixel_variance": ".2f"},
    ),
}


def twin(runs: list[dict], preset: str, form: str = "markdown") -> str:
    """Table 1's twin at this scale, from the lines of runs.csv."""
    quality, diversity = COLUMNS[preset]
    columns = quality | {"quality_norm_avg": ".3f"} | diversity | {"diversity_norm_avg": ".3f", "overall": ".3f"}
    return table(scores(runs, tuple(quality), tuple(diversity)), columns, form)


def parse(spec: str) -> dict:
    """{"method", "space", "encoder", "weight"} of a run's name. Raises ValueError with the remedy."""
    found = re.fullmatch(r"(?P<method>\w+)(@(?P<space>\w+))?(/(?P<encoder>\w+))?(:(?P<weight>[\d.eE+-]+))?", spec)
    if not found:
        raise ValueError(f"cannot read the run {spec!r}; write METHOD[@SPACE][/ENCODER][:WEIGHT]")
    if found["method"] not in METHODS:
        raise ValueError(f"unknown method in {spec!r}; choose one of {', '.join(METHODS)}")
    chosen = found.groupdict() | {"weight": float(found["weight"]) if found["weight"] else None}
    METHODS[chosen["method"]](chosen["weight"], space=chosen["space"])  # refuses now what it would refuse later
    return chosen


def one(preset: str, spec: str, seed: int, folder: Path, iterations: int | None = None) -> dict:
    """Train and evaluate one run, or read it when it is there."""
    torch.set_num_threads(1)
    chosen = parse(spec)
    folder = folder / f"{re.sub('[@/:]', '_', spec)}_seed{seed}"
    done = folder / "summary.json"
    if done.exists():  # a change of --iterations needs another --output-dir
        return json.loads(done.read_text())
    settings = dataclasses.replace(PRESETS[preset].settings, seed=seed)
    settings = dataclasses.replace(settings, iterations=iterations or settings.iterations)
    result = run(preset, output_dir=folder, settings=settings, resume=True, progress=False, **chosen)
    entropy = {round(m["policy_entropy"], 12) for m in result["history"]}
    row = {
        "run": spec,
        "seed": seed,
        "policy_entropy_values": len(entropy),
        "seconds": result["seconds"],
        **result["final"],
    }
    write_json(done, {"row": row, "base": result["base"]})
    return {"row": row, "base": result["base"]}


def scores(runs: list[dict], quality: tuple[str, ...], diversity: tuple[str, ...]) -> list[dict]:
    """Rows for `metrics.table`: each kind of run with (mean, standard deviation over seeds) in every column.

    Columns are scaled by the range of the means, base model included, as in table 1. Norm.Avg is affine
    in a run's values, so its mean over seeds is the Norm.Avg of the means, and its spread is the runs'.
    """
    kinds = list(dict.fromkeys(row["run"] for row in runs))
    values = {spec: [row for row in runs if row["run"] == spec] for spec in kinds}
    columns = {}  # column -> {kind: values over seeds}
    for group, names in (("quality_norm_avg", quality), ("diversity_norm_avg", diversity)):
        tables = {spec: torch.tensor([[float(row[c]) for c in names] for row in values[spec]]) for spec in kinds}
        means = torch.stack([t.mean(0) for t in tables.values()])
        columns |= {c: {spec: t[:, i].tolist() for spec, t in tables.items()} for i, c in enumerate(names)}
        columns[group] = {spec: normalized_average(t, over=means).tolist() for spec, t in tables.items()}
    columns["overall"] = {
        spec: [(q + d) / 2 for q, d in zip(columns["quality_norm_avg"][spec], columns["diversity_norm_avg"][spec])]
        for spec in kinds
    }
    return [
        {"name": figures.label(spec), "reference": spec == "base"}
        | {c: (mean(v[spec]), stdev(v[spec])) if len(v[spec]) > 1 else v[spec][0] for c, v in columns.items()}
        for spec in kinds
    ]


def front(runs: list[dict], column: str = "feature_variance") -> dict:
    """The points of `figures.reward_diversity_front`: diversity relative to the base model's, reward, by kind."""
    base, points = float(runs[0][column]), {}
    for spec in dict.fromkeys(row["run"] for row in runs[1:]):
        mine = [row for row in runs if row["run"] == spec]
        kind, _, weight = spec.partition(":")
        point = ([float(row[column]) / base for row in mine], [float(row["reward"]) for row in mine])
        points.setdefault(kind, []).append((float(weight or 0), weight and f"λ = {weight}", *point))
    return {kind: [tuple(point) for _, *point in sorted(rows)] for kind, rows in points.items()}


@in_one_line
class Comparison(Options):
    """Many runs, one table: methods x weights x seeds, summarised as mean ± spread."""

    preset: Literal[tuple(COLUMNS)] = "digits"  # what is trained on what
    runs: list[str] = Field(["flow_grpo", "pec:1", "pcvae:1"], min_length=1)  # METHOD[@SPACE][/ENCODER][:WEIGHT] ...
    seeds: Annotated[int, Ge(1), Le(1000)] = 5  # seeds 0 .. n-1
    iterations: Annotated[int, Ge(0), Le(10**6)] | None = None  # length of a run (None: the preset's)
    jobs: Annotated[int, Ge(1), Le(1024)] = 1  # runs at a time, one CPU thread each
    output_dir: Path = Path("outputs/compare")  # finished runs in it are not repeated


def compare(arguments: list[str] | None) -> None:
    options = read(Comparison, "ref.compare", arguments)
    for spec in options.runs:
        parse(spec)
    from tqdm import tqdm

    results = []
    with ProcessPoolExecutor(options.jobs, mp_context=get_context("spawn")) as pool:
        jobs = [
            pool.submit(one, options.preset, spec, seed, options.output_dir, options.iterations)
            for seed in range(options.seeds)
            for spec in options.runs
        ]
        for job in tqdm(jobs, desc="runs"):
            try:
                results.append(job.result())
            except BaseException:
                pool.shutdown(cancel_futures=True)
                raise
    rows = [{"run": "base", "seed": "", "policy_entropy_values": "", "seconds": "", **results[0]["base"]}]
    rows += sorted((r["row"] for r in results), key=lambda row: (options.runs.index(row["run"]), row["seed"]))
    with (options.output_dir / "runs.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, rows[1].keys(), extrasaction="ignore")
        writer.writeheader()
        writer.writerows(rows)
    for form, name in (("markdown", "table.md"), ("latex", "table.tex"), ("csv", "table.csv")):
        (options.output_dir / name).write_text(twin(rows, options.preset, form) + "\n")
    print((options.output_dir / "table.md").read_text())
    figures.reward_diversity_front(front(rows, next(iter(COLUMNS[options.preset][1])))).savefig(options.output_dir / "front.png")


def main(arguments: list[str] | None = None) -> int:
    return command(compare, arguments)


if __name__ == "__main__":
    sys.exit(main())
