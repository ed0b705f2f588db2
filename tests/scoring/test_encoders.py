"""Encoders, on tiny random models of the real classes loaded through from_pretrained."""

import logging
from http.server import BaseHTTPRequestHandler

import pytest
import torch
from transformers import SiglipVisionModel

from ref.scoring.encoders import fit, load_encoder, to_bytes

from .tools import PROMPTS, Calls, pil


def test_pixels_are_rounded_to_the_nearest_of_256_levels():
    levels = torch.arange(256)
    assert torch.equal(to_bytes(levels / 255), levels.to(torch.uint8))
    assert torch.equal(to_bytes((levels + 0.4) / 255), levels.to(torch.uint8))
    assert to_bytes(torch.tensor([-0.1, 1.1, 0.6 / 255])).tolist() == [0, 255, 1]


@pytest.mark.parametrize("name", ["pickscore", "dino", "siglip", "open_clip"])
def test_features_are_those_of_the_library_on_pil_images(name, encoders, folders, images):
    """Oracle: the folder's own processor (Pillow's resampling) and model, used as their documentation says."""
    import open_clip
    import transformers

    with torch.no_grad():
        if name == "open_clip":
            model, _, preprocess = open_clip.create_model_and_transforms(f"local-dir:{folders['open_clip']}")
            expected = model.eval().encode_image(torch.stack([preprocess(p) for p in pil(images)]))
        else:
            folder = folders["clip" if name == "pickscore" else name]
            model = transformers.AutoModel.from_pretrained(folder).eval()
            processor = transformers.AutoImageProcessor.from_pretrained(folder, backend="pil")
            pixels = processor(images=pil(images), return_tensors="pt")["pixel_values"]
            if name == "dino":
                expected = model(pixel_values=pixels).last_hidden_state[:, 0]
            else:
                expected = model.get_image_features(pixel_values=pixels).pooler_output
    got = encoders[name](images)
    assert got.dtype == torch.float32 and got.shape == expected.shape
    torch.testing.assert_close(got.norm(dim=1), torch.ones(5))
    cosine = torch.nn.functional.cosine_similarity(got, expected)
    assert cosine.min() > 1 - 1e-4  # one grey level of rounding in the resampling
    others = torch.nn.functional.cosine_similarity(got, expected.roll(1, 0))
    assert others.max() < cosine.min()  # and the images differ by more than that


@pytest.mark.parametrize("name", ["pickscore", "dino", "siglip", "open_clip"])
def test_features_do_not_depend_on_the_batch(name, encoders, images):
    encoder = encoders[name]
    whole, order = encoder(images), torch.tensor([3, 0, 4, 2, 1])
    torch.testing.assert_close(encoder(images[order]), whole[order], atol=1e-6, rtol=0)
    alone = torch.cat([encoder(image[None]) for image in images])
    torch.testing.assert_close(alone, whole, atol=1e-6, rtol=0)
    before, encoder.micro_batch = encoder.micro_batch, 2
    torch.testing.assert_close(encoder(images.clone()), whole, atol=1e-6, rtol=0)
    encoder.micro_batch = before


@pytest.mark.parametrize("mode", ["shortest", "longest", "squash"])
@pytest.mark.parametrize("size", [(40, 40), (24, 40)])
def test_fit_is_open_clip_s_own_transform(mode, size, images):
    """Against open_clip's Pillow pipeline; a grey level of rounding on smooth pictures is allowed."""
    from open_clip.transform import image_transform

    own = image_transform(size, False, mean=(0.0,) * 3, std=(1.0,) * 3, resize_mode=mode, fill_color=0)
    expected = torch.stack([own(picture) for picture in pil(images)]) * 255
    got = fit(to_bytes(images), size, mode, "bicubic", 0)
    assert got.shape == expected.shape
    assert (got - expected).abs().max() <= 2 and (got - expected).abs().mean() < 0.5


@pytest.mark.parametrize("name, folder", [("pickscore", "clip"), ("dino", "dino"), ("open_clip", "open_clip")])
def test_bfloat16_changes_features_little_and_keeps_them_float32(name, folder, folders, encoders, images):
    encoder = load_encoder(f"{name}={folders[folder]}", dtype=torch.bfloat16)
    pairs = [(encoder(images), encoders[name](images))]
    if name != "dino":
        pairs.append((encoder.text(PROMPTS), encoders[name].text(PROMPTS)))
    for half, single in pairs:
        assert half.dtype == torch.float32
        torch.testing.assert_close(half.norm(dim=1), torch.ones(5))
        torch.testing.assert_close(half, single, atol=0.03, rtol=0)


