"""The tiny pipelines."""

import torch

from ref.models import shapes, tiny


def test_the_wide_pipelines_have_the_heads_of_the_big_ones_fewer_of_them():
    with torch.device("meta"):
        configs = {"sd3": shapes.sd35_medium().config, "flux": shapes.flux_dev().config}
    for kind, changes in tiny.WIDE.items():
        for key in ("attention_head_dim", "axes_dims_rope"):
            assert key not in changes or changes[key] == configs[kind][key]
        assert 500 < changes["num_attention_heads"] * changes["attention_head_dim"] < 1000
