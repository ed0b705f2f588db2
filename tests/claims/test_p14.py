"""Claim P14: one threshold for every falling bonus and every sign-preserving advantage.

The oracle writes groups out and sends them through the implementation: `METHODS['pec']` in both spaces, and
`grpo.advantages` or another map of a group's shaped rewards. What is tested are the claim's identity, its one sign
change, and the closed forms of ref/worlds/two_modes.py.
"""

import math
from fractions import Fraction

import mpmath
import numpy as np
import pytest
import scipy.optimize
import scipy.stats
import sympy
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ref.grpo import advantages, start, train
from ref.methods import METHODS, PEC, Group
from ref.settings import Settings
from ref.worlds import many_modes, mixture, two_modes

Z = 6.0  # two-sided normal tail 2e-9; three comparisons in this file: false-failure rate 6e-9

worlds = dict(
    K=st.integers(3, 24),
    gap=st.floats(0.1, 2.0),
    distance=st.floats(0.5, 3.0),
    h=st.floats(0.4, 2.0),
    space=st.sampled_from(["perceptual", "kernel"]),
)


def ranks(shaped):
    """Average rank in the group, centred. Less than 1e-9 is a tie: ranks blow rounding up, see P14's Numerics."""
    above = (shaped[:, :, None] > shaped[:, None] + 1e-9).double().sum(2)
    below = (shaped[:, :, None] < shaped[:, None] - 1e-9).double().sum(2)
    return (above - below) / 2


def centred(shaped):
    return shaped - shaped.mean(1, keepdim=True)


MAPS = {  # shaped rewards [G, K] -> advantages [G, K]
    "centred": lambda s: advantages(s[..., None], math.inf, False)[..., 0],
    "std": lambda s: advantages(s[..., None], math.inf, True)[..., 0],
    "std, clipped": lambda s: advantages(s[..., None], 0.8, True)[..., 0],
    "centred, clipped": lambda s: advantages(s[..., None], 0.05, False)[..., 0],
    "max-abs": lambda s: centred(s) / (centred(s).abs().amax(1, keepdim=True) + 1e-4),
    "ranks": ranks,
    "best only": lambda s: centred(s).clamp_min(0),
    "median": lambda s: s - s.median(1, keepdim=True).values,
}
maps = st.sampled_from(sorted(MAPS))


def groups(K):
    """Group j = 0..K has j of K samples in the better mode, [K + 1, K]."""
    return (torch.arange(K) < torch.arange(K + 1)[:, None]).double()


def shaped_rewards(better, weight, gap, distance, h, space):
    """Reward and PEC's bonus, as the implementation makes them, for 0/1 memberships [G, K]."""
    G, K = better.shape
    group = Group(
        better * gap, (better * distance)[..., None], h, torch.zeros(G, K, 1).double(), torch.ones(1).double()
    )
    return METHODS["pec"](weight, space=space).shape(group)[..., 0]


def implemented_drift(p, shaped, advantage):
    """E[sum over samples of advantage times d log p / dp] p (1 - p) / K over all kinds of group, for p a number or [P]."""
    K, A, p = shaped.shape[1], advantage(shaped), np.asarray(p)[..., None]
    updates = (A * groups(K)).sum(1).numpy() - p * A.sum(1).numpy()  # d log p / dp is (1_A - p) / (p (1 - p))
    return (scipy.stats.binom(K, p).pmf(range(K + 1)) * updates).sum(-1) / K


def coefficients(shaped, advantage):
    """a_j and b_j, j = 0..K: the advantage in the better mode, and minus that in the worse."""
    A = advantage(shaped)
    a, b = A[:, 0].clone(), -A[:, -1].clone()  # sample 0 is the last to leave the better mode, K - 1 the last to join
    a[0] = b[-1] = 0
    return a, b


def critical(space, *world):
    return (two_modes.kernel_critical_lambda if space == "kernel" else two_modes.critical_lambda)(*world)


