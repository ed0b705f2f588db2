"""What the tests of the adapters share: small pipelines, the stock pipeline, latents."""

import torch
from diffusers import DiffusionPipeline

from ref.models.load import load
from ref.scale.weights import trainable

PROMPTS = ["a red cat", "two blue dogs on a boat"]
KINDS = ["sd3", "flux"]
TOKENS = 32  # of T5; enough for these prompts
STEPS = 4
EQUAL = 4e-5  # of images in [0, 1]: float32's rounding after four steps and a VAE is 6e-6 here; a wrong grid moves 1e-3


def fresh(folders, kind, **options):
    options = dict(height=48, width=64, max_sequence_length=TOKENS, lora_rank=4, device="cpu") | options
    options = dict(cache_dir=folders["cache"]) | options
    return load(folders[kind], options.pop("prompts", PROMPTS), **options)


def stock(folders, kind):
    pipe = DiffusionPipeline.from_pretrained(folders[kind])
    pipe.set_progress_bar_config(disable=True)
    return pipe


def stock_images(pipe, latents, guidance_scale):
    return pipe(
        PROMPTS, height=48, width=64, latents=latents, num_inference_steps=STEPS, guidance_scale=guidance_scale,
        max_sequence_length=TOKENS, output_type="pt",
    ).images  # fmt: skip


def perturb(model, scale=0.05):
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for weight in trainable(model).values():
            weight.add_(scale * torch.randn(weight.shape, generator=generator))


def some_latents(model, seed=0):
    return torch.randn(len(PROMPTS), *model.latent_shape, generator=torch.Generator().manual_seed(seed))
