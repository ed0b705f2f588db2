"""The paper's story on coloured letters, in a few minutes on a laptop: `python -m ref`.

Fine-tunes the same small SD3 with Flow-GRPO, with a KL penalty and with PEC, and shows what became of its diversity.
A run that is already in the output folder is continued or, when finished, not repeated.
"""

import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Annotated

from annotated_types import Ge, Le

from ref import figures
from ref.options import Options, command, read
from ref.presets import PRESETS
from ref.runs import described
from ref.scale.directory import Alone, refuse_another, write_json
from ref.scale.signals import interruptible
from ref.settings import Settings, in_one_line
from ref.train import run
from ref.worlds import letters

RUNS = {"flow_grpo": None, "flow_grpo_kl": 0.03, "pec": 3.0}  # method -> lambda

COLUMNS = {
    "reward": ("reward", "{:.2f}"),
    "held_out": ("held-out reward", "{:.2f}"),
    "utility": ("rater", "{:.2f}"),
    "legibility": ("read by OCR", "{:.0%}"),
    "policy_entropy": ("policy entropy", "{}"),
    "feature_variance": ("feature var", "{:.2f}"),
    "typefaces": ("typefaces", "{:.0f}"),
    "colour": ("colour var", "{:.3f}"),
    "seconds": ("seconds", "{:.0f}"),
}


def table(rows: dict[str, dict]) -> str:
    """A fixed-width table, a line for each model; a missing value is left blank."""
    head = ["", *(title for title, _ in COLUMNS.values())]
    body = [
        [figures.LABELS[key], *(form.format(row[c]) if c in row else "" for c, (_, form) in COLUMNS.items())]
        for key, row in rows.items()
    ]
    widths = [max(len(line[i]) for line in [head, *body]) for i in range(len(head))]
    return "\n".join("  ".join(cell.rjust(w) for cell, w in zip(line, widths)) for line in [head, *body])


@in_one_line
class Story(Options):
    """The paper's story on coloured letters, in a few minutes on a laptop."""

    output_dir: Path = Path("outputs/letters")  # runs in it are continued or, when finished, not repeated
    seed: int = 2  # of the runs; of 0 to 4 the one with which Flow-GRPO collapses furthest
    iterations: Annotated[int, Ge(1), Le(10**6)] = PRESETS["letters"].settings.iterations  # of each run


def story(arguments: list[str] | None) -> None:
    given, began = read(Story, "ref", arguments), time.perf_counter()
    settings = replace(PRESETS["letters"].settings, seed=given.seed, iterations=given.iterations)
    with Alone(given.output_dir):
        for method, weight in RUNS.items():  # now, not when its turn has come
            refuse_another(given.output_dir / method, described("letters", method, weight, None, None, settings))
        tell(settings, given.output_dir)
    print(f"\n{time.perf_counter() - began:.0f} s; figures, metrics and weights in {given.output_dir}/")


def tell(settings: Settings, folder: Path) -> None:
    """Train what is not yet trained, and show what became of it."""
    rows, histories, images = {}, {}, {}
    for method, weight in RUNS.items():
        result = run(
            "letters", method, folder / method, weight, settings, resume=True, again="the same command goes on"
        )
        history = histories[method] = result["history"]
        entropy = [history[i]["policy_entropy"] for i in (0, -1)]
        rows.setdefault("base", result["base"])
        rows[method] = result["final"] | {"seconds": result["seconds"]}
        rows[method]["policy_entropy"] = " -> ".join(f"{h:.6f}" for h in entropy)
        images[method] = result["images"]
        images.setdefault("base", result["base_images"])
    print()
    print(table(rows))
    images = {k: images[k].unflatten(0, (len(letters.PROMPTS), -1)) for k in ("base", *RUNS)}
    phi = letters.read_heads(letters.WEIGHTS)["phi"]
    features = {k: phi(v.flatten(0, 1)).unflatten(0, v.shape[:2]) for k, v in images.items()}
    notes = {k: f"feature variance {rows[k]['feature_variance']:.2f}" for k in images}
    shown = {k: v[[letters.LETTERS.index(c) for c in "AEGRS"], :5].flatten(0, 1) for k, v in images.items()}
    figures.collapse(shown, features, 5, notes).savefig(folder / "collapse.png")
    lines = {figures.LABELS[k]: v[:, :2].transpose(0, 1).flatten(0, 1) for k, v in images.items()}
    figures.image_grid(lines, columns=len(letters.PROMPTS)).savefig(folder / "grid.png")
    figures.training_curves(histories).savefig(folder / "curves.png")
    figures.entropy_paradox(histories["flow_grpo"]).savefig(folder / "paradox.png")
    write_json(folder / "metrics.json", rows)


def main(arguments: list[str] | None = None) -> int:
    return interruptible(command, story, arguments)


if __name__ == "__main__":
    sys.exit(main())
