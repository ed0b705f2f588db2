"""Two modes under PEC and GRPO, exactly, at finite group size: what critical lambda becomes in practice.

The better mode A pays delta more than B; features are constant on each mode and Delta apart. In a group
of K samples with j in A, q = j / K, a sample of A lies (1 - q) Delta from the group's mean and one of B
q Delta. So the two shaped rewards differ by

    gap_j = delta + c (1 - 2 q),        c = lambda Delta^2 / (2 h^2),

and if p is the policy's probability of A, the expected GRPO update is a positive multiple of drift(p) Gamma,
Gamma = E[s 1_A] for the score s of the trained steps; it moves p with the sign of

    drift(p) = E_j [ gap_j q (1 - q) w_j ],     j ~ Binomial(K, p)                (proofs/P11)
    w_j = 1                                                       centred advantages
    w_j = 1 / (|gap_j| sqrt(q (1 - q) K / (K - 1)) + 1e-4)        divided by the group's std, GRPO's default

wherever <Gamma, grad p> > 0, as it is for the full score, where Gamma = grad p. Nothing else of the policy enters:
not its network, its steps, its noise, nor the optimiser's step size.
Either way both modes survive iff

    lambda > lambda_c = 2 delta h^2 / Delta^2 * K / (K - 2),

and with centred advantages they rest at p* = 1/2 + delta h^2 / (lambda Delta^2) * K / (K - 2); with
std-normalised ones p* is the root of drift. For K -> inf both are the law of `mixture.fixed_point`.

Any other bonus whose gap falls with j, and any advantages that keep the gap's sign, have the same rule (proofs/P14): both
modes survive iff a sample that is alone in the worse mode gets more than the others, gap_{K-1} < 0. For the leave-one-out
kernel density, with rho = exp(-Delta^2 / (2 h^2)),

    gap_j    = delta + lambda log [ (K - j - 1 + j rho) / (j - 1 + (K - j) rho) ],
    lambda_c = delta / [ Delta^2 / (2 h^2) + log((K - 2 + rho) / (K - 1)) ].

lambda multiplies the log-density *summed* over features; `methods.PEC` averages: its weight is D times this.
"""

import math


def gap(j: int, weight: float, reward_gap: float, feature_distance: float, bandwidth: float, group_size: int) -> float:
    """gap_j, shaped reward of the better mode's samples less the other's, in a group with j of them."""
    return reward_gap + weight * feature_distance**2 / (2 * bandwidth**2) * (1 - 2 * j / group_size)


def kernel_gap(
    j: int, weight: float, reward_gap: float, feature_distance: float, bandwidth: float, group_size: int
) -> float:
    """gap_j, 1 <= j <= K - 1, when the bonus is -lambda log of the leave-one-out kernel density (`space="kernel"`)."""
    exponent = feature_distance**2 / (2 * bandwidth**2)

    def log_density(own: int, other: int) -> float:  # of a sample with so many fellows, less log(K - 1)
        return math.log(own + other * math.exp(-exponent)) if own else math.log(other) - exponent

    return reward_gap + weight * (log_density(group_size - j - 1, j) - log_density(j - 1, group_size - j))


def drift(
    p: float,
    weight: float,
    reward_gap: float,
    feature_distance: float,
    bandwidth: float,
    group_size: int,
    std_normalize: bool = True,
) -> float:
    """The expected update of the better mode's probability 0 < p < 1, up to a positive factor."""
    K, total = group_size, 0.0
    for j in range(1, K):
        q, g = j / K, gap(j, weight, reward_gap, feature_distance, bandwidth, K)
        w = 1 / (abs(g) * math.sqrt(q * (1 - q) * K / (K - 1)) + 1e-4) if std_normalize else 1
        log_choose = math.lgamma(K + 1) - math.lgamma(j + 1) - math.lgamma(K - j + 1)
        total += math.exp(log_choose + j * math.log(p) + (K - j) * math.log1p(-p)) * g * q * (1 - q) * w
    return total


def critical_lambda(reward_gap: float, feature_distance: float, bandwidth: float, group_size: int) -> float:
    """lambda_c at finite K; inf for K = 2, where the bonus is the same for both members of a group."""
    if group_size == 2:
        return math.inf
    return 2 * reward_gap * bandwidth**2 / feature_distance**2 * group_size / (group_size - 2)


def kernel_critical_lambda(reward_gap: float, feature_distance: float, bandwidth: float, group_size: int) -> float:
    """lambda_c of the kernel bonus: the reward gap over the bonus that a sample alone in its mode gets; inf for K = 2."""
    if group_size == 2:
        return math.inf
    exponent = feature_distance**2 / (2 * bandwidth**2)
    return reward_gap / (exponent + math.log1p(math.expm1(-exponent) / (group_size - 1)))


def fixed_point(
    weight: float,
    reward_gap: float,
    feature_distance: float,
    bandwidth: float,
    group_size: int,
    std_normalize: bool = True,
) -> float:
    """p*, where the drift changes sign (it does so at most once); 1 for lambda <= lambda_c."""
    if weight <= critical_lambda(reward_gap, feature_distance, bandwidth, group_size):
        return 1.0
    low, high = 0.5, 1.0
    while high - low > 1e-12:
        p = (low + high) / 2
        ahead = drift(p, weight, reward_gap, feature_distance, bandwidth, group_size, std_normalize) > 0
        low, high = (p, high) if ahead else (low, p)
    return (low + high) / 2
