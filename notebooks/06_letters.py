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
from ref.compare import by_seed, columns_of, front, twin
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
# ## All methods, over five seeds
#
# One run is an anecdote. `data/letters_runs.csv` holds a line for each run of `python -m ref.compare --preset letters`:
# the paper's methods, in the latent and in the perceptual space, and what this repository adds. The trained reward and three
# held-out scores are on the left; diversity in three spaces, of typefaces (one over the chance that two samples of a prompt
# show the same), of colours and of pixels on the right. A target stands in place of a $\lambda$: the share of the base model's variance asked for (proofs/P19). Held fixed: iterations,
# samples, and the learning rate, 2e-3, that of the preset (below: half of it). Norm.Avg scales each column by its range over the rows shown, so it compares rows of one table only.

# %%
def of(rows):
    """name -> its runs, seed by seed; the base model's one line is left out."""
    return {name: [row for row in rows if row["run"] == name] for name in dict.fromkeys(r["run"] for r in rows[1:])}


runs = list(csv.DictReader(Path("data/letters_runs.csv").open()))
Markdown(twin(runs, "letters"))

# %% [markdown]
# What is kept, by what it is measured in: every column as a share of the base model's.

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
CURES = ("flow_grpo", "flow_grpo_kl:0.03", "pec:target=0.9", "pec@kernel:target=0.9", "pcvae:target=0.9")


def shares(name):
    """Column -> share of the base model's, seed by seed."""
    return {title: [float(run[c]) / float(runs[0][c]) for run in of(runs)[name]] for c, title in COLUMNS.items()}


shares_kept({name: shares(name) for name in CURES})

# %% [markdown]
# One $\lambda$ against another says little: a larger one buys more diversity with more reward. So each method is a line.
# Over the variance in $\phi$, which PEC is paid in, and over typefaces, which nobody is paid in:

# %%
FRONT = ("base", "flow_grpo", "pec:", "pec@kernel", "pcvae")
shown_there = [run for run in runs if run["run"].startswith(FRONT)]
figures.reward_diversity_front(front(shown_there, "var_contrastive"), "variance in φ")

# %%
figures.reward_diversity_front(front(shown_there, "typefaces"), "typefaces")

# %% [markdown]
# The best of each method, by Overall (the mean of both Norm.Avg):

# %%
def overall(rows, preset, over=None):
    """name -> Overall of each of its seeds, each column scaled by its range over the rows of a table, `over` or this one."""
    values = by_seed(rows, *columns_of(preset, []), over)["overall"]
    return {name: torch.tensor(v) for name, v in values.items() if name != "base"}


def best(rows, preset, over=None):
    """Prints the dial of each method with the best Overall, best method first."""
    found = {}
    for name, values in overall(rows, preset, over).items():
        found[name.partition(":")[0]] = max(found.get(name.partition(":")[0], (-1,)), (values.mean(), values.std(), name))
    for mean, spread, name in sorted(found.values(), reverse=True):
        print(f"{mean:.2f} ± {spread:.2f}  {figures.label(name)}")


best(runs, "letters")

# %%
def beside(rows, against="flow_grpo_kl:0.03", over=runs):
    """Prints what the cures' Overall has beyond that of `against`, seed by seed."""
    every = overall(rows, "letters", over)
    print(f"Overall less that of {figures.label(against)} on the same seeds:")
    for name in ("flow_grpo", "flow_grpo_kl:0.01", "pec:3", *CURES[2:]):
        difference = every[name] - every[against]
        print(f"{difference.mean():+.3f} ± {difference.std():.3f}  {figures.label(name)}")


beside(runs)

# %% [markdown]
# ## The learning rate
#
# On seed 100, which no table has, methods were run at other rates too (`--lr`). Overall, columns scaled as in the table above:

# %%
probes = list(csv.DictReader(Path("data/letters_rates.csv").open()))
rates = list(dict.fromkeys(p["lr"] for p in probes[1:]))
tried = {lr: overall([probes[0], *(p for p in probes if p["lr"] == lr)], "letters", runs) for lr in rates}
lines = ["| Overall, seed 100 | " + " | ".join(rates) + " |", "|---|" + "---|" * len(rates)]
for name in of(probes):
    cells = (f"{tried[lr][name].item():.2f}" if name in tried[lr] else "" for lr in rates)
    lines.append(f"| {figures.label(name)} | " + " | ".join(cells) + " |")
