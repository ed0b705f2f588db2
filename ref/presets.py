"""Presets: what is fine-tuned, on which prompts, towards which reward, and with which settings.

A preset is a function that builds a `Task`, and the settings and options it runs with; the loop is `grpo.train` for all.

| preset         | model                                          | settings of                               |
|----------------|------------------------------------------------|-------------------------------------------|
| `mixture`      | six modes in the plane, exact velocity + MLP   | this project                              |
| `letters`      | SD3's classes on coloured capitals, LoRA r16; `letters_rule` has another reward | this project |
| `sd35_medium`  | SD3.5-Medium, 512 px, LoRA r32                 | Flow-GRPO: 10 steps, CFG 4.5, noise 0.7   |
| `flux_dev`     | FLUX.1-dev, 512 px, LoRA r64                   | Flow-GRPO: 6 steps, guidance 3.5, noise 0.9 |
| `flux_dev_720` | FLUX.1-dev, 720 px, LoRA r128                  | the paper's author (earlier code): 16 steps, eta 0.3, shift 3, same noise, the first 60 % of the steps |
| `flux_dance`   | FLUX.1-dev, 720 px, LoRA r128 on attention     | DanceGRPO: the same, but 9 steps drawn at random |
| `*_fast`       | `letters`, `sd35_medium` and `flux_dev` again   | the same with fewer passes, below         |

**Fast twins** sample and train less, and say so: a group starts from one noise and walks as one until its window, which
lies in the first half; the steps after it are few and of second order; guidance is off on SD3 (Flow-GRPO-Fast's recipe,
which is the window and the guidance; `ref.benchmark.savers` shows what each part saves). On FLUX, where guidance costs
nothing and 6 steps leave little to save, the window is one step, drawn anew each iteration among the first 3, and the tail
two calls. All samples are trained on. It costs: a group explores one step at a time, and the tail errs twice as much as Euler's
5 calls after the first step, 1.4 times as much as 4 after the second, and as much as 3 after the third (letters on FLUX's grid,
rms of the latents .20, .10, .05; the images' rewards correlate by .956, .994 and .999 with those of the exact flow).

**Departures from the recipes that presets are named after** (their public code of 2025). Flow-GRPO's:

- AdamW decays weights by 1e-4, ours does not: 6e-5 of a weight in 1,000 iterations.
- The averages are moved after every micro-batch at every eighth optimiser step, with 32 GPUs twice on SD3 and six times on
  FLUX: hence 0.9^2 and 0.9^6. The decay is (1 + n) / (10 + n) until that is 0.9 after n = 80 steps; ours does not warm up.
- Its SD3 recipes add a KL of weight 0.04 (OCR, GenEval) or 0.01 (PickScore): here `--method flow_grpo_kl`, with dt in the
  variance, which theirs leaves out (`methods.FlowGRPOKL`). Its `pickscore` is 100 / 26 times ours.
- Advantages use the population's standard deviation, ours the sample's (0.979 times as large at K = 24).
- Its fast recipes use Flow-CPS at 0.8, with a density that lacks 1 / 2 s^2 and a clip of 1e-5; ours keep `flow_sde` and
  1e-4. Each of their samples has its own noise, and all steps. On FLUX they train the first 3 steps (ours 1 of them), for
  PickScore with each group's own deviation; on SD3 with PickScore they take 64 groups of 18.

DanceGRPO's: all weights at a rate of 1e-5 and a decay of 1e-4, its LoRA script 3e-4 (ours), on four projections (so
`flux_dance`; `flux_dev_720` all twelve of `flux.LORA_TARGETS`) and with 12 steps (ours: 16). An iteration has 16 prompts
and 3 optimiser steps, each on 4 members of every group; ours 8 and one. Steps are drawn for each sample, ours for an
iteration; the last is dropped, ours deterministic.

The large ones take the options of `options.Pipeline`, among them a folder in place of the model. Their micro-batch
is the largest that fits, found by trial (scale/microbatch.py), unless `memory` is given, the GPU's in GB: then it is the one of
this table. All variants do the same, up to rounding. The memory is *emulated*, not measured: it is what torch's own CUDA
allocator reserves for an update on a device without kernels (tests/no_kernels), with PickScore in float32 (3.7 GiB),
averaged weights, and 1 GiB more for CUDA itself. `python -m ref.benchmark.memory` computes the terms for other sizes.

|                    | 24 GB               | 48 GB               | 80 GB               |
|--------------------|---------------------|---------------------|---------------------|
| `sd35_medium`      | 12 ckpt, 16.2 GiB   | 6, 38.8 GiB         | 12, 66.6 GiB        |
| `flux_dev`         | none                | 8 ckpt, 37.6 GiB    | 4, 62.4 GiB         |
| `flux_dev_720`     | none                | 4 ckpt, 40.1 GiB    | 2, 67.7 GiB         |
| `sd35_medium_fast` | 12 ckpt, 13.4 GiB   | 6, 24.8 GiB         | 12, 38.7 GiB        |

(micro-batch, with gradient checkpointing or without). FLUX.1-dev's 11.9 billion weights alone fill 22.2 GiB.
"""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field, replace
from functools import partial

