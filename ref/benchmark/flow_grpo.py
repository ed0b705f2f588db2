"""BASELINE, not for use: an iteration in Flow-GRPO's order of work, to be timed beside `grpo.train`'s.

Written from the description of its trainers (arXiv 2505.05470, and how its public code of November 2025 goes about it):

    the text encoders stay in memory and encode every batch's prompts again, each as often as its group has members
    a batch is rolled out and decoded; its log-densities are kept, and serve the update as the old ones
    its rewards are asked for in a thread, while the next batches are drawn, and joined before the update
    SD3's trainers (not FLUX's) leave out the samples whose advantage is 0, and average over the rest, in as many batches
    the update goes through the batches one step at a time, with a backward pass of its own for each

`FAST` is its recipe of fewer passes, of October 2025 (pickscore_sd3_fast_nocfg, pickscore_flux_fast): 3 consecutive steps of
the first half are random and trained, on SD3 without guidance. The Fast of July 2025 is another, which is not timed here: one
sample of a prompt walks to a random step, from which its group branches, and 2 steps are trained.

What differs from its code: the noise and the prompts are ours, so that the numbers must be, up to rounding, where no sample
is left out: `against` reports the ratio of times together with the largest differences, relative to the largest value of
each quantity. One optimiser step an iteration (theirs: two), so that the gradient is there to compare; Adam's first steps
are signs, which no tolerance fits. A batch holds members of one group after the other (theirs is shuffled) and all batches
have one window (theirs: each its own). Flow-SDE in place of its fast recipe's Flow-CPS. Without the KL of its SD3 recipes,
which adds a pass without gradient to each trained one. Rewards have one thread, not eight, and phi is computed there too.
"""

import dataclasses
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import torch
from torch import Tensor

from ref.grpo import State, advantages, calibrate_on, start, step_weights, train
from ref.methods import FlowGRPO, Group, Step
from ref.models.embeddings import PromptEmbeddings
from ref.models.sd3 import SD3
from ref.policy import gaussian_log_prob, rollout
from ref.presets import Task
from ref.sampling import chunks, generator_for, pick_prompts, placed
from ref.scale.weights import assign, copied, trainable
from ref.settings import Settings

T = TypeVar("T")

FAST = dict(window=3, trained=0.5)  # Flow-GRPO-Fast's steps


def text_encoders(model) -> Callable[[list[str]], dict[str, Tensor]]:
    """prompts -> conditioning [B, ...] by the pipeline's own text encoders, loaded to stay."""
    cache = model.encode
    if not isinstance(cache, PromptEmbeddings):
        return cache
    import diffusers

    pipeline = getattr(diffusers, cache.source.pipeline)
    text = pipeline.from_pretrained(cache.source.model, transformer=None, vae=None, dtype=cache.dtype).to(cache.device)
    names = ("prompt_embeds", "pooled_prompt_embeds")
    with torch.no_grad():
        empty = cache.encode(text, "", cache.max_sequence_length) if cache.negative else ()

    @torch.no_grad()
    def encode(prompts: list[str]) -> dict[str, Tensor]:
        conditioning = dict(zip(names, cache.encode(text, prompts, cache.max_sequence_length)))
        return conditioning | {
            f"negative_{name}": e.expand(len(prompts), *e.shape[1:]) for name, e in zip(names, empty)
        }

    return encode


