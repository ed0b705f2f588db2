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
# # 08 What it costs
#
# **Question.** Where does an iteration's time go, what do PEC and PCVAE add, and how much time and memory will a large
# model take on a machine that you have not rented yet?
#
# **What you need.** Nothing: the notebook reads the JSON files that `python -m ref.benchmark ... --json` wrote on one
# thread of a cloud CPU, in `data/costs`. **It takes** seconds. `REF_MEASURE=1` measures on your machine first, in 25
# minutes on an idle core, with 1 GB of scratch disk. What a machine measures is *measured* below; what follows from
# shapes alone is *computed*; one number is a *guess*, and is called one. No GPU was at hand.

# %%
# %matplotlib inline
import dataclasses
import json
import os
import shlex
import subprocess
import sys
import tempfile
import warnings
from pathlib import Path
from statistics import mean, stdev

import torch
from IPython.display import Markdown, display

from ref.benchmark import figures
from ref.benchmark.measure import expected_passes, scaling
from ref.benchmark.savers import EXACT, EXTREMES, OURS, THEIR_FAST, THEIRS, table
from ref.policy import rollout
from ref.presets import PRESETS
from ref.worlds.letters import PROMPTS

warnings.filterwarnings("ignore", "IProgress not found")
COSTS = Path("data/costs")

# %% [markdown]
# ## The commands
#
# One for each file. `{tiny}` and `{wide}` are folders of random pipelines that `python -m ref.models.tiny` makes: complete
# and minute, or (`--wide`) with transformers 512 and 768 wide, two blocks deep. `REF_MEASURE=1` runs them all but
# the counted ones, which are the same on every machine; `REF_MEASURE=letters` runs those with `letters` in their names.

# %%
SMALL = "ref.benchmark --preset letters --groups 4 --group-size 20 --repeats 3 --warmup 1"
TINY = "ref.benchmark --updates 1 --cache-dir {scratch}/cache"
TINY += " --reward pickscore={tiny}/clip --encoder pickscore={tiny}/clip --preset"
WIDE = "ref.benchmark.savers --updates 1 --groups 2 --group-size 4 --repeats 3 --micro-batch 2 --height 64 --width 64"
WIDE += " --cache-dir {scratch}/cache --reward pickscore={wide}/clip --encoder pickscore={wide}/clip --preset"
SD3 = f"{TINY} sd35_medium --model {{tiny}}/sd3 --height 64 --width 64 --groups 4 --group-size 12"
COMMANDS = {
    "letters": SMALL,
    "letters_micro_batch_10": f"{SMALL} --micro-batch 10",
    "letters_steps_16": f"{SMALL} --steps 16",
    "letters_window_6": f"{SMALL} --window 6",
    "letters_groups_8": SMALL.replace("--groups 4", "--groups 8"),
    "letters_group_size_40": SMALL.replace("--group-size 20", "--group-size 40"),
    "sd3": f"{SD3} --repeats 3",
    "sd3_compiled": f"{SD3} --repeats 5 --compile-blocks",
    "savers_letters": "ref.benchmark.savers --preset letters --groups 2 --group-size 8 --micro-batch 4 --repeats 3",
    "savers_sd3": f"{WIDE} sd35_medium --model {{wide}}/sd3",
    "savers_flux": f"{WIDE} flux_dev --model {{wide}}/flux",
    "race_letters": "ref.benchmark.savers --preset letters --race 1.5 --seeds 5",
    "counted_flops": "ref.benchmark.on_paper 256 512 720 1024",
    "counted_memory": "ref.benchmark.memory 512 720 1024",
    "counted_all_weights": "ref.benchmark.memory 512 1024 --all-weights",
}
wanted = os.environ.get("REF_MEASURE")


def python(command):
    env = os.environ | {"OMP_NUM_THREADS": "1"}
    subprocess.run([sys.executable, "-m", *shlex.split(command)], check=True, env=env)