Markdown("\n".join(lines))

# %% [markdown]
# 1e-3 is best in each row, if on one seed, and by little over 5e-4 (which PEC was not given). So once more, on the five seeds of the table, at that rate:

# %%
half = list(csv.DictReader(Path("data/letters_half_runs.csv").open()))
Markdown(twin(half, "letters"))

# %%
best(half, "letters", runs)
beside(half)
beside(half, "flow_grpo_kl:0.01")
beside(half, "flow_grpo_kl:0.01", over=half)  # on the scale of these rows

# %%
shown_there = [run for run in half if run["run"].startswith(FRONT)]
figures.reward_diversity_front(front(shown_there, "var_contrastive"), "variance in φ")

# %% [markdown]
# Runs go less far (Flow-GRPO ends at a reward of 2.16 and keeps 77 ± 10 %; in the first table at 2.57, 60 ± 22 %), and are steadier:
# rewards spread over seeds by 0.03 to 0.13 where these rows had 0.16 to 0.76, and nothing is ruined (89 % read at least).
# Here reward and diversity tell the methods apart:
#
# - **PEC at 3 and KL at 0.01 keep the same**, 86 ± 5 % and 87 ± 4 % of the variance in $\phi$. On each of the five seeds PEC
#   has more reward (by 0.32 ± 0.08), more of the held-out model's score (0.37 ± 0.10), more utility (0.03 ± 0.02), colour (13 ± 7 % of
#   the base model's) and pixel variance (16 ± 4 %). On each it has fewer typefaces (by 10 ± 4) and less variance in the features of the
#   reward model (by 6 ± 2 %) and of the face classifier (5 ± 5 %). 93 and 94 % are read.
# - Asked for 90 %, PEC, the kernel's PEC, PCVAE and the perceptual regulariser keep 85 to 88 % ($\lambda$ is late here too), as much as that KL on average, and have
#   0.20 to 0.31 more reward, and more on each seed; typefaces are 1 to 8 fewer, with a spread of 8 to 10, and 93 % are read.
# - $\omega_t$ (`--omega variance`, on the same seeds) changes nothing that five seeds show: PEC at 3 differs by -0.03 ± 0.08 in
#   reward, 0 ± 5 % of the variance and 3 ± 12 typefaces. The bandwidth is no dial of its own: $\lambda/h^2$ is all that PEC's reward has of it.
# - Overall does not settle it. On the first table's scale the kernel's PEC, asked for 90 %, has 0.71 ± 0.02, PEC at 3 0.70 ± 0.03, KL at 0.01 0.66 ± 0.03,
#   plain Flow-GRPO 0.66 ± 0.07; on the same seeds the first two lead KL by 0.05 ± 0.03 and 0.04 ± 0.02 there, and by 0.05 ± 0.10 and
#   0.02 ± 0.07 on the scale of these eight rows alone. Overall weighs columns by their range, and that is a choice.

# %% [markdown]
# ## Asking for a diversity
#
# The first table's runs by what was asked for: what the groups keep by the SDE in the last quarter of training, and the samples by the ODE after it.

# %%
KEPT = {"diversity_sde": "SDE", "diversity": "ODE", "reward": "reward", "held_out": "held-out", "typefaces": "typefaces"}
KEPT |= {"legibility": "read", "weight": "λ"}
lines = ["| asked for | " + " | ".join(KEPT.values()) + " |", "|---" * (1 + len(KEPT)) + "|"]
for name in sorted(name for name in of(runs) if ":target=" in name):
    values = torch.tensor([[float(run[c]) for c in KEPT] for run in of(runs)[name]])
    cells = (f"{m:.2f} ± {s:.2f}" for m, s in zip(values.mean(0).tolist(), values.std(0).tolist()))
    lines.append(f"| {figures.label(name)} | " + " | ".join(cells) + " |")
Markdown("\n".join(lines))

