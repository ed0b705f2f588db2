"""Text-to-image in miniature: SD3's own classes, trained from scratch on scanned handwritten digits.

Data are the 1,797 digits of scikit-learn (8 x 8 pixels, 17 grey levels; E. Alpaydin and C. Kaynak,
UCI repository, 1998), written by many hands, captioned "a handwritten seven". The model is a real
`SD3Transformer2DModel` on the latents of a real `AutoencoderKL`, only small: 4 x 4 x 4 latents.

    python -m ref.digits            # trains everything again into ref/weights/digits (minutes)

**Reward.** One writing style among the many in the data, legibly written, in [0, 1]:

    R(x, c) = p_reader(c | x) * sigmoid((slant(x) - q_c) / tau_c)

slant is the shear that would set the digit upright, mu_xy / mu_yy of the ink; q_c is the 80th
percentile and tau_c half the standard deviation of the slants of real digits of class c. A white page
has no digit to read, so it wins nothing; beyond q_c the sigmoid saturates, so many images share the
top of the reward and a loss of diversity is not something that the reward asks for.

**Perceptual space.** phi is a small convolutional network trained contrastively (SimCLR, arXiv
2002.05709) to tell each single digit image from every other one under small shifts and noise, so it
keeps what makes one "seven" different from the next. Features have unit norm.

**Judge.** A second reader, of another architecture, trained on the half of the data that the
reward's reader has not seen, and used by nothing but the evaluation, measures legibility.
"""

import argparse
import sys
from functools import cache
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ref.text2image import SD3

WEIGHTS = Path(__file__).parent / "weights" / "digits"
NAMES = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
VOCABULARY = ("", "a", "handwritten", *NAMES)
PROMPTS = [f"a handwritten {name}" for name in NAMES]


@cache
def data() -> tuple[Tensor, Tensor]:
    """Images [1797, 1, 8, 8] in [0, 1] (ink is 1) and labels [1797]."""
    from sklearn.datasets import load_digits

    digits = load_digits()
    images = torch.tensor(digits.images, dtype=torch.float32)[:, None] / 16
    return images, torch.tensor(digits.target)


def label(prompt: str) -> int:
    """The digit that a caption names. Raises ValueError when it names none or two."""
    found = [i for i, name in enumerate(NAMES) if name in prompt.split()]
    if len(found) != 1:
        raise ValueError(f"the caption {prompt!r} must name exactly one digit, as in {PROMPTS[7]!r}")
    return found[0]


class CaptionEncoder(nn.Module):
    """Word embeddings in place of SD3's CLIP and T5. The empty caption serves guidance."""

    def __init__(self, dim: int = 64, length: int = 3):
        super().__init__()
        self.length = length
        self.words = nn.Embedding(len(VOCABULARY), dim)
        self.position = nn.Parameter(torch.zeros(length, dim))
        self.pool = nn.Linear(dim, dim)

    def tokens(self, prompts: list[str]) -> Tensor:
        unknown = {w for p in prompts for w in p.split()} - set(VOCABULARY)
        if unknown:
            raise ValueError(f"unknown word {min(unknown)!r}; this model knows {', '.join(VOCABULARY[1:])}")
        rows = [[VOCABULARY.index(w) for w in p.split()][: self.length] for p in prompts]
        return torch.tensor([row + [0] * (self.length - len(row)) for row in rows])

    def embed(self, tokens: Tensor) -> dict[str, Tensor]:
        embeds = self.words(tokens) + self.position
        return {"prompt_embeds": embeds, "pooled_prompt_embeds": self.pool(embeds.mean(1))}

    @torch.no_grad()
    def forward(self, prompts: list[str]) -> dict[str, Tensor]:
        """Captions -> prompt_embeds [B, L, E] and pooled_prompt_embeds [B, E], and the negative pair."""
        negative = self.embed(self.tokens([""] * len(prompts)))
        return self.embed(self.tokens(prompts)) | {f"negative_{k}": v for k, v in negative.items()}


def convolutional(out: int, width: int = 32) -> nn.Sequential:
    """The network of phi and of the reward's reader: [B, 1, 8, 8] -> [B, out]."""
    return nn.Sequential(
        nn.Conv2d(1, width, 3, padding=1), nn.GELU(),
        nn.Conv2d(width, 2 * width, 3, stride=2, padding=1), nn.GELU(),
        nn.Conv2d(2 * width, 2 * width, 3, padding=1), nn.GELU(),
        nn.Flatten(), nn.Linear(2 * width * 16, 128), nn.GELU(), nn.Linear(128, out),
    )  # fmt: skip


def dense(out: int) -> nn.Sequential:
    """The judge's network, deliberately another one."""
    return nn.Sequential(nn.Flatten(), nn.Linear(64, 256), nn.ReLU(), nn.Linear(256, 128), nn.ReLU(), nn.Linear(128, out))


