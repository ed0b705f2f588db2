"""What training carries from one iteration to the next, and what it shows."""

import math
from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from jaxtyping import Float
from torch import Tensor

from ref.perceptual import calibrate, calibrate_kernel
from ref.sampling import Samples, chunks, draw, pick_prompts, scores, windowed
from ref.scale.processes import deal
from ref.scale.weights import assign, copied, like, trainable
from ref.schedule import FlowSchedule
from ref.settings import Settings


@dataclass
class State:
    """What `train` yields. The first block is saved in checkpoints, the second is for looking at.

    Every process has the same state, but for `samples`, which are its own.
    """

    model: object
    optimizer: torch.optim.Optimizer
    iteration: int = 0
    bandwidth: float | None = None  # h, and the kernel's own, both calibrated on the base model
    kernel: float | None = None
    places: list[tuple[float, float]] | None = None  # both again, of groups that share a start, by the window's place
    weight: float = 0.0  # the multiplier of a target diversity, and what it is measured in
    unit: float | None = None
    kept: float = 1.0  # share of the base model's feature variance, averaged over about five iterations
    ema: dict[str, Tensor] | None = None  # averaged weights, by name

    metrics: dict[str, float] = field(default_factory=dict)
    samples: Samples | None = None
    reward: Float[Tensor, "G K"] | None = None
    features: Float[Tensor, "G K D"] | None = None
    advantages: Float[Tensor, "G K S"] | None = None

    def state_dict(self) -> dict:
        return {
            "iteration": self.iteration,
            "bandwidth": self.bandwidth,
            "kernel": self.kernel,
            "places": self.places,
            "multiplier": (self.weight, self.unit),
            "kept": self.kept,
            "weights": trainable(self.model),
            "optimizer": self.optimizer.state_dict(),
            "ema": self.ema,
        }

    def load_state_dict(self, saved: dict) -> None:
        self.iteration, self.bandwidth, self.kernel = saved["iteration"], saved["bandwidth"], saved.get("kernel")
        self.places = saved.get("places")
        self.weight, self.unit = saved.get("multiplier", (0.0, None))
        self.kept = saved.get("kept", 1.0)
        assign(trainable(self.model), saved["weights"])
        if self.ema is not None:
            assign(self.ema, saved["ema"])
        moments = {
            n: {key: like(value, weight) for key, value in saved["optimizer"]["state"][n].items()}
            for n, weight in enumerate(trainable(self.model).values())
            if n in saved["optimizer"]["state"]
        }
        self.optimizer.load_state_dict(saved["optimizer"] | {"state": moments})

    def bandwidths(self, schedule: FlowSchedule) -> tuple[float, float | None]:
        """h and the kernel's, calibrated on groups that were drawn as this schedule draws them."""
        return self.places[schedule.steps[0]] if self.places else (self.bandwidth, self.kernel)

    @torch.no_grad()
    def average(self, decay: float) -> None:
        """Move the averaged weights towards the weights."""
        for name, weight in trainable(self.model).items():
            self.ema[name].lerp_(weight, 1 - decay)

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


def start(model, settings: Settings) -> State:
    """A fresh state: AdamW over the trainable weights, fused: one kernel, and no memory beside its moments."""
    weights = trainable(model)
    optimizer = torch.optim.AdamW(weights.values(), lr=settings.lr, weight_decay=0.0, fused=True)
    return State(model, optimizer, ema=copied(weights) if settings.ema else None)


def calibrate_on(state: State, prompts: list[str], encoder: Callable[[Tensor], Tensor], settings: Settings) -> None:
    """Both bandwidths from one round of the policy's samples, to be called before anything is trained.

    Groups that share a start are the more alike the later their window lies: on letters they have 0.73 of the variance of
    independent samples at the first place and 0.19 at the last. They get bandwidths for each place, of 32 groups at least.
    Where every member has a start of its own the window changes nothing (P04; 0.02 at most was seen), and one round serves.

    Such a share says how wide the samples of one start are. Independent samples, as evaluations draw, keep less: where PEC was
    asked for 0.9 and 0.8 groups had 0.89 to 1.10 and 0.80 to 0.95 of it in the last quarter on the mixture, and they 0.24 to 0.77
    and 0.24 to 0.66 (windows of 1 to 3 steps, 2 seeds).
    """
    full = state.model.schedule(settings.steps, kind=settings.kind, noise_level=settings.noise_level)
    share = deal(settings.groups, settings.updates)
    layout = chunks(len(share.mine), settings.group_size, 1, settings.micro_batch)

    def bandwidths(schedule: FlowSchedule, *keys: str) -> tuple[float, float]:
        rounds = (draw(state.model, pick_prompts(prompts, settings, n), schedule, settings, share, (settings.seed, key), layout)
                  for n, key in enumerate(keys))  # fmt: skip
        phi = torch.cat([scores(encoder, samples, share, features=True) for samples in rounds])
        return calibrate(phi), calibrate_kernel(phi)

    state.bandwidth, state.kernel = bandwidths(full, "calibrate")
    if settings.same_noise and settings.window:
        rounds = range(math.ceil(32 / settings.groups))
        state.places = [
            bandwidths(windowed(full, settings, place), *(f"calibrate/{place}/{n}" for n in rounds))
            for place in range(settings.places)
        ]
