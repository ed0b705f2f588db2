"""Pictures of what training costs: phases, gains, scaling, memory.

Data in, a matplotlib `Figure` out, as in ref/figures.py. A `result` is what `python -m ref.benchmark --json` wrote;
rows are those of `python -m ref.benchmark.on_paper --json` and `python -m ref.benchmark.memory --json`.
"""

from collections.abc import Callable, Sequence

from matplotlib.figure import Figure

from ref.figures import COLORS, LABELS, panels

PHASES = {"sample": ("rollout", "#4c72b0"), "update": ("update", "#dd8452")}
SMALL = ("encode", "decode", "reward", "features")
SMALL_ONES, REST = "#55a868", "#cccccc"
MEMORY = {"weights": "#7f7f7f", "trained": "#c44e52", "kept": "#4c72b0"}
CARDS = (24, 48, 80)  # GB


def phases(result: dict) -> Figure:
    """(a) an iteration's time by phase, a bar for each method; (b) seconds over Flow-GRPO's, with quartiles."""
    figure, (left, right) = panels(1, 2, width=4.6, height=2.3, width_ratios=(2, 1))
    figure.set_size_inches(9.2, 2.3)
    methods = list(result["phases"])
    for y, method in enumerate(methods):
        ms = {name: 1e3 * s["median"] for name, s in result["phases"][method].items()}
        small = sum(ms[name] for name in SMALL)
        parts = [(ms[name], label, color) for name, (label, color) in PHASES.items()]
        parts += [(small, "encode, decode, reward, φ", SMALL_ONES)]
        parts += [(max(0.0, ms["seconds"] - sum(p[0] for p in parts)), "the rest", REST)]
        start = 0.0
        for width, label, color in parts:
            left.barh(y, width, left=start, color=color, height=0.62, label=label if y == 0 else None)
            if width > 0.12 * ms["seconds"]:
                left.text(start + width / 2, y, f"{width:.0f}", ha="center", va="center", color="white")
            start += width
        left.text(start, y, f" {ms['seconds']:.0f} ms", va="center")
    left.set_yticks(range(len(methods)), [LABELS[m] for m in methods])
    left.set(title="(a) an iteration, milliseconds", ylim=(-0.5, len(methods) + 0.3), xmargin=0.12)
    left.invert_yaxis()
    left.legend(frameon=False, fontsize=8, ncols=4, loc="lower left", columnspacing=1.0, handlelength=1.2)
    for y, (method, s) in enumerate(result["ratio"].items()):
        error = [[s["median"] - s["low"]], [s["high"] - s["median"]]]
        right.errorbar(s["median"], y, xerr=error, fmt="o", color=COLORS[method], capsize=3)
        right.annotate(f"{s['median']:.2f}", (s["median"], y), (0, 7), textcoords="offset points", ha="center")
    right.axvline(1, color="#7f7f7f", lw=0.8, ls=":")
    right.set_yticks(range(len(result["ratio"])), [LABELS[m] for m in result["ratio"]])
    right.set(title="(b) times Flow-GRPO without φ", ylim=(1.5, -0.6))
    reach = max(0.08, *(1.3 * abs(s[k] - 1) for s in result["ratio"].values() for k in ("low", "high")))
    right.set_xlim(1 - reach, 1 + reach)
    return figure


def gains(pairs: dict[str, tuple[str, dict, str, dict]]) -> Figure:
    """What one choice gains: two bars a panel. title -> (slow's label, its result, fast's label, its result)."""
    figure, axes = panels(1, len(pairs), width=4.2, height=1.6, squeeze=False)
    for axis, (title, (slow, a, fast, b)) in zip(axes[0], pairs.items()):
        seconds = [result["phases"]["flow_grpo"]["seconds"] for result in (a, b)]
        for y, s, color in zip((0, 1), seconds, ("#bbbbbb", "#4c72b0")):
            error = [[1e3 * (s["median"] - s["low"])], [1e3 * (s["high"] - s["median"])]]
            axis.barh(y, 1e3 * s["median"], height=0.6, color=color, xerr=error, capsize=3)
            axis.text(1e3 * s["high"], y, f"  {1e3 * s['median']:.0f} ms", va="center")
        gain = seconds[0]["median"] / seconds[1]["median"]
        axis.set_yticks((0, 1), (slow, fast))
        axis.set_title(f"{title}: {gain:.2g} times" if gain >= 2 else f"{title}: {gain:.2f} times")
        axis.set(xmargin=0.22, xlabel="an iteration, milliseconds")
        axis.invert_yaxis()
    return figure


