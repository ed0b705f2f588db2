"""ImageReward (arXiv 2304.05977): R(x, c) = (MLP(h_CLS) - 0.167) / 1.033 of a BLIP that reads x while reading c.

    ViT(x) -> patches;  BERT(c) with cross-attention to the patches -> h_CLS [768];  MLP: five linear layers

The authors' package pins timm 0.6 and cannot be installed beside this project's libraries, so their one
file of weights, ImageReward.pt, is read into transformers' BLIP classes here: only names differ. Sizes
follow from the weights. Unlike an encoder's features, a score is that of a pair and cannot serve as phi.
"""

import re
from pathlib import Path

import torch
from jaxtyping import Float
from torch import Tensor, nn

from ref.scale.textfiles import read_json
from ref.scoring.encoders import OPENAI_MEAN, OPENAI_STD, find, fit, one_line, to_bytes
from ref.scoring.reward import Reward

HUB = "zai-org/ImageReward"
TOKENIZER = "google-bert/bert-base-uncased"
MEAN, STD = 0.16717362830052426, 1.0333394966054072  # over the authors' validation set
RENAMED = {
    r"cls_token": "embeddings.class_embedding",
    r"pos_embed": "embeddings.position_embedding",
    r"patch_embed\.proj": "embeddings.patch_embedding",
    r"blocks\.": "encoder.layers.",
    r"\.attn\.qkv": ".self_attn.qkv",
    r"\.attn\.proj": ".self_attn.projection",
    r"\.norm([12])": r".layer_norm\1",
    r"^norm": "post_layernorm",
}


def under(weights: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {k.removeprefix(prefix): v for k, v in weights.items() if k.startswith(prefix)}


class ImageReward(Reward):
    """`weights` as in ImageReward.pt, `text` the contents of med_config.json."""

    def __init__(self, name: str, weights: dict[str, Tensor], text: dict, tokenizer, micro_batch: int = 32):
        from transformers import BlipTextConfig, BlipTextModel, BlipVisionConfig, BlipVisionModel

        super().__init__(name)
        vision, reader = under(weights, "blip.visual_encoder."), under(weights, "blip.text_encoder.")
        for old, new in RENAMED.items():
            vision = {re.sub(old, new, key): value for key, value in vision.items()}
        width, _, patch, _ = vision["embeddings.patch_embedding.weight"].shape
        self.size = patch * round((vision["embeddings.position_embedding"].shape[1] - 1) ** 0.5)
        depth = 1 + max(int(key.split(".")[2]) for key in vision if key.startswith("encoder.layers."))
        self.eye = BlipVisionModel(
            BlipVisionConfig(
                hidden_size=width, intermediate_size=4 * width, num_hidden_layers=depth,
                num_attention_heads=width // 64, image_size=self.size, patch_size=patch, layer_norm_eps=1e-6,
            )
        )  # fmt: skip
        copied = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
                  "max_position_embeddings", "layer_norm_eps", "hidden_act", "pad_token_id")  # fmt: skip
        # as a decoder it has the cross-attention, and forward switches the causal mask off
        config = BlipTextConfig(**{k: text[k] for k in copied}, encoder_hidden_size=width, is_decoder=True)
        self.reader = BlipTextModel(config, add_pooling_layer=False)
        head = under(weights, "mlp.layers.")
        linear = {int(key.split(".")[0]): value.shape for key, value in head.items() if key.endswith("weight")}
        self.head = nn.Sequential(*(nn.Linear(linear[i][1], linear[i][0]) if i in linear else nn.Identity() for i in range(max(linear) + 1)))  # fmt: skip
        self.eye.load_state_dict(vision)
        self.reader.load_state_dict({k: v for k, v in reader.items() if not k.endswith("position_ids")})
        self.head.load_state_dict(head)
        self.tokenizer, self.micro_batch = tokenizer, micro_batch
        self.eval().requires_grad_(False)

    def score(self, images: Float[Tensor, "B 3 H W"], prompts: list[str]) -> Float[Tensor, " B"]:
        cut = range(0, len(prompts), self.micro_batch)
        pairs = [(images[i : i + self.micro_batch], prompts[i : i + self.micro_batch]) for i in cut]
        return torch.cat([self.score_pairs(x, c) for x, c in pairs])

    def score_pairs(self, images: Tensor, prompts: list[str]) -> Tensor:
        from torchvision.transforms.v2.functional import normalize

        where = next(self.parameters())
        pixels = fit(to_bytes(images.to(where.device)), self.size, "shortest", "bicubic", 0).float() / 255
        patches = self.eye(pixel_values=normalize(pixels, OPENAI_MEAN, OPENAI_STD).to(where.dtype)).last_hidden_state
        tokens = self.tokenizer(prompts, padding="max_length", truncation=True, max_length=35, return_tensors="pt")
        read = self.reader(
            input_ids=tokens["input_ids"].to(where.device),
            attention_mask=tokens["attention_mask"].to(where.device),
            encoder_hidden_states=patches,
            encoder_attention_mask=torch.ones(patches.shape[:2], dtype=torch.long, device=where.device),
            is_decoder=False,
        )
        return (self.head(read.last_hidden_state[:, 0])[:, 0].float() - MEAN) / STD


def load(name: str, source: str | None, device: torch.device | str, dtype: torch.dtype) -> ImageReward:
    """From the hub, or from a folder with ImageReward.pt, med_config.json and BERT's tokenizer."""
    from transformers import AutoTokenizer

    source = source or HUB
    text = read_json(find(name, source, "med_config.json"))
    file = find(name, source, "ImageReward.pt")
    words = source if Path(source).is_dir() else TOKENIZER
    find(name, words, "tokenizer_config.json")
    with one_line(name, source):
        weights = torch.load(file, map_location="cpu", weights_only=True)
        return ImageReward(name, weights, text, AutoTokenizer.from_pretrained(words)).to(device, dtype)
