"""Encoders and rewards, on tiny random models of the real classes loaded through from_pretrained."""

import json
import math
import threading
from functools import cache
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageDraw, ImageFont

from ref.models import tiny
from ref.scoring.encoders import HPS_FILE, fit, load_encoder, to_bytes
from ref.scoring.load import AESTHETIC_FILE, WeightedSum, load_reward
from ref.scoring.reward import Reward
from ref.scoring.rules import JPEG, likeness, quoted
from ref.scoring.unified_reward import UnifiedReward, ratings

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


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("models")
    return {
        "clip": tiny.clip(root / "clip"),
        "dino": tiny.dino(root / "dino"),
        "siglip": siglip(root / "siglip"),
        "open_clip": open_clip_folder(root / "open_clip"),
    }


@pytest.fixture(scope="module")
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


def pil(images: torch.Tensor) -> list[Image.Image]:
    return [Image.fromarray(i.permute(1, 2, 0).numpy()) for i in to_bytes(images)]


class Calls:
    """Counts the forward passes of a network while they happen."""

    def __init__(self, network):
        self.count = 0
        self.hook = network.register_forward_hook(self.add)

    def add(self, *_):
        self.count += 1


# Encoders


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
        ("picscore", "unknown encoder 'picscore'; choose pickscore, clip,"),
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


@pytest.fixture
def serve():
    """Starts a local server with the given handler, returns its address."""
    servers = []

    def start(handler, port: int = 0) -> str:
        server = ThreadingHTTPServer(("127.0.0.1", port), handler)
        threading.Thread(target=server.serve_forever, daemon=True).start()
        servers.append(server)
        return f"http://127.0.0.1:{server.server_port}"

    yield start
    for server in servers:
        server.shutdown()
        server.server_close()


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


# Rewards of models


@pytest.fixture
def hps(folders):
    """open_clip's registry with a tiny ViT-H-14, as its add_model_config allows."""
    import open_clip

    config = open_clip.get_model_config("ViT-H-14")
    open_clip.add_model_config(folders["open_clip"] / "ViT-H-14.json")
    yield f"hpsv2={folders['open_clip']}"
    open_clip.factory._MODEL_CONFIGS["ViT-H-14"] = config


def test_pickscore_is_the_cosine_of_the_two_towers(folders, images):
    """Oracle: CLIPModel's own logits, which are logit_scale times the cosine, on the diagonal."""
    from transformers import CLIPModel, CLIPProcessor

    reward = load_reward(f"pickscore={folders['clip']}")
    model, processor = (kind.from_pretrained(folders["clip"]) for kind in (CLIPModel, CLIPProcessor))
    inputs = processor(text=PROMPTS, images=pil(images), return_tensors="pt", padding=True)
    with torch.no_grad():
        logits = model.eval()(**inputs).logits_per_image / model.logit_scale.exp()
    got = reward(images, PROMPTS)
    assert got.dtype == torch.float32
    torch.testing.assert_close(got, logits.diag(), atol=1e-5, rtol=0)
    assert (logits.diag() - logits.roll(1, 1).diag()).abs().min() > 1e-3  # another prompt has another score


def test_hpsv2_pads_to_a_square_and_takes_the_cosine(hps, folders, images):
    import open_clip

    reward = load_reward(hps)
    assert reward.encoder.recipe["resize_mode"] == "longest"
    model = open_clip.create_model("ViT-H-14", str(folders["open_clip"] / HPS_FILE)).eval()
    own = open_clip.transform.image_transform(32, False, resize_mode="longest")  # OpenAI's mean and std
    with torch.no_grad():
        x = model.encode_image(torch.stack([own(p) for p in pil(images)]), normalize=True)
        c = model.encode_text(open_clip.get_tokenizer("ViT-B-32")(PROMPTS), normalize=True)
    torch.testing.assert_close(reward(images, PROMPTS), (x * c).sum(1), atol=1e-3, rtol=0)


def test_hpsv2_refuses_a_pickle_that_runs_code(hps, folders, tmp_path):
    class Trap:
        def __reduce__(self):
            return (Path.touch, (tmp_path / "sprung",))

    torch.save({"state_dict": Trap()}, tmp_path / HPS_FILE)
    with pytest.raises(OSError, match=f"cannot load hpsv2={tmp_path} from .*Weights only load failed") as caught:
        load_reward(f"hpsv2={tmp_path}")
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "sprung").exists()


def test_clip_score_takes_any_encoder_that_reads(folders, images):
    score = load_reward(f"clip_score=open_clip={folders['open_clip']}")
    expected = (score.encoder(images) * score.encoder.text(PROMPTS)).sum(1)
    torch.testing.assert_close(score(images, PROMPTS), expected)
    with pytest.raises(ValueError, match="dino=.* reads no text"):
        load_reward(f"clip_score=dino={folders['dino']}")


