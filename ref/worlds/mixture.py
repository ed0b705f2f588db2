"""Gaussian mixtures: a world small enough that everything is known in closed form.

**The flow.** Data are a mixture of M equally wide Gaussians, sum_m w_m N(c_m, s^2 I). Along the straight
lines x_t = (1 - t) x_data + t eps (t is the noise level sigma: 1 noise, 0 data) the marginal stays one,

    p_t(x) = sum_m w_m N(x; (1 - t) c_m, V_t I),        V_t = (1 - t)^2 s^2 + t^2,

and Gaussian conditioning within each component gives the velocity without any training,

    v(x, t) = E[eps - x_data | x_t = x] = sum_m r_m(x, t) [ -c_m + (t - (1 - t) s^2) / V_t (x - (1 - t) c_m) ],

with the responsibilities r_m ∝ w_m exp(-||x - (1 - t) c_m||^2 / 2 V_t). `MixtureFlow` adds a small network
that starts at exactly zero: the "pretrained" model is exact, and fine-tuning moves only the network.

**The theory.** A policy over modes that climbs E[R] by the natural policy gradient follows the replicator
flow (proofs/P06), dp_m/dtau = p_m (R_m - E[R]), solved by

    p_tau ∝ p_0 exp(tau R):       dE[R]/dtau = Var(R),     dH/dtau = -Cov(log p, R).

PEC adds lambda ||phi - m||^2 / 2 h^2 to R. Two modes a feature distance Delta apart, with reward gap delta and
probabilities p and 1 - p, then rest, for large groups (K -> inf), where the shaped rewards agree (proofs/P11),

    p* = 1/2 + delta h^2 / (lambda Delta^2),       inside (1/2, 1) iff lambda > lambda_c = 2 delta h^2 / Delta^2.

two_modes.py has both at finite K. Here lambda multiplies the log-density *summed* over the D features;
`methods.PEC` takes it per dimension, so its weight is D times as large. A two-dimensional world's features are
its coordinates, phi(x) = x.

    symbol   meaning                       in code
    c_m, s   centres, width of a mode      means [M, D], std
    w_m      weights                       weights [M]
    t        noise level sigma             t, a number or [B]
    delta    reward gap > 0                reward_gap
    Delta    distance of the features      feature_distance
"""

import math
from collections.abc import Callable
from contextlib import contextmanager
from pathlib import Path

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from ref.scale.processes import rank
from ref.schedule import FlowSchedule, time_grid