class Phi(nn.Module):
    """The perceptual encoder: images [B, 1, 8, 8] -> unit-norm features [B, 32]."""

    name = "digits contrastive"

    def __init__(self, dim: int = 32):
        super().__init__()
        self.net = convolutional(dim)

    def forward(self, images: Tensor) -> Tensor:
        return F.normalize(self.net(images * 2 - 1), dim=1)


def slant(images: Tensor) -> Tensor:
    """Shear [B] of the ink in pixels per pixel: positive leans right, 0 is upright."""
    w = images[:, 0]
    w = w / w.sum((1, 2), keepdim=True).clamp_min(1e-6)
    y = torch.arange(w.shape[1], 0, -1, dtype=w.dtype).view(1, -1, 1)  # upwards
    x = torch.arange(w.shape[2], dtype=w.dtype).view(1, 1, -1)
    x = x - (w * x).sum((1, 2), keepdim=True)
    y = y - (w * y).sum((1, 2), keepdim=True)
    return (w * x * y).sum((1, 2)) / (w * y * y).sum((1, 2)).clamp_min(1e-6)


@cache
def slant_scale() -> tuple[Tensor, Tensor]:
    """(q_c, tau_c), both [10]: the reward's threshold and softness for each digit, from the data."""
    images, labels = data()
    per_class = [slant(images[labels == c]) for c in range(10)]
    return torch.stack([s.quantile(0.8) for s in per_class]), torch.stack([s.std() / 2 for s in per_class])


class SlantReward(nn.Module):
    """R = p_reader(c | x) sigmoid((slant - q_c) / tau_c), [B] in [0, 1]."""

    name = "legible slant"

    def __init__(self, reader: nn.Module):
        super().__init__()
        self.reader = reader

    @torch.no_grad()
    def forward(self, images: Tensor, prompts: list[str]) -> Tensor:
        c = torch.tensor([label(p) for p in prompts])
        q, tau = (scale[c] for scale in slant_scale())
        legible = self.reader(images * 2 - 1).softmax(1)[torch.arange(len(c)), c]
        return legible * torch.sigmoid((slant(images) - q) / tau)


@torch.no_grad()
def legibility(judge: nn.Module, images: Tensor, prompts: list[str]) -> float:
    """Share of images in which the judge reads the digit that the caption asked for."""
    c = torch.tensor([label(p) for p in prompts])
    return (judge(images * 2 - 1).argmax(1) == c).float().mean().item()


def load(folder: Path | str = WEIGHTS) -> tuple[SD3, SlantReward, Phi, nn.Module]:
    """(model, reward, encoder, judge), frozen and in eval mode. Raises FileNotFoundError with the remedy."""
    from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, SD3Transformer2DModel
    from safetensors.torch import load_file

    folder = Path(folder)
    if not (folder / "heads.safetensors").exists():
        raise FileNotFoundError(f"no digits weights in {folder}; make them with: python -m ref.digits --output-dir {folder}")
    heads = {"captions": CaptionEncoder(), "phi": Phi(), "reader": convolutional(10), "judge": dense(10)}
    weights = load_file(folder / "heads.safetensors")
    for key, module in heads.items():
        module.load_state_dict({k.removeprefix(key + "."): v for k, v in weights.items() if k.startswith(key + ".")})
        module.eval().requires_grad_(False)
    transformer = SD3Transformer2DModel.from_pretrained(folder / "transformer")
    vae = AutoencoderKL.from_pretrained(folder / "vae")
    scheduler = FlowMatchEulerDiscreteScheduler.from_pretrained(folder / "scheduler")
    return SD3(transformer, vae, scheduler, heads["captions"]), SlantReward(heads["reader"]), heads["phi"], heads["judge"]


# ---------------------------------------------------------------- making the base weights


def shifted(images: Tensor, generator: torch.Generator) -> Tensor:
    """SimCLR's two views: shifts up to one pixel, ink strength, noise. No shear, no rotation: style stays."""
    B = len(images)
    theta = torch.eye(2, 3).repeat(B, 1, 1)
    theta[:, :, 2] = torch.rand(B, 2, generator=generator) * 0.3 - 0.15
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


