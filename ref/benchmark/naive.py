"""BASELINE, not for use: an iteration written the field's usual way, to be timed beside `grpo.train`'s.

Habits read from public trainers' code and the issues of their users, all of them at once, as no one of them need have:

    text encoders stay in memory and encode the prompt again for every sample
    rollouts, decoder, reward model and encoder take one sample at a time
    old log-densities are stored, and computed once more by a forward pass of their own before the update
    the update takes one sample and step at a time

It draws the same noise and must give the same numbers up to rounding: `against_naive` reports the speed-up
together with the largest differences, relative to the largest value of each quantity. One optimiser step an
iteration, so that the gradient is there to compare; Adam's first steps are signs, which no tolerance fits.
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
from ref.sampling import generator_for, pick_prompts
from ref.scale.weights import assign, copied, trainable
from ref.settings import Settings


def text_encoders(model) -> Callable[[str], dict[str, Tensor]]:
    """prompt -> conditioning [1, ...] by the pipeline's own text encoders, loaded to stay."""
    cache = model.encode
    if not isinstance(cache, PromptEmbeddings):
        return lambda prompt: cache([prompt])
    text = cache.source.whole(cache.dtype, transformer=None, vae=None).to(cache.device)
    names = ("prompt_embeds", "pooled_prompt_embeds")

    @torch.no_grad()
    def encode(prompt: str) -> dict[str, Tensor]:
        conditioning = dict(zip(names, cache.encode(text, prompt, cache.max_sequence_length)))
        if cache.negative:
            empty = cache.encode(text, "", cache.max_sequence_length)
            conditioning |= {f"negative_{name}": value for name, value in zip(names, empty)}
        return conditioning

    return encode


def naive_iteration(task: Task, encode: Callable, method: FlowGRPO, settings: Settings, state: State) -> dict:
    """One iteration with one optimiser step; returns what `ours` does."""
    model, K = task.model, settings.group_size
    schedule = model.schedule(settings.steps, kind=settings.kind, noise_level=settings.noise_level)
    if settings.window is not None:
        generator = generator_for(settings.seed, state.iteration, "window")
        first = int(torch.randint(settings.steps - settings.window, (), generator=generator))
        schedule = schedule.windowed(first, settings.window)
    steps = [i for i in schedule.steps if i < settings.trained * settings.steps]

    conditions, paths, images, reward, features = [], [], [], [], []
    for g, prompt in enumerate(pick_prompts(task.prompts, settings, state.iteration)):
        shape = (len(schedule) + 1, K, *model.latent_shape)
        noise = torch.randn(shape, generator=generator_for(settings.seed, state.iteration, g))
        for k in range(K):
            condition = encode(prompt)
            device = next(iter(condition.values())).device
            eps = noise[:, k : k + 1].to(device)
            start_noise = noise[0, :1].to(device) if settings.same_noise else eps[0]
            path = rollout(lambda x, sigma: model.velocity(x, sigma, condition), schedule, start_noise, eps=eps[1:])
            image = model.decode(path.x[-1])
            conditions.append(condition)
            paths.append(path)
            images.append(image)
            reward.append(task.reward(image, [prompt]))
            features.append(task.encoder(image))

    def log_prob(b: int, i: int) -> Tensor:
        x = paths[b].x
        mean = schedule.mean(x[i], model.velocity(x[i], schedule.sigmas[i], conditions[b]), i)
        return gaussian_log_prob(x[i + 1], mean, schedule.std[i])

    with torch.no_grad():
        old = torch.stack([torch.cat([log_prob(b, i) for i in steps]) for b in range(len(paths))])
    group = Group(
        torch.cat(reward).unflatten(0, (-1, K)).cpu(),
        torch.cat(features).unflatten(0, (-1, K)).cpu(),
        state.bandwidth,
        old.unflatten(0, (-1, K)).cpu(),
        step_weights(schedule, settings.omega, tuple(steps)),
        generator_for(settings.seed, state.iteration, "select"),
        state.kernel,
    )
    advantage = advantages(method.shape(group), settings.advantage_clip, settings.std_normalize)
    pair = method.select(group, advantage)

    state.optimizer.zero_grad(set_to_none=True)
    for b in range(len(paths)):
        g, k = divmod(b, K)
        for s, i in enumerate(steps):
            numbers = (v.view(1).to(old.device) for v in (old[b, s], advantage[g, k, s], pair[g, k, s]))
            step = Step(log_prob(b, i), *numbers, mean=None, old_mean=None, reference_mean=None, std=schedule.std[i])
            (method.loss(step) / old.numel()).backward()
    torch.nn.utils.clip_grad_norm_(trainable(model).values(), settings.grad_clip)
    state.optimizer.step()
    state.iteration += 1
    return {
        "latents": torch.cat([path.x[-1] for path in paths]),
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


def against_naive(task: Task, settings: Settings, method: FlowGRPO, repeats: int, encode: Callable) -> dict:
    """{"speedup": naive seconds / ours, round by round in alternation; "difference": of the first, by quantity}.

    encode: what `text_encoders` gives for the task's model.
    """
    settings = dataclasses.replace(settings, updates=1, iterations=10**9)
    state = start(task.model, settings)
    calibrate_on(state, task.prompts, task.encoder, settings)
    loop = train(task.model, task.prompts, task.reward, task.encoder, method, settings, state)

    def timed(iteration: Callable[[], dict]) -> tuple[float, dict]:
        began = time.perf_counter()
        values = iteration()
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        return time.perf_counter() - began, values

    speedup = []
    for n in range(repeats + 1):  # the first warms up
        weights = copied(trainable(task.model))
        ours, a = timed(lambda: our_iteration(loop, settings))
        if n == 0:  # the same iteration again, from the same weights
            assign(trainable(task.model), weights)
            state.iteration -= 1
        naive, b = timed(lambda: naive_iteration(task, encode, method, settings, state))
        if n == 0:
            difference = {
                name: ((a[name].cpu() - b[name].cpu()).abs().max() / b[name].abs().max()).item() for name in a
            }
        else:
            speedup.append(naive / ours)
    return {"speedup": speedup, "difference": difference}
