"""A reward that a server of one's own gives, against a real server."""

import base64
import io
import json
import threading
import time
from http.server import BaseHTTPRequestHandler

import pytest
import torch
from PIL import Image
from torchvision.transforms.v2.functional import pil_to_tensor

from ref.scoring.load import load_reward
from ref.scoring.served import HTTPReward


def server(seen: list, fail_first: int = 0, reply=None, status: int = 503, seconds: float = 0):
    """It fails `fail_first` times, then gives each picture's mean, or `reply`, after some seconds."""
    failures = iter(range(fail_first))

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self):
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            seen.append(body)
            pictures = [Image.open(io.BytesIO(base64.b64decode(image))) for image in body["images"]]
            means = [float(pil_to_tensor(p).float().mean() / 255) for p in pictures]
            threading.Event().wait(seconds)
            failed = next(failures, None) is not None
            content = json.dumps(means if reply is None else reply).encode()
            self.send_response(status if failed else 200)
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)

        def log_message(self, *_):
            pass

    return Handler


def test_images_and_prompts_arrive_and_numbers_come_back(serve):
    seen = []
    reward = load_reward(f"{serve(server(seen))}/score:2")
    images = torch.arange(40).view(40, 1, 1, 1).expand(40, 3, 8, 8) / 255
    prompts = [f"picture {n}" for n in range(40)]
    torch.testing.assert_close(reward(images, prompts), 2 * images[:, 0, 0, 0])
    assert [len(body["prompts"]) for body in seen] == [32, 8]
    assert reward.waits  # grpo.py asks while it draws
    assert [prompt for body in seen for prompt in body["prompts"]] == prompts


def test_a_server_that_fails_is_asked_again_and_then_named(serve):
    seen, images = [], torch.ones(2, 3, 8, 8)
    assert HTTPReward(serve(server(seen, 2)), attempts=3, wait=0.001)(images, ["a", "b"]).tolist() == [1, 1]
    assert len(seen) == 3
    for wrong, words in (
        (dict(fail_first=9), "after 3 attempts .HTTP 503"),
        (dict(fail_first=9, status=404), "after 1 attempts .HTTP 404"),
        (dict(fail_first=9, status=429), "after 3 attempts .HTTP 429"),  # too many at once: later it may do
        (dict(reply=[1.0]), r"a list of 2 numbers was asked for, the reply is \[1.0\]"),
        (dict(reply=["good", 1]), r"a list of 2 numbers was asked for"),
        (dict(reply=[float("nan"), 1]), r"a list of 2 numbers was asked for"),
        (dict(reply={"scores": [1, 2]}), r"a list of 2 numbers was asked for"),
    ):
        url = serve(server([], **wrong))
        with pytest.raises(
            OSError, match=f"no answer from {url} {words}|no answer from {url} after 3.*{words}"
        ) as caught:
            HTTPReward(url, attempts=3, wait=0.001)(images, ["a", "b"])
        assert "\n" not in str(caught.value)


def test_each_wait_is_twice_the_last_and_none_for_a_reply_is_endless(serve, monkeypatch):
    waited, images = [], torch.ones(1, 3, 8, 8)
    url, slow = serve(server([], 9)), serve(server([], seconds=5))
    monkeypatch.setattr(time, "sleep", waited.append)
    with pytest.raises(OSError, match="after 5 attempts"):
        HTTPReward(url)(images, ["a"])
    assert waited == [0, 1, 2, 4, 8]
    with pytest.raises(OSError, match="after 1 attempts .timed out"):
        HTTPReward(slow, attempts=1, timeout=0.2)(images, ["a"])


def test_a_server_that_is_down_is_named_before_anything_is_sampled():
    with pytest.raises(OSError, match="no answer from http://127.0.0.1:9/x after 1 attempts .*refused.*start it"):
        load_reward("http://127.0.0.1:9/x:0.5")
