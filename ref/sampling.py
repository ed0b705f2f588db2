"""A round of samples, and what networks say of them.

Which prompts, which noise, which micro-batches: all of it is a function of (seed, iteration, group). There is
no generator state to save, no member of a group can get another's noise, and P processes draw the samples that
one would. Noise is drawn on the CPU, whatever the device: it is then the same on every machine and with any number of
processes. The GPU waits for it, about 5 s of an sd35_medium iteration of several minutes.
"""

import hashlib
import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from ref.policy import Trajectory, rollout
from ref.scale.processes import Share
from ref.schedule import FlowSchedule
from ref.settings import Settings


def generator_for(*key) -> torch.Generator:
    """A CPU generator whose seed is a hash of the key."""
    digest = hashlib.sha256("/".join(map(str, key)).encode()).digest()
    return torch.Generator("cpu").manual_seed(int.from_bytes(digest[:7], "big"))


def pick_prompts(prompts: list[str], settings: Settings, iteration: int) -> list[str]:
    """The G prompts of an iteration ; the list shuffled anew each time it is used up."""
    first = iteration * settings.groups
    picked, shuffled = [], {}
    for n in range(first, first + settings.groups):
        epoch, place = divmod(n, len(prompts))
        if epoch not in shuffled:
            shuffled[epoch] = torch.randperm(
                len(prompts), generator=generator_for(settings.seed, "epoch", epoch)
            ).tolist()
        picked.append(prompts[shuffled[epoch][place]])
    return picked


def windowed(full: FlowSchedule, settings: Settings, place: int) -> FlowSchedule:
    """`full` with its window at a step, and the tail after it."""
    schedule = full.windowed(place, settings.window)
    return schedule.tailed(settings.tail_steps) if settings.tail_steps else schedule


def placed(full: FlowSchedule, settings: Settings, iteration: int) -> FlowSchedule:
    """The schedule of an iteration: its window, one for all groups, and the tail after it. `full` where there is none."""
    if settings.window is None:
        return full
    places, stay = settings.places, settings.window_stay
    if settings.window_moves == "random":
        place = int(torch.randint(places, (), generator=generator_for(settings.seed, iteration, "window")))
    else:  # MixGRPO, arXiv 2507.21802: sliding, or with stays that shrink past the middle; then from the start again
        shrink = 0.1 if settings.window_moves == "decaying" else 0.0
        late = [max(0.0, place - settings.steps / 2) for place in range(places)]
        stays = [max(1, round(stay * math.exp(-shrink * steps))) for steps in late]
        place = [place for place, n in enumerate(stays) for _ in range(n)][iteration % sum(stays)]
    return windowed(full, settings, place)


def chunks(groups: int, group_size: int, updates: int, micro_batch: int) -> list[list[Tensor]]:
    """Sample indices, first by optimiser step (whole groups), then by micro-batch. Raises ValueError for micro_batch 0."""
    if micro_batch < 1:
        raise ValueError("micro_batch 0 means the largest that fits; let scale.microbatch find it first")
    parts = torch.arange(groups * group_size).view(groups, group_size).tensor_split(updates)
    return [list(part.flatten().split(micro_batch)) for part in parts]