class GaussianMixture:
    """sum_m w_m N(c_m, s^2 I) in any dimension D, and its rectified flow.

    means [M, D], std s > 0 (a number), weights [M] >= 0 (normalised here; equal when None). Everything is
    computed in the dtype of `means`. Raises ValueError on another shape, width or weights.
    """

    def __init__(self, means: Tensor, std: float, weights: Tensor | None = None):
        if means.ndim != 2 or not std > 0:
            raise ValueError(f"means must be [M, D] and std > 0, got {tuple(means.shape)} and {std}")
        weights = torch.ones(len(means)).to(means) if weights is None else torch.as_tensor(weights).to(means)
        if weights.shape != means.shape[:1] or (weights < 0).any() or not weights.sum() > 0:
            raise ValueError(f"weights must be {len(means)} numbers >= 0 with a positive sum, got {weights.tolist()}")
        self.means, self.std, self.weights = means, float(std), weights / weights.sum()

    def _parts(self, x: Tensor, t: Tensor | float):
        """t and V_t, numbers or [1, B]; and log w_m - ||x - (1 - t) c_m||^2 / 2 V_t, [M, B].

        A single t, of any kind, is a constant: there is no gradient by it. Samples come last: a softmax
        along memory's last, short dimension would be ten times slower.
        """
        t = float(t) if torch.as_tensor(t).ndim == 0 else torch.as_tensor(t).to(x).reshape(1, -1)
        variance = (1 - t) ** 2 * self.std**2 + t**2
        squared = (x.T - (1 - t) * self.means[..., None]).square().sum(1)
        return t, variance, self.weights.log()[:, None] - squared / (2 * variance)

    def log_prob(self, x: Float[Tensor, "B D"], t: Float[Tensor, "..."] | float = 0.0) -> Float[Tensor, " B"]:
        """log p_t(x) in nats; t = 0 is the data and t = 1 is N(0, I)."""
        _, variance, logs = self._parts(x, t)
        normaliser = 0.5 * x.shape[1] * torch.as_tensor(2 * math.pi * variance, dtype=x.dtype, device=x.device).log()
        return logs.logsumexp(0) - normaliser.flatten()

    def responsibilities(self, x: Float[Tensor, "B D"], t: Float[Tensor, "..."] | float = 0.0) -> Float[Tensor, "B M"]:
        """r_m(x, t) = P(mode m | x_t = x)."""
        return self._parts(x, t)[2].softmax(0).T

    def velocity(self, x: Float[Tensor, "B D"], t: Float[Tensor, "..."] | float) -> Float[Tensor, "B D"]:
        """v(x, t) = E[eps - x_data | x_t = x], t a number or one for each sample."""
        t, variance, logs = self._parts(x, t)
        centre = self.means.T @ logs.softmax(0)
        return (-centre + (t - (1 - t) * self.std**2) / variance * (x.T - (1 - t) * centre)).T.contiguous()

    def score(self, x: Float[Tensor, "B D"], t: Float[Tensor, "..."] | float) -> Float[Tensor, "B D"]:
        """grad log p_t(x); equals -(x + (1 - t) v) / t (schedule.py), but is finite at t = 0 too."""
        t, variance, logs = self._parts(x, t)
        return (((1 - t) * (self.means.T @ logs.softmax(0)) - x.T) / variance).T.contiguous()

    def sample(self, n: int, generator: torch.Generator | None = None, t: float = 0.0) -> Float[Tensor, "{n} D"]:
        """n draws from p_t."""
        mode = torch.multinomial(self.weights, n, replacement=True, generator=generator)
        eps = torch.randn(n, self.means.shape[1], dtype=self.means.dtype, generator=generator)
        return (1 - t) * self.means[mode] + math.sqrt((1 - t) ** 2 * self.std**2 + t**2) * eps

    def mode(self, x: Float[Tensor, "B D"]) -> Int[Tensor, " B"]:
        """The nearest centre of every sample, in 0..M-1."""
        return (x[:, None] - self.means).square().sum(-1).argmin(1)

    def occupancy(self, x: Float[Tensor, "B D"]) -> Float[Tensor, " M"]:
        """Share of the samples that lie nearest to each centre."""
        return torch.bincount(self.mode(x), minlength=len(self.means)).to(x.dtype) / len(x)


def ring(modes: int = 8, radius: float = 2.0, std: float = 0.15) -> GaussianMixture:
    """`modes` equal Gaussians on a circle; mode m stands at angle 2 pi m / modes."""
    angle = torch.arange(modes) * (2 * math.pi / modes)
    return GaussianMixture(radius * torch.stack([angle.cos(), angle.sin()], 1), std)


def effective_modes(probability: Float[Tensor, "*batch M"]) -> Float[Tensor, "*batch"]:
    """exp of the entropy of mode occupancies: 1 for one mode, M for M equal ones."""
    return torch.special.entr(probability).sum(-1).exp()


# ---------------------------------------------------------------- rewards, grpo.train's signature


def tilted(mixture: GaussianMixture, gaps: Tensor) -> Callable[[Tensor, list[str]], Tensor]:
    """R(x) = gaps[m(x)], the reward [M] of the nearest mode: some modes pay more than others."""
    gaps = torch.as_tensor(gaps).to(mixture.means)

    def tilted_reward(images: Tensor, prompts: list[str]) -> Tensor:
        return gaps[mixture.mode(images)]

    return tilted_reward


def flat(mixture: GaussianMixture) -> Callable[[Tensor, list[str]], Tensor]:
    """R(x) = exp(-||x - c_m(x)||^2 / 2 s^2): pays for sharp samples, no mode more than another."""

    def flat_reward(images: Tensor, prompts: list[str]) -> Tensor:
        squared = (images - mixture.means[mixture.mode(images)]).square().sum(-1)
        return (-squared / (2 * mixture.std**2)).exp()

    return flat_reward


def coordinates(images: Tensor) -> Tensor:
    """The perceptual space of a two-dimensional world: phi(x) = x, [B, D]."""
    return images


# ---------------------------------------------------------------- theory


