"""FLUX.1: packed latents, guidance as an input of the distilled network.

x is the packed latent [B, L, 4 C], L = H/16 W/16 tokens of 2 x 2 latent pixels: what the transformer itself
reads and writes. Entropies per dimension and ratios do not see the packing.
"""

import torch
from jaxtyping import Float
from torch import Tensor

from ref.models.adapter import TextToImage
from ref.models.sd3 import LORA_TARGETS as JOINT

# The projections of joint attention, and both feed-forward layers of either stream; Flow-GRPO's choice.
LORA_TARGETS = JOINT + [f"{stream}.net.{layer}" for stream in ("ff", "ff_context") for layer in ("0.proj", "2")]


def exact_time(module, arguments: tuple) -> tuple:
    """Hook of FLUX's time embedding: the float32 time, where the transformer hands down one cast to bfloat16."""
    return (module.exact_time, *arguments[1:])


class Flux(TextToImage):
    """FLUX.1. x is the packed latent [B, L, 4 C]; guidance is an input of the distilled network, one forward."""

    pipeline = "FluxPipeline"
    network = "FluxTransformer2DModel"
    default_guidance = 3.5
    default_tokens = 512
    lora_targets = LORA_TARGETS

    def __init__(self, transformer, vae, scheduler, encode, guidance_scale: float = 3.5, **options):
        super().__init__(transformer, vae, scheduler, encode, guidance_scale, **options)
        from diffusers import FluxPipeline

        rows, columns = (side // 2 for side in self.latent_size)
        ids = FluxPipeline._prepare_latent_image_ids(1, rows, columns, "cpu", torch.float32)
        self.register_buffer("image_ids", ids, persistent=False)
        transformer.time_text_embed.register_forward_pre_hook(exact_time)

    @staticmethod
    def patch(transformer: dict) -> int:
        return 2  # packing; the transformer's own patch_size counts packed pixels

    @property
    def latent_shape(self) -> tuple[int, int]:
        return (self.tokens, self.transformer.config.in_channels)

    @staticmethod
    def encode_text(text, prompt: str | list[str], max_sequence_length: int) -> tuple[Tensor, Tensor]:
        return text.encode_prompt(prompt, max_sequence_length=max_sequence_length)[:2]

    def unshifted(self, steps: int) -> list[float]:
        return torch.linspace(1, 1 / steps, steps, dtype=torch.float64).tolist()

    def unpack(self, x: Float[Tensor, "B L packed"]) -> Float[Tensor, "B C h w"]:
        from diffusers import FluxPipeline

        height, width = self.latent_size
        return FluxPipeline._unpack_latents(x, height, width, vae_scale_factor=1)

    def velocity(
        self, x: Float[Tensor, "B L packed"], sigma: Float[Tensor, ""] | float, conditioning: dict[str, Tensor]
    ) -> Float[Tensor, "B L packed"]:
        """v_theta in float32."""
        embeds = conditioning["prompt_embeds"]
        time = torch.ones((), device=x.device) * sigma
        self.transformer.time_text_embed.exact_time = (1000 * time).expand(len(x))
        guided = self.transformer.config.guidance_embeds
        with self.precision():
            v = self.transformer(
                hidden_states=x,
                timestep=time.expand(len(x)),
                guidance=torch.full((len(x),), self.guidance_scale, device=x.device) if guided else None,
                encoder_hidden_states=embeds,
                pooled_projections=conditioning["pooled_prompt_embeds"],
                txt_ids=torch.zeros(embeds.shape[1], 3, device=x.device),
                img_ids=self.image_ids,
                return_dict=False,
            )[0].float()
        return v if torch.is_grad_enabled() else v.detach()
