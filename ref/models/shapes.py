"""The large architectures without weights: what can be counted from shapes needs no download and no GPU."""

import torch

from ref.models.adapter import TextToImage
from ref.models.flux import Flux
from ref.models.sd3 import SD3


def sd35_medium():
    """The architecture of stabilityai/stable-diffusion-3.5-medium (2.24 billion weights), random."""
    from diffusers import SD3Transformer2DModel

    return SD3Transformer2DModel(
        sample_size=128, patch_size=2, in_channels=16, out_channels=16, num_layers=24, attention_head_dim=64,
        num_attention_heads=24, joint_attention_dim=4096, caption_projection_dim=1536, pooled_projection_dim=2048,
        pos_embed_max_size=384, dual_attention_layers=tuple(range(13)), qk_norm="rms_norm",
    )  # fmt: skip


def flux_dev():
    """The architecture of black-forest-labs/FLUX.1-dev (11.9 billion weights), random."""
    from diffusers import FluxTransformer2DModel

    return FluxTransformer2DModel(guidance_embeds=True)


def vae():
    """The VAE architecture that both share, random."""
    from diffusers import AutoencoderKL

    return AutoencoderKL(
        down_block_types=["DownEncoderBlock2D"] * 4, up_block_types=["UpDecoderBlock2D"] * 4,
        block_out_channels=[128, 256, 512, 512], layers_per_block=2, latent_channels=16,
        use_quant_conv=False, use_post_quant_conv=False, scaling_factor=1.5305, shift_factor=0.0609,
    )  # fmt: skip


def no_text(prompts: list[str]):
    raise ValueError("shapes alone know no prompts")


def shaped(name: str, size: int, rank: int, dtype: torch.dtype = torch.bfloat16, targets: str = "all") -> TextToImage:
    """`sd35_medium` or `flux_dev` for size x size images with its LoRA, on the meta device: shapes alone.

    With rank 0 all weights are trained.
    """
    adapter, network = {"sd35_medium": (SD3, sd35_medium), "flux_dev": (Flux, flux_dev)}[name]
    before = torch.get_default_dtype()
    with torch.device("meta"):
        torch.set_default_dtype(dtype)
        transformer = network()
        torch.set_default_dtype(before)
        parts = transformer, vae()
    model = adapter(*parts, None, encode=no_text, size=(size, size), guidance_scale=adapter.default_guidance)
    if rank:
        model.add_lora(rank, 2 * rank, targets=targets)
    else:
        model.transformer.requires_grad_(True)
    return model
