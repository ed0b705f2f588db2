"""Shapes and types in the signatures of ref/ are checked at run time in every test (jaxtyping, beartype)."""

import pytest
import torch
from beartype import BeartypeConf, beartype
from jaxtyping import install_import_hook

checked = beartype(conf=BeartypeConf(is_pep484_tower=True))  # an int is a float, as type checkers have it
install_import_hook("ref", f"{__name__}.checked")  # before anything of ref is imported

torch.set_num_threads(1)  # pytest-free determinism, and no fight over two cores


@pytest.fixture
def rng():
    """A generator with a fixed seed, one for each test."""
    return torch.Generator().manual_seed(0)
