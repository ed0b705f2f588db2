"""FLOPs of the large presets, counted on fake tensors: shapes alone go through the real modules.

python -m ref.benchmark.on_paper                  # the presets' image sizes
python -m ref.benchmark.on_paper 256 512 1024     # others, in pixels
"""

import functools
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated

import torch
from pydantic import Field
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode
from tyro.conf import Positional, arg

from ref.benchmark.measure import ATTENTION_ON_CPU, flops, phase_flops
from ref.models.sd3 import SD3
from ref.models.shapes import shaped
from ref.options import Options, Pixels, command, read
from ref.presets import PRESETS, architectures
from ref.scale.directory import write_json
from ref.scale.paths import refuse_unwritable
from ref.settings import in_one_line


@functools.cache
def counted(
    name: str, size: int, rank: int, targets: str, tokens: int | None, guidance: float | None
) -> tuple[int, int, int]:
    """FLOPs of a sample: forward, forward and backward, decode. T5 tokens and guidance: None is the model's own."""
    model = shaped(name, size, rank, targets=targets)
    model.guidance_scale = model.guidance_scale if guidance is None else guidance
    with FakeTensorMode(allow_non_fake_inputs=True):
        model.to_empty(device="cpu")
        config, tokens = model.transformer.config, (tokens or model.default_tokens) + 77 * isinstance(model, SD3)
        embeds = torch.empty(1, tokens, config.joint_attention_dim, dtype=model.dtype)
        pooled = torch.empty(1, config.pooled_projection_dim, dtype=model.dtype)
        conditioning = {"prompt_embeds": embeds, "pooled_prompt_embeds": pooled}
        conditioning |= {f"negative_{key}": value for key, value in conditioning.items()}
        forward, both = flops(model, conditioning), flops(model, conditioning, backward=True)
        with FlopCounterMode(display=False, custom_mapping=ATTENTION_ON_CPU) as counter:
            model.decode(torch.empty(1, *model.latent_shape))
    return forward, both, counter.get_total_flops()


def on_paper(sizes: list[int]) -> Iterator[dict]:
    """FLOPs of the large presets, counted on fake tensors: shapes alone go through the real modules.

    sizes: pixels along the sides of the images; none: each preset's own. Yields a row for each preset and size:
    FLOPs of a sample (forward, forward_and_backward, decode) and of an iteration (sample, update).
    """
    for preset, name, size, rank in architectures(sizes):
        own, settings = PRESETS[preset].options, PRESETS[preset].settings
        forward, both, decode = counted(name, size, rank, own.lora_targets, own.max_sequence_length, own.guidance_scale)
        yield {
            "preset": preset,
            "pixels": size,
            "images": settings.groups * settings.group_size,
            "forward": forward,
            "forward_and_backward": both,
            "decode": decode,
        } | phase_flops(settings, forward, both)


HEADER = "preset            pixels   forward  and backward   decode (TFLOP a sample)  images   rollout   update      sum (PFLOP)"


def line(row: dict) -> str:
    each = (row["forward"], row["forward_and_backward"], row["decode"])
    all_of_them = (row["sample"], row["update"], row["sample"] + row["update"])
    return (
        f"{row['preset']:<17} {row['pixels']:>6}" + "{:>10.2f}{:>14.2f}{:>9.2f}".format(*(n / 1e12 for n in each))
        + f"{row['images']:>25}" + "{:>10.1f}{:>9.1f}{:>9.1f}".format(*(n / 1e15 for n in all_of_them))
    )  # fmt: skip


@in_one_line
class OnPaper(Options):
    """FLOPs of the large presets, counted from their shapes."""

    pixels: Positional[list[Pixels]] = Field(default_factory=list)  # along the sides of the images (none: the presets')
    json_file: Annotated[Path | None, arg(name="json")] = None  # write all numbers here


def print_table(arguments: list[str] | None) -> None:
    given, rows = read(OnPaper, "ref.benchmark.on_paper", arguments), []
    if given.json_file:
        refuse_unwritable(given.json_file, "--json")
    for row in on_paper(given.pixels):
        print(line(row) if rows else f"{HEADER}\n{line(row)}", flush=True)
        rows.append(row)
    if given.json_file:
        write_json(given.json_file, rows)


def main(arguments: list[str] | None = None) -> int:
    return command(print_table, arguments)


if __name__ == "__main__":
    sys.exit(main())
