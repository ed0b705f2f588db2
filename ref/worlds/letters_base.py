"""Makes the base weights of `letters.py` from nothing: the VAE, the flow transformer, raters, phi, classifiers.

    python -m ref.worlds.letters_base                                  # into ref/worlds/weights/letters (hours)
    python -m ref.worlds.letters_base --output-dir DIR --resume        # goes on where DIR's checkpoints stand

Each part has its own seed, its own checkpoint (DIR/training/PART.pt, written every two minutes) and is exported
with it, averaged weights and all: what DIR holds can be loaded at any time, and a part whose steps are done is
skipped. `--parts flow --steps 40000` trains one part, longer.
"""

import math
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Literal

import torch
import torch.nn.functional as F
from annotated_types import Ge, Gt, Le
from torch import Tensor, nn

from ref.options import Options, command, read
from ref.scale.allocator import keep_freed_memory
from ref.scale.checkpoint import atomic_write
from ref.settings import in_one_line
from ref.worlds.letters import LETTERS, PROMPTS, WEIGHTS, CaptionEncoder, renders

Part = Literal["vae", "flow"]


class Training:
    """One part's optimisation: AdamW, warm-up, a constant rate, and a cosine from half of the steps on; resumable."""

    def __init__(self, part: str, folder: Path, steps: int, lr: float, seed: int, resume: bool, minutes: float = 2):
        self.part, self.steps, self.lr, self.minutes = part, steps, lr, minutes
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
            self.file.parent.mkdir(parents=True, exist_ok=True)
            atomic_write(self.file, lambda temporary: torch.save(state, temporary))
            export()

        saved, recent = time.monotonic(), None
        for step in (bar := tqdm(range(done, self.steps), desc=self.part, initial=done, total=self.steps, mininterval=10)):
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
        vae.save_pretrained(folder / "vae")

    training.fit(vae, loss, export)

def make(folder, parts, scale, resume):
    full = {"vae": (make_vae, 8000, 5e-3, 4)}
    keep_freed_memory()
    for part in parts:
        build, steps, lr, seed = full[part]
        build(Training(part, folder, max(20, round(steps * scale)), lr, seed, resume), folder)

if __name__ == "__main__":
    make(Path("/work/letters/run"), ["vae"], 1.0, True)
