"""FLOPs of the large presets, counted on fake tensors: shapes alone go through the real modules.

python -m ref.benchmark.on_paper                  # the presets' image sizes
python -m ref.benchmark.on_paper 256 512 1024     # others, in pixels
"""

import sys
from collections.abc import Iterator

import torch
from pydantic import Field
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode
from tyro.conf import Positional

from ref.benchmark.measure import ATTENTION_ON_CPU, flops, phase_flops
from ref.models.sd3 import SD3
from ref.models.shapes import shaped
from ref.options import Options, Pixels, command, read
from ref.presets import PRESETS, architectures
from ref.settings import in_one_line


def on_paper(sizes: list[int]) -> Iterator[str]:
    """FLOPs of the large presets, counted on fake tensors: shapes alone go through the real modules.

    sizes: pixels along the sides of the images; none: each preset's own. Yields the lines of a table.
    """
    yield "preset        pixels   forward  and backward   decode (TFLOP a sample)  images   rollout   update      sum (PFLOP)"
    for preset, name, size, rank in architectures(sizes):
        model, settings = shaped(name, size, rank), PRESETS[preset].settings
        with FakeTensorMode(allow_non_fake_inputs=True):
            model.to_empty(device="cpu")
            config, tokens = model.transformer.config, model.default_tokens + 77 * isinstance(model, SD3)
            embeds = torch.empty(1, tokens, config.joint_attention_dim, dtype=model.dtype)
            pooled = torch.empty(1, config.pooled_projection_dim, dtype=model.dtype)
            conditioning = {"prompt_embeds": embeds, "pooled_prompt_embeds": pooled}
            conditioning |= {f"negative_{key}": value for key, value in conditioning.items()}
            forward, both = flops(model, conditioning), flops(model, conditioning, backward=True)
            with FlopCounterMode(display=False, custom_mapping=ATTENTION_ON_CPU) as counter:
                model.decode(torch.empty(1, *model.latent_shape))
        images, work = settings.groups * settings.group_size, phase_flops(settings, forward, both)
        each = (forward, both, counter.get_total_flops())
        all_of_them = (work["sample"], work["update"], sum(work.values()))
        yield (
            f"{preset:<13} {size:>6}" + "{:>10.2f}{:>14.2f}{:>9.2f}".format(*(n / 1e12 for n in each))
            + f"{images:>25}" + "{:>10.1f}{:>9.1f}{:>9.1f}".format(*(n / 1e15 for n in all_of_them))
        )  # fmt: skip


@in_one_line
class OnPaper(Options):
    """FLOPs of the large presets, counted from their shapes."""

    pixels: Positional[list[Pixels]] = Field(default_factory=list)  # along the sides of the images (none: the presets')


def print_table(arguments: list[str] | None) -> None:
    for line in on_paper(read(OnPaper, "ref.benchmark.on_paper", arguments).pixels):
        print(line, flush=True)


def main(arguments: list[str] | None = None) -> int:
    return command(print_table, arguments)


if __name__ == "__main__":
    sys.exit(main())
