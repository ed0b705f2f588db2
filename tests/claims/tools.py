"""What the tests of the claims share: small random networks, worlds by enumeration, one Monte-Carlo criterion."""

import itertools
import math

import torch
from hypothesis import strategies as st
from torch import nn

from ref.methods import Group
from ref.schedule import KINDS, FlowSchedule, time_grid

Z = 5.5  # two-sided normal tail 4e-8: the false-failure rate of one comparison

seeds = st.integers(0, 2**31 - 1)
shapes = st.tuples(st.integers(1, 4), st.integers(2, 12), st.integers(1, 8))  # of features [G, K, D]
bandwidths = st.floats(0.05, 5.0)
GRIDS = st.builds(
    lambda steps, kind, eta, shift: FlowSchedule(time_grid(steps, shift, torch.float64), kind, eta),
    st.integers(2, 12),
    st.sampled_from(KINDS),
    st.floats(0.05, 0.95),
    st.floats(0.5, 4.0),
)


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


def gaussian_entropy(covariance):
    return 0.5 * torch.logdet(2 * math.pi * math.e * covariance)


def make_group(phi, bandwidth=1.0, reward=None, policy_log_prob=None):
    """A methods.Group with one trained step."""
    shape = phi.shape[:2]
    reward = torch.zeros(shape, dtype=phi.dtype) if reward is None else reward
    policy_log_prob = torch.zeros(*shape, 1, dtype=phi.dtype) if policy_log_prob is None else policy_log_prob
    return Group(reward, phi, bandwidth, policy_log_prob, torch.ones(policy_log_prob.shape[-1], dtype=phi.dtype))


def enumerate_groups(atoms, logits, K):
    """Every group of K draws from the atoms [M, D]: indices [n, K], probability [n], features [n, K, D].

    The fourth output is the score of each member with respect to the logits, [n, K, M].
    """
    M = len(atoms)
    p = logits.softmax(0)
    index = torch.tensor(list(itertools.product(range(M), repeat=K)))
    score = torch.eye(M, dtype=torch.float64) - p
    return index, p[index].prod(1), atoms[index], score[index]


def variance_gradient(atoms, logits):
    """V and its gradient in the logits, by autograd on the textbook variance."""
    logits = logits.clone().requires_grad_()
    p = logits.softmax(0)
    V = (p[:, None] * (atoms - p @ atoms).square()).sum()
    return V.item(), torch.autograd.grad(V, logits)[0]
