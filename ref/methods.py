"""The methods: what each adds to the reward, and what to the loss.

A method acts at three places of `grpo.train`, and a class here overrides only what it changes:

    shape(group)               whole groups' rewards and log-densities -> R~ [G, K, S]
    select(group, advantages)  a number for every (sample, step) pair, chosen over the whole batch -> [G, K, S]
    loss(step)                 one denoising step of one micro-batch -> scalar to descend

S counts the stochastic (trained) steps; index s is the paper's t. `weight` is the method's dial, the
paper's lambda. Methods that speak of *the* entropy take a `space`, the log-density that they look at:

    latent      log p_theta(x_{i+1} | x_i), the policy's own; its entropy is constant (proofs/P01)
    perceptual  log p_perc, a Gaussian around the group's mean feature, the same for all steps
    kernel      the leave-one-out kernel density of the features, which sees modes (proofs/P12)

From tokens to flows: a token is a (sample, step) pair, its log-probability that of the step. All
log-densities are per dimension. A language model's thresholds on covariances (1 to 5) never fire on
those, so fractions of pairs are the dials here, and covariances are centred per step, because the
density's scale s_i is the step's. Omega_t, the paper's weight over steps, has mean 1: uniform by
default (a reading), or proportional to the kernel's variance s_t^2 (`omega="variance"`).
Adding a method takes one class and one line in METHODS.
"""

from dataclasses import dataclass
from functools import cached_property

import torch
from jaxtyping import Float, Int
from torch import Tensor

from ref.entropy import gaussian_kl
from ref.perceptual import kernel_log_prob, perceptual_log_prob

SPACES = ("latent", "perceptual", "kernel")
LARGEST = 1e6  # of a weight; beyond it float32 loses the reward beside the bonus


@dataclass
class Group:
    """What a method may know of an iteration's samples, whole groups of it.

    reward           R(x^k, c)
    features         phi(x^k) of the finished images (None when no encoder was given)
    bandwidth        h, calibrated on the base model
    kernel           the kernel's own bandwidth h_K, likewise
    policy_log_prob  log p_theta(x_{i+1} | x_i) at sampling, per latent dimension
    omega            step weights with mean 1
    generator        seeded by the iteration, for methods that draw
    """

    reward: Float[Tensor, "G K"]
    features: Float[Tensor, "G K D"] | None
    bandwidth: float | None
    policy_log_prob: Float[Tensor, "G K S"]
    omega: Float[Tensor, " S"]
    generator: torch.Generator | None = None
    kernel: float | None = None

    def log_prob(self, space: str) -> Float[Tensor, "G K S"]:
        """The log-density of a space, per dimension, so that lambda carries over between encoders."""
        if space == "latent":
            return self.policy_log_prob
        if space == "perceptual":
            values = perceptual_log_prob(self.features, self.bandwidth, "mean")
        else:  # times h_K^2 / h^2, so that lambda means the same: as h_K grows, the bonus becomes the one above
            own = self.kernel or self.bandwidth
            values = kernel_log_prob(self.features, own, "mean") * (own / self.bandwidth) ** 2
        return values[..., None].expand_as(self.policy_log_prob)


@dataclass
class Step:
    """One trained step of a micro-batch. log_prob and mean carry gradients, the rest does not.

    pair                    what `select` returned
    mean, old_mean          None where no loss looks at them
    reference_mean          only if `needs_reference`
    std                     s_i
    guard                   dt_i where GRPO-Guard is on
    """

    log_prob: Float[Tensor, " B"]
    old_log_prob: Float[Tensor, " B"]
    advantage: Float[Tensor, " B"]
    pair: Float[Tensor, " B"]
    mean: Float[Tensor, " B *latent"] | None
    old_mean: Float[Tensor, " B *latent"] | None
    reference_mean: Float[Tensor, " B *latent"] | None
    std: Float[Tensor, ""]
    guard: float | None = None

    @cached_property
    def ratio(self) -> Float[Tensor, " B"]:
        """p_theta / p_old of the step taken, per dimension. Under GRPO-Guard, arXiv 2510.22319, another number around 1:

        the log plus ||mu - mu_old||^2 / 2 s^2, which a drift of the mean takes from it on average, and all that times s:
        with x = mu_old + s eps it is eps (mu - mu_old), so a clip holds on both sides, and as hard at every step.
        """
        log = self.log_prob - self.old_log_prob
        if self.guard is not None:
            log = (log + gaussian_kl(self.mean, self.old_mean, self.std)) * self.std.to(log.device)
        return log.exp()