import torch

from ref import metrics
from ref.models.prompts import read_prompts
from ref.options import Pipeline, near
from ref.perceptual import perceptual_entropy
from ref.sampling import sample, scores
from ref.scale.processes import deal_padded
from ref.scale.shown import bar
from ref.settings import Settings

MOST_EVALUATED = 64  # prompts, where none are named for the evaluation: it then takes about as long as an iteration


@dataclass
class Task:
    """What is fine-tuned, on what, towards what; and how it is evaluated."""

    model: torch.nn.Module
    prompts: list[str]
    reward: Callable
    encoder: Callable
    measures: dict[str, Callable] = field(default_factory=dict)  # name -> f(images, prompts) -> float
    evaluation: list[str] | None = None  # prompts of the evaluation; None: those of training
    images_per_prompt: int = 64  # in the evaluation
    evaluation_steps: int | None = None  # of the ODE sampler; None: as many as in training
    source: str | None = None  # the base model's folder or hub id, for the model card

    def evaluate(self, settings: Settings, bandwidth: float) -> tuple[dict, torch.Tensor]:
        """Quality and diversity of the model as it stands, and the images [G K, ...]: ODE samples of every prompt.

        The noise is that of seed 0 whatever the run's seed, so rows of a table differ by their models alone.
        """
        steps = self.evaluation_steps or settings.steps
        schedule = self.model.schedule(steps, kind=settings.kind, noise_level=settings.noise_level).ode()
        prompts, K = self.evaluation or self.prompts, self.images_per_prompt
        share = deal_padded(len(prompts))
        layout = list(torch.arange(len(share.mine) * K).split(settings.micro_batch))
        own = sample(
            self.model,
            [prompts[g] for g in share.mine],
            K,
            schedule,
            ("evaluate",),
            bar(layout, "evaluation", leave=False),
            share.mine,
        )
        reward = scores(self.reward, own, share)
        phi = scores(self.encoder, own, share, features=True)
        images, latents = (share.gather(v.unflatten(0, (-1, K))) for v in (own.images, own.latents))
        repeated = [p for p in prompts for _ in range(K)]
        return {
            "reward": reward.mean().item(),
            "perceptual_entropy": perceptual_entropy(phi, bandwidth, "mean").mean().item(),
            "feature_variance": metrics.feature_variance(phi).mean().item(),
            "pairwise_distance": metrics.mean_pairwise_distance(phi).mean().item(),
            "vendi_score": metrics.vendi_score(phi).mean().item(),
            "vae_variance": metrics.feature_variance(latents.flatten(2)).mean().item(),
            "pixel_variance": metrics.feature_variance(images.flatten(2)).mean().item(),
        } | {name: f(images.flatten(0, 1), repeated) for name, f in self.measures.items()}, images.flatten(0, 1)


def chosen(table: dict[str, Callable], encoder: str | Callable | None) -> Callable:
    """The encoder of that name, the first of the table by default, or one's own. Raises ValueError for an unknown name."""
    from ref.scoring.own import ENCODER, is_own, load_own

    if callable(encoder):
        return encoder
    if encoder and is_own(encoder):
        return load_own(encoder, ENCODER)
    if encoder is not None and encoder not in table:
        raise ValueError(
            f"unknown encoder {encoder!r}; {near(encoder, table)}write FILE.py:NAME for your own; this preset has {', '.join(table)}"
        )
    return table[encoder or next(iter(table))]


