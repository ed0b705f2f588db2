# ---
# jupyter:
#   jupytext:
#     formats: ipynb,py:percent
#     notebook_metadata_filter: kernelspec,-jupytext.text_representation.jupytext_version,-kernelspec.display_name
#     cell_metadata_filter: tags,-all
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
# # 06 Letters: the paradox and the cures on real images
#
# **Question.** A text-to-image model is fine-tuned with RL. Its policy entropy does not move by one bit.
# Do its images stay diverse, and if not, what helps?
#
# **What you need.** Notebook 01's idea of a stochastic step; nothing else. No GPU, no download.
# **Time.** About 5 minutes on two CPU cores (`REF_FAST=1`: under a minute, and the claims are skipped).
#
# The model is Stable Diffusion 3's own transformer class on its own VAE class, only small: 2.3 million weights, trained
# from scratch on capitals of 360 free typefaces in random ink on random paper. The loop, the adapter and the methods
# are the ones that a full-size run uses.

# %%
# %matplotlib inline
import csv
import json
import os
import warnings
from dataclasses import replace
from pathlib import Path

import torch
from IPython.display import Markdown

warnings.filterwarnings("ignore", "IProgress not found")

from ref import figures
from ref.compare import front, twin
from ref.grpo import train
from ref.methods import METHODS
from ref.perceptual import fit_entropy_law
from ref.presets import PRESETS
from ref.sampling import sample
from ref.worlds import letters

FAST = os.environ.get("REF_FAST") == "1"
SEED = 2  # of five the one with which Flow-GRPO collapses furthest
settings = replace(PRESETS["letters"].settings, seed=SEED)
if FAST:
    settings = replace(settings, iterations=3, group_size=4, steps=4, window=1)
K = 5 if FAST else 20  # images a prompt whenever we measure
settings

# %% [markdown]
# ## The data, and a taste
#
# Each picture is a capital in one of 360 typefaces; ink and paper are any two colours with enough contrast. A hidden
# rater likes letters that are *legible, heavy and of high contrast*, and half of the data please it: dozens of faces are
# heavy enough, and any two colours far enough apart will do. **Nothing in it asks for sameness.**
#
# Nobody optimises the rater itself. As in RLHF a *preference model* learns from its choices between pairs of images, and
# its score is the reward. Held out are the rater's utility, a second preference model (other pairs), and RapidOCR's
# recogniser, a reader that nobody here trained.

# %%
data, which, _ = letters.renders(3 * 16, torch.Generator().manual_seed(1), torch.tensor([0, 6, 17]).repeat_interleave(16))
heads, judge = letters.read_heads(letters.WEIGHTS), letters.Judge()
of_rater = heads["rater"](data, [letters.PROMPTS[c] for c in which])
rows = {}
for c in (0, 6, 17):
    mine = which == c
    rows[f"the letter {letters.LETTERS[c]}"] = data[mine][of_rater[mine].argsort()]
figures.image_grid(rows, 16, "renders, from what the rater likes least to what it likes most")

# %% [markdown]
# ## The base model

# %%
measures = letters.measures(heads, judge)


def look(model):
    """K images a prompt from the ODE, on the same noise for every model, and what they are worth."""
    drawn = sample(model, letters.PROMPTS, K, model.schedule(settings.steps).ode(), ("notebook", SEED))
    return drawn.images, {name: f(drawn.images, drawn.prompts) for name, f in measures.items()}


model, reward, phi, _ = letters.load()
print(type(model.transformer).__name__, type(model.vae).__name__, type(model.scheduler).__name__)
shown, numbers = {}, {}
shown["base"], numbers["base"] = look(model)
{name: round(value, 3) for name, value in numbers["base"].items()}

# %% [markdown]
# ## Flow-GRPO
#
# `train` is a generator: it yields its state after every iteration, so there is nothing to hook into.

# %%
histories = {}


def fine_tune(method, weight=None):
    """One run from the base weights; its history, images and numbers go into the dictionaries above."""
    model, reward, phi, _ = letters.load()
    model.add_lora(rank=16, alpha=32)
    policy = METHODS[method](weight, clip=settings.clip)
    histories[method] = [s.metrics for s in train(model, letters.PROMPTS, reward, phi, policy, settings)]
    shown[method], numbers[method] = look(model)


fine_tune("flow_grpo")

# %% [markdown]
# ## The entropy paradox (figure 1)
#
# Left: the policy's entropy is a straight line. Its estimate from samples only jitters around it. The
# perceptual entropy falls. Right: the images lose their variety.

# %%
figures.entropy_paradox(histories["flow_grpo"])

# %%
entropies = {m["policy_entropy"] for m in histories["flow_grpo"]}
print("policy entropy takes", len(entropies), "value in", len(histories["flow_grpo"]), "iterations:", entropies)
assert len(entropies) == 1  # the same bits, first to last

ratio = numbers["flow_grpo"]["var_contrastive"] / numbers["base"]["var_contrastive"]
print(f"feature variance: {ratio:.0%} of the base model's")
if FAST:
    print("skipped in fast mode: the collapse takes the full run")
