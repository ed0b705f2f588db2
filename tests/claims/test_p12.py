"""P12: variance is not coverage, and the kernel entropy is."""

import itertools
import math

import numpy as np
import pytest
import scipy.optimize
import scipy.special
import scipy.stats
import sympy
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ref.grpo import advantages
from ref.methods import METHODS
from ref.perceptual import calibrate, kernel_log_prob, perceptual_entropy, perceptual_log_prob
from ref.worlds.mixture import ring

from .tools import Z, make_group, normal, seeds


def circle(M, radius=1.0):
    return ring(M, radius).means.double()


@pytest.mark.claim("P12")
def test_p12_same_variance_for_any_number_of_modes():
    """SymPy: M equal points on a circle have variance r^2 for every M >= 2; and so the implementation's entropy."""
    r = sympy.Symbol("r", positive=True)
    for M in (2, 3, 4, 6):
        points = [(r * sympy.cos(2 * sympy.pi * m / M), r * sympy.sin(2 * sympy.pi * m / M)) for m in range(M)]
        mean = [sympy.simplify(sum(p[a] for p in points) / M) for a in (0, 1)]
        variance = sum((p[0] - mean[0]) ** 2 + (p[1] - mean[1]) ** 2 for p in points) / M
        assert sympy.simplify(variance - r**2) == 0
    groups = [circle(M, 0.8).repeat(24 // M, 1)[None] for M in (2, 3, 4, 6, 8, 12, 24)]  # 24 samples on M modes
    entropies = torch.cat([perceptual_entropy(g, 0.5) for g in groups])
    torch.testing.assert_close(entropies, entropies[:1].expand_as(entropies), rtol=1e-6, atol=1e-6)
    for g in groups:  # no sample has an advantage over another
        assert perceptual_log_prob(g, 0.5).std() < 1e-6


@pytest.mark.claim("P12")
@settings(max_examples=30, deadline=None)
@given(st.integers(2, 20), st.integers(1, 6), seeds)
def test_p12_two_points_attain_the_maximum(K, D, seed):
    """No group in the unit ball beats K/2 samples at u and K/2 at -u; unit norms: v = 1 - |mean|^2."""
    K = K + K % 2
    phi = torch.randn(5, K, D, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    unit = torch.nn.functional.normalize(phi, dim=-1)
    u = torch.eye(D, dtype=torch.float64)[0]
    pair = torch.where(torch.arange(K)[:, None] % 2 == 0, u, -u)[None]
    best = perceptual_entropy(pair, 0.7)
    assert (
        perceptual_entropy(
            unit * torch.rand(5, K, 1, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)), 0.7
        )
        <= best + 1e-12
    ).all()
    v = (perceptual_entropy(unit, 0.7) - D / 2 * math.log(2 * math.pi * 0.49)) * 2 * 0.49
    torch.testing.assert_close(v, 1 - unit.mean(1).square().sum(-1), rtol=1e-9, atol=1e-11)


def ascent(features, rewards, weight, h=1.0, K=4, time=400.0, step=0.5):
    """Where the exact expected update of centred GRPO with PEC ends, over the occupation of M modes, [M].

    All M^K groups go through METHODS["pec"] and `advantages`; p_m moves by the natural gradient of a softmax,
    d log p_m = E[A_k | x_k in m] - mean, from the uniform start.
    """
    M, D = features.shape
    index = torch.tensor(list(itertools.product(range(M), repeat=K)))
    group = make_group(features[index], h, rewards[index])
    A = advantages(METHODS["pec"](weight * D).shape(group), clip=math.inf, std_normalize=False)[..., 0]
    first, p = torch.nn.functional.one_hot(index[:, 0], M).double(), torch.full((M,), 1 / M, dtype=torch.float64)
    value = A[:, 0]  # members of a group are exchangeable: the first stands for each
    others = index[:, 1:]
    for _ in range(round(time / step)):
        slope = first.T @ (p[others].prod(1) * value)  # E[A_1 | x_1 in m]
        p = p * (step * (slope - p @ slope)).exp()
        p = p / p.sum()
    return p


RING_REWARDS = torch.tensor([0.9, 0.4, 0.05, 0.6, 0.8, 0.3, 0.55, 0.15], dtype=torch.float64)


@pytest.mark.claim("P12")
@pytest.mark.parametrize("weight", [0.3, 1.0, 3.0])
def test_p12_pec_needs_few_modes(weight):
    """GRPO with PEC on eight modes in the plane keeps at most D + 1 = 3, and they are the maximiser's.

    F(p) = E R + lambda (K-2)/K V / 2h^2 is concave, so p is its maximum iff no mode's slope exceeds those of the
    modes that are kept. K = 4; dying modes fall as e^(-gap t), so at t = 400 those with a gap above 0.05 are below
    2e-9, and slopes of kept modes agree within that. Orthogonal features keep up to all eight.
    """
    c, factor = circle(8), weight / 2 * (4 - 2) / 4
    p = ascent(c, RING_REWARDS, weight)
    kept = p > 1e-6
    assert 2 <= kept.sum() <= 3
    slope = RING_REWARDS + factor * ((c**2).sum(1) - 2 * c @ (p @ c))
    assert slope[kept].max() - slope[kept].min() < 1e-4
    assert slope[~kept].max() < slope[kept].min() - 0.02
    spread = ascent(torch.eye(8, dtype=torch.float64), RING_REWARDS, 3.0 * weight, time=100.0)
    assert (spread > 1e-2).sum() == {0.3: 2, 1.0: 5, 3.0: 8}[weight]  # P15: sparsemax


@pytest.mark.claim("P12")
@settings(max_examples=40, deadline=None)
@given(st.lists(st.integers(2, 7), min_size=2, max_size=8), st.floats(0.15, 0.4))
def test_p12_kernel_counts_modes(counts, h):
    """n_m samples on atom m of M, unequal: H_kernel - (D/2) log 2 pi h^2 is H(p) up to leave-one-out's known shift.

    The density at an atom is [(n_m - 1) + overlap_m] / (K - 1), overlap_m in [0, (K - n_m) rho]. So the entropy lies
    within sum_m p_m (K - n_m) rho / (n_m - 1) below sum_m p_m log((K - 1) / (n_m - 1)), which differs from H(p) by
    sum_m p_m log((K - 1) n_m / (K (n_m - 1))). Rounding: K <= 56 terms below 100.
    """
    M, K, n = len(counts), sum(counts), torch.tensor(counts, dtype=torch.float64)
    atoms, share = circle(M, 2.0), n / K
    phi = atoms.repeat_interleave(torch.tensor(counts), 0)[None]
    H = -kernel_log_prob(phi, h).mean().item() - math.log(2 * math.pi * h**2)
    rho = math.exp(-(torch.pdist(atoms).min().item() ** 2) / (2 * h**2))
    own = (share * ((K - 1) / (n - 1)).log()).sum().item()
    shift = (share * ((K - 1) * n / (K * (n - 1))).log()).sum().item()
    assert own == pytest.approx(torch.special.entr(share).sum().item() + shift, abs=1e-12)
    assert own - (share * (K - n) * rho / (n - 1)).sum().item() - 1e-10 <= H <= own + 1e-10
    # exact, by the sum over atoms
    kernel = torch.exp(-(torch.cdist(atoms, atoms, compute_mode="donot_use_mm_for_euclid_dist") ** 2) / (2 * h**2))
    exact = -(share * ((kernel @ n - 1) / (K - 1)).log()).sum().item()
    assert H == pytest.approx(exact, rel=1e-9, abs=1e-9)
    # planted: the Gaussian entropy does not rise with M
    both = [perceptual_entropy(circle(m, 2.0).repeat(12, 1)[None], h).item() for m in (2, M)]
    assert both[0] == pytest.approx(both[1], rel=1e-6)


@pytest.mark.claim("P12")
def test_p12_the_kernel_bonus_rests_at_a_softmax_of_the_rewards():
    """PEC in space "kernel" pays all modes alike where p is softmax(R / lambda), and only there.

    Five separated modes, groups of K = 600 of the nearest composition. Shaped rewards of two modes then differ by
    lambda times the log of a ratio: n_m against K p_m is off by at most one half, n_m - 1 by one and a half, and the
    overlap adds at most K rho: tolerance 2 lambda (1.5 + K rho) / min n.
    """
    K, weight, h, D, R = 600, 0.4, 0.3, 2, torch.tensor([1.0, 0.7, 0.5, 0.2, 0.0], dtype=torch.float64)
    atoms = circle(5, 2.0)
    rho = math.exp(-(torch.pdist(atoms).min().item() ** 2) / (2 * h**2))

    def shaped(p):
        n = (K * p).round().long()
        mode = torch.arange(5).repeat_interleave(n)
        r = METHODS["pec"](weight * D, space="kernel").shape(make_group(atoms[mode][None], h, R[mode][None]))[0, :, 0]
        return n, torch.stack([r[mode == m].mean() for m in range(5)])

    n, r = shaped((R / weight).softmax(0))
    assert r.max() - r.min() < 2 * weight * (1.5 + K * rho) / n.min()
    _, uniform = shaped(torch.full((5,), 0.2, dtype=torch.float64))
    assert uniform.max() - uniform.min() > 0.9  # planted: with equal shares the reward alone decides
    _, reverse = shaped((-R / weight).softmax(0))
    assert (reverse.diff() < -0.3).all()  # and the bonus of the wrong sign would make this one rest


@pytest.mark.claim("P12")
@settings(max_examples=30, deadline=None)
@given(st.integers(3, 24), st.floats(0.4, 3.0), st.floats(0.5, 2.0), st.booleans())
def test_p12_the_kernel_bonus_has_a_threshold(K, h, distance, std_normalize):
    """A group with one sample in the worse mode is pushed out of it below P12's lambda_c, and back above it."""
    delta, x = 0.5, distance**2 / (2 * h**2)
    rho = math.exp(-x)
    critical = delta / (x + math.log((K - 2 + rho) / (K - 1)))
    better = (torch.arange(K) < K - 1).double()
    for weight, sign in ((0.95 * critical, 1), (1.05 * critical, -1)):
        phi = (distance * better)[None, :, None]
        r = METHODS["pec"](weight, space="kernel").shape(make_group(phi, h, (delta * better)[None]))
        A = advantages(r, std_normalize=std_normalize)[0, :, 0]
        assert sign * A[0] > 0 and sign * A[-1] < 0
    # far apart the bonus at one sample saturates at Delta^2 / 2 h^2: -log p would not
    assert critical > delta / (x + math.log(K))


@pytest.mark.claim("P12")
def test_p12_pec_s_bandwidth_makes_the_kernel_see_neighbours_in_many_dimensions():
    """D = 768, K = 24, D h^2 = v: the kernel bonus is the distance to the nearest neighbour; at D = 2 it is not.

    Fixed draws of 50 groups. Correlation over 1200 samples; the printed 0.9999 holds with a margin of 8e-5.
    """

    def correlation(D):
        phi = normal((50, 24, D), 0)
        h = calibrate(phi)
        squared = torch.cdist(phi, phi, compute_mode="donot_use_mm_for_euclid_dist").square()
        nearest = squared.masked_fill(torch.eye(24, dtype=torch.bool), torch.inf).amin(2)
        return torch.corrcoef(torch.stack([nearest.flatten(), -kernel_log_prob(phi, h).flatten()]))[0, 1]

    assert correlation(768) > 0.9999
    assert correlation(2) < 0.95


@pytest.mark.claim("P12")
@settings(max_examples=20, deadline=None)
@given(st.integers(3, 10), st.integers(1, 5), st.floats(0.2, 3.0), seeds)
def test_p12_kernel_against_scipy(K, D, h, seed):
    """Each sample's density from scipy.stats.norm, over the others, one by one."""
    phi = torch.randn(2, K, D, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    got = kernel_log_prob(phi, h)
    for g in range(2):
        for k in range(K):
            others = np.delete(phi[g].numpy(), k, axis=0)
            logs = scipy.stats.norm(others, h).logpdf(phi[g, k].numpy()).sum(1)
            assert got[g, k].item() == pytest.approx(
                scipy.special.logsumexp(logs) - math.log(K - 1), rel=1e-7, abs=1e-7
            )
    torch.testing.assert_close(kernel_log_prob(phi, h, "mean"), got / D)


@pytest.mark.claim("P12")
def test_p12_coarse_limit_is_pec():
    """h -> inf: centred kernel bonuses tend to the Gaussian's times K/(K-1), as 1/h^2 corrections vanish."""
    phi = torch.randn(3, 9, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))

    def centred(x):
        return x - x.mean(1, keepdim=True)

    errors = []
    for h in (10.0, 100.0):
        kernel, gaussian = centred(kernel_log_prob(phi, h)), centred(perceptual_log_prob(phi, h)) * 9 / 8
        errors.append(((kernel - gaussian).norm() / gaussian.norm()).item())
    assert errors[1] < 1e-3 and errors[1] < errors[0] / 50


@pytest.mark.claim("P12")
def test_p12_sampled_groups():
    """Groups of 24 from two opposite and from eight modes: mean Gaussian entropies agree (4e-8), kernel ones do not."""
    generator, n, K, h = torch.Generator().manual_seed(1), 4000, 24, 0.3

    def draw(M):
        x = ring(M, 2.0, 0.15).sample(n * K, generator).double()
        return x.view(n, K, 2)

    two, eight = draw(2), draw(8)

    def z(a, b):
        return ((a.mean() - b.mean()) / math.sqrt((a.var() + b.var()) / n)).abs().item()

    assert z(perceptual_entropy(two, h), perceptual_entropy(eight, h)) < Z
    assert z(-kernel_log_prob(two, h).mean(1), -kernel_log_prob(eight, h).mean(1)) > 100
    # planted: without the leave-one-out the wrong kernel entropy never exceeds log K, so a lone sample is capped
    lone = torch.cat([torch.zeros(1, 7, 2), torch.full((1, 1, 2), 9.0)], 1).double()
    assert -kernel_log_prob(lone, h)[0, -1] - math.log(2 * math.pi * h**2) > math.log(8) + 100
