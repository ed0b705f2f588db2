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
# # 01 A flow as a stochastic policy
#
# **Question.** A flow turns noise into an image by solving a differential equation. Nothing in it is random but the
# start. How can reinforcement learning, which needs probabilities of actions, get hold of it?
#
# **You need** PyTorch and the normal distribution; nothing is imported from `ref` before the last picture. **It takes** half
# a minute; with `REF_FAST=1` seconds: smaller samples, the same checks.
#
# Letters: the noise level $\sigma$ runs from 1 (noise) to 0 (data); $\varepsilon\sim\mathcal N(0,I)$ is noise and
# $x_\sigma=(1-\sigma)\,x_{\rm data}+\sigma\varepsilon$; the velocity, which a flow model with weights $\theta$ learns, is
# $v(x,\sigma)=\mathbb E[\varepsilon-x_{\rm data}\mid x_\sigma=x]$. A step takes $\sigma$ down by $dt$, from $x$ to $x'$.

# %%
# %matplotlib inline
import math
import os

import matplotlib.pyplot as plt
import torch
from IPython.display import display
from torch.distributions import Normal

FAST = os.environ.get("REF_FAST") == "1"
torch.set_num_threads(1)
torch.manual_seed(SEED := 0)
plt.rcParams.update({"axes.spines.top": False, "axes.spines.right": False, "figure.dpi": 110})
N_SAMPLES = 2000 if FAST else 20000

# %% [markdown]
# ## A flow that needs no training
#
# When the data are a mixture of Gaussians, the velocity is a formula: within a mode everything is linear, and the modes
# are mixed by their responsibilities $r_m(x,\sigma)=P(\text{mode }m\mid x_\sigma=x)$. Data: two modes on a line.

# %%
centres, width, weights = torch.tensor([-1.5, 1.0]), 0.25, torch.tensor([0.35, 0.65])


def parts(x, sigma):
    """Variance of x_sigma within a mode, and log w_m N(x; (1 - sigma) c_m, variance) for x [B] -> [B, 2]."""
    variance = (1 - sigma) ** 2 * width**2 + sigma**2
    return variance, weights.log() + Normal((1 - sigma) * centres, variance**0.5).log_prob(x[:, None])


def density(x, sigma):
    return parts(x, sigma)[1].logsumexp(1).exp()


def velocity(x, sigma):
    variance, logs = parts(x, sigma)
    centre = logs.softmax(1) @ centres
    return -centre + (sigma - (1 - sigma) * width**2) / variance * (x - (1 - sigma) * centre)


# %% [markdown]
# The velocity is an average over everything that $x$ could come from. Check it against that definition: draw data and
# noise, keep the pairs that land near $x=0.2$ at $\sigma=0.6$.

# %%
data = centres[torch.multinomial(weights, 1_000_000, replacement=True)] + width * torch.randn(1_000_000)
noise = torch.randn_like(data)
near = ((0.4 * data + 0.6 * noise) - 0.2).abs() < 0.01
seen, formula = (noise - data)[near], velocity(torch.tensor([0.2]), 0.6).item()
print(f"mean of eps - x_data over {near.sum()} pairs: {seen.mean():.3f}, formula {formula:.3f}")
assert abs(seen.mean() - formula) < 5.5 * seen.std() / len(seen) ** 0.5 + 0.02  # 0.02: the width of the slit


# %% [markdown]
# ## From the ODE to an SDE with the same marginals
#
# The *score* comes for free: $x+(1-\sigma)v=\mathbb E[\varepsilon\mid x]$, so $\nabla\log p_\sigma=-(x+(1-\sigma)v)/\sigma$.
# Add noise $g\sqrt{dt}\,\varepsilon$ of some strength $g$ at each step and it spreads the density; add the drift
# $\frac{g^2}2\nabla\log p$ and it contracts it by as much. One step of the SDE, with mean $\mu$:
#
# $$\mu=x-v\,dt-\frac{g^2}{2\sigma}\bigl(x+(1-\sigma)v\bigr)dt,\qquad x'=\mu+g\sqrt{dt}\;\varepsilon.$$


