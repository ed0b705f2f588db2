"""A row of tables 1 and 2 for any text-to-image pipeline of diffusers, and the table of many rows.

    python -m ref.evaluate --model stabilityai/stable-diffusion-3.5-medium --output sd35.csv
    python -m ref.evaluate --model black-forest-labs/FLUX.1-dev --lora outputs/flux/weights --name PEC --output pec.csv
    python -m ref.evaluate --table sd35.csv pec.csv

The stock pipeline's guidance is not training's (7.0 and 4.5 on SD3), nor may its time grid be. A row of a run's weights
is drawn as the run's own evaluations: guidance, shift and size are those of run.json, unless they are given. The base
model's row beside it wants the same: `--run outputs/flux`.

For each prompt K images are drawn from seeds that depend on (prompt's number, image's number) alone, so rows
differ by their models. Quality columns are mean rewards (rewards.py), diversity columns are measured within
a prompt and averaged over prompts (metrics.py):

    var_X                           feature variance, trace of the covariance, times 100; X = dino, clip, pickscore
    dino_diversity, clip_diversity  mean pairwise L2 distance of unit-norm features

Other rewards and encoders that are asked for have columns of their own, called as they are, and count in Norm.Avg too.
What was not asked for stays empty, as var_image_reward always does: ImageReward reads image and prompt
together, and the paper's page does not say which of its features are meant. Norm.Avg leaves empty cells
out. The paper prints DINO and CLIP distances on another scale (a reading: features that are not
normalised), so its rows and these do not belong into one table.
"""

import csv
import io
import math
import re
import sys
from contextlib import suppress
from pathlib import Path
from typing import Annotated, Literal

import torch
from annotated_types import Ge, Gt, Le
from pydantic import Field
from torch import Tensor

from ref import metrics
from ref.models.lora import find
from ref.models.prompts import read_prompts
from ref.models.stock import drawing, load_pipeline
from ref.options import Options, Pixels, command, near, read
from ref.sampling import ask, generator_for
from ref.scale.checkpoint import atomic_write
from ref.scale.directory import RECORD, read_record
from ref.scale.memory import out_of_memory
from ref.scale.paths import refuse_unwritable
from ref.scale.processes import DEVICES, device_type
from ref.scale.shown import bar, showing
from ref.scale.textfiles import read_table
from ref.scoring.encoders import check_name, load_encoder
from ref.scoring.load import check_prompts, load_reward, parse
from ref.scoring.own import is_own
from ref.settings import in_one_line

REWARDS = {  # name in rewards.py -> column
    "pickscore": "pickscore",
    "aesthetic": "aesthetic_v2_5",
    "image_reward": "image_reward",
    "clip_score": "clip_score",
    "hpsv2": "hps_v2_1",
    "unified_reward": "unified_reward",
}
QUALITY = dict(zip(REWARDS.values(), (".3f", ".3f", ".3f", ".3f", ".3f", ".3f")))
SPACES = r"var_(.+)|(.+)_diversity"
DIVERSITY = {
    "dino_diversity": ".3f",
    "clip_diversity": ".3f",
    "var_clip": ".2f",
    "var_dino": ".2f",
    "var_image_reward": ".2f",
    "var_pickscore": ".2f",
}


def draw(pipe, prompt: str, number: int, count: int, batch: int, **options) -> Tensor:
    """`count` images [K, 3, H, W] in [0, 1] of the prompt with this number, on the CPU."""
    seeds = [generator_for("evaluate", number, k) for k in range(count)]
    parts = [seeds[i : i + batch] for i in range(0, count, batch)]
    images = [pipe([prompt] * len(part), generator=part, output_type="pt", **options).images for part in parts]
    return torch.cat([part.float().cpu() for part in images])


@torch.no_grad()
def evaluate(
    pipe,
    prompts: list[str],
    images_per_prompt: int,
    rewards: dict,
    encoders: dict,
    batch: int = 4,
    keep=None,
    **options,
) -> dict[str, float]:
    """The columns of a row.

    rewards, encoders   column -> reward model; name -> encoder
    keep                called with (number, images) of every prompt
    options             of the pipeline: num_inference_steps, guidance_scale, height, width, sigmas

    Raises ValueError naming network and prompt for a NaN.
    """
    values = {}
    for number, prompt in enumerate(bar(prompts, "prompts", logged=True)):
        images, repeated = draw(pipe, prompt, number, images_per_prompt, batch, **options), [prompt] * images_per_prompt
        if keep:
            keep(number, images)
        for name, encoder in encoders.items():
            phi = ask(encoder, images, repeated, features=True)[None]
            values.setdefault(f"var_{name}", []).append(100 * metrics.feature_variance(phi).item())
            values.setdefault(f"{name}_diversity", []).append(metrics.mean_pairwise_distance(phi).item())
        for column, reward in rewards.items():
            values.setdefault(column, []).append(ask(reward, images, repeated).mean().item())
    return {column: sum(each) / len(each) for column, each in values.items()}


def column_of(reward: str) -> str:
    """What a reward's column is called: its specification without sources, or as the paper has it."""
    terms = [name if weight == 1 else f"{name}:{weight:g}" for weight, name, _ in parse(reward)]
    return REWARDS.get("+".join(terms), "+".join(terms))


