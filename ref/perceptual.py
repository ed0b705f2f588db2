"""Perceptual entropy: entropy measured in the feature space of an encoder phi.

The group of K samples of one prompt is described by an isotropic Gaussian around its mean feature,

    log p_perc(k) = -||phi_k - m||^2 / (2 h^2) - (D/2) log(2 pi h^2),     m = mean_k phi_k,
    H_perc        = -mean_k log p_perc(k)
                  = v / (2 h^2) + (D/2) log(2 pi h^2),                    v = mean_k ||phi_k - m||^2,

so H_perc is affine and increasing in the group's feature variance v (proofs/P08): the paper's
H_perc ∝ Var({phi(x^k)}). With D h^2 = v it is the entropy (D/2) log(2 pi e h^2) of an ordinary Gaussian.

    symbol   meaning                                in code
    phi_k    features of sample k of a group        phi[g, k], phi is [G, K, D]
    h        bandwidth                              bandwidth
    m        centre of the group                    its mean, or the mean of the others (leave_one_out)

Readings (the paper's page is silent): the isotropic Gaussian itself; and the bandwidth, which is
*calibrated* here, D h^2 = v of the base model, so that H_perc starts where a Gaussian's entropy is
and the weight lambda of PEC means the same for every encoder.

"sum" is the log-density over the D features, "mean" is that divided by D. Nats.
"""

import math
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor


def deviations(phi: Float[Tensor, "G K D"], leave_one_out: bool = False) -> Float[Tensor, "G K D"]:
    """phi_k - m; with leave_one_out, m is the mean of the other K - 1 samples (proofs/P09).

    Raises ValueError unless phi is [G, K, D] with K >= 2: one sample has no diversity.
    """
    if phi.ndim != 3 or phi.shape[1] < 2:
        raise ValueError(f"features must be [G, K, D] with a group size K >= 2, got shape {tuple(phi.shape)}")
    K = phi.shape[1]
    return (phi - phi.mean(1, keepdim=True)) * (K / (K - 1) if leave_one_out else 1)


def perceptual_log_prob(
    phi: Float[Tensor, "G K D"], bandwidth: float, reduction: str = "sum", leave_one_out: bool = False
) -> Float[Tensor, "G K"]:
    """log p_perc of every sample under its own group."""
    D = phi.shape[-1]
    squared = deviations(phi, leave_one_out).square().sum(-1)
    log_prob = -squared / (2 * bandwidth**2) - D / 2 * math.log(2 * math.pi * bandwidth**2)
    return log_prob if reduction == "sum" else log_prob / D


def perceptual_entropy(phi: Float[Tensor, "G K D"], bandwidth: float, reduction: str = "sum") -> Float[Tensor, " G"]:
    """H_perc = -mean_k log p_perc of every group."""
    return -perceptual_log_prob(phi, bandwidth, reduction).mean(1)


def kernel_logits(phi: Float[Tensor, "G K D"], bandwidth: float) -> Float[Tensor, "G K K"]:
    """-||phi_k - phi_j||^2 / 2 h^2 of all pairs of a group; -inf for j = k, which is left out."""
    deviations(phi)  # checks the shape
    logits = -torch.cdist(phi, phi, compute_mode="donot_use_mm_for_euclid_dist").square() / (2 * bandwidth**2)
    return logits.masked_fill(torch.eye(phi.shape[1], dtype=torch.bool, device=phi.device), -torch.inf)


def kernel_log_prob(phi: Float[Tensor, "G K D"], bandwidth: float, reduction: str = "sum") -> Float[Tensor, "G K"]:
    """Leave-one-out kernel density of every sample (proofs/P12).

    log of the mean over the other samples j of N(phi_k; phi_j, h^2 I). Where the Gaussian above sees
    only how far samples lie from their mean, this one sees how many others are near. Its bandwidth is one of
    its own (`calibrate_kernel`): the Gaussian's would leave a sample in 768 dimensions its nearest neighbour alone.
    """
    K, D = phi.shape[1:]
    logits = kernel_logits(phi, bandwidth)
    log_prob = logits.logsumexp(2) - math.log(K - 1) - D / 2 * math.log(2 * math.pi * bandwidth**2)
    return log_prob if reduction == "sum" else log_prob / D


def neighbours(phi: Float[Tensor, "G K D"], bandwidth: float) -> Float[Tensor, "G K"]:
    """Effective number of neighbours of every sample, 1 to K - 1: exp of the entropy of its kernel's weights."""
    return torch.special.entr(kernel_logits(phi, bandwidth).softmax(2)).sum(2).exp()


def calibrate_kernel(phi: Float[Tensor, "G K D"], share: float = 0.25) -> float:
    """The kernel's bandwidth: at which the base model's samples have `share` (K - 1) neighbours, on average.

    The number grows with h from 1 (the nearest alone) to K - 1 (all alike), in any dimension; bisection on log h.
    At least 1.5, for groups of a few. Raises ValueError when all features of every group agree.
    """
    phi = phi.double()
    scale = calibrate(phi) * math.sqrt(phi.shape[2])  # the root mean square distance from the mean
    wanted, low, high = max(1.5, share * (phi.shape[1] - 1)), math.log(1e-4 * scale), math.log(1e4 * scale)
    while high - low > 1e-9:
        middle = (low + high) / 2
        enough = neighbours(phi, math.exp(middle)).mean().item() > wanted
        low, high = (low, middle) if enough else (middle, high)
    return math.exp(high)


def calibrate(phi: Float[Tensor, "G K D"]) -> float:
    """The bandwidth h with D h^2 = mean group variance of phi, features of the *base* model.

    Raises ValueError when all features of every group agree: there is no scale to calibrate to.
    """
    h2 = deviations(phi).square().mean().item()
    if not h2 > 0:
        raise ValueError("the base model's features do not vary within any group, so no bandwidth can be calibrated")
    return math.sqrt(h2)


@dataclass(frozen=True)
class EntropyLaw:
    """The fitted law R = -a exp(H) + b and its coefficient of determination."""

    a: float
    b: float
    r2: float

    def __call__(self, entropy: Float[Tensor, "*n"]) -> Float[Tensor, "*n"]:
        return self.b - self.a * entropy.exp()


def fit_entropy_law(entropy: Tensor, reward: Tensor) -> EntropyLaw:
    """Least squares of R = -a exp(H) + b over the points of a training run (figure 3), both [n].

    Use entropies per dimension: exp of a sum overflows. Raises ValueError for fewer than 3 points.
    """
    x, y = torch.as_tensor(entropy).double().exp(), torch.as_tensor(reward).double()
    if x.shape != y.shape or x.ndim != 1 or len(x) < 3:
        raise ValueError(f"the law needs two vectors of at least 3 points, got {tuple(x.shape)} and {tuple(y.shape)}")
    dx, dy = x - x.mean(), y - y.mean()
    slope = (dx @ dy / (dx @ dx)).item()
    residual = dy - slope * dx
    return EntropyLaw(a=-slope, b=(y.mean() - slope * x.mean()).item(), r2=1 - (residual @ residual / (dy @ dy)).item())
