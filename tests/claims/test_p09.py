"""P09: the variance bonus's gradient at finite group size.

Expectations are taken by enumerating every group of atoms, so most tests hold to rounding error."""

import itertools
import math

import pytest
import sympy
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ref.grpo import advantages
from ref.methods import METHODS
from ref.perceptual import deviations

from .tools import Z, enumerate_groups, make_group, normal, seeds, variance_gradient


@pytest.mark.claim("P09")
def test_p09_table_sympy():
    """The table's rows from the moments of Bernoulli features, exactly, for K = 2..6 and symbolic p."""
    p = sympy.Symbol("p")
    dV = sympy.diff(p * (1 - p), p)
    for K in range(2, 7):
        own = cross = value = centred = 0
        for bits in itertools.product((0, 1), repeat=K):
            weight = sympy.Mul(*[p if b else 1 - p for b in bits])
            m = sympy.Rational(sum(bits), K)
            d = [(b - m) ** 2 for b in bits]
            s = 1 / p if bits[0] else -1 / (1 - p)
            value += weight * d[0]
            own += weight * d[0] * s
            cross += weight * d[1] * s
            centred += weight * (d[0] - sum(d) / K) * s
        R = sympy.Rational
        for got, factor, base in (
            (value, R(K - 1, K), p * (1 - p)),
            (own, R(K - 1, K) ** 2, dV),
            (cross, R(1, K**2), dV),
            (centred, R((K - 1) * (K - 2), K**2), dV),
        ):
            assert sympy.simplify(got - factor * base) == 0
        assert sympy.simplify(own + (K - 1) * cross - R(K - 1, K) * dV) == 0  # the cross-check of the proof


@pytest.mark.claim("P09")
@settings(max_examples=15, deadline=None)
@given(st.integers(2, 5), st.integers(2, 4), st.integers(1, 3), seeds, st.booleans())
def test_p09_table_by_enumeration(K, M, D, seed, leave_one_out):
    """All rows, for random atoms in D dimensions, through `deviations`."""
    atoms, logits = normal((M, D), seed), normal((M,), seed + 1)
    _, probability, phi, score = enumerate_groups(atoms, logits, K)
    V, dV = variance_gradient(atoms, logits)
    bonus = deviations(phi, leave_one_out).square().sum(-1)
    scale = (K / (K - 1)) ** 2 if leave_one_out else 1.0

    def expect(values):
        return torch.tensordot(probability, values, 1)

    close = dict(rtol=1e-11, atol=1e-12)
    torch.testing.assert_close(expect(bonus[:, 0]).item(), scale * (K - 1) / K * V, **close)
    torch.testing.assert_close(expect(bonus[:, :1] * score[:, 0]), scale * ((K - 1) / K) ** 2 * dV, **close)
    torch.testing.assert_close(expect(bonus[:, 1:2] * score[:, 0]), scale / K**2 * dV, **close)
    centred = advantages(bonus[..., None], clip=math.inf, std_normalize=False)
    torch.testing.assert_close(expect(centred[:, 0] * score[:, 0]), scale * (K - 1) * (K - 2) / K**2 * dV, **close)
    if leave_one_out and dV.norm() > 1e-3:  # planted: the plan's 'unbiased' under GRPO's centring
        assert not torch.allclose(expect(centred[:, 0] * score[:, 0]), dV, rtol=1e-6)
        torch.testing.assert_close(expect(bonus[:, :1] * score[:, 0]), dV, **close)