else:
    assert ratio < 0.6

# %% [markdown]
# Why it collapses is figure 2's story: a group's rewards draw together, and so do its images. Advantages are
# divided by the group's standard deviation, so the push stays strong however small the differences get.

# %%
figures.mode_seeking(histories["flow_grpo"])

# %% [markdown]
# ## Two cures
#
# **KL to the base model**, the field's usual one: each step pays for its distance from where the base model would have gone.
# **PEC** adds $-\lambda \log p_{perc}$ to each sample's reward: being unlike the rest of one's group pays.

# %%
for method, weight in (("flow_grpo_kl", 0.03), ("pec", 3.0)):
    fine_tune(method, weight)

# %%
size = (len(letters.PROMPTS), K)
images = {m: v.unflatten(0, size) for m, v in shown.items()}
features = {m: phi(v).unflatten(0, size) for m, v in shown.items()}
notes = {m: f"feature variance {v['var_contrastive']:.2f}" for m, v in numbers.items()}
rows = [letters.LETTERS.index(c) for c in "AEGRS"]
figures.collapse({m: v[rows, :5].flatten(0, 1) for m, v in images.items()}, features, 5, notes)

# %%
figures.training_curves(histories)

# %% [markdown]
# ## The same over five seeds
#
# One run is an anecdote. `data/letters_runs.csv` holds a line for each run of `python -m ref.compare --preset letters`
# (the README has the command). The trained reward and three held-out scores are on the left, diversity in three spaces, of
# typefaces, of colours and of pixels on the right. Held fixed: iterations, samples, and the learning rate 2e-3 for all
# (at 4e-3 Flow-GRPO breaks on seed 0: legibility 54 %); it was not tuned for each method. Norm.Avg scales each
# column by its range over the rows shown, so it compares rows of one table only.

# %%
runs = list(csv.DictReader(Path("data/letters_runs.csv").open()))
Markdown(twin(runs, "letters"))

# %%
from ref.worlds.figures import shares_kept

COLUMNS = {
    "var_contrastive": "variance in φ",
    "var_preference": "in the reward model's features",
    "var_faces": "in the face classifier's",
    "typefaces": "typefaces",
    "colour": "colour",
    "pixel_variance": "pixels",
}


def shares(name):
    """Column -> share of the base model's, seed by seed."""
    base, mine = runs[0], [run for run in runs if run["run"] == name]
    return {title: [float(run[c]) / float(base[c]) for run in mine] for c, title in COLUMNS.items()}


shares_kept({name: shares(name) for name in dict.fromkeys(run["run"] for run in runs[1:])})

# %%
points = front(runs, "var_contrastive")
figures.reward_diversity_front(points)

# %% [markdown]
# Read with the spreads (five seeds):
#
# - **Flow-GRPO collapses**: 60 ± 22 % of the variance in $\phi$ is left, and 17 ± 8 of 190 typefaces. What the reward model
#   says, the held-out model and the rater's own utility confirm; RapidOCR does not: it reads 86 ± 6 %, of the base model's
#   samples 93 %.
# - **The KL penalty** keeps most: 89 ± 3 % of the variance, 61 ± 14 typefaces, and its letters are read best (94.0 ± 0.4 %).
#   It pays with 38 % of Flow-GRPO's gain in reward.
# - **PEC** at $\lambda=3$, and PEC asked for 90 % of the variance (a target in place of $\lambda$, proofs/P19), keep 82 ± 9 % and
#   86 ± 6 %, all of the colour, 32 ± 13 typefaces, and pay 15 and 14 % of the gain. Legibility they leave where Flow-GRPO has it.
# - **No ranking.** Overall is 0.66 ± 0.05 for PEC with its target and 0.64 ± 0.02 for KL, which five seeds do not separate;
#   Flow-GRPO has 0.43 ± 0.24. The two spend their reward on different things. In the paper's table PEC and PCVAE are ahead of KL.
# - **A target is a request.** 0.8 ended at 74 ± 11 % of the ODE's variance: one run of five (seed 3) lost its letters
#   (legibility 62 %). By the SDE the last 20 iterations had 76 ± 6 % where 80, and 81 ± 4 % where 90 was asked for: 80 iterations
#   are too short for $\lambda$, which is still on its way when they end (P19 says how long it takes).
# - Every row has one value of the policy entropy from first to last iteration.
# %% [markdown]
# ## Was it foreseen?
#
# Six predictions were committed to the repository before the first run of this study (commit "Predictions for the study of
# letters, written before its runs").Of these runs' predictions:
#
# - *A KL penalty is as good as PEC or better in every held-out column.* **Wrong.** PEC has more of the held-out model's score
#   and of the rater's utility (it gives up less reward), KL more legibility.
# - *PEC regains colour before typefaces; KL does not.* **Half right.** PEC keeps 112 % of the colour and 17 % of the typefaces, but
#   KL has the same order (106 and 32 %).
#
# Not yet run over five seeds, hence open: the rare taste (`letters_rule`), PEC in the other spaces, PCVAE and the rest of table 1.
# On one seed that is not reported, Flow-GRPO on the rule lost typefaces (190 to 52) and legibility (93 to 77 %), and 6 % of
# the variance in $\phi$.
# %% [markdown]
# ## What φ must be for PEC
#
# PEC pays a sample for its squared distance $d^2$ to the mean of its group. What it can push is the *spread* of $d^2$ within a
# group: where all are equally far apart there is nothing to choose between. Contrastive training at the usual low
# temperature (0.2, `sharp`) makes features so: all pictures of a letter are about orthogonal to each other. At temperature
# 1 (`contrastive`, the $\phi$ used above) what is alike stays near. The last two columns say what moves a picture in
# $\phi$, next to a change of face: a change of ink and paper, and what a policy could spoil a picture with, which no
# $\phi$ should see.