def test_aesthetic_is_the_published_head_on_siglip(folders, images):
    """Oracle: the head collapsed into one affine map, on AutoModel's pooled features."""
    from transformers import AutoImageProcessor, AutoModel

    reward = load_reward(f"aesthetic={folders['siglip']}")
    head = torch.load(folders["siglip"] / AESTHETIC_FILE)
    w, b = torch.eye(32), torch.zeros(32)
    for i in range(0, 10, 2):
        weight, bias = head[f"scoring_head.{i}.weight"], head[f"scoring_head.{i}.bias"]
        w, b = weight @ w, weight @ b + bias
    model = AutoModel.from_pretrained(folders["siglip"]).eval()
    pixels = AutoImageProcessor.from_pretrained(folders["siglip"])(images=pil(images), return_tensors="pt")
    with torch.no_grad():
        features = model.get_image_features(**pixels).pooler_output
    expected = features / features.norm(dim=1, keepdim=True) @ w.T + b
    torch.testing.assert_close(reward(images, PROMPTS), expected[:, 0], atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(reward(images, PROMPTS), reward(images, PROMPTS[::-1]))  # reads no prompt


def sines(key: str, shape: list[int]) -> torch.Tensor:
    """The weights on which tests/data/image_reward.json was made."""
    count, s = math.prod(shape), sum(ord(c) * (i + 1) for i, c in enumerate(key)) % 1000 / 1000
    wave = torch.sin(torch.arange(count, dtype=torch.float64) * (1.3 + s) + 7 * s).view(shape)
    if key.endswith("weight") and "norm" in key.lower():
        return (1 + 0.2 * wave).float()
    return (wave * (0.1 if key.endswith("bias") else 4 / math.sqrt(shape[-1]) if len(shape) > 1 else 0.3)).float()


def test_image_reward_is_what_its_authors_code_computes(tmp_path):
    """Golden scores of image-reward 1.5's classes, tiny; they change when a prompt changes place."""
    from transformers import BertTokenizer

    golden = json.loads((Path(__file__).parent / "data" / "image_reward.json").read_text())
    weights = {key: sines(key, shape) for key, shape in golden["shapes"].items() if "position_ids" not in key}
    weights["blip.text_encoder.embeddings.position_ids"] = torch.arange(40)[None]
    torch.save(weights, tmp_path / "ImageReward.pt")
    (tmp_path / "med_config.json").write_text(json.dumps(golden["med_config"]))
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", *(f"w{i}" for i in range(4, 60))]
    BertTokenizer({word: i for i, word in enumerate(words)}).save_pretrained(tmp_path)

    reward = load_reward(f"image_reward={tmp_path}")
    wave = torch.arange(3 * 3 * 32 * 32, dtype=torch.float64).mul(0.37).sin() * 0.5 + 0.5
    images = ((wave * 255).round() / 255).float().view(3, 3, 32, 32)
    one, two = "w10 w11 w12", "w20 w21"
    torch.testing.assert_close(reward(images, [one, two, one]), torch.tensor(golden["scores"]), atol=5e-6, rtol=0)
    permuted = torch.tensor(golden["scores_permuted"])
    torch.testing.assert_close(reward(images, [two, one, one]), permuted, atol=5e-6, rtol=0)
    reward.micro_batch = 2
    torch.testing.assert_close(reward(images, [two, one, one]), permuted, atol=5e-6, rtol=0)


def test_each_image_is_scored_with_its_own_prompt_whatever_the_batch(folders, hps, images):
    for name in (f"pickscore={folders['clip']}", hps, f"aesthetic={folders['siglip']}", "jpeg"):
        reward = load_reward(name)
        whole, order = reward(images, PROMPTS), [4, 2, 0, 1, 3]
        shuffled = reward(images[order], [PROMPTS[i] for i in order])
        torch.testing.assert_close(shuffled, whole[order], atol=1e-6, rtol=0)
        halves = torch.cat([reward(images[:2], PROMPTS[:2]), reward(images[2:], PROMPTS[2:])])
        torch.testing.assert_close(halves, whole, atol=1e-6, rtol=0)
    with pytest.raises(ValueError, match="one prompt for each image, got 5 and 4"):
        reward(images, PROMPTS[:4])


def test_phi_and_a_reward_of_the_same_model_share_one_forward_pass(folders, images):
    name = f"pickscore={folders['clip']}"
    phi = load_encoder(name)
    shared, separate = load_reward(f"{name}+jpeg:0.5", encoders=[phi]), load_reward(f"{name}+jpeg:0.5")
    calls, text = Calls(phi.model.vision_model), Calls(phi.model.text_model)
    for iteration in range(3):
        batch = images + 0.01 * iteration
        value = shared(batch, PROMPTS)
        phi(batch)
        assert calls.count == iteration + 1 and text.count == iteration + 1
        torch.testing.assert_close(value, separate(batch, PROMPTS))
    assert separate.rewards[0].encoder is not phi
    other = load_reward(f"clip_score=clip={folders['clip']}", encoders=[phi])
    assert other.encoder is not phi  # another name is another model


# Rule-based rewards


@cache
def ocr() -> Reward:
    return load_reward("ocr")


def written(text: str, size: int = 192) -> torch.Tensor:
    picture = Image.new("RGB", (size, size), "white")
    ImageDraw.Draw(picture).multiline_text((12, size // 3), text, "black", ImageFont.load_default(size // 8))
    return torch.from_numpy(np.array(picture)).permute(2, 0, 1).float() / 255


def test_ocr_reads_rendered_text():
    images = torch.stack([written("Open Door"), written("Open\nDoor"), written("Closed"), written("")])
    prompts = ['a sign that says "open door"'] * 4
    right, two_lines, wrong, empty = ocr()(images, prompts).tolist()
    assert right == two_lines == 1
    assert 0 <= wrong < 0.5 and empty == 0
    own = ocr()(images[1:3], ["a poster: “OPEN” and “DOOR”", 'the word "closed" in black'])
    assert own.tolist() == [1, 1]


def test_ocr_needs_quoted_text():
    assert quoted('a neon "Blue Note" over "BAR"') == "Blue Note BAR"
    for prompt in ("a sign without text", 'an empty "" quote', 'blank " " quote'):
        with pytest.raises(ValueError, match="needs a prompt with the text in double quotes, got"):
            ocr()(torch.ones(1, 3, 32, 32), [prompt])


letters = st.text("abC ", max_size=7)


@settings(max_examples=150, deadline=None)
@given(letters.filter(str.strip), letters)
def test_likeness_is_one_minus_the_normalised_edit_distance(target, read):
    """Oracle: the recursive definition of Levenshtein's distance."""
    a, b = target.lower().replace(" ", ""), read.lower().replace(" ", "")

    @cache
    def distance(i: int, j: int) -> int:
        if min(i, j) == 0:
            return max(i, j)
        edits = distance(i - 1, j) + 1, distance(i, j - 1) + 1, distance(i - 1, j - 1) + (a[i - 1] != b[j - 1])
        return min(edits)

    assert likeness(target, read) == pytest.approx(1 - distance(len(a), len(b)) / max(len(a), len(b)))


def test_jpeg_prefers_flat_images_and_measures_the_file(rng, tmp_path):
    flat, noise = torch.full((1, 3, 64, 64), 0.4), torch.rand(1, 3, 64, 64, generator=rng)
    smooth = torch.linspace(0, 1, 64).expand(1, 3, 64, 64)
    scores = JPEG("jpeg")(torch.cat([flat, smooth, noise]), [""] * 3)
    assert 1 > scores[0] > scores[1] > scores[2] > 0
    pil(noise)[0].save(tmp_path / "noise.jpg", quality=95)
    size = (tmp_path / "noise.jpg").stat().st_size
    assert scores[2].item() == pytest.approx(1 - size / (3 * 64 * 64))


# Sums


def test_a_weighted_sum_is_the_sum_and_names_what_went_wrong(folders, images):
    name = f"pickscore={folders['clip']}"
    total = load_reward(f"pickscore:0.7={folders['clip']}+jpeg:-0.3")
    expected = 0.7 * load_reward(name)(images, PROMPTS) - 0.3 * load_reward("jpeg")(images, PROMPTS)
    torch.testing.assert_close(total(images, PROMPTS), expected)
    assert total.name == "0.7 pickscore + -0.3 jpeg"

    class Broken(Reward):
        def score(self, images, prompts):
            return torch.tensor([torch.nan if prompt == "seven" else 1.0 for prompt in prompts])

    with pytest.raises(ValueError, match="broken returned a NaN or infinite value for the prompt 'seven'"):
        WeightedSum([(1.0, JPEG("jpeg")), (0.0, Broken("broken"))])(images, PROMPTS)


def test_a_nan_image_has_a_nan_score_in_every_reward(folders, images):
    images[1] = torch.nan
    for name in (f"pickscore={folders['clip']}", "jpeg"):
        assert load_reward(name)(images, PROMPTS).isnan().tolist() == [False, True, False, False, False]


@pytest.mark.parametrize(
    "specification, message",
    [
        ("", "unknown reward ''"),
        ("pikscore", "unknown reward 'pikscore'; write NAME"),
        ("jpeg+", "unknown reward ''"),
        ("jpeg:half", "the weight of jpeg must be a number, as in jpeg:0.5"),
        ("jpeg:nan", "the weight of jpeg must be a number"),
        ("jpeg:", "the weight of jpeg must be a number"),
        ("jpeg:0.3+ocr:0,7", "the weight of ocr must be a number"),
        ("pickscore=/nowhere", "there is no folder /nowhere"),
        ("aesthetic={clip}", "holds a model of type clip, not siglip"),
        ("image_reward={clip}", "has no med_config.json"),
    ],
)
def test_a_wrong_specification_gets_one_line(specification, message, folders):
    with pytest.raises((ValueError, OSError), match=message) as caught:
        load_reward(specification.format(**folders))
    assert "\n" not in str(caught.value)


# UnifiedReward, against a real server


def judge(fail_first: int = 0, answer: str = "", status: int = 500, seen: list | None = None):
    """A server like vLLM's: it fails `fail_first` times, then rates a picture by its brightness."""
    failures = iter(range(fail_first))

    class Handler(BaseHTTPRequestHandler):
        def reply(self, status: int, body: dict) -> None:
            content = json.dumps(body).encode()
            self.send_response(status)
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)

        def do_GET(self):
            self.reply(200, {"data": [{"id": "the-served-name"}]})

        def do_POST(self):
            request = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            if seen is not None:
                seen.append(request)
            if next(failures, None) is not None:
                return self.reply(status, {"error": "overloaded"})
            link = request["messages"][0]["content"][0]["image_url"]["url"]
            import base64
            import io

            picture = Image.open(io.BytesIO(base64.b64decode(link.partition(",")[2])))
            light = 1 + 4 * np.array(picture).mean() / 255
            text = answer or f"Alignment Score (1-5): {light:.3f}\nCoherence Score (1-5): 3\nStyle Score (1-5): 3"
            return self.reply(200, {"choices": [{"message": {"content": text}}]})

        def log_message(self, *_):
            pass

    return Handler


def test_unified_reward_asks_about_each_image_with_its_prompt(serve):
    seen = []
    reward = load_reward(f"unified_reward={serve(judge(seen=seen))}/v1")
    images = torch.tensor([0.0, 1.0, 0.4]).view(3, 1, 1, 1).expand(3, 3, 8, 8)
    got = reward(images, ["black", "white {braces}", "grey"])
    expected = torch.tensor([(1 + 4 * light + 6) / 3 for light in (0.0, 1.0, 0.4)])
    torch.testing.assert_close(got, expected, atol=1e-3, rtol=0)
    asked = {request["messages"][0]["content"][1]["text"].splitlines()[-1] for request in seen}
    assert asked == {"Caption: black", "Caption: white {braces}", "Caption: grey"}
    assert {request["model"] for request in seen} == {"the-served-name"}


def test_unified_reward_tries_again_then_names_the_server(serve):
    images, prompts = torch.ones(1, 3, 8, 8), ["white"]
    seen = []
    url = serve(judge(fail_first=2, seen=seen))
    assert UnifiedReward("u", url, attempts=3, wait=0.001)(images, prompts).item() == pytest.approx(11 / 3)
    assert len(seen) == 3

    seen.clear()
    url = serve(judge(fail_first=9, seen=seen))
    with pytest.raises(OSError, match=f"u: no answer from {url} after 3 attempts .HTTP 500.*vllm serve ") as caught:
        UnifiedReward("u", url, attempts=3, wait=0.001)(images, prompts)
    assert len(seen) == 3 and "\n" not in str(caught.value)

    seen.clear()  # what asking again cannot mend is said at once
    url = serve(judge(fail_first=9, status=404, seen=seen))
    with pytest.raises(OSError, match="after 1 attempts .HTTP 404.*overloaded"):
        UnifiedReward("u", url, attempts=3, wait=0.001)(images, prompts)
    assert len(seen) == 1

    url = serve(judge(answer="I like it."))
    with pytest.raises(OSError, match="no alignment score from 1 to 5 in the answer 'I like it.'"):
        UnifiedReward("u", url, attempts=2, wait=0.001)(images, prompts)


def test_a_server_that_is_down_is_named_before_anything_is_sampled():
    with pytest.raises(OSError, match="no answer from http://127.0.0.1:9 after 2 attempts .*refused.*vllm serve"):
        UnifiedReward("unified_reward", "http://127.0.0.1:9", attempts=2, wait=0.001)


def test_ratings_read_the_forms_in_which_the_model_answers():
    assert ratings("Alignment Score (1-5): 2.4\nCoherence Score (1-5): 3.1\nStyle Score (1-5): 3.5") == pytest.approx(3)
    assert ratings("- **Alignment**: 4/5\n- **Coherence**: 3.5/5\n- **Style**: 4.5/5") == pytest.approx(4)
    for answer in ("", "Alignment Score (1-5): 2\nStyle Score (1-5): 3", "Alignment: 7\nCoherence: 3\nStyle: 3"):
        with pytest.raises(ValueError, match="score from 1 to 5"):
            ratings(answer)
