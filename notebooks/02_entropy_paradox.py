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
# # 02 The entropy paradox
#
# **Question.** In language models a falling policy entropy announces a loss of diversity. Here the samples collapse
# and the policy entropy does not move by a hair. Where has the lost diversity gone?
#
# **You need** notebook 01 and the chain rule of entropy. **It takes** a minute; `REF_FAST=1` takes seconds, trains too short to
# collapse, and says which claims it skips. Claims [P01](../proofs/P01_policy_entropy_is_constant.md),
# [P02](../proofs/P02_path_entropy_is_constant.md), [P03](../proofs/P03_entropy_bonus_is_noise.md) and
# [P17](../proofs/P17_the_floor_of_the_collapse.md) are proved in `proofs/`; here they are seen.

# %%
# %matplotlib inline
import math
import os

import torch

from ref import figures
from ref.entropy import entropy_floor, knn_entropy, path_entropy
from ref.grpo import train
from ref.methods import METHODS
from ref.sampling import sample
from ref.settings import Settings
from ref.worlds import figures as pictures
from ref.worlds.mixture import GaussianMixture, MixtureFlow, coordinates, ring, tilted

FAST = os.environ.get("REF_FAST") == "1"
torch.set_num_threads(1)
SEED = 0

# %% [markdown]
# ## The training, in three words
#
# *Group:* the $K$ samples that one prompt gets, $x^1..x^K$, with rewards $R^1..R^K$. *Advantage:* how much better a sample is than its
# group, $A^k=(R^k-\mathrm{mean}_jR^j)/(\mathrm{std}_jR^j+10^{-4})$. *GRPO* (group-relative policy optimisation): raise the
# log-probability of every step of sample $k$ in proportion to $A^k$, as far as the clip range allows. On a flow, with notebook
# 01's steps as actions, it is called *Flow-GRPO*.
#
# *Policy entropy* is the entropy of a step, *perceptual entropy* $\mathcal H_{perc}$ a measure of how far a group's features
# $\phi(x^k)$ lie apart (notebook 04). Both are in nats per dimension (of latents, of features).
#
# ## Figure 1 on a world that is known exactly
#
# Latents have 64 dimensions. The eye (`phi`) sees only the first two, where six modes sit on a ring; the other 62
# hold texture that it does not notice. The reward likes some modes better, and likes sharp samples.

# %%
plane = ring(6, radius=2.5)
means = torch.zeros(6, 64)
means[:, :2] = plane.means
world = GaussianMixture(means, std=0.5)
gaps = torch.linspace(0, 1, 6)


def phi(images):
    return images[:, :2]


def reward(images, prompts):
    mode = plane.mode(phi(images))
    return (0.5 + 0.5 * gaps[mode]) * (-(phi(images) - plane.means[mode]).square().sum(1) / 2).exp()


# %%
settings = Settings(iterations=20 if FAST else 170, groups=32, group_size=16, updates=1, lr=1e-3, seed=SEED)
history, eyes = [], []
for state in train(MixtureFlow(world), [""] * 32, reward, phi, METHODS["flow_grpo"](clip=0.05), settings):
    history.append(state.metrics)
    eyes.append(phi(state.samples.images))
figures.entropy_paradox(history)

# %% [markdown]
# (a) The policy entropy is one number from the first iteration to the last; its estimate from samples misses it by too little to be
# drawn. Perceptual entropy falls. (b) What the eye sees loses most of its variance. The latents lose a quarter of theirs. That is
# bookkeeping: the variance of 64 dimensions is that of the two plus that of the other 62, and the 62 keep theirs. (Pixels are the
# latents here, so their curves coincide.)

# %%
first, last = ({k: sum(m[k] for m in part) / 5 for k in history[0]} for part in (history[:5], history[-5:]))
for key in ("policy_entropy", "policy_entropy_mc", "perceptual_entropy", "vae_variance", "feature_variance", "reward"):
    print(f"{key:20} {first[key]:8.3f} -> {last[key]:8.3f}")