@pytest.mark.claim("P14")
def test_p14_identity_sympy():
    """E_{Bin(K,p)}[q a_j / p + (1-q) b_j / (1-p)] = E_{Bin(K-1,p)}[a_{i+1} + b_i], all a, b free, K = 2..7."""
    p = sympy.Symbol("p")
    for K in range(2, 8):
        a = [0, *sympy.symbols(f"a1:{K + 1}")]
        b = [*sympy.symbols(f"b0:{K}"), 0]
        a[K], b[0] = 0, 0  # groups of one mode have no advantage

        def mean(n, f):
            return sum(sympy.binomial(n, i) * p**i * (1 - p) ** (n - i) * f(i) for i in range(n + 1))  # noqa: B023

        q = [sympy.Rational(j, K) for j in range(K + 1)]
        left = mean(K, lambda j: q[j] * (1 - p) * a[j] + (1 - q[j]) * p * b[j])  # noqa: B023
        right = p * (1 - p) * mean(K - 1, lambda i: a[i + 1] + b[i])  # noqa: B023
        assert sympy.expand(left - right) == 0
        wrong = p * (1 - p) * mean(K - 1, lambda i: a[i] + b[i])  # noqa: B023  planted: an index forgotten
        assert sympy.expand(left - wrong) != 0


@pytest.mark.claim("P14")
@settings(max_examples=60, deadline=None, derandomize=True)
@given(**worlds, advantage=maps, ratio=st.floats(0.2, 4.0), p=st.floats(0.02, 0.98))
def test_p14_identity_by_enumeration(K, gap, distance, h, space, advantage, ratio, p):
    """The implementation's update is p (1 - p) E[a_{i+1} + b_i] for eight maps and both bonuses.

    Both sides are sums of K + 1 products of numbers up to 10 that are right to about 1e-15 K: 1e-12 leaves room.
    """
    shaped = shaped_rewards(groups(K), ratio * critical(space, gap, distance, h, K), gap, distance, h, space)
    a, b = coefficients(shaped, MAPS[advantage])
    weights = torch.from_numpy(scipy.stats.binom(K - 1, p).pmf(range(K)))
    right = p * (1 - p) * (weights * (a[1:] + b[:-1])).sum().item()
    assert implemented_drift(p, shaped, MAPS[advantage]) == pytest.approx(right, rel=1e-9, abs=1e-12)


@pytest.mark.claim("P14")
@settings(max_examples=60, deadline=None, derandomize=True)
@given(**worlds, ratio=st.floats(0.1, 6.0))
def test_p14_gaps_fall_and_match_the_implementation(K, gap, distance, h, space, ratio):
    """The closed gaps are those of the shaped rewards, fall in j, and the loner's decides the sign of 1 - ratio.

    Bonuses reach 3^2 / (2 * 0.4^2) = 28 times the weight, weights times bonuses some hundred: float64 leaves 1e-11.
    """
    weight = ratio * critical(space, gap, distance, h, K)
    shaped = shaped_rewards(groups(K), weight, gap, distance, h, space)
    closed = two_modes.kernel_gap if space == "kernel" else two_modes.gap
    gaps = [closed(j, weight, gap, distance, h, K) for j in range(1, K)]
    for j, g in enumerate(gaps, 1):
        assert (shaped[j, 0] - shaped[j, -1]).item() == pytest.approx(g, rel=1e-9, abs=1e-9)
    assert all(x > y for x, y in zip(gaps, gaps[1:])) and gaps[0] > 0
    assert gaps[-1] == pytest.approx(gap * (1 - ratio), rel=1e-9, abs=1e-9)  # the whole claim in one line


@pytest.mark.claim("P14")
@settings(max_examples=60, deadline=None, derandomize=True)
@given(**worlds, advantage=maps, ratio=st.floats(0.2, 4.0).filter(lambda r: abs(r - 1) > 0.02))
def test_p14_one_sign_change_and_the_threshold(K, gap, distance, h, space, advantage, ratio):
    """Below the threshold the drift is positive on (0, 1); above it has one zero, from + to -."""
    weight = ratio * critical(space, gap, distance, h, K)
    shaped = shaped_rewards(groups(K), weight, gap, distance, h, space)
    grid = [1e-6, *torch.linspace(0.01, 0.99, 99).tolist(), 0.999, 1 - 1e-6]
    signs = (implemented_drift(grid, shaped, MAPS[advantage]) > 0).tolist()
    assert signs[0]
    assert sum(x != y for x, y in zip(signs, signs[1:])) == (1 if ratio > 1 else 0)
    assert signs[-1] == (ratio < 1)