# %% [markdown]
# Who asks for more gets more variance for less reward, on average. For 0.8 and 0.9 seven of ten of PEC's runs lie within 0.03 by the SDE
# (the others at 0.76, 0.845 and 0.864), and the kernel's five for 0.9 do. 1.0 cannot be had: $\lambda$ is still growing on every seed.
#
# **What is held is not all, and has a price.** Of PEC's runs for 0.9 three are read to 67 to 76 %, and one for 0.8 loses letters (42 %); the
# kernel's lose fewer (69 % once, else 87 to 92 %). With smaller steps, asked for more, letters kept as much variance and were read more often, but
# what was asked for was not what was got (proofs/P19); at half the rate, above, no letters are lost. And at 81 ± 4 % of the variance there are 26 ± 3 typefaces, where PEC at 3 and KL
# at 0.01 have 33 and 35 ± 12: a variance that is held is not a diversity of everything.
#
# ## A rule that the base model rarely meets
#
# The second reward is RapidOCR's own confidence times a taste that every face and hue can satisfy and the base model meets
# rarely: the ink's centroid lies to the right (`letters_rule`). Five seeds again.

# %%
ruled = list(csv.DictReader(Path("data/letters_rule_runs.csv").open()))
Markdown(twin(ruled, "letters_rule"))

# %%
best(ruled, "letters_rule")

# %%
figures.reward_diversity_front(front(ruled, "typefaces"), "typefaces")