hidden = [m["vae_variance"] - m["feature_variance"] for m in (first, last)]
print(f"unseen 62 dimensions {hidden[0]:8.3f} -> {hidden[1]:8.3f}")
print(
    f"latents keep {last['vae_variance'] / first['vae_variance']:.0%}, the plane {last['feature_variance'] / first['feature_variance']:.0%}"
)
assert len({m["policy_entropy"] for m in history}) == 1  # not nearly constant: constant
if FAST:
    print("SKIPPED in fast mode: features lose more than half their variance, the unseen dimensions less than a tenth")
else:
    assert last["feature_variance"] < 0.5 * first["feature_variance"]
    assert abs(hidden[1] / hidden[0] - 1) < 0.1

# %% [markdown]
# In the paper's figure 1a the latent variance is flat. Here it falls by a quarter, because the plane holds 6 of the 21
# units at the start; where it is a smaller part of the latent space the same collapse hardly shows.
#
# ## Where the diversity went
#
# One dimension, two modes, $N=5$ steps $x_0\to\dots\to x_5$ of which four are noisy. Here every density can be integrated on a grid.
# The reward pays 1 for the upper mode and 0 for the lower.

# %%
pair = GaussianMixture(torch.tensor([[-1.5], [1.5]]), std=0.35)
kernel = dict(kind="flow_sde", noise_level=0.9)
model = MixtureFlow(pair, seed=SEED)
schedule = model.schedule(5, **kernel)
grid = torch.linspace(-7, 7, 1001, dtype=torch.float64)
h = grid[1] - grid[0]


def entropy(p):
    return -(h * torch.xlogy(p, p)).sum().item()


# %% [markdown]
# `integrate` pushes the density through the kernels. It returns the densities, the entropy of the last noisy state
# $z=x_{N-1}$, and, *separately*, the entropy of the path that led there: $\sum_iH(x_i\mid x_{i+1})$, computed from the
# reverse kernels by Bayes' rule.


# %%
@torch.no_grad()
def integrate(model):
    p = (-grid.square() / 2).exp() / math.sqrt(2 * math.pi)
    densities, path = [p], 0.0
    for i in schedule.steps:
        mean = schedule.mean(grid[:, None], model.velocity(grid[:, None].float(), schedule.sigmas[i]).double(), i)
        step = torch.distributions.Normal(mean, schedule.std[i].double()).log_prob(grid[None]).exp()
        joint = p[:, None] * step
        p = h * joint.sum(0)
        path -= (h * h * torch.xlogy(joint, joint / p.clamp_min(1e-300))).sum().item()
        densities.append(p)
    return torch.stack(densities), entropy(p), path


# %%
def paths(model, n):
    """n paths [n, N] up to the last noisy state."""
    return sample(model, [""], n, schedule, ("paths", SEED)).trajectory.x[:-1, :, 0]


settings = Settings(
    iterations=20 if FAST else 70, groups=32, group_size=16, steps=5, updates=1, lr=1e-3, seed=SEED, **kernel
)
before = integrate(model), paths(model, 30)
records = [(0, *integrate(model)[1:], knn_entropy(paths(model, 4000).T[:, -1:]).item())]
for state in train(model, [""] * 32, tilted(pair, [0.0, 1.0]), coordinates, METHODS["flow_grpo"](clip=0.2), settings):
    if state.iteration % 5 == 0:
        knn = knn_entropy(paths(model, 4000).T[:, -1:]).item()
        records.append((state.iteration, *integrate(model)[1:], knn))
after = integrate(model), paths(model, 30)

# %%
modes = 0.8 * pair.means[:, 0]
window = grid.abs() < 4
pictures.rivers(
    {
        title: (schedule.sigmas[:-1], trail, grid[window], densities[:, window])
        for title, ((densities, *_), trail) in {"before training": before, "after training": after}.items()
    },
    modes,
)

