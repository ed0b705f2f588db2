"""P11: critical lambda at finite group size, with centred and with std-normalised advantages.

The oracle enumerates groups through the implementation (`METHODS['pec']`, `grpo.advantages`), or
trains; the closed forms of ref/worlds/two_modes.py are what is tested.
"""

import itertools
import math

import pytest
import scipy.optimize
import scipy.stats
import sympy
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.distributions import Normal

from ref.grpo import advantages, start, train
from ref.methods import METHODS, Group
from ref.schedule import FlowSchedule, time_grid
from ref.settings import Settings
from ref.worlds import mixture, two_modes

from .tools import Z, make_group

worlds = dict(
    K=st.integers(3, 24),
    gap=st.floats(0.1, 2.0),
    distance=st.floats(0.5, 3.0),
    h=st.floats(0.3, 2.0),
    weight=st.floats(0.05, 5.0),
)


def implemented_drift(p, weight, gap, distance, h, K, std_normalize):
    """E[sum over samples of advantage * d log p / dp] p (1 - p) / K, over all K + 1 kinds of group."""
    better = torch.arange(K) < torch.arange(K + 1)[:, None]  # group j has j samples in A
    phi = (better.double() * distance)[..., None]
    reward = better.double() * gap
    shaped = METHODS["pec"](weight).shape(
        Group(reward, phi, h, torch.zeros(K + 1, K, 1).double(), torch.ones(1).double())
    )
    A = advantages(shaped, clip=math.inf, std_normalize=std_normalize)[..., 0]
    score = better.double() - p  # d log p / dp, times p (1 - p)
    probability = torch.from_numpy(scipy.stats.binom(K, p).pmf(range(K + 1)))
    return (probability * (A * score).sum(1)).sum().item() / K


@pytest.mark.claim("P11")
def test_p11_drift_sympy():
    """drift = (K-1)/K p (1-p) [delta + (K-2)/K c (1-2p)] for K = 2..7, all symbols free."""
    p, delta, c = sympy.symbols("p delta c")
    for K in range(2, 8):
        drift = 0
        for j in range(K + 1):
            q = sympy.Rational(j, K)
            drift += sympy.binomial(K, j) * p**j * (1 - p) ** (K - j) * q * (1 - q) * (delta + c * (1 - 2 * q))
        R = sympy.Rational
        closed = R(K - 1, K) * p * (1 - p) * (delta + R(K - 2, K) * c * (1 - 2 * p))
        assert sympy.expand(drift - closed) == 0
        if K > 2:
            root = R(1, 2) + delta / (2 * c) * R(K, K - 2)
            assert sympy.simplify(closed.subs(p, root)) == 0


@pytest.mark.claim("P11")
@settings(max_examples=40, deadline=None)
@given(**worlds, p=st.floats(0.05, 0.95), std_normalize=st.booleans())
def test_p11_drift_by_enumerating_groups(K, gap, distance, h, weight, p, std_normalize):
    got = two_modes.drift(p, weight, gap, distance, h, K, std_normalize)
    want = implemented_drift(p, weight, gap, distance, h, K, std_normalize)
    spread = [abs(two_modes.gap(j, weight, gap, distance, h, K)) for j in range(1, K)]
    if min(spread) > 1e-6:  # at an exact tie of shaped rewards both are 0 up to rounding
        assert got == pytest.approx(want, rel=1e-9, abs=1e-11)
    c = weight * distance**2 / (2 * h**2)
    if not std_normalize:  # the closed form, written anew; planted: the plan's factor and the wrong sign
        closed = (K - 1) / K * p * (1 - p) * (gap + (K - 2) / K * c * (1 - 2 * p))
        assert want == pytest.approx(closed, rel=1e-9, abs=1e-11)
        if abs(c * (1 - 2 * p)) > 1e-2:
            for factor in (((K - 1) / K) ** 2, -(K - 2) / K):
                wrong = (K - 1) / K * p * (1 - p) * (gap + factor * c * (1 - 2 * p))
                assert want != pytest.approx(wrong, rel=1e-7, abs=1e-9)


