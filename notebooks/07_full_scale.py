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
# # 07 Full scale: SD3.5-Medium and FLUX.1-dev
#
# **Question.** Does the loop of the letters fine-tune a text-to-image model of billions of weights, and what does that
# take on your card?
#
# **What you need.** A GPU of 24 GB (SD3.5-Medium) or 48 GB (FLUX.1-dev), the models' licences accepted, 30 to 60 GB
# of disk. **Time.** Hours to days; the run says when it ends after its first iteration.
#
# **Without a GPU, or with `REF_FAST=1`,** this is a rehearsal of a minute: plan and memory are those of the large models,
# the loop trains *tiny random* ones, whose two pictures of noise show that the code runs, and no result. The committed
# copy is such a rehearsal: no GPU was at hand. On real weights the same cells draw the paper's figures and table.

# %%
# %matplotlib inline
import os
import shutil
import warnings

FAST = os.environ.get("REF_FAST") == "1"
if FAST or not shutil.which("nvidia-smi"):
    os.environ["TQDM_DISABLE"] = "1"  # before torch, which imports tqdm
warnings.filterwarnings("ignore", "IProgress not found")

import dataclasses
import gc
import re
import tempfile
from pathlib import Path

import diffusers
import torch
import transformers
from IPython.display import Markdown, display

from ref import evaluate, figures, presets
from ref.models import tiny
from ref.models.hub import locate
from ref.models.prompts import read_prompts
from ref.models.stock import drawing, load_pipeline
from ref.options import Pipeline
from ref.presets import LARGE, PRESETS
from ref.runs import described, plan
from ref.scoring.encoders import load_encoder
from ref.train import run

DRY = FAST or not torch.cuda.is_available()
for library in (diffusers, transformers):
    library.utils.logging.set_verbosity_error()

# %% [markdown]
# ## Your card
#
# A preset's variants for 24, 48 and 80 GB do the same in micro-batches that fit. The memory is *computed* from the models'
# shapes (`python -m ref.benchmark.memory`), not measured.

# %%
card = None if DRY else torch.cuda.get_device_properties(0)
room = card.total_memory / 1e9 if card else 80.0
MEMORY = max((size for size in (24, 48, 80) if size <= 1.07 * room), default=24)  # an "80 GB" card reports 79 to 85
print(
    f"{card.name}, {room:.0f} GB" if card else "no GPU here: shown is what a card of 80 GB would do",
    "-> variant",
    MEMORY,
)
Markdown("\n".join(re.findall(r"^\|.*", presets.__doc__.partition("The memory is *computed*")[2], re.M)))

# %% [markdown]
# ## Choose, and see the plan
#
# Settings are published ones: Flow-GRPO's, and for `flux_dev_720` DanceGRPO's, which the paper follows. They were made
# for many GPUs; `SMALLER` cuts them down to one. The plan is what `python -m ref.train` says before it loads anything.
# Nearly all time goes into the passes it counts; a way back costs about two more (notebook 08).

# %%
PRESET = "sd35_medium"  # any of LARGE that has this variant
MODEL = None  # a diffusers folder or hub id; None: the preset's
METHOD, WEIGHT = "pcvae", None  # of ref/methods.py; None: its own lambda
REWARD = ENCODER = "pickscore"  # ref/scoring: "pickscore:0.7+ocr:0.3", "dino", "my_file.py:my_reward"
SMALLER = dict(iterations=100, groups=8, group_size=16, images_per_prompt=9)  # {}: as published
OPTIONS = {}  # of options.Pipeline
OUTPUT = Path("../outputs/full_scale")

options, settings = PRESETS[PRESET].within(MEMORY, PRESETS[PRESET].options, PRESETS[PRESET].settings)
settings = dataclasses.replace(settings, **SMALLER)
options = Pipeline(**options.model_dump() | OPTIONS | dict(reward=REWARD) | (dict(model=MODEL) if MODEL else {}))
habits = dict(save_every=20, evaluate_every=0, log_with="none")
print(plan(described(PRESET, METHOD, WEIGHT, None, ENCODER, settings, options), habits, OUTPUT / METHOD))
print("\nthis card's presets:", ", ".join(name for name in LARGE if MEMORY in PRESETS[name].variants))