def bernstein_drift(p, a, b):
    K = len(a) - 1
    weights = scipy.stats.binom(K - 1, p).pmf(range(K))
    return (weights * (np.asarray(a)[1:] + np.asarray(b)[:-1])).sum()


@pytest.mark.claim("P14")
@settings(max_examples=60, deadline=None, derandomize=True)
@given(st.integers(2, 12), st.integers(0, 2**31 - 1))
def test_p14_any_falling_gap(K, seed):
    """Random falling gaps with ties, random advantages of their signs: at most one sign change, by exact fractions.

    p / (1 - p) = x turns the drift into a polynomial with the coefficients binom(K - 1, i) u_i; SymPy counts its roots.
    """
    rng = np.random.default_rng(seed)
    gaps = sorted((int(g) for g in rng.integers(-4, 5, K - 1)), reverse=True)
    gaps[0] = max(gaps[0], 1)
    a = [0, *(int(np.sign(g)) * int(rng.integers(1, 9)) for g in gaps), 0]
    b = [0, *(int(np.sign(g)) * int(rng.integers(1, 9)) for g in gaps), 0]
    u = [a[i + 1] + b[i] for i in range(K)]
    x = sympy.Symbol("x")
    polynomial = sympy.Poly(sum(math.comb(K - 1, i) * c * x**i for i, c in enumerate(u)), x)
    roots = sympy.Poly(polynomial.as_expr() / x ** min(m[0] for m in polynomial.monoms()), x).count_roots(0, None)
    assert roots == (1 if gaps[-1] < 0 else 0)  # a last gap of exactly 0 counts as a lost mode


@pytest.mark.claim("P14")
def test_p14_the_hypotheses_are_needed():
    """Planted: a gap that falls and rises again gives three rest points; advantages of |gap| lose the threshold."""
    K = 12
    wavy = [0, *(1 if j < 3 or 5 < j < 9 else -1 for j in range(1, K)), 0]
    grid = np.linspace(0.001, 0.999, 999)
    signs = [bernstein_drift(p, [g * 6 for g in wavy], [g * 6 for g in wavy]) > 0 for p in grid]
    assert sum(x != y for x, y in zip(signs, signs[1:])) == 3
    shaped = shaped_rewards(groups(K), 2 * critical("kernel", 0.5, 2.0, 1.0, K), 0.5, 2.0, 1.0, "kernel")

    def unsigned(s):
        return centred(s) * (s[:, :1] - s[:, -1:]).sign()

    assert (implemented_drift(grid, shaped, unsigned) > 0).all()
    assert implemented_drift(0.999, shaped, MAPS["ranks"]) < 0


@pytest.mark.claim("P14")
@pytest.mark.parametrize("advantage", sorted(MAPS))
def test_p14_a_tie_is_a_lost_mode(advantage):
    """At lambda_c exactly (K = 4, c = 2, delta = 1: every number a binary fraction) g_{K-1} = 0 and p still drifts to 1.

    Rounding leaves a gap of 1e-15 in place of the tie; a map that divides by 1e-4 makes 1e-11 of it.
    """
    K = 4
    assert Fraction(1) + 2 * (1 - 2 * Fraction(K - 1, K)) == 0
    assert two_modes.critical_lambda(1.0, 2.0, 1.0, K) == 1.0
    assert two_modes.gap(K - 1, 1.0, 1.0, 2.0, 1.0, K) == 0
    shaped = shaped_rewards(groups(K), 1.0, 1.0, 2.0, 1.0, "perceptual")
    for p in (0.01, 0.5, 0.9, 0.999):
        exact = shaped.clone()
        exact[K - 1] = exact[K - 1, 0]  # the tie without its rounding
        assert implemented_drift(p, exact, MAPS[advantage]) > 0
        assert implemented_drift(p, shaped, MAPS[advantage]) == pytest.approx(
            implemented_drift(p, exact, MAPS[advantage]), abs=2e-11
        )


