"""Rewards that a rule computes: text that can be read, and compressibility."""

import re

import torch
from jaxtyping import Float
from PIL import Image
from torch import Tensor

from ref.scoring.reward import Reward, encoded, pictures


class JPEG(Reward):
    """Compressibility: the share of the raw 3 H W bytes that JPEG at quality 95 saves. Flat images score highest."""

    def score(self, images: Float[Tensor, "B 3 H W"], prompts: list[str]) -> Float[Tensor, " B"]:
        sizes = [len(encoded(picture, "JPEG", quality=95)) for picture in pictures(images)]
        return 1 - torch.tensor(sizes) / images[0].numel()


class OCR(Reward):
    """1 - d(target, read) / max(|target|, |read|), d the edit distance, case and white space ignored.

    The target is all text in double quotes in the prompt, in order; RapidOCR reads the image from top to
    bottom. Its ONNX models come inside its package, so nothing is downloaded. Raises ValueError for a
    prompt without quoted text.
    """

    def __init__(self, name: str):
        super().__init__(name)
        from rapidocr import RapidOCR

        # as many threads as torch has: eight processes on a machine share its cores
        threads = {"EngineConfig.onnxruntime.intra_op_num_threads": torch.get_num_threads()}
        self.engine = RapidOCR(params={"Global.log_level": "critical", **threads})

    def read(self, picture: Image.Image) -> str:
        return " ".join(self.engine(picture).txts or ())

    def score(self, images: Float[Tensor, "B 3 H W"], prompts: list[str]) -> Float[Tensor, " B"]:
        targets = [quoted(prompt) for prompt in prompts]  # all, before the first image is read
        return torch.tensor([likeness(t, self.read(p)) for t, p in zip(targets, pictures(images))])


def quoted(prompt: str) -> str:
    """The text in double quotes, straight or curly."""
    found = " ".join(re.findall(r'["“”]([^"“”]*)["“”]', prompt)).strip()
    if not found:
        raise ValueError(f"the OCR reward needs a prompt with the text in double quotes, got {prompt!r}")
    return found


def likeness(target: str, read: str) -> float:
    """1 - edit distance / length of the longer, case and white space ignored; the target is not empty."""
    a, b = ("".join(text.casefold().split()) for text in (target, read))
    row = list(range(len(b) + 1))  # distances from a prefix of a to all prefixes of b
    for i, letter in enumerate(a, 1):
        corner, row[0] = row[0], i
        for j, other in enumerate(b, 1):
            corner, row[j] = row[j], min(row[j] + 1, row[j - 1] + 1, corner + (letter != other))
    return 1 - row[-1] / max(len(a), len(b))
