"""Makes the base weights of `letters.py` from nothing: the VAE, the flow transformer, raters, phi, classifiers.

    python -m ref.worlds.letters.base                               # into outputs/letters_base (hours)
    python -m ref.worlds.letters.base --output-dir DIR --resume     # goes on where DIR's checkpoints stand

Each part has its own seed, its own checkpoint (DIR/training/PART.pt, written every two minutes) and is exported
with it, averaged weights and all: what DIR holds can be loaded at any time, and a part whose steps are done is
skipped. `--parts flow` trains one part alone.
"""

import copy
import math
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Annotated, Literal

import torch
import torch.nn.functional as F
from annotated_types import Ge, Gt, Le
from torch import Tensor, nn

from ref.options import Options, command, read
from ref.sampling import sample
from ref.scale.allocator import keep_freed_memory
from ref.scale.checkpoint import atomic_write
from ref.scale.paths import refuse_unwritable
from ref.scale.signals import interruptible
from ref.settings import in_one_line
from ref.worlds.letters import load_model
from ref.worlds.letters.captions import CaptionEncoder
from ref.worlds.letters.data import LETTERS, PROMPTS, SIDE, labels, masks, paint, palettes, renders
from ref.worlds.letters.judges import Faces, Phi, Preference, Rater, read_head
from ref.worlds.letters.spoil import spoil


class Training:
    """One part's optimisation: AdamW, warm-up, a constant rate, and a cosine from half of the steps on; resumable."""

    def __init__(self, part: str, folder: Path, steps: int, lr: float, seed: int, resume: bool, minutes: float = 2):
        self.part, self.steps, self.lr, self.seed, self.minutes = part, steps, lr, seed, minutes
        self.file, self.resume = folder / "training" / f"{part}.pt", resume
        self.generator = torch.Generator().manual_seed(seed)
        torch.manual_seed(seed)

    def rate(self, step: int) -> float:
        late = max(0.0, 2 * step / self.steps - 1)
        return min(1.0, (step + 1) / 100) * (1 + math.cos(math.pi * min(1.0, late))) / 2

    def fit(self, net: nn.Module, loss: Callable[[], Tensor], export: Callable[[], None], average=None) -> None:
        """Minimise loss() over net's weights. `average` follows them; `export` writes what can be used."""
        from tqdm import tqdm

        optimizer = torch.optim.AdamW(net.parameters(), lr=self.lr, weight_decay=1e-4)
        parts = {"net": net, "optimizer": optimizer} | ({"average": average} if average is not None else {})
        done = 0
        if self.resume and self.file.exists():
            state = torch.load(self.file, weights_only=True)
            done = state["step"]
            for name, part in parts.items():
                part.load_state_dict(state[name])
            self.generator.manual_seed(state["step"])

        def save(step: int) -> None:
            state = {"step": step} | {name: part.state_dict() for name, part in parts.items()}
            atomic_write(self.file, lambda temporary: torch.save(state, temporary))
            export()

        saved, recent = time.monotonic(), None
        for step in (
            bar := tqdm(range(done, self.steps), desc=self.part, initial=done, total=self.steps, mininterval=10)
        ):
            for group in optimizer.param_groups:
                group["lr"] = self.lr * self.rate(step)
            optimizer.zero_grad(set_to_none=True)
            value = loss()
            value.backward()
            optimizer.step()
            if average is not None:
                average.update_parameters(net)
            recent = value.item() if recent is None else recent + 0.01 * (value.item() - recent)
            bar.set_postfix(loss=f"{recent:.4f}", refresh=False)
            if time.monotonic() > saved + 60 * self.minutes and step + 1 < self.steps:
                save(step + 1)
                saved = time.monotonic()
        if done < self.steps or not self.file.exists():
            save(self.steps)


def make_vae(training: Training, folder: Path) -> None:
    """3 x 32 x 32 pixels to 4 x 8 x 8 latents; the config's scale and shift give them mean 0 and variance 1."""
    from diffusers import AutoencoderKL

    vae = AutoencoderKL(
        in_channels=3, out_channels=3, latent_channels=4, sample_size=32, block_out_channels=(16, 24, 32),
        layers_per_block=1, down_block_types=("DownEncoderBlock2D",) * 3, up_block_types=("UpDecoderBlock2D",) * 3,
        norm_num_groups=4, mid_block_add_attention=False,
    )  # fmt: skip

    def loss():
        x = renders(32, training.generator)[0] * 2 - 1
        with torch.autocast("cpu", torch.bfloat16):
            posterior = vae.encode(x).latent_dist
            y = vae.decode(posterior.sample(training.generator)).sample
        error = y.float() - x
        return error.square().mean() + 0.3 * error.abs().mean() + 2e-6 * posterior.kl().mean()

    @torch.no_grad()
    def export():
        x = renders(512, torch.Generator().manual_seed(0))[0] * 2 - 1
        latents = vae.encode(x).latent_dist.mean
        vae.register_to_config(scaling_factor=1 / latents.std().item(), shift_factor=latents.mean().item())
        ship(vae, folder / "vae")

    training.fit(vae, loss, export)


