"""Everything that decides a run besides model, reward, encoder and method.

Each setting is declared once, here: name, type, range, default, and the comment that says what it is. The
constructor, the command line (options.py) and run.json all read this declaration.
"""

import functools
import math
from typing import Annotated, Literal

from annotated_types import Ge, Gt, Le, Lt
from pydantic import ConfigDict, ValidationError, model_validator
from pydantic.dataclasses import dataclass

from ref.schedule import Kind

MOST_IMAGES = 10**6  # an iteration: more cannot be meant


def in_one_line(declared: type) -> type:
    """Let a pydantic class refuse what it is given in one line: 'lr must be a finite number, got nan'."""
    make = declared.__init__

    @functools.wraps(make)
    def __init__(self, *values, **named):
        try:
            make(self, *values, **named)
        except ValidationError as error:
            raise ValueError("; ".join(map(one_line, error.errors()))) from None

    declared.__init__ = __init__
    return declared


def one_line(error: dict) -> str:
    """One of pydantic's errors in words."""
    name = ".".join(str(part) for part in error["loc"] if isinstance(part, str) and part.isidentifier())
    if error["type"] == "value_error":  # our own words
        return str(error["ctx"]["error"])
    if error["type"] in ("extra_forbidden", "unexpected_keyword_argument"):
        return f"there is no option {name}"
    if error["type"] in ("missing", "missing_keyword_only_argument"):
        return f"{name} is missing"
    said = error["msg"].replace("Input should", f"{name} must", 1)
    return f"{said if said.startswith(name) else f'{name}: {said}'}, got {error['input']!r}"


