"""What `load` refuses."""

import pytest
import torch

from ref.models.load import load

from .tools import PROMPTS, fresh


@pytest.mark.parametrize(
    "kind, size, message",
    [
        ("sd3", (40, 64), "height must be a multiple of 16 up to 256, got 40; the nearest is 32"),
        ("sd3", (64, 512), "width must be a multiple of 16 up to 256, got 512; the nearest is 256"),
        ("flux", (64, 63), "width must be a multiple of 16, got 63; the nearest is 64"),
        ("flux", (0, 64), "height must be a multiple of 16, got 0; the nearest is 16"),
    ],
)
def test_an_image_size_that_the_model_refuses(folders, kind, size, message):
    with pytest.raises(ValueError, match=message):
        fresh(folders, kind, height=size[0], width=size[1])


def test_bad_folders_and_classes_are_named(folders, tmp_path):
    with pytest.raises(OSError, match="there is no folder /nowhere/at/all; a model is a folder, a hub id or sd35_med"):
        load("/nowhere/at/all", PROMPTS)
    with pytest.raises(OSError, match="no model_index.json"):
        load(tmp_path, PROMPTS)
    (tmp_path / "model_index.json").write_text('{"_class_name": "StableDiffusionXLPipeline"}')
    with pytest.raises(ValueError, match="is a StableDiffusionXLPipeline; training knows StableDiffusion3Pipeline and"):
        load(tmp_path, PROMPTS)
    (tmp_path / "model_index.json").write_text('{"_class_name": "FluxPipeline"}')
    with pytest.raises(OSError, match="must be a whole diffusers pipeline") as caught:
        load(tmp_path, PROMPTS)
    assert "\n" not in str(caught.value)
    with pytest.raises(ValueError, match="float16 overflows"):
        fresh(folders, "flux", dtype=torch.float16)
