"""Many modes under GRPO with a diversity bonus, exactly: which survive, and with what share.

A policy puts probability p_m on M modes; reward R_m and features c_m are constant on each. A group of K
samples has n_m in mode m, q = n / K. The expected advantage of a sample of mode m, over its K - 1 fellows,

    pull_m(p) = E [ A_m(i + e_m) ],     i ~ Multinomial(K - 1, p),        sum_m p_m pull_m = 0,

is all that reaches the policy: the natural gradient is dp_m/dtau = p_m pull_m =: drift_m (proofs/P15).
With PEC and centred advantages pull_m = (K - 1) / K (dF/dp_m - sum_n p_n dF/dp_n), a gradient, of

    F(p) = sum_m p_m R_m + lambda / (2 h^2) (K - 2) / K V(p),      V = 1/2 sum_mn p_m p_n ||c_m - c_n||^2.

V is Rao's quadratic entropy, concave. From any interior start the flow ends at the maximiser of F, a
quadratic programme (`rest_point`). For modes all Delta apart it is Martins and Astudillo's sparsemax
(arXiv 1602.02068), the point of the simplex nearest to R / c,

    p* = sparsemax(R / c),      c = lambda Delta^2 / (2 h^2) (K - 2) / K,

and the m-th best mode lives iff lambda > 2 h^2 / Delta^2 K / (K - 2) sum_{n<m} (R_n - R_m) (`thresholds`).
A bonus b(i) for having i fellows in one's own mode, as the kernel's is for such modes, rests where
R_m + E_{i ~ Binomial(K-2, p_m)} b(i) agrees on all living modes (`counted_rest_point`): softmax, for -log p.

    symbol    meaning                                       in code
    p, R      share and reward of each mode                 p, reward [M]
    c_m       features of each mode                         features [M, D]
    Delta     distance of the features, where all agree     feature_distance
    h, K      bandwidth, group size                         bandwidth, group_size
    lambda    weight on the log-density *summed* over D     weight; `methods.PEC` averages, its weight is D lambda

float64 tensors. Two modes have a module of their own, two_modes.py.
"""

import math
from itertools import combinations

import torch
from torch import Tensor


def compositions(total: int, modes: int) -> Tensor:
    """All ways to put `total` samples into `modes` modes, [binom(total + modes - 1, modes - 1), modes]."""
    bars = torch.tensor(list(combinations(range(total + modes - 1), modes - 1))).view(-1, modes - 1)
    edges = torch.nn.functional.pad(torch.nn.functional.pad(bars, (1, 0), value=-1), (0, 1), value=total + modes - 1)
    return edges.diff(dim=1) - 1


def bonus(counts: Tensor, features: Tensor, bandwidth: float, space: str = "perceptual") -> Tensor:
    """-log density of a sample of each mode in groups with these counts, [..., M] -> [..., M], nats, less a constant.

    space as in methods.py: perceptual, the Gaussian around the group's mean; kernel, the others' kernel
    density. 0 for a mode without samples, which has no meaning.
    """
    counts = counts.to(features)
    if space == "perceptual":
        mean = counts @ features / counts.sum(-1, keepdim=True)
        return (features - mean[..., None, :]).square().sum(-1) / (2 * bandwidth**2)
    others = (counts[..., None, :] - torch.eye(len(features)).to(features)).clamp_min(0)  # [..., M, M], self left out
    nearness = -(features[:, None] - features).square().sum(-1) / (2 * bandwidth**2)
    log_density = (others.log() + nearness).logsumexp(-1) - (counts.sum(-1, keepdim=True) - 1).log()
    return -log_density.where(counts > 0, 0)


def pull(
    p: Tensor,
    reward: Tensor,
    features: Tensor,
    weight: float,
    bandwidth: float,
    group_size: int,
    std_normalize: bool = True,
    space: str = "perceptual",
) -> Tensor:
    """E[A | a sample of mode m], [M], also where p_m = 0: whether a lost mode could come back.

    Sums over binom(K + M - 2, M - 1) groups. Advantages are not clipped.
    """
    K, M = group_size, len(p)
    fellows = compositions(K - 1, M)
    log_choose = math.lgamma(K) - torch.lgamma(fellows.double() + 1).sum(1)
    probability = (log_choose + torch.xlogy(fellows, p).sum(1)).exp()
    counts = fellows[:, None] + torch.eye(M, dtype=torch.long)  # [groups, m, M]: a sample of m among its fellows
    shaped = reward + weight * bonus(counts, features, bandwidth, space)
    centred = shaped - (counts * shaped).sum(-1, keepdim=True) / K
    advantage = centred.diagonal(dim1=1, dim2=2)
    if std_normalize:
        advantage = advantage / (((counts * centred.square()).sum(-1) / (K - 1)).sqrt() + 1e-4)
    return probability @ advantage


def drift(p: Tensor, *world, **options) -> Tensor:
    """dp/dtau = p_m pull_m of the natural policy gradient, [M], sums to 0. Arguments as `pull`."""
    return p * pull(p, *world, **options)