with tempfile.TemporaryDirectory() as scratch:
    folders = dict(scratch=scratch, tiny=f"{scratch}/tiny", wide=f"{scratch}/wide")
    if wanted:
        python("ref.models.tiny {tiny}".format(**folders))
        python("ref.models.tiny {wide} --wide".format(**folders))
    for name, command in COMMANDS.items():
        if wanted and (wanted in name or wanted == "1" and not name.startswith("counted")):
            command, file = command.format(**folders), COSTS.resolve() / f"{name}.json"
            python(f"{command} --json {shlex.quote(str(file))}")

found = {file.stem: json.loads(file.read_text()) for file in COSTS.glob("*.json")}
assert found.keys() == COMMANDS.keys()
letters = found["letters"]
print(f"{letters['device']}; a matrix product {letters['matmul_tflops']['median']:.3f} TFLOP/s")

# %% [markdown]
# ## Where an iteration's time goes
#
# The letters of notebook 06: a small SD3, 80 images an iteration. The three methods take turns in one process, because a
# machine's speed drifts; every number is a median over rounds, in seconds of computing, as the machine had other work, too.
# Our loop logs diversity for every method and so runs $\phi$ for Flow-GRPO, too; in (b) that time is taken off, for Flow-GRPO
# as published has no encoder. The paper says 1.01.

# %%
display(figures.phases(letters))
for method, s in letters["ratio"].items():
    print(f"{method:>6} / Flow-GRPO without features: {s['median']:.2f} ({s['low']:.2f} .. {s['high']:.2f})")
for phase, s in letters["utilisation"].items():
    print(f"{phase:>6} runs at {100 * s['median']:.0f} % of a matrix product's rate")
print(f"a checkpoint: {1e3 * letters['phases']['pec']['checkpoint']['median']:.0f} ms")

# %% [markdown]
# Rollout and update are most of it, and both are passes of the transformer; decoding is a tenth. Perceptual entropy looks at *finished* images
# once, and where $\phi$ is the reward's own network not even that: it is run once for both.
#
# ## Beside Flow-GRPO, and what saves passes
#
# `ref/benchmark/flow_grpo.py` works in the order of Flow-GRPO's trainers, written from their description, and its docstring
# lists what differs: batches are encoded, rolled out, decoded and judged; the update goes through the same batches step by
# step and takes the rollout's log-densities for the old ones. On the same noise it gives the same numbers. At equal settings
# nobody is faster than anybody: what costs is the number of **passes** of the transformer. So make fewer, and say what each
# saving costs in exactness. From top to bottom each row with a + keeps what the rows above changed, from a preset to its
# fast twin; what stands below the twin is not part of it. Passes are counted by a hook, samples times branches of guidance;
# a trained pass has a way back and takes 2.1 to 2.2 times as long. One thread and its seconds of computing, one optimiser step
# an iteration, the presets' 128 tokens of text on small images, so that text is most of the work; all rows in turns; medians
# (quartiles) over rounds, ratios round by round.
# That SD3's gradients differ by 2e-4 is PickScore's doing, which rounds pixels to grey levels: ten of 98,304 fell on the
# other side, and the latents differ by 5e-7 of the largest.

# %%
LABELS = {THEIRS: "Flow-GRPO", THEIR_FAST: "Flow-GRPO-Fast", OURS: "ours, the same settings"}
LABELS |= {name: f"+ {name}" for name in EXACT} | {"tail": "+ tail: the fast twin", EXTREMES: "and half of each group"}
sd3, flux, small = (found[f"savers_{name}"] for name in ("sd3", "flux", "letters"))
for each in (sd3, flux, small):
    rows = {row["name"]: row for row in each["rows"]}
    assert rows[THEIRS]["passes"] == rows[OURS]["passes"]
    if each is not small:  # letters have a window of 3 to begin with
        assert abs(rows[OURS]["faster"]["median"] - 1) < 0.03 and rows["tail"]["faster"]["median"] > 2.5
