# ---
# jupyter:
#   jupytext:
#     cell_metadata_filter: tags,-all
#     formats: ipynb,py:percent
#     notebook_metadata_filter: kernelspec,-jupytext.text_representation.jupytext_version,-kernelspec.display_name
#     text_representation:
#       extension: .py
#       format_name: percent
#       format_version: '1.3'
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # 05 PEC and PCVAE
#
# **Question.** A bonus on perceptual entropy should stop the collapse. How large must its weight be, can that be *predicted*, and what
# does the bonus not see?
#
# **You need** notebooks 02 (group, advantage, GRPO), 03 and 04; `proofs/P09` to `P12`, `P15`, `P19`. **Time** three minutes on two cores;
# `REF_FAST=1` takes seconds and skips the claims that need the full runs (it says which).
#
# ## Two formulas
#
# Sample $k$ of a group has reward $R^k$, step $t$ of its path the log-probability $\log p_\theta$, its features $\log p_{perc}$ (notebook
# 04). With a weight $\lambda$, and $\omega_t$ the weight of step $t$ (mean 1; here all 1), the *reward* becomes
#
# $$\text{PEC (perceptual entropy constraint):}\quad\tilde R^k_t=R^k-\lambda\,\omega_t\log p_{perc}(k),$$
# $$\text{PCVAE:}\quad\tilde R^k_t=R^k-\lambda\,\omega_t\bigl[\log p_{perc}(k)-\log p_\theta(x^k_{t+1}\mid x^k_t)\bigr],$$
#
# and GRPO goes on with $\tilde R$: being unlike the rest of one's group pays. PCVAE's second term has zero expected gradient with centred
# advantages (P03). **The unit of $\lambda$** is that of training: log-densities are per dimension (of features, of latents). P11, P14, P15 and
# P19 *sum* over the $D$ features; where a function of theirs is called, its weight is $\lambda/D$.

# %%
import csv
import math
import os
import subprocess
from pathlib import Path

import torch
from IPython.display import Markdown, display

from ref import constraint, figures
from ref.compare import twin
from ref.grpo import start, train
from ref.methods import METHODS, PEC, FlowGRPO
from ref.metrics import feature_variance
from ref.sampling import sample
from ref.settings import Settings
from ref.worlds import figures as pictures
from ref.worlds import mixture, two_modes

# %matplotlib inline
FAST = os.environ.get("REF_FAST") == "1"
SEED = 0
torch.set_num_threads(1)


def claim(what, holds):
    """Assert a measured claim, or say that the fast mode cannot check it."""
    if FAST:
        print(f"SKIPPED in fast mode: {what}")
    else:
        assert holds, f"failed: {what}"
        print(f"holds: {what}")


# %% [markdown]
# ## The world: two modes, one of them paid
#
# Two modes; the right one pays $\delta=0.5$, the left one nothing. The feature ($D=1$) says which mode a sample is in, and no more:
# $\phi(x)=\mathrm{sign}\,x_1$, so modes lie $\Delta=2$ apart. We fix the ruler, $h=1$. The better mode's share is $p$, at first one half.

# %%
DELTA, DISTANCE, H, K = 0.5, 2.0, 1.0, 16
two = mixture.GaussianMixture(torch.tensor([[1.5, 0.0], [-1.5, 0.0]]), 0.3)
by_side = mixture.tilted(two, torch.tensor([DELTA, 0.0]))


def side(x):
    return x[:, :1].sign()


def run(method, world=two, reward=by_side, phi=side, bandwidth=H, **changes):
    """Train through grpo.train; returns the history of metrics and the last state."""
    seed, unit = changes.pop("seed", SEED), changes.pop("unit", None)
    model = mixture.MixtureFlow(world, width=changes.pop("width", 32), seed=seed)
    options = dict(iterations=100, groups=32, group_size=K, updates=1, steps=6, lr=3e-3, seed=seed) | changes
    setup = Settings(**options | dict(iterations=min(options["iterations"], 6 if FAST else 10**6)))
    state = start(model, setup)
    state.bandwidth, state.unit = bandwidth, unit
    history = []
    for now in train(model, [""], reward, phi, method, setup, state):
        radius = now.samples.latents.norm(dim=1).mean().item()
        history.append(now.metrics | {"radius": radius, "multiplier": now.weight})
    return history, state


