"""Makes the base weights of `digits.py` from nothing: two readers, phi, the VAE, the flow transformer.

    python -m ref.worlds.digits_base                 # into outputs/digits_base
   python -m ref.worlds.digits_base --output-dir ref/worlds/weights/digits --overwrite    # those that `ref` uses

Each part has its own seed, so changing one leaves the others as they are. The readers and the judge see
digits under shear, so that they read every slant and the reward's two factors stay apart.
"""

import os
import sys
import tempfile
from pathlib import Path
from typing import Annotated

import torch
import torch.nn.functional as F
from annotated_types import Gt, Le
from torch import Tensor, nn

from ref.options import Options, command, read
from ref.scale.paths import refuse_unwritable
from ref.scale.signals import interruptible
from ref.settings import in_one_line
from ref.worlds.captions import CaptionEncoder
from ref.worlds.digits import PROMPTS, VOCABULARY, Phi, convolutional, data, dense, legibility

PARTS = ("transformer", "vae", "scheduler", "heads.safetensors")


def views(images: Tensor, generator: torch.Generator, shear: float = 0.0) -> Tensor:
    """Small shifts, ink strength and noise, and a shear up to `shear` pixels per pixel either way."""
    B = len(images)
    theta = torch.eye(2, 3).repeat(B, 1, 1)
    theta[:, :, 2] = 0.3 * torch.rand(B, 2, generator=generator) - 0.15
    theta[:, 0, 1] = shear * (2 * torch.rand(B, generator=generator) - 1)
    moved = F.grid_sample(images, F.affine_grid(theta, list(images.shape), align_corners=False), align_corners=False)
    strength = 0.8 + 0.4 * torch.rand(B, 1, 1, 1, generator=generator)
    return (moved * strength + 0.05 * torch.randn(images.shape, generator=generator)).clamp(0, 1)


def fit(parameters, loss, steps: int, lr: float, what: str) -> None:
    """AdamW with a one-cycle learning rate on `loss()`; the one optimisation loop of this file."""
    from tqdm import tqdm

    optimizer = torch.optim.AdamW(parameters, lr=lr, weight_decay=1e-4)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, lr, total_steps=steps, pct_start=0.1)
    for _ in (bar := tqdm(range(steps), desc=what)):
        optimizer.zero_grad(set_to_none=True)
        value = loss()
        value.backward()
        optimizer.step()
        schedule.step()
        bar.set_postfix(loss=f"{value.item():.4f}", refresh=False)


def make_reader(net_of, rows: Tensor, steps: int, seed: int) -> nn.Module:
    """A classifier trained on the digits listed in `rows`, on mixtures of two of them, and on empty pages.

    A mixture's label is mixed alike (mixup, arXiv 1710.09412), and that of an evenly grey page is uniform:
    where a policy could cheat, the reader is unsure instead of sure.
    """
    images, labels = data()
    torch.manual_seed(seed)
    net, g = net_of(10), torch.Generator().manual_seed(seed)

    def loss():
        picked = rows[torch.randint(len(rows), (256,), generator=g)]
        share = torch.rand(256, 1, generator=g)
        share[:128] = 1
        x, y = views(images[picked], g, shear=0.4), F.one_hot(labels[picked], 10).float()
        x = x * share[..., None, None] + x.flip(0) * (1 - share[..., None, None])
        y = y * share + y.flip(0) * (1 - share)
        page = torch.rand(32, 1, 1, 1, generator=g) + 0.05 * torch.randn(32, 1, 8, 8, generator=g)
        x[:32], y[:32] = page.clamp(0, 1), 0.1
        return F.cross_entropy(net(x * 2 - 1), y)

    fit(net.parameters(), loss, steps, 2e-3, "reader")
    return net


def make_phi(steps: int, seed: int) -> Phi:
    """The perceptual encoder: two views of one image attract, all other images repel (SimCLR). No shear: style stays."""
    images, _ = data()
    torch.manual_seed(seed)
    phi, g = Phi(), torch.Generator().manual_seed(seed)

    def loss():
        picked = torch.randint(len(images), (256,), generator=g)
        features = torch.cat([phi(views(images[picked], g)) for _ in range(2)])
        logits = (features @ features.T / 0.2).fill_diagonal_(-torch.inf)
        return F.cross_entropy(logits, torch.arange(512).roll(256))

    fit(phi.parameters(), loss, steps, 2e-3, "perceptual encoder")
    return phi


def make_vae(steps: int, seed: int):
    """8 x 8 pixels to 4 x 4 x 4 latents of mean 0 and variance 1."""
    from diffusers import AutoencoderKL

    images, _ = data()
    torch.manual_seed(seed)
    g = torch.Generator().manual_seed(seed)
    vae = AutoencoderKL(
        in_channels=1, out_channels=1, latent_channels=4, sample_size=8, block_out_channels=(16, 32), layers_per_block=1,
        down_block_types=("DownEncoderBlock2D",) * 2, up_block_types=("UpDecoderBlock2D",) * 2, norm_num_groups=8,
        mid_block_add_attention=False,
    )  # fmt: skip

    def loss():
        x = images[torch.randint(len(images), (128,), generator=g)] * 2 - 1
        posterior = vae.encode(x).latent_dist
        return F.mse_loss(vae.decode(posterior.sample(g)).sample, x) + 1e-4 * posterior.kl().mean()

    fit(vae.parameters(), loss, steps, 3e-3, "VAE")
    vae.eval().requires_grad_(False)
    latents = vae.encode(images * 2 - 1).latent_dist.mean
    vae.register_to_config(scaling_factor=1 / latents.std().item(), shift_factor=latents.mean().item())
    return vae