# %% [markdown]
# ## The rehearsal
#
# Without a GPU tiny models take the place of the large ones from here on; the preset's class and all other settings stay.
# With one, this cell finds the pipeline, or says what to do: both models are gated.

# %%
if DRY:
    scratch = tempfile.TemporaryDirectory()
    OUTPUT = Path(scratch.name)
    MODEL = (tiny.sd3 if PRESET.startswith("sd35") else tiny.flux)(OUTPUT / "pipeline")
    REWARD = ENCODER = f"pickscore={tiny.clip(OUTPUT / 'clip')}"
    for name, count in (("train", 6), ("evaluation", 4)):
        (OUTPUT / f"{name}.txt").write_text("\n".join(read_prompts(name)[:count]))
    OPTIONS |= dict(prompts=f"{OUTPUT}/train.txt", evaluation_prompts=f"{OUTPUT}/evaluation.txt", evaluation_steps=4)
    OPTIONS |= dict(
        height=64, width=64, cache_dir=OUTPUT / "cache", model=str(MODEL), reward=REWARD
    )
    options = Pipeline(**options.model_dump() | OPTIONS)
    few = dict(iterations=3 if FAST else 20, groups=2, group_size=4, steps=4, micro_batch=4, lr=1e-2, ema_every=1, images_per_prompt=6)
    settings = dataclasses.replace(settings, **few, updates=min(2, settings.updates))
source = locate(options.model)
print(source.pipeline, "from", "a tiny random model" if DRY else source.model)

# %% [markdown]
# ## Train
#
# `run` is what `python -m ref.train` calls. It continues a run that it finds in `OUTPUT`, so this cell may be interrupted
# and started again. Flow-GRPO runs beside the method; on real weights the naive KL too, for the paper's figure 4. Two
# things hold whatever the weights are: on an iteration's first update the policy is the one that sampled, so the ratio is
# exactly 1; and the policy entropy is a number of the sampler, one value in all iterations of all runs.

# %%
RUNS = {"flow_grpo": None, METHOD: WEIGHT} | ({} if DRY else {"pcvae": None, "naive_kl": None})
results = {}
for method, weight in RUNS.items():
    gc.collect()  # pipelines hold themselves in circles
    more = dict(resume=True, progress=not DRY, encoder=ENCODER, options=options)
    results[method] = run(PRESET, method, OUTPUT / method, weight, settings, **more)
histories = {method: result["history"] for method, result in results.items()}

everything = [m for history in histories.values() for m in history]
print(len(everything), "iterations; policy entropy", entropies := {m["policy_entropy"] for m in everything})
assert all(m["ratio_error"] == 0 for m in everything)
assert len(entropies) == 1

# %% [markdown]
# ## Before and after
#
# A column starts from the same noise in every row; a row that repeats itself is a collapse. Then the entropy paradox: the
# policy entropy is a straight line, and only a measure of images can move. In the paper the variance falls to a half.


# %%
def shown(figure, scale=1):
    """A rehearsal's figures carry the warning; real images get room."""
    if DRY:
        figure.suptitle("rehearsal on tiny random models: no result", color="#c44e52")
    else:
        figure.set_size_inches(figure.get_size_inches() * scale)
    return figure


K, prompts = settings.images_per_prompt, read_prompts(options.evaluation_prompts or "evaluation")
images = {"base": results["flow_grpo"]["base_images"]} | {m: r["images"] for m, r in results.items()}
images = {m: v.unflatten(0, (-1, K)) for m, v in images.items()}
print(prompts[0])
title = " " if DRY else None
shown(figures.image_grid({figures.LABELS[m]: v[0] for m, v in images.items()}, K, title), 2)

# %%
shown(figures.entropy_paradox(histories["flow_grpo"]))

# %% [markdown]
# ## The paper's other figures, on real weights
#
# Figure 3's law ($R=-3.13\,e^{H_{perc}}+2.35$ in the paper; compare the sign, and whether it is a line), figure 4 (a KL in the
# loss has expected gradient zero, proofs/P10), figure 5's curves, and the collapse in feature space.