@pytest.mark.claim("P11")
@settings(max_examples=40, deadline=None)
@given(K=worlds["K"], gap=worlds["gap"], distance=worlds["distance"], h=worlds["h"], std_normalize=st.booleans())
def test_p11_threshold(K, gap, distance, h, std_normalize):
    """Below lambda_c the implementation drifts to p = 1 everywhere; above, it turns back before 1, at p*."""
    critical = two_modes.critical_lambda(gap, distance, h, K)
    assert two_modes.fixed_point(0.97 * critical, gap, distance, h, K, std_normalize) == 1
    for p in (0.01, 0.3, 0.7, 0.99, 1 - 1e-5):
        assert implemented_drift(p, 0.97 * critical, gap, distance, h, K, std_normalize) > 0
    assert implemented_drift(1 - 1e-7, 1.03 * critical, gap, distance, h, K, std_normalize) < 0
    arguments = (1.5 * critical, gap, distance, h, K, std_normalize)
    root = scipy.optimize.brentq(lambda p: implemented_drift(p, *arguments), 0.3, 1 - 1e-9, xtol=1e-13)
    assert two_modes.fixed_point(*arguments) == pytest.approx(root, abs=1e-8)
    if not std_normalize:
        assert root == pytest.approx(0.5 + 0.5 / 1.5, abs=1e-9)


@pytest.mark.claim("P11")
@pytest.mark.parametrize("std_normalize", [False, True])
def test_p11_large_groups_agree_with_mixture(std_normalize):
    """K -> inf: the law of mixture.py, with an error that falls as 1/K; the pair K = 2 never keeps both.

    The excess over the limit is 2/(K - 2) of it exactly: for lambda_c always, for p* - 1/2 with centred advantages
    (bisection stops at 1e-12). Another factor of finite K, such as K/(K - 1), has another excess.
    """
    world = (0.6, 0.6, math.sqrt(3.72), 1.0)
    limit = mixture.fixed_point(*world)
    errors = [abs(two_modes.fixed_point(*world, K, std_normalize) - limit) for K in (32, 128, 512)]
    assert errors[0] > errors[1] > errors[2] and errors[2] < 2e-3
    for K in (3, 4, 7, 32, 512):
        excess = two_modes.critical_lambda(0.6, 1.0, 1.0, K) / mixture.critical_lambda(0.6, 1.0, 1.0) - 1
        assert excess == pytest.approx(2 / (K - 2), rel=1e-12)
        if not std_normalize and K >= 32:  # where both modes survive
            excess = (two_modes.fixed_point(*world, K, False) - 0.5) / (limit - 0.5) - 1
            assert excess == pytest.approx(2 / (K - 2), abs=1e-11)
    assert two_modes.fixed_point(1e9, 0.6, 1.0, 1.0, 2, std_normalize) == 1


@pytest.mark.claim("P11")
def test_p11_kl_penalty():
    """Centred: sigmoid(delta / beta), no threshold. Std-normalised, K -> inf: beta_c = 1.509 whatever delta."""
    for beta, delta in ((0.05, 0.5), (0.5, 0.5), (2.0, 1.0)):

        def objective(logit, beta=beta, delta=delta):
            p = torch.sigmoid(torch.tensor(logit, dtype=torch.float64)).item()
            return -(p * delta + beta * scipy.stats.entropy([p, 1 - p]) - beta * math.log(2))

        best = scipy.optimize.minimize_scalar(objective, bounds=(0, 20), method="bounded", options={"xatol": 1e-10})
        assert best.x == pytest.approx(delta / beta, abs=1e-4)
    balance = scipy.optimize.minimize_scalar(lambda l: 2 * math.cosh(l / 2) / l, bounds=(0.1, 10), method="bounded")
    assert balance.fun == pytest.approx(1.509, abs=1e-3) and balance.x == pytest.approx(2.399, abs=1e-3)

    def pull(p, beta, K=4000):  # std-normalised reward against the penalty, delta anything > 0
        return two_modes.drift(p, 0.0, 0.3, 1.0, 1.0, K) - beta * p * (1 - p) * math.log(p / (1 - p))

    grid = [0.5 + 0.005 * i for i in range(1, 99)]
    assert all(pull(p, 1.40) > 0 for p in grid)
    assert any(pull(p, 1.60) < 0 for p in grid)