display(figures.savers({"SD3, 512 wide": sd3, "FLUX, 768 wide": flux}, LABELS))
display(Markdown(table(sd3, flux)), Markdown(table(small)))

# %% [markdown]
# What the savers rest on:
#
# - **Window, guidance 1**: the recipe of Flow-GRPO-Fast as its code has stood since October 2025. An earlier one let a
#   prompt's group branch from one walk, as the shared start does.
# - **Shared start**: with `same_noise` a group is one sample until the window begins. One walks for all; where a pass has
#   the same shape as before the result has the same bits (`tests/test_sampling.py`).
# - **Tail**: after the window nothing is random and nothing is trained, so DPM-Solver++(2M) may follow the flow; how far
#   from it, the next cell shows (rms of the latents to 60 of Euler's steps): on letters 3 calls err more than Euler's 6,
#   and 4 less. `flux_dev_fast` takes 2, which err 1.9, 1.4 and 1.0 times as much as Euler's 5, 4 and 3.
# - **Best and worst** (no preset has it): the middle of a group is left out of the update. That is biased: on letters the
#   base model's gradient keeps 0.91 of itself for 12 of 24 members and 0.79 for 8, with cosines to the whole of 0.96 and 0.90
#   (means of 3 seeds; the gradients of two batches have one of 0.03, so noise is far larger than this bias).
# - **Flat groups**: samples whose advantage is exactly 0 have no gradient and are not trained on, where a method's loss
#   has no term of its own. Each remaining sample stays in a micro-batch of the size it was drawn in: the ratio is still 1.
#   Flow-GRPO's trainers of SD3 leave them out as well, and average over the rest: with half of the groups flat, their
#   gradient is twice ours.
# - **Rewards from a server** are asked for while the next samples are drawn, and joined before the update: exact. So does
#   Flow-GRPO. It saves no computing, so it has no row.

# %%
model = PRESETS["letters"].task().model
conditioning = model.encode(PROMPTS)


def walk(schedule, x, steps, eps=None):
    return rollout(lambda x, s: model.velocity(x, s, conditioning), schedule, x, eps=eps, steps=steps).x[-1]


for name in ("letters_fast", "flux_dev_fast"):  # FLUX's grid and noise, on the letters' model
    own = PRESETS[name].settings
    N = own.steps
    for place in range(own.places):
        end = place + own.window
        window = model.schedule(N, noise_level=own.noise_level).windowed(place, own.window)
        noise = torch.randn(N + 1, len(PROMPTS), *model.latent_shape, generator=torch.Generator().manual_seed(0))
        after = walk(window, noise[0], range(end), noise[1:])
        fine = torch.cat([window.sigmas[:end], window.sigmas[end] * torch.linspace(1, 0, 61)])
        flow = walk(dataclasses.replace(window, sigmas=fine), after, range(end, end + 60))
        off = {}
        for calls in range(2, N - end + 1):
            tail = window.tailed(calls)
            off[f"2M in {calls}"] = walk(tail, after, range(end, len(tail))) - flow
        off[f"Euler in {N - end}"] = walk(window, after, range(end, N)) - flow
        print(
            f"{name:>13}, {N - end} steps left: "
            + ", ".join(f"{k} {e.square().mean().sqrt():.3f}" for k, e in off.items())
        )

# %% [markdown]
# ## A race
#
# Fewer passes an iteration are worth nothing if more iterations are needed. `letters` and `letters_fast` are trained by
# Flow-GRPO until the mean training reward of five iterations is 1.5, which was chosen before: the study of notebook 06 passes
# it between iterations 31 and 44 of 80. Then both are evaluated.

# %%
seeds = found["race_letters"]
share = [seed["twin"]["seconds"] / seed["preset"]["seconds"] for seed in seeds]
iterations = {name: mean(seed[name]["iterations"] for seed in seeds) for name in ("preset", "twin")}
print(f"the twin takes {mean(share):.2f} ± {stdev(share):.2f} of the seconds; iterations: {iterations}")
assert max(share) <= 0.6
figures.race(seeds)

