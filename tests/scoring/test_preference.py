"""Networks that judge: PickScore, HPSv2, CLIP scores, the aesthetic predictor, against their own libraries."""

from pathlib import Path

import pytest
import torch

from ref.scoring.encoders import HPS_FILE
from ref.scoring.load import AESTHETIC_FILE, load_reward

from .tools import PROMPTS, pil


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