class FlowGRPO:
    """The clipped policy gradient, -min(r A, clip(r, 1 - eps, 1 + eps) A). Flow-GRPO, arXiv 2505.05470.

    weight  lambda of the subclass's term; 0 gives Flow-GRPO.
    clip    eps; 1e-4 because log-densities are means over dimensions.
    space   latent, perceptual or kernel, for methods that have a `default_space`.

    Raises ValueError for a weight outside [0, `largest_weight`] (0: it takes none), or a space it does not take.
    """

    default_weight = 0.0
    largest_weight = 0.0  # the paper's lambda is of no use here
    default_space: str | None = None
    needs_reference = False
    holds = False  # whether its weight can hold a diversity

    def __init__(self, weight: float | None = None, clip: float = 1e-4, space: str | None = None):
        self.weight, most = self.default_weight if weight is None else weight, self.largest_weight
        if not 0 <= self.weight <= most:
            allowed = f"a number from 0 to {most:g}" if most else "left out"
            raise ValueError(f"the weight of {type(self).__name__} must be {allowed}, got {self.weight}")
        allowed = SPACES if self.default_space else ()
        if space is not None and space not in allowed:
            raise ValueError(f"{type(self).__name__} takes {' or '.join(allowed) or 'no space'}, got space {space!r}")
        self.space = space or self.default_space
        self.low, self.high = 1 - clip, 1 + clip

    def shape(self, group: Group) -> Float[Tensor, "G K S"]:
        return group.reward[..., None].expand_as(group.policy_log_prob)

    def unit(self, reward_std: float, std_normalize: bool) -> float:
        return reward_std  # what a weight of 1 is measured in, for a term in the reward

    def select(self, group: Group, advantages: Float[Tensor, "G K S"]) -> Float[Tensor, "G K S"]:
        return torch.ones_like(advantages)

    def pair_loss(self, step: Step) -> Float[Tensor, " B"]:
        """The clipped policy gradient of every pair; under GRPO-Guard divided by dt, for steps that pull alike.

        So is every term that is a policy gradient. KLs, and naive KL's, keep their size as in GRPO-Guard's code: where the
        policy's first gradient becomes s / dt times as large, theirs stays, and a weight of theirs counts dt / s as much.
        """
        clipped = step.ratio.clamp(self.low, self.high)
        return -torch.minimum(step.ratio * step.advantage, clipped * step.advantage) / (step.guard or 1)

    def loss(self, step: Step) -> Float[Tensor, ""]:
        return self.pair_loss(step).mean()

    @property
    def skips(self) -> bool:
        """Whether pairs of advantage 0 may be left out: where the loss is the mean of `pair_loss`, which is 0 there."""
        return type(self).loss is FlowGRPO.loss


class FlowGRPOKL(FlowGRPO):
    """Adds beta KL(p_theta || p_base), the Gaussian KL ||mu - mu_base||^2 / (2 s^2), to the loss.

    beta is per latent dimension, as log-densities are, and s^2 = g^2 dt. Flow-GRPO's code divides by g^2 alone: a beta
    of its is beta dt_i here, on SD3's ten steps 0.04 to 0.27 of it; this 0.01 pulls there as its 0.04 would.
    """

    default_weight = 0.01
    largest_weight = LARGEST
    needs_reference = True

    def loss(self, step: Step) -> Float[Tensor, ""]:
        return super().loss(step) + self.weight * gaussian_kl(step.mean, step.reference_mean, step.std).mean()