def iteration(task: Task, encode: Callable, method: FlowGRPO, settings: Settings, state: State) -> dict:
    """One iteration with one optimiser step; returns what `ours` does."""
    model, K = task.model, settings.group_size
    full = model.schedule(settings.steps, kind=settings.kind, noise_level=settings.noise_level)
    schedule = placed(full, settings, state.iteration)
    steps = schedule.steps[: settings.trainable_steps]
    picked = pick_prompts(task.prompts, settings, state.iteration)
    prompts = [prompt for prompt in picked for _ in range(K)]
    shape = (len(schedule) + 1, K, *model.latent_shape)
    draws = [torch.randn(shape, generator=generator_for(settings.seed, state.iteration, g)) for g in range(len(picked))]
    if settings.same_noise:
        draws = [torch.cat([draw[:1, :1].expand_as(draw[:1]), draw[1:]]) for draw in draws]
    noise, [layout] = torch.cat(draws, 1), chunks(len(picked), K, 1, settings.micro_batch)

    def judged(images: Tensor, asked: list[str]) -> tuple[Tensor, Tensor, Tensor]:
        with torch.no_grad():
            return images, task.reward(images, asked), task.encoder(images)

    conditions, paths = [], []
    with ThreadPoolExecutor(1) as pool:
        waiting = []
        for rows in layout:
            asked = [prompts[b] for b in rows]
            condition = encode(asked)
            eps = noise[:, rows].to(next(iter(condition.values())).device)
            path = rollout(lambda x, sigma: model.velocity(x, sigma, condition), schedule, eps[0], eps=eps[1:])
            waiting.append(pool.submit(judged, model.decode(path.x[-1]), asked))
            conditions.append(condition)
            paths.append(path)
        images, reward, features = (torch.cat(values) for values in zip(*(each.result() for each in waiting)))
    condition = {name: torch.cat([c[name] for c in conditions]) for name in conditions[0]}
    x, old_mean, log_prob = (torch.cat(v, 1) for v in zip(*((p.x, p.mean, p.log_prob) for p in paths)))
    log_prob = log_prob[: len(steps)]

    h, kernel = state.bandwidths(schedule)
    group = Group(
        reward.unflatten(0, (-1, K)).cpu(),
        features.unflatten(0, (-1, K)).cpu(),
        h,
        log_prob.T.unflatten(0, (-1, K)).cpu(),
        step_weights(schedule, settings.omega, steps),
        generator_for(settings.seed, state.iteration, "select"),
        kernel,
    )
    over = (0, 1) if settings.global_std else 1
    advantage = advantages(method.shape(group), settings.advantage_clip, settings.std_normalize, over)
    pair = method.select(group, advantage)

    own, chosen = (v.flatten(0, 1).to(x.device) for v in (advantage, pair))
    kept = torch.arange(len(own))
    if isinstance(model, SD3) and own.any():
        kept = own.any(1).nonzero()[:, 0].cpu()
    state.optimizer.zero_grad(set_to_none=True)
    for rows in kept.tensor_split(len(layout)) if len(kept) < len(own) else layout:
        part = {name: value[rows] for name, value in condition.items()}
        for s, i in enumerate(steps):
            mean = schedule.mean(x[i, rows], model.velocity(x[i, rows], schedule.sigmas[i], part), i)
            step = Step(
                gaussian_log_prob(x[i + 1, rows], mean, schedule.std[i]), log_prob[s, rows], own[rows, s], chosen[rows, s],
                mean, old_mean[s, rows], None, schedule.std[i],
            )  # fmt: skip
            (method.loss(step) * (len(rows) / (len(kept) * len(steps)))).backward()
    torch.nn.utils.clip_grad_norm_(trainable(model).values(), settings.grad_clip)
    state.optimizer.step()
    state.iteration += 1
    return {
        "latents": x[-1],
        "images": images,
        "log_prob": group.policy_log_prob,
        "reward": group.reward,
        "features": group.features,
        "advantages": advantage,
        "gradient": gradient(model),
    }


def gradient(model) -> Tensor:
    return torch.cat([weight.grad.flatten() for weight in trainable(model).values() if weight.grad is not None])


def our_iteration(loop, settings: Settings) -> dict:
    """One iteration of `grpo.train`'s generator."""
    state = next(loop)
    samples = state.samples
    return {
        "latents": samples.latents,
        "images": samples.images,
        "log_prob": samples.trajectory.log_prob.T.unflatten(0, (-1, settings.group_size)),
        "reward": state.reward,
        "features": state.features,
        "advantages": state.advantages,
        "gradient": gradient(state.model),
    }


def timed(work: Callable[[], T]) -> tuple[float, T]:
    """Seconds that it takes, and what it returns.

    Without a GPU they are seconds of computing: with one thread those of the clock, had the machine nothing else to do.
    """
    clock = time.perf_counter if torch.cuda.is_available() else time.process_time
    began = clock()
    values = work()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return clock() - began, values


def differences(ours: dict, theirs: dict) -> dict[str, float]:
    """The largest difference of each quantity, relative to its largest value."""
    return {
        name: ((ours[name].cpu() - theirs[name].cpu()).abs().max() / theirs[name].abs().max()).item()
        for name in ours
        if ours[name].shape == theirs[name].shape
    }


def against(task: Task, settings: Settings, method: FlowGRPO, repeats: int, encode: Callable) -> dict:
    """{"ratio": the baseline's seconds / ours, round by round in alternation; "difference": of the first, by quantity}.

    encode: what `text_encoders` gives for the task's model. Settings that save passes are switched off in both.
    """
    alike = dict(updates=1, iterations=10**9, ema=0, tail_steps=None, best_and_worst=None, trained_at_random=False)
    settings = dataclasses.replace(settings, **alike)
    state = start(task.model, settings)
    calibrate_on(state, task.prompts, task.encoder, settings)
    loop, ratio = train(task.model, task.prompts, task.reward, task.encoder, method, settings, state), []
    for n in range(repeats + 1):  # the first warms up
        weights = copied(trainable(task.model))
        ours, a = timed(lambda: our_iteration(loop, settings))
        if n == 0:  # the same iteration again, from the same weights
            assign(trainable(task.model), weights)
            state.iteration -= 1
        theirs, b = timed(lambda: iteration(task, encode, method, settings, state))
        if n == 0:
            difference = differences(a, b)
        else:
            ratio.append(theirs / ours)
    return {"ratio": ratio, "difference": difference}