def trained_only(part: list[Tensor], trained: Bool[Tensor, " B"]) -> list[Tensor]:
    """The micro-batches of an optimiser step that hold its trained samples, as few as do, filled up with others.

    Every sample stays in a micro-batch of the size in which it was drawn: the same kernels run on the same shapes, and
    round as they did then.
    """
    kept = []
    for size in dict.fromkeys(map(len, part)):
        rows = torch.cat([chunk for chunk in part if len(chunk) == size])
        first = rows[(~trained[rows]).to(torch.uint8).argsort(stable=True)]
        kept += first.split(size)[: -(-int(trained[rows].sum()) // size)]
    return kept


@dataclass
class Samples:
    """Whole groups of finished samples, this process's. B = G K, group-major."""

    prompts: list[str]  # [B]
    conditioning: dict[str, Tensor]  # [G, ...]
    trajectory: Trajectory
    images: Float[Tensor, "B ..."]

    @property
    def latents(self) -> Float[Tensor, " B *latent"]:
        return self.trajectory.x[-1]


@torch.no_grad()
def sample(
    model,
    prompts: list[str],
    group_size: int,
    schedule: FlowSchedule,
    key: tuple,
    layout: Iterable[Tensor] | None = None,
    groups: list[int] | None = None,
    same_noise: bool = False,
    lap: Callable[[str], None] = lambda phase: None,
    look: Callable[[Tensor, list[str]], None] | None = None,
) -> Samples:
    """K = group_size samples of each prompt. `key` and the group's number seed its noise.

    layout lists the micro-batches (default: one); groups the numbers of the prompts' groups (0, 1, ...);
    lap("encode"), lap("sample") and lap("decode") are called when these are done. look(images, prompts) is called for
    every micro-batch as soon as it is drawn; each is then decoded by itself, and not all of them at the end.

    With same_noise the members of a group are one until the first stochastic step: one walks for all, as many groups
    at once as a micro-batch has samples. Where these passes have the shape that the members' own would have (groups a
    multiple of the micro-batch) the states are the same to the bit; another shape may be another kernel's, which
    rounds otherwise.
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
    layout, device = layout or [torch.arange(len(repeated))], next(iter(conditioning.values())).device
    together = min(schedule.steps, default=0) if same_noise else 0

    def walk(rows: Tensor, each: int, x: Tensor, steps: range, eps: Tensor | None = None) -> Trajectory:
        part = {name: value[rows // each] for name, value in conditioning.items()}
        velocity = lambda x, sigma: model.velocity(x, sigma, part)  # noqa: E731
        path = rollout(velocity, schedule, x.to(device), eps=None if eps is None else eps.to(device), steps=steps)
        return Trajectory(path.x.cpu(), path.mean.cpu(), path.log_prob.cpu(), path.steps)

    before = noise[:1].flatten(1, 2)  # states up to the one from which every sample goes its own way
    if together:
        groups_at_once = torch.arange(len(prompts)).split(max(map(len, layout)))
        before = torch.cat([walk(g, 1, noise[0, g, 0], range(together)).x for g in groups_at_once], 1)
        before = before.repeat_interleave(group_size, 1)
    eps, alone = noise[1:].flatten(1, 2), range(together, len(schedule))
    paths, images = [], []
    for rows in layout:
        paths.append(walk(rows, group_size, before[-1, rows], alone, eps[:, rows]))
        if look:
            images.append(model.decode(paths[-1].x[-1].to(device)).cpu())
            look(images[-1], [repeated[b] for b in rows])
    x, mean, log_prob = (torch.cat(values, 1) for values in zip(*((p.x, p.mean, p.log_prob) for p in paths)))
    trajectory = Trajectory(torch.cat([before[:-1], x]), mean, log_prob, schedule.steps)
    lap("sample")
    images = torch.cat(images) if look else model.decode(trajectory.x[-1].to(device)).cpu()
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
    path, S = samples.trajectory, len(schedule.steps)
    keep = range(min(S, settings.trainable_steps))
    if settings.trained_at_random:
        keep = sorted(torch.randperm(S, generator=generator_for(*key, "trained"))[: len(keep)].tolist())
    steps = tuple(path.steps[s] for s in keep)
    samples.trajectory = Trajectory(path.x, path.mean[list(keep)], path.log_prob[list(keep)], steps)
    return samples


@torch.no_grad()
def ask(network: Callable, images: Float[Tensor, "B ..."], prompts: list[str], features: bool = False) -> Tensor:
    """What a network says of images: rewards [B], or with `features` phi [B, D]; float32, detached.

    A reward is called with (images, prompts), an encoder with (images). Any form of the right numbers will do:
    a tensor of any type, a list, an array, a column [B, 1] of rewards. Raises ValueError in one line that names
    the network, what it returned and what is asked: another shape, no numbers, a NaN (with its prompt), or images
    that it changed in place.
    """
    B, version = len(images), images._version
    said = network(images) if features else network(images, prompts)
    wanted = "a row of features" if features else "one number"
    wanted += f" for each of the {B} images, {f'[{B}, D]' if features else f'[{B}]'}"
    try:
        values = torch.as_tensor(said).detach()
    except (TypeError, ValueError, RuntimeError):
        raise ValueError(f"{name_of(network)} must return {wanted}; it returned a {type(said).__name__}") from None
    if values.shape == (B, 1) and not features:
        values = values[:, 0]
    if values.shape[:1] != (B,) or values.ndim != 1 + features or values.is_complex() or not values.numel():
        raise ValueError(f"{name_of(network)} must return {wanted}; it returned {list(values.shape)}, {values.dtype}")
    if images._version != version:
        raise ValueError(f"{name_of(network)} changed the images in place; give it a copy to write on")
    values = values.float()
    bad = ~values.view(B, -1).isfinite().all(1)
    if bad.any():
        place = bad.nonzero()[0, 0]
        raise ValueError(f"{name_of(network)} returned a NaN or infinite value for the prompt {prompts[place]!r}")
    return values


def scores(network: Callable, samples: Samples, share: Share, features: bool = False) -> Float[Tensor, "G K ..."]:
    """What a reward model or encoder says of the samples, of all processes; as `ask`."""
    values = ask(network, samples.images, samples.prompts, features).cpu()
    return share.gather(values.unflatten(0, (len(share.mine), -1)))


def name_of(network) -> str:
    """How messages call a reward model or encoder."""
    return getattr(network, "name", None) or getattr(network, "__name__", type(network).__name__)