def make_flow(vae, steps: int, seed: int):
    """The transformer and its captions, by flow matching with logit-normal times and averaged weights."""
    from diffusers import SD3Transformer2DModel

    images, labels = data()
    torch.manual_seed(seed)
    g = torch.Generator().manual_seed(seed)
    latents = (vae.encode(images * 2 - 1).latent_dist.mean - vae.config.shift_factor) * vae.config.scaling_factor
    captions = CaptionEncoder(VOCABULARY)
    tokens = captions.tokens([PROMPTS[c] for c in labels])
    transformer = SD3Transformer2DModel(
        sample_size=4, patch_size=2, in_channels=4, out_channels=4, num_layers=4, attention_head_dim=16,
        num_attention_heads=6, joint_attention_dim=64, caption_projection_dim=96, pooled_projection_dim=64,
        pos_embed_max_size=2,
    )  # fmt: skip
    trained = nn.ModuleList([transformer, captions])
    decay = torch.optim.swa_utils.get_ema_multi_avg_fn(0.999)
    average = torch.optim.swa_utils.AveragedModel(trained, multi_avg_fn=decay)

    def loss():
        picked = torch.randint(len(images), (128,), generator=g)
        x_data, words = latents[picked], tokens[picked].clone()
        words[torch.rand(len(words), generator=g) < 0.1] = 0  # the empty caption
        sigma = torch.randn(len(picked), generator=g).sigmoid()
        eps, s = torch.randn(x_data.shape, generator=g), sigma.view(-1, 1, 1, 1)
        cond = captions.embed(words)
        x = (1 - s) * x_data + s * eps
        v = transformer(x, cond["prompt_embeds"], cond["pooled_prompt_embeds"], 1000 * sigma).sample
        average.update_parameters(trained)
        return F.mse_loss(v, eps - x_data)

    fit(trained.parameters(), loss, steps, 2e-3, "flow transformer")
    return tuple(average.module)


def make(folder: Path | str, scale: float = 1.0, seed: int = 0) -> dict[str, float]:
    """Train every part, then save all; `scale` shortens all trainings alike.

    Returns the share of unseen digits that the reward's reader and the judge read; each is tested on
    the half of the data that the other one learnt from.
    """
    from diffusers import FlowMatchEulerDiscreteScheduler
    from safetensors.torch import save_file

    def steps(full):
        return max(20, round(full * scale))  # the one-cycle schedule needs some steps to rise and fall

    folder = Path(folder)
    images, labels = data()
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(seed))
    halves = {"reader": order[::2], "judge": order[1::2]}
    readers = {
        "reader": make_reader(convolutional, halves["reader"], steps(1500), seed + 1),
        "judge": make_reader(dense, halves["judge"], steps(2000), seed + 2),
    }
    phi = make_phi(steps(3000), seed + 3)
    vae = make_vae(steps(3000), seed + 4)
    transformer, captions = make_flow(vae, steps(8000), seed + 5)

    heads = {"captions": captions, "phi": phi, **readers}
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder, prefix=".new-") as new:  # no mixture of old and new when interrupted
        transformer.save_pretrained(Path(new, "transformer"))
        vae.save_pretrained(Path(new, "vae"))
        FlowMatchEulerDiscreteScheduler(shift=1.0).save_pretrained(Path(new, "scheduler"))
        save_file(
            {f"{k}.{n}": p for k, m in heads.items() for n, p in m.state_dict().items()},
            Path(new, "heads.safetensors"),
        )
        for file in [path for path in Path(new).rglob("*") if path.is_file()]:
            place = folder / file.relative_to(new)
            place.parent.mkdir(exist_ok=True)
            os.replace(file, place)
    unseen = {"reader": halves["judge"], "judge": halves["reader"]}
    return {
        name: legibility(net, images[unseen[name]], [PROMPTS[c] for c in labels[unseen[name]]])
        for name, net in readers.items()
    }


@in_one_line
class Base(Options):
    """Train the digits base model."""

    output_dir: Path = Path("outputs/digits_base")  # where the weights go
    overwrite: bool = False  # replace weights that are there already
    scale: Annotated[float, Gt(0), Le(100)] = 1.0  # share of the full training length
    seed: int = 0  # of all parts


def make_as_asked(arguments: list[str] | None) -> None:
    options = read(Base, "ref.worlds.digits_base", arguments)
    refuse_unwritable(options.output_dir / "config", "--output-dir")
    there = [options.output_dir / name for name in PARTS if (options.output_dir / name).exists()]
    if there and not options.overwrite:
        raise ValueError(f"{there[0]} is there already; choose another --output-dir, or replace it with --overwrite")
    accuracy = make(options.output_dir, options.scale, options.seed)
    print(", ".join(f"{name}: {value:.1%} of unseen digits read" for name, value in accuracy.items()))


def main(arguments: list[str] | None = None) -> int:
    return interruptible(command, make_as_asked, arguments)


if __name__ == "__main__":
    sys.exit(main())
