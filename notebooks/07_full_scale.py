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
# **Question.** Does the loop of the digits fine-tune a text-to-image model of billions of weights, and draw the
# paper's figures and table rows from it?
#
# **What you need.** A GPU of 24 GB (SD3.5-Medium) or 48 GB (FLUX.1-dev), the models' licences accepted, 30 to 60 GB
# of disk. **Time.** Hours to days; the notebook says how long before it starts.
#
# **Without a GPU, or with `REF_FAST=1`,** every cell runs, in a minute or two, on *tiny random* models of the same
# classes: tokenizers, text encoders, transformer, VAE, CLIP and DINOv2, all made by `ref.models.tiny`. They have
# learnt nothing and paint noise. **Their figures show that the code runs, and no result.** The committed copy, which you may
# be reading, is such a run: no GPU was at hand. What does not hang on learnt weights is asserted there, too.

# %%
# %matplotlib inline
import os
import shutil
import warnings

FAST = os.environ.get("REF_FAST") == "1"
if FAST or not shutil.which("nvidia-smi"):
    os.environ["TQDM_DISABLE"] = "1"  # before torch, which imports tqdm: no bars for what takes a second
warnings.filterwarnings("ignore", "IProgress not found")

import dataclasses
import gc
import tempfile
from pathlib import Path

import diffusers
import torch
import transformers
from IPython.display import Markdown, display

from ref import evaluate, figures, presets
from ref.benchmark import memory
from ref.models import tiny
from ref.models.hub import locate
from ref.models.prompts import read_prompts
from ref.options import Pipeline
from ref.presets import LARGE, PRESETS
from ref.sampling import sample
from ref.scale.stopwatch import Stopwatch
from ref.scoring.encoders import load_encoder
from ref.train import run

DRY = FAST or not torch.cuda.is_available()
for library in (diffusers, transformers):
    library.utils.logging.set_verbosity_error()
    if DRY:
        library.utils.logging.disable_progress_bar()
NOISE = "tiny random models: no result" if DRY else None
print(NOISE or torch.cuda.get_device_name())

# %% [markdown]
# ## Choose
#
# A preset is a model, an image size and published settings: Flow-GRPO's, and for `flux_dev_720` DanceGRPO's, which
# the paper follows. They were made for many GPUs; `SMALLER` cuts them down to one. Flow-GRPO runs as well, for
# comparison, and figure 4 takes PCVAE and the naive KL. Without a GPU the second cell puts tiny things in their place;
# the preset's class and all other settings stay.

# %%
PRESET, MEMORY = "sd35_medium", 80  # or flux_dev, flux_dev_720; GB of the GPU: 24 (SD3.5-Medium alone), 48, 80
MODEL = None  # a diffusers folder or hub id; None: the preset's
METHOD, WEIGHT = "pcvae", None  # of ref/methods.py; None: its own lambda
REWARD = ENCODER = "pickscore"  # ref/scoring: load.py ("pickscore:0.7+ocr:0.3"), encoders.py ("dino", "clip")
FIGURE_4 = True  # False saves up to two runs
SMALLER = dict(iterations=100, groups=8, group_size=16)  # {}: as published
OPTIONS = dict(images_per_prompt=9)  # more of them: options.Pipeline
OUTPUT = Path("../outputs/full_scale")
TABLE = dict(encoders=["dino", "clip", "pickscore"], rewards=[REWARD], batch=[1])
if MEMORY == 80:  # the other reward models fit in beside the pipeline
    TABLE |= dict(rewards=[REWARD, "aesthetic", "clip_score", "hpsv2"], batch=[4])

# %%
if DRY:
    scratch = tempfile.TemporaryDirectory()
    OUTPUT = Path(scratch.name)
    MODEL = (tiny.sd3 if PRESET == "sd35_medium" else tiny.flux)(OUTPUT / "pipeline")
    clip, dino = tiny.clip(OUTPUT / "clip"), tiny.dino(OUTPUT / "dino")
    REWARD = ENCODER = f"pickscore={clip}"
    TABLE = dict(encoders=[f"dino={dino}", f"clip={clip}", ENCODER], rewards=[REWARD, f"clip_score=clip={clip}"])
    for name, count in (("train", 6), ("evaluation", 4)):
        (OUTPUT / f"{name}.txt").write_text("\n".join(read_prompts(name)[:count]))
    OPTIONS |= dict(prompts=f"{OUTPUT}/train.txt", evaluation_prompts=f"{OUTPUT}/evaluation.txt", evaluation_steps=4)
    OPTIONS |= dict(height=64, width=64, images_per_prompt=3, cache_dir=OUTPUT / "cache")
    SMALLER = dict(iterations=3 if FAST else 20, groups=2, group_size=4, steps=4, micro_batch=4, lr=1e-2)
    SMALLER |= dict(updates=min(2, PRESETS[PRESET].settings.updates))
