"""Pictures of the worlds: flows in one and two dimensions, modes dying, critical lambda, the ledger of nats.

Data in, a matplotlib `Figure` out, as in ref/figures.py.
"""

import torch
from matplotlib.figure import Figure
from torch import Tensor

from ref.figures import circle, color_of, curve, label, panels


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
    for (name, curves), color in zip(runs.items(), ("#4c72b0", "#c44e52", "#55a868", "#8172b3")):
        for n, values in enumerate(curves):
            curve(axis, values, color, name if n == 0 else None)
    axis.axhline(modes, color="#7f7f7f", lw=0.8, ls=":")
    axis.set(xlabel="iteration", ylabel="effective modes", ylim=(0.8, 1.12 * modes))
    axis.legend(frameon=False)
    return figure


def perceptual_gaussian(groups: dict[str, Tensor], bandwidth: float) -> Figure:
    """What H_perc sees: each labelled group [K, 2] with its mean, its root-mean-square circle, and the ruler h."""
    from ref.perceptual import deviations, perceptual_entropy

    figure, axes = panels(1, len(groups), width=3.0, height=3.4, sharex=True, sharey=True)
    for axis, (name, phi) in zip(axes, groups.items()):
        mean, v = phi.mean(0), deviations(phi[None]).square().sum(-1).mean().item()
        H = perceptual_entropy(phi[None], bandwidth, "mean").item()
        circle(axis, mean, v**0.5, color="#4c72b0", lw=2, label="spread $\\sqrt{v}$")
        circle(axis, mean, bandwidth * 2**0.5, color="#7f7f7f", lw=1.2, ls="--", label="ruler $h\\sqrt{D}$")
        axis.scatter(*phi.T, s=16, color="#c44e52", alpha=0.7, lw=0)
        axis.scatter(*mean, s=90, marker="+", color="black", label="group mean")
        axis.set(
            title=f"{name}\n$v$ = {v:.2f},  $\\mathcal{{H}}_{{perc}}$ = {H:.2f}", aspect="equal", xticks=[], yticks=[]
        )
    axes[0].legend(frameon=False, fontsize=8, loc="lower left")
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
    for color, (name, (weights, shares, measured)) in zip(colors, curves.items()):
        axis.plot(weights, shares, color=color, lw=2, label=f"predicted, {name}")
        dots = [(w, share) for w, seeds in measured.items() for share in seeds]
        axis.scatter(*zip(*dots), s=30, color=color, edgecolor="black", lw=0.6, zorder=3, label=f"trained, {name}")
    axis.set(xlabel="PEC weight $\\lambda$", ylabel="share of the better mode, $p^*$", ylim=(0.48, 1.03))
    axis.legend(frameon=False, loc="upper right", fontsize=9)
    return figure


def runaway(radius: dict[str, list[float]]) -> Figure:
    """Mean distance of the samples from the origin over training, on a logarithmic scale; a line for each setting."""
    figure, axis = panels(1, 1, width=6.6, height=3.4)
    for color, (name, values) in zip(("#c44e52", "#dd8452", "#4c72b0", "#55a868"), radius.items()):
        axis.semilogy(range(1, len(values) + 1), values, color=color, lw=2, label=name)
    axis.set(xlabel="iteration", ylabel="mean radius of the samples", ylim=(None, 50 * max(map(max, radius.values()))))
    axis.legend(frameon=False, fontsize=9)
    return figure


def particles(clouds: dict[str, Tensor], centres: Tensor, value: Tensor | None = None, limit: float = 3.0) -> Figure:
    """Samples [n, 2] of several labelled models over the modes' centres [M, 2], each ring as dark as its reward."""
    import numpy as np

    figure, axes = panels(1, len(clouds), width=2.9, height=3.3, sharex=True, sharey=True, squeeze=False)
    value = None if value is None else ((value - value.min()) / (value.max() - value.min())).numpy()
    for axis, (name, x) in zip(axes[0], clouds.items()):
        shade = "0.6" if value is None else [str(s) for s in 0.75 - 0.75 * value]
        axis.scatter(*centres.T, s=520, facecolor="none", edgecolor=shade, lw=1.6)
        x = x.detach().cpu().numpy()
        keep = np.abs(x).max(1) < limit
        axis.scatter(*x[keep].T, s=4, color="#c44e52", alpha=0.35, lw=0)
        axis.set(title=name, xlim=(-limit, limit), ylim=(-limit, limit), aspect="equal", xticks=[], yticks=[])
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