# %% [markdown]
# Before, the noise decides *which mode*. After, the same amount of noise is injected at every step, but the drift
# brings every path to the same mode: the noise now decides only *which way* to get there. (The paths overshoot the mode at 1.5: a reward that only asks for the upper
# half does not hold them back.)
#
# ## The ledger
#
# With $H_i=\frac12\log(2\pi e\,s_i^2)$ the entropy of noisy step $i$, whose width $s_i$ the schedule sets, all in nats:
#
# $$\underbrace{H(x_0)+\sum_iH_i}_{\text{no }\theta}=\underbrace{H(z)}_{\text{which image}}+\underbrace{H(\text{path}\mid z)}_{\text{which path to it}}$$

# %%
iterations, image, path, knn = map(list, zip(*records))
total = path_entropy(schedule, 1).item()
floor = entropy_floor(schedule, 1).item()
pictures.entropy_budget(iterations, image, floor, total, (iterations, knn))

# %%
assert min(image) >= floor - 1e-4
print("iteration   H(z)  H(path|z)      sum   closed form   kNN of H(z)")
for row in records[:: max(1, len(records) // 5)]:
    print(f"{row[0]:9d} {row[1]:6.3f} {row[2]:10.3f} {row[1] + row[2]:8.5f} {total:13.5f} {row[3]:13.3f}")
assert max(abs(a + b - total) for a, b in zip(image, path)) < 1e-4
assert max(abs(a - b) for a, b in zip(image, knn)) < 0.12  # 4000 samples: three standard errors and the bias
print(f"image entropy {image[-1] - image[0]:+.3f} nats, path entropy {path[-1] - path[0]:+.3f} nats")

# %% [markdown]
# What the image loses the path gains, to the last digit. There is a floor (P17): the last noisy step adds its own noise to $z$
# whatever the policy does, so $H(z)\ge H_{N-2}$. Most of what could move has moved.
#
# The one exception is the deterministic last step: the finished image $x_N=F_\theta(z)$ has
# $H(x_N)=H(z)+\mathbb E\log|F_\theta'(z)|$ where $F_\theta$ is one to one (else less $H(z\mid x_N)$), and
# that Jacobian costs no path entropy. It is small here, and
# [P02](../proofs/P02_path_entropy_is_constant.md) keeps it.

# %%
for name, net in (("base", MixtureFlow(pair)), ("trained", model)):
    density = integrate(net)[0][-1]
    z = grid[:, None].float().requires_grad_()
    image_of_z = schedule.mean(z, net.velocity(z, schedule.sigmas[4]), 4)
    slope = torch.autograd.grad(image_of_z.sum(), z)[0][:, 0].double()
    print(f"{name:8} E log |F'| = {(h * density * slope.abs().clamp_min(1e-12).log()).sum():+.3f} nats")

# %% [markdown]
# ## Summary
#
# - Policy entropy is set by the noise schedule. It is exactly constant, whatever the reward does (P01).
# - The entropy of the whole *path* is constant too (P02). Collapse is a transfer: nats leave "which image" and arrive at
#   "which path to it", down to a floor that the schedule sets (P17).
# - An entropy bonus in latent space therefore has nothing to act on; its expected gradient is zero (P03).
# - To keep images diverse one has to measure diversity where it is lost: in features (notebook 04).
#
# ## Exercises
#
# 1. Use `noise_level=0.3`. How does the total change, and how does the ledger start?
# 2. Reward *both* modes equally but pay for `|x| > 1.5`. Which entry of the ledger moves, and which way?
# 3. Let the kernel's std depend on a learned number (P13). Which line of `integrate` now depends on it, and what
#    would an entropy bonus do?

# %%
import subprocess

commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True).stdout.strip()
print(f"torch {torch.__version__}, device cpu, seed {SEED}, commit {commit}, fast mode {FAST}")