def letters(encoder: str | None = None, rule: bool = False) -> Task:
    """Twenty-six captions; the reward is a preference model or, with `rule`, that a letter is read and leans to the right."""
    from ref.worlds import letters

    heads, judge, model = letters.read_heads(letters.WEIGHTS), letters.Judge(), letters.load_model()
    model.add_lora(rank=16, alpha=32)
    reward = letters.Lean(judge) if rule else heads["preference"]
    phi = chosen(letters.spaces(heads), encoder)
    return Task(model, letters.PROMPTS, reward, phi, letters.measures(heads, judge), images_per_prompt=20)


def mixture(encoder: str | Callable | None = None) -> Task:
    """Six modes on a ring, from reward 0 to 1; features are directions, so they are bounded."""
    from ref.worlds.mixture import MixtureFlow, effective_modes, ring, tilted

    world = ring(6)
    directions = chosen({"direction": torch.nn.functional.normalize}, encoder)
    modes = lambda images, prompts: effective_modes(world.occupancy(images)).item()  # noqa: E731
    reward = tilted(world, torch.linspace(0, 1, 6))
    return Task(MixtureFlow(world), [""] * 32, reward, directions, {"effective_modes": modes})


def text_to_image(encoder: str | Callable | None, options: Pipeline, reward: Callable | None = None) -> Task:
    """A pipeline of models/load.py, reward and encoder by name or one's own (phi: PickScore), prompts from files.

    What reward and encoder have in common is loaded, and computed, once. Names, and what the reward demands of prompts,
    are checked before anything is.
    """
    from accelerate import PartialState

    from ref.models.load import load
    from ref.scoring.encoders import check_name, load_encoder
    from ref.scoring.load import check_prompts, load_reward
    from ref.scoring.reward import Reward

    training = read_prompts(options.prompts)
    if options.evaluation_prompts is None and options.prompts != "train":
        evaluation = training[:: -(-len(training) // MOST_EVALUATED)]
    else:
        evaluation = read_prompts(options.evaluation_prompts or "evaluation")
    if not callable(encoder):
        check_name(encoder or "pickscore")
    if reward:
        getattr(reward, "check_prompts", Reward.check_prompts)(training + evaluation)
    else:
        check_prompts(options.reward, training + evaluation)
    device = PartialState().device  # this process's GPU; "cpu:0" among several processes on the CPU
    device = torch.device("cpu") if device.type == "cpu" else device
    elsewhere = {"memory", "model", "reward", "prompts", "evaluation_prompts", "evaluation_steps"}
    adapter = options.model_dump(exclude=elsewhere) | {"lora_rank": options.lora_rank or None}
    loading = bar(total=3, what="loading", bar_format="{l_bar}{bar}| {n}/{total} [{elapsed}] {postfix}")
    loading.set_postfix_str(options.model)
    model = load(options.model, map(str, training + evaluation), device=device, **adapter)
    loading.update()
    loading.set_postfix_str("phi")
    phi = encoder if callable(encoder) else load_encoder(encoder or "pickscore", device)
    loading.update()
    loading.set_postfix_str("reward")
    reward = reward or load_reward(options.reward, device, encoders=[phi])
    loading.update()
    loading.close()
    return Task(
        model,
        training,
        reward,
        phi,
        evaluation=evaluation,
        evaluation_steps=options.evaluation_steps,
        images_per_prompt=4,
        source=model.encode.source.model,
    )


@dataclass(frozen=True)
class Preset:
    """build(encoder) makes the task, of the large ones build(encoder, options)."""

    build: Callable[..., Task]
    settings: Settings
    options: Pipeline | None = None  # of the large ones
    variants: dict[int, dict] = field(default_factory=dict)  # GPU's memory in GB: what it changes; the table above

    def task(
        self,
        encoder: str | Callable | None = None,
        options: Pipeline | None = None,
        reward: Callable | None = None,
    ) -> Task:
        """The task, with an encoder and a reward of one's own in the place of the preset's."""
        if self.options is None:
            task = self.build(encoder)
            return replace(task, reward=reward or task.reward)
        return self.build(encoder, options or self.options, reward)

    def within(self, memory: int | None, options: Pipeline | None, settings: Settings) -> tuple:
        """Options and settings as they are for a GPU of `memory` GB. Raises ValueError where there is no variant."""
        if memory is None:
            return options, settings
        if memory not in self.variants:
            fits = " or ".join(map(str, self.variants))
            raise ValueError(
                f"no variant for memory {memory}: it " + (f"fits into {fits} GB" if fits else "needs no GPU")
            )
        changes = dict(self.variants[memory])
        settings = replace(settings, micro_batch=changes.pop("micro_batch"))
        return options.model_copy(update=changes | {"memory": memory}), settings


CHECKPOINTED = dict(gradient_checkpointing=True)
FLOW_GRPO = Settings(
    iterations=1000, groups=48, group_size=24, updates=2, micro_batch=0, steps=10, noise_level=0.7, lr=3e-4, ema=0.9**2,
    ema_every=8, global_std=True,
)  # fmt: skip
FAST = dict(same_noise=True, trained=0.5)
DANCE_GRPO = Settings(
    iterations=300, groups=8, group_size=12, updates=1, micro_batch=0, steps=16, kind="dance_sde", noise_level=0.3,
    lr=3e-4, trained=0.6, same_noise=True,
)  # fmt: skip
LETTERS = Settings(iterations=80, groups=4, group_size=16, steps=8, window=3, lr=2e-3, clip=1e-2)
PRESETS = {
    "mixture": Preset(mixture, Settings(iterations=150, groups=32, group_size=16, updates=1, lr=1e-3, clip=0.2)),
    "letters": Preset(letters, LETTERS),
    "letters_rule": Preset(partial(letters, rule=True), LETTERS),
    "sd35_medium": Preset(
        text_to_image,
        FLOW_GRPO,
        Pipeline(model="sd35_medium", lora_rank=32, evaluation_steps=40, max_sequence_length=128),
        {24: CHECKPOINTED | dict(micro_batch=12), 48: dict(micro_batch=6), 80: dict(micro_batch=12)},
    ),
    "flux_dev": Preset(
        text_to_image,
        replace(FLOW_GRPO, steps=6, noise_level=0.9, ema=0.9**6),
        Pipeline(model="flux_dev", lora_rank=64, evaluation_steps=28, max_sequence_length=128),
        {48: CHECKPOINTED | dict(micro_batch=8), 80: dict(micro_batch=4)},
    ),
    "flux_dev_720": Preset(
        text_to_image,
        DANCE_GRPO,
        Pipeline(model="flux_dev", lora_rank=128, evaluation_steps=28, height=720, width=720, shift=3.0),
        {48: CHECKPOINTED | dict(micro_batch=4), 80: dict(micro_batch=2)},
    ),
}


def twin(name: str, guidance: dict | None = None, **settings) -> Preset:
    """The preset `name` with FAST and `settings`, and where it is large with the option `guidance`."""
    own = PRESETS[name]
    options = own.options and own.options.model_copy(update=guidance or {})
    return replace(own, settings=replace(own.settings, **FAST | settings), options=options)


PRESETS |= {
    "flux_dance": replace(
        PRESETS["flux_dev_720"],
        settings=replace(DANCE_GRPO, trained=9 / 16, trained_at_random=True),
        options=PRESETS["flux_dev_720"].options.model_copy(update=dict(lora_targets="attention")),
    ),
    "letters_fast": twin("letters", window=2, tail_steps=3),
    "sd35_medium_fast": twin("sd35_medium", dict(guidance_scale=1.0), window=3, tail_steps=4),
    "flux_dev_fast": twin("flux_dev", window=1, tail_steps=2),
}
LARGE = tuple(name for name, preset in PRESETS.items() if preset.options)


def architectures(sizes: Iterable[int] = ()) -> Iterator[tuple[str, str, int, int]]:
    """(preset, model, pixels, LoRA rank) of the large presets, for images of `sizes` or of their own size."""
    for name in LARGE:
        own = PRESETS[name].options
        for pixels in sizes or [own.height]:
            yield name, own.model, pixels, own.lora_rank