@in_one_line
@dataclass(config=ConfigDict(extra="forbid", allow_inf_nan=False), kw_only=True)
class Settings:
    """The settings of a run. Raises ValueError in one line that names the setting, its range and what it got."""

    iterations: Annotated[int, Ge(0), Le(10**9)] = 100  # optimisation rounds
    groups: Annotated[int, Ge(1), Le(10**4)] = 10  # G, prompts an iteration
    group_size: Annotated[int, Ge(2), Le(10**4)] = 16  # K, samples a prompt; one has no group to be compared with
    updates: Annotated[int, Ge(1)] = 2  # optimiser steps an iteration; each sees groups / updates whole groups
    micro_batch: Annotated[int, Ge(0)] = 1024  # samples in one forward pass; gradients accumulate. 0: found by trial
    steps: Annotated[int, Ge(2), Le(10**4)] = 10  # N, denoising steps
    kind: Kind = "flow_sde"  # kernel, see schedule.py
    noise_level: Annotated[float, Gt(0), Le(100)] = 0.7  # eta of the kernel; at most 1 for cps
    window: Annotated[int, Ge(1)] | None = None  # make this many consecutive steps stochastic, and train them
    window_moves: Literal["random", "sliding", "decaying"] = "random"  # anew each iteration; or from noise on (MixGRPO)
    window_stay: Annotated[int, Ge(1), Le(10**6)] = 25  # iterations at a place of a window that slides or decays
    tail_steps: Annotated[int, Ge(1), Le(10**4)] | None = None  # after a window so many of second order (None: Euler's)
    trained: Annotated[float, Gt(0), Le(1)] = 1.0  # this share of the steps, from the noise on; a window lies within it
    trained_at_random: bool = False  # that share anywhere, drawn anew each iteration (DanceGRPO)
    same_noise: bool = False  # a group starts from one x_0 (DanceGRPO), and walks as one until the window
    lr: Annotated[float, Gt(0), Le(10)] = 3e-4  # AdamW's learning rate
    lr_schedule: Literal["constant", "cosine"] = "constant"  # cosine: falling to 0 at the last iteration
    clip: Annotated[float, Gt(0), Le(100)] = 1e-4  # PPO's eps, on log-densities averaged over the latent dimension
    guard: bool = False  # normalise ratios and step losses as GRPO-Guard does (arXiv 2510.22319)
    advantage_clip: Annotated[float, Gt(0), Le(10**6)] = 5.0  # advantages are clipped to +- this
    std_normalize: bool = True  # divide advantages by the group's standard deviation
    global_std: bool = False  # divide by that of all the iteration's rewards instead (most of Flow-GRPO's recipes)
    per_reward: bool = False  # in a sum of rewards divide each by its own deviation in the group first (GDPO)
    best_and_worst: Annotated[int, Ge(2)] | None = None  # train on so many extremes of a group, half and half
    grad_clip: Annotated[float, Gt(0), Le(10**12)] = 1.0  # largest gradient norm
    ema: Annotated[float, Ge(0), Lt(1)] = 0.0  # decay of the averaged weights, which are saved; 0 is off
    ema_every: Annotated[int, Ge(1), Le(10**6)] = 1  # optimiser steps between two updates of the averages (Flow-GRPO 8)
    target_diversity: Annotated[float, Gt(0), Lt(10)] | None = None  # share of the base model's variance to hold (P19)
    stop_below_diversity: Annotated[float, Gt(0), Lt(10)] | None = None  # end a run below it; under a target it dips .2
    omega: Literal["uniform", "variance"] = "uniform"  # weights over steps of PEC and PCVAE; variance: as s_i^2
    images_per_prompt: Annotated[int, Ge(2), Le(1000)] | None = None  # of evaluations (None: the preset's)
    seed: int = 0

    @model_validator(mode="after")
    def fits_together(self) -> "Settings":
        images = self.groups * self.group_size
        if images > MOST_IMAGES:
            raise ValueError(
                f"groups x group_size = {images:.1e} images an iteration, {images * self.steps:.1e} passes of the model to "
                f"draw them; at most {MOST_IMAGES:.0e} images"
            )
        if self.kind == "cps" and self.noise_level > 1:
            raise ValueError(f"noise_level must be at most 1 for cps, got {self.noise_level}")
        if self.updates > self.groups:
            raise ValueError(f"updates ({self.updates}) cannot exceed groups ({self.groups}): each takes whole groups")
        if self.window is not None and self.window > self.trainable_steps:
            raise ValueError(
                f"window must lie in 1..{self.trainable_steps} (of {self.steps} steps the last is deterministic; trained "
                f"is {self.trained:g}), got {self.window}"
            )
        if self.window is None and (self.tail_steps is not None or self.window_moves != "random"):
            name = "window_moves" if self.tail_steps is None else "tail_steps"
            raise ValueError(f"{name} is said of a window; give --window too")
        if self.trained_at_random and (self.window is not None or self.trained == 1):
            raise ValueError(
                "trained_at_random draws the share `trained` of all steps: give it, below 1, and no window"
            )
        if self.global_std and not self.std_normalize:
            raise ValueError("global_std says by which deviation std_normalize divides; without it there is none")
        if self.best_and_worst is not None and self.best_and_worst > self.group_size:
            raise ValueError(
                f"best_and_worst must lie in 2..{self.group_size}, the group_size, got {self.best_and_worst}"
            )
        if self.target_diversity is not None and self.group_size < 3:
            raise ValueError(
                "a target_diversity needs a group_size of 3 or more: in groups of 2 no weight holds anything"
            )
        if (stop := self.stop_below_diversity) is not None and stop >= (self.target_diversity or 10):
            raise ValueError(
                f"stop_below_diversity must lie below target_diversity ({self.target_diversity}), got {stop}: a run that "
                "reaches its target would be ended"
            )
        return self

    @property
    def trainable_steps(self) -> int:
        """How many steps are trained, or among how many a window lies: the last is deterministic."""
        return min(math.ceil(self.trained * self.steps), self.steps - 1)

    @property
    def places(self) -> int:
        """At how many steps a window may begin, 0 where there is none."""
        return self.trainable_steps - self.window + 1 if self.window else 0
