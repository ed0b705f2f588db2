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


def color_of(kind: str) -> str:
    """The method's colour, whatever space, encoder or weight the run's name adds to it."""
    return COLORS[re.split("[@/:]", kind)[0]]


def label(run: str) -> str:
    """A run's name METHOD[@SPACE][/ENCODER][:WEIGHT] (compare.py) in words: 'PEC, kernel, λ = 1'."""
    method, space, encoder, weight = re.fullmatch(r"(\w+)(?:@(\w+))?(?:/(\w+))?(?::(.+))?", run).groups()
    parts = [LABELS[method], space, encoder and f"φ = {encoder}", weight and f"λ = {weight}"]
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
    """The trade-off: reward over diversity, a line for each kind of run through its dials.

    points: kind of run (METHOD[@SPACE][/ENCODER], see `label`) -> (note, diversities, rewards over seeds).
    A dot is a mean over seeds; the ellipse is the 95 % confidence region of that mean (Hotelling's T^2),
    drawn where there are at least three seeds.
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
    axis.set(xlabel="feature variance, relative to the base model", ylabel="reward")
    axis.legend(frameon=False, fontsize=8, loc="lower left")
    return figure


def rivers(flows: dict[str, tuple[Tensor, Tensor, Tensor, Tensor]], modes: Tensor | None = None) -> Figure:
    """One-dimensional flows from noise (left) to data (right): the density as a river, paths on it.

    flows: title -> (sigmas [N+1], paths [N+1, n], grid [Y], density [N+1, Y]). Paths take the colour of the
    nearest of `modes` [M] at their end.
    """
    figure, axes = panels(1, len(flows), width=4.6, height=3.4, sharey=True, squeeze=False)
    colors = ["#c44e52", "#4c72b0", "#55a868", "#8172b3", "#dd8452", "#937860"]
    for axis, (title, (sigmas, paths, grid, density)) in zip(axes[0], flows.items()):
        time = (1 - sigmas).tolist()
        peak = density / density.amax(1, keepdim=True)
        axis.pcolormesh(time, grid, peak.T, cmap="Greys", vmin=0, vmax=1.6, shading="gouraud", rasterized=True)
        ends = paths[-1]
        nearest = (ends[:, None] - modes).abs().argmin(1) if modes is not None else ends.new_zeros(len(ends)).long()
        for path, m in zip(paths.T, nearest.tolist()):
            axis.plot(time, path, color=colors[m % len(colors)], lw=0.9, alpha=0.75)
        axis.set(
            title=title, xlabel="$1-\\sigma$  (noise $\\to$ data)", xlim=(time[0], time[-1]), ylim=(grid[0], grid[-1])
        )
    axes[0, 0].set_ylabel("$x$")
    return figure


def entropy_ledger(
    iterations: list[int], image: list[float], path: list[float], total: float, estimate: tuple | None = None
) -> Figure:
    """P02 as a ledger: nats in the image's law, nats in the path given the image; their sum cannot move.

    image, path: H(x_{N-1}) and H(path | x_{N-1}) at `iterations`; total: the closed form; estimate: kNN's
    (iterations, values) of the first. Only the boundary's *shift* means something: differential entropies
    have no natural zero, so the axis starts below the smallest image entropy.
    """
    figure, axis = panels(1, 1, width=6.4, height=3.8)
    floor = min(0.0, min(image) - 0.3)
    axis.fill_between(iterations, [floor] * len(image), image, color="#c44e52", alpha=0.75, lw=0)
    axis.fill_between(iterations, image, [a + b for a, b in zip(image, path)], color="#4c72b0", alpha=0.55, lw=0)
    axis.axhline(total, color="black", lw=2)
    axis.annotate(
        "path entropy, closed form: no $\\theta$ in it",
        (iterations[0], total),
        xytext=(6, 6),
        textcoords="offset points",
    )
    middle = len(iterations) * 2 // 3
    axis.text(iterations[middle], (floor + image[middle]) / 2, "which image", ha="center", va="center", color="white")
    axis.text(
        iterations[middle], (total + image[middle]) / 2, "which path to it", ha="center", va="center", color="white"
    )
    if estimate is not None:
        axis.plot(*estimate, "o", ms=4, color="black", mfc="white", label="kNN estimate from samples")
        axis.legend(frameon=False, loc="lower left")
    axis.set(
        xlabel="iteration",
        ylabel="nats",
        ylim=(floor, total + 0.12 * (total - floor)),
        xlim=(iterations[0], iterations[-1]),
    )
    return figure


def modes_dying(
    snapshots: dict[int, Tensor], centres: Tensor, reward: Tensor, trained: Tensor, theory: Tensor | None = None
) -> Figure:
    """Where modes die: samples [n, 2] at some iterations, and the share of every mode over training.

    centres [M, 2], reward [M]; trained [T, M] occupancies, theory [T, M] the replicator's at equal mean reward.
    Modes are coloured by reward, dark for poor and bright for rich.
    """
    from matplotlib import colormaps

    palette = colormaps["viridis"]((reward - reward.min()) / (reward.max() - reward.min()).clamp_min(1e-9))
    figure = panels(1, 1)[0]
    figure.clear()
    figure.set_size_inches(11, 5.6)
    top, bottom = figure.subfigures(2, 1, height_ratios=(1.05, 1))
    limit = 1.85 * centres.abs().max().item()
    for axis, (iteration, x) in zip(top.subplots(1, len(snapshots)), snapshots.items()):
        nearest = (x[:, None] - centres).square().sum(-1).argmin(1)
        axis.scatter(*x.T, s=5, c=palette[nearest.numpy()], alpha=0.7, lw=0)
        axis.scatter(*centres.T, marker="+", color="black", s=30, lw=0.8)
        for c, r in zip(1.4 * centres, reward):
            axis.text(*c, f"{r:.1f}", ha="center", va="center", fontsize=8, color="#555555")
        axis.set(
            xlim=(-limit, limit),
            ylim=(-limit, limit),
            xticks=[],
            yticks=[],
            aspect="equal",
            title=f"iteration {iteration}",
        )
        axis.spines[:].set_visible(False)
    shares = {"trained: share of each mode": trained} | ({} if theory is None else {"replicator at equal E[R]": theory})
    for axis, (title, share) in zip(bottom.subplots(1, len(shares), sharey=True, squeeze=False)[0], shares.items()):
        order = reward.argsort()
        axis.stackplot(range(1, len(share) + 1), share[:, order].T, colors=palette[order.numpy()], lw=0)
        axis.set(title=title, xlabel="iteration", xlim=(1, len(share)), ylim=(0, 1))
    return figure


def modes_left(runs: dict[str, list[list[float]]], modes: int) -> Figure:
    """Effective number of modes over training; each label holds one curve a seed."""
    figure, axis = panels(1, 1, width=5.2, height=3.2)
    for (label, curves), color in zip(runs.items(), ("#4c72b0", "#c44e52", "#55a868", "#8172b3")):
        for n, values in enumerate(curves):
            curve(axis, values, color, label if n == 0 else None)
    axis.axhline(modes, color="#7f7f7f", lw=0.8, ls=":")
    axis.set(xlabel="iteration", ylabel="effective modes", ylim=(0.8, 1.12 * modes))
    axis.legend(frameon=False)
    return figure


# ---------------------------------------------------------------- perceptual entropy, PEC and PCVAE


def perceptual_gaussian(groups: dict[str, Tensor], bandwidth: float) -> Figure:
    """What H_perc sees: each labelled group [K, 2] with its mean, its root-mean-square circle, and the ruler h."""
    from ref.perceptual import deviations, perceptual_entropy

    figure, axes = panels(1, len(groups), width=3.0, height=3.4, sharex=True, sharey=True)
    for axis, (label, phi) in zip(axes, groups.items()):
        mean, v = phi.mean(0), deviations(phi[None]).square().sum(-1).mean().item()
        H = perceptual_entropy(phi[None], bandwidth, "mean").item()
        circle(axis, mean, v**0.5, color="#4c72b0", lw=2, label="spread $\\sqrt{v}$")
        circle(axis, mean, bandwidth * 2**0.5, color="#7f7f7f", lw=1.2, ls="--", label="ruler $h\\sqrt{D}$")
        axis.scatter(*phi.T, s=16, color="#c44e52", alpha=0.7, lw=0)
        axis.scatter(*mean, s=90, marker="+", color="black", label="group mean")
        axis.set(
            title=f"{label}\n$v$ = {v:.2f},  $\\mathcal{{H}}_{{perc}}$ = {H:.2f}", aspect="equal", xticks=[], yticks=[]
        )
    axes[0].legend(frameon=False, fontsize=8, loc="lower left")
    return figure


def circle(axis, centre: Tensor, radius: float, **style) -> None:
    """A circle in data coordinates."""
    import numpy as np

    angle = np.linspace(0, 2 * np.pi, 200)
    axis.plot(float(centre[0]) + radius * np.cos(angle), float(centre[1]) + radius * np.sin(angle), **style)


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
    """Figure 4: (a) reward and H_perc under the naive KL and the KL as reward, (b) the entropies with and without."""
    figure, (reward, entropy, both) = panels(1, 3, width=3.7, height=3.0, sharex=True)
    runs = {"naive_kl": (naive, "naive KL"), "pcvae": (as_reward, "KL as reward")}
    for key, (history, label) in runs.items():
        curve(reward, [m["reward"] for m in history], COLORS[key], label)
        curve(entropy, [m["perceptual_entropy"] for m in history], COLORS[key], label)
    reward.set(title="(a) reward", xlabel="iteration")
    entropy.set(title="(a) perceptual entropy $\\mathcal{H}_{perc}$", xlabel="iteration")
    lines = (
        (without, "policy_entropy", "#4c72b0", "policy $\\mathcal{H}$"),
        (without, "perceptual_entropy", COLORS["flow_grpo"], "$\\mathcal{H}_{perc}$ without PCVAE"),
        (as_reward, "perceptual_entropy", COLORS["pcvae"], "$\\mathcal{H}_{perc}$ with PCVAE"),
    )
    for history, key, color, label in lines:
        curve(both, [m[key] - history[0][key] for m in history], color, label)
    both.set(title="(b) entropy less its start", xlabel="iteration")
    for axis in (reward, entropy, both):
        axis.legend(frameon=False, fontsize=8)
    return figure


def critical_lambda_curve(
    curves: dict[str, tuple[list[float], list[float], dict[float, list[float]]]], critical: float
) -> Figure:
    """P11: the better mode's share p* over lambda, predicted (line) and trained (a dot for each seed).

    curves: label -> (lambdas, predicted p*, measured: a list of seeds for each lambda).
    """
    figure, axis = panels(1, 1, width=6.6, height=4.2)
    low, colors = min(min(c[0]) for c in curves.values()), ("#4c72b0", "#dd8452", "#55a868")
    axis.axvspan(low, critical, color="#c44e52", alpha=0.10, lw=0)
    axis.axvline(critical, color="#c44e52", lw=1)
    axis.text(critical, 0.52, f"  $\\lambda_c$ = {critical:.3f}", color="#c44e52")
    axis.text((low + critical) / 2, 0.70, "one mode\ndies", ha="center", color="#c44e52")
    axis.text(critical, 1.0, "  both modes live", va="center", color="#333333")
    for color, (label, (weights, shares, measured)) in zip(colors, curves.items()):
        axis.plot(weights, shares, color=color, lw=2, label=f"predicted, {label}")
        dots = [(w, share) for w, seeds in measured.items() for share in seeds]
        axis.scatter(*zip(*dots), s=30, color=color, edgecolor="black", lw=0.6, zorder=3, label=f"trained, {label}")
    axis.set(xlabel="PEC weight $\\lambda$", ylabel="share of the better mode, $p^*$", ylim=(0.48, 1.03))
    axis.legend(frameon=False, loc="upper right", fontsize=9)
    return figure


def runaway(radius: dict[str, list[float]]) -> Figure:
    """Mean distance of the samples from the origin over training, on a logarithmic scale; a line for each setting."""
    figure, axis = panels(1, 1, width=6.6, height=3.4)
    for color, (label, values) in zip(("#c44e52", "#dd8452", "#4c72b0", "#55a868"), radius.items()):
        axis.semilogy(range(1, len(values) + 1), values, color=color, lw=2, label=label)
    axis.set(xlabel="iteration", ylabel="mean radius of the samples", ylim=(None, 50 * max(map(max, radius.values()))))
    axis.legend(frameon=False, fontsize=9)
    return figure


def particles(clouds: dict[str, Tensor], centres: Tensor, value: Tensor | None = None, limit: float = 3.0) -> Figure:
    """Samples [n, 2] of several labelled models over the modes' centres [M, 2], each ring as dark as its reward."""
    import numpy as np

    figure, axes = panels(1, len(clouds), width=2.9, height=3.3, sharex=True, sharey=True, squeeze=False)
    value = None if value is None else ((value - value.min()) / (value.max() - value.min())).numpy()
    for axis, (label, x) in zip(axes[0], clouds.items()):
        shade = "0.6" if value is None else [str(s) for s in 0.75 - 0.75 * value]
        axis.scatter(*centres.T, s=520, facecolor="none", edgecolor=shade, lw=1.6)
        x = x.detach().cpu().numpy()
        keep = np.abs(x).max(1) < limit
        axis.scatter(*x[keep].T, s=4, color="#c44e52", alpha=0.35, lw=0)
        axis.set(title=label, xlim=(-limit, limit), ylim=(-limit, limit), aspect="equal", xticks=[], yticks=[])
        axis.spines[:].set_visible(False)
    return figure


