"""UnifiedReward (arXiv 2503.05236), a vision-language model behind an OpenAI-compatible server that the user starts:

    pip install vllm        # in an environment of its own
    vllm serve CodeGoat24/UnifiedReward-2.0-qwen3vl-8b --max-model-len 8192 --port 8080

Version 2 judges alignment with the caption, coherence and style, each from 1 to 5; the reward is their
mean. The question is in our own words, with the answer's three lines as the model knows them, so scores
can differ a little from those that the authors' template gives.
"""

import base64
import ipaddress
import json
import re
import socket
import time
import urllib.error
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from urllib.parse import urlsplit

import torch
from jaxtyping import Float
from PIL import Image
from torch import Tensor

from ref.scoring.reward import Reward, encoded, pictures

MODEL = "CodeGoat24/UnifiedReward-2.0-qwen3vl-8b"
URL = "http://localhost:8080/v1"


class UnifiedReward(Reward):
    """The server at `url` is asked for its model's name at once, so that one that is down stops the run before it starts.

    Raises OSError, after `attempts` tries with waits of 1, 2, 4 .. times `wait` seconds, naming the server
    and the command that starts it. An answer without scores is asked for again, too.
    """

    question = (
        "Judge this generated image against its caption. Rate three things from 1 (worst) to 5 (best): "
        "alignment, how well the image shows what the caption says; coherence, how free it is of glitches and "
        "distorted objects; style, how beautiful it is whatever the caption says.\n"
        "Answer in exactly this form:\n"
        "Alignment Score (1-5): X\nCoherence Score (1-5): Y\nStyle Score (1-5): Z\n\n"
        "Caption: {prompt}"
    )

    def __init__(self, name: str, url: str, attempts: int = 5, wait: float = 1.0, timeout: float = 120.0):
        super().__init__(name)
        self.url, self.attempts, self.wait, self.timeout = url.rstrip("/"), attempts, wait, timeout
        direct = [urllib.request.ProxyHandler({})] if nearby(self.url) else []
        self.opener = urllib.request.build_opener(*direct)
        self.command = f"vllm serve {MODEL} --max-model-len 8192 --port {urlsplit(url).port or 80}"
        self.served = self.ask("models", None, lambda reply: reply["data"][0]["id"])

    def ask(self, path: str, body: dict | None, parse):
        """parse(the server's JSON), retried."""
        data = None if body is None else json.dumps(body).encode()
        for attempt in range(self.attempts):
            time.sleep(self.wait * 2 ** (attempt - 1) if attempt else 0)
            request = urllib.request.Request(f"{self.url}/{path}", data, {"Content-Type": "application/json"})
            try:
                with self.opener.open(request, timeout=self.timeout) as reply:
                    return parse(json.load(reply))
            except urllib.error.HTTPError as error:
                problem = f"HTTP {error.code} {' '.join(error.read(300).decode(errors='replace').split())}"
                if error.code < 500 and error.code not in (408, 429):  # asking again would not help
                    break
            except (OSError, ValueError, LookupError, TypeError) as error:
                problem = str(getattr(error, "reason", error)) or type(error).__name__
        raise OSError(
            f"{self.name}: no answer from {self.url} after {attempt + 1} attempts ({problem}); start it with: {self.command}"
        )

    def judge(self, picture: Image.Image, prompt: str) -> float:
        link = "data:image/png;base64," + base64.b64encode(encoded(picture, "PNG")).decode()
        content = [
            {"type": "image_url", "image_url": {"url": link}},
            {"type": "text", "text": self.question.format(prompt=prompt)},
        ]
        body = {"model": self.served, "messages": [{"role": "user", "content": content}], "temperature": 0, "max_tokens": 64}  # fmt: skip
        return self.ask("chat/completions", body, lambda reply: ratings(reply["choices"][0]["message"]["content"]))

    def score(self, images: Float[Tensor, "B 3 H W"], prompts: list[str]) -> Float[Tensor, " B"]:
        with ThreadPoolExecutor(16) as pool:  # the server batches what arrives together
            return torch.tensor(list(pool.map(self.judge, pictures(images), prompts)))


def nearby(url: str) -> bool:
    """Whether the server is on this machine or in its own network: no proxy that the environment names leads there."""
    host = urlsplit(url).hostname or ""
    try:
        return ipaddress.ip_address(host).is_private  # loopback and link-local addresses too
    except ValueError:  # a name; one without a dot is the machine's or its neighbour's
        return "." not in host or host.endswith((".localhost", ".local")) or host == socket.getfqdn()


def ratings(answer: str) -> float:
    """The mean of the three ratings in a UnifiedReward answer. Raises ValueError when one is missing or not in 1 .. 5."""
    total = 0.0
    for axis in ("alignment", "coherence", "style"):
        found = re.search(rf"{axis}(?: score)?\W*(\d+(?:\.\d+)?)", answer.replace("(1-5)", ""), re.IGNORECASE)
        if not found or not 1 <= float(found[1]) <= 5:
            raise ValueError(f"no {axis} score from 1 to 5 in the answer {answer[:200]!r}")
        total += float(found[1])
    return total / 3
