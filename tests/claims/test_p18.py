"""P18: near sigma = 0 a stochastic step overshoots when its noise is larger than the data are wide.

Gaussian data make every kernel linear, so a variance is a recursion and nothing is sampled but in the last test.
"""

import math

import pytest
import sympy
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import brentq

from ref.policy import rollout
from ref.presets import PRESETS
from ref.schedule import KINDS, FlowSchedule, time_grid, variance_recursion
from ref.worlds import figures
from ref.worlds.mixture import GaussianMixture

Z = 5.5  # standard errors; two-sided normal tail 4e-8


def schedule(steps, kind="dance_sde", eta=0.7, shift=1.0, **window):
    return FlowSchedule(time_grid(steps, shift, torch.float64), kind, eta, **window)


def blob(std):
    """Data N(0, s^2) in one dimension; its velocity comes from the mixture, not from schedule.py."""
    return GaussianMixture(torch.zeros(1, 1, dtype=torch.float64), std)


@pytest.mark.claim("P18")
def test_p18_sympy_amplification():
    """The SDE step multiplies x by (C - g^2 dt/2)/V, C = Cov(x_sigma, x_sigma'); V V' - C^2 = s^2 dt^2; CPS by at most C/V.

    From the step as schedule.py's docstring has it. Planted: V^2 for V V' (no change of the marginal) is no identity.
    """
    s, g = sympy.symbols("s g", positive=True)
    t, u, c = sympy.symbols("t u c", positive=True)  # sigma, sigma', sqrt(sigma'^2 - s_i^2)
    V, W = (1 - t) ** 2 * s**2 + t**2, (1 - u) ** 2 * s**2 + u**2
    C, dt = (1 - t) * (1 - u) * s**2 + t * u, t - u
    v = (t - (1 - t) * s**2) / V  # E[eps - x_data | x = 1]
    step = 1 - v * dt - g**2 / (2 * t) * (1 + (1 - t) * v) * dt
    assert sympy.simplify(step - (C - g**2 * dt / 2) / V) == 0
    assert sympy.expand(V * W - C**2 - s**2 * dt**2) == 0 and sympy.expand(V * V - C**2 - s**2 * dt**2) != 0
    cps = (1 - u) * (1 - t * v) + c * (1 + (1 - t) * v)
    assert sympy.simplify(cps - ((1 - t) * (1 - u) * s**2 + t * c) / V) == 0
    k, w, n = sympy.symbols("k w n", positive=True)  # shift, unshifted level, unshifted step
    shifted = lambda w: k * w / (1 + (k - 1) * w)  # noqa: E731
    a, b = shifted(w), shifted(w - n)
    assert sympy.simplify((1 / b - 1 / a) - n / (k * w * (w - n))) == 0  # dance_sde: dt / sigma sigma'
    assert sympy.simplify(b * (1 - a) / (a - b) - (w - n) * (1 - w) / n) == 0  # flow_sde: the shift drops out


grids = dict(
    steps=st.integers(2, 40), kind=st.sampled_from(KINDS), eta=st.floats(0.05, 1.0), shift=st.floats(0.5, 5.0), s=st.floats(0.02, 2.0)
)  # fmt: skip


@pytest.mark.claim("P18")
@settings(max_examples=60, deadline=None)
@given(**grids)
def test_p18_recursion_against_the_unrolled_chain(steps, kind, eta, shift, s):
    """x_N as an explicit linear form of x_0 and all noises, through the mixture's velocity; and the exact condition.

    Every coefficient is a product of at most 40 factors, each off by some 4 ulp: relative 1e-12 is allowed ten times.
    """
    grid, world = schedule(steps, kind, eta, shift), blob(s)
    form = torch.zeros(steps + 1, 1, dtype=torch.float64)  # row 0: x_0, row i + 1: eps_i
    form[0] = 1
    ratio, amplification = variance_recursion(grid, s)
    for i in range(steps):
        form = grid.mean(form, world.velocity(form, grid.sigmas[i]), i)
        form[i + 1] += grid.std[i]
        t, u = grid.sigmas[i : i + 2].tolist()
        V, W = ((1 - x) ** 2 * s**2 + x**2 for x in (t, u))
        assert ratio[i + 1].item() == pytest.approx(form.square().sum().item() / W, rel=1e-11)
        if kind != "cps":
            C, noise = (1 - t) * (1 - u) * s**2 + t * u, grid.std[i].item() ** 2
            margin = 2 * (C + math.hypot(C, s * (t - u))) - noise
            if abs(margin) > 1e-9:
                assert (amplification[i] <= 1) == (margin >= 0)
            if noise <= 4 * C:  # the simple form suffices
                assert amplification[i] <= 1 + 1e-12
        else:
            assert amplification[i] <= 1 + 1e-12  # always


@pytest.mark.claim("P18")
def test_p18_thresholds_for_narrow_data():
    """s -> 0: dance_sde stable iff N <= 8 shift/eta^2, flow_sde iff eta^2 <= 4 (1 - 2/N), at any shift >= 1.

    Planted: the plan's 16/eta^2 and eta^2 <= 8 are not the thresholds, nor |factor of x| <= 1.
    """

    def stable(*arguments):
        grid = schedule(*arguments)
        noisy = list(grid.steps)
        return bool((variance_recursion(grid, 1e-7)[1][noisy] <= 1 + 1e-9).all())

    for eta, shift in ((0.7, 1.0), (0.3, 3.0), (0.5, 2.0)):
        most = math.floor(8 * shift / eta**2)
        assert stable(most, "dance_sde", eta, shift) and not stable(most + 1, "dance_sde", eta, shift)
        assert not stable(math.floor(16 * shift / eta**2), "dance_sde", eta, shift)
        assert not stable(math.floor(12 * shift / eta**2), "dance_sde", eta, shift)  # |a| <= 1 at sigma = 2 dt
    for steps in (4, 10, 50):
        for shift in (1.0, 3.0):
            edge = math.sqrt(4 * (1 - 2 / steps))
            assert stable(steps, "flow_sde", 0.999 * edge, shift) and not stable(steps, "flow_sde", 1.001 * edge, shift)
            assert not stable(steps, "flow_sde", 0.99 * math.sqrt(8), shift)