# %% [markdown]
# ## Figure 4: naive KL against KL as reward
#
# The bracket in PCVAE is a KL divergence, sample by sample. Take it twice, with one weight: *naively*, in the loss, differentiated through
# $\log p_\theta$ at fixed samples, its expected gradient is zero (P10); in the reward it is a variance gradient (P09).

# %%
WEIGHT = 0.6
runs = {
    "flow_grpo": run(METHODS["flow_grpo"](), iterations=120),
    "naive_kl": run(METHODS["naive_kl"](WEIGHT), iterations=120),
    "pcvae": run(METHODS["pcvae"](WEIGHT), iterations=120),
    "pec": run(METHODS["pec"](WEIGHT), iterations=120),
    "flow_grpo_kl": run(METHODS["flow_grpo_kl"](0.3), iterations=120),
}
histories = {method: history for method, (history, _) in runs.items()}
display(figures.kl_comparison(histories["naive_kl"], histories["pcvae"], histories["flow_grpo"]))
tail = {m: sum(row["feature_variance"] for row in h[-30:]) / len(h[-30:]) for m, h in histories.items()}
print({m: round(v, 3) for m, v in tail.items()})
claim("the naive KL keeps less than a tenth of the feature variance", tail["naive_kl"] < 0.1)
claim("the KL as reward keeps more than half of it", tail["pcvae"] > 0.5)

# %% [markdown]
# The paper's naive KL also *oscillates*. Here it only fails to help; we do not reproduce the oscillation. (PCVAE passes its rest point and comes
# back; Adam's momentum would explain that.)
#
# ## Figure 5: reward, and what it costs

# %%
display(figures.training_curves({m: histories[m] for m in ("flow_grpo", "flow_grpo_kl", "pec")}))

# %% [markdown]
# ## The critical λ
#
# P11: both modes live iff $\lambda>\lambda_c=\frac{2D\delta h^2}{\Delta^2}\frac{K}{K-2}$, and the better mode's share rests at a $p^*$ that depends on $K$,
# $\lambda\Delta^2/Dh^2$ and $\delta$, on nothing else of the network or its training. Nothing is fitted below: the curve is computed before the dots.

# %%
critical = two_modes.critical_lambda(DELTA, DISTANCE, H, K)
grid = torch.linspace(0.1, 1.5, 561).tolist()
plan = {"std-normalised": ((0.15, 0.25, 0.35, 0.45, 0.6, 0.9, 1.4), range(5)), "centred": ((0.35, 0.5, 0.75), range(2))}
curves = {}
for label, (weights, seeds) in plan.items():
    normalize, measured = label != "centred", {}
    theory = [two_modes.fixed_point(w, DELTA, DISTANCE, H, K, normalize) for w in grid]
    for weight in weights[:1] if FAST else weights:
        paths = [run(METHODS["pec"](weight), seed=s, std_normalize=normalize)[0] for s in seeds[: 1 if FAST else None]]
        measured[weight] = [sum(m["reward"] for m in path[-40:]) / len(path[-40:]) / DELTA for path in paths]
    curves[label] = (grid, theory, measured)
display(pictures.critical_lambda_curve(curves, critical))
print("advantages      lambda  predicted  measured (mean ± sd over seeds)")
worst = 0
for label, (_, _, measured) in curves.items():
    for weight, shares in measured.items():
        p, shares = two_modes.fixed_point(weight, DELTA, DISTANCE, H, K, label != "centred"), torch.tensor(shares)
        worst, spread = max(worst, abs(shares.mean().item() - p)), shares.std(correction=min(1, len(shares) - 1))
        print(f"{label:15s} {weight:5.2f}  {p:9.3f}  {shares.mean():.3f} ± {spread:.3f}")
claim(f"p* within 0.03 of the prediction at every λ (worst {worst:.3f})", worst < 0.03)
claim(
    "below λ_c every seed collapses",
    all(s > 0.98 for m in curves.values() for w, x in m[2].items() if w < critical for s in x),
)

