"""Time grids, and the Gaussian transition kernels of a stochastic flow.

A rectified flow joins data x_data (sigma = 0) and noise eps (sigma = 1) by straight lines,

    x_sigma = (1 - sigma) x_data + sigma eps,        dx/dsigma = v(x, sigma) = E[eps - x_data | x_sigma],

and is sampled from sigma_0 = 1 down to sigma_N = 0. To be a *policy* it needs randomness: two of the kernels
below discretise an SDE with the ODE's marginals, the third does not keep them (proofs/P04). Each step
i = 0..N-1 is then Gaussian,

    p_theta(x_{i+1} | x_i) = N(x_{i+1}; mu_i, s_i^2 I),     mu_i = a_i x_i + b_i v_theta(x_i, sigma_i),

where a_i, b_i and s_i depend on the grid alone: theta enters through v, hence through the mean only.
That one fact is the whole reason why policy entropy cannot move (proofs/P01).

    symbol    meaning                                             in code
    sigma_i   noise level of x_i, 1 = pure noise, 0 = image       sigmas[i]
    dt        sigma_i - sigma_{i+1} > 0                           dt[i]
    g_i       diffusion coefficient (the paper's sigma_t)         g
    s_i       standard deviation of the kernel, g_i sqrt(dt)      std[i]

Three kernels of the field, by `kind`:

    flow_sde   g = eta sqrt(sigma / (1 - sigma))    Flow-GRPO, arXiv 2505.05470
    dance_sde  g = eta                              DanceGRPO, arXiv 2505.07818
    cps        s = sigma' sin(eta pi / 2)           Flow-CPS (coefficients preserving), arXiv 2509.05952

The first two are one Euler-Maruyama step of the same SDE. With the score of a rectified flow,
grad log p = -(x + (1 - sigma) v) / sigma, it reads

    mu = x - v dt - (g^2 / 2 sigma) (x + (1 - sigma) v) dt.

The third re-noises the predicted image: mu = (1 - sigma') x_hat + sqrt(sigma'^2 - s^2) eps_hat, with
x_hat = x - sigma v, eps_hat = x + (1 - sigma) v and sigma' = sigma_{i+1}. It keeps the coefficients of image
and noise, not the marginals.
"""

import math
from dataclasses import dataclass, replace
from typing import Literal, get_args

import torch
from jaxtyping import Float
from torch import Tensor

Kind = Literal["flow_sde", "dance_sde", "cps"]
KINDS = get_args(Kind)


def time_grid(steps: int, shift: float = 1.0, dtype: torch.dtype = torch.float32) -> Float[Tensor, " {steps}+1"]:
    """Noise levels from 1 to 0, evenly spaced and then shifted towards noise.

    sigma -> shift sigma / (1 + (shift - 1) sigma); shift = 3 is the choice of SD3 (arXiv 2403.03206)
    and of DanceGRPO's FLUX recipe. Raises ValueError unless steps >= 1 and shift > 0.
    """
    if steps < 1 or shift <= 0:
        raise ValueError(f"time_grid needs steps >= 1 and shift > 0, got steps={steps}, shift={shift}")
    sigma = torch.linspace(1, 0, steps + 1, dtype=torch.float64)
    return (shift * sigma / (1 + (shift - 1) * sigma)).to(dtype)


