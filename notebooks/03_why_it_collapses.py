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
# # 03 Why it collapses
#
# **Question.** Nobody asked for a single image. The reward only says that some are a little better. Why does the
# policy end with one mode, and what decides which?
#
# **You need** notebooks 01 and 02 (which defines group, advantage and GRPO). **It takes** a minute and a half; `REF_FAST=1` takes
# seconds, trains too short to collapse, and says which claims it skips. The proofs are
# [P06](../proofs/P06_replicator_flow.md) (modes compete like species) and
# [P07](../proofs/P07_advantage_probabilities.md) (what figure 2 of the paper can and cannot show).

# %%
# %matplotlib inline
import os

import torch

from ref import figures
from ref.grpo import train
from ref.methods import METHODS
from ref.settings import Settings
from ref.worlds import figures as pictures
from ref.worlds.mixture import MixtureFlow, coordinates, effective_modes, flat, replicator, ring, tilted

FAST = os.environ.get("REF_FAST") == "1"
torch.set_num_threads(1)
SEEDS = [0] if FAST else [0, 1, 2]
ITERATIONS = 15 if FAST else 130

# %% [markdown]
# ## The theory: modes compete like species
#
# Let $p_m$ be the share of mode $m$, $R_m$ its reward, and $\tau$ the time of training. Climbing $\mathbb E[R]$ by the natural
# gradient (steps measured by how much they change the policy, not its weights) gives the replicator equation $\dot p_m=p_m(R_m-\mathbb E[R])$: a mode grows while it is better than the average, and the average
# rises. The solution is $p_\tau\propto p_0e^{\tau R}$. Nothing in it stops before one mode is left.

# %%
world = ring(6)
gaps = torch.tensor([0.0, 0.2, 0.4, 0.6, 0.8, 1.0])
p0 = torch.full((6,), 1 / 6)
for tau in (0, 1, 3, 10, 30):
    p = replicator(p0, gaps, float(tau))
    print(f"tau {tau:3d}  E[R] {p @ gaps:.3f}  modes left {effective_modes(p):.2f}  shares", [f"{x:.2f}" for x in p])

# %% [markdown]
# The rates are exact, too: the mean reward rises by the reward's variance, and the entropy of the modes falls by the
# covariance of $\log p$ and $R$. A flat reward has neither.

# %%
tau = torch.tensor(2.0, dtype=torch.float64, requires_grad=True)
R = gaps.double()
p = replicator(p0.double(), R, tau)
rate = torch.autograd.grad(p @ R, tau, retain_graph=True)[0]
loss = torch.autograd.grad(effective_modes(p).log(), tau)[0]
assert torch.isclose(rate, p @ R**2 - (p @ R) ** 2) and torch.isclose(loss, -(p * p.log()) @ (R - p @ R))
print(f"at tau = 2: dE[R]/dtau = Var(R) = {rate:.4f},  dH/dtau = -Cov(log p, R) = {loss:.4f}")


# %% [markdown]
# ## The same with a trained flow
#
# Flow-GRPO on six modes. There is one prompt; an iteration draws 32 groups of $K=16$ samples and gives each sample the advantage
# $A^k=(R^k-\bar R)/(\mathrm{std}\,R+10^{-4})$ within its group. The reward is that of the nearest mode.


# %%
def fine_tune(reward, seed):
    """Metrics, rewards [T, G, K], samples [T, B, 2] and occupancies [T, M] of a run."""
    settings = Settings(iterations=ITERATIONS, groups=32, group_size=16, updates=1, lr=1e-3, seed=seed)
    method = METHODS["flow_grpo"](clip=0.2)
    history, rewards, samples = [], [], []
    for state in train(MixtureFlow(world, seed=seed), [""] * 32, reward, coordinates, method, settings):
        history.append(state.metrics)
        rewards.append(state.reward)
        samples.append(state.samples.images)
    return history, torch.stack(rewards), samples, torch.stack([world.occupancy(x) for x in samples])


def matched(shares, reward):
    """The replicator's shares [T, M] with the same mean reward as `shares`: tau by bisection."""
    low, high = torch.zeros(len(shares)), torch.full((len(shares),), 200.0)
    for _ in range(60):
        middle = (low + high) / 2
        below = replicator(p0, reward, middle) @ reward < shares @ reward
        low, high = torch.where(below, middle, low), torch.where(below, high, middle)
    return replicator(p0, reward, (low + high) / 2)