options, settings = PRESETS[PRESET].within(MEMORY, PRESETS[PRESET].options, PRESETS[PRESET].settings)
settings = dataclasses.replace(settings, **SMALLER)
settings

# %% [markdown]
# ## Memory
#
# *Computed, not measured:* `ref.benchmark.memory` sends fake tensors through the real architectures, and counts what
# autograd keeps. Below that, what follows for the presets, reward model and all.

# %%
if FAST:
    print("skipped in fast mode; python -m ref.benchmark.memory prints it in a minute")
else:
    memory.main([])
Markdown(presets.__doc__.partition("\n\n")[2])

# %% [markdown]
# ## Time
#
# Nearly all of it goes into passes of the transformer over one image. With $G$ prompts, $K$ samples of each, $N$ steps
# of which $S$ are trained, and $c=2$ for classifier-free guidance (SD3.5), else 1, an iteration takes
#
# $$ c\,GKN \;\text{(rollout)} \;+\; 3\,c\,GKS \;\text{(update; the way back counts two)}, $$
#
# and 4 in place of 3 with gradient checkpointing. That is an upper bound: a LoRA needs no gradients of the frozen weights,
# and `python -m ref.benchmark.on_paper` counts 2.1 to 2.5 in place of 3. PEC and PCVAE add no passes: $\phi$ looks at
# finished images, and where it is the reward's own network it is run once for both.


# %%
def passes(preset, s, memory=80):
    """Forward passes of an iteration: rollout, update."""
    c, each = 1 + (preset == "sd35_medium"), 3 + ("gradient_checkpointing" in PRESETS[preset].variants[memory])
    S = s.window or sum(i < s.trained * s.steps for i in range(s.steps - 1))
    return c * s.groups * s.group_size * s.steps, c * each * s.groups * s.group_size * S


print(f"{'':<14} {'samples':>8} {'rollout':>8} {'update':>8}   an iteration")
for label, preset, s in [*((p, p, PRESETS[p].settings) for p in LARGE), ("this notebook", PRESET, settings)]:
    cost = passes(preset, s, MEMORY if s is settings else 80)
    print("{:<14} {:>8} {:>8} {:>8}".format(label, s.groups * s.group_size, *cost))

# %% [markdown]
# ## The model
#
# Both models are gated: one accepts a licence on the model's page and logs in. A folder, a model in the local cache
# and the tiny one need neither, so the hub is asked first; only if it refuses does the line say where to go.


# %%
def find(model):
    """The pipeline, or one line of what to do; logs in when the hub wants it and no token is stored."""
    from huggingface_hub import get_token, interpreter_login

    try:
        return locate(model)
    except OSError as error:
        if "log in" not in str(error) or get_token():
            raise SystemExit(f"error: {error}") from None
        print(error)
    interpreter_login()
    return find(model)


source = find(MODEL or PRESETS[PRESET].options.model)
print(source.pipeline, "from", source.model)
options = Pipeline(**options.model_dump() | OPTIONS | dict(model=source.model, reward=REWARD))

# %% [markdown]
# ## The base model, and the clock
#
# Two prompts of the evaluation, from the noise with which every evaluation below starts. The second round is timed.

# %%
task = PRESETS[PRESET].task(ENCODER, options)
if REWARD == ENCODER:
    assert task.reward.encoder is task.encoder  # one network, and one pass of it, for both
model, prompts, K, steps = task.model, task.evaluation, task.images_per_prompt, task.evaluation_steps
ode = model.schedule(steps, kind=settings.kind, noise_level=settings.noise_level).ode()
for _ in range(2):
    lap = Stopwatch(next(model.parameters()).device)
    looked = sample(model, prompts[:2], K, ode, ("evaluate",), list(torch.arange(2 * K).split(3)))
    lap("sample")
one = lap.seconds["seconds_sample"] / (2 * K * steps * (1 + (PRESET == "sd35_medium")))
seconds = one * sum(passes(PRESET, settings, MEMORY))
print(f"a pass {1000 * one:.1f} ms, an iteration {seconds:.1f} s, a run {seconds * settings.iterations / 3600:.2g} h")


