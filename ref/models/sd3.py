"""Stable Diffusion 3 and 3.5: the velocity with classifier-free guidance, and what is trained."""

import torch
from jaxtyping import Float
from torch import Tensor

from ref.models.adapter import ATTENTION, TextToImage

# The eight projections of joint attention, Flow-GRPO's choice: the image's and the text's.
LORA_TARGETS = ATTENTION + [f"attn.{name}" for name in ("add_q_proj", "add_k_proj", "add_v_proj", "to_add_out")]


class SD3(TextToImage):
    """Stable Diffusion 3 and 3.5. x is the latent [B, C, h, w].

    encode gives {"prompt_embeds", "pooled_prompt_embeds"} and, when guidance_scale > 1, the same two with
    "negative_" before them: classifier-free guidance is v = v_neg + scale (v_pos - v_neg), one forward of both.
    """

    pipeline = "StableDiffusion3Pipeline"
    network = "SD3Transformer2DModel"
    default_guidance = 4.5
    default_tokens = 256
    lora_targets = LORA_TARGETS

    @property
    def latent_shape(self) -> tuple[int, int, int]:
        return (self.transformer.config.in_channels, *self.latent_size)

    @staticmethod
    def largest(transformer: dict) -> float:
        return transformer["pos_embed_max_size"]

    @staticmethod
    def encode_text(text, prompt: str | list[str], max_sequence_length: int) -> tuple[Tensor, Tensor]:
        embeds, _, pooled, _ = text.encode_prompt(
            prompt, None, None, do_classifier_free_guidance=False, max_sequence_length=max_sequence_length
        )
        return embeds, pooled

    def velocity(
        self, x: Float[Tensor, "B C h w"], sigma: Float[Tensor, ""] | float, conditioning: dict[str, Tensor]
    ) -> Float[Tensor, "B C h w"]:
        """v_theta in float32."""
        embeds, pooled = conditioning["prompt_embeds"], conditioning["pooled_prompt_embeds"]
        guided = self.guidance_scale > 1
        if guided:
            embeds = torch.cat([conditioning["negative_prompt_embeds"], embeds])
            pooled = torch.cat([conditioning["negative_pooled_prompt_embeds"], pooled])
            x = torch.cat([x, x])
        time = torch.full((), 1000.0, device=x.device) * sigma
        with self.precision():
            v = self.transformer(
                hidden_states=x,
                timestep=time.expand(len(x)),
                encoder_hidden_states=embeds,
                pooled_projections=pooled,
                return_dict=False,
            )[0].float()
        if guided:
            negative, positive = v.chunk(2)
            v = negative + self.guidance_scale * (positive - negative)
        return v if torch.is_grad_enabled() else v.detach()