# %% [markdown]
# A staircase! In a group with $j$ of its $K$ samples in the better mode, the shaped rewards differ by the gap $\delta+c\,(1-2j/K)$, $c=\lambda\Delta^2/2Dh^2$. Divided by
# the group's standard deviation, an advantage keeps only the gap's *sign*, so $p^*$ moves only when one more of the $K$ compositions changes sign. With centred
# advantages $p^*$ is smooth and has a closed form; the threshold is the same. And GRPO's baseline contains the bonus, so the factor is $K/(K-2)$: infinite for groups of two.
#
# ## λ finds itself
#
# One need not guess $\lambda$. Ask for a feature variance $V^*$ and let $\lambda$ rise while the variance lacks and fall while it is too large (`constraint.hold`, the
# setting `target_diversity`, a share of the base model's variance). As a rule it starts at $\lambda^*$ of two equal modes, which here would be the answer; to be seen finding its way it starts at 0. P19: with centred advantages it rests where P11's law read backwards says, and with these gains it comes there without ringing. The black
# curve is P19's equation; its one free number, the speed at which the reward alone moves $p$, is read off the ten iterations before $\lambda$ acts (the network needs longer to get going). AdamW's memory, which the equation lacks,
# takes the trained ones further past $p^*$; the noise of sampled groups keeps $\lambda$ moving, and a little below (P19).

# %%
SHARE, swings = 0.8, []
for seed in range(1 if FAST else 3):
    history, state = run(
        PEC(0.0), bandwidth=None, std_normalize=False, target_diversity=SHARE, iterations=200, lr=2e-3, seed=seed,
        unit=DELTA / 2,  # given, so that λ starts at 0
    )  # fmt: skip
    swings.append([[m[name] for m in history] for name in ("reward", "multiplier", "weight")])
    swings[-1][0] = [reward / DELTA for reward in swings[-1][0]]
rest = constraint.rest_point(SHARE * DISTANCE**2 / 4, DELTA, DISTANCE, state.bandwidth, K)
logit = lambda p: math.log(p / (1 - p))  # noqa: E731
ahead = next((n for n, used in enumerate(swings[0][2]) if used), 5)  # until then the reward is alone
early = max(0, ahead - 10)
speed = sum(logit(p[ahead]) - logit(p[early]) for p, *_ in swings) / len(swings) / max(1, ahead - early)
p, kept, weight, theory = 0.5, 1.0, 0.0, ([], [])
for _ in swings[0][0]:
    share = 4 * p * (1 - p)
    weight, used = constraint.hold(weight, share, kept, SHARE, DELTA / 2)
    kept += (share - kept) / 5
    pull = DELTA + used / (2 * state.bandwidth**2) * (K - 2) / K * DISTANCE**2 * (1 - 2 * p)
    p = 1 / (1 + math.exp(-logit(p) - speed / DELTA * pull))
    theory[0].append(p), theory[1].append(weight)
display(pictures.dual_swing({f"trained, {SHARE:.0%} asked for": [paths[:2] for paths in swings]}, rest, theory))
ends = [(sum(p[-60:]) / len(p[-60:]), sum(w[-60:]) / len(w[-60:])) for p, w, _ in swings]
print(
    f"speed {speed:.3f} logits an iteration; p*, λ* = {rest[0]:.3f}, {rest[1]:.3f}; last 60 iterations:",
    [f"{p:.3f}, {w:.3f}" for p, w in ends],
)
claim(
    "p within 0.03 of p*, λ within 20 % of λ*",
    all(abs(p - rest[0]) < 0.03 and abs(w / rest[1] - 1) < 0.2 for p, w in ends),
)

# %% [markdown]
# ### What to ask for, and the same weight held fixed
#
# The preset `mixture` (six modes in the plane, paid 0 to 1; directions as features), five seeds for each target. Below each target its *own weight*: $\lambda$ held fixed at what the
# target's run of the same seed used in its last quarter, so that only the way there differs (`data/constraint_runs.csv`, made by `data/make_constraint.py`). "SDE" is the mean over the last
# quarter of training, "ODE" the evaluation, ± the deviation over seeds; "swing" is the deviation over the last quarter's iterations, and "reached" the iteration from which on means over ten stay
# within 0.03 of the last quarter's.