def movie(frames: list[Figure], seconds: float = 6.0) -> bytes:
    """An animated GIF of figures of one size; show it with `IPython.display.Image(data, format="gif")`."""
    from io import BytesIO

    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from PIL import Image

    pictures, buffer = [], BytesIO()
    for figure in frames:
        canvas = FigureCanvasAgg(figure)
        canvas.draw()
        picture = Image.frombytes("RGBA", canvas.get_width_height(), bytes(canvas.buffer_rgba())).convert("RGB")
        pictures.append(picture.quantize(32))
    pace = [int(1000 * seconds / len(pictures))] * (len(pictures) - 1) + [1500]  # rest on the last frame
    pictures[0].save(buffer, format="GIF", save_all=True, append_images=pictures[1:], duration=pace, loop=0)
    return buffer.getvalue()


def sparsemax_support(
    columns: dict[str, tuple[Tensor, Tensor, dict[float, list[Tensor]], Tensor | None]],
    reward: Tensor,
    alive: float = 0.01,
) -> Figure:
    """P15, who survives as lambda grows: each mode's share, predicted (line) and trained (a dot a seed); below, how many.

    columns: title -> (lambdas [W], predicted [W, M], measured: a list of seeds' shares [M] for each lambda, and a law
    [W, M] to compare with, dotted, or None). Modes are coloured by `reward` [M], dark for poor and bright for rich. One
    lives if its share is above `alive`; the dots below grow with the number of seeds that agree.
    """
    from matplotlib import colormaps

    order = reward.argsort(descending=True).tolist()
    palette = dict(zip(order, colormaps["viridis"](torch.linspace(0.92, 0.0, len(reward)).numpy())))
    heights = dict(height_ratios=(2, 1))
    figure, axes = panels(2, len(columns), width=4.1, height=2.9, sharex="col", sharey="row", gridspec_kw=heights)
    for (top, bottom), (title, (weights, predicted, measured, law)) in zip(axes.T, columns.items()):
        for m, color in palette.items():
            top.plot(weights, predicted[:, m], color=color, lw=2, zorder=2)
            if law is not None:
                top.plot(weights, law[:, m], color=color, lw=1.2, ls=":", zorder=1)
            dots = [(w, shares[m]) for w, seeds in measured.items() for shares in seeds if shares[m] > 0.002]
            top.scatter(*zip(*dots), s=24, color=color, edgecolor="black", lw=0.6, zorder=3)
        bottom.step(weights, (predicted > alive).sum(1), where="mid", color="#333333", lw=1.6)
        for w, seeds in measured.items():
            counts = [int((shares > alive).sum()) for shares in seeds]
            sizes = [14 + 10 * counts.count(count) for count in counts]
            bottom.scatter([w] * len(counts), counts, s=sizes, color="#c44e52", edgecolor="black", lw=0.6, zorder=3)
        top.set(title=title, xscale="log", ylim=(-0.02, 1.03))
        bottom.set(xlabel="weight $\\lambda$", ylim=(0.5, len(reward) + 0.5), yticks=range(1, len(reward) + 1))
        bottom.grid(axis="y", color="#eeeeee")
    axes[0, 0].set_ylabel("share of each mode")
    axes[1, 0].set_ylabel("modes alive")
    for m, color in palette.items():
        axes[0, -1].plot([], [], color=color, lw=2, label=f"{reward[m]:.2f}")
    axes[0, -1].legend(title="reward", frameon=False, fontsize=8, title_fontsize=8, loc="upper right")
    return figure