def objective(p: Tensor, reward: Tensor, features: Tensor, weight: float, bandwidth: float, group_size: int) -> Tensor:
    """F(p), what centred GRPO with PEC climbs: [..., M] -> [...]."""
    variance = p @ features.square().sum(1) - (p @ features).square().sum(-1)
    return p @ reward + weight / (2 * bandwidth**2) * (group_size - 2) / group_size * variance


def rest_point(reward: Tensor, features: Tensor, weight: float, bandwidth: float, group_size: int) -> Tensor:
    """p* [M], the maximiser of F over the simplex, exactly; its support are the entries > 0.

    Some maximiser lives on modes with affinely independent features, where F is strictly concave (proofs/P15). So the
    stationary point of F is found on every set of at most D + 1 modes, and of those inside the simplex the best is
    taken: 2^M small systems. Where several p are best, on a null set of rewards, it is one of the smallest supports.
    Raises ValueError for more than 16 modes.
    """
    M, D = features.shape
    if M > 16:
        raise ValueError(f"the search over all supports takes at most 16 modes, got {M}")
    curvature = weight / bandwidth**2 * (group_size - 2) / group_size
    centred = features - features.mean(0)  # V does not care, rounding does
    slope, gram = reward + curvature / 2 * centred.square().sum(1), curvature * centred @ centred.T
    best = torch.nn.functional.one_hot(reward.argmax(), M).to(reward)
    for size in range(2, min(M, D + 1) + 1) if curvature > 0 else ():
        sets = torch.tensor(list(combinations(range(M), size)))
        system = torch.ones(len(sets), size + 1, size + 1, dtype=gram.dtype)  # gram p + nu = slope, sum p = 1
        system[:, -1, -1] = 0
        system[:, :-1, :-1] = gram[sets[:, :, None], sets[:, None, :]]
        right = torch.cat([slope[sets], torch.ones(len(sets), 1).to(slope)], 1)
        solution, singular = torch.linalg.solve_ex(system, right)
        inside = (singular == 0) & (solution[:, :-1] > 0).all(1)
        p = torch.zeros(int(inside.sum()), M, dtype=gram.dtype).scatter(1, sets[inside], solution[inside, :-1])
        p = torch.cat([best[None], p / p.sum(1, keepdim=True)])
        best = p[objective(p, reward, centred, weight, bandwidth, group_size).argmax()]
    return best


def sparsemax(z: Tensor) -> Tensor:
    """The point of the simplex nearest to z, [M] -> [M]: max(z - nu, 0) with the nu that makes the sum 1."""
    top = z.sort(descending=True).values
    excess = top.cumsum(0) - 1
    size = int((torch.arange(1, len(z) + 1) * top > excess).sum())
    return (z - excess[size - 1] / size).clamp_min(0)


def thresholds(reward: Tensor, feature_distance: float, bandwidth: float, group_size: int) -> Tensor:
    """The weight above which each of M equidistant modes survives PEC, [M]; 0 for the best, inf for K = 2."""
    behind = (reward[:, None] - reward).clamp_min(0).sum(0)  # sum over better n of R_n - R_m
    factor = group_size / (group_size - 2) if group_size > 2 else math.inf
    return torch.where(behind > 0, 2 * bandwidth**2 / feature_distance**2 * factor * behind, 0.0)


def kernel_bonus(weight: float, feature_distance: float, bandwidth: float, group_size: int) -> Tensor:
    """b(i), i = 0 .. K - 2: the kernel's bonus for i fellows in one's own of modes that all lie Delta apart, [K - 1]."""
    alike = torch.arange(group_size - 1, dtype=torch.float64) / (group_size - 1)
    return -weight * torch.logaddexp(alike.log(), (1 - alike).log() - feature_distance**2 / (2 * bandwidth**2))


def counted_rest_point(reward: Tensor, bonus: Tensor) -> Tensor:
    """p* [M] of centred GRPO with the falling bonus b(i) [K - 1] for i fellows in one's own mode.

    R_m + E_{i ~ Binomial(K-2, p_m)} b(i) = nu on the living modes and <= nu on the others, by bisection.
    """
    n = len(bonus) - 1
    i = torch.arange(n + 1, dtype=torch.float64)
    log_choose = math.lgamma(n + 1) - torch.lgamma(i + 1) - torch.lgamma(n - i + 1)

    def expected(p: Tensor) -> Tensor:
        p = p[..., None]
        return (log_choose + torch.xlogy(i, p) + torch.xlogy(n - i, 1 - p)).exp() @ bonus

    def bisect(above, low: Tensor, high: Tensor) -> Tensor:
        for _ in range(60):
            middle = (low + high) / 2
            up = above(middle)
            low, high = middle.where(up, low), high.where(up, middle)
        return (low + high) / 2

    def shares(nu: Tensor) -> Tensor:  # the share at which the mode's shaped reward has fallen to nu
        p = bisect(lambda p: reward + expected(p) > nu, torch.zeros_like(reward), torch.ones_like(reward))
        return p.where(reward + bonus[0] > nu, 0)

    nu = bisect(lambda nu: shares(nu).sum() > 1, reward.max() + bonus[-1], reward.max() + bonus[0])
    p = shares(nu)
    return p / p.sum()
