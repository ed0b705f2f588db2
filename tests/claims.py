"""What the tests of the claims share: small random networks and one Monte-Carlo criterion."""

import torch
from torch import nn

Z = 5.5  # two-sided normal tail 4e-8: the false-failure rate of one comparison


def z_score(samples: torch.Tensor, expected: float) -> float:
    """Standard errors between the samples' mean and `expected`; beyond Z the test rejects."""
    samples = samples.double()
    return abs(samples.mean().item() - expected) / (samples.std().item() / len(samples) ** 0.5)


def mlp(dim: int, seed: int, scale: float = 1.0, out: int | None = None) -> nn.Module:
    """A random float64 network v(x), [B, dim] -> [B, out or dim]."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        net = nn.Sequential(nn.Linear(dim, 16), nn.Tanh(), nn.Linear(16, out or dim)).double()
        for p in net.parameters():
            p.data = scale * torch.randn_like(p)
    return net


def normal(shape, seed: int) -> torch.Tensor:
    return torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