@pytest.mark.claim("P11")
@pytest.mark.parametrize("std_normalize", [False, True])
def test_p11_sampled_groups(std_normalize):
    """Sampled groups at p*: the mean update is 0 (|z| < 6); at the plan's p* it is not."""
    K, groups, weight, gap, distance, h = 8, 400_000, 0.9, 0.5, 2.0, 1.0
    generator = torch.Generator().manual_seed(5)

    def z(p):
        better = torch.rand(groups, K, generator=generator, dtype=torch.float64) < p
        group = Group(
            better.double() * gap,
            (better.double() * distance)[..., None],
            h,
            torch.zeros(groups, K, 1).double(),
            torch.ones(1).double(),
        )
        A = advantages(METHODS["pec"](weight).shape(group), std_normalize=std_normalize)[..., 0]
        update = (A * (better.double() - p)).mean(1)
        return (update.mean() / (update.std() / math.sqrt(groups))).abs().item()

    assert z(two_modes.fixed_point(weight, gap, distance, h, K, std_normalize)) < Z
    assert z(mixture.fixed_point(weight, gap, distance, h)) > Z  # planted: K / (K - 2) forgotten
    assert z(0.5 + gap * h**2 / (weight * distance**2) * (K / (K - 1)) ** 2) > Z  # planted: the plan's factor


def trained_share(weight, std_normalize, seed, iterations=120, average=40):
    """Share of the better of two modes after grpo.train with PEC; 32 groups of 16, features (+-1, 0)."""
    world = mixture.GaussianMixture(torch.tensor([[1.5, 0.0], [-1.5, 0.0]]), 0.3)
    model = mixture.MixtureFlow(world, width=32, seed=seed)
    setup = Settings(
        iterations=iterations,
        groups=32,
        group_size=16,
        updates=1,
        steps=6,
        lr=2e-3,
        std_normalize=std_normalize,
        seed=seed,
    )
    state = start(model, setup)
    state.bandwidth = 1.0

    def phi(x):
        return torch.stack([x[:, 0].sign(), torch.zeros(len(x))], 1)

    reward = mixture.tilted(world, torch.tensor([0.5, 0.0]))
    # methods.PEC averages over the D = 2 features, so its weight is 2 lambda
    shares = [
        s.reward.mean().item() / 0.5 for s in train(model, [""], reward, phi, METHODS["pec"](2 * weight), setup, state)
    ]
    return sum(shares[-average:]) / average


@pytest.mark.claim("P11")
@pytest.mark.parametrize(("std_normalize", "weight"), [(True, 0.2), (True, 0.45), (False, 0.45), (True, 0.9)])
def test_p11_trained_flow(std_normalize, weight):
    """A flow trained by grpo.train rests within 0.03 of p*; lambda_c = 0.286. The full curve is notebook 05's.

    Deterministic on one machine. Rough rate: the average of 40 iterations has standard error 0.005 (measured over
    seeds), so 0.03 is six of them.
    """
    torch.set_num_threads(1)
    share = trained_share(weight, std_normalize, seed=0)
    expected = two_modes.fixed_point(weight, 0.5, 2.0, 1.0, 16, std_normalize)
    assert share == pytest.approx(expected, abs=0.03)
    wrong = 0.5 if weight < 0.25 else two_modes.fixed_point(weight / 2, 0.5, 2.0, 1.0, 16, std_normalize)
    assert abs(share - wrong) > 0.03  # planted: lambda not converted from 'mean' to 'sum'


@pytest.mark.claim("P11")
def test_p11_staircase():
    """Std-normalised p* is flat in lambda between the steps 2 delta h^2 / Delta^2 * K / (2j - K), and jumps there.

    The 1e-4 beside the std rounds the edges: 5 % from a step the gap there is 0.025, its std 0.008, so the
    sign is off by about 1 %; at 1 % it is off by 8 %, which moves p* by 0.003.
    """
    K, gap, distance, h = 16, 0.5, 2.0, 1.0

    def root(weight):
        return scipy.optimize.brentq(lambda p: implemented_drift(p, weight, gap, distance, h, K, True), 0.3, 1 - 1e-9)

    steps = [0.25 * K / (2 * j - K) for j in (14, 13, 12, 11)]
    for step, following in zip(steps, steps[1:]):
        assert root(1.05 * step) - root(0.95 * following) < 2e-3
        assert root(0.95 * step) - root(1.05 * step) > 0.05
    smooth = [0.5 + 0.125 / w * K / (K - 2) for w in (1.05 * steps[0], 0.95 * steps[1])]
    assert smooth[0] - smooth[1] > 10 * 2e-3  # planted: the centred law would fail the first bound tenfold