# %%
runs = list(csv.DictReader(Path("data/constraint_runs.csv").open()))
columns = {"share": "SDE share", "swing": "swing", "smallest": "smallest", "reached": "reached", "weight": "λ"}
columns |= {"reward": "SDE reward", "diversity": "ODE share", "reward_ode": "ODE reward", "effective_modes": "modes"}
lines = ["| asked for | " + " | ".join(columns.values()) + " |", "|---" * (1 + len(columns)) + "|"]
for target in sorted({row["target"] for row in runs}):
    for kind, label in (("target", target), ("weight", "fixed weight")):
        mine = [row for row in runs if list(row.values())[:3] + [row["run"]] == [target, "1", "1", kind]]
        values = torch.tensor([[float(row[column]) for column in columns] for row in mine])
        cells = zip(columns, values.mean(0).tolist(), values.std(0).tolist())
        lines.append(f"| {label} | " + " | ".join(f"{m:.0f} ± {s:.0f}" if c == "reached" else f"{m:.3f} ± {s:.3f}" for c, m, s in cells) + " |")  # fmt: skip
Markdown("\n".join(lines))

# %% [markdown]
# By the SDE, which is what is held, shares spread four to eight times less over seeds than those of the same weight held fixed at 0.7 to 0.9, and as much at 1.0; by the ODE half to one and a half times as much. The swing is a little smaller, and at 0.7 to 0.9 the run is there sooner on average
# (seeds differ by as much). *The dip* is the learner's own: it passes its rest point and comes back, with the weight fixed as well, and at 0.7 and 0.8 further down on average.
#
# *The fixed weight has more reward.* At 0.9 on each seed: by 0.015 to 0.032 by the SDE, at a share larger by 0.004 to 0.027, and by 0.001 to 0.026 by the ODE, at the same share on average. At 0.8, too, it is ahead in both by the SDE on each seed (reward 0.019 to 0.050, share 0.018 to 0.071); by the ODE the reward is the
# same on average, 0.003 apart, and the share 0.05 to 0.16 larger. It has gone on to fewer modes far apart, more variance with fewer of them: 2.4 ± 0.3 where the target's run has 3.0 ± 0.1, and at 0.7 2.1 ± 0.2 where that has 2.6 ± 0.1. (In the plane variance is not coverage, below.) At 1.0 it is 0.005 by the SDE and
# nothing by the ODE. The weight of a target follows the noise of the share, forty deviations of the reward for each unit of it; whether that is the price was not tested.
#
# On average the shares by the SDE lie 0.01 above what was asked for at 0.7 to 0.9, and the ODE's 0.01 to 0.03 below the SDE's. 1.0 is all that directions in the plane can have: $\lambda$ would grow for ever, and the run ends at 0.99.
#
# *On the letters* (notebook 06), with four groups, the last quarter has 0.79 ± 0.02 where 0.8, and 0.87 ± 0.01 where 0.9 was asked for (five seeds, SDE; 0.81 ± 0.04 and 0.89 ± 0.04 by the ODE), seven of ten runs within 0.03; in kernel space all five for 0.9. $\lambda$ is late there (P19), and letters suffer.
#
# *Whatever the reward is counted in:* the smallest and the largest share of five seeds, with rewards multiplied by 0.1, 1 and 10.

# %%
lines = ["| rewards | advantages | 0.8 asked for | 0.9 asked for |", "|---|---|---|---|"]
for pay, normalised in sorted({(row["pay"], row["normalised"]) for row in runs}):
    line = f"| × {pay} | {'std-normalised' if normalised == '1' else 'centred'} |"
    for target in ("0.8", "0.9"):
        key = [target, pay, normalised, "target"]
        shares = [float(row["share"]) for row in runs if list(row.values())[:3] + [row["run"]] == key]
        line += f" {min(shares):.3f} to {max(shares):.3f} ({len(shares)} seeds) |"
        assert all(abs(share - float(target)) < 0.03 for share in shares)
    lines.append(line)
Markdown("\n".join(lines))

# %% [markdown]
# ## Many modes: who lives?
#
# P15: let mode $m$ pay $R_m$, and all modes lie $\Delta$ apart. With centred advantages PEC rests at $\mathrm{sparsemax}(R/c_K)$, $c_K=\frac{\lambda\Delta^2}{2Dh^2}\frac{K-2}K$: the
# point of the simplex nearest to $R/c_K$, on which the worse modes have exactly nothing. The *kernel entropy* pays a sample for having few neighbours (notebook 04;
# `space="kernel"`) and rests near $\mathrm{softmax}(DR/\lambda)$. Trained flows, from `data/sparsemax_runs.csv` (made by `data/make_sparsemax.py`: five seeds); lines are predictions.

# %%
from data import make_sparsemax