@pytest.mark.claim("P14")
def test_p14_kernel_threshold_and_its_limits():
    """Against 50 digits; 2 delta h^2 / Delta^2 for K -> inf or h -> 0, times (K - 1) / (K - 2) for h -> inf.

    Planted: that the limit were 2 delta h^2 / Delta^2 for h -> inf too, or the plan's PEC factor K / (K - 2).
    """
    mpmath.mp.dps = 50

    def exact(gap, distance, h, K):
        e = mpmath.mpf(distance) ** 2 / (2 * mpmath.mpf(h) ** 2)
        return mpmath.mpf(gap) / (e + mpmath.log((K - 2 + mpmath.exp(-e)) / (K - 1)))

    for K in (3, 8, 24):
        for h in (0.3, 1.0, 3.0, 1e3):
            got, base = two_modes.kernel_critical_lambda(0.5, 2.0, h, K), 2 * 0.5 * h**2 / 4
            # the two terms of the bracket cancel down to a share (K - 2) / (K - 1) >= 1/2 of the first
            assert got == pytest.approx(float(exact(0.5, 2.0, h, K)), rel=1e-14)
            assert base < got <= base * (K - 1) / (K - 2) * (1 + 1e-14) < base * K / (K - 2)
        base = 2 * 0.5 / 4
        # corrections: (K-1)/(K-2) - got/base = O(Delta^2 / h^2); log((K-2)/(K-1)) 2h^2 / Delta^2 as h -> 0
        assert two_modes.kernel_critical_lambda(0.5, 2.0, 1e3, K) / 1e6 == pytest.approx(
            base * (K - 1) / (K - 2), rel=1e-5
        )
        assert two_modes.kernel_critical_lambda(0.5, 2.0, 1e3, K) / 1e6 != pytest.approx(base, rel=0.02)
        assert two_modes.kernel_critical_lambda(0.5, 2.0, 0.05, K) / 0.05**2 == pytest.approx(base, rel=1e-3)
    for h in (0.3, 1.0, 3.0):  # K -> inf: the relative correction is below 1 / (K - 2)
        assert two_modes.kernel_critical_lambda(0.5, 2.0, h, 10**6) == pytest.approx(0.25 * h**2, rel=1.1e-6)
    assert two_modes.kernel_critical_lambda(0.5, 2.0, 1.0, 2) == math.inf
    assert shaped_rewards(groups(2), 9.0, 0.0, 2.0, 1.0, "kernel")[1].diff().abs() < 1e-12  # a pair: no bonus


@pytest.mark.claim("P14")
def test_p14_large_groups_rest():
    """K -> inf: p* = (e^{delta/lambda} - rho) / ((1 - rho)(1 + e^{delta/lambda})), between sigmoid and P11's line."""
    gap, distance, lam = 0.5, 2.0, 0.7
    for h in (0.4, 1.0, 1.3):
        rho, e = math.exp(-(distance**2) / (2 * h**2)), math.exp(gap / lam)
        law = (e - rho) / ((1 - rho) * (1 + e))
        errors = []
        for K in (32, 128):
            p = many_modes.counted_rest_point(
                torch.tensor([gap, 0.0]).double(), many_modes.kernel_bonus(lam, distance, h, K)
            )
            errors.append(abs(p[0].item() - law))
        assert errors[1] < errors[0] / 3 and errors[1] < 2e-2  # the error falls as 1 / K, by four
    assert (math.exp(gap / lam) - 0) / (1 + math.exp(gap / lam)) == pytest.approx(1 / (1 + math.exp(-gap / lam)))


@pytest.mark.claim("P14")
@settings(max_examples=20, deadline=None, derandomize=True)
@given(
    **{k: worlds[k] for k in ("K", "gap", "distance", "h", "space")}, others=st.integers(1, 3), ratio=st.floats(0.5, 2)
)
def test_p14_total_collapse_of_many_modes(K, gap, distance, h, space, others, ratio):
    """All mass on the best of several equidistant modes is stable iff g_{K-1} > 0 for each of the others."""
    if abs(ratio - 1) < 0.02:
        ratio = 1.05
    K = min(K, 8)
    M = others + 1
    features = torch.eye(M).double() * distance / math.sqrt(2)
    reward = torch.tensor([gap, *(-0.1 * n for n in range(others))]).double()  # the second best is `gap` behind
    weight = ratio * critical(space, gap, distance, h, K)
    vertex = torch.eye(M).double()[0]
    for normalize in (False, True):
        back = many_modes.pull(vertex, reward, features, weight, h, K, normalize, space)
        assert (back[1:].max().item() > 0) == (ratio > 1)