# %%
def simulate(n, steps, g, correct=True):
    """Paths [steps + 1, n]. The last step adds no noise: nothing after it could take it away."""
    sigmas = torch.linspace(1, 0, steps + 1).tolist()
    paths = [torch.randn(n)]
    for i, (sigma, after) in enumerate(zip(sigmas, sigmas[1:])):
        x, dt, g_i = paths[-1], sigma - after, g if i < steps - 1 else 0.0
        v = velocity(x, sigma)
        drift = g_i**2 / (2 * sigma) * (x + (1 - sigma) * v) if correct else 0.0
        paths.append(x - (v + drift) * dt + g_i * dt**0.5 * torch.randn(n))
    return torch.stack(paths)


runs = {
    "ODE: only the start is random": simulate(N_SAMPLES, 100, 0.0),
    "SDE: random at every step": simulate(N_SAMPLES, 100, 0.7),
    "noise without the drift": simulate(N_SAMPLES, 100, 0.7, correct=False),
}

# %%
time, grid = torch.linspace(0, 1, 101), torch.linspace(-3, 3, 241)
river = torch.stack([density(grid, 1 - t) for t in time.tolist()], 1)
river = river / river.amax(0)  # every instant with its own peak as black
figure, axes = plt.subplots(2, 3, figsize=(12, 6), height_ratios=(1.7, 1), layout="constrained")
for (title, paths), top, bottom in zip(runs.items(), *axes):
    top.pcolormesh(time, grid, river, cmap="Greys", vmax=1.6, shading="gouraud", rasterized=True)
    for path in paths[:, :24].T:
        top.plot(time, path, lw=0.9, alpha=0.85, color="#4c72b0" if path[-1] > -0.25 else "#c44e52")
    top.set(title=title, ylim=(-3, 3), xlabel=r"$1-\sigma$   (noise $\to$ data)")
    bottom.hist(paths[-1].numpy(), 80, range=(-3, 3), density=True, color="#9db7d5")
    bottom.plot(grid, density(grid, 0.0), color="black", lw=1.5, label="exact data density")
    bottom.set(xlabel="$x$ at the end", yticks=[])
axes[1, 0].legend(frameon=False, loc="upper left")
axes[0, 0].set_ylabel("$x$")
plt.show()

# %% [markdown]
# Left: smooth lines that never cross; the start decides everything. Middle: the paths wander, change sides, and still
# fill the same grey river. Right: noise alone, and the river bursts its banks. In numbers, the largest distance between
# the samples' distribution function and the exact one (Kolmogorov and Smirnov):


# %%
def distance(x, sigma):
    variance = (1 - sigma) ** 2 * width**2 + sigma**2
    x = x.sort().values
    exact = Normal((1 - sigma) * centres, variance**0.5).cdf(x[:, None]) @ weights
    return (exact - torch.arange(len(x)) / len(x)).abs().max().item()


chance = 2.8 / N_SAMPLES**0.5  # exceeded by chance with probability 3e-7
for title, paths in runs.items():
    levels = {s: distance(paths[round(100 * (1 - s))], s) for s in (0.75, 0.5, 0.25, 0.0)}
    print(f"{title:30}", "  ".join(f"sigma {s}: {d:.3f}" for s, d in levels.items()))
print(f"{'(chance)':30} {chance:.3f}; 100 Euler steps add up to about 0.01")
assert distance(runs["SDE: random at every step"][-1], 0.0) < chance + 0.015
assert distance(runs["noise without the drift"][-1], 0.0) > chance + 0.015

# %% [markdown]
# ## A step is an action
#
# Given the state, the next state is Gaussian: $\pi_\theta(x'\mid x)=\mathcal N(\mu_\theta,s^2I)$, with $s=g\sqrt{dt}$. That is a
# policy. The network enters through the mean; the width belongs to the schedule.