columns = {}
for title, (name, D) in {
    "PEC, all modes equally far: sparsemax": ("simplex", 6),
    "kernel, the same: near softmax (dotted)": ("simplex, kernel", 6),
    "PEC, features in the plane": ("plane, cooled", 2),
}.items():
    weights, predicted, measured, law = make_sparsemax.column(name)  # its weights are the theory's, summed over D
    columns[title] = (D * weights, predicted, {D * w: seeds for w, seeds in measured.items()}, law)
    means = {w: torch.stack(seeds).mean(0) for w, seeds in measured.items()}
    miss = max((means[w] - make_sparsemax.predicted(name, w)).abs().max().item() for w in means)
    print(f"{title:45s} largest deviation of a mean share from the prediction: {miss:.3f}")
    assert miss < 0.02
display(pictures.sparsemax_support(columns, make_sparsemax.PAY))

# %% [markdown]
# Left: with $\lambda$ modes come to life one by one, in the order of reward, where the theory says. Middle: the kernel with a narrow $h$ is nearly softmax; at small $\lambda$ it, too,
# lets modes die. Right: in the plane PEC keeps at most $D+1=3$ modes, however large $\lambda$: *variance is not coverage* (P12). Dots off the line below are shares near 1 %, where we
# count. On the right $\lambda$ was lowered slowly: flows that start from six equal modes at small $\lambda$ with means in the plane often lose modes that the theory keeps, as the network
# pushes neighbours together and a mode that is gone does not come back (P15, numerics).
#
# ## Variance is not coverage, seen
#
# Eight modes on a circle, of unequal reward; features are the modes' directions, so $D=2$ and $v\le1$. Two opposite modes already have $v=1$.

# %%
ring = mixture.ring(8, radius=2.0, std=0.15)
GAPS = (1.0, 0.7, 0.8, 0.85, 0.9, 0.8, 0.7, 0.95)


def near(world, gaps, width):
    """A reward that falls off with the distance to the nearest mode: nothing is paid away from the data."""

    def reward(x, prompts):
        mode = world.mode(x)
        squared = (x - world.means[mode]).square().sum(1)
        return torch.tensor(gaps)[mode] * (-squared / (2 * width**2)).exp()

    return reward


def direction(x):
    return torch.nn.functional.normalize(ring.means, dim=1)[ring.mode(x)]


models = {  # method, bandwidth
    "Flow-GRPO": (FlowGRPO(), H),
    "PEC, λ = 1": (PEC(1.0), H),
    "kernel, λ = 0.4": (PEC(0.4, space="kernel"), 0.3),
}
clouds, table, pays = {"base model": ring.sample(1500, torch.Generator().manual_seed(SEED))}, {}, near(ring, GAPS, 0.4)
for label, (method, h) in models.items():
    for seed in range(1 if FAST else 4):
        _, state = run(method, ring, pays, direction, h, width=48, groups=12, group_size=24, iterations=200, seed=seed)
        x = sample(state.model, [""], 1500, state.model.schedule(6), ("evaluation", seed)).latents
        clouds.setdefault(label, x)
        row = [pays(x, []).mean(), mixture.effective_modes(ring.occupancy(x)), feature_variance(direction(x)[None])[0]]
        table.setdefault(label, []).append(row)
display(pictures.particles(clouds, ring.means, torch.tensor(GAPS)))
table = {label: torch.tensor(rows) for label, rows in table.items()}
print(f"{'mean ± sd over seeds':20s}  reward         effective modes   feature variance")
for label, rows in table.items():
    numbers = [f"{m:.2f} ± {s:.2f}" for m, s in zip(rows.mean(0), rows.std(0, correction=min(1, len(rows) - 1)))]
    print(f"{label:20s}  {numbers[0]}    {numbers[1]}       {numbers[2]}")
gaussian, kernel = table["PEC, λ = 1"], table["kernel, λ = 0.4"]
print("PEC's variance, seed by seed:", [f"{v:.2f}" for v in gaussian[:, 2]])
claim("PEC's median variance is within 0.1 of the kernel's", gaussian[:, 2].quantile(0.5) > kernel[:, 2].mean() - 0.1)
claim("every PEC seed keeps fewer than 4 effective modes", bool((gaussian[:, 1] < 4).all()))
claim("every kernel seed keeps more than 5", bool((kernel[:, 1] > 5).all()))

