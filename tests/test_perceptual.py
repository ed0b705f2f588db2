"""Perceptual entropy and its law, against NumPy and SciPy."""

import numpy as np
import pytest
import scipy.stats
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ref.perceptual import (
    calibrate,
    fit_entropy_law,
    kernel_log_prob,
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