def kernel_stability(
    curves: dict[str, tuple[list[int], list[float]]],
    unstable: tuple[float, float],
    title: str = "",
    recipe: tuple[str, int, float] | None = None,
) -> Figure:
    """P18: the variance of the samples over that of the data, against the number of steps; a line for each kernel.

    curves: kernel -> (numbers of steps, ratios); unstable: the range of steps in which `dance_sde` amplifies;
    recipe: (name, steps, ratio) of a schedule to be placed beside them.
    """
    figure, axis = panels(1, 1, width=6.6, height=4.0)
    colors = {"dance_sde": "#c44e52", "flow_sde": "#4c72b0", "cps": "#55a868"}
    axis.axvspan(*unstable, color="#c44e52", alpha=0.08, lw=0)
    axis.axhline(1, color="black", lw=0.9, ls=":")
    places = {
        "dance_sde": (0.38, (-10, 4), "right"),
        "flow_sde": (0.45, (-4, 8), "right"),
        "cps": (0.45, (6, -12), "left"),
    }
    for kernel, (steps, ratios) in curves.items():
        axis.loglog(steps, ratios, color=colors[kernel], lw=2.2)
        at, offset, side = places[kernel]
        point = steps[int(at * len(steps))], ratios[int(at * len(steps))]
        style = dict(color=colors[kernel], fontweight="bold", textcoords="offset points", ha=side, va="center")
        axis.annotate(kernel, point, xytext=offset, **style)
    steps, ratios = curves["dance_sde"]
    worst = max(range(len(steps)), key=lambda n: ratios[n])
    text = f"{ratios[worst]:,.0f} times too wide at {steps[worst]} steps"
    axis.annotate(text, (steps[worst], ratios[worst]), xytext=(0, 8), textcoords="offset points", ha="center", color=colors["dance_sde"])  # fmt: skip
    inside = (unstable[0] * unstable[1]) ** 0.5
    axis.text(inside, min(curves["cps"][1]) * 1.3, "dance_sde overshoots\nnear the data", color=colors["dance_sde"], ha="center", fontsize=9)  # fmt: skip
    axis.text(steps[0], 1.2, " as wide as the data", fontsize=9, va="bottom")
    if recipe is not None:
        axis.plot(*recipe[1:], "*", ms=14, color="#f2b134", mec="black", mew=0.8)
        axis.annotate(recipe[0], recipe[1:], (10, -4), textcoords="offset points", fontsize=9, va="center")
    axis.set(xlabel="denoising steps $N$", ylabel="variance of the samples / of the data", title=title)
    axis.set(xlim=(steps[0], steps[-1]), ylim=(None, ratios[worst] * 8))
    return figure


def entropy_budget(
    iterations: list[int], image: list[float], floor: float, total: float | None = None, estimate: tuple | None = None
) -> Figure:
    """P02 and P17 as a ledger: H(z) `image`, which image, above its floor; up to `total`, which path to it.

    total: H(path) + H(z) in closed form, the base model's H(z) where it is None; estimate: kNN's (iterations, values)
    of H(z). Only the boundary's *shift* means something: differential entropies have no natural zero.
    """
    figure, axis = panels(1, 1, width=7.0, height=4.2)
    start, end, last = image[0], image[-1], iterations[-1]
    top, bottom = total or start, floor - 0.45 * (start - floor)
    axis.fill_between(iterations, image, top, color="#4c72b0", alpha=0.55, lw=0)
    axis.fill_between(iterations, floor, image, color="#c44e52", alpha=0.75, lw=0)
    axis.fill_between(iterations, bottom, floor, facecolor="#e8e8e8", edgecolor="#bdbdbd", hatch="///", lw=0)
    axis.plot(iterations, image, color="#8c2d31", lw=2)
    axis.axhline(floor, color="black", lw=2)
    for height, text in ((start, f"base model {start:.2f}"), (end, f"now {end:.2f}"), (floor, f"floor {floor:.2f}")):
        axis.text(last, height, f" {text}", va="center")
    centre, words = (iterations[0] + last) / 2, dict(ha="center", va="center", color="white", fontsize=11)
    axis.text(iterations[0] + 0.12 * (last - iterations[0]), (floor + start) / 2, "which image", **words)
    moved = f"moved: {start - end:.2f} of\n{start - floor:.2f} nats, {(start - end) / (start - floor):.0%}"
    axis.hlines(start, iterations[0], last, color="#8c2d31", lw=1, ls=":")
    axis.text(last - 0.02 * (last - iterations[0]), start - 0.06 * (start - floor), moved, ha="right", va="top")
    box = dict(bbox=dict(facecolor="#e8e8e8", edgecolor="none", pad=1.5), ha="center", va="center")
    axis.text(centre, (bottom + floor) / 2, "the last noisy step's own noise: no policy loses it", **box)
    if total is not None:
        axis.axhline(total, color="black", lw=2)
        axis.text(centre, start + 0.65 * (total - start), "which path to it", **words)
        axis.text(centre, total, "the whole path, closed form: no $\\theta$ in it", ha="center", va="bottom")
    if estimate is not None:
        axis.plot(*estimate, "o", ms=4, color="black", mfc="white", label="H(z) from samples (kNN)", clip_on=False)
        axis.legend(frameon=False, loc="upper left", bbox_to_anchor=(0, 0.9))
    axis.set(xlabel="iteration", ylabel="nats", xlim=(iterations[0], last), ylim=(bottom, top + 0.12 * (total is not None) * (top - bottom)))  # fmt: skip
    return figure


