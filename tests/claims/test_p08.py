"""P08: perceptual entropy and the feature variance."""

import math

import numpy as np
import pytest
import scipy.stats
import sympy
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ref.grpo import advantages
from ref.methods import METHODS
from ref.perceptual import calibrate, perceptual_entropy, perceptual_log_prob

from .tools import Z, bandwidths, make_group, normal, seeds, shapes, z_score


@pytest.mark.claim("P08")
def test_p08_identity_sympy():
    """-mean log N(phi_k; m, h^2) = v / 2h^2 + log(2 pi h^2) / 2 as an identity, K = 4 and D = 1."""
    phi, h = sympy.symbols("phi1:5", real=True), sympy.Symbol("h", positive=True)
    m = sum(phi) / 4
    density = [sympy.exp(-((f - m) ** 2) / (2 * h**2)) / sympy.sqrt(2 * sympy.pi * h**2) for f in phi]
    entropy = -sum(sympy.expand_log(sympy.log(p), force=True) for p in density) / 4
    v = sum(f**2 for f in phi) / 4 - m**2
    closed = v / (2 * h**2) + sympy.log(2 * sympy.pi * h**2) / 2
    assert sympy.simplify(sympy.expand(sympy.expand_log(entropy - closed, force=True))) == 0
    ordinary = sympy.log(2 * sympy.pi * sympy.E * h**2) / 2
    assert sympy.simplify(sympy.expand_log(ordinary - (h**2 / (2 * h**2) + sympy.log(2 * sympy.pi * h**2) / 2))) == 0


@pytest.mark.claim("P08")
@settings(max_examples=25, deadline=None)
@given(shapes, seeds, bandwidths)
def test_p08_affine_in_numpy_variance(shape, seed, h):
    phi = normal(shape, seed)
    G, K, D = shape
    v = np.array([np.trace(np.atleast_2d(np.cov(group.T.numpy(), ddof=0))) for group in phi])
    expected = v / (2 * h**2) + D / 2 * math.log(2 * math.pi * h**2)
    got = perceptual_entropy(phi, h)
    np.testing.assert_allclose(got, expected, rtol=1e-12, atol=1e-12)
    np.testing.assert_allclose(perceptual_entropy(phi, h, "mean"), expected / D, rtol=1e-12, atol=1e-12)
    # planted: a forgotten 1/2, and the dropped normaliser
    assert not np.allclose(got, 2 * v / (2 * h**2) + D / 2 * math.log(2 * math.pi * h**2), rtol=1e-9, atol=1e-9)
    assert not np.allclose(got, v / (2 * h**2), rtol=1e-9, atol=1e-9) or abs(2 * math.pi * h**2 - 1) < 1e-6


@pytest.mark.claim("P08")
@settings(max_examples=15, deadline=None)
@given(shapes, seeds, bandwidths)
def test_p08_cross_entropy_scipy(shape, seed, h):
    phi, D = normal(shape, seed), shape[2]
    for group, got in zip(phi, perceptual_log_prob(phi, h)):
        law = scipy.stats.multivariate_normal(group.mean(0).numpy(), h**2 * np.eye(D))
        np.testing.assert_allclose(got, np.atleast_1d(law.logpdf(group.numpy())), rtol=1e-11, atol=1e-11)
    h = calibrate(phi)  # with D h^2 = v it is the entropy of an ordinary Gaussian
    ordinary = scipy.stats.multivariate_normal(np.zeros(D), h**2 * np.eye(D)).entropy()
    assert perceptual_entropy(phi, h).mean().item() == pytest.approx(ordinary, rel=1e-12, abs=1e-12)


@pytest.mark.claim("P08")
@settings(max_examples=15, deadline=None)
@given(shapes, seeds, bandwidths)
def test_p08_invariances(shape, seed, h):
    phi = normal(shape, seed)
    G, K, D = shape
    Q = torch.linalg.qr(normal((D, D), seed + 1))[0]
    before = perceptual_entropy(phi, h)
    for changed in (
        phi + normal((D,), seed + 2),
        phi @ Q,
        phi[:, torch.randperm(K, generator=torch.Generator().manual_seed(seed))],
    ):
        torch.testing.assert_close(perceptual_entropy(changed, h), before, rtol=1e-11, atol=1e-11)
    padded = perceptual_entropy(torch.cat([phi, torch.zeros(G, K, 3)], 2), h) - 1.5 * math.log(2 * math.pi * h**2)
    torch.testing.assert_close(padded, before, rtol=1e-11, atol=1e-11)


