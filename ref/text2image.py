"""Adapters around diffusers' text-to-image parts: encode, velocity, decode, what is trained, how it is saved.

The trainer knows a model by six things, whatever its size:

    encode(prompts)            -> conditioning, a dictionary of tensors [B, ...]
    velocity(x, sigma, cond)   -> v_theta(x, sigma) with guidance applied, [B, ...] in float32
    decode(x)                  -> images [B, C, H, W] in [0, 1], float32
    latent_shape               -> shape of one latent x
    schedule(steps, **kernel)  -> the policy on the model's own time grid
    reference()                -> a context in which velocity is that of the base model

`load` fills them with SD3.5-Medium, FLUX.1-dev or any pipeline of their classes; `digits.py` fills `SD3`
with a model of 1.3 million weights. diffusers' transformers predict the rectified-flow velocity
eps - x_data, so no sign or scale stands between them and `schedule.py`.

**Precision.** Latents, time and velocity are float32. The transformer computes in `dtype` (bfloat16 on a
GPU) inside an autocast of its own, which overrides one outside; trained weights are float32. The VAE is
float32: it is small, and rewards look at its last bits.

**FLUX.** x is the packed latent [B, L, 4 C], L = H/16 W/16 tokens of 2 x 2 latent pixels: what the
transformer itself reads and writes. Entropies per dimension and ratios do not see the packing.
"""

import copy
from collections.abc import Callable, Iterable
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor, nn

from ref.checkpoint import atomic_write, snapshot
from ref.layout import processes, rank
from ref.pipelines import PromptEmbeddings, locate, out_of_memory
from ref.schedule import FlowSchedule, time_grid
from ref.sharding import shard

