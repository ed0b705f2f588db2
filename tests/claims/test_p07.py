"""P07: what advantage probabilities do."""

import math

import pytest
import sympy
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ref.grpo import advantages

from .tools import Z, normal, z_score


@pytest.mark.claim("P07")
def test_p07_sympy_expansion():
    """softmax(R_k / T) = 1/K + (R_k - mean R)/(K T) + O(spread^2), three samples."""
    e = sympy.symbols("e", real=True)
    r = sympy.symbols("r0:3", real=True)
    p0 = sympy.exp(e * r[0]) / sum(sympy.exp(e * a) for a in r)
    series = sympy.series(p0, e, 0, 2).removeO()
    assert sympy.simplify(series - (sympy.Rational(1, 3) + e * (r[0] - sum(r) / 3) / 3)) == 0


@pytest.mark.claim("P07")
@settings(max_examples=40, deadline=None)
@given(st.integers(2, 12), st.floats(1e-3, 3.0), st.floats(0.2, 3.0), st.integers(0, 10_000))
def test_p07_bounds(K, spread, T, seed):
    """log(p_max/p_min) is the range over T exactly, and both lie within exp(+-range/T)/K."""
    R = spread * normal((K,), seed)
    p = (R / T).softmax(0)
    gap = (R.max() - R.min()).item() / T
    assert abs((p.max() / p.min()).log().item() - gap) < 1e-12 * (1 + gap)
    assert math.exp(-gap) / K <= p.min() * (1 + 1e-12) and p.max() <= math.exp(gap) / K * (1 + 1e-12)
    small = (1e-6 * R / T).softmax(0)
    assert (small - 1 / K - 1e-6 * (R - R.mean()) / (K * T)).abs().max() < 1e-11 * (1 + gap**2)


@pytest.mark.claim("P07")
@settings(max_examples=40, deadline=None)
@given(st.integers(2, 16), st.integers(0, 10_000), st.floats(0.01, 100.0))
def test_p07_normalised_advantages_do_not_converge(K, seed, scale):
    """Dividing by the group's own std removes the spread: p_A is scale-free, and its log ratio has a floor.

    2 sqrt((K-1)/K) (even K) or 2 sqrt(K/(K+1)) (odd) <= log(p_max/p_min) <= sqrt(2 (K-1)).
    """
    R = normal((1, K, 1), seed)
    z = (R - R.mean(1)) / R.std(1)
    ratio = z.amax().item() - z.amin().item()
    floor = 2 * math.sqrt((K - 1) / K if K % 2 == 0 else K / (K + 1))
    assert floor - 1e-9 <= ratio <= math.sqrt(2 * (K - 1)) + 1e-9
    spread = scale * R.std(1, keepdim=True)
    A = advantages(torch.cat([scale * R, 3 + normal((1, K, 1), seed + 1)]), clip=1e9)[:1]  # another group beside it
    assert torch.allclose(A * (spread + 1e-4) / spread, z, rtol=1e-9, atol=1e-12)  # scale-free but for the 1e-4
    if K == 2:
        assert abs(ratio - math.sqrt(2)) < 1e-9


@pytest.mark.claim("P07")
def test_p07_the_paper_s_figure_is_not_a_softmax_of_normalised_advantages():
    """Figure 2's start, p_max 0.43 and p_min 0.25: over three samples the normalised ratio is at least e^1.73."""
    assert math.log(0.43 / 0.25) < 2 * math.sqrt(3 / 4)
    worst = torch.tensor([0.0, 0.0, 1.0], dtype=torch.float64)
    z = (worst - worst.mean()) / worst.std()
    assert abs((z.max() - z.min()).item() - math.sqrt(3)) < 1e-12


@pytest.mark.claim("P07")
def test_p07_monte_carlo_convergence():
    """Gaussian rewards: E[p_max - p_min] / std(R) tends to E[range]/K; normalising first has no limit 0. < 1e-7."""
    K, n = 3, 100_000
    R = normal((n, K), 0)
    expected_range = 3 / math.sqrt(math.pi)  # of three standard normals

    def gap(R):
        p = R.softmax(1)
        return p.amax(1) - p.amin(1)

    assert z_score(gap(1e-4 * R) / 1e-4, expected_range / K) < Z
    assert z_score(gap(1e-4 * R) / 1e-4, expected_range) > Z  # planted: the 1/K forgotten
    normalised = (R - R.mean(1, keepdim=True)) / R.std(1, keepdim=True)
    assert gap(normalised).mean() > 0.4
