"""Perceptual entropy and its law, against NumPy and SciPy."""

import numpy as np
import pytest
import scipy.stats
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ref.methods import Group
from ref.perceptual import (
    calibrate,
    calibrate_kernel,
    fit_entropy_law,
    kernel_log_prob,
    neighbours,
    perceptual_entropy,
    perceptual_log_prob,
)

from .tools import features


@given(features(), st.floats(0.01, 100))
@settings(max_examples=60, deadline=None)
def test_perceptual_log_prob_is_scipys_gaussian_around_the_group_mean(phi, h):
    for g in range(len(phi)):
        z = phi[g].numpy()
        oracle = scipy.stats.norm(z.mean(0), h).logpdf(z).sum(1)
        np.testing.assert_allclose(perceptual_log_prob(phi, h)[g], oracle, rtol=1e-11)
        others = [np.delete(z, k, 0).mean(0) for k in range(len(z))]
        oracle = scipy.stats.norm(np.array(others), h).logpdf(z).sum(1)
        np.testing.assert_allclose(perceptual_log_prob(phi, h, leave_one_out=True)[g], oracle, rtol=1e-11)


@given(features(), st.floats(0.1, 10))
@settings(max_examples=60, deadline=None)
def test_kernel_log_prob_is_a_leave_one_out_mixture(phi, h):
    for g in range(len(phi)):
        z = phi[g].numpy()
        for k in range(len(z)):
            logs = scipy.stats.norm(np.delete(z, k, 0), h).logpdf(z[k]).sum(1)
            oracle = scipy.special.logsumexp(logs) - np.log(len(logs))
            np.testing.assert_allclose(kernel_log_prob(phi, h)[g, k], oracle, rtol=1e-9, atol=1e-9)


def test_calibrated_entropy_is_that_of_a_gaussian(rng):
    """With D h^2 = group variance, H_perc is the entropy of N(0, h^2 I): d/2 more than its log-normaliser."""
    phi = torch.randn(5, 8, 6, generator=rng, dtype=torch.float64)
    h = calibrate(phi)
    oracle = scipy.stats.multivariate_normal(cov=h**2 * np.eye(6)).entropy()
    assert perceptual_entropy(phi, h).mean().item() == pytest.approx(oracle, rel=1e-12)
    with pytest.raises(ValueError, match="do not vary"):
        calibrate(torch.ones(2, 3, 4))


def test_one_sample_has_no_diversity():
    with pytest.raises(ValueError, match="K >= 2"):
        perceptual_log_prob(torch.zeros(3, 1, 4), 1.0)


def test_entropy_law_recovers_its_own_coefficients(rng):
    entropy = torch.linspace(-0.76, -0.70, 50, dtype=torch.float64)
    exact = fit_entropy_law(entropy, -3.13 * entropy.exp() + 2.35)
    assert (exact.a, exact.b, exact.r2) == pytest.approx((3.13, 2.35, 1.0))
    noisy = -3.13 * entropy.exp() + 2.35 + 0.02 * torch.randn(50, generator=rng, dtype=torch.float64)
    oracle = scipy.stats.linregress(entropy.exp(), noisy)
    law = fit_entropy_law(entropy, noisy)
    assert (-law.a, law.b, law.r2) == pytest.approx((oracle.slope, oracle.intercept, oracle.rvalue**2))


@pytest.mark.parametrize("D", [2, 32, 768])
def test_the_kernel_has_the_neighbours_asked_for_in_any_dimension(D):
    """The mean over samples is a quarter of the others, to the bisection's 1e-9 in log h; any scale of phi."""
    phi = torch.randn(8, 24, D, dtype=torch.float64, generator=torch.Generator().manual_seed(D))
    for scale in (1.0, 1e-3, 50.0):
        h = calibrate_kernel(scale * phi)
        assert neighbours(scale * phi, h).mean().item() == pytest.approx(0.25 * 23, abs=1e-6)
    assert calibrate_kernel(3 * phi) == pytest.approx(3 * calibrate_kernel(phi), rel=1e-8)
    if D == 768:  # the Gaussian's own bandwidth leaves a sample its nearest neighbour alone
        assert neighbours(phi, calibrate(phi)).mean() < 1.3


def test_neighbours_count_by_hand():
    """Far fewer than all: three in one place and one far off have two neighbours each; the far one all three."""
    phi = torch.tensor([[[0.0], [0.0], [0.0], [100.0]]], dtype=torch.float64)
    assert neighbours(phi, 1.0)[0].tolist() == pytest.approx([2, 2, 2, 3])


def test_a_wide_kernel_pays_what_pec_pays():
    """In PEC's units: as h_K grows, -log p of the kernel differs from PEC's bonus by what all samples share.

    mean_j ||phi_k - phi_j||^2 = K / (K - 1) (||phi_k - m||^2 + v), so the factor is K / (K - 1). The next term of the
    expansion is (d^2 / 2 h_K^2)^2, 1e-8 here.
    """
    K, phi = 6, torch.randn(3, 6, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    h, zero = calibrate(phi), torch.zeros(3, K, 1, dtype=torch.float64)
    group = Group(zero[..., 0], phi, h, zero, torch.ones(1, dtype=torch.float64), None, kernel=1e4 * h)
    kernel, gaussian = (
        values - values.mean(1, keepdim=True) for values in map(group.log_prob, ("kernel", "perceptual"))
    )
    torch.testing.assert_close(kernel, K / (K - 1) * gaussian, rtol=1e-6, atol=1e-6)