# %% [markdown]
# ## What the table says
#
# The first table, at 2e-3, where runs of a method differ among seeds more than most methods do. "On the same seeds" is the
# difference seed by seed.
#
# - **Flow-GRPO collapses**: 60 ± 22 % of the variance in $\phi$ is left, and 17 ± 8 of 190 typefaces. What the reward model
#   says, the held-out model and the rater's own utility confirm; RapidOCR does not: it reads 86 ± 6 %, of the base model's
#   samples 93 %.
# - **Constraints in the latent space show no effect**, as the theory has it: on the same seeds the entropy
#   regulariser, Clip-Cov and KL-Cov differ from Flow-GRPO in reward by 0.04 ± 0.15, -0.06 ± 0.16 and 0.04 ± 0.07, in the share of
#   variance kept by -5 ± 12, 4 ± 5 and 7 ± 20 %. In the perceptual space Clip-Cov keeps less than Flow-GRPO on four seeds
#   (-7 ± 7 %), the same on one, and KL-Cov has 9 ± 9 more typefaces. GARDO has less reward on every seed (-0.55 ± 0.56) for 10 ± 16 %
#   more variance; on seed 3 it ruins letters (52 % are read).
# - **PEC against a KL penalty depends on how much is to be kept.** Near 80 % of the variance they are alike (PEC at 3: 82 ± 9 %,
#   2.18 ± 0.16, 33 ± 12 typefaces; KL at 0.01: 80 ± 9 %, 2.09 ± 0.23, 35 ± 12), and KL's letters are read more often (92 ± 3 %
#   for 86 ± 6 %). Near 90 % they are not told apart in reward, and letters suffer: asked for 90 %, it keeps 89 ± 4 % at 1.64 ± 0.60, KL
#   at 0.03 keeps 89 ± 3 % at 1.58 ± 0.18, with 26 ± 15 more typefaces and 17 ± 11 % more read. Near 96 % PEC, asked for all of it, has on each seed
#   more reward than KL at 0.1 (1.29 ± 0.14 for 0.87 ± 0.13), more colour and more pixel variance, and on each fewer typefaces (by 47 ± 25)
#   and fewer that are read (by 14 ± 7 %). PEC at 6 keeps 94 to 96 % at twice KL's reward on three seeds, and on two ruins letters (48 and
#   63 % are read).
# - **The kernel's PEC** (a density with one bump a sample, so that it sees modes: proofs/P12) keeps 92 ± 2 % at 1.74 ± 0.21, 86 ± 10 % read: on
#   four seeds it has more reward than KL at 0.03 (by 0.18 to 0.49), on one less (by 0.47), and 19 ± 13 fewer typefaces. **PCVAE** ruins letters on
#   one seed (27 % are read); on the others they are read as often as PEC's or more often (by 23 and 18 % on two).
# - **Overall separates the cures from each other hardly at all**: 0.65 ± 0.07 for the kernel's PEC, 0.63 for KL and for PEC asked for
#   everything, 0.62 ± 0.11 for PEC at 3, 0.58 ± 0.10 for the perceptual regulariser, 0.55 ± 0.14 for PEC asked for 90 %, 0.50 ± 0.36 for PCVAE, and 0.60 ± 0.12 for KL-Cov; Flow-GRPO 0.49 ± 0.17, the base model 0.51. In the paper's table PEC
#   and PCVAE are ahead of KL. The dials, and the gains of the targets, were looked at on these seeds, so the best of each is a little flattered; and a column of variance counts
#   a ruined image as diversity (target 0.9's and PEC 6's seed 2, 0.8's and GARDO's seed 3, PCVAE's seed 1).
# - **Typefaces are not saved.** Only KL at 0.1 keeps half. PEC pays for distance in $\phi$, and ink and paper give that too.
# - **In other spaces** ($\lambda=1$): paid in the face classifier's features PEC keeps 12 ± 10 % more of their variance than Flow-GRPO
#   on the same seeds (every seed), and 7 ± 12 more typefaces, at the same reward (-0.04 ± 0.28). Paid in the reward model's own
#   it keeps 5 ± 4 % more there, no more typefaces, and the held-out model's score falls on every seed (-0.21 ± 0.05).
# - **The rule** leaves $\phi$'s variance nearly alone (Flow-GRPO keeps 91 ± 7 %) and takes typefaces (38 ± 19 of 190) and
#   legibility (68 ± 12 %). There PEC has little to hold: at 0.3 its numbers lie within Flow-GRPO's spread. A KL penalty of 0.01
#   keeps 72 ± 24 typefaces and 80 ± 4 % legible, for 0.03 ± 0.08 less reward.
# - Every row has one value of the policy entropy from first to last iteration.
#
# So, most clearly at the lower rate: PEC where the loss is one that $\phi$ sees and reward matters; a KL penalty where what must
# be kept is not in $\phi$, or where base-like images matter more than reward.
# %% [markdown]
# ## Was it foreseen?
#
# Six predictions were committed to the repository before this study (commit "Predictions for the study of letters, written
# before its runs"; it names the probes of seed 0 that were known).
#
# 1. *Common taste: at equal variance a KL penalty is as good as PEC or better in every held-out column.* **Open**
#    at 2e-3 near 80 and 90 % of the variance, where only more letters read are KL's throughout; wrong near 96 %, and at 1e-3.
# 2. *Rare taste: PEC gets more reward than KL.* **Not seen**: 0.392 ± 0.040 at 0.1 and 0.346 ± 0.047 at 0.3, KL 0.388 ± 0.053 at 0.003.
# 3. *PEC regains colour before typefaces; KL does not.* **Half right**: both do.
# 4. *In the reward model's own space PEC buys variance there and least elsewhere; in the faces' space it regains typefaces.*
#    **Half right, and open**: it buys 5 ± 4 % there, no less elsewhere (6 ± 14 % in $\phi$); in the faces' space five seeds
#    (7 ± 12) do not tell.
# 5. *PCVAE is PEC with a weaker pull; Clip-Higher and all latent methods are Flow-GRPO.* **Half right**: PCVAE uses
#    $\lambda$ = 6.1 ± 1.9 in the last quarter where PEC uses 6.0 ± 1.3, which shows no weaker pull. Clip-Higher's reward is Flow-GRPO's within 0.02 on each seed.
# 6. *With the rule legibility falls further for PEC than for KL.* **Rather right** against KL at 0.01 (71 for 80 % at equal reward and
#    variance; lower on four seeds), level with KL at 0.003.
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
# PEC keeps hues better than faces (as KL does). The reward model's own features, which the paper uses most, see what spoils a picture
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
# - Flow-GRPO on a reward that half of all pictures satisfy still draws fewer and fewer faces in fewer colours.
# - A KL penalty to the base model and PEC both hold most of the variance in $\phi$; typefaces they save few. The first
#   holds the images where they were, the second holds them apart and keeps more of the reward: at 1e-3 on every seed, for the
#   same variance on average. Constraints on the policy's own entropy show no effect.
#
# **Exercises.** (1) Double `letters`' groups and halve its iterations: are seeds more alike?
# (2) PEC with $\phi$ = `faces` is in the table at $\lambda=1$ only: walk along its front. Does it save typefaces further out?
# (3) `python -m ref.compare --preset letters_rule --runs pec/faces:0.1 flow_grpo_kl:0.01`: does a $\phi$ that sees typefaces
# hold what the rule takes?

# %%
import subprocess

commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True).stdout.strip()
print(
    f"torch {torch.__version__}, device cpu, {torch.get_num_threads()} threads, seed {SEED}, commit {commit or 'unknown'}"
)
