"""One function a figure: data in, a matplotlib `Figure` out. Nothing else in `ref` plots.

Every scale uses the same functions and the same colour for a method. A training history is a list of
`State.metrics` dictionaries, one an iteration.
"""

import re

import torch
import torch.nn.functional as F
from matplotlib.figure import Figure
from torch import Tensor

COLORS = {
    "base": "#7f7f7f",
    "flow_grpo": "#c44e52",
    "flow_grpo_kl": "#dd8452",
    "clip_higher": "#937860",
    "entropy_reg": "#64b5cd",
    "clip_cov": "#da8bc3",
    "kl_cov": "#8172b3",
    "pec": "#4c72b0",
    "pcvae": "#55a868",
    "naive_kl": "#ccb974",
    "gardo": "#1b7837",
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
    "gardo": "GARDO",
}


def color_of(kind: str) -> str:
    """The method's colour, whatever space, encoder or weight the run's name adds to it."""
    return COLORS[re.split("[@/:]", kind)[0]]


RUN = r"(?P<method>\w+)(@(?P<space>\w+))?(/(?P<encoder>.+?))?(:(?P<weight>-?[\d.]+([eE][+-]?\d+)?))?"  # compare.py's


def label(run: str) -> str:
    """A run's name METHOD[@SPACE][/ENCODER][:WEIGHT or :target=SHARE] in words: 'PEC, kernel, λ = 1'."""
    run, asked, target = run.partition(":target")
    method, space, encoder, weight = re.fullmatch(RUN, run).group("method", "space", "encoder", "weight")
    encoder = encoder and re.split("=|/(?=[^/]*$)", encoder)[0 if "=" in encoder else -1]  # without folders
    dial = asked and f"target{target.replace('=', ' ')}" or weight and f"λ = {weight}"
    parts = [LABELS[method], space, encoder and f"φ = {encoder}", dial]
    return ", ".join(part for part in parts if part)


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


def circle(axis, centre: Tensor, radius: float, **style) -> None:
    """A circle in data coordinates."""
    import numpy as np

    angle = np.linspace(0, 2 * np.pi, 200)
    axis.plot(float(centre[0]) + radius * np.cos(angle), float(centre[1]) + radius * np.sin(angle), **style)