# The eight projections of joint attention, Flow-GRPO's choice for SD3.
SD3_LORA_TARGETS = [
    f"attn.{name}"
    for name in ("to_q", "to_k", "to_v", "to_out.0", "add_q_proj", "add_k_proj", "add_v_proj", "to_add_out")
]
# FLUX: the same, and both feed-forward layers of either stream.
FLUX_LORA_TARGETS = SD3_LORA_TARGETS + [
    f"{stream}.net.{layer}" for stream in ("ff", "ff_context") for layer in ("0.proj", "2")
]


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
    lora_targets: list[str]

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

    def grid(self, steps: int) -> Tensor:
        """The noise levels [steps + 1] that the stock pipeline would use for this image size."""
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

    def forward(self, x: Tensor, sigma: Tensor, conditioning: dict[str, Tensor]) -> Tensor:
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
    def decode(self, x: Tensor) -> Tensor:
        """Latents [B, ...] -> images [B, C, H, W] in [0, 1]."""
        config, images = self.vae.config, []
        with out_of_memory("in the VAE", "give a smaller --decode-batch, or add --tiling"):
            for part in x.split(self.decode_batch or len(x)):
                part = self.unpack(part).to(self.vae.dtype) / config.scaling_factor + config.shift_factor
                images.append((self.vae.decode(part, return_dict=False)[0].float() / 2 + 0.5).clamp(0, 1))
        return torch.cat(images)

    def unpack(self, x: Tensor) -> Tensor:
        """x -> latents [B, C, h, w]."""
        return x

    def add_lora(self, rank: int, alpha: float, seed: int = 0) -> None:
        """Put trainable low-rank updates, float32, on `lora_targets`; they start at exactly zero."""
        from diffusers.training_utils import cast_training_params
        from peft import LoraConfig
        from peft.tuners.tuners_utils import BaseTunerLayer

        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.transformer.add_adapter(
                LoraConfig(r=rank, lora_alpha=alpha, init_lora_weights="gaussian", target_modules=self.lora_targets)
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
            self.base = copy.deepcopy(self.transformer).to(self.dtype)
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
            atomic_write(
                folder / "pytorch_lora_weights.safetensors",
                lambda temporary: getattr(diffusers, self.pipeline).save_lora_weights(
                    folder,
                    transformer_lora_layers=layers,
                    transformer_lora_adapter_metadata=self.transformer.peft_config["default"].to_dict(),
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


class SD3(TextToImage):
    """Stable Diffusion 3 and 3.5. x is the latent [B, C, h, w].

    encode gives {"prompt_embeds", "pooled_prompt_embeds"} and, when guidance_scale > 1, the same two with
    "negative_" before them: classifier-free guidance is v = v_neg + scale (v_pos - v_neg), one forward of both.
    """

    pipeline = "StableDiffusion3Pipeline"
    network = "SD3Transformer2DModel"
    default_guidance = 4.5
    default_tokens = 256
    lora_targets = SD3_LORA_TARGETS

    @property
    def latent_shape(self) -> tuple[int, int, int]:
        return (self.transformer.config.in_channels, *self.latent_size)

    @staticmethod
    def largest(transformer: dict) -> float:
        return transformer["pos_embed_max_size"]

    @staticmethod
    def encode_text(text, prompt: str, max_sequence_length: int) -> tuple[Tensor, Tensor]:
        embeds, _, pooled, _ = text.encode_prompt(
            prompt, None, None, do_classifier_free_guidance=False, max_sequence_length=max_sequence_length
        )
        return embeds, pooled

    def velocity(self, x: Tensor, sigma: Tensor, conditioning: dict[str, Tensor]) -> Tensor:
        """v_theta [B, C, h, w] in float32. sigma is a 0-d tensor or a float."""
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


def exact_time(module, arguments: tuple) -> tuple:
    """Hook of FLUX's time embedding: the float32 time, where the transformer hands down one cast to bfloat16."""
    return (module.exact_time, *arguments[1:])


class Flux(TextToImage):
    """FLUX.1. x is the packed latent [B, L, 4 C]; guidance is an input of the distilled network, one forward."""

    pipeline = "FluxPipeline"
    network = "FluxTransformer2DModel"
    default_guidance = 3.5
    default_tokens = 512
    lora_targets = FLUX_LORA_TARGETS

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
    def encode_text(text, prompt: str, max_sequence_length: int) -> tuple[Tensor, Tensor]:
        return text.encode_prompt(prompt, max_sequence_length=max_sequence_length)[:2]

    def unshifted(self, steps: int) -> list[float]:
        return torch.linspace(1, 1 / steps, steps, dtype=torch.float64).tolist()

    def unpack(self, x: Tensor) -> Tensor:
        from diffusers import FluxPipeline

        height, width = self.latent_size
        return FluxPipeline._unpack_latents(x, height, width, vae_scale_factor=1)

    def velocity(self, x: Tensor, sigma: Tensor, conditioning: dict[str, Tensor]) -> Tensor:
        """v_theta [B, L, 4 C] in float32. sigma is a 0-d tensor or a float."""
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


ADAPTERS = {adapter.pipeline: adapter for adapter in (SD3, Flux)}


def load(
    model: str | Path,
    prompts: Iterable[str],
    height: int = 512,
    width: int = 512,
    *,
    guidance_scale: float | None = None,
    shift: float | None = None,
    max_sequence_length: int | None = None,
    lora_rank: int | None = 32,
    lora_alpha: float | None = None,
    keep_base: bool = True,
    gradient_checkpointing: bool = False,
    compile_blocks: bool = False,
    decode_batch: int | None = 8,
    tiling: bool = False,
    dtype: torch.dtype | None = None,
    device: torch.device | str | None = None,
    cache_dir: Path | str | None = None,
    seed: int = 0,
) -> SD3 | Flux:
    """A pipeline ready to be trained: prompts encoded and text encoders gone, LoRA on, everything on `device`.

    model                   diffusers folder, hub id, "sd35_medium" or "flux_dev"
    prompts                 every prompt of training and evaluation
    height, width           of the images, in pixels
    guidance_scale          None: 4.5 for SD3 (classifier-free; 1 is guidance-free), 3.5 for FLUX (embedded)
    shift                   of the time grid (DanceGRPO: 3 on FLUX); None: the pipeline's own
    max_sequence_length     T5 tokens; None: the pipeline's own, 256 for SD3 and 512 for FLUX
    lora_rank, lora_alpha   Flow-GRPO: 32 and 64 for SD3, 64 and 128 for FLUX. rank None trains all weights, in
                            parts where there are several processes; alpha None is twice the rank
    keep_base               with rank None: keep a frozen copy of the base, which a KL to it needs
    gradient_checkpointing  compute activations twice and keep one block's: less memory, a third more time
    compile_blocks          compile the transformer's repeated blocks (torch.compile): faster after a while
    decode_batch, tiling    images at once through the VAE, and decoding each in tiles (seams may show)
    dtype                   of the transformer's arithmetic; None: bfloat16 on a GPU, float32 on the CPU
    device                  None: the GPU when there is one
    cache_dir               of prompt embeddings; None: ~/.cache/ref/prompt_embeddings
    seed                    of the LoRA's first weights

    Raises OSError (no such model, no access, no network, no memory) and ValueError (a pipeline of another
    class, an image size that the model refuses), each with the remedy.
    """
    import diffusers

    source = locate(model)
    adapter = ADAPTERS.get(source.pipeline)
    if adapter is None:
        raise ValueError(f"{source.model} is a {source.pipeline}; training knows {' and '.join(ADAPTERS)}")
    device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    dtype = dtype or (torch.float32 if device.type == "cpu" else torch.bfloat16)
    guidance_scale = adapter.default_guidance if guidance_scale is None else guidance_scale
    network = getattr(diffusers, adapter.network)
    configs = source.config(network, "transformer"), source.config(diffusers.AutoencoderKL, "vae")
    adapter.check_size(*configs, height, width)  # before anything large is loaded

    encode = PromptEmbeddings(
        source,
        adapter.encode_text,
        max_sequence_length or adapter.default_tokens,
        dtype,
        device,
        cache_dir,
        negative=adapter is SD3 and guidance_scale > 1,
    )
    encode.add(prompts)
    remedy = "train a LoRA instead of all weights, load in bfloat16, or take a larger GPU"
    with out_of_memory(f"while loading {source.model}", remedy):
        weights = torch.float32 if lora_rank is None else dtype
        loaded = adapter(
            source.component(network, "transformer", dtype=weights),
            source.component(diffusers.AutoencoderKL, "vae", dtype=torch.float32),
            source.component(diffusers.FlowMatchEulerDiscreteScheduler, "scheduler"),
            encode,
            guidance_scale,
            size=(height, width),
            shift=shift,
            dtype=dtype,
            decode_batch=decode_batch,
        )
        if lora_rank is None:
            loaded.full(keep_base)
            if processes() > 1:
                loaded.shard(device)
        loaded.to(device)
        loaded.vae.to(memory_format=torch.channels_last)
        if tiling:
            loaded.vae.enable_tiling()
        if gradient_checkpointing:
            loaded.transformer.enable_gradient_checkpointing()
        if lora_rank is not None:
            loaded.add_lora(lora_rank, lora_alpha or 2 * lora_rank, seed)
        if compile_blocks:
            loaded.compile_blocks()
    return loaded
