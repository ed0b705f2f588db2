"""One function a figure: data in, a matplotlib `Figure` out. Nothing else in `ref` plots.

Every scale uses the same functions and the same colour for a method. A training history is a list of
`State.metrics` dictionaries, one an iteration.
"""

from matplotlib.figure import Figure
from torch import Tensor

COLORS = {
    "base": "#7f7f7f",
    "flow_grpo": "#c44e52",
    "flow_grpo_kl": "#dd8452",
    "clip_higher": "#937860",
    "entropy_reg": "#8c8c8c",
    "clip_cov": "#da8bc3",
    "kl_cov": "#8172b3",
    "pec": "#4c72b0",
    "pcvae": "#55a868",
    "naive_kl": "#ccb974",
}
LABELS = {
    "base": "base model",
    "flow_grpo": "Flow-GRPO",
    "flow_grpo_kl": "Flow-GRPO + KL",
    "clip_higher": "Clip-Higher",
    "entropy_reg": "Entropy Reg.",
    "clip_cov": "Clip-Cov",
    "kl_cov": "KL-Cov",
    "pec": "PEC",
    "pcvae": "PCVAE",
    "naive_kl": "naive KL",
}


def panels(rows: int, columns: int, width: float = 3.6, height: float = 2.8, **options):
    """A figure with bare spines and its axes; it belongs to no window, so nothing needs closing."""
    figure = Figure(figsize=(width * columns, height * rows), layout="constrained", dpi=110)
    axes = figure.subplots(rows, columns, **options)
    for axis in figure.axes:
        axis.spines[["top", "right"]].set_visible(False)
    return figure, axes