def shown(figure, scale=1):
    """A dry run's figures are small and carry the warning; real images get room."""
    if DRY:
        figure.set_dpi(72)
        figure.suptitle(NOISE, color="#c44e52")
    else:
        figure.set_size_inches(figure.get_size_inches() * scale)
    return figure


for number, prompt in enumerate(prompts[:2], 1):
    print(number, prompt)
shown(figures.image_grid(dict(zip(("prompt 1", "prompt 2"), looked.images.split(K))), K, NOISE), 2)

# %% [markdown]
# ## Train
#
# `run` is what `python -m ref.train` calls: the generator `ref.grpo.train` with checkpoints, and an evaluation before
# and after. It continues a run that it finds in `OUTPUT`, so this cell may be interrupted and started again.
#
# Two things hold whatever the weights are. On an iteration's first update the policy is the one that sampled, so the
# ratio is exactly 1. And the policy entropy is a number of the sampler: one value in all iterations of all runs.

# %%
RUNS = {"flow_grpo": None, METHOD: WEIGHT}
if FIGURE_4:
    RUNS.setdefault("pcvae", None)
    RUNS.setdefault("naive_kl", RUNS["pcvae"])
vae, encode, kind, size = model.vae, model.encode, type(model), [8 * side for side in model.latent_size]
scheduler, how = model.scheduler, {k: getattr(model, k) for k in ("guidance_scale", "shift", "dtype", "decode_batch")}
del task, model  # `run` loads its own


def free():
    """Give memory back; pipelines hold themselves in circles."""
    gc.collect()
    torch.cuda.empty_cache()


results, histories = {}, {}
for method, weight in RUNS.items():
    free()
    more = dict(resume=True, progress=not DRY, encoder=ENCODER, options=options)
    results[method] = run(PRESET, method, OUTPUT / method, weight, settings, **more)
    history = histories[method] = results[method]["history"]
    phases = [k for k in history[0] if k.startswith(("seconds", "peak"))]
    print(f"{method}:", ", ".join(f"{k} {sum(m[k] for m in history) / len(history):.2f}" for k in phases))

# %%
everything = [m for history in histories.values() for m in history]
entropies = {m["policy_entropy"] for m in everything}
print(len(everything), "iterations; policy entropy", entropies)
assert all(m["ratio_error"] == 0 for m in everything)
assert len(entropies) == 1

# %% [markdown]
# ## The paper's figures 1 and 3
#
# The entropy paradox: in the paper the policy entropy is a straight line, and the variance in the reward model's space
# falls to about half. The law: the paper fits $R=-3.13\,e^{H_{perc}}+2.35$. Slope and offset hang on the reward's scale
# and $\phi$'s bandwidth; to be compared are the sign, and whether it is a line.

# %%
shown(figures.entropy_paradox(histories["flow_grpo"]))

