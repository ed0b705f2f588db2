"""Tiny pipelines of the real classes with random weights: whole, on disk, made in a second without a network.

    python -m ref.models.tiny DIR            # DIR/sd3, DIR/flux, DIR/clip, DIR/dino, DIR/mask2former
    python -m ref.models.tiny DIR --wide     # transformers 512 and 768 wide, two blocks deep

`sd3` and `flux` are complete diffusers folders (tokenizers, text encoders, transformer, VAE,
scheduler), `clip`, `dino` and `mask2former` complete transformers folders. They hold nothing that was learnt and
stand for SD3.5-Medium, FLUX.1-dev, PickScore or CLIP, DINOv2 and GenEval's detector wherever code rather than images is
the question: tests, CI, notebook 07 without a GPU. Structure follows the big models where code can
depend on it: VAE factor 8 and patches of 2, SD3.5's dual attention and query-key norm, FLUX's
guidance embedding and dynamic shift, 77 CLIP tokens. Images are 64 x 64 (or other multiples of 16, up to 256 on SD3).

The wide ones are for timings: there arithmetic takes the time, not the starting of small operations.
"""

import sys
from pathlib import Path

import torch
from tyro.conf import Positional

from ref.options import Options, command, read
from ref.settings import in_one_line

WIDTH = 32  # of every transformer here but the wide ones
WIDE = {  # a third and a quarter of SD3.5-Medium's width and FLUX.1-dev's
    "sd3": dict(num_attention_heads=8, attention_head_dim=64, caption_projection_dim=512),
    "flux": dict(num_attention_heads=6, attention_head_dim=128, axes_dims_rope=(16, 56, 56)),
}


def clip_tokenizer():
    """Byte-level BPE without merges: one token a byte, as CLIP's tokenizer before it learnt any word."""
    from tokenizers.pre_tokenizers import ByteLevel
    from transformers import CLIPTokenizer

    letters = sorted(ByteLevel.alphabet())
    words = letters + [letter + "</w>" for letter in letters] + ["<|startoftext|>", "<|endoftext|>"]
    return CLIPTokenizer({word: i for i, word in enumerate(words)}, [], model_max_length=77)


def t5_tokenizer():
    """A unigram model of single printable ASCII letters."""
    from transformers import T5Tokenizer

    letters = [(chr(code), -4.0) for code in range(33, 127)]
    vocabulary = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("▁", -2.0), *letters]
    return T5Tokenizer(vocabulary, extra_ids=0, model_max_length=512)


def clip_text_config(**changes):
    from transformers import CLIPTextConfig

    tokenizer = clip_tokenizer()
    return CLIPTextConfig(
        vocab_size=len(tokenizer), hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2,
        projection_dim=16, bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id, **changes,
    )  # fmt: skip


def t5_encoder():
    from transformers import T5Config, T5EncoderModel

    return T5EncoderModel(
        T5Config(
            vocab_size=len(t5_tokenizer()), d_model=WIDTH, d_kv=8, d_ff=64, num_layers=2, num_heads=4,
            feed_forward_proj="gated-gelu", is_encoder_decoder=False, use_cache=False,
        )
    )  # fmt: skip


def vae():
    """Four channels, factor 8. The last layer is made louder: a random decoder would paint everything grey."""
    from diffusers import AutoencoderKL

    model = AutoencoderKL(
        down_block_types=["DownEncoderBlock2D"] * 4, up_block_types=["UpDecoderBlock2D"] * 4,
        block_out_channels=[8, 8, 16, 16], layers_per_block=1, norm_num_groups=4, latent_channels=4,
        use_quant_conv=False, use_post_quant_conv=False, scaling_factor=1.5, shift_factor=0.06,
        sample_size=64, mid_block_add_attention=True,
    )  # fmt: skip
    with torch.no_grad():
        model.decoder.conv_out.weight.mul_(3)
    return model


def sd3(folder: Path | str, seed: int = 0, wide: bool = False) -> Path:
    """A `StableDiffusion3Pipeline` shaped like SD3.5-Medium, saved in `folder`."""
    from diffusers import FlowMatchEulerDiscreteScheduler, SD3Transformer2DModel, StableDiffusion3Pipeline
    from transformers import CLIPTextModelWithProjection

    torch.manual_seed(seed)
    config = dict(
        sample_size=8, patch_size=2, in_channels=4, out_channels=4, num_layers=2, attention_head_dim=16,
        num_attention_heads=2, joint_attention_dim=WIDTH, caption_projection_dim=WIDTH, pooled_projection_dim=32,
        pos_embed_max_size=64 if wide else 16, dual_attention_layers=(0,), qk_norm="rms_norm",
    )  # fmt: skip
    transformer = SD3Transformer2DModel(**config | (WIDE["sd3"] if wide else {}))
    StableDiffusion3Pipeline(
        transformer=transformer,
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
        vae=vae(),
        text_encoder=CLIPTextModelWithProjection(clip_text_config()),
        tokenizer=clip_tokenizer(),
        text_encoder_2=CLIPTextModelWithProjection(clip_text_config(hidden_act="gelu")),
        tokenizer_2=clip_tokenizer(),
        text_encoder_3=t5_encoder(),
        tokenizer_3=t5_tokenizer(),
    ).save_pretrained(folder)
    return Path(folder)