# %% [markdown]
# The twin is there in less than a third of the seconds, with more reward and less variance, as it had come further. It needs fewer
# *iterations*, too, and that is not the passes' doing: what a window early in the path decides, a late one cannot change any
# more. On another seed (100) the preset takes 40 s; 18 with its window in the first half; 18 with two steps; 15 with the
# tail; 11 with the shared start.
#
# ## What makes it fast
#
# One large micro-batch in place of many small ones, and compiled blocks (once, in less than a minute).

# %%
figures.gains(
    {
        "one micro-batch, letters": ("10 at a time", found["letters_micro_batch_10"], "all of a step", letters),
        "compiled blocks, tiny SD3": ("as written", found["sd3"], "compiled", found["sd3_compiled"]),
    }
)

# %% [markdown]
# ## FLOPs, on paper
#
# $G$ prompts of $K$ samples, $N$ denoising steps of which $S$ are trained. One sample's forward pass takes $F$ FLOPs,
# forward and backward take $B$, guidance included (SD3.5 runs every sample twice). $P$ GPUs do $r$ FLOPs a second
# each, of which a share $u$ is used:
#
# $$ \text{seconds of an iteration} \approx \frac{G K\,(N F + S B)}{P\,r\,u}, $$
#
# with $S(F+B)$ in place of $SB$ under gradient checkpointing, and $SF$ more for a KL to the base model. Decoding, reward
# and $\phi$ see each image once. $F$ and $B$ are counted, not estimated: fake tensors, shapes without numbers, go through
# the real modules. The one guess is $ru=400$ TFLOP/s, 40 % of an H100's nominal rate in bfloat16. A group stays on
# one GPU, so the lines end at as many GPUs as an optimiser step has groups.

# %%
RATE = 400e12  # a guess
paper = {(row["preset"], row["pixels"]): row for row in found["counted_flops"]}
most = {
    p: PRESETS[p].settings.groups // PRESETS[p].settings.updates for p in ("sd35_medium", "flux_dev", "flux_dev_720")
}


def seconds(preset, gpus, rate):
    s, row = PRESETS[preset].settings, paper[preset, PRESETS[preset].options.height]
    N, S = expected_passes(s)  # a window, a shared start and a tail make them fewer
    work = s.groups * s.group_size * (N * row["forward"] + S * row["forward_and_backward"])
    assert abs(work / (row["sample"] + row["update"]) - 1) < 1e-9  # the formula, and what the benchmark adds up
    return work / (gpus * rate)


for preset in most:
    flop = RATE * seconds(preset, 1, RATE)
    print(f"{preset:>16}: {flop / 1e15:.0f} PFLOP, {flop / RATE:.0f} s on 1 GPU")
figures.on_paper(found["counted_flops"], seconds, most, RATE)

# %% [markdown]
# Twice the side is four times the image tokens, but 2 to 5 times the work: at 256 px many tokens are text (128 of T5, for
# `flux_dev_720` 512), at 1024 px attention has set in. A `window` of few steps saves
# $B$s, and guidance 1 halves $F$ and $B$ on SD3.5.
#
# ## The formula, checked
#
# Change one thing, and compare the ratio of FLOPs with that of seconds.

# %%
points = {
    "letters": {
        "twice N, rollout": scaling(found["letters_steps_16"], letters, "sample"),
        "twice S, update": scaling(found["letters_window_6"], letters, "update"),
        "twice G, iteration": scaling(found["letters_groups_8"], letters, "seconds"),
        "twice K, iteration": scaling(found["letters_group_size_40"], letters, "seconds"),
    },
}
figures.predicted_and_measured(points)

