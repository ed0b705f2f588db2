"""A flow as a stochastic policy: Gaussian steps, their log-densities, and whole trajectories.

    x_{i+1} = mu_i + s_i eps,    eps ~ N(0, I)
    log p(x_{i+1} | x_i) = -||x_{i+1} - mu_i||^2 / (2 s_i^2) - (d/2) log(2 pi s_i^2)

**Sum or mean.** Theory sums this over the d latent dimensions (`reduction="sum"`). Flow-GRPO and
every peer average over them (`"mean"`, the training default): the PPO ratio is then the joint ratio
to the power 1/d, which stays near 1 where d is 10^5 and the joint ratio would overflow.

Latents, means and log-densities are float32 at least, and no latent is rounded after its log-density
was taken, so recomputing a log-density with unchanged weights gives the same bits: the first update
of an iteration has ratio exactly 1.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from ref.schedule import FlowSchedule

REDUCTIONS = ("sum", "mean")


def reduce(values: Float[Tensor, " B *latent"], reduction: str) -> Float[Tensor, " B"]:
    """Sum or average over all but the first dimension. Raises ValueError otherwise."""
    if reduction not in REDUCTIONS:
        raise ValueError(f"reduction must be 'sum' or 'mean', got {reduction!r}")
    values = values.flatten(1)
    return values.sum(1) if reduction == "sum" else values.mean(1)


def gaussian_log_prob(
    x: Float[Tensor, " B *latent"],
    mean: Float[Tensor, " B *latent"],
    std: Float[Tensor, "..."] | float,
    reduction: str = "mean",
) -> Float[Tensor, " B"]:
    """log N(x; mean, std^2 I) in nats, std > 0, a number or one for each sample [B, 1, ...].

    reduction "sum" is the joint log-density, "mean" is that divided by the dimension d.
    """
    std = torch.as_tensor(std, dtype=torch.promote_types(mean.dtype, torch.float32))  # 0-d may stay on the CPU
    z = (x - mean) / std
    return reduce(-0.5 * (z.square() + math.log(2 * math.pi)) - std.log(), reduction)


def sde_step(
    schedule: FlowSchedule,
    x: Float[Tensor, " B *latent"],
    velocity: Float[Tensor, " B *latent"],
    i: int,
    generator: torch.Generator | None = None,
    eps: Float[Tensor, " B *latent"] | None = None,
) -> tuple[Float[Tensor, " B *latent"], Float[Tensor, " B *latent"]]:
    """One step of the policy: (x_{i+1}, mu_i). Deterministic steps return (mu_i, mu_i).

    The noise is `eps` where it is given, else drawn from `generator`.
    """
    mean = schedule.mean(x, velocity, i)
    if i not in schedule.steps:
        return mean, mean
    if eps is None:
        device = mean.device if generator is None else generator.device
        eps = torch.randn(mean.shape, dtype=mean.dtype, device=device, generator=generator).to(mean.device)
    return mean + schedule.std[i] * eps, mean


def multistep(
    schedule: FlowSchedule,
    x: Float[Tensor, " B *latent"],
    velocity: Float[Tensor, " B *latent"],
    i: int,
    before: Float[Tensor, " B *latent"] | None = None,
) -> tuple[Float[Tensor, " B *latent"], Float[Tensor, " B *latent"]]:
    """A step of DPM-Solver++(2M), arXiv 2211.01095, with alpha = 1 - sigma: (x_{i+1}, x_hat_i), error O(dt^3) a step.

    x_hat = x - sigma v is the image that the velocity predicts, `before` that of step i - 1. In lambda = log(alpha / sigma)
    the ODE's linear part is solved exactly, and x_hat extrapolated to the middle of the step; the first step
    (without `before`), one from pure noise and the last (where lambda is infinite) take x_hat as it is.
    """
    s_before, s, s_next = (float(schedule.sigmas[max(n, 0)]) for n in (i - 1, i, i + 1))
    image = at_middle = x - s * velocity
    if before is not None and s_before < 1 and s_next > 0:
        lam = lambda sigma: math.log((1 - sigma) / sigma)  # noqa: E731
        h, h_before = lam(s_next) - lam(s), lam(s) - lam(s_before)
        at_middle = image + h / (2 * h_before) * (image - before)
    return s_next / s * x + (1 - s_next - (1 - s) * s_next / s) * at_middle, image


@dataclass
class Trajectory:
    """What a rollout leaves behind. S is the number of stochastic steps, listed in `steps`.

    x         states from noise x[0] to image latents x[-1]
    mean      mu_i of the stochastic steps at sampling time
    log_prob  log p(x_{i+1} | x_i) at sampling time, reduced as asked
    """

    x: Float[Tensor, "states B *latent"]
    mean: Float[Tensor, "S B *latent"]
    log_prob: Float[Tensor, "S B"]
    steps: tuple[int, ...]


@torch.no_grad()
def rollout(
    velocity: Callable[[Tensor, Tensor], Tensor],
    schedule: FlowSchedule,
    noise: Float[Tensor, " B *latent"],
    generator: torch.Generator | None = None,
    reduction: str = "mean",
    eps: Float[Tensor, "N B *latent"] | None = None,
    steps: range | None = None,
) -> Trajectory:
    """Sample the policy from x_0 = noise to x_N. `velocity(x, sigma)` gets a 0-d sigma.

    The steps' noise is `eps` where it is given, else drawn from `generator`. `steps` walks a part of the way only,
    from `noise` = x_i of its first step i.
    """
    x, states, means, log_probs, image = noise, [noise], [], [], None
    for i in range(len(schedule)) if steps is None else steps:
        v = velocity(x, schedule.sigmas[i])
        if schedule.multistep and i > max(schedule.steps, default=-1):
            x, image = multistep(schedule, x, v, i, image)
        else:
            x, mean = sde_step(schedule, x, v, i, generator, None if eps is None else eps[i])
        states.append(x)
        if i in schedule.steps:
            means.append(mean)
            log_probs.append(gaussian_log_prob(x, mean, schedule.std[i], reduction))
    return Trajectory(
        torch.stack(states),
        torch.stack(means) if means else x.new_empty(0, *x.shape),
        torch.stack(log_probs) if log_probs else x.new_empty(0, len(x)),
        schedule.steps,
    )
