"""Group-relative policy optimisation of a flow policy: one generator that yields its state.

One iteration, for G prompts with K samples each (B = G K, sample b = g K + k) and S trained steps:

    sample      x_0 .. x_N, images, reward R [G, K], features phi [G, K, D]
    shape       R~ [G, K, S] = method.shape(...)            where PEC and PCVAE act
    advantage   A = (R~ - mean_k R~) / (std_k R~ + 1e-4), clipped to [-5, 5]
    update      for each of `updates` parts of the groups, one optimiser step on
                mean over samples and steps of method.loss(ratio, A),
                ratio = exp(log p_theta(x_{i+1} | x_i) - log p_old(x_{i+1} | x_i))

Rollout and update cut the batch in the same places (sampling.py): the same kernels run on the same
shapes, and the first update of an iteration has ratio exactly 1 (`metrics["ratio_error"]` watches it). What a rollout leaves is kept in the CPU's memory, so
a GPU's need depends on the micro-batch alone, not on how many samples an iteration has.

Departures from Flow-GRPO's code: one deterministic last step; a zero-spread group gets advantage
exactly 0; the group's noise is drawn per group.
"""

import math
import warnings
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor

import torch
from jaxtyping import Float
from torch import Tensor

from ref import metrics
from ref.constraint import estimate, hold, out_of_reach
from ref.entropy import policy_entropy
from ref.methods import GARDO, FlowGRPO, Group, Step
from ref.perceptual import perceptual_entropy
from ref.policy import gaussian_log_prob
from ref.sampling import Samples, ask, chunks, draw, generator_for, pick_prompts, placed, scores, trained_only
from ref.scale.processes import Share, deal, over_processes, processes, sum_gradients
from ref.scale.stopwatch import Stopwatch
from ref.scale.weights import in_parts, trainable, whole
from ref.schedule import FlowSchedule
from ref.settings import Settings
from ref.state import State, calibrate_on, start


def advantages(
    reward: Float[Tensor, "G K S"], clip: float = 5.0, std_normalize: bool = True, over: int | tuple[int, int] = 1
) -> Float[Tensor, "G K S"]:
    """Group-relative advantages of shaped rewards [G, K, S]: centred over K; 0 where a group has no spread.

    over: the dimensions of the sample standard deviation that divides them: 1, the group's; (0, 1), that of all rewards.
    """
    centred = reward - reward.mean(1, keepdim=True)
    if std_normalize:
        centred = centred / (reward.std(over, keepdim=True) + 1e-4)
    flat = reward.amax(1, keepdim=True) == reward.amin(1, keepdim=True)
    return centred.masked_fill(flat, 0).clamp(-clip, clip)