@pytest.mark.claim("P11")
@pytest.mark.parametrize("K", [3, 5])
def test_p11_within_mode_spread(K):
    """Two modes of two atoms each, the mode's share p trained: the implementation's drift vanishes at P11's p*.

    Groups of K over 4 atoms are enumerated. p* = 1/2 + (w_A - w_B) / 2 Delta^2 + delta h^2 K / (lambda Delta^2 (K-2)).
    """
    atoms = torch.tensor([[0.9, 0.4], [1.3, -0.7], [-1.0, 0.2], [-0.8, 0.1]], dtype=torch.float64)
    inside = torch.tensor([0.4, 0.6, 0.7, 0.3], dtype=torch.float64)  # shares within A and within B
    A = torch.tensor([1.0, 1.0, 0.0, 0.0], dtype=torch.float64)
    gap, h, weight = 0.5, 0.9, 2.0
    index = torch.tensor(list(itertools.product(range(4), repeat=K)))
    shaped = METHODS["pec"](2 * weight).shape(make_group(atoms[index], h, gap * A[index]))  # D = 2
    advantage = advantages(shaped, clip=math.inf, std_normalize=False)[..., 0]

    def drift(p):
        law = inside * (A * p + (1 - A) * (1 - p))
        return (law[index].prod(1) * (advantage * (A[index] - p)).sum(1)).sum().item()

    centre = [(inside * side) @ atoms for side in (A, 1 - A)]
    w = [(inside * side) @ (atoms - c).square().sum(1) for side, c in zip((A, 1 - A), centre)]
    square = (centre[0] - centre[1]).square().sum()
    plain = 0.5 + gap * h**2 / (weight * square) * K / (K - 2)
    expected = (plain + (w[0] - w[1]) / (2 * square)).item()
    assert 0.5 < expected < 1 and abs(expected - plain) > 0.01  # planted: the spread forgotten
    # the root is as exact as the sum of 4^K <= 1024 terms over the drift's slope there (above 0.1): 1e-12
    assert scipy.optimize.brentq(drift, 0.3, 1 - 1e-9, xtol=1e-14) == pytest.approx(expected, abs=1e-11)


@pytest.mark.claim("P11")
def test_p11_kl_penalty_of_a_flow():
    """The best path law under E R - beta KL(path), x_0 untrained, has p* = E_x0 sigmoid(logit p_0(A | x_0) + delta/beta).

    Two 1-D modes, four stochastic steps, everything on a grid of 801 points. The oracle is a backward recursion:
    Z_i(x) = E_base[Z_{i+1} | x] from Z_N = exp(R / beta), the best kernel is p_base(y | x) Z_{i+1}(y) / Z_i(x), and the
    density under it is pushed forward. Against it the formula, whose p_0(A | x_0) the base kernels alone give.
    """
    world = mixture.GaussianMixture(torch.tensor([[-1.5], [1.5]], dtype=torch.float64), 0.3, torch.tensor([0.6, 0.4]))
    s = FlowSchedule(time_grid(5, dtype=torch.float64), "flow_sde", 0.7)
    x = torch.linspace(-7, 7, 801, dtype=torch.float64)
    kernels = []
    for i in s.steps:
        mean = s.mean(x[:, None], world.velocity(x[:, None], s.sigmas[i]), i)
        kernel = Normal(mean, s.std[i]).log_prob(x[None]).exp()
        kernels.append(kernel / kernel.sum(1, keepdim=True))  # a Markov chain on the grid
    image = s.mean(x[:, None], world.velocity(x[:, None], s.sigmas[4]), 4)[:, 0]
    better, start = (image > 0).double(), (-x.square() / 2).exp()
    start = start / start.sum()
    share = better
    for kernel in reversed(kernels):
        share = kernel @ share
    base = (start @ share).item()
    for delta, beta in ((0.5, 0.3), (1.0, 0.25)):
        tilts = [(delta / beta * better).exp()]
        for kernel in reversed(kernels):
            tilts.append(kernel @ tilts[-1])
        density = start
        for n, kernel in enumerate(kernels):
            before, after = tilts[len(kernels) - n], tilts[len(kernels) - n - 1]
            density = (density / before) @ kernel * after
        best = (density @ better).item()
        a = delta / beta
        formula = (start @ torch.sigmoid(torch.logit(share.clamp(1e-300, 1 - 1e-16)) + a)).item()
        assert formula == pytest.approx(best, abs=801 * 4 * 2.3e-16 * math.exp(a))
        alone = 1 / (1 + (1 - base) / base * math.exp(-a))
        assert base + 0.1 < formula < alone - 1e-3  # closer to p_0 than a single probability would be