def savers(tables: dict[str, dict], names: dict[str, str]) -> Figure:
    """Seconds an image row by row, and how many times as fast as the first. A panel for each title -> what
    `python -m ref.benchmark.savers --json` wrote; names: row -> its label, those to be shown."""
    figure, axes = panels(1, len(tables), width=4.6, height=0.3 * len(names) + 0.9, sharey=True, squeeze=False)
    for axis, (title, found) in zip(axes[0], tables.items()):
        rows = {row["name"]: row for row in found["rows"]}
        for y, name in enumerate(names):
            if name not in rows:
                continue
            seconds, faster = rows[name]["seconds"], rows[name]["faster"]
            error = [[seconds["median"] - seconds["low"]], [seconds["high"] - seconds["median"]]]
            axis.barh(y, seconds["median"], height=0.66, color="#bbbbbb" if y < 2 else "#4c72b0", xerr=error, capsize=2)
            axis.text(seconds["high"], y, f"  {faster['median']:.2f} x", va="center", fontsize=9)
        axis.set(title=title, xlabel="seconds an image", xmargin=0.2)
    axes[0, 0].set_yticks(range(len(names)), names.values())
    axes[0, 0].invert_yaxis()
    return figure


def race(rows: list[dict]) -> Figure:
    """A line for each seed, from the twin to the preset: (a) seconds to the reward, (b) reward and (c) feature variance
    that an evaluation finds there. rows: what `python -m ref.benchmark.savers --race --json` wrote."""
    figure, axes = panels(1, 3, width=3.1, height=0.3 * len(rows) + 1.1, sharey=True)
    titles = ("(a) seconds of one thread", "(b) reward there", "(c) feature variance there")
    for axis, key, title in zip(axes, ("seconds", "reward", "feature_variance"), titles):
        for y, row in enumerate(rows):
            a, b = row["twin"][key], row["preset"][key]
            axis.plot([a, b], [y, y], color="#bbbbbb", lw=2, zorder=1)
            axis.plot(b, y, "o", color="#7f7f7f", label="preset" if y == 0 else None)
            axis.plot(a, y, "o", color="#4c72b0", label="fast twin" if y == 0 else None)
        axis.set(title=title, xlim=(0, 1.15 * max(row[name][key] for row in rows for name in ("twin", "preset"))))
    axes[0].set_yticks(range(len(rows)), [f"seed {row['seed']}" for row in rows])
    axes[0].set_ylim(len(rows) - 0.4, -0.6)
    axes[1].legend(frameon=False, fontsize=9, loc="center left")
    return figure


def on_paper(
    rows: list[dict], seconds: Callable[[str, int, float], float], most: dict[str, int], rate: float
) -> Figure:
    """(a) TFLOP of one sample's passes over image size, each model once; (b) seconds of an iteration over GPUs.

    seconds(preset, gpus, rate); most: preset -> (its image size, GPUs beyond which groups do not go round).
    rate: useful FLOP/s of a GPU, a guess; the band is from half of it to one and a half.
    """
    figure, (left, right) = panels(1, 2, width=4.4, height=3.4)
    colors = dict(zip(most, ("#4c72b0", "#dd8452", "#55a868")))
    for preset, color in colors.items():
        mine = [row for row in rows if row["preset"] == preset]
        sizes = [row["pixels"] for row in mine]
        for key, style in (("forward", "o-"), ("forward_and_backward", "o--")):
            if not preset.endswith("_720"):  # the same network
                left.plot(sizes, [row[key] / 1e12 for row in mine], style, ms=4, mfc="white", color=color)
                label, va = (preset, "bottom") if style == "o-" else ("and backward", "top")
                left.annotate(label, (sizes[-1], mine[-1][key] / 1e12), (6, 0), textcoords="offset points", va=va,
                              color=color, fontsize=9)  # fmt: skip
        gpus = [2**k for k in range(12) if 2**k < most[preset]] + [most[preset]]
        right.plot(gpus, [seconds(preset, n, rate) for n in gpus], "o-", ms=4, color=color, label=preset)
        low, high = ([seconds(preset, n, f * rate) for n in gpus] for f in (1.5, 0.5))
        right.fill_between(gpus, low, high, color=color, alpha=0.12, lw=0)
    left.set(xscale="log", yscale="log", title="(a) TFLOP of one sample", xlabel="pixels along a side")
    left.set_xticks(sizes, [str(n) for n in sizes])
    left.set_yticks([2, 5, 10, 20, 50, 100, 200], ["2", "5", "10", "20", "50", "100", "200"])
    right.set(xscale="log", yscale="log", title="(b) seconds of an iteration", xlabel="GPUs")
    right.set_xticks([1, 2, 4, 8, 16, 24], ["1", "2", "4", "8", "16", "24"])
    right.set_yticks([20, 50, 100, 200, 500, 1000, 2000], ["20", "50", "100", "200", "500", "1000", "2000"])
    right.text(0.97, 0.97, f"if a GPU does {rate / 1e12:.0f} TFLOP/s:\na guess (band: half to 1.5 times)",
               transform=right.transAxes, ha="right", va="top", fontsize=8.5, color="#c44e52")  # fmt: skip
    for axis in (left, right):
        axis.minorticks_off()
    right.legend(frameon=False, fontsize=9, loc="lower left")
    return figure


