"""P12: variance is not coverage, and the kernel entropy is."""

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

from ref.mixture import ring
from ref.perceptual import kernel_log_prob, perceptual_entropy, perceptual_log_prob

from .tools import Z, seeds


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
    assert (perceptual_entropy(unit * torch.rand(5, K, 1, dtype=torch.float64), 0.7) <= best + 1e-12).all()
    v = (perceptual_entropy(unit, 0.7) - D / 2 * math.log(2 * math.pi * 0.49)) * 2 * 0.49
    torch.testing.assert_close(v, 1 - unit.mean(1).square().sum(-1), rtol=1e-9, atol=1e-11)


@pytest.mark.claim("P12")
@settings(max_examples=10, deadline=None)
@given(seeds, st.floats(0.3, 5.0))
def test_p12_pec_needs_few_modes(seed, weight):
    """The best occupation of 8 modes in 2-D under reward + lambda V / 2 h^2 has at most D + 1 = 3 modes.

    The oracle maximises F over the simplex by SLSQP, then purifies it by a linear programme.
    """
    R = np.random.default_rng(seed).uniform(0, 1, 8)
    c = circle(8).numpy()

    def F(p):
        return p @ R + weight / 2 * (p @ (c**2).sum(1) - ((p @ c) ** 2).sum())

    simplex = {"type": "eq", "fun": lambda p: p.sum() - 1}
    found = scipy.optimize.minimize(
        lambda p: -F(p),
        np.full(8, 1 / 8),
        bounds=[(0, 1)] * 8,
        constraints=simplex,
        options={"ftol": 1e-13, "maxiter": 500},
    )
    p = np.clip(found.x, 0, None)
    p /= p.sum()
    rows = np.vstack([np.ones(8), c.T])
    value = R + weight / 2 * (c**2).sum(1)
    vertex = scipy.optimize.linprog(-value, A_eq=rows, b_eq=rows @ p, method="highs-ds").x
    assert (vertex > 1e-9).sum() <= 3
    assert F(vertex) >= F(p) - 1e-8
    entropic = scipy.special.softmax(R / weight)  # the kernel bonus keeps all eight
    assert (entropic > 1e-3).all()


@pytest.mark.claim("P12")
@settings(max_examples=25, deadline=None)
@given(st.integers(2, 8), st.integers(2, 6), st.floats(0.15, 0.4))
def test_p12_kernel_counts_modes(M, repeats, h):
    """H_kernel - (D/2) log 2 pi h^2 lies between log M - bound and log M, up to leave-one-out's known shift.

    K = M n samples, n on each of M atoms: the density at an atom is [(n - 1) + overlap] / (K - 1).
    """
    K = M * repeats
    atoms = circle(M, 2.0)
    H = -kernel_log_prob(atoms.repeat(repeats, 1)[None], h).mean().item() - math.log(2 * math.pi * h**2)
    own = math.log((K - 1) / (repeats - 1))  # -> log M for many repeats
    separation = torch.pdist(atoms).min().item()
    overlap = K * math.exp(-(separation**2) / (2 * h**2)) / (repeats - 1)
    assert own - overlap - 1e-9 <= H <= own + 1e-9
    # exact, by the sum over atoms
    kernel = np.exp(-(torch.cdist(atoms, atoms).numpy() ** 2) / (2 * h**2))
    exact = -np.log((repeats * kernel.sum(1) - 1) / (K - 1)).mean()
    assert H == pytest.approx(exact, rel=1e-9, abs=1e-9)
    # planted: the Gaussian entropy does not rise with M
    both = [perceptual_entropy(circle(m, 2.0).repeat(12, 1)[None], h).item() for m in (2, M)]
    assert both[0] == pytest.approx(both[1], rel=1e-6)


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
    """Groups of 24 from two opposite and from eight modes: mean Gaussian entropies agree (|z| < 6), kernel ones do not."""
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
