"""The large architectures without weights have the sizes that are published."""

import pytest
import torch

from ref.models import shapes


def test_the_big_architectures_have_their_published_sizes():
    for make, billions in ((shapes.sd35_medium, 2.24), (shapes.flux_dev, 11.9), (shapes.vae, 0.0838)):
        with torch.device("meta"):
            assert sum(p.numel() for p in make().parameters()) / 1e9 == pytest.approx(billions, rel=0.003)
