"""Adapters around diffusers' text-to-image parts: encode, velocity, decode, what is trained, how it is saved.

The trainer knows a model by six things, whatever its size:

    encode(prompts)            -> conditioning, a dictionary of tensors [B, ...]
    velocity(x, sigma, cond)   -> v_theta(x, sigma) with guidance applied, [B, ...] in float32
    decode(x)                  -> images [B, C, H, W] in [0, 1], float32
    latent_shape               -> shape of one latent x
    schedule(steps, **kernel)  -> the policy on the model's own time grid
    reference()                -> a context in which velocity is that of the base model

`load.load` fills them with SD3.5-Medium, FLUX.1-dev or any pipeline of their classes; `worlds/letters` fills `SD3`
with a model of 2.3 million weights. diffusers' transformers predict the rectified-flow velocity
eps - x_data, so no sign or scale stands between them and `schedule.py`.

**Precision.** Latents, time and velocity are float32. The transformer computes in `dtype` (bfloat16 on a
GPU) inside an autocast of its own, which overrides one outside; trained weights are float32. The VAE is
float32: it is small, and rewards look at small differences. On a GPU its convolutions run in TF32, as torch has them by
default: ten times as fast, and of a small VAE's 8-bit pixels 1.8 % then differ, by one level of 256.
"""

import copy
from collections.abc import Callable
from contextlib import contextmanager
from pathlib import Path

import torch
from jaxtyping import Float
from torch import Tensor, nn

from ref.scale.checkpoint import atomic_write, snapshot
from ref.scale.memory import out_of_memory
from ref.scale.processes import rank
from ref.scale.sharding import shard
from ref.schedule import FlowSchedule, time_grid

# of the image's stream, or of both in one
ATTENTION = [f"attn.{name}" for name in ("to_q", "to_k", "to_v", "to_out.0")]


