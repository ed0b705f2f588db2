"""P17: the last noisy state keeps the entropy of the noise that made it: the collapse has a floor."""

import math

import pytest
import sympy
import torch
from scipy.integrate import quad

from ref.entropy import entropy_floor, knn_entropy, path_entropy, policy_entropy
from ref.policy import rollout
from ref.schedule import KINDS, FlowSchedule, time_grid
from ref.worlds import figures
from ref.worlds.mixture import GaussianMixture

Z = 5.5  # standard errors; two-sided normal tail 4e-8
WORLD = GaussianMixture(torch.tensor([[-1.5], [1.5]], dtype=torch.float64), 0.35)  # notebook 02's
GRID = torch.linspace(-12, 12, 801, dtype=torch.float64)
H = (GRID[1] - GRID[0]).item()


def schedule(steps=5, kind="flow_sde", eta=0.9, window=None):
    return FlowSchedule(time_grid(steps, dtype=torch.float64), kind, eta, window)


def entropy(p):
    return -(H * torch.xlogy(p, p)).sum().item()


def integrate(s, velocity):
    """Densities of the free coordinates y_1 .. y_m = z, the joint of (x_{i_m}, z), and H(Y without z | z) by Bayes."""
    p, path, densities = (-GRID.square() / 2).exp() / math.sqrt(2 * math.pi), 0.0, []
    for i in s.steps:
        mean = s.mean(GRID[:, None], velocity(GRID[:, None], s.sigmas[i]), i)
        joint = p[:, None] * (-((GRID - mean) / s.std[i]).square() / 2).exp() / (math.sqrt(2 * math.pi) * s.std[i])
        before, p = p, H * joint.sum(0)
        path -= (H * H * torch.xlogy(joint, joint / p.clamp_min(1e-300))).sum().item()
        densities.append(p)
    return densities, (joint, before), path


