"""Rewards that a rule computes: text that can be read, and compressibility."""

from unicodedata import category

import torch
from jaxtyping import Float
from PIL import Image
from torch import Tensor

from ref.scoring.reward import Reward, encoded, pictures


class JPEG(Reward):
    """Compressibility: the share of the raw 3 H W bytes that JPEG at quality 95 saves. Flat images score highest."""

    def __init__(self, name: str, *_):
        super().__init__(name)

    def score(self, images: Float[Tensor, "B 3 H W"], prompts: list[str]) -> Float[Tensor, " B"]:
        sizes = [len(encoded(picture, "JPEG", quality=95)) for picture in pictures(images)]
        return 1 - torch.tensor(sizes) / images[0].numel()


class OCR(Reward):
    """1 - d(target, read) / max(|target|, |read|), d the edit distance, case and white space ignored.

    The target is all text in double quotes in the prompt, in order (`quoted`); RapidOCR reads the image from top to
    bottom. Its ONNX models come inside its package, so nothing is downloaded.
    """

    def __init__(self, name: str, *_):
        super().__init__(name)
        from rapidocr import RapidOCR

        # as many threads as torch has: eight processes on a machine share its cores
        threads = {"EngineConfig.onnxruntime.intra_op_num_threads": torch.get_num_threads()}
        self.engine = RapidOCR(params={"Global.log_level": "critical", **threads})

    @staticmethod
    def check_prompts(prompts: list[str]) -> None:
        for prompt in prompts:
            quoted(prompt)

    def read(self, picture: Image.Image) -> str:
        return " ".join(self.engine(picture).txts or ())

    def score(self, images: Float[Tensor, "B 3 H W"], prompts: list[str]) -> Float[Tensor, " B"]:
        targets = [quoted(prompt) for prompt in prompts]  # all, before the first image is read
        return torch.tensor([likeness(t, self.read(p)) for t, p in zip(targets, pictures(images))])


CLOSES = {'"': '"', "“": "”", "„": "“”", "”": "”"}  # opening quote -> what closes it; Swedish opens with ”


def quoted(prompt: str) -> str:
    """The text in double quotes, straight or curly, the pieces joined by a space.

    A mark right behind a digit, as in 12" or 6'2”, is inches where no quote is open; so is one with space on both
    sides behind a number. Raises ValueError in one line for a prompt without quoted text, and for quotes that do not
    pair, among them one that can only close where none is open.
    """
    text, found, opened = prompt.replace('\\"', '"'), [], None
    for place, mark in enumerate(text):
        before, after = text[:place], text[place + 1 :]
        if opened is not None:
            if mark in CLOSES[text[opened]]:
                found.append(text[opened + 1 : place].strip())
                opened = None
        elif mark in "“„":
            opened = place
        elif mark in CLOSES:
            apart = not after[:1].strip()
            if before[-1:].isdigit() or apart and before.rstrip()[-1:].isdigit():
                continue
            # behind a letter that words are spelled with, and before no word: it closes (Chinese has no such letters)
            if apart and before and not before[-1].isspace() or behind(before) and not after[:1].isalnum():
                raise unpaired(prompt)
            opened = place
    if opened is not None:
        raise unpaired(prompt)
    target = " ".join(filter(None, found))
    if not target:
        raise ValueError(f"the OCR reward needs a prompt with the text in double quotes, got {prompt!r}")
    return target


def behind(before: str) -> bool:
    """Whether a letter of a cased script comes last."""
    return bool(before) and category(before[-1]) in ("Lu", "Ll", "Lt")


def unpaired(prompt: str) -> ValueError:
    return ValueError(
        f"the OCR reward cannot pair the double quotes of {prompt!r}; close every quote, write inches out"
    )


def likeness(target: str, read: str) -> float:
    """1 - edit distance / length of the longer, case and white space ignored; the target is not empty."""
    a, b = ("".join(text.casefold().split()) for text in (target, read))
    row = list(range(len(b) + 1))  # distances from a prefix of a to all prefixes of b
    for i, letter in enumerate(a, 1):
        corner, row[0] = row[0], i
        for j, other in enumerate(b, 1):
            corner, row[j] = row[j], min(row[j] + 1, row[j - 1] + 1, corner + (letter != other))
    return 1 - row[-1] / max(len(a), len(b))