@dataclass(frozen=True, eq=False)
class FlowSchedule:
    """The theta-free part of the policy: a_i, b_i and s_i of every step.

    sigmas       [N+1], strictly falling, from 1 (or less) to 0.
    kind         "flow_sde", "dance_sde" or "cps" (module docstring).
    noise_level  eta >= 0; 0 is the ODE (for cps eta <= 1).
    sde_window   (start, size): the steps that are stochastic, the others follow the ODE.
                 None: all but the last. The last step is deterministic by default, because noise
                 added there is never removed and stays visible in the image.
    multistep    follow the ODE by `policy.multistep` in place of Euler's method after the last stochastic step.

    `std` [N] is s_i, 0 where a step is deterministic; `steps` lists the stochastic ones.
    Coefficients are computed in float64. Raises ValueError on a bad grid, kind, level or window.
    """

    sigmas: Float[Tensor, " levels"]
    kind: str = "flow_sde"
    noise_level: float = 0.7
    sde_window: tuple[int, int] | None = None
    multistep: bool = False

    def __post_init__(self):
        sigma = [float(s) for s in torch.as_tensor(self.sigmas).double()]
        N = len(sigma) - 1
        if N < 1 or sigma[0] > 1 or sigma[-1] != 0 or any(s <= t for s, t in zip(sigma, sigma[1:])):
            raise ValueError("sigmas must fall strictly from at most 1 to exactly 0 and hold at least 2 values")
        if self.kind not in KINDS:
            raise ValueError(f"unknown kernel kind {self.kind!r}; choose one of {', '.join(KINDS)}")
        if not 0 <= self.noise_level or (self.kind == "cps" and self.noise_level > 1):
            raise ValueError(f"noise_level must be >= 0 (and <= 1 for cps), got {self.noise_level}")
        start, size = self.sde_window or (0, N - 1)
        if start < 0 or size < 0 or start + size > N:
            raise ValueError(f"sde_window {self.sde_window} does not fit into {N} steps")

        noisy = range(start, start + size) if self.noise_level > 0 else range(0)
        a, b, std = [], [], []
        for i in range(N):
            s, s_next = sigma[i], sigma[i + 1]
            dt, eta = s - s_next, self.noise_level if i in noisy else 0.0
            if self.kind == "cps":
                std.append(s_next * math.sin(eta * math.pi / 2))
                noise = math.sqrt(s_next**2 - std[i] ** 2)
                a.append(1 - s_next + noise)
                b.append(-(1 - s_next) * s + noise * (1 - s))
            else:
                # flow_sde is singular at sigma = 1; Flow-GRPO takes the next level's 1 - sigma there.
                g = eta * (math.sqrt(s / (1 - (s if s < 1 else sigma[1]))) if self.kind == "flow_sde" else 1)
                std.append(g * math.sqrt(dt))
                a.append(1 - g**2 / (2 * s) * dt)
                b.append(-(1 + g**2 * (1 - s) / (2 * s)) * dt)
        stochastic = tuple(i for i in range(N) if std[i] > 0)
        std = torch.tensor(std, dtype=torch.float64).to(self.sigmas)
        for name, value in dict(_a=a, _b=b, std=std, steps=stochastic).items():
            object.__setattr__(self, name, value)

    @property
    def dt(self) -> Float[Tensor, " N"]:
        """The positive step sizes sigma_i - sigma_{i+1}."""
        return self.sigmas[:-1] - self.sigmas[1:]

    def mean(self, x: Float[Tensor, "*batch"], velocity: Float[Tensor, "*batch"], i: int) -> Float[Tensor, "*batch"]:
        """mu_i = a_i x + b_i v, the mean of x_{i+1} given x_i = x; float32 at least."""
        dtype = torch.promote_types(x.dtype, torch.float32)
        return self._a[i] * x.to(dtype) + self._b[i] * velocity.to(dtype)

    @property
    def leverage(self) -> Float[Tensor, " S"]:
        """|b_i| / s_i of the stochastic steps: how far a unit of velocity moves mu_i, in standard deviations.

        The gradient of a step's log-density is as large as this.
        """
        return torch.tensor([abs(self._b[i]) / float(self.std[i]) for i in self.steps], dtype=torch.float64)

    def windowed(self, start: int, size: int) -> "FlowSchedule":
        """The same kernels, stochastic on steps start .. start + size - 1 only."""
        return replace(self, sde_window=(start, size))

    def tailed(self, steps: int) -> "FlowSchedule":
        """The same until the last stochastic step is done, then `steps` of the multistep solver, or fewer if there were.

        Their levels are evenly spaced: on a grid shifted towards noise, or one with a level just above 0 as SD3's, the
        solver of second order wastes its calls.
        """
        end = self.steps[-1] + 1
        tail = self.sigmas[end] * torch.linspace(1, 0, min(steps, len(self) - end) + 1)
        return replace(self, sigmas=torch.cat([self.sigmas[:end], tail.to(self.sigmas)]), multistep=True)

    def ode(self) -> "FlowSchedule":
        """The noise-free limit: Euler's method on the probability-flow ODE."""
        return replace(self, noise_level=0.0, sde_window=None)

    def __len__(self) -> int:
        return len(self.sigmas) - 1


def variance_recursion(schedule: FlowSchedule, data_std: float) -> tuple[Float[Tensor, " states"], Float[Tensor, " N"]]:
    """Where the exact flow of data N(0, s^2) takes its own samples: (ratio, amplification), float64.

    ratio[i] is the variance of x_i over V_i = (1 - sigma_i)^2 s^2 + sigma_i^2, that of the flow's marginal, which
    it starts from; amplification[i] is what step i multiplies a deviation of it by,
    ratio[i+1] = amplification[i] ratio[i] + s_i^2 / V_{i+1}. A step is *stable* where this is at most 1
    (proofs/P18). With data of several widths each principal direction has its own s.
    """
    sigma = schedule.sigmas.double()
    V = (1 - sigma) ** 2 * data_std**2 + sigma**2
    slope = (sigma - (1 - sigma) * data_std**2) / V  # the exact velocity is slope x
    one, ratio, amplification = torch.ones((), dtype=torch.float64), [1.0], []
    for i in range(len(schedule)):
        if V[i + 1] == 0:
            raise ValueError("data of width 0 have no relative variance at sigma = 0; take data_std > 0")
        amplification.append((schedule.mean(one, slope[i], i) ** 2 * V[i] / V[i + 1]).item())
        ratio.append(amplification[i] * ratio[i] + (schedule.std[i].double() ** 2 / V[i + 1]).item())
    return torch.tensor(ratio, dtype=torch.float64), torch.tensor(amplification, dtype=torch.float64)