def make(folder: Path | str = WEIGHTS, scale: float = 1.0, seed: int = 0) -> dict[str, float]:
    """Train every part and save it; `scale` shortens all trainings alike. Returns held-out accuracies."""
    from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, SD3Transformer2DModel
    from safetensors.torch import save_file

    folder = Path(folder)
    torch.manual_seed(seed)
    g = torch.Generator().manual_seed(seed)
    images, labels = data()

    def steps(n):
        return max(10, round(n * scale))

    def batch(rows, size=256):
        return rows[torch.randint(len(rows), (size,), generator=g)]

    order = torch.randperm(len(images), generator=g)
    halves = {"reader": order[::2], "judge": order[1::2]}
    readers = {"reader": convolutional(10), "judge": dense(10)}
    for name, net in readers.items():

        def loss(net=net, rows=halves[name]):
            picked = batch(rows)
            return F.cross_entropy(net(shifted(images[picked], g) * 2 - 1), labels[picked], label_smoothing=0.05)

        fit(net.parameters(), loss, steps(1500), 2e-3, f"classifier '{name}'")

    phi = Phi()

    def contrast():
        views = torch.cat([phi(shifted(images[picked], g)) for picked in [batch(order)] for _ in range(2)])
        logits = (views @ views.T / 0.2).fill_diagonal_(-torch.inf)
        half = len(views) // 2
        return F.cross_entropy(logits, torch.arange(len(views)).roll(half))

    fit(phi.parameters(), contrast, steps(3000), 2e-3, "perceptual encoder")

    vae = AutoencoderKL(
        in_channels=1, out_channels=1, latent_channels=4, sample_size=8, block_out_channels=(16, 32), layers_per_block=1,
        down_block_types=("DownEncoderBlock2D",) * 2, up_block_types=("UpDecoderBlock2D",) * 2, norm_num_groups=8,
        mid_block_add_attention=False,
    )  # fmt: skip

    def autoencode():
        x = images[batch(order, 128)] * 2 - 1
        posterior = vae.encode(x).latent_dist
        return F.mse_loss(vae.decode(posterior.sample(g)).sample, x) + 1e-4 * posterior.kl().mean()

    fit(vae.parameters(), autoencode, steps(3000), 3e-3, "VAE")
    vae.eval().requires_grad_(False)
    latents = vae.encode(images * 2 - 1).latent_dist.mean
    vae.register_to_config(scaling_factor=1 / latents.std().item(), shift_factor=latents.mean().item())
    latents = (latents - vae.config.shift_factor) * vae.config.scaling_factor

    captions = CaptionEncoder()
    transformer = SD3Transformer2DModel(
        sample_size=4, patch_size=2, in_channels=4, out_channels=4, num_layers=4, attention_head_dim=16,
        num_attention_heads=6, joint_attention_dim=64, caption_projection_dim=96, pooled_projection_dim=64,
        pos_embed_max_size=2,
    )  # fmt: skip
    tokens = captions.tokens([PROMPTS[c] for c in labels])
    trained = [*transformer.parameters(), *captions.parameters()]
    average = torch.optim.swa_utils.AveragedModel(
        nn.ModuleList([transformer, captions]), multi_avg_fn=torch.optim.swa_utils.get_ema_multi_avg_fn(0.999)
    )

    def flow_matching():
        picked = batch(order, 128)
        x_data, words = latents[picked], tokens[picked].clone()
        words[torch.rand(len(words), generator=g) < 0.1] = 0  # the empty caption
        sigma = torch.randn(len(picked), generator=g).sigmoid().view(-1, 1, 1, 1)
        eps = torch.randn(x_data.shape, generator=g)
        cond = captions.embed(words)
        v = transformer(
            (1 - sigma) * x_data + sigma * eps, cond["prompt_embeds"], cond["pooled_prompt_embeds"], 1000 * sigma.flatten()
        ).sample
        average.update_parameters(nn.ModuleList([transformer, captions]))
        return F.mse_loss(v, eps - x_data)

    fit(trained, flow_matching, steps(8000), 2e-3, "flow transformer")
    transformer, captions = average.module

    transformer.save_pretrained(folder / "transformer")
    vae.save_pretrained(folder / "vae")
    FlowMatchEulerDiscreteScheduler(shift=1.0).save_pretrained(folder / "scheduler")
    heads = {"captions": captions, "phi": phi, **readers}
    save_file({f"{k}.{n}": p.detach() for k, m in heads.items() for n, p in m.state_dict().items()}, folder / "heads.safetensors")
    unseen = {"reader": halves["judge"], "judge": halves["reader"]}
    return {
        name: legibility(net, images[unseen[name]], [PROMPTS[c] for c in labels[unseen[name]]])
        for name, net in readers.items()
    }


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m ref.digits", description="Train the digits base model.")
    parser.add_argument("--output-dir", default=WEIGHTS, help="where the weights go (default: %(default)s)")
    parser.add_argument("--scale", type=float, default=1.0, help="share of the full training length (default: 1)")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args(arguments)
    accuracy = make(options.output_dir, options.scale, options.seed)
    print(", ".join(f"{name}: {value:.1%} of unseen digits read" for name, value in accuracy.items()))
    return 0


if __name__ == "__main__":
    sys.exit(main())