def kind_of(column: str) -> str | None:
    """ "quality", "diversity", or None for what is no column of a table."""
    with suppress(ValueError, OSError):
        space = re.fullmatch(SPACES, column)
        if column in DIVERSITY or space and (is_own(space[1] or space[2]) or not check_name(space[1] or space[2])):
            return "diversity"
    with suppress(ValueError):
        if column in QUALITY or column not in REWARDS and parse(column):
            return "quality"
    return None


def columns(rows: list[dict], kind: str) -> dict[str, str]:
    """The columns of this kind with their formats, the paper's first."""
    own = dict.fromkeys(column for row in rows for column in row if column != "name" and kind_of(column) == kind)
    return {"quality": QUALITY, "diversity": DIVERSITY}[kind] | {
        c: ".3f" for c in own if c not in (*QUALITY, *DIVERSITY)
    }


def read_rows(files: list[Path]) -> list[dict]:
    """Rows of the files, in their order, with "name" and a number or None for every column of the tables.

    Raises OSError or ValueError naming file and line: no table (`textfiles.read_table`), none of the columns, one
    that is nearly spelled as one of them, a row without a name or like one before it, and what is no finite number.
    """
    rows, seen, known = [], {}, (*QUALITY, *DIVERSITY)
    for file in files:
        for line, cells in read_table(file, ("name", "method")):
            place, name = f"{file}, line {line}", cells.get("name") or cells.get("method")
            asked = [*known, *(column for column in cells if column not in known and kind_of(column))]
            for column in cells.keys() - set(asked):
                if guess := near(column, set(known) - cells.keys(), alike=0.85):
                    raise ValueError(f"{file}, line 1: unknown column {column!r}; {guess}rename or remove it")
            if not set(asked) & cells.keys():
                raise ValueError(f"{file}, line 1: no column of the tables; give one of {', '.join(known)}")
            if not name:
                raise ValueError(f"{place}: no name; a row is what --output writes")
            values = {column: number(place, column, cells.get(column, "")) for column in asked}
            words = {column: cell for column, cell in cells.items() if not re.fullmatch(r"[-+.\deE]*", cell)}
            row = (name, *words.items())  # table 1 has a method in several spaces
            if row in seen:
                raise ValueError(f"{place}: {name!r} is in {seen[row]} already; give each row a --name of its own")
            seen[row] = place
            rows.append({"name": name} | values)
    return rows


def number(place: str, column: str, cell: str) -> float:
    """A cell's number, NaN for an empty one."""
    try:
        value = float(cell or "nan")
    except ValueError:
        value = math.inf
    if math.isinf(value) or cell and math.isnan(value) or "_" in cell:
        write = f"write {cell.replace(',', '.')}" if re.fullmatch(r"-?\d+,\d+", cell) else "leave a missing one empty"
        raise ValueError(f"{place}: {column} is {cell!r}, not a finite number; {write}")
    return value


def table(rows: list[dict], form: str = "markdown") -> str:
    """Rows of `read_rows` with Norm.Avg of quality and diversity, and Overall. Columns without any value are left out."""
    shown, averages = {}, []
    for kind in ("quality", "diversity"):
        names = columns(rows, kind)
        rows = [dict.fromkeys(names, math.nan) | row for row in rows]
        average = metrics.normalized_average(torch.tensor([[row[c] for c in names] for row in rows]))
        averages.append(average)
        shown |= {c: f for c, f in names.items() if any(not math.isnan(row[c]) for row in rows)}
        shown[f"{kind}_norm_avg"] = ".3f"
        rows = [row | {f"{kind}_norm_avg": a} for row, a in zip(rows, average.tolist())]
    rows = [row | {"overall": o} for row, o in zip(rows, (sum(averages) / 2).tolist())]
    known = [{k: v if k == "name" or not math.isnan(v) else None for k, v in row.items()} for row in rows]
    return metrics.table(known, shown | {"overall": ".3f"}, form)


def save_images(folder: Path, number: int, images: Tensor) -> None:
    from torchvision.utils import save_image

    folder.mkdir(parents=True, exist_ok=True)
    for k, image in enumerate(images):
        save_image(image, folder / f"{number:04d}-{k}.png")