def dual_swing(
    runs: dict[str, list[tuple[list[float], list[float]]]],
    rest: tuple[float, float],
    theory: tuple[list[float], list[float]] | None = None,
) -> Figure:
    """P19: lambda finds lambda*, p finds p*. Over the iterations, and against each other.

    runs: label -> one (p, lambda) history a seed; rest: (p*, lambda*); theory: the equation's (p, lambda).
    """
    figure, (left, middle, right) = panels(1, 3, width=3.7, height=3.3)
    star = dict(marker="*", ms=15, color="#f2b134", mec="black", mew=0.8, ls="", zorder=5)
    for (name, seeds), color in zip(runs.items(), ("#4c72b0", "#c44e52", "#55a868")):
        for n, (p, weight) in enumerate(seeds):
            style = dict(color=color, lw=0.9, alpha=min(0.8, 2 / len(seeds)))
            steps = range(1, len(p) + 1)
            left.plot(steps, p, **style)
            middle.plot(steps, weight, **style)
            right.plot(p, weight, **style)
        left.plot([], [], color=color, label=name)
    if theory is not None:
        steps = range(1, len(theory[0]) + 1)
        left.plot(steps, theory[0], color="black", lw=2, label="theory")
        middle.plot(steps, theory[1], color="black", lw=2)
        right.plot(*theory, color="black", lw=2)
    for axis, height, name in ((left, rest[0], "$p^*$"), (middle, rest[1], "$\\lambda^*$")):
        axis.axhline(height, color="black", lw=0.9, ls="--")
        axis.text(1.0, height, f" {name} = {height:.2f}", va="center", transform=axis.get_yaxis_transform())
        axis.set(xlabel="iteration")
    right.plot(*rest, **star)
    left.set(title="share of the better mode, $p$")
    middle.set(title="weight $\\lambda$")
    right.set(title="one against the other", xlabel="$p$", ylabel="$\\lambda$")
    left.legend(frameon=False, fontsize=8, loc="lower right")
    return figure


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
        bottom.xaxis.set_minor_formatter("")
    axes[0, 0].set_ylabel("share of each mode")
    axes[1, 0].set_ylabel("modes alive")
    for m, color in palette.items():
        axes[0, -1].plot([], [], color=color, lw=2, label=f"{reward[m]:.2f}")
    axes[0, -1].legend(title="reward", frameon=False, fontsize=8, title_fontsize=8, loc="upper right")
    return figure


def shares_kept(runs: dict[str, dict[str, list[float]]]) -> Figure:
    """How much of the base model's diversity is left, by what it is measured in: a dot for each seed, a bar at the mean.

    runs: name (METHOD[@SPACE][/ENCODER][:WEIGHT], see `figures.label`) -> column -> shares over seeds.
    """
    figure, axis = panels(1, 1, width=6.6, height=4.2)
    columns = list(next(iter(runs.values())))
    for n, (name, shares) in enumerate(runs.items()):
        for row, column in enumerate(columns):
            y = row + 0.7 * ((n + 0.5) / len(runs) - 0.5)
            values = shares[column]
            axis.scatter(values, [y] * len(values), s=12, color=color_of(name), alpha=0.5, lw=0)
            axis.plot([sum(values) / len(values)] * 2, [y - 0.08, y + 0.08], color=color_of(name), lw=3, label=label(name) if row == 0 else None)  # fmt: skip
    axis.axvline(1, color="#7f7f7f", ls=":", lw=1.2)
    axis.set(xlabel="share of the base model's", yticks=range(len(columns)), yticklabels=columns, xlim=(0, None))
    axis.invert_yaxis()
    axis.legend(frameon=False, fontsize=8, loc="center left", bbox_to_anchor=(1.0, 0.5))
    return figure
