"""How good the letters' base model is, beside the data it learnt from.

    python -m ref.worlds.letters.quality                     # the shipped weights, without guidance and with 1.8
    python -m ref.worlds.letters.quality DIR --images 100    # those that letters_base wrote to DIR

One row for renders, one for renders through the autoencoder, one for each guidance scale. The columns
are those of `judges.measures`.
"""

import sys
from pathlib import Path
from typing import Annotated

import torch
from annotated_types import Ge, Le
from torch import Tensor
from tyro.conf import Positional

from ref.options import Options, command, read
from ref.sampling import sample
from ref.settings import in_one_line
from ref.worlds import letters


@torch.no_grad()
def through_vae(model, images: Tensor) -> Tensor:
    """Renders, encoded and decoded."""
    config = model.vae.config
    means = torch.cat([model.vae.encode(part * 2 - 1).latent_dist.mean for part in images.split(256)])
    return torch.cat(
        [model.decode(part) for part in ((means - config.shift_factor) * config.scaling_factor).split(256)]
    )


def table(folder: Path | str, images: int, steps: int, guidance: tuple[float, ...]) -> dict[str, dict[str, float]]:
    """Row name -> measures; `images` a letter."""
    model = letters.load_model(folder)
    of = letters.measures(letters.read_heads(Path(folder)), letters.Judge())

    def measures(images: Tensor, prompts: list[str]) -> dict[str, float]:
        return {name: f(images, prompts) for name, f in of.items()}

    prompts = [p for p in letters.PROMPTS for _ in range(images)]
    data = letters.renders(len(prompts), torch.Generator().manual_seed(1), letters.labels(prompts))[0]
    decoded = through_vae(model, data)
    rows = {"renders": measures(data, prompts), "through the VAE": measures(decoded, prompts)}
    rows["through the VAE"]["mse"] = (decoded - data).square().mean().item()
    for scale in guidance:
        model.guidance_scale = scale
        drawn = sample(model, letters.PROMPTS, images, model.schedule(steps).ode(), ("quality",))
        rows[f"samples, guidance {scale:g}"] = measures(drawn.images, drawn.prompts)
    return rows


@in_one_line
class Quality(Options):
    """Measure the letters' base model beside its data."""

    folder: Positional[Path] = letters.WEIGHTS  # where letters_base wrote its weights
    images: Annotated[int, Ge(2), Le(10**4)] = 40  # a letter
    steps: Annotated[int, Ge(2), Le(1000)] = 10  # of the ODE sampler
    guidance: tuple[float, ...] = (1.0, 1.8)  # scales of classifier-free guidance; 1 is off


def measure_as_asked(arguments: list[str] | None) -> None:
    options = read(Quality, "ref.worlds.letters.quality", arguments)
    rows = table(options.folder, options.images, options.steps, options.guidance)
    names = list(next(iter(rows.values())))
    print(f"{'':24}" + "".join(f"{name:>17}" for name in names))
    for name, row in rows.items():
        print(
            f"{name:24}"
            + "".join(f"{row[n]:17.3f}" for n in names)
            + (f"   mse {row['mse']:.5f}" if "mse" in row else "")
        )


def main(arguments: list[str] | None = None) -> int:
    return command(measure_as_asked, arguments)


if __name__ == "__main__":
    sys.exit(main())