# %%
from ref.perceptual import deviations
from ref.worlds.letters.spoil import spoil

g = torch.Generator().manual_seed(5)
masks = letters.masks()[::6, 0]
ink, paper = letters.palettes(len(masks), g)
plain = letters.paint(masks, ink, paper)
others = {
    "face": letters.paint(masks.roll(1, 0), ink, paper),
    "hue": letters.paint(masks, ink.roll(1, 0), paper.roll(1, 0)),
    "spoilt": spoil(plain, g),
}
print("space         spread of d² / its mean   directions   hue / face   spoilt / face")
for name, f in letters.spaces(heads).items():
    d = deviations(f(shown["base"]).unflatten(0, size))
    squared, all_of_them = d.square().sum(-1), d.flatten(0, 1)
    eigenvalues = torch.linalg.eigvalsh(all_of_them.T @ all_of_them)
    moved = {what: (f(other) - f(plain)).square().sum(1).mean() for what, other in others.items()}
    print(
        f"{name:14}{squared.std(1).mean() / squared.mean():23.2f}{eigenvalues.sum() ** 2 / eigenvalues.square().sum():13.1f}"
        f"{moved['hue'] / moved['face']:13.2f}{moved['spoilt'] / moved['face']:16.2f}"
    )

# %% [markdown]
# A first round of runs had $\phi$ = `sharp` (a seed that is not reported, a learning rate twice as large): there $\lambda=3$
# kept 62 % of the variance and a third of the colour; with `contrastive` 76 % and all of the colour. The choice of
# $\phi$ was made after that, and before the five seeds above. No $\phi$ is neutral: this one sees hue more than face, and
# PEC keeps hues better than faces. The reward model's own features, which the paper uses most, see what spoils a picture
# a quarter as much as another face.

# %% [markdown]
# ## The law of figure 3
#
# The paper finds $R = -a\,e^{H_{perc}} + b$ along training. Here are the five Flow-GRPO runs of the table,
# iteration by iteration (columns of their `metrics.json`), with the pooled fit and its 95 % band.

# %%
flow_grpo_runs = json.loads(Path("data/letters_flow_grpo.json").read_text())
laws = [
    fit_entropy_law(torch.tensor([m["perceptual_entropy"] for m in run]), torch.tensor([m["reward"] for m in run]))
    for run in flow_grpo_runs
]
print("R² of each seed's own fit:", " ".join(f"{law.r2:.2f}" for law in laws))
for part, where in (("first half", slice(0, 40)), ("second half", slice(40, 80))):
    H, R = (
        torch.tensor([m[key] for run in flow_grpo_runs for m in run[where]]) for key in ("perceptual_entropy", "reward")
    )
    law = fit_entropy_law(H, R)
    print(f"{part}: slope -a = {-law.a:.1f}, R² = {law.r2:.2f}")
figures.entropy_law(flow_grpo_runs, title="five Flow-GRPO runs")

# %% [markdown]
# The sign is the paper's: reward is bought with perceptual entropy. The line is not a law of these runs: it bends, steeply
# falling at first and then hardly, and the seeds part ways (one palette dies in two of them, another survives), so that the
# pooled fit explains less than each seed's own.

# %% [markdown]
# ## Summary
#
# - Policy entropy is a constant of the sampler. It says nothing about what the images look like.
# - Flow-GRPO on a reward that half of all pictures satisfy still draws nearly the same face again and again.
# - A KL penalty to the base model and PEC both prevent most of it. The first holds the images where they were and keeps letters
#   legible, the second holds them apart and keeps more of the reward.
#
# **Exercises.** (1) Set `omega="variance"` in the settings: does weighting steps by their noise matter?
# (2) Train PEC with $\phi$ = `faces`, which is blind to colour. What does it keep, and what do the judges say?
# (3) `python -m ref.compare --preset letters_rule`: a rule as reward that the base model meets once in thirty times. Who
# wins there?

# %%
import subprocess

commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True).stdout.strip()
print(
    f"torch {torch.__version__}, device cpu, {torch.get_num_threads()} threads, seed {SEED}, commit {commit or 'unknown'}"
)