def image_grid(
    rows: dict[str, Tensor], columns: int = 10, title: str | None = None, upscale: str = "bicubic"
) -> Figure:
    """The visual comparison: a row of images [n, C, H, W] for each labelled model, `columns` of them a row.

    A model with more images than columns gets several lines. Grey images are drawn as ink on paper.
    """
    lines = {label: -(-len(images) // columns) for label, images in rows.items()}
    figure = Figure(figsize=(0.62 * columns + 1.3, 0.62 * sum(lines.values()) + 0.35 * bool(title)), dpi=80)
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


def collapse(
    images: dict[str, Tensor], features: dict[str, Tensor], columns: int = 5, notes: dict | None = None
) -> Figure:
    """What a fine-tuning did, at a glance: a column for each method, the base model's first.

    Above, images [n, C, H, W] of one prompt from the same noise, n a multiple of `columns`. Below,
    features [G, K, D] of all prompts around their group's mean, on the base model's two main
    directions; rings show the root mean square distance, solid the column's, dotted the base model's.
    """
    figure, axes = panels(2, len(images), width=2.3, height=2.35, squeeze=False)
    spread = {key: (phi - phi.mean(1, keepdim=True)).flatten(0, 1) for key, phi in features.items()}
    directions = torch.linalg.svd(spread["base"], full_matrices=False).Vh[:2].T
    limit = 1.05 * max((z @ directions).abs().max().item() for z in spread.values())
    for (above, below), key in zip(axes.T, images):
        paper = float(images[key].shape[1] == 3)  # white: grey images are ink
        tiles = F.pad(images[key], [images[key].shape[-1] // 8] * 4, value=paper)
        mosaic = torch.cat([torch.cat(list(line), 2) for line in tiles.split(columns)], 1)
        above.imshow(mosaic.permute(1, 2, 0), cmap="gray_r", vmin=0, vmax=1, interpolation="bicubic")
        above.set_title(LABELS.get(key, key), color=COLORS[key], fontweight="bold")
        x, y = (spread[key] @ directions).T
        below.scatter(x, y, s=3, color=COLORS[key], alpha=0.5, lw=0)
        for other, style in (("base", ":"), (key, "-")):
            radius = (spread[other] @ directions).square().sum(1).mean().sqrt().item()
            circle(below, torch.zeros(2), radius, color=COLORS[other], ls=style, lw=1.6)
        below.set(xlim=(-limit, limit), ylim=(-limit, limit), aspect="equal", xlabel=(notes or {}).get(key, ""))
        for axis in (above, below):
            axis.set(xticks=[], yticks=[])
            axis.spines[:].set_visible(False)
    return figure


def training_curves(histories: dict[str, list[dict]], colors: dict[str, str] | None = None) -> Figure:
    """Figure 5: reward, and the diversity it costs, over training; a history for each labelled run. Where a weight
    moves, under a target diversity, it is drawn as well.

    Runs are coloured by method when their label is a key of COLORS, else by `colors`.
    """
    titles = {"reward": "reward", "feature_variance": "feature variance", "reward_std": "reward spread in a group"}
    if any(len({m.get("weight") for m in history}) > 1 for history in histories.values()):
        titles["weight"] = "weight λ in use"
    figure, axes = panels(1, len(titles), sharex=True)
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
    missed = max(abs(m["policy_entropy_mc"] - m["policy_entropy"]) for m in history)  # too little to be drawn
    text = f"policy entropy $\\mathcal{{H}}$\n(estimated from samples: within {missed:.1g})"
    left.plot(range(1, len(history) + 1), [m["policy_entropy"] for m in history], color="#4c72b0", lw=2.2, label=text)
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
    """Figure 2: (a) the advantage probabilities' extremes, (b) reward spread and feature variance over their starts."""
    figure, (left, right) = panels(1, 2, width=4.0)
    curve(left, [m["p_max"] for m in history], "#c44e52", "max $p_A(x^k)$")
    curve(left, [m["p_min"] for m in history], "#4c72b0", "min $p_A(x^k)$")
    left.set(title="(a) advantage probabilities", xlabel="iteration")
    for key, color, name in (
        ("reward_std", "#4c72b0", "reward std"),
        ("feature_variance", "#c44e52", "feature variance"),
    ):
        start = sum(m[key] for m in history[:3]) / len(history[:3])
        curve(right, [m[key] / start for m in history], color, name)
    right.set(title="(b) spread within a group, relative to the start", xlabel="iteration", ylim=(0, None))
    for axis in (left, right):
        axis.legend(frameon=False)
    return figure


def reward_diversity_front(
    points: dict[str, list[tuple[str, list[float], list[float]]]], diversity: str = "feature variance"
) -> Figure:
    """The trade-off: reward over diversity, a line for each kind of run through its dials.

    points: kind of run (METHOD[@SPACE][/ENCODER], see `label`) -> (note, diversities, rewards over seeds).
    A dot is a mean over seeds; the ellipse is the 95 % confidence region of that mean (Hotelling's T^2),
    drawn where there are at least three seeds. With few it is large: the frame holds all runs, not all ellipses.
    """
    import numpy as np
    from scipy.stats import f

    figure, axis = panels(1, 1, width=6.4, height=4.6)
    markers = iter("os^Dv<>P*X" * len(points))
    turn = np.linspace(0, 2 * np.pi, 100)
    for kind, runs in points.items():
        color = color_of(kind)
        means = np.array([[np.mean(run[1]), np.mean(run[2])] for run in runs])
        style = {"color": color, "ls": ":" if "@latent" in kind else "-", "lw": 1.2}
        axis.plot(*means.T, marker=next(markers), ms=5, label=label(kind), **style)
        for (note, x, y), mean in zip(runs, means):
            axis.annotate(note, mean, textcoords="offset points", xytext=(5, 5), fontsize=7, color=color)
            if (n := len(x)) >= 3:
                radius = np.sqrt(2 * (n - 1) / (n * (n - 2)) * f.ppf(0.95, 2, n - 2))
                spread = np.linalg.cholesky(np.cov(x, y) + 1e-12 * np.eye(2))
                ring = mean[:, None] + radius * spread @ np.stack([np.cos(turn), np.sin(turn)])
                axis.fill(*ring, color=color, alpha=0.12, lw=0)
    every = np.hstack([run[1:] for runs in points.values() for run in runs])
    room = 0.08 * np.ptp(every, axis=1) + 1e-3
    (left, bottom), (right, top) = every.min(1) - room, every.max(1) + room
    axis.set(xlabel=f"{diversity}, relative to the base model", ylabel="reward", xlim=(left, right), ylim=(bottom, top))
    axis.legend(frameon=False, fontsize=8, loc="lower left")
    return figure


def entropy_law(histories: list[list[dict]], block: int = 20, draws: int = 400, title: str = "", exact=None) -> Figure:
    """Figure 3: (a) reward and H_perc over training, (b) the law R = -a exp(H) + b with R^2 and a 95 % band.

    One history a seed; the fit pools them. Points of one run are correlated, so the band is a bootstrap over
    blocks of `block` consecutive iterations. `exact` (H [n], R [n]) is drawn as a dotted theory curve.
    """
    import numpy as np

    from ref.perceptual import fit_entropy_law

    H, R = ([torch.tensor([m[key] for m in run]) for run in histories] for key in ("perceptual_entropy", "reward"))
    figure, (left, right) = panels(1, 2, width=4.3, height=3.2)
    twin = left.twinx()
    curve(left, torch.stack(R).mean(0).tolist(), "#4c72b0")
    curve(twin, torch.stack(H).mean(0).tolist(), "#c44e52")
    left.set_xlabel("iteration")
    left.set_ylabel("reward", color="#4c72b0")
    twin.set_ylabel("$\\mathcal{H}_{perc}$, nats per dimension", color="#c44e52")
    left.set_title(f"(a) {title}".strip())

    law = fit_entropy_law(torch.cat(H), torch.cat(R))
    grid = torch.linspace(min(h.min() for h in H).item(), max(h.max() for h in H).item(), 100)
    pieces = [(h, r) for hs, rs in zip(H, R) for h, r in zip(hs.split(block), rs.split(block))]
    generator, fits = np.random.default_rng(0), []
    for _ in range(draws):
        h, r = zip(*(pieces[i] for i in generator.integers(len(pieces), size=len(pieces))))
        fits.append(fit_entropy_law(torch.cat(h), torch.cat(r))(grid))
    low, high = np.nanquantile(torch.stack(fits).numpy(), [0.025, 0.975], axis=0)  # a draw of equal points has no slope
    right.scatter(torch.cat(H).exp(), torch.cat(R), s=10, color="#4c72b0", alpha=0.4, lw=0, zorder=3)
    right.fill_between(grid.exp(), low, high, color="#c44e52", alpha=0.25, lw=0, label="95 % band")
    right.plot(grid.exp(), law(grid), color="#c44e52", lw=2, label="fit")
    if exact is not None:
        right.plot(exact[0].exp(), exact[1], color="black", ls=":", lw=1.8, label="exact, replicator")
    right.set(xlabel="$\\exp(\\mathcal{H}_{perc})$", ylabel="reward")
    right.set_title(f"(b) $R = {-law.a:.2f}\\,\\exp(\\mathcal{{H}}_{{perc}}) {law.b:+.2f}$,  $R^2$ = {law.r2:.3f}")
    right.legend(frameon=False, fontsize=8)
    return figure


def kl_comparison(naive: list[dict], as_reward: list[dict], without: list[dict]) -> Figure:
    """Figure 4: (a) reward, (b) H_perc under the naive KL and the KL as reward, (c) entropies with and without."""
    figure, (reward, entropy, both) = panels(1, 3, width=3.7, height=3.0, sharex=True)
    runs = {"naive_kl": (naive, "naive KL"), "pcvae": (as_reward, "KL as reward")}
    for key, (history, label) in runs.items():
        curve(reward, [m["reward"] for m in history], COLORS[key], label)
        curve(entropy, [m["perceptual_entropy"] for m in history], COLORS[key], label)
    reward.set(title="(a) reward", xlabel="iteration")
    entropy.set(title="(b) perceptual entropy $\\mathcal{H}_{perc}$", xlabel="iteration")
    lines = (
        (without, "policy_entropy", "#4c72b0", "policy $\\mathcal{H}$"),
        (without, "perceptual_entropy", COLORS["flow_grpo"], "$\\mathcal{H}_{perc}$ without PCVAE"),
        (as_reward, "perceptual_entropy", COLORS["pcvae"], "$\\mathcal{H}_{perc}$ with PCVAE"),
    )
    for history, key, color, label in lines:
        curve(both, [m[key] - history[0][key] for m in history], color, label)
    both.set(title="(c) entropies less their start", xlabel="iteration")
    for axis in (reward, entropy, both):
        axis.legend(frameon=False, fontsize=8)
    return figure