def flux(folder: Path | str, seed: int = 0, wide: bool = False) -> Path:
    """A `FluxPipeline` shaped like FLUX.1-dev, saved in `folder`."""
    from diffusers import FlowMatchEulerDiscreteScheduler, FluxPipeline, FluxTransformer2DModel
    from transformers import CLIPTextModel

    torch.manual_seed(seed)
    config = dict(
        patch_size=1, in_channels=16, num_layers=1, num_single_layers=1, attention_head_dim=16, num_attention_heads=2,
        joint_attention_dim=WIDTH, pooled_projection_dim=16, guidance_embeds=True, axes_dims_rope=(4, 6, 6),
    )  # fmt: skip
    transformer = FluxTransformer2DModel(**config | (WIDE["flux"] if wide else {}))
    FluxPipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=True),
        vae=vae(),
        text_encoder=CLIPTextModel(clip_text_config()),
        tokenizer=clip_tokenizer(),
        text_encoder_2=t5_encoder(),
        tokenizer_2=t5_tokenizer(),
        transformer=transformer,
    ).save_pretrained(folder)
    return Path(folder)


def clip(folder: Path | str, seed: int = 0) -> Path:
    """A `CLIPModel` with its processor (32 x 32 pixels), saved in `folder`; PickScore is this class too."""
    from transformers import CLIPConfig, CLIPImageProcessor, CLIPModel, CLIPProcessor, CLIPVisionConfig

    torch.manual_seed(seed)
    vision = CLIPVisionConfig(
        hidden_size=WIDTH, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2, image_size=32,
        patch_size=8, projection_dim=16,
    )  # fmt: skip
    text = clip_text_config()
    config = CLIPConfig(text_config=text.to_dict(), vision_config=vision.to_dict(), projection_dim=16)
    CLIPModel(config).save_pretrained(folder)
    pixels = CLIPImageProcessor(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32})
    CLIPProcessor(pixels, clip_tokenizer()).save_pretrained(folder)
    return Path(folder)


def dino(folder: Path | str, seed: int = 0) -> Path:
    """A `Dinov2Model` with its image processor (32 x 32 pixels), saved in `folder`."""
    from transformers import BitImageProcessor, Dinov2Config, Dinov2Model

    torch.manual_seed(seed)
    config = Dinov2Config(
        hidden_size=WIDTH, num_hidden_layers=2, num_attention_heads=2, mlp_ratio=2, image_size=32, patch_size=8
    )
    Dinov2Model(config).save_pretrained(folder)
    BitImageProcessor(
        size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32}, do_convert_rgb=True,
        image_mean=[0.485, 0.456, 0.406], image_std=[0.229, 0.224, 0.225],
    ).save_pretrained(folder)  # fmt: skip
    return Path(folder)


def mask2former(folder: Path | str, seed: int = 0) -> Path:
    """A `Mask2FormerForUniversalSegmentation` of COCO's 80 classes with its image processor, saved in `folder`.

    Its head is made louder: else no object would ever be found.
    """
    from transformers import (
        Mask2FormerConfig,
        Mask2FormerForUniversalSegmentation,
        Mask2FormerImageProcessor,
        SwinConfig,
    )

    torch.manual_seed(seed)
    backbone = SwinConfig(
        image_size=32, patch_size=4, embed_dim=8, depths=[1] * 4, num_heads=[1, 1, 2, 2], window_size=2,
        out_features=["stage1", "stage2", "stage3", "stage4"],
    )  # fmt: skip
    config = Mask2FormerConfig(
        backbone_config=backbone, feature_size=WIDTH, mask_feature_size=WIDTH, hidden_dim=WIDTH, encoder_feedforward_dim=32,
        encoder_layers=1, decoder_layers=3, num_attention_heads=2, dim_feedforward=32, num_queries=20, num_labels=80,
    )  # fmt: skip
    model = Mask2FormerForUniversalSegmentation(config)
    with torch.no_grad():
        model.class_predictor.weight.mul_(30)
    model.save_pretrained(folder)
    Mask2FormerImageProcessor(size={"height": 64, "width": 64}, ignore_index=255).save_pretrained(folder)
    return Path(folder)


MAKERS = {"sd3": sd3, "flux": flux, "clip": clip, "dino": dino, "mask2former": mask2former}


@in_one_line
class Tiny(Options):
    """Tiny random pipelines, saved as folders."""

    folder: Positional[Path]  # gets a subfolder for each of them
    wide: bool = False  # transformers so wide that arithmetic takes the time


def make(arguments: list[str] | None) -> None:
    given = read(Tiny, "ref.models.tiny", arguments)
    for name, maker in MAKERS.items():
        path = maker(given.folder / name, **(dict(wide=True) if given.wide and name in WIDE else {}))
        size = sum(file.stat().st_size for file in path.rglob("*") if file.is_file())
        print(f"{path}  {size / 2**20:.2f} MiB")


def main(arguments: list[str] | None = None) -> int:
    return command(make, arguments)


if __name__ == "__main__":
    sys.exit(main())