class ClipHigher(FlowGRPO):
    """Clips to [1 - eps, 1 + (1 + weight) eps]: room to raise improbable samples (DAPO, arXiv 2503.14476)."""

    default_weight = 0.4
    largest_weight = LARGEST

    def __init__(self, weight: float | None = None, clip: float = 1e-4, space: str | None = None):
        super().__init__(weight, clip, space)
        self.high = 1 + (1 + self.weight) * clip


class EntropyReg(FlowGRPO):
    """Entropy regularisation, L - lambda H, beside the clipped policy gradient instead of in its reward.

    The latent H is a constant, so its exact gradient is zero (proofs/P01). What can be added is the
    score-function estimate, -lambda mean[r b] with b = -omega (log p - mean_k log p): zero on average
    in latent space (proofs/P03), in perceptual space (K-2)/K times the gradient of the variance term of
    H_perc (proofs/P09: the group's mean, too, depends on the sample). Unlike PEC's, the term is neither divided
    by the group's standard deviation nor clipped.
    """

    default_weight = 0.05
    largest_weight = LARGEST
    default_space = "latent"
    holds = True

    def unit(self, reward_std: float, std_normalize: bool) -> float:
        return 1.0 if std_normalize else reward_std  # it stands beside the advantages

    def select(self, group: Group, advantages: Float[Tensor, "G K S"]) -> Float[Tensor, "G K S"]:
        log_prob = group.omega * group.log_prob(self.space)
        return log_prob.mean(1, keepdim=True) - log_prob

    def loss(self, step: Step) -> Float[Tensor, ""]:
        return super().loss(step) - self.weight * (step.ratio * step.pair).mean() / (step.guard or 1)


def covariance(log_prob: Float[Tensor, "G K S"], advantages: Float[Tensor, "G K S"]) -> Float[Tensor, "G K S"]:
    """(log p - mean log p)(A - mean A) of every pair, both centred per step over the batch."""
    return (log_prob - log_prob.mean((0, 1))) * (advantages - advantages.mean((0, 1)))


def top(values: Float[Tensor, "..."], fraction: float) -> Int[Tensor, " chosen"]:
    """Flat indices of the round(fraction n) largest of n values, largest first."""
    return values.flatten().topk(round(fraction * values.numel())).indices


class ClipCov(FlowGRPO):
    """Drops the gradient of a fraction `weight` of all pairs, drawn from those of highest covariance.

    Covariance of log p and A is the rate at which the natural gradient shrinks the entropy of a policy over
    outcomes (proofs/P06); the source has it for a softmax policy. Candidates are the top 20 % (or `weight`, if
    that is more). arXiv 2505.22617, section 4, with a fraction in place of thresholds (a reading).
    """

    default_weight = 0.02
    largest_weight = 1.0
    default_space = "latent"

    def select(self, group: Group, advantages: Float[Tensor, "G K S"]) -> Float[Tensor, "G K S"]:
        candidates = top(covariance(group.log_prob(self.space), advantages), max(0.2, self.weight))
        drawn = torch.randperm(len(candidates), generator=group.generator)[: round(self.weight * advantages.numel())]
        keep = torch.ones(advantages.numel(), device=advantages.device)
        keep[candidates[drawn.to(candidates.device)]] = 0
        return keep.view_as(advantages)

    def pair_loss(self, step: Step) -> Float[Tensor, " B"]:
        return super().pair_loss(step) * step.pair


