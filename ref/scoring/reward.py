"""What all rewards share: images [B, 3, H, W] in [0, 1] and prompts [B] -> scores [B], float32."""

import io

import torch
from jaxtyping import Float
from PIL import Image
from torch import Tensor, nn

from ref.scoring.encoders import blank_bad, to_bytes


class Reward(nn.Module):
    """A subclass gives `score(images, prompts) -> [B]`; no sample's score depends on the others.

    Where it asks something of prompts, `check_prompts` raises a ValueError for those it cannot judge: it is called
    with all prompts of training and evaluation before anything is loaded.
    """

    def __init__(self, name: str):
        super().__init__()
        self.name = name

    @staticmethod
    def check_prompts(prompts: list[str]) -> None:
        """Every prompt will do."""

    @torch.no_grad()
    def forward(self, images: Float[Tensor, "B 3 H W"], prompts: list[str]) -> Float[Tensor, " B"]:
        if len(images) != len(prompts):
            raise ValueError(f"{self.name} needs one prompt for each image, got {len(images)} and {len(prompts)}")
        return blank_bad(self.score(images, prompts).float().to(images.device), images)


def pictures(images: Tensor) -> list[Image.Image]:
    return [Image.fromarray(image.permute(1, 2, 0).numpy()) for image in to_bytes(images).cpu()]


def encoded(picture: Image.Image, kind: str, **options) -> bytes:
    stream = io.BytesIO()
    picture.save(stream, kind, **options)
    return stream.getvalue()
