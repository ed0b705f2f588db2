"""UnifiedReward (arXiv 2503.05236), a vision-language model behind an OpenAI-compatible server that the user starts:

    pip install vllm        # in an environment of its own
    vllm serve CodeGoat24/UnifiedReward-2.0-qwen3vl-8b --max-model-len 8192 --port 8080

vLLM takes 90 % of its GPU's memory unless it is told otherwise: give it a GPU of its own (CUDA_VISIBLE_DEVICES=7), or
`--gpu-memory-utilization 0.3` where it shares one with the training, which then has the rest.

Version 2 judges alignment with the caption, coherence and style, each from 1 to 5; the reward is their
mean. The question is in our own words, with the caption's and the answer's lines as the model knows them, so scores
can differ a little from those that the authors' template gives. An answer that was cut off is refused: its last
number would be read as another one.
"""

import re
from concurrent.futures import ThreadPoolExecutor
from urllib.parse import urlsplit

import torch
from jaxtyping import Float
from PIL import Image
from torch import Tensor

from ref.scoring.reward import pictures
from ref.scoring.served import Served, png

MODEL = "CodeGoat24/UnifiedReward-2.0-qwen3vl-8b"
URL = "http://localhost:8080/v1"
MOST_TOKENS = 256  # of an answer; three numbers of 15 decimals take 79


class UnifiedReward(Served):
    """The server is asked for its model's name at once, so that one that is down stops the run before it starts."""

    question = (
        "Judge this generated image against its caption. Rate three things from 1 (worst) to 5 (best): "
        "alignment, how well the image shows what the caption says; coherence, how free it is of glitches and "
        "distorted objects; style, how beautiful it is whatever the caption says.\n"
        "Answer in exactly this form:\n"
        "Alignment Score (1-5): X\nCoherence Score (1-5): Y\nStyle Score (1-5): Z\n\n"
        "Your task is provided as follows:\nText Caption: [{prompt}]"
    )

    def __init__(self, name: str, url: str, **options):
        super().__init__(name, url.rstrip("/"), **options)
        self.remedy = f"start it with: vllm serve {MODEL} --max-model-len 8192 --port {urlsplit(url).port or 80}"
        self.served = self.ask("/models", None, lambda reply: reply["data"][0]["id"])

    def judge(self, picture: Image.Image, prompt: str) -> float:
        link = f"data:image/png;base64,{png(picture)}"
        content = [
            {"type": "image_url", "image_url": {"url": link}},
            {"type": "text", "text": self.question.format(prompt=prompt)},
        ]
        body = {"model": self.served, "messages": [{"role": "user", "content": content}], "temperature": 0, "max_tokens": MOST_TOKENS}  # fmt: skip
        return self.ask("/chat/completions", body, lambda reply: whole(reply["choices"][0]))

    def score(self, images: Float[Tensor, "B 3 H W"], prompts: list[str]) -> Float[Tensor, " B"]:
        with ThreadPoolExecutor(16) as pool:  # the server batches what arrives together
            return torch.tensor(list(pool.map(self.judge, pictures(images), prompts)))


def whole(choice: dict) -> float:
    """The ratings of an answer. Raises ValueError where it was cut off."""
    if choice.get("finish_reason") == "length":
        raise ValueError(f"an answer was cut off after {MOST_TOKENS} tokens")
    return ratings(choice["message"]["content"])


def ratings(answer: str) -> float:
    """The mean of the three ratings in a UnifiedReward answer. Raises ValueError when one is missing or not in 1 .. 5."""
    total = 0.0
    for axis in ("alignment", "coherence", "style"):
        found = re.search(rf"{axis}(?: score)?\W*(\d+(?:\.\d+)?)", answer.replace("(1-5)", ""), re.IGNORECASE)
        if not found or not 1 <= float(found[1]) <= 5:
            raise ValueError(f"no {axis} score from 1 to 5 in the answer {answer[:200]!r}")
        total += float(found[1])
    return total / 3
