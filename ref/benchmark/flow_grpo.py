"""BASELINE, not for use: an iteration in Flow-GRPO's order of work, to be timed beside `grpo.train`'s.

Written from the description of its trainers (arXiv 2505.05470, and how its public code of November 2025 goes about it):

    the text encoders stay in memory and encode every batch's prompts again, each as often as its group has members
    a batch is rolled out, decoded and judged; its log-densities are kept, and serve the update as the old ones
    the update takes the same batches, one step at a time, with a backward pass of its own for each

With a `window` and guidance 1 this is its fast recipe without guidance. Nothing is shared, skipped or shortened, though its
code leaves out samples without advantage (and averages over the rest). It draws the same noise as
ours and must give the same numbers up to rounding: `against` reports the ratio of times together with the largest
differences, relative to the largest value of each quantity. One optimiser step an iteration, so that the gradient is there
to compare; Adam's first steps are signs, which no tolerance fits.
"""

import dataclasses
import time
from collections.abc import Callable

import torch
from torch import Tensor

from ref.grpo import State, advantages, calibrate_on, start, step_weights, train
from ref.methods import FlowGRPO, Group, Step
from ref.models.embeddings import PromptEmbeddings
from ref.policy import gaussian_log_prob, rollout
from ref.presets import Task
from ref.sampling import chunks, generator_for, pick_prompts, placed
from ref.scale.weights import assign, copied, trainable
from ref.settings import Settings


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

    batches, images, reward, features = [], [], [], []
    for rows in layout:
        asked = [prompts[b] for b in rows]
        condition = encode(asked)
        eps = noise[:, rows].to(next(iter(condition.values())).device)
        path = rollout(lambda x, sigma: model.velocity(x, sigma, condition), schedule, eps[0], eps=eps[1:])
        images.append(model.decode(path.x[-1]))
        reward.append(task.reward(images[-1], asked))
        features.append(task.encoder(images[-1]))
        batches.append((rows, condition, path))

    old = torch.cat([path.log_prob[: len(steps)].T for _, _, path in batches]).cpu()
    h, kernel = state.bandwidths(schedule)
    group = Group(
        torch.cat(reward).unflatten(0, (-1, K)).cpu(),
        torch.cat(features).unflatten(0, (-1, K)).cpu(),
        h,
        old.unflatten(0, (-1, K)),
        step_weights(schedule, settings.omega, steps),
        generator_for(settings.seed, state.iteration, "select"),
        kernel,
    )
    over = (0, 1) if settings.global_std else 1
    advantage = advantages(method.shape(group), settings.advantage_clip, settings.std_normalize, over)
    pair = method.select(group, advantage)

    state.optimizer.zero_grad(set_to_none=True)
    for rows, condition, path in batches:
        x, own, chosen = path.x, *(v.flatten(0, 1)[rows].T.to(path.x.device) for v in (advantage, pair))
        for s, i in enumerate(steps):
            mean = schedule.mean(x[i], model.velocity(x[i], schedule.sigmas[i], condition), i)
            log_prob = gaussian_log_prob(x[i + 1], mean, schedule.std[i])
            step = Step(log_prob, path.log_prob[s], own[s], chosen[s], mean, path.mean[s], None, schedule.std[i])
            (method.loss(step) * (len(rows) / old.numel())).backward()
    torch.nn.utils.clip_grad_norm_(trainable(model).values(), settings.grad_clip)
    state.optimizer.step()
    state.iteration += 1
    return {
        "latents": torch.cat([path.x[-1] for _, _, path in batches]),
        "images": torch.cat(images),
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


def timed(work: Callable[[], dict]) -> tuple[float, dict]:
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
