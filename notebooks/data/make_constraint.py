"""A target diversity against fixed weights (proofs/P19): writes constraint_runs.csv, a line a run, in about 9 minutes of a core.

    PYTHONPATH=. OMP_NUM_THREADS=1 python notebooks/data/make_constraint.py

Lines that are there are kept: delete the table to make all of it again.

PEC on the preset `mixture`, its settings but for those in the columns:

    target      share of the base model's feature variance asked for
    run         "target", or "weight": held fixed at the mean that the target's run of the same seed used in its last quarter
    pay         the rewards are multiplied by this
    normalised  1: advantages are divided by the group's deviation
    share, swing, smallest   mean and standard deviation of the groups' share over the last quarter of training; the least
    reached     iteration from which on the mean share of ten iterations stays within 0.03 of `share`
    weight, reward           mean over the last quarter, both over `pay`
    diversity, reward_ode, effective_modes   of the evaluation, by the ODE; reward over `pay`

The runs with another pay are there to show that it does not matter, and have no weight beside them.
"""

import csv
from dataclasses import replace
from pathlib import Path
from statistics import fmean, stdev

import torch

from ref.grpo import calibrate_on, start, train
from ref.methods import PEC
from ref.presets import PRESETS

TABLE = Path(__file__).parent / "constraint_runs.csv"
KEY = ("target", "pay", "normalised", "seed")
COLUMNS = KEY + ("run", "share", "swing", "smallest", "reached", "weight", "reward", "diversity", "reward_ode")
COLUMNS += ("effective_modes",)


def trained(target: float | None, weight: float | None, pay: float, normalised: bool, seed: int) -> dict:
    """One run's numbers."""
    settings = replace(PRESETS["mixture"].settings, seed=seed, std_normalize=normalised, target_diversity=target)
    task, method = PRESETS["mixture"].task(), PEC(weight, clip=settings.clip)
    state, pays = start(task.model, settings), lambda images, prompts: pay * task.reward(images, prompts)
    calibrate_on(state, task.prompts, task.encoder, settings)
    base, _ = task.evaluate(settings, state.bandwidth)
    history = [s.metrics for s in train(task.model, task.prompts, pays, task.encoder, method, settings, state)]
    final, _ = task.evaluate(settings, state.bandwidth)
    shares, last = [m["diversity"] for m in history], history[-(len(history) // 4) :]
    share = fmean(shares[-len(last) :])
    means = [fmean(shares[n - 10 : n]) for n in range(10, len(shares) + 1)]
    return {
        "share": share,
        "swing": stdev(shares[-len(last) :]),
        "smallest": min(shares),
        "reached": max((n for n, mean in enumerate(means, 11) if abs(mean - share) > 0.03), default=10),
        "weight": fmean(m["weight"] for m in last) / pay,
        "reward": fmean(m["reward"] for m in last) / pay,
        "diversity": final["feature_variance"] / base["feature_variance"],
        "reward_ode": final["reward"],
        "effective_modes": final["effective_modes"],
    }


if __name__ == "__main__":
    torch.set_num_threads(1)
    plans = [(target, 1, True, seed) for target in (0.7, 0.8, 0.9, 1.0) for seed in range(5)]
    others = [(pay, normalised) for pay in (1, 0.1, 10) for normalised in (True, False)][1:]
    plans += [(target, *other, seed) for seed in range(5) for target in (0.8, 0.9) for other in others]
    new = not TABLE.exists()
    made = [] if new else [tuple(row[name] for name in KEY) for row in csv.DictReader(TABLE.open())]
    with TABLE.open("a", newline="") as file:
        table = csv.DictWriter(file, COLUMNS, lineterminator="\n")
        if new:
            table.writeheader()
        for target, pay, normalised, seed in plans:
            key = (target, pay, int(normalised), seed)
            if tuple(map(str, key)) in made:
                continue
            runs = {"target": trained(target, None, pay, normalised, seed)}
            if pay == 1 and normalised:
                runs["weight"] = trained(None, runs["target"]["weight"], pay, normalised, seed)
            for run, numbers in runs.items():
                table.writerow(dict(zip(KEY, key), run=run) | {n: f"{value:.6g}" for n, value in numbers.items()})
            file.flush()