@pytest.mark.claim("P11")
@pytest.mark.parametrize("K", [4, 16, 24])
def test_p11_kl_penalty_at_finite_group_size(K):
    """Std-normalised reward against beta KL from p_0 = 1/2: a rest point for every beta, its logit within P11's bounds.

    (K-1)/(beta sqrt K) p^(K-2) <= logit p <= (K-1)/(beta sqrt K); the 1e-4 beside the smallest std, delta/sqrt K
    sqrt((K-1)/K), takes the share `lost` of the lower bound. p = 1 - 1e-7 at most, so rounding is 1e-9 of 1 - p.
    """
    gap = 0.5
    lost = 1e-4 / (gap / K**0.5 * ((K - 1) / K) ** 0.5)
    for bound in (16, 8, 3, 2, 1):  # (K - 1) / (beta sqrt K)
        beta = (K - 1) / (bound * K**0.5)

        def pull(l, beta=beta):  # drift - beta p (1 - p) l, over p (1 - p)
            p = 1 / (1 + math.exp(-l))
            return two_modes.drift(p, 0.0, gap, 1.0, 1.0, K) * (1 + math.exp(-l)) ** 2 * math.exp(l) - beta * l

        rest = scipy.optimize.brentq(pull, 1e-3, bound * 1.001)
        p = 1 / (1 + math.exp(-rest))
        assert (1 - lost) * bound * p ** (K - 2) * (1 - 1e-6) <= rest <= bound * (1 + 1e-6)
        if bound <= 2 and K > 4:
            assert rest < 0.97 * bound  # planted: the approximation of small beta, where beta is not small


@pytest.mark.claim("P11")
def test_p11_the_std_normalised_share_jumps_and_has_a_floor_for_even_groups():
    """At 1.02 lambda_c it is 0.939 (K = 16) and 0.504 (K = 3), the centred one is 1/2 + 1/2.04; as lambda -> inf even K
    end at a floor above 1/2, at K = 4 the root of sqrt(3) + 3 r - sqrt(3) r^2 = 0, r = p/(1 - p). Printed digits.
    """
    for K, printed in ((16, 0.939), (3, 0.504)):
        weight = 1.02 * two_modes.critical_lambda(0.5, 2.0, 1.0, K)
        assert abs(two_modes.fixed_point(weight, 0.5, 2.0, 1.0, K) - printed) < 0.0005
        assert two_modes.fixed_point(weight, 0.5, 2.0, 1.0, K, False) == pytest.approx(0.5 + 0.5 / 1.02, abs=1e-11)
    r = (3 + math.sqrt(21)) / (2 * math.sqrt(3))
    for K, printed in ((4, 0.686), (8, 0.570), (16, 0.533), (5, 0.5)):
        # the tie's gap is delta at every weight, so the 1e-4 moves the floor by the share 1e-4/(delta/2) of its term
        floor = two_modes.fixed_point(1e9, 0.5, 2.0, 1.0, K)
        assert abs(floor - printed) < 0.0005
        if K == 4:
            assert floor == pytest.approx(r / (1 + r), abs=5e-4)