@pytest.mark.claim("P08")
@settings(max_examples=15, deadline=None)
@given(shapes, seeds, st.floats(0.01, 100.0))
def test_p08_scale(shape, seed, c):
    phi, D = normal(shape, seed), shape[2]
    h = calibrate(phi)
    assert calibrate(c * phi) == pytest.approx(c * h, rel=1e-12)
    shifted = perceptual_entropy(c * phi, c * h) - D * math.log(c)
    torch.testing.assert_close(shifted, perceptual_entropy(phi, h), rtol=1e-11, atol=1e-11)
    pec = METHODS["pec"](0.3)
    small, large = (advantages(pec.shape(make_group(s * phi, s * h)), std_normalize=False) for s in (1.0, c))
    torch.testing.assert_close(small, large, rtol=1e-9, atol=1e-11)
    if abs(c - 1) > 0.1 and shape[1] > 2:  # (a pair's bonus is dead, P09)
        # planted: without a new calibration the advantages change
        fixed = advantages(pec.shape(make_group(c * phi, h)), std_normalize=False)
        assert not torch.allclose(small, fixed, rtol=1e-9, atol=1e-11)


@pytest.mark.claim("P08")
def test_p08_upper_bound_by_sampling():
    """H_perc >= H(f) for a non-Gaussian f, and meets KL + H(f). Laplace: H = 1 + log(2b), v = 2 b^2; |z| < 6."""
    b, n, h = 0.7, 200_000, 0.9
    x = torch.from_numpy(scipy.stats.laplace(scale=b).rvs(n, random_state=np.random.default_rng(0)))[None, :, None]
    terms = -perceptual_log_prob(x, h)[0]
    cross = 2 * b**2 / (2 * h**2) + 0.5 * math.log(2 * math.pi * h**2)  # = H(f) + KL(f || N(0, h^2)) in closed form
    error = terms.std() / math.sqrt(n)
    assert abs(terms.mean() - cross) < Z * error
    assert terms.mean() > 1 + math.log(2 * b) + Z * error
    assert abs(terms.mean() - (cross - 0.5 * math.log(2 * math.pi * h**2))) > Z * error  # planted: no normaliser


@pytest.mark.claim("P08")
@settings(max_examples=15, deadline=None)
@given(shapes, seeds, st.floats(0.2, 5.0))
def test_p08_tangent_of_the_largest_entropy(shape, seed, c):
    """H_perc of a group scaled by c touches (D/2) log(2 pi e v/D) from above, at v = D h^2; slope 1/2h^2 in v."""
    phi, D = normal((1, *shape[1:]), seed), shape[2]
    h = calibrate(phi)
    largest = D / 2 * math.log(2 * math.pi * math.e * (c * h) ** 2)  # of any density with the variance c^2 D h^2
    above = perceptual_entropy(c * phi, h).item() - largest
    exact = D / 2 * (c**2 - 1 - 2 * math.log(c))
    # both sides are sums of terms below D (c^2 + |log 2 pi e c^2 h^2|) <= 8 * 60, of K D <= 96 squares
    assert above == pytest.approx(exact, rel=0, abs=96 * 480 * 2.3e-16) and exact >= 0


@pytest.mark.claim("P08")
def test_p08_a_group_lies_below_the_entropy_of_its_law():
    """Gaussian f, Var = D h^2: E H_perc = H(f) - D/2K for groups of K = 4, |z| < 5.5; K/(K-1) v repairs it. < 8e-8."""
    n, K, D, h = 20_000, 4, 6, 0.8
    phi = h * normal((n, K, D), 0)
    entropy, H = perceptual_entropy(phi, h), D / 2 * math.log(2 * math.pi * math.e * h**2)
    assert z_score(entropy, H - D / (2 * K)) < Z
    assert z_score(entropy, H) > Z  # planted: the bound of the population, taken for the group
    assert z_score(perceptual_entropy((K / (K - 1)) ** 0.5 * phi, h), H) < Z
