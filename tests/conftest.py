import pytest
import torch

torch.set_num_threads(1)  # pytest-free determinism, and no fight over two cores


@pytest.fixture
def rng():
    """A generator with a fixed seed, one for each test."""
    return torch.Generator().manual_seed(0)