def ship(network, folder: Path) -> None:
    """Write a diffusers network in half precision."""
    copy.deepcopy(network).half().save_pretrained(folder)


def ship_head(network: nn.Module, file: Path) -> None:
    """Write a small network in half precision."""
    from safetensors.torch import save_file

    weights = {name: weight.half().contiguous() for name, weight in network.state_dict().items()}
    atomic_write(file, lambda temporary: save_file(weights, temporary))


def follow(average: list[Tensor], current: list[Tensor], steps: Tensor) -> None:
    """Averaged weights that remember the last 2,000 steps, and early on the last tenth of them."""
    torch._foreach_lerp_(average, current, max(1 / 2000, 9 / (10 + steps.item())))


def make_flow(training: Training, folder: Path, batch: int = 160, pool: int = 16000) -> None:
    """The transformer and its captions, by flow matching with logit-normal times and averaged weights.

    Latents wait in a pool from which batches are drawn; a sixteenth of a batch is rendered and encoded anew at each step.
    """
    from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, SD3Transformer2DModel

    vae = AutoencoderKL.from_pretrained(folder / "vae").float().requires_grad_(False)
    captions = CaptionEncoder()
    transformer = SD3Transformer2DModel(
        sample_size=8, patch_size=2, in_channels=4, out_channels=4, num_layers=4, attention_head_dim=16,
        num_attention_heads=8, joint_attention_dim=64, caption_projection_dim=128, pooled_projection_dim=64,
        pos_embed_max_size=4,
    )  # fmt: skip
    trained = nn.ModuleDict({"transformer": transformer, "captions": captions})
    average = torch.optim.swa_utils.AveragedModel(trained, multi_avg_fn=follow)
    every, g, first = captions.tokens(PROMPTS), training.generator, 0

    @torch.no_grad()
    def encoded(count: int) -> tuple[Tensor, Tensor]:
        images, letters, _ = renders(count, g)
        latents = torch.cat([vae.encode(part * 2 - 1).latent_dist.mean for part in images.split(256)])
        return (latents - vae.config.shift_factor) * vae.config.scaling_factor, every[letters]

    latents, tokens = encoded(max(batch, pool if training.steps > 1000 else 0))

    def loss():
        nonlocal first
        fresh = slice(first, first + batch // 16)
        latents[fresh], tokens[fresh] = encoded(batch // 16)
        first = (first + batch // 16) % len(latents)
        picked = torch.randint(len(latents), (batch,), generator=g)
        x_data, words = latents[picked], tokens[picked].clone()
        words[torch.rand(batch, generator=g) < 0.1] = 0  # the empty caption
        sigma = torch.randn(batch, generator=g).sigmoid()
        eps, s = torch.randn(x_data.shape, generator=g), sigma.view(-1, 1, 1, 1)
        cond = captions.embed(words)
        x = (1 - s) * x_data + s * eps
        v = transformer(x, cond["prompt_embeds"], cond["pooled_prompt_embeds"], 1000 * sigma).sample
        return F.mse_loss(v, eps - x_data)

    def export():
        ship(average.module["transformer"], folder / "transformer")
        ship_head(average.module["captions"], folder / "captions.safetensors")
        FlowMatchEulerDiscreteScheduler(shift=1.0).save_pretrained(folder / "scheduler")

    training.fit(trained, loss, export, average)


def make_phi(training: Training, folder: Path, temperature: float = 1.0) -> None:
    """The perceptual encoder, by SimCLR: two spoilt views of a picture attract, all others repel.

    A batch is one letter in 32 faces, each in the same 8 palettes, so neither hue nor face nor letter alone
    tells its pictures apart. A low temperature drives all pictures equally far apart, however alike they are; at 1 what
    is alike stays near.
    """
    phi, g = Phi(), training.generator
    every = masks()

    def loss():
        letter = torch.randint(len(LETTERS), (1,), generator=g).item()
        faces = torch.randperm(len(every), generator=g)[:32].repeat_interleave(8)
        ink, paper = (colour.repeat(32, 1) for colour in palettes(8, g))
        images = paint(every[faces, letter], ink, paper)
        features = torch.cat([phi(spoil(images, g)) for _ in range(2)])
        logits = (features @ features.T / temperature).fill_diagonal_(-torch.inf)
        return F.cross_entropy(logits, torch.arange(512).roll(256))

    training.fit(phi, loss, lambda: ship_head(phi, folder / f"{training.part}.safetensors"))


def make_rater(training: Training, folder: Path) -> None:
    """The hidden rater's reader: a classifier of letters; a page of any one colour is no letter to it."""
    rater, g = Rater(), training.generator

    def loss():
        images, letters, _ = renders(256, g)
        images, target = spoil(images, g), F.one_hot(letters, len(LETTERS)).float()
        images[:32], target[:32] = spoil(palettes(32, g)[0][..., None, None].expand(32, 3, SIDE, SIDE), g), 1 / 26
        return F.cross_entropy(rater.reader(images * 2 - 1), target)

    training.fit(rater, loss, lambda: ship_head(rater, folder / "rater.safetensors"))


def make_preference(training: Training, folder: Path, drawn: int = 320) -> None:
    """A reward model from the rater's choices between pairs of the base model's samples (Bradley-Terry), `drawn` a letter.

    As in RLHF's own data, some are poor: half are spoilt, and one in eight shows another letter than was asked for.
    """
    rater, name = read_head(Rater(), folder / "rater.safetensors"), training.part
    model, g = Preference(), training.generator
    drawn = drawn if training.steps > 100 else 2
    base = load_model(folder)
    layout = list(torch.arange(len(PROMPTS) * drawn).split(256))
    own = sample(base, PROMPTS, drawn, base.schedule(10).ode(), (name, training.seed), layout)
    g.manual_seed(training.seed)
    spoilt = torch.rand(len(own.images), 1, 1, 1, generator=g) < 0.5
    images = torch.where(spoilt, spoil(own.images, g), own.images).unflatten(0, (len(LETTERS), -1))

    def side(asked: Tensor) -> Tensor:
        shown = torch.where(torch.rand(len(asked), generator=g) < 1 / 8, torch.randint(len(LETTERS), asked.shape, generator=g), asked)  # fmt: skip
        return images[shown, torch.randint(drawn, asked.shape, generator=g)]

    def loss():
        asked = torch.randint(len(LETTERS), (128,), generator=g)
        left, right = side(asked), side(asked)
        odds = 10 * (rater.utility(left, asked) - rater.utility(right, asked))
        chosen = torch.rand(128, generator=g) < odds.sigmoid()
        margin = model.score(left, asked) - model.score(right, asked)
        return F.binary_cross_entropy_with_logits(margin, chosen.float())

    @torch.no_grad()
    def export():
        plain = Preference()
        plain.load_state_dict(model.state_dict())
        scores = plain.score(own.images, labels(own.prompts))
        plain.scale.fill_(scores.std()), plain.shift.fill_(scores.mean())
        ship_head(plain, folder / f"{name}.safetensors")

    training.fit(model, loss, export)


def make_faces(training: Training, folder: Path) -> None:
    """The classifier of typefaces."""
    faces, g = Faces(len(masks())), training.generator

    def loss():
        images, letters, which = renders(256, g)
        return F.cross_entropy(faces.logits(spoil(images, g), letters), which)

    training.fit(faces, loss, lambda: ship_head(faces, folder / "faces.safetensors"))


MAKERS = {  # part: what makes it, steps, learning rate, seed
    "vae": (make_vae, 4500, 5e-3, 4),
    "flow": (make_flow, 10000, 2e-3, 5),
    "phi": (make_phi, 600, 2e-3, 1),
    "sharp": (partial(make_phi, temperature=0.2), 1000, 2e-3, 1),
    "rater": (make_rater, 1000, 2e-3, 2),
    "preference": (make_preference, 1200, 1e-3, 3),
    "held_out": (make_preference, 1200, 1e-3, 6),
    "faces": (make_faces, 2000, 2e-3, 7),
}
FOLDERS = {"vae": "vae", "flow": "transformer"}  # of the parts that are more than a file
Part = Literal[tuple(MAKERS)]


def make(
    folder: Path | str, parts: tuple[str, ...] = tuple(MAKERS), scale: float = 1.0, seed: int = 0,
    resume: bool = False,
) -> None:  # fmt: skip
    """Train the parts in this order and export each; `scale` shortens all trainings alike."""
    keep_freed_memory()
    for part in parts:
        build, steps, lr, its_seed = MAKERS[part]
        build(
            Training(part, Path(folder), max(2, round(steps * scale)), lr, 100 * seed + its_seed, resume), Path(folder)
        )


@in_one_line
class Base(Options):
    """Train the letters' base model and the networks beside it."""

    output_dir: Path = Path("outputs/letters_base")  # where the weights and checkpoints go
    parts: tuple[Part, ...] = tuple(MAKERS)  # which, in this order
    scale: Annotated[float, Gt(0), Le(100)] = 1.0  # share of the full training length
    seed: Annotated[int, Ge(0)] = 0  # of all parts
    resume: bool = False  # go on from the checkpoints in output_dir
    overwrite: bool = False  # replace what is there already


def make_as_asked(arguments: list[str] | None) -> None:
    options = read(Base, "ref.worlds.letters.base", arguments)
    refuse_unwritable(options.output_dir / "config", "--output-dir")
    names = [
        name for part in options.parts for name in (f"training/{part}.pt", FOLDERS.get(part, f"{part}.safetensors"))
    ]
    there = [file for name in names if (file := options.output_dir / name).exists()]
    if there and not (options.resume or options.overwrite):
        raise ValueError(f"{there[0]} is there already; go on with --resume, or replace it with --overwrite")
    make(options.output_dir, options.parts, options.scale, options.seed, options.resume)


def main(arguments: list[str] | None = None) -> int:
    return interruptible(command, make_as_asked, arguments)


if __name__ == "__main__":
    sys.exit(main())
