"""ImageReward, against golden scores of its authors' code."""

import json
import math

import torch

from ref.scoring.load import load_reward

from ..tools import DATA


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

    golden = json.loads((DATA / "image_reward.json").read_text())
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
    # Two evaluations in float32 of the same sums: 3,912 products in all from a pixel or word to the score, at most
    # (every matrix's row length, added up), of numbers whose sum is about 1. A prompt in the wrong place is 0.2 off.
    tolerance = sum(math.prod(shape[1:]) for shape in golden["shapes"].values()) * torch.finfo(torch.float32).eps
    assert tolerance < 1e-3
    torch.testing.assert_close(reward(images, [one, two, one]), torch.tensor(golden["scores"]), atol=tolerance, rtol=0)
    permuted = torch.tensor(golden["scores_permuted"])
    torch.testing.assert_close(reward(images, [two, one, one]), permuted, atol=tolerance, rtol=0)
    reward.micro_batch = 2
    torch.testing.assert_close(reward(images, [two, one, one]), permuted, atol=tolerance, rtol=0)