def test_the_last_images_are_encoded_once_until_they_change(encoders, images):
    encoder = encoders["pickscore"]
    calls = Calls(encoder.model.vision_model)
    first = encoder(images)
    assert encoder(images) is first and calls.count == 1
    encoder(images.clone())
    assert calls.count == 2  # equal is not identical: the same object is the promise
    encoder(images)
    images[0].zero_()  # a write in place
    assert not torch.equal(encoder(images)[0], first[0]) and calls.count == 4
    calls.hook.remove()


def test_a_nan_image_has_nan_features_and_harms_no_neighbour(encoders, images):
    clean = encoders["dino"](images)
    images[2, 0, 5, 5] = torch.nan
    features = encoders["dino"](images)
    assert features[2].isnan().all()
    torch.testing.assert_close(features[[0, 1, 3, 4]], clean[[0, 1, 3, 4]])


def test_encoders_are_frozen_and_deterministic(encoders, images):
    for encoder in encoders.values():
        assert not encoder.training and not any(p.requires_grad for p in encoder.parameters())
        assert torch.equal(encoder(images.clone()), encoder(images.clone()))
        assert not encoder(images.clone().requires_grad_()).requires_grad


@pytest.mark.parametrize(
    "name, message",
    [
        ("picscore", "unknown encoder 'picscore'; did you mean pickscore\\? choose pickscore, clip,"),
        ("open_clip", "unknown encoder"),
        ("open_clip:ViT-B-32/nowhere", "known for this model: openai, "),
        ("pickscore=/nowhere", "there is no folder /nowhere"),
        ("pickscore={dino}", "holds a model of type dinov2, not clip"),
        ("dino={clip}", "holds a model of type clip, not dinov2"),
        ("open_clip={clip}", "has no open_clip_config.json"),
        ("hpsv2={clip}", "has no HPS_v2.1_compressed.pt"),
    ],
)
def test_a_wrong_encoder_gets_one_line(name, message, folders):
    with pytest.raises((ValueError, OSError), match=message.replace("(", r"\(")) as caught:
        load_encoder(name.format(**folders))
    assert "\n" not in str(caught.value)


def test_missing_weights_are_not_drawn_at_random(folders, tmp_path):
    from safetensors.torch import load_file, save_file

    for file in folders["dino"].iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    weights = load_file(tmp_path / "model.safetensors")
    weights.pop("layernorm.weight")
    save_file(weights, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(ValueError, match="lacks the weight layernorm.weight"):
        load_encoder(f"dino={tmp_path}")
    (tmp_path / "model.safetensors").write_bytes(b"not weights")
    with pytest.raises(OSError, match=f"cannot load dino={tmp_path}"):
        load_encoder(f"dino={tmp_path}")
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(OSError, match="no file named model.safetensors"):
        load_encoder(f"dino={tmp_path}")


class Hub(BaseHTTPRequestHandler):
    """Answers as huggingface.co does for a gated, and for a missing repository."""

    def do_HEAD(self):
        gated = "gated" in self.path
        self.send_response(403 if gated else 404)
        self.send_header("X-Error-Code", "GatedRepo" if gated else "RepoNotFound")
        self.end_headers()

    do_GET = do_HEAD

    def log_message(self, *_):
        pass


def test_a_gated_and_a_missing_repository_are_named_with_the_remedy(serve, monkeypatch, tmp_path):
    import huggingface_hub.constants

    url = serve(Hub)
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", url)
    template = url + "/{repo_id}/resolve/{revision}/{filename}"
    monkeypatch.setattr(huggingface_hub.constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(OSError, match="accept its licence at https://huggingface.co/some/gated-model") as caught:
        load_encoder("clip=some/gated-model")
    assert "hf auth login" in str(caught.value) and "\n" not in str(caught.value)
    with pytest.raises(OSError, match="some/model is neither a folder nor a public model"):
        load_encoder("dino=some/model")


def test_a_siglip_with_its_text_tower_is_loaded_without_a_warning(folders):
    """As it lies on the hub; transformers names every weight of the tower that is not asked for."""
    said = []
    handler = logging.Handler()
    handler.emit = said.append
    logger = logging.getLogger("transformers")
    logger.addHandler(handler)
    try:
        load_encoder(f"siglip={folders['siglip']}")
        assert not said
        SiglipVisionModel.from_pretrained(folders["siglip"])
        assert "UNEXPECTED" in said[0].getMessage()
    finally:
        logger.removeHandler(handler)
