"""A diversity in place of a weight: lambda as the multiplier of a constraint (proofs/P19).

Instead of guessing lambda, ask for a feature variance V* and let lambda find itself: it rises while the variance V
is too small, and falls while it is too large. The better of two modes holds p, features are Delta apart, so
V = Delta^2 p (1 - p); rewards differ by delta. In each iteration

    lambda     += eta (V* - V),                     not below 0
    logit p    += (r / delta) [delta + Lambda Delta^2 (1 - 2 p)],
    Lambda      = (lambda + kappa (V* - V)) / (2 h^2) (K - 2) / K,    not below 0

r is the learner's speed, kappa a proportional part that damps. While Lambda is 0 (on average: V's own noise must not
decide), V is too large and falling, and lambda waits: below it lies nothing that could be less. Both rest at

    p* = 1/2 + u / 2,    u = sqrt(1 - 4 V* / Delta^2),      lambda* = 2 delta h^2 / (Delta^2 u) K / (K - 2),

lambda* being P11's law read backwards. Near it they swing, x'' + 2 gamma x' + omega^2 x = 0, with

    omega^2 = eta r u^2 (1 - u^2) Delta^4 / (8 delta h^2) (K - 2) / K,
    gamma   = r (1 - u^2) / (4 u) + kappa omega^2 / (2 eta).

    symbol        meaning                                                in code
    V*            feature variance asked for (metrics.feature_variance)  target
    lambda        weight on log p_perc *summed* over features            weight
    eta, kappa    steps of lambda                                        integral, proportional
    r             logit p gained per iteration by the reward alone       speed

`methods.PEC` averages over the D features: its weight is D lambda. `hold` is the rule without units, and `estimate`,
lambda* for two equal modes, where it starts.
"""

import math
from statistics import fmean


def rest_point(
    target: float, reward_gap: float, feature_distance: float, bandwidth: float, group_size: int
) -> tuple[float, float]:
    """(p*, lambda*): the better mode's share and the weight where V = V*. Centred advantages.

    Raises ValueError unless 0 < V* < Delta^2 / 4, what two modes can have, and for groups of two, where PEC is dead.
    """
    if group_size < 3:
        raise ValueError(f"PEC does nothing in groups of {group_size}: no weight holds a constraint")
    most = feature_distance**2 / 4
    if not 0 < target < most:
        raise ValueError(f"two modes {feature_distance} apart have variances between 0 and {most}, not {target}")
    u = math.sqrt(1 - target / most)
    weight = 2 * reward_gap * bandwidth**2 / (feature_distance**2 * u) * group_size / (group_size - 2)
    return (1 + u) / 2, weight


def swing(
    target: float,
    reward_gap: float,
    feature_distance: float,
    bandwidth: float,
    group_size: int,
    speed: float,
    integral: float,
    proportional: float = 0.0,
) -> tuple[float, float]:
    """(gamma, omega), per iteration, of p and lambda near their rest point. Errors as `rest_point`.

    They ring iff gamma < omega: amplitude exp(-gamma n), angular frequency sqrt(omega^2 - gamma^2).
    """
    p, _ = rest_point(target, reward_gap, feature_distance, bandwidth, group_size)
    u, finite = 2 * p - 1, (group_size - 2) / group_size
    unit = speed * u**2 * (1 - u**2) * feature_distance**4 / (8 * reward_gap * bandwidth**2) * finite
    friction = speed * (1 - u**2) / (4 * u) + proportional * unit / 2
    return friction, math.sqrt(integral * unit)


def hold(
    weight: float,
    share: float,
    kept: float,
    target: float,
    reward_std: float,
    integral: float = 2.0,
    proportional: float = 40.0,
) -> tuple[float, float]:
    """One iteration of the rule, without units: (the next `weight`, PEC's weight to use now), both >= 0 if `weight` is.

    share       feature variance of this iteration's groups over that of the base model
    kept        the same, averaged over some iterations before: it decides whether `weight` waits
    target      the share asked for
    reward_std  within-group standard deviation of the *base* model's rewards

    For PEC's weight (per dimension) with the calibrated bandwidth, so that neither phi's scale, nor D, nor
    the reward's enters. proofs/P19 derives what bounds the two gains: for learners that add 0.01 to 0.1 to logit p an iteration
    and targets of 0.5 to 0.95 the damping gamma / omega lies between 0.5 and 2.5.
    """
    lacking = (target - share) * reward_std
    if weight + proportional * (target - kept) * reward_std > 0:
        weight = max(0.0, weight + integral * lacking)
    return weight, max(0.0, weight + proportional * lacking)


def estimate(target: float, reward_std: float, group_size: int) -> float:
    """PEC's weight under which two modes, equal in the base model, keep `target` of its variance:
    reward_std / (k sqrt(1 - target)), k = (K-2)/(K-1). Targets above 0.9 count as 0.9, lest there be no bound at 1."""
    return reward_std * (group_size - 1) / (group_size - 2) / math.sqrt(1 - min(target, 0.9))


def ceiling(group_size: int) -> float:
    """The largest share of their variance that two equal modes hold, K >= 3, under std-normalised advantages.

    However large lambda, a group with half of its samples or fewer in the better mode still prefers it, if K is even: the
    root of sum_j Binomial(K, p)_j sign_j sqrt(j (K - j)), sign_j = 1 for j <= K / 2, else -1. For odd K it is 1.
    """
    K, low, high = group_size, 0.5, 1.0
    while high - low > 1e-9:
        p = (low + high) / 2
        ahead = sum(
            math.comb(K, j) * p**j * (1 - p) ** (K - j) * math.sqrt(j * (K - j)) * (1 if 2 * j <= K else -1)
            for j in range(1, K)
        )
        low, high = (p, high) if ahead > 0 else (low, p)
    return 4 * low * (1 - low)


def out_of_reach(weight: float, share: float, target: float, reward_std: float, group_size: int) -> str:
    """What to say when a target is more than the policy can hold, "" as long as it may be held.

    Three times the `estimate` holds all but a ninth of what two modes give up for it: if `share`, an average over some
    iterations, still lacks more than 0.02, it is not weight that is missing.
    """
    if weight <= 3 * estimate(target, reward_std, group_size) or share > target - 0.02:
        return ""
    most = ceiling(group_size)
    caps = f"; groups of {group_size} hold {most:.2f} of two modes' at most, if advantages are std-normalised"
    return (
        f"the target diversity {target} seems out of reach: the groups keep {share:.2f} of the base model's variance though "
        f"lambda has grown to {weight / reward_std:.0f} standard deviations of its reward{caps if most < target else ''}; "
        "ask for less, or take larger groups"
    )


def held(base: dict, final: dict, history: list[dict]) -> dict[str, float]:
    """What a run kept of the base model's feature variance, by the ODE sampler of the evaluation ("diversity") and by the
    SDE of the last quarter of its training ("diversity_sde"), and the mean weight that did so."""
    last = history[-(len(history) // 4 or 1) :] or [{"diversity": 1.0, "weight": 0.0}]
    return {
        "diversity": final["feature_variance"] / base["feature_variance"],
        "diversity_sde": fmean(entry["diversity"] for entry in last),
        "weight": fmean(entry["weight"] for entry in last),
    }