# %%
if DRY:
    print("not drawn in a rehearsal: they would be pictures of noise. Notebooks 04 to 06 draw them on small worlds")
else:
    several = max(3, settings.iterations // 5)
    display(figures.entropy_law([histories["flow_grpo"]], several, title="Flow-GRPO"))
    display(figures.kl_comparison(histories["naive_kl"], histories["pcvae"], histories["flow_grpo"]))
    display(figures.training_curves(histories))
    phi, n = load_encoder(ENCODER, "cuda"), int(K**0.5)
    features = {m: phi(images[m].flatten(0, 1)).unflatten(0, (-1, K)) for m in ("base", "flow_grpo", METHOD)}
    numbers = {"base": results["flow_grpo"]["base"]} | {m: r["final"] for m, r in results.items()}
    notes = {m: f"feature variance {v['feature_variance']:.3f}" for m, v in numbers.items()}
    display(figures.collapse({m: images[m][0, : n * n] for m in features}, features, n, notes))
    del phi

# %% [markdown]
# ## The table's rows, on real weights
#
# `python -m ref.evaluate` draws new images with the stock pipeline, as the run's evaluations are drawn, and writes a row.
# Norm.Avg scales a column by its range over the rows *of this table*: it ranks them, and says nothing about the paper's.

# %%
rows = [OUTPUT / f"{name}.csv" for name in ("base", *RUNS)]
for name, row in zip(("base", *RUNS), rows):
    if not DRY and not row.exists():
        gc.collect()
        arguments = ["--model", source.model, "--name", figures.LABELS[name], "--output", row, "--images-per-prompt", K]
        arguments += ["--run", OUTPUT / "flow_grpo"] if name == "base" else ["--lora", OUTPUT / name / "weights"]
        arguments += ["--steps", options.evaluation_steps, "--prompts", options.evaluation_prompts or "evaluation"]
        arguments += ["--rewards", REWARD, *(["aesthetic", "clip_score", "hpsv2"] if MEMORY == 80 else [])]
        assert evaluate.main([str(a) for a in arguments]) == 0
Markdown("left out in a rehearsal" if DRY else evaluate.table(evaluate.read_rows(rows)))

# %% [markdown]
# ## The LoRA in stock diffusers
#
# `OUTPUT/METHOD/weights` holds what was trained, a model card and two pictures. Tests hold it to be the trained network to
# the last bit in the stock pipeline; here it is seen to move one image.

# %%
drawn = []
for lora in (None, str(OUTPUT / METHOD / "weights")):
    pipe = load_pipeline(source.model, lora, "cpu" if DRY else "cuda")
    size = dict(height=options.height, width=options.width, guidance_scale=options.guidance_scale)
    given = drawing(pipe, options.shift, True, num_inference_steps=options.evaluation_steps, **size)
    drawn.append(evaluate.draw(pipe, prompts[0], 0, 1, 1, **given))
print(f"largest difference of a pixel: {(drawn[0] - drawn[1]).abs().max():.2f}")
assert not torch.equal(*drawn)

# %% [markdown]
# ## Summary
#
# - The loop of the letters trains SD3.5-Medium and FLUX.1-dev: another preset, not other code.
# - Exact at any scale: ratio 1 on the first update, one policy entropy, the LoRA in stock diffusers.
# - **Not shown by the committed copy:** that PEC or PCVAE keep these models' diversity; notebook 06 shows it on letters.
#
# **Exercises.** (1) `ENCODER = "dino"`: which columns of the table gain? (2) `REWARD = "ocr"` with `prompts="ocr"` in the
# options: does learning to spell narrow the pictures, too? (3) Give the settings a `window` of 2: what does the plan save?

# %%
import subprocess

commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True).stdout.strip()
versions = f"torch {torch.__version__}, diffusers {diffusers.__version__}, {torch.get_num_threads()} threads"
print(f"{versions}, device {card.name if card else 'cpu'}, seed {settings.seed}, commit {commit or 'unknown'}")
