"""Tiny random models of the real classes, pictures, and a local server."""

from pathlib import Path

import pytest
import torch

from ref.models import tiny
from ref.scoring.encoders import load_encoder, to_bytes

from .tools import open_clip_folder, siglip


@pytest.fixture(scope="session")
def folders(tmp_path_factory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("models")
    return {
        "clip": tiny.clip(root / "clip"),
        "dino": tiny.dino(root / "dino"),
        "siglip": siglip(root / "siglip"),
        "open_clip": open_clip_folder(root / "open_clip"),
    }


@pytest.fixture(scope="session")
def encoders(folders) -> dict:
    return {
        "pickscore": load_encoder(f"pickscore={folders['clip']}"),
        "dino": load_encoder(f"dino={folders['dino']}"),
        "siglip": load_encoder(f"siglip={folders['siglip']}"),
        "open_clip": load_encoder(f"open_clip={folders['open_clip']}"),
    }


@pytest.fixture
def images(rng) -> torch.Tensor:
    """Smooth random pictures: five of 48 x 64 pixels, with values of 8 bits."""
    coarse = torch.rand(5, 3, 6, 8, generator=rng)
    smooth = torch.nn.functional.interpolate(coarse, size=(48, 64), mode="bilinear")
    return to_bytes(smooth).float() / 255


@pytest.fixture
def hps(folders):
    """open_clip's registry with a tiny ViT-H-14, as its add_model_config allows."""
    import open_clip

    config = open_clip.get_model_config("ViT-H-14")
    open_clip.add_model_config(folders["open_clip"] / "ViT-H-14.json")
    yield f"hpsv2={folders['open_clip']}"
    open_clip.factory._MODEL_CONFIGS["ViT-H-14"] = config