@pytest.mark.claim("P09")
@settings(max_examples=15, deadline=None)
@given(st.integers(2, 5), st.integers(1, 3), seeds, st.floats(0.0, 3.0), st.floats(0.3, 2.0))
def test_p09_pec_under_grpo(K, D, seed, weight, h):
    """What METHODS['pec'] ascends: (K-1)/K grad(E R + (K-2)/K lambda V / 2 h^2 D)."""
    M = 3
    atoms, logits, R = normal((M, D), seed), normal((M,), seed + 1), normal((M,), seed + 2)
    index, probability, phi, score = enumerate_groups(atoms, logits, K)
    shaped = METHODS["pec"](weight).shape(make_group(phi, h, R[index]))
    A = advantages(shaped, clip=math.inf, std_normalize=False)[..., 0]
    got = torch.einsum("n,nk,nkm->m", probability, A, score) / K
    p = logits.softmax(0)
    dR, (_, dV) = p * (R - p @ R), variance_gradient(atoms, logits)
    right = (K - 1) / K * (dR + (K - 2) / K * weight * dV / (2 * h**2 * D))
    torch.testing.assert_close(got, right, rtol=1e-10, atol=1e-11)
    if weight * dV.norm() / (2 * h**2 * D) > 1e-2:  # planted: wrong sign, and the factor of the plan
        for factor in (-(K - 2) / K if K > 2 else -1.0, ((K - 1) / K) ** 2):
            wrong = (K - 1) / K * (dR + factor * weight * dV / (2 * h**2 * D))
            assert not torch.allclose(got, wrong, rtol=1e-8, atol=1e-9)


@pytest.mark.claim("P09")
def test_p09_gaussian_monte_carlo():
    """phi ~ N(mu, e^{2a}): dV/da = 2 e^{2a}. Four comparisons at |z| < 6."""
    K, groups, a = 4, 400_000, 0.3
    eps = normal((groups, K, 1), 7)
    phi, score = 2.0 + math.exp(a) * eps, (eps[..., 0] ** 2 - 1)
    dV = 2 * math.exp(2 * a)
    own = deviations(phi).square().sum(-1)
    loo = deviations(phi, leave_one_out=True).square().sum(-1)

    def z(sample, expected):
        return ((sample.mean() - expected) / (sample.std() / math.sqrt(groups))).abs()

    assert z(own[:, 0] * score[:, 0], (3 / 4) ** 2 * dV) < Z
    assert z(loo[:, 0] * score[:, 0], dV) < Z
    centred = ((own - own.mean(1, keepdim=True)) * score).mean(1)
    assert z(centred, 3 * 2 / 16 * dV) < Z
    assert z(own[:, 0] * score[:, 0], dV) > Z  # planted: no correction
    assert z(centred, (3 / 4) ** 2 * dV) > Z  # planted: the baseline forgotten


@pytest.mark.claim("P09")
@settings(max_examples=15, deadline=None)
@given(st.integers(1, 4), st.integers(1, 8), seeds)
def test_p09_pair_is_dead(G, D, seed):
    """K = 2: both members are equally far from their mean, so PEC adds no centred advantage at all."""
    phi, reward = normal((G, 2, D), seed), normal((G, 2), seed + 1)
    with_bonus = METHODS["pec"](5.0).shape(make_group(phi, 0.5, reward))
    plain = METHODS["flow_grpo"]().shape(make_group(phi, 0.5, reward))
    got, want = (advantages(r, clip=math.inf, std_normalize=False) for r in (with_bonus, plain))
    torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-9)


@pytest.mark.claim("P09")
def test_p09_a_shared_first_noise_leaves_the_variance_given_it():
    """Groups that share x_0: PEC ascends E_x0 Var(phi | x_0), not Var(phi). Two values of x_0, three atoms, K = 3."""
    K, weight, h, D = 3, 0.7, 0.8, 2
    atoms, logits, first = normal((3, D), 0), normal((2, 3), 1), (0.3, 0.7)
    got, given_x0 = torch.zeros(2, 3, dtype=torch.float64), torch.zeros(2, 3, dtype=torch.float64)
    for n, share in enumerate(first):
        _, probability, phi, score = enumerate_groups(atoms, logits[n], K)
        A = advantages(METHODS["pec"](weight).shape(make_group(phi, h)), clip=math.inf, std_normalize=False)[..., 0]
        got[n] = share * torch.einsum("n,nk,nkm->m", probability, A, score) / K
        given_x0[n] = share * variance_gradient(atoms, logits[n])[1]
    factor = weight * (K - 1) * (K - 2) / (K**2 * 2 * h**2 * D)
    torch.testing.assert_close(got, factor * given_x0, rtol=1e-11, atol=1e-12)

    free = logits.clone().requires_grad_()
    p = torch.tensor(first, dtype=torch.float64) @ free.softmax(1)
    whole = torch.autograd.grad((p[:, None] * (atoms - p @ atoms).square()).sum(), free)[0]
    assert not torch.allclose(got, factor * whole, rtol=1e-2)  # planted: the whole variance
