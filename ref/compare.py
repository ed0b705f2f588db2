"""Many runs, one table: methods x weights x seeds, cached run by run, summarised as mean ± spread.

    python -m ref.compare --preset digits --seeds 5 --runs flow_grpo pec:1 pec:2 pcvae:1 --jobs 2

A run is named METHOD[@SPACE][/ENCODER][:WEIGHT]: `pec:1`, `clip_cov@perceptual:0.1`, `pec/reader:0.5`. What
is left out is the method's or the preset's default.

Every run has a folder of its own under --output-dir, so the command can be stopped and started again:
finished runs are read, broken ones continued. It writes runs.csv (a line for each run, and for the base
model) and prints the summary. Each job uses one CPU thread.
"""

import argparse
import csv
import dataclasses
import json
import re
import sys
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from statistics import mean, stdev

from ref.figures import LABELS
from ref.methods import METHODS
from ref.train import PRESETS, run, write_json


def parse(spec: str) -> dict:
    """{"method", "space", "encoder", "weight"} of a run's name. Raises ValueError with the remedy."""
    found = re.fullmatch(r"(?P<method>\w+)(@(?P<space>\w+))?(/(?P<encoder>\w+))?(:(?P<weight>[\d.eE+-]+))?", spec)
    if not found:
        raise ValueError(f"cannot read the run {spec!r}; write METHOD[@SPACE][/ENCODER][:WEIGHT]")
    if found["method"] not in METHODS:
        raise ValueError(f"unknown method in {spec!r}; choose one of {', '.join(METHODS)}")
    weight = found["weight"]
    return found.groupdict() | {"weight": float(weight) if weight else None}


def one(preset: str, spec: str, seed: int, folder: Path) -> dict:
    """Train and evaluate one run, or read it when it is there."""
    import torch

    torch.set_num_threads(1)
    chosen = parse(spec)
    folder = folder / f"{re.sub('[@/:]', '_', spec)}_seed{seed}"
    done = folder / "summary.json"
    if done.exists():
        return json.loads(done.read_text())
    settings = dataclasses.replace(PRESETS[preset][1], seed=seed)
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


def summary(rows: list[dict], columns: tuple[str, ...]) -> str:
    """Markdown: a line for each kind of run, mean ± standard deviation over its seeds."""
    lines = ["| run | seeds | " + " | ".join(columns) + " |", "|---|---|" + "---|" * len(columns)]
    for spec in dict.fromkeys(row["run"] for row in rows):
        mine = [row for row in rows if row["run"] == spec]
        cells = [
            f"{mean(v):.3f}" + (f" ± {stdev(v):.3f}" if len(v) > 1 else "")
            for v in ([float(row[c]) for row in mine] for c in columns)
        ]
        method, _, weight = spec.partition(":")
        label = LABELS.get(method, method) + (f", λ = {weight}" if weight else "")
        lines.append(f"| {label} | {len(mine)} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m ref.compare", description=__doc__.splitlines()[0])
    parser.add_argument("--preset", default="digits", choices=PRESETS)
    parser.add_argument("--runs", nargs="+", default=["flow_grpo", "pec", "pcvae"], help="METHOD or METHOD:WEIGHT")
    parser.add_argument("--seeds", type=int, default=5, help="seeds 0 .. n-1 (default: 5)")
    parser.add_argument("--jobs", type=int, default=1, help="runs at a time, one CPU thread each")
    parser.add_argument("--output-dir", type=Path, default=Path("outputs/compare"))
    options = parser.parse_args(arguments)
    try:
        for spec in options.runs:
            parse(spec)
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    from tqdm import tqdm

    results = []
    with ProcessPoolExecutor(options.jobs, mp_context=get_context("spawn")) as pool:
        jobs = [
            pool.submit(one, options.preset, spec, seed, options.output_dir)
            for seed in range(options.seeds)
            for spec in options.runs
        ]
        for job in tqdm(jobs, desc="runs"):
            try:
                results.append(job.result())
            except (ValueError, OSError) as error:
                pool.shutdown(cancel_futures=True)
                print(f"error: {error}", file=sys.stderr)
                return 2
    rows = [{"run": "base", "seed": "", "policy_entropy_values": "", "seconds": "", **results[0]["base"]}]
    rows += sorted((r["row"] for r in results), key=lambda row: (options.runs.index(row["run"]), row["seed"]))
    with (options.output_dir / "runs.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, rows[1].keys(), extrasaction="ignore")
        writer.writeheader()
        writer.writerows(rows)
    columns = (
        "reward",
        "feature_variance",
        "pairwise_distance",
        "perceptual_entropy",
        "pixel_variance",
        "vae_variance",
    )
    print(summary(rows, (*columns, *PRESETS[options.preset][0]().measures)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