@pytest.mark.claim("P14")
@pytest.mark.parametrize("advantage", ["centred", "centred, clipped", "best only"])
def test_p14_sampled_groups(advantage):
    """200 000 sampled groups under the kernel bonus: no mean update at the root, and one at a wrong root.

    Updates are bounded by 5 K and their mean is normal to far below Z (Berry-Esseen, 1 / sqrt(200 000)).
    """
    K, G, gap, distance, h = 8, 200_000, 0.5, 2.0, 1.0
    weight = 1.6 * two_modes.kernel_critical_lambda(gap, distance, h, K)
    generator = torch.Generator().manual_seed(14)

    def root(shaped):
        return scipy.optimize.brentq(lambda p: implemented_drift(p, shaped, MAPS[advantage]), 0.4, 1 - 1e-9)

    def z(p):
        better = (torch.rand(G, K, generator=generator, dtype=torch.float64) < p).double()
        A = MAPS[advantage](shaped_rewards(better, weight, gap, distance, h, "kernel"))
        update = (A * (better - p)).mean(1)
        return abs(update.mean() / (update.std() / math.sqrt(G))).item()

    assert z(root(shaped_rewards(groups(K), weight, gap, distance, h, "kernel"))) < Z
    j, rho = torch.arange(K + 1).double()[:, None], math.exp(-(distance**2) / (2 * h**2))
    own, other = (j + (K - j) * rho).log(), (K - j + j * rho).log()  # planted: a sample counts as its own neighbour
    assert z(root(groups(K) * (gap - weight * own) - (1 - groups(K)) * weight * other)) > Z
    assert z(root(shaped_rewards(groups(K), weight, gap, distance, h, "perceptual"))) > Z  # planted: PEC's root


@pytest.mark.claim("P14")
@pytest.mark.parametrize("ratio", [0.6, 1.6])
def test_p14_trained_flow(ratio):
    """A flow trained by grpo.train with the kernel bonus, std-normalised: one mode dies below lambda_c, rests above.

    Deterministic on one machine. The mean over 40 iterations of 512 samples has standard error 0.005 (P11): 0.03 is six.
    """
    torch.set_num_threads(1)
    K, gap, distance, h = 16, 0.5, 2.0, 1.0
    weight = ratio * two_modes.kernel_critical_lambda(gap, distance, h, K)
    world = mixture.GaussianMixture(torch.tensor([[1.5, 0.0], [-1.5, 0.0]]), 0.3)
    model = mixture.MixtureFlow(world, width=32, seed=0)
    setup = Settings(iterations=120, groups=32, group_size=K, updates=1, steps=6, lr=2e-3)
    state = start(model, setup)
    state.bandwidth = h

    def phi(x):
        return x[:, :1].sign()

    reward = mixture.tilted(world, torch.tensor([gap, 0.0]))
    shares = [
        s.reward.mean().item() / gap for s in train(model, [""], reward, phi, PEC(weight, space="kernel"), setup, state)
    ]
    shaped = shaped_rewards(groups(K), weight, gap, distance, h, "kernel")
    expected = 1.0
    if ratio > 1:
        expected = scipy.optimize.brentq(lambda p: implemented_drift(p, shaped, MAPS["std"]), 0.4, 1 - 1e-9)
    share = sum(shares[-40:]) / 40
    assert share == pytest.approx(expected, abs=0.03)
    pec = two_modes.fixed_point(weight, gap, distance, h, K)
    softmax = 1 / (1 + math.exp(-gap / weight))
    assert abs(share - (softmax if ratio < 1 else pec)) > 0.03  # planted: softmax's 'no threshold'; PEC's rest point