# %%
runs = {"tilted": [fine_tune(tilted(world, gaps), s) for s in SEEDS]}
history, rewards, samples, shares = runs["tilted"][0]
shown = {i: samples[i - 1] for i in (1, *(ITERATIONS * k // 10 for k in (3, 5, 10)))}
pictures.modes_dying(shown, world.means, gaps, shares, matched(shares, gaps))

# %% [markdown]
# The poor modes die first, the better ones after them, and the last one standing is the best: that is the replicator's
# story, and the entropy of the policy's steps knows nothing of it. The *shares on the way* are not the replicator's. The
# theory moves each mode by itself; here all modes share one network, and the best mode (1.0) is a neighbour of the worst
# (0.0) on the ring. So put the rewards in another order and ask again.
#
# Look at the last cloud, too: it lies outside every mode. The reward is that of the *nearest* mode, however far, so nothing holds
# samples at it: the model is paid for leaving the data. Notebook 05 uses a reward that pays near the modes only.

# %%
shuffled = torch.tensor([0.0, 0.4, 0.8, 1.0, 0.6, 0.2])  # good modes side by side, no cliff
runs["smooth"] = [fine_tune(tilted(world, shuffled), s) for s in SEEDS]
print("largest total-variation distance to the replicator at equal E[R], one number a seed")
for name, reward in (("tilted", gaps), ("smooth", shuffled)):
    distance = [(s - matched(s, reward)).abs().sum(1).max().item() / 2 for *_, s in runs[name]]
    rising = [(s @ reward)[-1].item() for *_, s in runs[name]]
    print(f"{name:8} distance", [f"{d:.2f}" for d in distance], " final reward", [f"{r:.3f}" for r in rising])
noise = (torch.distributions.Multinomial(512, p0).sample((1000,)) / 512 - p0).abs().sum(1).mean() / 2
print(f"         (512 samples of the theory itself would be {noise:.2f} away)")

# %% [markdown]
# The replicator is a law of the *natural* gradient. It predicts the direction, the order and the end; a network with
# shared weights and AdamW takes its own way there. This is a limit of the theory and not of the experiment. One cause is ruled out:
# the initial noise $x_0$ is not trained, which makes the exact curve a *conditional* replicator
# ([P16](../proofs/P16_conditional_replicator.md)). On this ring the two hardly differ, and the conditional one fits no better.
#
# ## Flat rewards do not collapse
#
# The control: a reward that pays for sharpness and prefers no mode. Optimisation is as strong, advantages are as large.

# %%
runs["flat"] = [fine_tune(flat(world), s) for s in SEEDS]
curves = {
    label: [effective_modes(run[3]).tolist() for run in runs[key]]
    for key, label in (("flat", "flat reward"), ("tilted", "tilted reward"))
}
pictures.modes_left(curves, 6)

# %% [markdown]
# The same two trainings as a film: 512 samples at every few iterations, rings as dark as their mode's reward.

# %%
from IPython.display import Image

frames = []
for i in range(0, ITERATIONS, max(1, ITERATIONS // 26)):
    clouds = {"flat reward": runs["flat"][0][2][i], f"tilted reward, iteration {i + 1}": samples[i]}
    frames.append(pictures.particles(clouds, world.means, gaps, limit=3.8))
Image(pictures.movie(frames), format="gif")

# %%
left = {key: [effective_modes(run[3][-5:].mean(0)).item() for run in runs[key]] for key in runs}
print({key: [f"{x:.2f}" for x in values] for key, values in left.items()})
if FAST:
    print("SKIPPED in fast mode: the flat reward keeps more than 5.5 modes, the tilted one fewer than 2")
else:
    assert min(left["flat"]) > 5.5 and max(left["tilted"]) < 2

# %% [markdown]
# So it is not reinforcement learning as such, nor the noise of the groups, that kills modes within this time: it is differences in
# reward.
#
# ## Figure 2, and how to read it
#
# The paper plots "advantage probabilities" $p_A(x^k)$ within a group, a softmax over its $K$ samples, and says that their maximum
# and minimum converge. A
# softmax of *rewards* does that when the rewards' spread shrinks (P07); the temperature here is the first iteration's spread.

# %%
temperature = rewards[0].std(1).mean()
probability = (rewards / temperature).softmax(2)
raw = [m | {"p_max": p.amax(1).mean().item(), "p_min": p.amin(1).mean().item()} for m, p in zip(history, probability)]
figures.mode_seeking(raw)

# %% [markdown]
# A softmax of advantages *divided by their own standard deviation* cannot show this: the division takes the spread out.
# By P07, for $K=16$, $\log(p_{\max}/p_{\min})$ of a group then never falls below $2\sqrt{15/16}$, unless the group ties exactly.

# %%
centred = rewards - rewards.mean(2, keepdim=True)
spread = rewards.std(2)
tied = spread < 1e-6
standard = centred / spread.clamp_min(1e-6)[..., None]
log_ratio = standard.amax(2) - standard.amin(2)
assert log_ratio[~tied].min() > 2 * (15 / 16) ** 0.5 - 1e-4
for i in (0, ITERATIONS // 2, ITERATIONS - 1):
    mean = f"{log_ratio[i][~tied[i]].mean():.2f}" if not tied[i].all() else "none"
    raw_ratio = (rewards[i].amax(1) - rewards[i].amin(1)).mean() / temperature
    print(
        f"iteration {i + 1:4d}: log(p_max/p_min) raw {raw_ratio:.2f}, normalised {mean}, tied groups {tied[i].float().mean():.0%}"
    )

# %% [markdown]
# ## Summary
#
# - Policy gradients are selection: modes below the average shrink, the average rises, one mode remains (P06).
# - Entropy of the modes falls at the rate $\mathrm{Cov}(\log p,R)$; the entropy of the policy is not part of the equation.
# - A flat reward kept all modes over this run. Finite groups still make their shares a random walk (P06), so noise
#   alone loses modes in the end; reward differences do it much sooner.
# - The replicator predicts order and end; the path of a network with shared weights differs, visibly.
# - Figure 2 of the paper needs raw rewards (or a fixed temperature): normalised advantages cannot converge (P07).
#
# ## Exercises
#
# 1. Start from unequal weights, `GaussianMixture(world.means, 0.15, weights)`, with the best mode rare. Find a base for
#    which diversity *rises* first, as P06 predicts.
# 2. Divide all gaps by ten. With normalised advantages, how much slower is the collapse? And with `std_normalize=False`?
# 3. Use groups of 2 and a flat reward for ten times as long. Does drift kill a mode?

# %%
import subprocess

commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True).stdout.strip()
print(f"torch {torch.__version__}, device cpu, seeds {SEEDS}, commit {commit}, fast mode {FAST}")
