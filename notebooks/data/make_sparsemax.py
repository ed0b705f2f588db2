"""Trained flows against proofs/P15: writes sparsemax_runs.csv, one line a rest point, in about 20 minutes of one core.

    PYTHONPATH=. OMP_NUM_THREADS=1 python notebooks/data/make_sparsemax.py [EXPERIMENT ...]

Six modes pay 1 to 0.3. Features are constant on each mode. `share_m` is the mean occupancy over the last third of
a stage's iterations. An *independent* stage starts from the base model, all six modes equal; a *cooled* one from
where the last, larger weight left the flow.

In the plane the first stage is long: at large weights only the reward's small differences choose among mixtures of one
and the same mean, against the noise of a large bonus.

    simplex   means on a regular simplex in six dimensions, orthogonal features (one-hot)
    ring      means on a circle in the plane, orthogonal features
    plane     the same means; the features are the directions of the means
"""

import csv
import math
import sys
import time
from pathlib import Path

import torch

from ref.grpo import start, train
from ref.methods import PEC
from ref.settings import Settings
from ref.worlds import many_modes, mixture

PAY = torch.tensor([1.0, 0.5, 0.8, 0.3, 0.9, 0.65])  # on the ring neighbours are not next in rank
M, K, GROUPS = 6, 16, 32
TABLE = Path(__file__).parent / "sparsemax_runs.csv"
PEC_WEIGHTS = (4.0, 2.1, 1.2, 0.7, 0.45, 0.25, 0.15, 0.08)
KERNEL_WEIGHTS = (1.0, 0.6, 0.4, 0.25, 0.17, 0.12, 0.08, 0.04)
EXPERIMENTS = {  # world, space, bandwidth, weights, iterations (a second number: of the later, cooled stages)
    "simplex": ("simplex", "perceptual", 1.0, PEC_WEIGHTS, (600,)),
    "ring, cooled": ("ring", "perceptual", 1.0, PEC_WEIGHTS, (600, 300)),
    "plane, cooled": ("plane", "perceptual", 1.0, PEC_WEIGHTS, (2000, 450)),
    "simplex, kernel": ("simplex", "kernel", 0.5, KERNEL_WEIGHTS, (600,)),
    "ring": ("ring", "perceptual", 1.0, PEC_WEIGHTS, (600,)),
}


def world(kind: str) -> tuple[mixture.GaussianMixture, torch.Tensor]:
    """The mixture and each mode's features [M, D]."""
    if kind == "simplex":
        means = 2 * torch.nn.functional.normalize(torch.eye(M) - 1 / M, dim=1)
        return mixture.GaussianMixture(means, 0.15), torch.eye(M)
    ring = mixture.ring(M, 2.0, 0.15)
    return ring, torch.eye(M) if kind == "ring" else ring.means / 2


def path(name: str, seed: int):
    """Yields (weight, shares [M]) of one seed."""
    kind, space, bandwidth, weights, iterations = EXPERIMENTS[name]
    cooled = len(iterations) == 2
    modes, features = world(kind)
    for n, weight in enumerate(weights):
        if n == 0 or not cooled:
            model = mixture.MixtureFlow(modes, width=48, seed=seed)
        setup = Settings(
            iterations=iterations[1 if cooled and n else 0],
            groups=GROUPS,
            group_size=K,
            updates=1,
            steps=6,
            lr=1e-3,
            std_normalize=False,
            seed=1000 * n + seed,
        )
        state, occupancy = start(model, setup), []
        state.bandwidth = bandwidth
        method = PEC(features.shape[1] * weight, space=space)  # it averages over the features
        for now in train(
            model, [""], mixture.tilted(modes, PAY), lambda x: features[modes.mode(x)], method, setup, state
        ):
            occupancy.append(modes.occupancy(now.samples.latents))
        yield weight, torch.stack(occupancy[-setup.iterations // 3 :]).mean(0)


def predicted(name: str, weight: float) -> torch.Tensor:
    """The rest point of an experiment, [M]: nothing in it is fitted."""
    kind, space, bandwidth, *_ = EXPERIMENTS[name]
    if space == "kernel":
        bonus = many_modes.kernel_bonus(weight, math.sqrt(2), bandwidth, K)
        return many_modes.counted_rest_point(PAY.double(), bonus)
    return many_modes.rest_point(PAY.double(), world(kind)[1].double(), weight, bandwidth, K)


def column(name: str, points: int = 160) -> tuple:
    """What figures.sparsemax_support wants: weights, predicted shares, measured ones, and softmax beside the kernel."""
    measured = {}
    with TABLE.open() as file:
        for row in csv.DictReader(file):
            if row["experiment"] == name:
                shares = torch.tensor([float(row[f"share_{m}"]) for m in range(M)])
                measured.setdefault(float(row["weight"]), []).append(shares)
    weights = torch.logspace(math.log10(0.8 * min(measured)), math.log10(1.2 * max(measured)), points)
    law = (PAY / weights[:, None]).softmax(1) if EXPERIMENTS[name][1] == "kernel" else None
    return weights, torch.stack([predicted(name, w) for w in weights.tolist()]), measured, law


if __name__ == "__main__":
    torch.set_num_threads(1)
    new = not TABLE.exists()
    with TABLE.open("a", newline="") as file:
        table = csv.writer(file, lineterminator="\n")
        if new:
            table.writerow(["experiment", "weight", "seed"] + [f"share_{m}" for m in range(M)])
        for name in sys.argv[1:] or EXPERIMENTS:
            began = time.time()
            for seed in range(5):
                for weight, shares in path(name, seed):
                    table.writerow([name, weight, seed] + [f"{s:.4f}" for s in shares.tolist()])
                    file.flush()
            print(f"{name}: {time.time() - began:.0f} s", flush=True)
