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


@pytest.fixture(scope="session")
def world(tmp_path_factory):
    """Tiny pipelines and networks of the real classes, and prompt files. The cache of embeddings is shared by all runs."""
    from ref.models import tiny

    from .small import TRAINING

    folder = tmp_path_factory.mktemp("world")
    for name in ("sd3", "flux", "clip", "dino"):
        getattr(tiny, name)(folder / name)
    (folder / "train.txt").write_text("\n".join(TRAINING) + "\n")
    (folder / "evaluation.jsonl").write_text('{"prompt": "a boat at sea"}\n"a house"\n{"prompt": "an owl"}\n')
    return folder


@pytest.fixture(scope="session")
def finished(tmp_path_factory):
    """An uninterrupted run on the digits."""
    from ref.train import main

    from .small import command

    folder = tmp_path_factory.mktemp("finished")
    assert main(command(folder, "--save-every", "1")) == 0
    return folder