def predicted_and_measured(points: dict[str, dict[str, tuple[float, float, float, float]]]) -> Figure:
    """The formula's ratios (rings) beside those measured (dots, with quartiles).

    points: group -> change -> (predicted, measured, its low, its high).
    """
    flat = [(group, change, *values) for group, changes in points.items() for change, values in changes.items()]
    figure, axis = panels(1, 1, width=7.4, height=0.3 * (len(flat) + len(points)) + 0.9)
    y, ticks = 0, []
    for group, changes in points.items():
        ticks.append((y, group))
        for change, (predicted, measured, low, high) in changes.items():
            y += 1
            axis.plot([predicted, measured], [y, y], color="#bbbbbb", lw=2, zorder=1)
            axis.plot(predicted, y, "o", ms=9, mfc="white", color="#7f7f7f", zorder=2)
            error = [[measured - low], [high - measured]]
            axis.errorbar(measured, y, xerr=error, fmt="o", ms=5, color="#c44e52", capsize=2, zorder=3)
            ticks.append((y, change))
        y += 1
    axis.plot([], [], "o", ms=9, mfc="white", color="#7f7f7f", label="the formula")
    axis.plot([], [], "o", ms=5, color="#c44e52", label="measured")
    axis.set_yticks(*zip(*ticks))
    for text in axis.get_yticklabels():
        text.set_fontweight("bold" if text.get_text() in points else "normal")
    axis.tick_params("y", length=0)
    axis.set(xlabel="times as long", xlim=(1, 1.2 * max(max(row[2:]) for row in flat)), ylim=(y - 0.3, -0.8))
    axis.legend(frameon=False, loc="upper right")
    return figure


def cards(axis, named: bool = True) -> None:
    """Lines at the GPUs' memory, named at the right."""
    for size in CARDS:
        axis.axhline(size, color="black", lw=0.9, ls=":")
        if named:
            axis.text(1.01, size, f"{size} GB", transform=axis.get_yaxis_transform(), va="center", fontsize=8)


def memory(footprints: dict[str, dict], batches: Sequence[int] = (1, 4, 8, 12), limit: float = 100) -> Figure:
    """GiB of one GPU by micro-batch: weights, trained, kept. A panel a model; pale: without checkpointing."""
    figure, axes = panels(1, len(footprints), width=3.5, height=3.3, sharey=True, squeeze=False)
    for axis, (title, terms) in zip(axes[0], footprints.items()):
        for n, batch in enumerate(batches):
            for x, each, alpha in ((n - 0.2, terms["kept"] + terms["block"], 1.0), (n + 0.2, terms["without"], 0.45)):
                base = 0.0
                for name, height in (
                    ("weights", terms["weights"]),
                    ("trained", terms["trained"]),
                    ("kept", batch * each),
                ):
                    axis.bar(x, height, bottom=base, width=0.36, color=MEMORY[name], alpha=alpha, lw=0)
                    base += height
                if base > limit:
                    axis.text(x, 0.98 * limit, f"{base:.0f}", ha="center", va="top", fontsize=8)
        axis.set_xticks(range(len(batches)), [str(b) for b in batches])
        axis.set(title=title, xlabel="samples in a micro-batch", ylim=(0, limit))
        cards(axis, named=axis is axes[0, -1])
    axes[0, 0].set_ylabel("GiB, computed")
    for name, color in MEMORY.items():
        axes[0, 0].bar(0, 0, color=color, label={"kept": "kept for the way back"}.get(name, name))
    axes[0, 0].bar(0, 0, color="#4c72b0", alpha=0.45, label="without checkpointing")
    axes[0, 0].legend(frameon=False, fontsize=8, loc="upper left", bbox_to_anchor=(0, 0.8))
    return figure


def parts(whole: dict[str, float], gpus: Sequence[int] = (1, 2, 4, 8, 16)) -> Figure:
    """GiB on each GPU of weights held in parts, over GPUs. whole: model -> GiB of all of them together."""
    figure, axis = panels(1, 1, width=5.0, height=3.0)
    for (model, total), color in zip(whole.items(), ("#4c72b0", "#dd8452")):
        axis.plot(gpus, [total / n for n in gpus], "o-", color=color, label=f"{model}, {total:.0f} GiB in all")
    axis.set(xscale="log", yscale="log", xlabel="GPUs", ylabel="GiB on each, computed")
    axis.set_xticks(gpus, [str(n) for n in gpus])
    axis.set_yticks([5, 10, 20, 50, 100, 200], ["5", "10", "20", "50", "100", "200"])
    axis.minorticks_off()
    cards(axis)
    axis.legend(frameon=False, fontsize=9)
    return figure
