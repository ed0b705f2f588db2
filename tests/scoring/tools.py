"""What the tests of encoders and rewards share."""

import json
from pathlib import Path

import torch
from PIL import Image

from ref.scoring.encoders import HPS_FILE, to_bytes
from ref.scoring.load import AESTHETIC_FILE

PROMPTS = ["a red fox", "two tall ships", "a red fox", "seven", "an old map"]


def siglip(folder: Path) -> Path:
    """A whole SigLIP, text tower included, as on the hub."""
    from transformers import SiglipConfig, SiglipImageProcessor, SiglipModel, SiglipTextConfig, SiglipVisionConfig

    torch.manual_seed(0)
    sizes = dict(hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2)
    vision = SiglipVisionConfig(**sizes, image_size=28, patch_size=14)
    text = SiglipTextConfig(**sizes, vocab_size=50, projection_size=32)
    model = SiglipModel(SiglipConfig(text_config=text.to_dict(), vision_config=vision.to_dict()))
    model.save_pretrained(folder)
    SiglipImageProcessor(size={"height": 28, "width": 28}).save_pretrained(folder)
    # the head that the authors publish, under their names
    widths = [32, 1024, 128, 64, 16, 1]
    head = {}
    for i, (fan_in, fan_out) in enumerate(zip(widths, widths[1:])):
        head[f"scoring_head.{2 * i}.weight"] = torch.randn(fan_out, fan_in) / fan_in**0.5
        head[f"scoring_head.{2 * i}.bias"] = torch.randn(fan_out)
    torch.save(head, folder / AESTHETIC_FILE)
    return folder


def open_clip_folder(folder: Path) -> Path:
    import open_clip
    from safetensors.torch import save_file

    torch.manual_seed(0)
    config = {
        "embed_dim": 16,
        "vision_cfg": {"image_size": 32, "layers": 2, "width": 32, "head_width": 16, "patch_size": 8},
        "text_cfg": {"context_length": 77, "vocab_size": 49408, "width": 16, "heads": 2, "layers": 2},
    }
    folder.mkdir()
    (folder / "ViT-H-14.json").write_text(json.dumps(config))  # to stand for HPSv2's architecture below
    content = {"model_cfg": config, "preprocess_cfg": {"mean": [0.5] * 3, "std": [0.25] * 3}}
    (folder / "open_clip_config.json").write_text(json.dumps(content))
    model = open_clip.factory.CLIP(**config)
    save_file(model.state_dict(), folder / "open_clip_model.safetensors")
    torch.save({"state_dict": model.state_dict()}, folder / HPS_FILE)
    return folder


def pil(images: torch.Tensor) -> list[Image.Image]:
    return [Image.fromarray(i.permute(1, 2, 0).numpy()) for i in to_bytes(images)]


class Calls:
    """Counts the forward passes of a network while they happen."""

    def __init__(self, network):
        self.count = 0
        self.hook = network.register_forward_hook(self.add)

    def add(self, *_):
        self.count += 1
