"""Group-relative policy optimisation of a flow policy: one generator that yields its state.

One iteration, for G prompts with K samples each (B = G K, sample b = g K + k) and S trained steps:

    sample      x_0 .. x_N, images, reward R [G, K], features phi [G, K, D]
    shape       R~ [G, K, S] = method.shape(...)            where PEC and PCVAE act
    advantage   A = (R~ - mean_k R~) / (std_k R~ + 1e-4), clipped to [-5, 5]
    update      for each of `updates` parts of the groups, one optimiser step on
                mean over samples and steps of method.loss(ratio, A),
                ratio = exp(log p_theta(x_{i+1} | x_i) - log p_old(x_{i+1} | x_i))

Randomness is a function of (seed, iteration, prompt group) alone, so there is no generator state to
save, no member of a group can get another's noise, and how samples are cut into micro-batches or
spread over processes (layout.py) does not change them. Rollout and update cut the batch in the
same places: the same kernels run on the same shapes, and the first update of an iteration has ratio
exactly 1 (`metrics["ratio_error"]` watches it). What a rollout leaves is kept in the CPU's memory, so
a GPU's need depends on the micro-batch alone, not on how many samples an iteration has.

Departures from Flow-GRPO's code: one deterministic last step; a zero-spread group gets advantage
exactly 0; the group's noise is drawn per group.
"""

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import Tensor

from ref import metrics
from ref.entropy import policy_entropy
from ref.layout import Share, chunks, deal, generator_for, over_processes, pick_prompts, processes, sum_gradients
from ref.methods import FlowGRPO, Group, Step
from ref.perceptual import calibrate, perceptual_entropy
from ref.policy import Trajectory, gaussian_log_prob, rollout
from ref.schedule import KINDS, FlowSchedule
from ref.sharding import like, whole
from ref.stopwatch import Stopwatch


@dataclass
class Settings:
    """Everything that decides a run besides model, reward, encoder and method."""

    iterations: int = 100  # optimisation rounds
    groups: int = 10  # G, prompts an iteration
    group_size: int = 16  # K, samples a prompt
    updates: int = 2  # optimiser steps an iteration; each sees groups / updates whole groups
    micro_batch: int = 1024  # samples in one forward pass; gradients accumulate. 0: the largest that fits, see fit.py
    steps: int = 10  # N, denoising steps
    kind: str = "flow_sde"  # kernel, see schedule.py
    noise_level: float = 0.7  # eta of the kernel
    window: int | None = None  # train only this many consecutive steps, placed anew each iteration
    trained: float = 1.0  # train this share of the steps, from the noise on (DanceGRPO 0.6); all are stochastic
    same_noise: bool = False  # the members of a group start from the same x_0 (DanceGRPO)
    lr: float = 3e-4  # AdamW's learning rate
    lr_schedule: str = "constant"  # constant, or cosine: falling to 0 at the last iteration
    clip: float = 1e-4  # PPO's eps, on log-densities averaged over the latent dimension
    advantage_clip: float = 5.0  # advantages are clipped to +- this
    std_normalize: bool = True  # divide advantages by the group's standard deviation
    grad_clip: float = 1.0  # largest gradient norm
    ema: float = 0.0  # decay, once an optimiser step, of the averaged weights that are evaluated and saved; 0 is off
    omega: str = "uniform"  # weights over steps of PEC and PCVAE: uniform, or variance (proportional to s_i^2)
    seed: int = 0

    def __post_init__(self):
        low = dict(iterations=0, groups=1, group_size=2, updates=1, micro_batch=0, steps=2, noise_level=0.0, lr=0.0)
        for name, least in low.items():
            if not least <= getattr(self, name) < float("inf"):
                remedy = "; one sample has no group to be compared with" if name == "group_size" else ""
                raise ValueError(f"{name} must be at least {least}, got {getattr(self, name)}{remedy}")
        if self.updates > self.groups:
            raise ValueError(f"updates ({self.updates}) cannot exceed groups ({self.groups}): each takes whole groups")
        if self.window is not None and not 1 <= self.window <= self.steps - 1:
            raise ValueError(
                f"window must lie in 1..{self.steps - 1} (the last step is deterministic), got {self.window}"
            )
        if not (0 < self.trained <= 1 and 0 <= self.ema < 1):
            raise ValueError(f"trained must lie in (0, 1] and ema in [0, 1), got {self.trained} and {self.ema}")
        if self.trained < 1 and self.window is not None:
            raise ValueError("window and trained both choose the steps to train; give one of them")
        choices = dict(kind=KINDS, omega=("uniform", "variance"), lr_schedule=("constant", "cosine"))
        for name, allowed in choices.items():
            if getattr(self, name) not in allowed:
                raise ValueError(f"{name} must be {' or '.join(allowed)}, got {getattr(self, name)!r}")