# %% [markdown]
# More steps cost what they should, up to 3 %; twice as many small images 1.9 to 2.0 times: the rest is the fixed cost of
# starting operations, which the formula does not know, $u$ hides, and a large model does not have.
# Measured on an earlier version and not again: the wide SD3 at 128, 256 and 512 px took 1 : 1.55 : 4.75 in the rollout
# (by the formula 1 : 1.8 : 5.5) and 1 : 1.6 : 5.8 in the update (1 : 1.8 : 5.6); two processes of one thread were 1.65
# and 1.68 times as fast as one.
#
# ## Memory of one GPU
#
# **Computed, not measured**: the tensors that autograd keeps, counted on fake tensors through the real forward pass.
# `weights` are frozen, 2 bytes each; `trained` are a LoRA's gradients and AdamW's two moments in float32; `kept` grows
# with the micro-batch. On top come 3.7 GiB for PickScore, 1 GiB for CUDA, and a tenth for fragmentation.
#
# Layer norms are counted as CUDA's autocast takes them, in float32. What torch's allocator reserves on top is emulated in
# `tests/no_kernels` (the table of `ref/presets.py`). Leave room.
#
# **8-bit AdamW** is left out: a LoRA's two moments are 0.14 GiB on SD3.5-Medium and 1.3 GiB on FLUX at rank 64. After 5
# steps torchao's weights were 1.16 of the way that AdamW's had gone away from them, after 70 s of compiling; bitsandbytes'
# 0.026.

# %%
footprints = {(row["model"], row["pixels"], row["rank"]): row for row in found["counted_memory"]}
large = {p: PRESETS[p].options for p in most}
figures.memory({f"{p}, {o.height} px": footprints[o.model, o.height, o.lora_rank] for p, o in large.items()})

# %% [markdown]
# Checkpointing takes a third more time (the formula: $F$ more for each $B$) and makes room for ten times as many samples.
# Without `--memory`, a run finds its micro-batch by trial on the GPU itself, and needs none of these numbers.
#
# ## Where another way takes over
#
# - **Sharding.** A LoRA needs none: its gradient, 75 MB on SD3.5-Medium and 1.4 GB on FLUX at rank 128, is summed once an
#   optimiser step. Training *all* weights takes $(2 + 16)\,W$ bytes, or $(2+20)\,W$ with averaged weights: a gradient,
#   two moments and a copy beside the frozen base. FSDP divides that by the GPUs, and moves $8\,W$ bytes (the weights
#   twice, the gradient in float32) for every micro-batch and trained step: 89 GiB on FLUX, free while computing takes longer.

# %%
whole = {row["model"]: row["weights"] + row["trained"] * 20 / 16 for row in found["counted_all_weights"]}
figures.parts(whole)

# %% [markdown]
# - **Sequence parallelism** is not needed for memory: with checkpointing, a FLUX image of 2048 px keeps 7.2 GiB. It
#   would take over for *speed*, with more GPUs than an optimiser step has groups. diffusers offers it for FLUX
#   (`enable_parallelism`), not for SD3; this project leaves it out.
# - **Fewer passes.** Nothing here makes a pass cheaper. Fewer tokens do (128 of T5, as Flow-GRPO takes).
#
# ## Summary
#
# - Rollout and update are the cost; PEC and PCVAE add a per cent or nothing, as $\phi$ sees each image once.
# - At equal settings this loop takes as long as Flow-GRPO's order of work, within 2 %. Count passes: the fast twins make
#   fewer, and are 3.5 (SD3) and 3.0 (FLUX) times as fast.
# - Seconds follow $GK(NF+SB)$ where arithmetic takes the time; shapes alone give FLOPs and memory. No GPU has
#   confirmed either.
#
# ## Exercises
#
# 1. `REF_MEASURE=letters`: where does your machine differ, and does the ratio of PEC move?
# 2. Below which $K$ does the formula no longer hold on letters? Time `--group-size` 2, 5, 10 and plot seconds over $K$.
# 3. You have eight 48 GB GPUs and a day. Which preset, how many iterations? Say which of your numbers are guesses.

# %%
commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True).stdout.strip()
print(
    f"torch {torch.__version__}, drawn on the CPU, measured on {letters['device']}, seed 0, commit {commit or 'unknown'}"
)