@pytest.mark.claim("P18")
def test_p18_more_steps_can_be_worse():
    """The page's table: s = 0.01, eta = 0.7, even grid; variance of x_N over s^2."""
    table = {10: (0.0397, 0.0152, 0.00799), 200: (27_300, 0.813, 0.497), 1600: (4.11, 0.973, 0.671)}
    for steps, row in table.items():
        for kind, printed in zip(("dance_sde", "flow_sde", "cps"), row):
            assert variance_recursion(schedule(steps, kind), 0.01)[0][-1].item() == pytest.approx(printed, rel=6e-3)
    by_steps = [variance_recursion(schedule(n), 0.01)[0][-1].item() for n in (10, 50, 200, 1600, 6400)]
    assert by_steps[0] < by_steps[1] < by_steps[2] > by_steps[3] > by_steps[4] > 1  # worse, then better
    assert by_steps[4] < 1.3
    curves = {
        kind: (list(table), [row[n] for row in table.values()])
        for n, kind in enumerate(("dance_sde", "flow_sde", "cps"))
    }
    assert figures.kernel_stability(curves, (8 / 0.49, 0.49 / 4e-4)).axes[0].get_yscale() == "log"


@pytest.mark.claim("P18")
def test_p18_presets():
    """Which recipe is stable for which width of the data: mixture, letters, FLUX for all; SD3's own grid for s >= 0.0691.

    SD3's scheduler ends at sigma = 0.0089, one step after 0.278: too late to remove that step's noise of std 0.225.
    One more deterministic step, or time_grid(10, 3), cures it.
    """
    from diffusers import FlowMatchEulerDiscreteScheduler

    def of(preset, grid, **window):
        recipe = PRESETS[preset].settings
        return FlowSchedule(grid.double(), recipe.kind, recipe.noise_level, **window), recipe.steps

    def worst(grid, s=1e-7):
        return variance_recursion(grid, s)[1][list(grid.steps)].max().item()

    for preset, shift in (("mixture", 1.0), ("letters", 1.0), ("flux_dev", 1.0), ("flux_dev", 1.8776), ("flux_dev_720", 3.0)):  # fmt: skip
        grid, steps = of(preset, time_grid(PRESETS[preset].settings.steps, shift))
        assert worst(grid) < 1 and len(grid) == steps
    scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0)
    scheduler.set_timesteps(10)
    grid, steps = of("sd35_medium", scheduler.sigmas)
    assert steps == 10 and grid.std[8].item() == pytest.approx(0.225, abs=1e-3)
    assert worst(grid) > 80
    (t, u), noise = grid.sigmas[8:10].tolist(), grid.std[8].item() ** 2
    C = lambda s: (1 - t) * (1 - u) * s**2 + t * u  # noqa: E731
    edge = brentq(lambda s: 2 * (C(s) + math.hypot(C(s), s * (t - u))) - noise, 0.01, 0.5)  # the page's exact condition
    assert edge == pytest.approx(0.0691, abs=1e-4) and worst(grid, 1.001 * edge) < 1 < worst(grid, 0.999 * edge)
    assert brentq(lambda s: variance_recursion(grid, s)[0][-1].item() - 1, 0.1, 0.5) == pytest.approx(0.235, abs=1e-3)
    assert variance_recursion(grid, 0.1)[0][-1] > 5 and variance_recursion(grid, 0.2)[0][-1] > 1.25
    for cured in (of("sd35_medium", scheduler.sigmas, sde_window=(0, 8))[0], of("sd35_medium", time_grid(10, 3.0))[0]):
        assert worst(cured) < 1 and variance_recursion(cured, 0.1)[0][-1] < 1.1


@pytest.mark.claim("P18")
def test_p18_monte_carlo():
    """The library's sampler at s = 0.1, N = 60, eta = 2 (unstable): log of the variance against the recursion. One comparison, 4e-8.

    x_N is Gaussian, so the sample variance's relative standard error is sqrt(2/n). Planted: truth (ratio 1) and the
    recursion of half as many steps are rejected.
    """
    n, grid, world = 20_000, schedule(60, eta=2.0), blob(0.1)
    noise = torch.randn(n, 1, dtype=torch.float64, generator=torch.Generator().manual_seed(18))
    x = rollout(world.velocity, grid, noise, torch.Generator().manual_seed(19)).x[-1]
    measured, error = x.square().mean().item() / 0.01, math.sqrt(2 / n)
    assert abs(measured / variance_recursion(grid, 0.1)[0][-1].item() - 1) < Z * error
    for wrong in (1.0, variance_recursion(schedule(30, eta=2.0), 0.1)[0][-1].item()):
        assert abs(measured / wrong - 1) > 10 * Z * error


@pytest.mark.claim("P18")
def test_p18_errors():
    with pytest.raises(ValueError, match="width 0"):
        variance_recursion(schedule(4), 0.0)