@dataclass
class Samples:
    """Whole groups of finished samples, this process's. B = G K, group-major."""

    prompts: list[str]  # [B]
    conditioning: dict[str, Tensor]  # [G, ...]
    trajectory: Trajectory
    images: Tensor  # [B, C, H, W]

    @property
    def latents(self) -> Tensor:
        return self.trajectory.x[-1]


@dataclass
class State:
    """What `train` yields. The first block is saved in checkpoints, the second is for looking at.

    Every process has the same state, but for `samples`, which are its own.
    """

    model: object
    optimizer: torch.optim.Optimizer
    iteration: int = 0
    bandwidth: float | None = None
    ema: dict[str, Tensor] | None = None  # averaged weights, by name

    metrics: dict[str, float] = field(default_factory=dict)
    samples: Samples | None = None
    reward: Tensor | None = None  # [G, K]
    features: Tensor | None = None  # [G, K, D]
    advantages: Tensor | None = None  # [G, K, S]

    def state_dict(self) -> dict:
        return {
            "iteration": self.iteration,
            "bandwidth": self.bandwidth,
            "weights": trainable(self.model),
            "optimizer": self.optimizer.state_dict(),
            "ema": self.ema,
        }

    def load_state_dict(self, saved: dict) -> None:
        self.iteration, self.bandwidth = saved["iteration"], saved["bandwidth"]
        assign(trainable(self.model), saved["weights"])
        if self.ema is not None:
            assign(self.ema, saved["ema"])
        moments = {
            n: {key: like(value, weight) for key, value in saved["optimizer"]["state"][n].items()}
            for n, weight in enumerate(trainable(self.model).values())
            if n in saved["optimizer"]["state"]
        }
        self.optimizer.load_state_dict(saved["optimizer"] | {"state": moments})

    @contextmanager
    def averaged(self):
        """Within this context the model has its averaged weights, where the run keeps such."""
        if self.ema is None:
            yield
            return
        weights = trainable(self.model)
        before = copied(weights)
        assign(weights, self.ema)
        try:
            yield
        finally:
            assign(weights, before)


def trainable(model) -> dict[str, Tensor]:
    """The weights that training moves, by name."""
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


def copied(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: w.detach().clone() for name, w in weights.items()}


@torch.no_grad()
def assign(weights: dict[str, Tensor], values: dict[str, Tensor]) -> None:
    """Overwrite `weights` in place. `values` may be whole where `weights` are in parts."""
    for name, weight in weights.items():
        weight.copy_(like(values[name], weight))


def start(model, settings: Settings) -> State:
    """A fresh state: AdamW over the trainable weights, fused: one kernel, and no memory beside its moments."""
    weights = trainable(model)
    optimizer = torch.optim.AdamW(weights.values(), lr=settings.lr, weight_decay=0.0, fused=True)
    return State(model, optimizer, ema=copied(weights) if settings.ema else None)