# %% [markdown]
# Nearly the same variance but for one seed, and far fewer modes. That seed lost the mode opposite to the best before PEC held it, and makes do with nearer ones: a mode that is gone
# does not come back. Coverage has its price: the kernel also keeps modes that pay less.
#
# ## An unbounded φ runs away
#
# With $\phi(x)=x$ nothing limits the variance: samples leave the data for infinity. Squashing $\phi$ alone only slows this down: the bonus is
# bounded, but its supremum lies at infinity. Either the reward must pay near the data only, or the largest variance must be *attained*: unit-norm
# features, as PickScore's and CLIP's are.

# %%
squash = lambda x: x / (1 + x.square().sum(1, keepdim=True)).sqrt()  # noqa: E731
local = near(two, (1.0, 0.5), 0.4)
settings = {
    "φ = x, reward near the data only": (mixture.coordinates, local),
    "φ = x / sqrt(1 + |x|²), reward by side": (squash, by_side),
    "φ = x / sqrt(1 + |x|²), reward near the data only": (squash, local),
    "φ = x / |x|, reward by side": (lambda x: torch.nn.functional.normalize(x, dim=1), by_side),
}
radius = {}
for label, (phi, reward) in settings.items():
    history, _ = run(METHODS["pec"](1.0), reward=reward, phi=phi, bandwidth=None, iterations=150)
    radius[label] = [m["radius"] for m in history]
display(pictures.runaway(radius))
print({label: f"{r[0]:.2f} -> {r[-1]:.2f}" for label, r in radius.items()})
growth = [r[-1] / r[0] for r in radius.values()]
claim("an unbounded φ runs away even from a reward that pays near the data only", growth[0] > 3)
claim("squashed features drift off too where the reward does not hold them", growth[1] > 2)
claim("unit-norm features stay within a third of the start", growth[3] < 4 / 3)

# %% [markdown]
# ## Every method of table 1, on six modes
#
# `python -m ref.compare --preset mixture` trained all of them, five seeds each (`data/mixture_runs.csv`; one line is one
# run). Six modes on a ring pay 0 to 1; the columns are the paper's as far as they exist in the plane.

# %%
runs = list(csv.DictReader(Path("data/mixture_runs.csv").open()))
head, body = twin(runs, "mixture").split("\n", 1)
display(Markdown(head.replace("_", " ") + "\n" + body))

# %% [markdown]
# Read by rows: **whatever looks at latent log-densities collapses like Flow-GRPO**, to one mode and a reward of 1 (PEC in latent
# space too, slowly). So do Clip-Cov and KL-Cov in *perceptual* space: they only damp an update, and reward has all the time in the
# world. What holds modes apart is the entropy gradient itself: PEC, PCVAE, and the perceptual Entropy Reg., which is PEC
# outside the advantage; between the best of them (Overall 0.69, 0.69) the intervals do not decide. At $\lambda=2$ the kernel keeps 4.6
# modes and PCVAE 5.4 against PEC's 3.2, for less reward (0.72, 0.65 and 0.77), although PEC's variance is the largest: variance is
# not coverage, again.
#
# The paper's PEC has twice Flow-GRPO's Overall. Here 0.69 against 0.50: Flow-GRPO is perfect in the only quality there is, and twice 0.50
# would be perfection in both.
#
# ## Summary
#
# - A KL differentiated at fixed samples is noise; the same KL in the reward holds the variance.
# - The weight has a threshold, $\lambda_c=\frac{2D\delta h^2}{\Delta^2}\frac K{K-2}$ (per feature dimension), and trained flows rest where the theory says. Ask for a variance, and $\lambda$ finds itself.
# - In few dimensions PEC keeps *variance*, not modes: two opposite ones satisfy it (in many it counts them, P15). A kernel density keeps coverage, for some reward.
# - The bonus needs a maximum that is attained: unit-norm features, or bounded ones and a reward that holds.
#
# **Exercises.** (1) Set $K=4$ and predict $\lambda_c$ before you run. (2) Give the kernel a bandwidth of 3: which method is it now? (P12's coarse
# limit.) (3) Start from weights $(0.9, 0.1)$ with the *worse* mode ahead: does $p^*$ change?

# %%
commit = (
    subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True).stdout.strip() or "unknown"
)
print(f"torch {torch.__version__}, device cpu, seed {SEED}, fast {FAST}, commit {commit}")
