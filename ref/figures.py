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


def smooth(values: list[float], width: int = 9) -> list[float]:
    """A centred moving average that shrinks towards the ends."""
    half = width // 2
    return [sum(part) / len(part) for i in range(len(values)) for part in [values[max(0, i - half) : i + half + 1]]]


def curve(axis, values: list[float], color: str, label: str | None = None, **style) -> None:
    """A noisy training curve: the raw values faint, their moving average on top (as in the paper)."""
    steps = range(1, len(values) + 1)
    axis.plot(steps, values, color=color, alpha=0.25, lw=0.8)
    axis.plot(steps, smooth(values), color=color, lw=1.8, label=label, **style)


def image_grid(
    rows: dict[str, Tensor], columns: int = 10, title: str | None = None, upscale: str = "bicubic"
) -> Figure:
    """The visual comparison: a row of images [n, C, H, W] for each labelled model, `columns` of them a row.

    A model with more images than columns gets several lines. Grey images are drawn as ink on paper.
    """
    lines = {label: -(-len(images) // columns) for label, images in rows.items()}
    figure = Figure(figsize=(0.62 * columns + 1.3, 0.62 * sum(lines.values()) + 0.35 * bool(title)), dpi=110)
    top = 1 - 0.35 * bool(title) / figure.get_figheight()
    grid = figure.add_gridspec(
        sum(lines.values()),
        columns,
        left=1.3 / figure.get_figwidth(),
        right=0.995,
        bottom=0.01,
        top=top,
        wspace=0.04,
        hspace=0.06,
    )
    line = 0
    for label, images in rows.items():
        for n, image in enumerate(images):
            axis = figure.add_subplot(grid[line + n // columns, n % columns])
            axis.imshow(image.permute(1, 2, 0), cmap="gray_r", vmin=0, vmax=1, interpolation=upscale)
            axis.set(xticks=[], yticks=[])
            axis.spines[:].set_visible(False)
            if n == columns * (lines[label] // 2) - columns * (lines[label] % 2 == 0):
                axis.set_ylabel(label, rotation=0, ha="right", va="center", labelpad=8, fontsize=11)
        line += lines[label]
    if title:
        figure.suptitle(title, y=0.995, va="top", fontsize=11)
    return figure


def training_curves(histories: dict[str, list[dict]], colors: dict[str, str] | None = None) -> Figure:
    """Figure 5: reward, and the diversity it costs, over training; a history for each labelled run.

    Runs are coloured by method when their label is a key of COLORS, else by `colors`.
    """
    figure, axes = panels(1, 3, sharex=True)
    titles = {"reward": "reward", "feature_variance": "feature variance", "reward_std": "reward spread in a group"}
    for axis, (key, title) in zip(axes, titles.items()):
        for label, history in histories.items():
            color = (colors or COLORS).get(label, "black")
            curve(axis, [m[key] for m in history], color, LABELS.get(label, label))
        axis.set(title=title, xlabel="iteration")
    axes[0].legend(frameon=False)
    return figure


def entropy_paradox(history: list[dict]) -> Figure:
    """Figure 1: (a) what the policy knows of its entropy, (b) what people see.

    Every curve is relative to its value at the start, on one axis, so flat and falling can be compared:
    an entropy as its change in nats per dimension, a variance as the ratio to its start.
    """
    figure, (left, right) = panels(1, 2, width=4.4)
    curve(left, [m["policy_entropy_mc"] for m in history], "#9db7d5", "estimate $-\\log p_\\theta$ of the samples")
    left.plot(
        range(1, len(history) + 1),
        [m["policy_entropy"] for m in history],
        color="#4c72b0",
        lw=2.2,
        label="policy entropy $\\mathcal{H}$",
    )
    curve(left, [m["perceptual_entropy"] for m in history], "#c44e52", "perceptual entropy $\\mathcal{H}_{perc}$")
    left.set(title="(a) entropy, nats per dimension", xlabel="iteration")
    labels = {
        "vae_variance": ("latents", "#4c72b0"),
        "pixel_variance": ("pixels", "#55a868"),
        "feature_variance": ("perceptual features", "#c44e52"),
    }
    for key, (label, color) in labels.items():
        start = sum(m[key] for m in history[:3]) / len(history[:3])
        curve(right, [m[key] / start for m in history], color, label)
    right.axhline(1, color="#7f7f7f", lw=0.8, ls=":")
    right.set(title="(b) variance within a group, relative to the start", xlabel="iteration", ylim=(0, None))
    for axis in (left, right):
        axis.legend(frameon=False, fontsize=9)
    return figure


def mode_seeking(history: list[dict]) -> Figure:
    """Figure 2: (a) the advantage probabilities' extremes, (b) reward spread beside feature variance."""
    figure, (left, right) = panels(1, 2, width=4.0)
    curve(left, [m["p_max"] for m in history], "#c44e52", "max $p_A(x^k)$")
    curve(left, [m["p_min"] for m in history], "#4c72b0", "min $p_A(x^k)$")
    left.set(title="(a) advantage probabilities", xlabel="iteration")
    curve(right, [m["reward_std"] for m in history], "#4c72b0", "reward std")
    curve(right, [m["feature_variance"] for m in history], "#c44e52", "feature variance")
    right.set(title="(b) spread within a group", xlabel="iteration", ylim=(0, None))
    for axis in (left, right):
        axis.legend(frameon=False)
    return figure


def reward_diversity_front(points: dict[str, list[tuple[str, list[float], list[float]]]]) -> Figure:
    """Reward against diversity: for each method (key of COLORS) a list of (label, diversities, rewards).

    The two lists hold one number a seed; a point is their mean, its bars one standard deviation, its
    label the weight. A method's points are joined in the order given.
    """
    import numpy as np

    figure, axis = panels(1, 1, width=5.6, height=4.2)
    for method, runs in points.items():
        x, y = (np.array([np.mean(run[i]) for run in runs]) for i in (1, 2))
        dx, dy = ([np.std(run[i], ddof=1) if len(run[i]) > 1 else 0 for run in runs] for i in (1, 2))
        axis.errorbar(x, y, dy, dx, color=COLORS[method], marker="o", lw=1.2, capsize=2, label=LABELS[method])
        for label, a, b in zip([run[0] for run in runs], x, y):
            axis.annotate(label, (a, b), textcoords="offset points", xytext=(5, 5), fontsize=8, color=COLORS[method])
    axis.set(xlabel="feature variance, relative to the base model", ylabel="reward")
    axis.legend(frameon=False, loc="lower left")
    return figure
