"""Entropies of a flow policy: closed forms, estimates, and the KL divergence between two policies.

For a Gaussian step with standard deviation s_i in d dimensions (proofs/P01),

    C_i = -(d/2) log(2 pi s_i^2)             the log-normaliser (the paper's C_t; its value is a reading)
    H_i = d/2 - C_i = (d/2) log(2 pi e s_i^2)

so H_i holds no theta and no x. The free coordinates of a path, x_0 and the outcomes of the stochastic
steps S, have (proofs/P02)

    H(x_0, (x_{i+1})_{i in S}) = H(x_0) + sum_{i in S} H_i,

(x_0..x_N all together have entropy -inf where a step is deterministic), and two policies that share the
kernel differ by (proofs/P05)

    KL(p_theta || p_ref) = ||mu_theta - mu_ref||^2 / (2 s_i^2).

All in nats; "sum" is over the d dimensions, "mean" is per dimension. A deterministic step has s_i = 0
and differential entropy -inf, which is true and is reported; sums leave these steps out.
"""

import math

import torch
from jaxtyping import Float
from torch import Tensor

from ref.policy import reduce
from ref.schedule import FlowSchedule


def log_normalizer(schedule: FlowSchedule, dim: int) -> Float[Tensor, " N"]:
    """C_i = -(d/2) log(2 pi s_i^2), [N], nats; +inf at deterministic steps. Project page, H = d/2 - C_t."""
    return -0.5 * dim * (2 * math.pi * schedule.std.double().square()).log()


def policy_entropy(schedule: FlowSchedule, dim: int, reduction: str = "sum") -> Float[Tensor, " N"]:
    """H_i = d/2 - C_i of every transition, [N], nats, float64; divided by d when reduction is "mean"."""
    entropy = dim / 2 - log_normalizer(schedule, dim)
    return entropy if reduction == "sum" else entropy / dim


def path_entropy(schedule: FlowSchedule, dim: int) -> Float[Tensor, ""]:
    """H(x_0) + sum of H_i over the stochastic steps, of the path's free coordinates; 0-d, nats, x_0 ~ N(0, I) (P02)."""
    start = 0.5 * dim * math.log(2 * math.pi * math.e)
    return start + policy_entropy(schedule, dim)[list(schedule.steps)].sum()


def entropy_floor(schedule: FlowSchedule, dim: int) -> Float[Tensor, ""]:
    """H_i of the last stochastic step, 0-d, nats: H(z) of the state z it leads to is never lower (proofs/P17).

    z is the last noisy state, x_{N-1} by default; H(z) less this floor is I(path; z), the nats that training can
    still move from "which image" to "which path to it". Raises ValueError for a schedule without noise.
    """
    if not schedule.steps:
        raise ValueError("a schedule without stochastic steps has no entropy to lose, hence no floor")
    return policy_entropy(schedule, dim)[schedule.steps[-1]]


def gaussian_kl(
    mean: Float[Tensor, " B *latent"],
    other: Float[Tensor, " B *latent"],
    std: Float[Tensor, ""] | float,
    reduction: str = "mean",
) -> Float[Tensor, " B"]:
    """KL(N(mean, std^2 I) || N(other, std^2 I)), [B], nats; symmetric in the means (proofs/P05)."""
    return reduce(((mean - other) / std).square() / 2, reduction)


def knn_entropy(x: Float[Tensor, "n d"], k: int = 3) -> Float[Tensor, ""]:
    """Differential entropy (0-d, nats) of the density behind samples x [n, d].

    Kozachenko and Leonenko's estimate from the distance to the k-th neighbour, in the form of
    Kraskov et al. (2004): psi(n) - psi(k) + log V_d + d mean log r_k. Raises ValueError unless n > k.
    """
    n, d = x.shape
    if n <= k:
        raise ValueError(f"knn_entropy with k={k} needs more than {k} samples, got {n}")
    from scipy.spatial import cKDTree

    points = x.detach().cpu().double().numpy()
    radius = torch.from_numpy(cKDTree(points).query(points, k + 1)[0][:, k])
    log_volume = d / 2 * math.log(math.pi) - math.lgamma(d / 2 + 1)
    psi = torch.special.digamma(torch.tensor([float(n), float(k)], dtype=torch.float64))
    return psi[0] - psi[1] + log_volume + d * radius.log().mean()
