"""Adapters around diffusers' text-to-image parts: encode, velocity, decode, LoRA.

The trainer knows a model by five things, whatever its size:

    encode(prompts)            -> conditioning, a dictionary of tensors [B, ...]
    velocity(x, sigma, cond)   -> v_theta(x, sigma) with guidance applied, [B, ...]
    decode(x)                  -> images [B, C, H, W] in [0, 1]
    latent_shape               -> shape of one latent
    reference()                -> a context in which velocity is that of the base model

Here they wrap the classes that SD3.5 itself is made of (`SD3Transformer2DModel`, `AutoencoderKL`,
`FlowMatchEulerDiscreteScheduler`); `digits.py` fills them with a model of 1.3 million weights.
diffusers' transformers count time as sigma * 1000 and predict the rectified-flow velocity
eps - x_data, so no sign or scale stands between them and `schedule.py`. Time stays float32.
"""

from collections.abc import Callable
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor, nn

from ref.schedule import FlowSchedule

# The eight projections of joint attention, Flow-GRPO's choice for SD3.
SD3_LORA_TARGETS = [
    f"attn.{name}"
    for name in ("to_q", "to_k", "to_v", "to_out.0", "add_q_proj", "add_k_proj", "add_v_proj", "to_add_out")
]


def sd3_grid(scheduler, steps: int) -> Tensor:
    """The noise levels [steps + 1] that diffusers' flow-matching scheduler itself would use."""
    scheduler.set_timesteps(steps)
    return scheduler.sigmas.clone()


class SD3(nn.Module):
    """Stable Diffusion 3's parts behind the five names above.

    transformer, vae, scheduler   diffusers objects
    encode                        prompts -> {"prompt_embeds", "pooled_prompt_embeds"} and, when
                                  guidance_scale > 1, the same two with "negative_" before them
    guidance_scale                classifier-free guidance v = v_neg + scale (v_pos - v_neg); 1 is off
    """

    def __init__(
        self, transformer, vae, scheduler, encode: Callable[[list[str]], dict[str, Tensor]], guidance_scale: float = 1.0
    ):
        super().__init__()
        self.transformer, self.vae, self.scheduler = transformer.eval(), vae.eval(), scheduler
        self.encode, self.guidance_scale = encode, guidance_scale
        self.requires_grad_(False)
        config = transformer.config
        self.latent_shape = (config.in_channels, config.sample_size, config.sample_size)

    def schedule(self, steps: int, **kernel) -> FlowSchedule:
        """The policy on this model's own time grid; `kernel` is kind, noise_level, sde_window."""
        return FlowSchedule(sd3_grid(self.scheduler, steps), **kernel)

    def velocity(self, x: Tensor, sigma: Tensor, conditioning: dict[str, Tensor]) -> Tensor:
        """v_theta [B, ...] in float32. sigma is a 0-d tensor or a float."""
        embeds, pooled = conditioning["prompt_embeds"], conditioning["pooled_prompt_embeds"]
        guided = self.guidance_scale > 1
        if guided:
            embeds = torch.cat([conditioning["negative_prompt_embeds"], embeds])
            pooled = torch.cat([conditioning["negative_pooled_prompt_embeds"], pooled])
            x = torch.cat([x, x])
        time = torch.full((len(x),), 1000.0, device=x.device) * sigma
        v = self.transformer(
            hidden_states=x.to(self.transformer.dtype),
            timestep=time,
            encoder_hidden_states=embeds,
            pooled_projections=pooled,
            return_dict=False,
        )[0].float()
        if guided:
            negative, positive = v.chunk(2)
            v = negative + self.guidance_scale * (positive - negative)
        return v

    @torch.no_grad()
    def decode(self, x: Tensor) -> Tensor:
        """Latents [B, ...] -> images [B, C, H, W] in [0, 1]."""
        config = self.vae.config
        x = x.to(self.vae.dtype) / config.scaling_factor + config.shift_factor
        return (self.vae.decode(x, return_dict=False)[0].float() / 2 + 0.5).clamp(0, 1)

    def add_lora(self, rank: int, alpha: float, seed: int = 0) -> None:
        """Put trainable low-rank updates on the attention projections; they start at exactly zero."""
        from peft import LoraConfig

        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.transformer.add_adapter(
                LoraConfig(r=rank, lora_alpha=alpha, init_lora_weights="gaussian", target_modules=SD3_LORA_TARGETS)
            )

    def save(self, folder: Path | str) -> None:
        """Write the LoRA so that `StableDiffusion3Pipeline.load_lora_weights(folder)` of stock diffusers reads it."""
        from diffusers import StableDiffusion3Pipeline
        from peft import get_peft_model_state_dict

        StableDiffusion3Pipeline.save_lora_weights(
            folder,
            transformer_lora_layers=get_peft_model_state_dict(self.transformer),
            transformer_lora_adapter_metadata=self.transformer.peft_config["default"].to_dict(),
        )

    @contextmanager
    def reference(self):
        """Within this context the LoRA is off: velocity is that of the base model."""
        self.transformer.disable_adapters()
        try:
            yield
        finally:
            self.transformer.enable_adapters()