class KLCov(FlowGRPO):
    """Adds weight KL(p_theta || p_old) on the 20 % of pairs with the highest covariance. arXiv 2505.22617.

    The Gaussian KL ||mu - mu_old||^2 / (2 s^2) stands for the source's estimate |log ratio|, whose sign
    is noise. Either has gradient zero where the policies agree: it holds from the second update on.
    """

    default_weight = 1.0
    largest_weight = LARGEST
    default_space = "latent"

    def select(self, group: Group, advantages: Float[Tensor, "G K S"]) -> Float[Tensor, "G K S"]:
        chosen = torch.zeros(advantages.numel(), device=advantages.device)
        chosen[top(covariance(group.log_prob(self.space), advantages), 0.2)] = 1
        return chosen.view_as(advantages)

    def loss(self, step: Step) -> Float[Tensor, ""]:
        kl = gaussian_kl(step.mean, step.old_mean, step.std)
        return super().loss(step) + self.weight * (kl * step.pair).mean()


class PEC(FlowGRPO):
    """Perceptual Entropy Constraint: R~^k = R^k + lambda omega_t (-log p_perc^k). Project page, 'PEC'.

    space "latent" is the paper's ablation with the native entropy in its place.
    """

    default_weight = 0.05
    largest_weight = LARGEST
    default_space = "perceptual"
    holds = True

    def shape(self, group: Group) -> Float[Tensor, "G K S"]:
        return super().shape(group) - self.weight * group.omega * group.log_prob(self.space)


class PCVAE(FlowGRPO):
    """R~ = R - lambda [omega_t log p_perc - omega_t log p_theta]. Project page, 'PCVAE'.

    A KL from the perceptual to the latent distribution, put into the reward. The first term is PEC's;
    the second has zero expected gradient (proofs/P03) as long as advantages are only centred: it adds
    noise. Dividing by the group's std, which that noise enlarges, weakens reward and PEC term alike.
    """

    default_weight = 0.03
    largest_weight = LARGEST
    default_space = "perceptual"
    holds = True

    def shape(self, group: Group) -> Float[Tensor, "G K S"]:
        kl = group.log_prob(self.space) - group.policy_log_prob
        return super().shape(group) - self.weight * group.omega * kl


class NaiveKL(FlowGRPO):
    """The same KL added to the loss and differentiated through log p_theta at fixed samples (figure 4a).

    log p_perc is a constant there, so the term is -lambda log p_theta: its expected gradient is zero,
    its variance is not (proofs/P10). It is here to be seen failing. That this is what the paper's
    'naive KL' does is a reading.
    """

    default_weight = 0.03
    largest_weight = LARGEST

    def loss(self, step: Step) -> Float[Tensor, ""]:
        return super().loss(step) - self.weight * step.log_prob.mean()


class GARDO(FlowGRPO):
    """Positive advantages times the distance to the nearest neighbour of the group. GARDO's rule, arXiv 2512.24138.

    Who is good and far from the others is raised more; who is bad is lowered whatever it looks like. The distance is that
    of phi, over its mean over all of the group, to the power `weight` (0 gives Flow-GRPO). Readings: L2, where its code
    takes 1 - cosine, and after the advantages are normalised and clipped, which its code does not do. Its other parts, a
    gated KL and a reference that moves, are not here.
    """

    default_weight = 1.0
    largest_weight = 100.0

    def select(self, group: Group, advantages: Float[Tensor, "G K S"]) -> Float[Tensor, "G K S"]:
        distance = torch.cdist(group.features, group.features)
        nearest = (distance + torch.diag_embed(distance.new_full(distance.shape[:2], torch.inf))).amin(2)
        share = (nearest / nearest.mean(1, keepdim=True).clamp_min(1e-12)) ** self.weight
        return torch.where(advantages > 0, share[..., None], 1.0)

    def pair_loss(self, step: Step) -> Float[Tensor, " B"]:
        return super().pair_loss(step) * step.pair


METHODS = {
    "flow_grpo": FlowGRPO,
    "flow_grpo_kl": FlowGRPOKL,
    "clip_higher": ClipHigher,
    "entropy_reg": EntropyReg,
    "clip_cov": ClipCov,
    "kl_cov": KLCov,
    "pec": PEC,
    "pcvae": PCVAE,
    "naive_kl": NaiveKL,
    "gardo": GARDO,
}