# %%
sigma, dt, g = 0.7, 0.1, 0.7
figure, axis = plt.subplots(figsize=(6.4, 2.8), layout="constrained")
for x, color in zip((-1.4, -0.2, 1.1), ("#c44e52", "#55a868", "#4c72b0")):
    state = torch.tensor([x])
    v = velocity(state, sigma)
    mean = state - v * dt - g**2 / (2 * sigma) * (state + (1 - sigma) * v) * dt
    axis.fill_between(grid, Normal(mean, g * dt**0.5).log_prob(grid).exp(), color=color, alpha=0.4, lw=0)
    axis.plot([x, mean.item()], [2.1, 1.82], "-o", color=color, ms=4, markevery=[0])
axis.set(xlabel="$x'$", yticks=[], title="three states, three actions' laws: bells that move and never change width")
plt.show()

# %% [markdown]
# This is already the whole cause of the entropy paradox: the entropy of a bell depends on its width alone. Train the
# mean as you like; the entropy's gradient is exactly zero.

# %%
net = torch.nn.Sequential(torch.nn.Linear(4, 32), torch.nn.Tanh(), torch.nn.Linear(32, 4))
x, s = torch.randn(4096, 4), torch.tensor(0.22)


def log_prob(x_next, mean):
    """Per coordinate [B, d]; the log of s stands inside."""
    return -((x_next - mean) ** 2) / (2 * s**2) - s.log() - 0.5 * math.log(2 * math.pi)


mean = net(x)
x_next = mean + s * torch.randn_like(mean)
entropy = -log_prob(x_next, mean).sum(1).mean()  # a Monte-Carlo estimate, differentiated through everything
gradients = torch.autograd.grad(entropy, list(net.parameters()))
closed = 4 * (s.log() + 0.5 * math.log(2 * math.pi * math.e))
print(f"entropy {entropy:.3f} (4096 samples: +- 0.02), closed form {closed:.3f}")
assert all(torch.count_nonzero(g) == 0 for g in gradients)  # zero in every bit

# %% [markdown]
# ## Sum or mean?
#
# Training compares the new and the old probability of an action by their ratio, and stops where it leaves
# $[1-\epsilon,1+\epsilon]$, the *clip range*. The log-density of an image is a *sum* over its $d$ dimensions, but code divides
# by $d$. Both are right, for different purposes: theory sums; training averages, because a ratio of sums leaves the range of
# float32 long before $d$ is that of an image.

# %%
dims = [2**k for k in range(1, 17 if FAST else 19)]
ratios = {"sum": [], "mean": []}
for d in dims:
    eps, shift = torch.randn(256, d), 0.02 * torch.randn(256, d) + 0.02  # the mean moved by 2 % of the std
    change = (eps**2 - (eps - shift) ** 2) / 2
    ratios["sum"].append(change.sum(1).std().item())
    ratios["mean"].append(change.mean(1).std().item())
figure, axis = plt.subplots(figsize=(6, 3.2), layout="constrained")
for name, color in (("sum", "#c44e52"), ("mean", "#4c72b0")):
    axis.loglog(dims, ratios[name], "o-", ms=3, color=color, label=f"{name} over dimensions")
axis.axhline(1e-4, color="#7f7f7f", ls=":", lw=1)
axis.text(2, 1.2e-4, "the usual clip range", color="#7f7f7f", va="bottom")
axis.axvline(65536, color="#7f7f7f", lw=0.8)
axis.text(60000, 2e-2, "SD3, 512 px", rotation=90, ha="right", va="center", color="#7f7f7f")
axis.set(xlabel="latent dimensions $d$", ylabel="spread of the log ratio")
axis.legend(frameon=False)
plt.show()
assert ratios["sum"][-1] > 5 and ratios["mean"][-1] < 1e-3

# %% [markdown]
# The same small change of the policy spreads the joint log-ratio like $\sqrt d$ and the averaged one like $1/\sqrt d$. It is the
# joint ratio to the power $1/d$: that is why the clip range of such trainers is near $10^{-4}$ and not $0.2$.
#
# One trap: before the first update the ratio must be 1 *exactly*, so nothing may be rounded after it was scored.