def wiggle(seed, scale):
    """The exact velocity plus a smooth random function: a policy that is nobody's base model."""
    a, b, c = torch.randn(3, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return lambda x, sigma: WORLD.velocity(x, sigma) + scale * torch.sin(a * x + 3 * b * sigma + c)


def aimed(s, target):
    """A velocity with which the last stochastic step's mean is target(x), and all other steps are the mixture's."""
    last = s.steps[-1]

    def velocity(x, sigma):
        if abs(float(sigma) - float(s.sigmas[last])) > 1e-12:
            return WORLD.velocity(x, sigma)
        one = torch.ones((), dtype=torch.float64)
        a, b = s.mean(one, 0 * one, last), s.mean(0 * one, one, last)
        return (target(x) - a * x) / b

    return velocity


@pytest.mark.claim("P17")
def test_p17_sympy_linear_chain():
    """Three linear Gaussian steps: I(Y without z; z) by determinants of the joint covariance is H(z) - H_{i_m}, symbols free."""
    a = sympy.symbols("a1:4", real=True)
    s = sympy.symbols("s1:4", positive=True)
    rows = [sympy.Matrix([[1, 0, 0, 0]])]
    for n in range(3):
        noise = sympy.zeros(1, 4)
        noise[n + 1] = s[n]
        rows.append(a[n] * rows[-1] + noise)
    L = sympy.Matrix.vstack(*rows)
    S = L * L.T
    twice = sympy.log(S[:3, :3].det() * S[3, 3] / S.det())  # 2 I
    entropy_z, floor = sympy.log(S[3, 3]), sympy.log(s[2] ** 2)  # 2 H less log(2 pi e)
    assert sympy.simplify(sympy.exp(twice) - sympy.exp(entropy_z - floor)) == 0
    assert sympy.simplify(sympy.exp(twice) - sympy.exp(entropy_z - sympy.log(s[1] ** 2))) != 0  # planted: another step


@pytest.mark.claim("P17")
@pytest.mark.parametrize(("kind", "steps", "eta"), [(kind, n, e) for kind in KINDS for n, e in ((3, 1.0), (6, 0.6))])
@pytest.mark.parametrize(("seed", "scale"), [(0, 0.0), (1, 1.0)])
def test_p17_mutual_information_by_quadrature(kind, steps, eta, seed, scale):
    """Nonlinear policies: I(x_{i_m}; z) as the KL of joint and product on a grid, against H(z) - entropy_floor, to 1e-7.

    The grid's step is 0.03 and the narrowest kernel (cps, N = 6) has std 0.13, so sums of Gaussians are exact to
    exp(-2 pi^2 4.5^2). Means stay within 1.5 + 2 (the mode, and the wiggle times sum |b_i|) and stds below 1.2, so
    12 is seven stds away. The path given z never exceeds the path without z, and P02's sum holds.
    """
    s = schedule(steps, kind, eta)
    densities, (joint, before), path = integrate(s, wiggle(seed, scale))
    z = densities[-1]
    information = (H * H * torch.xlogy(joint, joint / (before[:, None] * z).clamp_min(1e-300))).sum().item()
    left = entropy(z) - entropy_floor(s, 1).item()
    assert left == pytest.approx(information, abs=1e-7) and left > 0
    total = path_entropy(s, 1).item()
    assert entropy(z) + path == pytest.approx(total, abs=1e-6)
    assert path < total - entropy_floor(s, 1).item()
    m = (GRID > 0).double()  # a mode that is read off z: H(mode) <= I + H(mode | the rest)
    conditional = (H * joint @ m / before.clamp_min(1e-300)).clamp(0, 1)
    binary = lambda q: torch.special.entr(q) + torch.special.entr(1 - q)  # noqa: E731
    assert binary(H * z @ m) <= left + H * before @ binary(conditional) + 1e-9


@pytest.mark.claim("P17")
@pytest.mark.parametrize(
    ("kind", "window"), [("flow_sde", None), ("dance_sde", None), ("cps", None), ("flow_sde", (1, 2))]
)
def test_p17_closed_forms(kind, window):
    """Mean constant: the floor, exactly. Two means +-c with probabilities w: floor + h(w) - H(mode | z), by SciPy's quad.

    With equal weights H(mode | z) <= log 2 exp(-c^2/2 s^2). Grid error as above; quad's is 1e-10. With a window the floor
    is that of the window's last step.
    """
    s = schedule(6, kind, 0.9, window)
    floor, std = entropy_floor(s, 1).item(), s.std[s.steps[-1]].item()
    assert floor == pytest.approx(0.5 * math.log(2 * math.pi * math.e * std**2), abs=1e-12)
    assert (window is None) == (s.steps[-1] == 4) and not s.std[s.steps[-1] + 1 :].any()
    # the states before a window's first stochastic step are deterministic functions of x_0: not what `integrate` steps through
    run = s if window is None else schedule(6, kind, 0.9).windowed(0, window[0] + window[1])
    assert entropy_floor(run, 1).item() == floor
    z = integrate(run, aimed(run, lambda x: 0 * x + 0.7))[0][-1]
    assert entropy(z) == pytest.approx(floor, abs=1e-9)
    for c, edge in ((0.8, 0.0), (0.15, 0.0), (0.8, 0.6)):
        z, before = (v[-1] for v in integrate(run, aimed(run, lambda x: torch.where(x > edge, c, -c)))[:2])
        w = (H * before @ (GRID > edge).double()).item()

        def posterior(x, c=c, w=w):
            up, down = w * math.exp(-((x - c) ** 2) / (2 * std**2)), (1 - w) * math.exp(-((x + c) ** 2) / (2 * std**2))
            total, entropy = up + down, 0.0
            for part in (up, down):
                entropy -= part * math.log(part / total) if part > 0 else 0.0
            return entropy / math.sqrt(2 * math.pi * std**2)

        unsure = quad(posterior, -c - 12 * std, c + 12 * std, points=[-c, 0, c], epsabs=1e-12, limit=400)[0]
        h = -w * math.log(w) - (1 - w) * math.log(1 - w)
        assert entropy(z) - floor == pytest.approx(h - unsure, abs=1e-7)
        if edge == 0:
            assert unsure <= 2 * math.sqrt(w * (1 - w)) * math.log(2) * math.exp(-(c**2) / (2 * std**2)) + 1e-9
            assert w == pytest.approx(0.5, abs=0.01)


@pytest.mark.claim("P17")
def test_p17_knn_sees_the_floor():
    """kNN on the library's own rollouts: a collapsed policy is at the floor, one with two means log 2 above it.

    The estimate of N(mu, s^2) less its true entropy has a law that depends on neither, so the collapsed policy is compared
    with standard normals: no bias. Two far clusters of n points are two single ones of n/2, up to psi(n) - psi(n/2) =
    log 2 + O(1/n): no bias either, but 1/n. 40 blocks each; |t| < 6.5 with 78 degrees of freedom fails with 1e-8; 2 comparisons.
    """
    s, blocks = schedule(), 40
    generator = torch.Generator().manual_seed(17)

    def estimates(n, target=None):
        noise = torch.randn(blocks * n, 1, dtype=torch.float64, generator=generator)
        z = noise if target is None else rollout(aimed(s, target), s, noise, generator).x[s.steps[-1] + 1]
        return torch.tensor([knn_entropy(part).item() for part in z.split(n)], dtype=torch.float64)

    def t(one, two, difference):
        error = ((one.var() + two.var()) / blocks).sqrt().item()
        return abs((one.mean() - two.mean()).item() - difference) / error

    pivot, collapsed = estimates(500), estimates(500, lambda x: 0 * x + 1.2)
    pair = estimates(1000, lambda x: torch.where(x > 0, 2.5, -2.5))
    normal, floor = 0.5 * math.log(2 * math.pi * math.e), entropy_floor(s, 1).item()
    assert t(collapsed, pivot, floor - normal) < 6.5
    assert t(pair, collapsed, math.log(2)) < 6.5
    others = policy_entropy(s, 1)[list(s.steps[:-1])].tolist()
    assert all(t(collapsed, pivot, other - normal) > 6.5 for other in others)  # planted: another step's entropy
    assert t(pair, collapsed, 0.0) > 6.5


@pytest.mark.claim("P17")
def test_p17_what_can_move_in_the_base_model():
    """The page's numbers, notebook 02's world (N = 5, flow_sde, eta = 0.9): floor 0.306, base 1.324; and the two-Gaussian estimate."""
    s = schedule()
    base = entropy(integrate(s, WORLD.velocity)[0][-1])
    assert entropy_floor(s, 1).item() == pytest.approx(0.306, abs=6e-4) and base == pytest.approx(1.324, abs=6e-4)
    sigma = s.sigmas[s.steps[-1] + 1].item()  # of z, where the flow's own law is two Gaussians of variance V
    V = (1 - sigma) ** 2 * 0.35**2 + sigma**2
    exact = -(H * WORLD.log_prob(GRID[:, None], sigma).exp() * WORLD.log_prob(GRID[:, None], sigma)).sum().item()
    assert figures.entropy_budget([0, 70], [base, 0.512], entropy_floor(s, 1).item()).axes[0].get_xlim() == (0, 70)
    estimate = math.log(2) + 0.5 * math.log(2 * math.pi * math.e * V)
    assert estimate - 0.01 < exact < estimate  # less H(mode | z)
    with pytest.raises(ValueError, match="without stochastic steps"):
        entropy_floor(s.ode(), 1)
