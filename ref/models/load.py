"""A pipeline ready to be trained, from a folder or the hub."""

from collections.abc import Iterable
from pathlib import Path

import torch

from ref.models.embeddings import PromptEmbeddings
from ref.models.flux import Flux
from ref.models.hub import locate
from ref.models.sd3 import SD3
from ref.scale.memory import out_of_memory
from ref.scale.processes import processes

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
    lora_targets: str = "all",
    keep_base: bool = True,
    gradient_checkpointing: bool = False,
    compile_blocks: bool = False,
    decode_batch: int | None = 2,
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
    lora_targets            "all" of the adapter's, or "attention": four of them (`add_lora`)
    keep_base               with rank None: keep a frozen copy of the base, which a KL to it needs
    gradient_checkpointing  compute activations twice and keep one block's: less memory, a third more time
    compile_blocks          compile the transformer's repeated blocks (torch.compile): faster after a while
    decode_batch, tiling    images at once through the VAE, and decoding each in tiles (seams may show)
    dtype                   of the transformer's arithmetic; None: bfloat16 on a GPU, float32 on the CPU
    device                  None: the GPU when there is one
    cache_dir               of prompt embeddings; None: ~/.cache/ref/prompt_embeddings
    seed                    of the LoRA's first weights

    On a GPU attention is flash attention, torch's own: cuDNN's, which torch prefers on H100 and B200, is switched off in
    the process, for with and without gradients it makes different plans.

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
    if device.type == "cuda":  # its rollout and its update would be two plans, and the ratio not exactly 1
        torch.backends.cuda.enable_cudnn_sdp(False)
    network = getattr(diffusers, adapter.network)
    configs = source.config(network, "transformer"), source.config(diffusers.AutoencoderKL, "vae")
    try:
        adapter.check_size(*configs, height, width)  # before anything large is loaded
    except (AttributeError, KeyError, TypeError) as error:
        raise OSError(f"cannot load {source.model}: no network of its class has such a transformer/config.json or vae/config.json ({error}); fetch them again") from error  # fmt: skip

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
        if device.type == "cpu":  # there it is faster; cuDNN wants more launches and more memory for it
            loaded.vae.to(memory_format=torch.channels_last)
        if tiling:
            loaded.vae.enable_tiling()
        if gradient_checkpointing:
            loaded.transformer.enable_gradient_checkpointing()
        if lora_rank is not None:
            loaded.add_lora(lora_rank, lora_alpha or 2 * lora_rank, seed, lora_targets)
        if compile_blocks:
            loaded.compile_blocks()
    return loaded