def extremes(advantage: Float[Tensor, "G K S"], m: int) -> Float[Tensor, "G K S"]:
    """The m // 2 worst of each group and its best, m in all, by their mean over steps; the others' advantages are 0.

    DanceGRPO's best-of-n. Biased: the middle's pull is left out. On letters, K = 24, three batches of ten
    groups: the base model's gradient keeps 0.95 of its length for m = 12 and 0.88 for m = 8, and has cosines of 0.95 to
    0.96 and of 0.87 to 0.91 to that of all members (two batches' have 0.00 to 0.08).
    """
    middle = advantage.mean(-1).argsort(1)[:, m // 2 : advantage.shape[1] - m + m // 2]
    return advantage.scatter(1, middle[..., None].expand(-1, -1, advantage.shape[2]), 0.0)


def judge(terms: list[tuple[float, Callable]], images: Float[Tensor, "B ..."], prompts: list[str]) -> Tensor:
    """What each reward of (weight, reward) says of the images, [rewards, B], on the CPU; as `sampling.ask`."""
    return torch.stack([ask(reward, images, prompts).cpu() for _, reward in terms])


def decoupled(terms: list[tuple[float, Callable]], said: list[Float[Tensor, "G K"]]) -> Float[Tensor, "G K"]:
    """The weighted sum of each reward's own z-scores in its group. GDPO, arXiv 2601.05242, then divides over the batch,
    as `global_std` does; without it the sum is divided by its group's deviation.

    A reward of small spread so counts as much as its weight says.
    """
    return sum(weight * advantages(values[..., None], math.inf)[..., 0] for (weight, _), values in zip(terms, said))


def step_weights(schedule: FlowSchedule, omega: str, steps: tuple[int, ...] | None = None) -> Float[Tensor, " S"]:
    """omega_t of the trained steps (default: all stochastic ones), [S], mean 1."""
    variance = schedule.std[list(steps or schedule.steps)].square()
    return variance / variance.mean() if omega == "variance" else torch.ones_like(variance)


def learning_rate(settings: Settings, iteration: int) -> float:
    """The optimiser's learning rate in the given iteration, counted from 0."""
    falls = settings.lr_schedule == "cosine"
    return settings.lr * (0.5 + 0.5 * math.cos(math.pi * iteration / settings.iterations) if falls else 1)


def train(
    model,
    prompts: list[str],
    reward: Callable[[Tensor, list[str]], Tensor],
    encoder: Callable[[Tensor], Tensor],
    method: FlowGRPO,
    settings: Settings,
    state: State | None = None,
) -> Iterator[State]:
    """Fine-tune `model` (the names of models/adapter.py) and yield the state after every iteration.

    reward(images, prompts) -> [B] and encoder(images) -> [B, D] must not depend on the batch they are
    called with. Raises ValueError in one line where either returns something else (`sampling.ask`).
    """
    if settings.group_size == 2 and (method.space in ("perceptual", "kernel") or isinstance(method, GARDO)):
        warnings.warn("the two members of a group lie equally far from their mean and from each other: with group_size 2 an "
                      "entropy of features, or a nearest neighbour, does nothing (proofs/P09); take 3 or more", stacklevel=2)  # fmt: skip
    if settings.best_and_worst and not skips(method, trainable(model)):
        warnings.warn(f"best_and_worst saves no pass here: the loss of {type(method).__name__} has a term for every sample, or the "
                      "weights are held in parts; leave it out", stacklevel=2)  # fmt: skip
    if settings.same_noise and settings.window and (settings.target_diversity or settings.stop_below_diversity):
        warnings.warn("with same_noise and a window diversity is that of samples from one start, as a share of the base model's; "
                      "independent samples keep less: ask for more, or leave same_noise out", stacklevel=2)  # fmt: skip
    if settings.target_diversity is not None:
        refuse_target(method)
    if settings.per_reward and not hasattr(reward, "weights"):
        raise ValueError("per_reward needs a sum of rewards, as in pickscore:0.7+ocr:0.3")
    if settings.ema and settings.ema_every > settings.iterations * settings.updates:
        warnings.warn(f"this run has {settings.iterations * settings.updates} optimiser steps and ema_every is {settings.ema_every}: the averages, which are "
                      "saved, stay the base model's weights; give --ema 0 or --ema-every 1", stacklevel=2)  # fmt: skip
    terms = list(zip(reward.weights, reward.rewards)) if settings.per_reward else [(1.0, reward)]
    state = state or start(model, settings)
    full = model.schedule(settings.steps, kind=settings.kind, noise_level=settings.noise_level)
    *others, last = full.leverage[: None if settings.trained_at_random else settings.trainable_steps].tolist()
    if others and last > 5 * max(others):
        warnings.warn(f"the last trained step's gradient is {last / max(others):.0f} times as large as the next: on this "
                      f"grid {settings.kind} makes it nearly deterministic; leave it out, with --trained 0.5", stacklevel=2)  # fmt: skip
    share = deal(settings.groups, settings.updates)
    layout = chunks(len(share.mine), settings.group_size, settings.updates, settings.micro_batch)

    if state.bandwidth is None:
        calibrate_on(state, prompts, encoder, settings)

    target, unmet = settings.target_diversity, ""
    while state.iteration < settings.iterations and not collapsed(state, settings):
        lap, schedule = Stopwatch(next(model.parameters()).device), placed(full, settings, state.iteration)
        picked = pick_prompts(prompts, settings, state.iteration)
        with ThreadPoolExecutor(1) as pool:  # a reward that waits for a server does so while the next samples are drawn
            early = []
            look = lambda images, prompts: early.append(pool.submit(judge, terms, images, prompts))  # noqa: E731
            samples = draw(model, picked, schedule, settings, share, (settings.seed, state.iteration), layout, lap=lap,
                           look=look if getattr(reward, "waits", False) else None)  # fmt: skip
            said = [each.result() for each in early] or [judge(terms, samples.images, samples.prompts)]
        said = [share.gather(values.unflatten(0, (len(share.mine), -1))) for values in torch.cat(said, 1)]
        state.reward = sum(weight * values for (weight, _), values in zip(terms, said))
        lap("reward")
        state.features = scores(encoder, samples, share, features=True)
        lap("features")
        h, kernel = state.bandwidths(schedule)

        log_prob = samples.trajectory.log_prob.T.unflatten(0, (len(share.mine), -1))
        group = Group(
            decoupled(terms, said) if settings.per_reward else state.reward,
            state.features,
            h,
            share.gather(log_prob),
            step_weights(schedule, settings.omega, samples.trajectory.steps).to(state.reward),
            generator_for(settings.seed, state.iteration, "select"),
            kernel,
        )
        if target is not None:
            if not state.unit:  # the first iteration samples the base model; later ones count where that pays all alike
                state.unit = method.unit(group.reward.std(1).mean().item(), settings.std_normalize)
                state.weight = estimate(target, state.unit, settings.group_size)
            state.weight, method.weight = hold(state.weight, diversity(group), state.kept, target, state.unit)
            if not unmet and (unmet := out_of_reach(state.weight, state.kept, target, state.unit, settings.group_size)):
                warnings.warn(unmet, stacklevel=2)
        shaped, over = method.shape(group), (0, 1) if settings.global_std else 1
        state.advantages = advantages(shaped, settings.advantage_clip, settings.std_normalize, over)
        if settings.best_and_worst:
            state.advantages = extremes(state.advantages, settings.best_and_worst)
        pairs = method.select(group, state.advantages)
        for parameters in state.optimizer.param_groups:
            parameters["lr"] = learning_rate(settings, state.iteration)
        mine = [values[share.mine].flatten(0, 1) for values in (state.advantages, pairs)]
        logs = []
        for n, part in enumerate(layout, state.iteration * settings.updates + 1):
            logs.append(update(model, method, schedule, samples, *mine, part, state, settings))
            if settings.ema and n % settings.ema_every == 0:
                state.average(settings.ema)
        lap("update")
        state.iteration += 1
        state.samples = samples
        state.metrics = measure(state, group, full, share) | {
            "weight": method.weight,
            "ratio_error": logs[0]["ratio_error"],
            "clip_fraction": sum(log["clip_fraction"] for log in logs) / len(logs),
            "grad_norm": sum(log["grad_norm"] for log in logs) / len(logs),
            **lap.metrics(),
        }
        state.kept += (state.metrics["diversity"] - state.kept) / 5
        yield state


def refuse_target(method: FlowGRPO) -> None:
    """Raise ValueError where a method's weight cannot hold a target diversity."""
    if not method.holds or method.space == "latent":
        raise ValueError(f"{type(method).__name__} cannot hold a target diversity; take pec, pcvae or entropy_reg in perceptual or kernel space")  # fmt: skip


def collapsed(state: State, settings: Settings) -> bool:
    """Whether the groups keep less than `stop_below_diversity`; on average, so that one poor group ends nothing."""
    return state.kept < (settings.stop_below_diversity or 0)


def skips(method: FlowGRPO, weights: dict[str, Tensor]) -> bool:
    """Whether samples without advantage are left out; not with weights in parts: all processes make equally many passes."""
    return method.skips and not any(map(in_parts, weights.values()))


def update(
    model,
    method: FlowGRPO,
    schedule: FlowSchedule,
    samples: Samples,
    advantage: Float[Tensor, "B S"],
    pair: Float[Tensor, "B S"],
    part: list[Tensor],
    state: State,
    settings: Settings,
) -> dict[str, float]:
    """One optimiser step on the samples listed in `part`; advantage and pair are [B, S].

    Samples whose advantages are all exactly 0 are left out where the loss allows it; the mean is still over all of them.
    Returned are ratio_error, the largest |ratio - 1| of the samples passed through, and clip_fraction, how many of their
    pairs are beyond the clip, as a share of all pairs: of those left out neither knows.
    """
    trajectory, weights = samples.trajectory, trainable(model)
    total = sum(map(len, part)) * len(trajectory.steps) * processes()
    if skips(method, weights):
        part = trained_only(part, advantage.any(1))
    state.optimizer.zero_grad(set_to_none=True)
    device = next(iter(samples.conditioning.values())).device
    ratio_error, clipped = torch.zeros((), device=device), torch.zeros((), device=device)
    for rows in part:
        conditioning = {key: value[rows // settings.group_size] for key, value in samples.conditioning.items()}
        # all of it at once, so that no step waits for the GPU
        x, old_mean, old_log_prob = (
            v[:, rows].to(device) for v in (trajectory.x, trajectory.mean, trajectory.log_prob)
        )
        own_advantage, own_pair = (v[rows].T.contiguous().to(device) for v in (advantage, pair))
        for s, i in enumerate(trajectory.steps):
            sigma, std = schedule.sigmas[i], schedule.std[i]
            mean = schedule.mean(x[i], model.velocity(x[i], sigma, conditioning), i)
            reference_mean = None
            if method.needs_reference:
                with model.reference(), torch.no_grad():
                    reference_mean = schedule.mean(x[i], model.velocity(x[i], sigma, conditioning), i)
            step = Step(
                log_prob=gaussian_log_prob(x[i + 1], mean, std),
                old_log_prob=old_log_prob[s],
                advantage=own_advantage[s],
                pair=own_pair[s],
                mean=mean,
                old_mean=old_mean[s],
                reference_mean=reference_mean,
                std=std,
                guard=float(schedule.dt[i]) if settings.guard else None,
            )
            (method.loss(step) * (len(rows) / total)).backward()
            with torch.no_grad():
                ratio_error = torch.maximum(ratio_error, (step.ratio - 1).abs().max())
                clipped = clipped + ((step.ratio < method.low) | (step.ratio > method.high)).sum()
    for weight in weights.values():
        if weight.grad is None:  # nothing was trained here; other processes may have, and AdamW's momentum goes on
            weight.grad = torch.zeros_like(weight)
    sum_gradients(weights.values())
    norm = whole(torch.nn.utils.clip_grad_norm_(weights.values(), settings.grad_clip))
    if not norm.isfinite():
        raise ValueError("the gradient is NaN or infinite; lower lr or noise_level, or raise the precision")
    state.optimizer.step()
    return {
        "ratio_error": over_processes(ratio_error, largest=True),
        "clip_fraction": over_processes(clipped) / total,
        "grad_norm": norm.item(),
    }


def diversity(group: Group) -> float:
    """The groups' feature variance as a share of the base model's, by which the bandwidth was calibrated."""
    K, D = group.features.shape[1:]
    return metrics.feature_variance(group.features).mean().item() / (D * group.bandwidth**2 * K / (K - 1))


@torch.no_grad()
def measure(state: State, group: Group, full: FlowSchedule, share: Share) -> dict[str, float]:
    """The numbers of an iteration, of all processes' samples. Entropies are per dimension, in nats.

    policy_entropy is the closed form of P01 over the full schedule; policy_entropy_mc adds to it by how
    much -mean log p_theta of this iteration's steps misses their own closed forms. p_max and p_min are figure 2's advantage
    probabilities, read as the softmax of a group's raw rewards (temperature 1): that of normalised
    advantages cannot converge (proofs/P07).
    """
    samples, probability = state.samples, state.reward.softmax(1)
    entropy = policy_entropy(full, samples.latents[0].numel(), "mean")
    expected, steps = entropy[list(full.steps)].mean().item(), list(samples.trajectory.steps)
    missed = -group.policy_log_prob.mean().item() - entropy[steps].mean().item()

    def variance(values: Tensor) -> float:
        groups = values.flatten(1).unflatten(0, (len(share.mine), -1))
        return share.gather(metrics.feature_variance(groups)).mean().item()

    return {
        "iteration": state.iteration,
        "reward": state.reward.mean().item(),
        "reward_std": state.reward.std(1).mean().item(),
        "policy_entropy": expected,
        "policy_entropy_mc": expected + missed,
        "perceptual_entropy": perceptual_entropy(state.features, state.bandwidth, "mean").mean().item(),
        "feature_variance": metrics.feature_variance(state.features).mean().item(),
        "diversity": diversity(group),
        "pairwise_distance": metrics.mean_pairwise_distance(state.features).mean().item(),
        "vae_variance": variance(samples.latents),
        "pixel_variance": variance(samples.images),
        "p_max": probability.amax(1).mean().item(),
        "p_min": probability.amin(1).mean().item(),
    }