# %%
shown(figures.entropy_law([histories["flow_grpo"]], max(3, settings.iterations // 5), title="Flow-GRPO"))

# %% [markdown]
# ## Figures 4 and 5
#
# The KL belongs into the reward: differentiated through $\log p_\theta$, the same KL has expected gradient zero
# (proofs/P10), and adds noise. Then reward over training, and what it costs in diversity.

# %%
if FIGURE_4:
    display(shown(figures.kl_comparison(histories["naive_kl"], histories["pcvae"], histories["flow_grpo"])))

# %%
shown(figures.training_curves(histories))

# %% [markdown]
# ## What one sees
#
# A column starts from the same noise in every row. A row that repeats itself is a collapse.

# %%
images = {"base": results["flow_grpo"]["base_images"]} | {m: r["images"] for m, r in results.items()}
images = {m: v.unflatten(0, (-1, K)) for m, v in images.items()}
print(prompts[0])
shown(figures.image_grid({figures.LABELS[m]: v[0] for m, v in images.items()}, K, NOISE), 2)

# %%
phi = load_encoder(ENCODER, vae.device)
images = {m: images[m] for m in ("base", "flow_grpo", METHOD)}
features = {m: phi(v.flatten(0, 1)).unflatten(0, v.shape[:2]) for m, v in images.items()}
numbers = {"base": results["flow_grpo"]["base"]} | {m: r["final"] for m, r in results.items()}
notes = {m: f"feature variance {v['feature_variance']:.3f}" for m, v in numbers.items()}
n = int(K**0.5)
shown(figures.collapse({m: v[0, : n * n] for m, v in images.items()}, features, n, notes))

# %% [markdown]
# ## The table's rows
#
# `python -m ref.evaluate` draws new images with the stock pipeline and writes a row. Norm.Avg scales a column by its
# range over the rows *of this table*: it ranks them, and says nothing about the paper's.

# %%
del phi
rows = [OUTPUT / f"{name}.csv" for name in ("base", *RUNS)]
for name, row in zip(("base", *RUNS), rows):
    if not row.exists():
        free()
        arguments = ["--model", source.model, "--name", figures.LABELS[name], "--output", row, "--steps", steps]
        arguments += ["--height", size[0], "--width", size[1], "--images-per-prompt", K]
        arguments += ["--prompts", options.evaluation_prompts or "evaluation"]
        arguments += ["--run", OUTPUT / "flow_grpo"]  # the guidance and the time grid of training, also for the base
        arguments += ["--lora", OUTPUT / name / "weights"] if name in RUNS else []
        arguments += [a for option, values in TABLE.items() for a in (f"--{option}", *values)]
        assert evaluate.main([str(a) for a in arguments]) == 0
Markdown((f"**{NOISE}**\n\n" if DRY else "") + evaluate.table(evaluate.read_rows(rows)))

# %% [markdown]
# ## The LoRA in stock diffusers
#
# `OUTPUT/METHOD/weights` holds what was trained, and a model card. In the stock pipeline it is the same network to the
# last bit: the evaluation's images come out again. The pipeline's own loop, from the same noise, agrees to less than
# half a step of an 8-bit pixel in float32; bfloat16 rounds its latents, too.

# %%
free()
text = [name for name in diffusers.DiffusionPipeline.load_config(source.model) if name.startswith(("text_", "token"))]
stock = diffusers.DiffusionPipeline.from_pretrained(source.model, dtype=how["dtype"], **dict.fromkeys(text))
stock = stock.to(vae.device)
stock.set_progress_bar_config(disable=True)
stock.load_lora_weights(OUTPUT / METHOD / "weights")
if how["shift"] is not None:
    stock.scheduler = diffusers.FlowMatchEulerDiscreteScheduler(shift=how["shift"])
theirs = stock(
    **{name: value.expand(K, *value.shape[1:]) for name, value in encode(prompts[:1]).items()},
    latents=looked.trajectory.x[0][:K].to(vae.device, how["dtype"]), num_inference_steps=steps, output_type="pt",
    guidance_scale=how["guidance_scale"], height=size[0], width=size[1],
).images.float().cpu()  # fmt: skip

same = kind(stock.transformer, vae, scheduler, encode, size=size, **how)
layout = list(torch.arange(len(prompts) * K).split(settings.micro_batch))
ours = sample(same, prompts, K, ode, ("evaluate",), layout).images
assert torch.equal(ours, results[METHOD]["images"])
assert not torch.equal(ours, results[METHOD]["base_images"])
difference = (theirs - ours[:K]).abs().max().item()
print(f"largest difference of a pixel from the pipeline's own loop: {difference:.1e}")
assert difference < 1 / 510 or how["dtype"] != torch.float32
shown(figures.image_grid({"trained": ours[:K], "stock": theirs}, K, NOISE), 2)

# %% [markdown]
# ## Summary
#
# - The loop of the digits trains SD3.5-Medium and FLUX.1-dev: another preset, not other code.
# - Memory is computed and time estimated before a run starts; both are measured in every iteration.
# - Exact at any scale: ratio 1 on the first update, one policy entropy, the LoRA in stock diffusers.
# - **Not shown by the committed copy:** that PEC or PCVAE keep these models' diversity. That takes their weights and
#   a GPU. Notebook 06 shows it on weights that fit into this repository.
#
# **Exercises.** (1) `ENCODER = "dino"`: what does a $\phi$ of its own cost in seconds, and which columns of the table
# gain? (2) `REWARD = "ocr"` with `prompts="ocr"` in the options: does learning to spell narrow the pictures, too?
# (3) Give the settings a `window` of 2. What does the formula say it saves, and what does the clock say?

# %%
import subprocess

commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True).stdout.strip()
device = torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"
print(
    f"torch {torch.__version__}, diffusers {diffusers.__version__}, device {device}, {torch.get_num_threads()} threads, "
    f"seed {settings.seed}, commit {commit or 'unknown'}"
)