# %%
with torch.no_grad():
    again = net(x)
    exact = (log_prob(x_next, again).mean(1) - log_prob(x_next, mean).mean(1)).exp()
    rounded = (log_prob(x_next.bfloat16().float(), again).mean(1) - log_prob(x_next, mean).mean(1)).exp()
print(f"ratio - 1: kept {(exact - 1).abs().max():.0e}, latents rounded to bf16 {(rounded - 1).abs().max():.0e}")
assert (exact == 1).all() and (rounded - 1).abs().max() > 1e-4

# %% [markdown]
# ## How much noise? More steps can be worse
#
# The field has three kernels (`ref/schedule.py`): `flow_sde` takes $g=\eta\sqrt{\sigma/(1-\sigma)}$, `dance_sde` a constant
# $g=\eta$, `cps` re-noises the predicted image. For data $\mathcal N(0,s^2)$ every step is linear and the samples' variance is a
# recursion; nothing is sampled below. Near the data a constant $g$ is too much: a step with $g^2dt>4\sigma\sigma'$ ($\sigma'$ its
# lower end) overshoots when $s\to0$ ([P18](../proofs/P18_stability_near_the_data.md)).

# %%
from ref.schedule import FlowSchedule, time_grid, variance_recursion
from ref.worlds import figures as pictures


def ratio(kind, steps, eta=0.7, shift=1.0, width=0.01):
    """The variance of the samples over that of the data; and whether every noisy step is stable."""
    schedule = FlowSchedule(time_grid(steps, shift, torch.float64), kind, eta)
    ratios, factors = variance_recursion(schedule, width)
    return ratios[-1].item(), bool((factors[list(schedule.steps)] <= 1).all())


counts = sorted({round(10 * 640 ** (k / 59)) for k in range(60)})
kernels = {kind: (counts, [ratio(kind, n)[0] for n in counts]) for kind in ("dance_sde", "flow_sde", "cps")}
dance_grpo = ("DanceGRPO's recipe", 16, ratio("dance_sde", 16, 0.3, 3.0)[0])
display(
    pictures.kernel_stability(kernels, (8 / 0.7**2, 0.7**2 / 4e-4), "data of width 0.01, $\\eta$ = 0.7", dance_grpo)
)
print(
    f"dance_sde, even grid, 0.7: stable for narrow data up to {8 / 0.7**2:.0f} steps; DanceGRPO's: up to {8 * 3 / 0.3**2:.0f}"
)
assert all(ratio("dance_sde", 16, 0.3, 3.0, width)[1] for width in (1e-6, 0.01, 0.1, 1.0))
assert not ratio("dance_sde", 200)[1] and ratio("flow_sde", 200)[1] and ratio("cps", 200)[1]

# %% [markdown]
# DanceGRPO's own recipe ($\eta=0.3$, 16 steps, a grid shifted by 3) is stable for data of every width. Not so `sd35_medium` on SD3's
# own grid, whose last step begins at a very small $\sigma$: it is not for data narrower than 0.069 (P18). Stable is not accurate:
# with few steps every kernel makes such narrow data too narrow.
#
# ## Summary
#
# - A flow becomes a policy when the ODE is replaced by an SDE with the same marginals (in the limit of small steps); the score
#   needed for that is a linear function of the velocity.
# - Each step is a Gaussian whose mean is learned and whose width is not. Its entropy is a constant.
# - Log-densities are summed in theory and averaged in training. State which.
# - Noise must shrink with $\sigma$ near the data, or steps must be few; else more steps are worse.
#
# ## Exercises
#
# 1. `flow_sde`'s $g$ is infinite at $\sigma=1$. What does `ref/schedule.py` do there, and what does the first step's width depend on?
# 2. Let the last step be noisy too. By how much does it blur the two modes at 10 steps?
# 3. Halve the number of steps again and again. How does the SDE's distance to the exact density grow?

# %%
import subprocess

commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True).stdout.strip()
print(f"torch {torch.__version__}, device cpu, seed {SEED}, commit {commit}, fast mode {FAST}")