def replicator(p0: Tensor, reward: Tensor, tau: Tensor | float) -> Tensor:
    """p_tau ∝ p_0 exp(tau R): p0 and reward [M], tau a number or [T] -> [M] or [T, M] (proofs/P06)."""
    tau = torch.as_tensor(tau, dtype=p0.dtype)[..., None]
    return (p0.log() + tau * reward).softmax(-1)


def conditional_replicator(p0: Tensor, reward: Tensor, tau: Tensor | float, weights: Tensor | None = None) -> Tensor:
    """E over x_0 of p_0(m | x_0) exp(tau R_m) / Z(x_0): the curve of a flow, whose x_0 is not trained (proofs/P16).

    p0 [X, M] holds p_0(. | x_0) at X draws (or quadrature nodes) of x_0, `weights` [X] their weights (equal when
    None, normalised here); reward [M], tau a number or [T] -> [M] or [T, M]. Exact as the number of steps grows;
    for two outcomes an upper bound of the better one's share at every number of steps.
    """
    weights = torch.ones(len(p0)).to(p0) if weights is None else weights
    return weights / weights.sum() @ replicator(p0, reward, torch.as_tensor(tau, dtype=p0.dtype)[..., None])


def critical_lambda(reward_gap: float, feature_distance: float, bandwidth: float) -> float:
    """lambda_c = 2 delta h^2 / Delta^2: PEC keeps both modes iff its weight is larger (proofs/P11).

    For log p_perc summed over features; times D when it is averaged. For K -> inf; two_modes.py has finite K.
    """
    return 2 * reward_gap * bandwidth**2 / feature_distance**2


def fixed_point(weight: float, reward_gap: float, feature_distance: float, bandwidth: float) -> float:
    """p* = 1/2 + delta h^2 / (lambda Delta^2), better mode's share at rest for K -> inf; 1 if lambda <= lambda_c."""
    ratio = critical_lambda(reward_gap, feature_distance, bandwidth) / weight if weight > 0 else math.inf
    return min(1.0, (1 + ratio) / 2)


# ---------------------------------------------------------------- the trainable model


class MixtureFlow(nn.Module):
    """The exact velocity plus a network that starts at exactly zero, with the names of models/adapter.py.

    The residual is an MLP of x, t and t's first harmonics; `width` units in each of its two hidden
    layers. Latents are the images: decode is the identity. There is one prompt, "".
    """

    def __init__(self, mixture: GaussianMixture, width: int = 64, seed: int = 0):
        super().__init__()
        self.mixture, D = mixture, mixture.means.shape[1]
        self.latent_shape = (D,)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.residual = nn.Sequential(
                nn.Linear(D + 4, width), nn.SiLU(), nn.Linear(width, width), nn.SiLU(), nn.Linear(width, D)
            ).to(mixture.means)  # fmt: skip
        nn.init.zeros_(self.residual[-1].weight)
        nn.init.zeros_(self.residual[-1].bias)
        self._frozen = False

    def encode(self, prompts: list[str]) -> dict[str, Tensor]:
        """There is nothing to condition on; the tensor [B, 0] tells how many samples there are."""
        return {"prompt": torch.zeros(len(prompts), 0)}

    def velocity(self, x: Tensor, sigma: Tensor | float, conditioning: dict[str, Tensor] | None = None) -> Tensor:
        """v_theta(x, sigma) [B, D] for x [B, D] and sigma a number."""
        exact = self.mixture.velocity(x, sigma)
        if self._frozen:
            return exact
        t = float(sigma)
        time = [t, math.sin(math.pi * t), math.cos(math.pi * t), math.cos(2 * math.pi * t)]
        return exact + self.residual(torch.cat([x, x.new_tensor(time).expand(len(x), 4)], 1))

    def decode(self, x: Tensor) -> Tensor:
        return x

    def save(self, folder: Path | str) -> None:
        """Write the residual network as residual.safetensors. All processes call it, the first writes."""
        from safetensors.torch import save_file

        if rank() > 0:
            return
        Path(folder).mkdir(parents=True, exist_ok=True)
        save_file(self.residual.state_dict(), Path(folder) / "residual.safetensors")

    def schedule(self, steps: int, **kernel) -> FlowSchedule:
        """The policy on an even time grid; `kernel` is kind, noise_level, sde_window."""
        return FlowSchedule(time_grid(steps), **kernel)

    @contextmanager
    def reference(self):
        """Within this context velocity is the exact one."""
        self._frozen = True
        try:
            yield
        finally:
            self._frozen = False
