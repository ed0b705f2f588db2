"""The tiny pipelines."""

import torch

from ref.models import shapes, tiny


def test_the_wide_pipelines_are_as_wide_as_the_big_ones():
    with torch.device("meta"):
        configs = {"sd3": shapes.sd35_medium().config, "flux": shapes.flux_dev().config}
    for kind, changes in tiny.WIDE.items():
        assert changes == {key: configs[kind][key] for key in changes}
