"""The methods: what each adds to the reward, and what to the loss.

A method acts at two places of `grpo.train`, and a class here overrides only what it changes:

    shape(group)   rewards, perceptual and policy log-densities of whole groups -> R~ [G, K, S]
    loss(step)     one denoising step of one micro-batch -> scalar to descend

`select(group, advantages)` stands between them for methods that choose (sample, step) pairs over the
whole batch. S counts the stochastic (trained) steps; index s is the paper's t. Weights are lambda.

Omega_t, the paper's weight over steps, has mean 1: uniform by default (a reading), or proportional
to the kernel's variance s_t^2 (`omega="variance"`).

Adding a method takes one class and one line in METHODS.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from ref.entropy import gaussian_kl
from ref.perceptual import perceptual_log_prob


@dataclass
class Group:
    """What a method may know of an iteration's samples, whole groups of it.

    reward           [G, K]     R(x^k, c)
    features         [G, K, D]  phi(x^k) of the finished images (None when no encoder was given)
    bandwidth        h          calibrated on the base model
    policy_log_prob  [G, K, S]  log p_theta(x_{i+1} | x_i) at sampling, per latent dimension
    omega            [S]        step weights with mean 1
    """

    reward: Tensor
    features: Tensor | None
    bandwidth: float | None
    policy_log_prob: Tensor
    omega: Tensor

    @property
    def perceptual_log_prob(self) -> Tensor:
        """log p_perc [G, K], per feature dimension, so that lambda carries over between encoders."""
        return perceptual_log_prob(self.features, self.bandwidth, reduction="mean")


@dataclass
class Step:
    """One trained step of a micro-batch. log_prob and mean carry gradients, the rest does not.

    log_prob, old_log_prob, advantage, pair   [B]       pair is what `select` returned
    mean, old_mean, reference_mean            [B, ...]  reference_mean only if `needs_reference`
    std                                       s_i, 0-d
    """

    log_prob: Tensor
    old_log_prob: Tensor
    advantage: Tensor
    pair: Tensor
    mean: Tensor
    old_mean: Tensor
    reference_mean: Tensor | None
    std: Tensor

    @property
    def ratio(self) -> Tensor:
        return (self.log_prob - self.old_log_prob).exp()


class FlowGRPO:
    """The clipped policy gradient, -min(r A, clip(r, 1 - eps, 1 + eps) A). Flow-GRPO, arXiv 2505.05470.

    weight  lambda of the subclass's term; 0 gives Flow-GRPO.
    clip    eps; 1e-4 because log-densities are means over dimensions.
    """

    default_weight = 0.0
    needs_reference = False

    def __init__(self, weight: float | None = None, clip: float = 1e-4):
        self.weight = self.default_weight if weight is None else weight
        if not 0 <= self.weight < float("inf"):
            raise ValueError(f"weight must be a finite number >= 0, got {self.weight}")
        self.low, self.high = 1 - clip, 1 + clip

    def shape(self, group: Group) -> Tensor:
        return group.reward[..., None].expand_as(group.policy_log_prob)

    def select(self, group: Group, advantages: Tensor) -> Tensor:
        return torch.ones_like(advantages)

    def loss(self, step: Step) -> Tensor:
        clipped = step.ratio.clamp(self.low, self.high)
        return -torch.minimum(step.ratio * step.advantage, clipped * step.advantage).mean()


class FlowGRPOKL(FlowGRPO):
    """Adds beta KL(p_theta || p_base), the Gaussian KL ||mu - mu_base||^2 / (2 s^2), to the loss."""

    default_weight = 0.01
    needs_reference = True

    def loss(self, step: Step) -> Tensor:
        return super().loss(step) + self.weight * gaussian_kl(step.mean, step.reference_mean, step.std).mean()


class ClipHigher(FlowGRPO):
    """Clips to [1 - eps, 1 + (1 + weight) eps]: room to raise improbable samples (DAPO, arXiv 2503.14476)."""

    default_weight = 0.4

    def __init__(self, weight: float | None = None, clip: float = 1e-4):
        super().__init__(weight, clip)
        self.high = 1 + (1 + self.weight) * clip


class PEC(FlowGRPO):
    """Perceptual Entropy Constraint: R~^k = R^k + lambda omega_t (-log p_perc^k). Project page, 'PEC'."""

    default_weight = 0.05

    def shape(self, group: Group) -> Tensor:
        return super().shape(group) - self.weight * group.omega * group.perceptual_log_prob[..., None]


class PCVAE(FlowGRPO):
    """R~ = R - lambda [omega_t log p_perc - omega_t log p_theta]. Project page, 'PCVAE'.

    A KL from the perceptual to the latent distribution, put into the reward. The first term is PEC's;
    the second has zero expected gradient (proofs/P03) as long as advantages are only centred: it adds
    noise. Dividing by the group's std, which that noise enlarges, weakens reward and PEC term alike.
    """

    default_weight = 0.03

    def shape(self, group: Group) -> Tensor:
        kl = group.perceptual_log_prob[..., None] - group.policy_log_prob
        return super().shape(group) - self.weight * group.omega * kl


class NaiveKL(FlowGRPO):
    """The same KL added to the loss and differentiated through log p_theta at fixed samples (figure 4a).

    log p_perc is a constant there, so the term is -lambda log p_theta: its expected gradient is zero,
    its variance is not (proofs/P10). It is here to be seen failing. That this is what the paper's
    'naive KL' does is a reading.
    """

    default_weight = 0.03

    def loss(self, step: Step) -> Tensor:
        return super().loss(step) - self.weight * step.log_prob.mean()


METHODS = {
    "flow_grpo": FlowGRPO,
    "flow_grpo_kl": FlowGRPOKL,
    "clip_higher": ClipHigher,
    "pec": PEC,
    "pcvae": PCVAE,
    "naive_kl": NaiveKL,
}