class TextToImage(nn.Module):
    """What SD3 and FLUX have in common. Subclasses add velocity, latents and the time grid.

    transformer, vae, scheduler   diffusers objects
    encode                        prompts -> conditioning
    guidance_scale                1 is off
    size                          (height, width) in pixels; None: the transformer's sample_size, which FLUX lacks
    shift                         of the time grid, as in `schedule.time_grid`; None: what the scheduler says
    dtype                         in which the transformer computes; None: that of its weights
    decode_batch                  images that go through the VAE at once; None: all
    """

    pipeline: str  # diffusers' class of the whole
    network: str  # and of the transformer
    default_guidance: float
    default_tokens: int  # T5 tokens, the pipeline's own default
    lora_targets: list[str]  # by the recipe the presets are named after

    def __init__(
        self,
        transformer,
        vae,
        scheduler,
        encode: Callable[[list[str]], dict[str, Tensor]],
        guidance_scale: float = 1.0,
        size: tuple[int, int] | None = None,
        shift: float | None = None,
        dtype: torch.dtype | None = None,
        decode_batch: int | None = None,
    ):
        super().__init__()
        self.transformer, self.vae, self.scheduler = transformer.eval(), vae.eval(), scheduler
        self.encode, self.guidance_scale, self.shift, self.decode_batch = encode, guidance_scale, shift, decode_batch
        self.dtype = dtype or transformer.dtype
        if self.dtype not in (torch.float32, torch.bfloat16):
            raise ValueError(f"dtype must be float32 or bfloat16 (float16 overflows in T5 and FLUX), got {self.dtype}")
        self.base = None  # full fine-tuning's frozen copy
        self.compiled = False
        self.requires_grad_(False)
        if size is None:
            side = transformer.config.sample_size
            self.latent_size = (side, side)
        else:
            self.latent_size = self.check_size(transformer.config, vae.config, *size)

    @classmethod
    def check_size(cls, transformer: dict, vae: dict, height: int, width: int) -> tuple[int, int]:
        """(height, width) of the latents. Raises ValueError for an image size that the model refuses."""
        factor = 2 ** (len(vae["block_out_channels"]) - 1)
        step, most = factor * cls.patch(transformer), cls.largest(transformer)
        for name, pixels in (("height", height), ("width", width)):
            if pixels < step or pixels % step or pixels > step * most:
                nearest = int(min(max(round(pixels / step), 1), most)) * step
                limit = f" up to {step * most}" if most < float("inf") else ""
                raise ValueError(f"{name} must be a multiple of {step}{limit}, got {pixels}; the nearest is {nearest}")
        return height // factor, width // factor

    @staticmethod
    def patch(transformer: dict) -> int:
        """Latent pixels along the side of a token."""
        return transformer["patch_size"]

    @staticmethod
    def largest(transformer: dict) -> float:
        """Tokens along a side that the position embedding can tell apart."""
        return float("inf")

    @property
    def tokens(self) -> int:
        patch = self.patch(self.transformer.config)
        return (self.latent_size[0] // patch) * (self.latent_size[1] // patch)

    def schedule(self, steps: int, **kernel) -> FlowSchedule:
        """The policy on the model's own time grid; `kernel` is kind, noise_level, sde_window."""
        grid = self.grid(steps) if self.shift is None else time_grid(steps, self.shift)
        return FlowSchedule(grid, **kernel)

    def grid(self, steps: int) -> Float[Tensor, " {steps}+1"]:
        """The noise levels that the stock pipeline would use for this image size."""
        from diffusers.pipelines.flux.pipeline_flux import calculate_shift

        config, options = self.scheduler.config, {}
        if config.use_dynamic_shifting:
            scale = (config.base_image_seq_len, config.max_image_seq_len, config.base_shift, config.max_shift)
            options["mu"] = calculate_shift(self.tokens, *scale)
        self.scheduler.set_timesteps(steps, sigmas=self.unshifted(steps), **options)
        return self.scheduler.sigmas.clone()

    def unshifted(self, steps: int) -> list[float] | None:
        """Noise levels that the pipeline hands to its scheduler; None: it leaves them to the scheduler."""
        return None

    def forward(
        self, x: Float[Tensor, " B *latent"], sigma: Float[Tensor, ""] | float, conditioning: dict[str, Tensor]
    ) -> Float[Tensor, " B *latent"]:
        """The same as velocity, for wrappers that know only forward."""
        return self.velocity(x, sigma, conditioning)

    @contextmanager
    def precision(self):
        """Autocast to `dtype`, or off; and memory's end named.

        With compiled blocks gradients are always on: without them the compiler would build other kernels for the
        rollout than for the update, and the ratio would not be exactly 1.
        """
        remedy = "give a smaller --micro-batch, or add --gradient-checkpointing"
        with out_of_memory(f"in the transformer, {self.tokens} tokens an image", remedy):
            with (
                torch.autocast(self.vae.device.type, torch.bfloat16, enabled=self.dtype == torch.bfloat16),
                torch.set_grad_enabled(self.compiled or torch.is_grad_enabled()),
            ):
                yield

    def compile_blocks(self) -> None:
        """Compile the transformer's repeated blocks, once for each shape: steps are faster after minutes of waiting."""
        torch._dynamo.config.recompile_limit = 64  # kinds of blocks x sizes of micro-batches
        for module in self.transformer.modules():
            if type(module).__name__ in self.transformer._no_split_modules:
                module.compile(fullgraph=True, dynamic=False)  # a shape must always meet the same kernels
        self.compiled = True

    @torch.no_grad()
    def decode(self, x: Float[Tensor, " B *latent"]) -> Float[Tensor, "B C H W"]:
        """Latents -> images in [0, 1]."""
        config, images = self.vae.config, []
        with out_of_memory("in the VAE", "give a smaller --decode-batch, or add --tiling"):
            for part in x.split(self.decode_batch or len(x)):
                part = self.unpack(part).to(self.vae.dtype) / config.scaling_factor + config.shift_factor
                images.append((self.vae.decode(part, return_dict=False)[0].float() / 2 + 0.5).clamp(0, 1))
        return torch.cat(images)

    def unpack(self, x: Float[Tensor, " B *latent"]) -> Float[Tensor, "B C h w"]:
        """x as the VAE takes it."""
        return x

    def add_lora(self, rank: int, alpha: float, seed: int = 0, targets: str = "all") -> None:
        """Put trainable low-rank updates, float32, on `lora_targets`, or with "attention" on four of them, DanceGRPO's.

        They start at exactly zero.
        """
        from diffusers.training_utils import cast_training_params
        from peft import LoraConfig
        from peft.tuners.tuners_utils import BaseTunerLayer

        names = ATTENTION if targets == "attention" else self.lora_targets
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.transformer.add_adapter(
                LoraConfig(r=rank, lora_alpha=alpha, init_lora_weights="gaussian", target_modules=names)
            )
        cast_training_params(self.transformer, torch.float32)
        if self.dtype != torch.float32:  # autocast decides; peft would take every activation to float32 and back
            for module in self.transformer.modules():
                if isinstance(module, BaseTunerLayer):
                    module.cast_input_dtype_enabled = False

    def full(self, keep_base: bool = True) -> None:
        """Train every weight of the transformer, in float32.

        `reference` then needs a frozen copy of the base (in `dtype`: 2 bytes a weight in bfloat16); without
        `keep_base` there is none. Weights, gradients and AdamW's moments take 16 bytes a weight.
        """
        if keep_base:
            weights = {
                id(w): nn.Parameter(w.detach().to(self.dtype, copy=True), False) for w in self.transformer.parameters()
            }
            self.base = copy.deepcopy(self.transformer, weights).to(self.dtype)  # never a second one in float32
        self.transformer.float().requires_grad_(True)

    def shard(self, device: torch.device) -> None:
        """After `full`: spread the transformer and the copy of the base over all processes (sharding.py)."""
        for network in (self.transformer, self.base):
            if network is not None:
                shard(network, device, self.dtype)

    def save(self, folder: Path | str) -> None:
        """Write what was trained so that stock diffusers reads it. All processes call it, the first writes.

        A LoRA: `pipe.load_lora_weights(folder)`. All weights: `type(pipe.transformer).from_pretrained(folder)`.
        Raises OSError when the disk is full.
        """
        import diffusers
        from peft import get_peft_model_state_dict
        from safetensors import SafetensorError

        folder = Path(folder)
        weights = None if self.has_lora else snapshot(self.transformer.state_dict())
        if rank() > 0:
            return
        folder.mkdir(parents=True, exist_ok=True)
        try:
            if not self.has_lora:
                with torch.device("meta"):
                    whole = getattr(diffusers, self.network).from_config(self.transformer.config)
                whole.load_state_dict(weights, assign=True)
                return whole.save_pretrained(folder)
            layers = get_peft_model_state_dict(self.transformer)
            config = self.transformer.peft_config["default"].to_dict()
            config["auto_mapping"] = {"base_model_class": self.network}  # PEFT's own note of what it belongs to
            atomic_write(
                folder / "pytorch_lora_weights.safetensors",
                lambda temporary: getattr(diffusers, self.pipeline).save_lora_weights(
                    folder,
                    transformer_lora_layers=layers,
                    transformer_lora_adapter_metadata=config,
                    weight_name=temporary.name,
                ),
            )
        except SafetensorError as error:
            raise OSError(f"cannot write {folder}: {error}; free disk space or choose another folder") from error

    @property
    def has_lora(self) -> bool:
        return bool(getattr(self.transformer, "peft_config", None))

    @contextmanager
    def reference(self):
        """Within this context velocity is that of the base model. Raises ValueError when `full` did not keep it."""
        trained = self.transformer
        if self.has_lora:
            trained.disable_adapters()
        elif self.base is not None:
            self.transformer = self.base
        elif any(p.requires_grad for p in trained.parameters()):
            raise ValueError("the base model was not kept; load with keep_base=True or choose a method without KL")
        try:
            yield
        finally:
            self.transformer = trained
            if self.has_lora:
                trained.enable_adapters()