@torch.no_grad()
def sample(
    model,
    prompts: list[str],
    group_size: int,
    schedule: FlowSchedule,
    key: tuple,
    layout: list[Tensor] | None = None,
    groups: list[int] | None = None,
    same_noise: bool = False,
    lap: Callable[[str], None] = lambda phase: None,
) -> Samples:
    """K = group_size samples of each prompt. `key` and the group's number seed its noise.

    layout lists the micro-batches (default: one); groups the numbers of the prompts' groups (0, 1, ...);
    lap("encode"), lap("sample") and lap("decode") are called when these are done.
    """
    repeated = [p for p in prompts for _ in range(group_size)]
    conditioning = model.encode(prompts)
    lap("encode")
    shape = (len(schedule) + 1, group_size, *model.latent_shape)
    noise = torch.stack(
        [torch.randn(shape, generator=generator_for(*key, g)) for g in groups or range(len(prompts))], dim=1
    )
    if same_noise:
        noise[0] = noise[0, :, :1]
    noise, device, parts = noise.flatten(1, 2), next(iter(conditioning.values())).device, []
    for rows in layout or [torch.arange(len(repeated))]:
        part = {name: value[rows // group_size] for name, value in conditioning.items()}
        eps = noise[:, rows].to(device)
        path = rollout(lambda x, sigma: model.velocity(x, sigma, part), schedule, eps[0], eps=eps[1:])
        parts.append((path.x.cpu(), path.mean.cpu(), path.log_prob.cpu()))
    trajectory = Trajectory(*(torch.cat(values, 1) for values in zip(*parts)), schedule.steps)
    lap("sample")
    images = model.decode(trajectory.x[-1].to(device)).cpu()
    lap("decode")
    return Samples(repeated, conditioning, trajectory, images)


def draw(
    model,
    prompts: list[str],
    schedule: FlowSchedule,
    settings: Settings,
    share: Share,
    key: tuple,
    layout: list,
    **options,
) -> Samples:
    """This process's samples of an iteration, with the trajectory's densities of the trained steps; as `sample`."""
    mine = [prompts[g] for g in share.mine]
    rows = [rows for part in layout for rows in part]
    samples = sample(model, mine, settings.group_size, schedule, key, rows, share.mine, settings.same_noise, **options)
    path, S = samples.trajectory, sum(i < settings.trained * settings.steps for i in schedule.steps)
    samples.trajectory = Trajectory(path.x, path.mean[:S], path.log_prob[:S], path.steps[:S])
    return samples


def checked(values: Tensor, what: str, prompts: list[str]) -> Tensor:
    """`values` [B, ...], or a ValueError that names the network and the prompt of the first NaN or inf."""
    bad = ~values.flatten(1).isfinite().all(1) if values.ndim > 1 else ~values.isfinite()
    if bad.any():
        raise ValueError(f"{what} returned a NaN or infinite value for the prompt {prompts[bad.nonzero()[0, 0]]!r}")
    return values


def advantages(reward: Tensor, clip: float = 5.0, std_normalize: bool = True) -> Tensor:
    """Group-relative advantages of shaped rewards [G, K, S], normalised over K; 0 where a group has no spread."""
    centred = reward - reward.mean(1, keepdim=True)
    if std_normalize:
        centred = centred / (reward.std(1, keepdim=True) + 1e-4)
    flat = reward.amax(1, keepdim=True) == reward.amin(1, keepdim=True)
    return centred.masked_fill(flat, 0).clamp(-clip, clip)


def step_weights(schedule: FlowSchedule, omega: str, steps: tuple[int, ...] | None = None) -> Tensor:
    """omega_t of the trained steps (default: all stochastic ones), [S], mean 1."""
    variance = schedule.std[list(steps or schedule.steps)].square()
    return variance / variance.mean() if omega == "variance" else torch.ones_like(variance)


def learning_rate(settings: Settings, iteration: int) -> float:
    """The optimiser's learning rate in the given iteration, counted from 0."""
    falls = settings.lr_schedule == "cosine"
    return settings.lr * (0.5 + 0.5 * math.cos(math.pi * iteration / settings.iterations) if falls else 1)


def scores(network: Callable, samples: Samples, share: Share, *inputs) -> Tensor:
    """What a reward model or encoder says of the samples, of all processes, [G, K, ...].

    Raises ValueError naming network and prompt for a NaN or infinite value.
    """
    values = checked(network(*inputs), name(network), samples.prompts).cpu()
    return share.gather(values.unflatten(0, (len(share.mine), -1)))


def calibrate_on(model, prompts: list[str], encoder: Callable[[Tensor], Tensor], settings: Settings) -> float:
    """The bandwidth h from one round of the policy's samples, to be called before anything is trained."""
    schedule = model.schedule(settings.steps, kind=settings.kind, noise_level=settings.noise_level)
    share = deal(settings.groups, settings.updates)
    picked = pick_prompts(prompts, settings, 0)
    layout = chunks(len(share.mine), settings.group_size, 1, settings.micro_batch)
    samples = draw(model, picked, schedule, settings, share, (settings.seed, "calibrate"), layout)
    return calibrate(scores(encoder, samples, share, samples.images))


def train(
    model,
    prompts: list[str],
    reward: Callable[[Tensor, list[str]], Tensor],
    encoder: Callable[[Tensor], Tensor],
    method: FlowGRPO,
    settings: Settings,
    state: State | None = None,
) -> Iterator[State]:
    """Fine-tune `model` (the five names of text2image.py) and yield the state after every iteration.

    reward(images, prompts) -> [B] and encoder(images) -> [B, D] must not depend on the batch they are
    called with. Raises ValueError when either returns a NaN, naming it and the prompt.
    """
    state = state or start(model, settings)
    full = model.schedule(settings.steps, kind=settings.kind, noise_level=settings.noise_level)
    share = deal(settings.groups, settings.updates)
    layout = chunks(len(share.mine), settings.group_size, settings.updates, settings.micro_batch)

    if state.bandwidth is None:
        state.bandwidth = calibrate_on(model, prompts, encoder, settings)

    while state.iteration < settings.iterations:
        lap, schedule = Stopwatch(), full
        if settings.window is not None:  # one window for all groups
            generator = generator_for(settings.seed, state.iteration, "window")
            schedule = full.windowed(
                int(torch.randint(settings.steps - settings.window, (), generator=generator)), settings.window
            )

        picked = pick_prompts(prompts, settings, state.iteration)
        samples = draw(model, picked, schedule, settings, share, (settings.seed, state.iteration), layout, lap=lap)
        state.reward = scores(reward, samples, share, samples.images, samples.prompts)
        lap("reward")
        state.features = scores(encoder, samples, share, samples.images)
        lap("features")

        log_prob = samples.trajectory.log_prob.T.unflatten(0, (len(share.mine), -1))
        group = Group(
            state.reward,
            state.features,
            state.bandwidth,
            share.gather(log_prob),
            step_weights(schedule, settings.omega, samples.trajectory.steps).to(state.reward),
            generator_for(settings.seed, state.iteration, "select"),
        )
        state.advantages = advantages(method.shape(group), settings.advantage_clip, settings.std_normalize)
        pairs = method.select(group, state.advantages)
        for parameters in state.optimizer.param_groups:
            parameters["lr"] = learning_rate(settings, state.iteration)
        mine = [values[share.mine].flatten(0, 1) for values in (state.advantages, pairs)]
        logs = [update(model, method, schedule, samples, *mine, part, state, settings) for part in layout]
        lap("update")
        state.iteration += 1
        state.samples = samples
        state.metrics = measure(state, group, full, share) | {
            "ratio_error": logs[0]["ratio_error"],
            "clip_fraction": sum(log["clip_fraction"] for log in logs) / len(logs),
            "grad_norm": sum(log["grad_norm"] for log in logs) / len(logs),
            **lap.metrics(),
        }
        yield state


def update(
    model,
    method: FlowGRPO,
    schedule: FlowSchedule,
    samples: Samples,
    advantage: Tensor,
    pair: Tensor,
    part: list[Tensor],
    state: State,
    settings: Settings,
) -> dict[str, float]:
    """One optimiser step on the samples listed in `part`; advantage and pair are [B, S]."""
    trajectory = samples.trajectory
    total = sum(map(len, part)) * len(trajectory.steps) * processes()
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
            )
            (method.loss(step) * (len(rows) / total)).backward()
            with torch.no_grad():
                ratio_error = torch.maximum(ratio_error, (step.ratio - 1).abs().max())
                clipped = clipped + ((step.ratio < method.low) | (step.ratio > method.high)).sum()
    weights = trainable(model)
    sum_gradients(weights.values())
    norm = whole(torch.nn.utils.clip_grad_norm_(weights.values(), settings.grad_clip))
    if not norm.isfinite():
        raise ValueError("the gradient is NaN or infinite; lower lr or noise_level, or raise the precision")
    state.optimizer.step()
    for key, average in (state.ema or {}).items():
        average.lerp_(weights[key].detach(), 1 - settings.ema)
    return {
        "ratio_error": over_processes(ratio_error, largest=True),
        "clip_fraction": over_processes(clipped) / total,
        "grad_norm": norm.item(),
    }


def name(network) -> str:
    """How messages call a reward model or encoder."""
    return getattr(network, "name", None) or getattr(network, "__name__", type(network).__name__)


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
        "pairwise_distance": metrics.mean_pairwise_distance(state.features).mean().item(),
        "vae_variance": variance(samples.latents),
        "pixel_variance": variance(samples.images),
        "p_max": probability.amax(1).mean().item(),
        "p_min": probability.amin(1).mean().item(),
    }