@in_one_line
class Evaluation(Options):
    """A row of tables 1 and 2 for any text-to-image pipeline of diffusers, or the table of many rows."""

    model: str | None = None  # a diffusers folder or hub id
    lora: str | None = None  # weights that ref.train saved, a LoRA in diffusers' or PEFT's form: folder, file or hub id
    name: str | None = None  # of the row (None: the model's)
    prompts: str = "evaluation"  # a .txt, .jsonl, .json, .csv or .tsv file, or train, evaluation or ocr
    images_per_prompt: Annotated[int, Ge(2), Le(10**4)] = 8  # K; one image has no diversity
    rewards: list[str] = Field(["pickscore", "aesthetic", "image_reward", "clip_score", "hpsv2"])  # of quality
    encoders: list[str] = Field(["dino", "clip", "pickscore"])  # spaces of diversity
    steps: Annotated[int, Ge(1), Le(1000)] | None = None  # denoising steps (None: the pipeline's)
    run: Path | None = None  # a run's folder: drawn with its guidance, shift and size (None: that of --lora)
    guidance_scale: Annotated[float, Ge(0), Le(100)] | None = None  # (None: the run's, or the pipeline's)
    shift: Annotated[float, Gt(0), Le(100)] | None = None  # of the time grid (None: the run's, or the pipeline's)
    height: Pixels | None = None  # in pixels (None: the run's, or the pipeline's)
    width: Pixels | None = None  # in pixels (None: the run's, or the pipeline's)
    batch: Annotated[int, Ge(1), Le(10**4)] = 4  # images at once
    device: Literal[DEVICES] | None = None  # (None: the GPU where there is one)
    images: Path | None = None  # folder for the images as PNG
    output: Path | None = None  # the row as CSV, or the table (None: standard output)
    table: list[Path] = Field([])  # build the table of these rows instead
    form: Literal["markdown", "latex", "csv"] = "markdown"  # of the table


def as_trained(options: Evaluation) -> Evaluation:
    """The options with what they leave open as the run drew it, where `run` or the LoRA's own folder tells."""
    folder = options.run
    if options.lora:
        beside = find(options.lora).parent
        if folder is None and beside.name == "weights" and (beside.parent / RECORD).exists():
            folder = beside.parent
    if folder is None:
        return options
    if not (folder / RECORD).exists():
        raise FileNotFoundError(f"--run {folder} is not the folder of a run: there is no {RECORD} in it")
    names = ("guidance_scale", "shift", "height", "width")
    trained = read_record(folder, ("options",), of_options=names)["options"]
    left = {name: trained[name] for name in names if getattr(options, name) is None}
    print(
        f"drawn as in {folder / RECORD}: {', '.join(f'{name} {value}' for name, value in left.items() if value)}",
        file=sys.stderr,
    )
    return Evaluation(**options.model_dump() | left | {"run": folder})


def row(options: Evaluation) -> dict:
    """Load everything, draw, score. Raises ValueError or OSError with one clear line."""
    if not options.model:
        raise ValueError("give --model, or --table with rows to put together")
    prompts = read_prompts(options.prompts)
    for encoder in options.encoders:
        check_name(encoder)
    for reward in options.rewards:
        check_prompts(reward, prompts)
    if len({column_of(reward) for reward in options.rewards}) < len(options.rewards):
        raise ValueError(f"--rewards has one twice: {' '.join(options.rewards)}; a row has one column for each")
    if options.lora:
        find(options.lora)
    options = as_trained(options)
    device = device_type(options.device)
    encoders = {name.partition("=")[0]: load_encoder(name, device) for name in options.encoders}
    rewards = {}
    for spec in options.rewards:
        rewards[column_of(spec)] = load_reward(spec, device, encoders=encoders.values())
    pipe = load_pipeline(options.model, options.lora, device)
    given = {name: getattr(options, name) for name in ("guidance_scale", "height", "width")}
    given = drawing(pipe, options.shift, bool(options.run), num_inference_steps=options.steps, **given)
    keep = (lambda number, images: save_images(options.images, number, images)) if options.images else None
    values = evaluate(pipe, prompts, options.images_per_prompt, rewards, encoders, options.batch, keep, **given)
    name = options.name or " + ".join(filter(None, (options.model, options.lora)))
    return {"name": name, "prompts": len(prompts), "images_per_prompt": options.images_per_prompt} | {
        column: values.get(column, "") for column in dict.fromkeys((*QUALITY, *DIVERSITY, *values))
    }


def evaluate_as_asked(arguments: list[str] | None) -> None:
    options = read(Evaluation, "ref.evaluate", arguments)
    if options.output:
        refuse_unwritable(options.output, "--output")
    if options.images:
        refuse_unwritable(options.images / "0000-0.png", "--images")
    if options.table:
        if options.model or options.lora:
            raise ValueError("--table puts rows together and draws nothing; leave --model and --lora out")
        rows = read_rows(options.table)
        if len(rows) < 3:
            print(f"warning: {len(rows)} row{'s' * (len(rows) > 1)}: each column's worst counts 0 and its best 1, so "
                  "Norm.Avg and Overall say little; give more rows", file=sys.stderr)  # fmt: skip
        text = table(rows, options.form) + "\n" * (options.form != "csv")
    else:
        with showing(True), out_of_memory("while evaluating", "lower --batch, or give smaller --height and --width"):
            values = row(options)
        lines = io.StringIO()
        writer = csv.DictWriter(lines, values.keys(), lineterminator="\n")
        writer.writeheader()
        writer.writerow(values)
        text = lines.getvalue()
    if options.output:
        options.output.parent.mkdir(parents=True, exist_ok=True)
        atomic_write(options.output, lambda temporary: temporary.write_text(text, encoding="utf-8"))
    else:
        print(text, end="")


def main(arguments: list[str] | None = None) -> int:
    return command(evaluate_as_asked, arguments)


if __name__ == "__main__":
    sys.exit(main())
