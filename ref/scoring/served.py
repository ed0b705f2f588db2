"""Rewards that a server gives: `--reward http://HOST:PORT/PATH` names one that speaks this.

    POST   {"images": ["iVBORw0...", ...], "prompts": ["a cat", ...]}     PNGs in base64, at most 32
    reply  [0.3, ...]                                                     a number for each

A server that fails is asked again after 1, 2, 4 and 8 s, then named; one that is down is named before anything is sampled.
"""

import base64
import http.client
import ipaddress
import json
import math
import socket
import time
import urllib.error
import urllib.request
from urllib.parse import urlsplit

import torch
from jaxtyping import Float
from PIL import Image
from torch import Tensor

from ref.scoring.reward import Reward, encoded, pictures

BATCH = 32  # images in a request


class Served(Reward):
    """A reward with a server at `url` behind it.

    `ask` raises OSError after `attempts` tries with waits of 1, 2, 4 .. times `wait` seconds, naming the server and the
    `remedy`. A reply that cannot be read is asked for again, too.
    """

    remedy = "start it, or give another address"
    waits = True  # asked in a thread of its own while the next samples are drawn (grpo.py)

    def __init__(self, name: str, url: str, attempts: int = 5, wait: float = 1.0, timeout: float = 120.0):
        super().__init__(name)
        self.url, self.attempts, self.wait, self.timeout = url, attempts, wait, timeout
        direct = [urllib.request.ProxyHandler({})] if nearby(self.url) else []
        self.opener = urllib.request.build_opener(*direct)

    def ask(self, path: str, body: dict | None, parse):
        """parse(the server's JSON), retried."""
        data = None if body is None else json.dumps(body).encode()
        for attempt in range(self.attempts):
            time.sleep(self.wait * 2 ** (attempt - 1) if attempt else 0)
            request = urllib.request.Request(self.url + path, data, {"Content-Type": "application/json"})
            try:
                with self.opener.open(request, timeout=self.timeout) as reply:
                    return parse(json.load(reply))
            except urllib.error.HTTPError as error:
                problem = f"HTTP {error.code} {' '.join(error.read(300).decode(errors='replace').split())}"
                if error.code < 500 and error.code not in (408, 429):  # asking again would not help
                    break
            except (OSError, http.client.HTTPException, ValueError, LookupError, TypeError) as error:
                problem = str(getattr(error, "reason", error)) or type(error).__name__
        raise self.silent(attempt + 1, problem)

    def silent(self, attempts: int, problem: str) -> OSError:
        return OSError(f"{self.name}: no answer from {self.url} after {attempts} attempts ({problem}); {self.remedy}")


class HTTPReward(Served):
    """What a server of one's own says of images. It is looked for at once; any answer to a GET will do."""

    def __init__(self, name: str, *_, **options):
        super().__init__(name, name, **options)
        try:
            self.opener.open(self.url, timeout=self.timeout).close()
        except urllib.error.HTTPError:
            pass
        except (OSError, http.client.HTTPException) as error:
            raise self.silent(1, str(getattr(error, "reason", error))) from error

    def about(self, images: list[Image.Image], prompts: list[str]) -> list[float]:
        body = {"images": [png(image) for image in images], "prompts": prompts}
        return self.ask("", body, lambda reply: numbers(reply, len(images)))

    def score(self, images: Float[Tensor, "B 3 H W"], prompts: list[str]) -> Float[Tensor, " B"]:
        parts = [slice(start, start + BATCH) for start in range(0, len(prompts), BATCH)]
        return torch.tensor([value for part in parts for value in self.about(pictures(images[part]), prompts[part])])


def png(picture: Image.Image) -> str:
    return base64.b64encode(encoded(picture, "PNG")).decode()


def numbers(reply, count: int) -> list[float]:
    """The reply, where it is a list of `count` finite numbers. Raises ValueError otherwise."""
    right = isinstance(reply, list) and all(isinstance(n, int | float) and math.isfinite(n) for n in reply)
    if not right or len(reply) != count:
        raise ValueError(f"a list of {count} numbers was asked for, the reply is {json.dumps(reply)[:200]}")
    return [float(number) for number in reply]


def nearby(url: str) -> bool:
    """Whether the server is on this machine or in its own network: no proxy that the environment names leads there."""
    host = urlsplit(url).hostname or ""
    try:
        return ipaddress.ip_address(host).is_private  # loopback and link-local addresses too
    except ValueError:  # a name; one without a dot is the machine's or its neighbour's
        return "." not in host or host.endswith((".localhost", ".local")) or host == socket.getfqdn()
