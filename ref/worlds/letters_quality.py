"""How good the letters' base model is, beside the data it learnt from.

    python -m ref.worlds.letters_quality                     # the shipped weights, without guidance and with 1.8
    python -m ref.worlds.letters_quality DIR --images 100    # those that letters_base wrote to DIR

One row for renders, one for renders through the autoencoder, one for each guidance scale. All numbers of
diversity are those within a prompt; colour is the variance of the mean hue of a picture, summed over its channels.
"""

import sys
from pathlib import Path
from typing import Annotated

import torch
from annotated_types import Ge, Le
from torch import Tensor
from tyro.conf import Positional

from ref.metrics import feature_variance
from ref.options import Options, command, read
from ref.sampling import sample
from ref.settings import in_one_line
from ref.worlds import letters


class Measures:
    """What is measured of images [G K, 3, 32, 32], group-major, and their prompts."""

    def __init__(self, folder: Path | str = letters.WEIGHTS):
        self.heads, self.judge = letters.read_heads(Path(folder)), letters.Judge()

    def __call__(self, images: Tensor, prompts: list[str]) -> dict[str, float]:
        groups = len(set(prompts))
        phi, colour = self.heads["phi"](images), images.mean((2, 3))
        return {
            "read": self.judge(images, prompts),
            "variance": feature_variance(phi.unflatten(0, (groups, -1))).mean().item(),
            "faces": self.heads["faces"].effective_number(images, prompts),
            "colour": feature_variance(colour.unflatten(0, (groups, -1))).mean().item(),
            "reward": self.heads["preference"](images, prompts).mean().item(),
            "held_out": self.heads["held_out"](images, prompts).mean().item(),
            "utility": self.heads["rater"](images, prompts).mean().item(),
            "right": letters.right(images).mean().item(),
        }


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
    measures, model = Measures(folder), letters.load_model(folder)
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
    options = read(Quality, "ref.worlds.letters_quality", arguments)
    rows = table(options.folder, options.images, options.steps, options.guidance)
    names = list(next(iter(rows.values())))
    print(f"{'':24}" + "".join(f"{name:>10}" for name in names))
    for name, row in rows.items():
        print(
            f"{name:24}"
            + "".join(f"{row[n]:10.3f}" for n in names)
            + (f"   mse {row['mse']:.5f}" if "mse" in row else "")
        )


def main(arguments: list[str] | None = None) -> int:
    return command(measure_as_asked, arguments)


if __name__ == "__main__":
    sys.exit(main())
