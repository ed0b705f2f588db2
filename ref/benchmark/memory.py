"""GPU memory of training SD3.5-Medium and FLUX.1-dev, computed from shapes: no weights, no GPU.

    python -m ref.benchmark.memory                # the presets' image sizes
    python -m ref.benchmark.memory 512 1024       # others, in pixels; with --all-weights for full fine-tuning

PyTorch's fake tensors go through the real transformer's forward pass by the rules of CUDA's autocast, which takes layer
norms to float32, and every tensor that autograd would keep for the backward pass is counted once, as its storage is.
For B samples in a micro-batch

    peak = weights + trained + B (kept + block)

weights   transformer and LoRA (the transformer in bfloat16, with SD3.5's table of positions; the VAE's 84 million
          weights in float32)
trained   gradients and AdamW's two moments, 12 bytes for each weight of the LoRA; 16 where all are trained, for
          then a float32 copy of the weights is made (`weights` is the frozen base), to be divided by the GPUs
kept      what a forward pass of one sample (two with classifier-free guidance) leaves for the backward pass
block     with gradient checkpointing: one block's share, computed again; without, it is part of `kept`

Left out: CUDA's own context and fragmentation (plan for a tenth more), the trajectories (latents, under
2 MB a sample and step), reward models and encoders, decoding (lower `decode_batch`).
"""

import sys
from pathlib import Path
from typing import Annotated
from unittest.mock import patch

import torch
from pydantic import Field
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from tyro.conf import Positional, arg

from ref.models.adapter import TextToImage
from ref.models.embeddings import NAMES
from ref.models.sd3 import SD3
from ref.models.shapes import shaped
from ref.options import Options, Pixels, command, read
from ref.presets import PRESETS, architectures
from ref.scale.directory import write_json
from ref.scale.paths import refuse_unwritable
from ref.settings import in_one_line

GIB = 2**30


def conditioning_of(model: TextToImage, batch: int, tokens: int | None = None) -> dict[str, Tensor]:
    """What `encode` would give for `batch` prompts of so many T5 tokens (None: the pipeline's), without content."""
    config = model.transformer.config
    tokens = (tokens or model.default_tokens) + (77 if isinstance(model, SD3) else 0)
    shapes = (batch, tokens, config.joint_attention_dim), (batch, config.pooled_projection_dim)
    given = {name: torch.empty(shape, dtype=model.dtype) for name, shape in zip(NAMES, shapes)}
    return given | {f"negative_{name}": value for name, value in given.items()}


def in_float32(norm):
    """A norm as CUDA's autocast calls it: what it reads, and keeps for the way back, is float32."""

    def call(x, *arguments, **options):
        with torch.autocast("cpu", enabled=False):
            return norm(x.float(), *arguments, **options)

    return call


def kept(model: TextToImage, batch: int = 1, tokens: int | None = None, cuda: bool = True) -> int:
    """Bytes that one forward pass of `batch` samples leaves for the backward pass. Reads the model's shapes only.

    cuda: by the rules of CUDA's autocast, which takes layer norms to float32; the CPU's does not.
    """
    storages, real = {}, [(module, dict(module._parameters), dict(module._buffers)) for module in model.modules()]
    try:
        with FakeTensorMode(allow_non_fake_inputs=True):
            fake = lambda t: torch.empty(t.shape, dtype=t.dtype, device="cpu")  # noqa: E731
            own = set()
            for module, parameters, buffers in real:
                for key, value in parameters.items():
                    if value is not None:
                        module._parameters[key] = nn.Parameter(fake(value), requires_grad=value.requires_grad)
                        own.add(module._parameters[key].untyped_storage()._cdata)
                module._buffers.update({key: fake(value) for key, value in buffers.items() if value is not None})

            def count(tensor):
                storage = tensor.untyped_storage()
                if storage._cdata not in own:
                    storages[storage._cdata] = storage  # held, so that its address is not given away again
                return tensor

            conditioning, x = conditioning_of(model, batch, tokens), torch.empty(batch, *model.latent_shape)
            norm = nn.functional.layer_norm
            norms = patch.object(nn.functional, "layer_norm", in_float32(norm) if cuda else norm)
            with norms, torch.autograd.graph.saved_tensors_hooks(count, lambda tensor: tensor):
                model.velocity(x, torch.tensor(0.5), conditioning)
            return sum(storage.nbytes() for storage in storages.values())
    finally:
        for module, parameters, buffers in real:
            module._parameters.update(parameters)
            module._buffers.update(buffers)


def footprint(model: TextToImage, tokens: int | None = None) -> dict[str, float]:
    """The terms of the module's docstring in GiB: weights, trained, kept, block, and kept without checkpointing.

    tokens: of T5; None: the pipeline's own number.
    """
    transformer = model.transformer
    blocks = len(transformer.transformer_blocks) + len(getattr(transformer, "single_transformer_blocks", ()))
    transformer.disable_gradient_checkpointing()
    everything = kept(model, tokens=tokens)
    transformer.enable_gradient_checkpointing()
    trained = sum(p.numel() * (12 if p.dtype == torch.float32 else 16) for p in model.parameters() if p.requires_grad)
    terms = {
        "weights": sum(t.numel() * t.element_size() for t in (*model.parameters(), *model.buffers())),
        "trained": trained,
        "kept": kept(model, tokens=tokens),
        "block": everything / blocks,
        "without": everything,
    }
    return {name: value / GIB for name, value in terms.items()}


@in_one_line
class Memory(Options):
    """GPU memory of training SD3.5-Medium and FLUX.1-dev, computed from shapes."""

    pixels: Positional[list[Pixels]] = Field(default_factory=list)  # along the sides of the images (none: the presets')
    all_weights: bool = False  # full fine-tuning in place of a LoRA
    json_file: Annotated[Path | None, arg(name="json")] = None  # write all numbers here


def print_table(arguments: list[str] | None) -> None:
    given = read(Memory, "ref.benchmark.memory", arguments)
    if given.json_file:
        refuse_unwritable(given.json_file, "--json")
    print(
        "model        size  rank  tokens  weights  trained  a sample more: checkpointed, not   peak of 1, 4, 8 checkpointed"
    )
    rows = [
        (name, size, 0 if given.all_weights else rank, PRESETS[preset].options.max_sequence_length)
        for preset, name, size, rank in architectures(given.pixels)
    ]
    terms = []
    for name, size, rank, tokens in dict.fromkeys(rows):
        model = shaped(name, size, rank)
        tokens = tokens or model.default_tokens
        m = footprint(model, tokens)
        terms.append({"model": name, "pixels": size, "rank": rank, "tokens": tokens} | m)
        each = m["kept"] + m["block"]
        peaks = ", ".join(f"{m['weights'] + m['trained'] + b * each:.1f}" for b in (1, 4, 8))
        print(
            f"{name:<11} {size:>5} {rank:>5} {tokens:>7} {m['weights']:>8.2f} {m['trained']:>8.2f} "
            f"{each:>28.2f}, {m['without']:>5.2f}   {peaks} GiB"
        )
    if given.json_file:
        write_json(given.json_file, terms)


def main(arguments: list[str] | None = None) -> int:
    return command(print_table, arguments)


if __name__ == "__main__":
    sys.exit(main())
