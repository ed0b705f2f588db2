"""UnifiedReward, against a real server."""

import json
import re
from http.server import BaseHTTPRequestHandler

import numpy as np
import pytest
import torch
from PIL import Image

from ref.scoring.load import load_reward
from ref.scoring.unified_reward import UnifiedReward, ratings


def judge(fail_first: int = 0, answer: str = "", status: int = 500, seen: list | None = None, tokens=None):
    """A server like vLLM's: it fails `fail_first` times, then rates a picture by its brightness, or says `answer`.

    tokens: where it cuts an answer off, unless the request's max_tokens is smaller.
    """
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
            if tokens is not None:
                words = re.findall(r"\d|[^\d\s]+|\s", answer)  # a digit a token, as the model's tokenizer cuts them
                limit = min(tokens, request["max_tokens"])
                cut = {"content": "".join(words[:limit])}
                return self.reply(200, {"choices": [{"message": cut, "finish_reason": "length" if len(words) > limit else "stop"}]})  # fmt: skip
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
    assert asked == {"Text Caption: [black]", "Text Caption: [white {braces}]", "Text Caption: [grey]"}
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


def test_an_answer_of_many_decimals_is_read_whole_or_refused(serve):
    """As the model answers; cut at 64 tokens its last number would be read as 2."""
    numbers = (2.694700002670288, 2.369300127029419, 2.805500030517578)
    axes = ("Alignment", "Coherence", "Style")
    said = "\n".join(f"{axis} Score (1-5): {number}" for axis, number in zip(axes, numbers))
    images = torch.ones(1, 3, 8, 8)
    reward = UnifiedReward("u", serve(judge(answer=said, tokens=10**6)), attempts=1)
    assert reward(images, ["white"]).item() == pytest.approx(sum(numbers) / 3, rel=1e-7)
    reward = UnifiedReward("u", serve(judge(answer=said, tokens=64)), attempts=2, wait=0.001)
    with pytest.raises(OSError, match="an answer was cut off after 256 tokens") as caught:
        reward(images, ["white"])
    assert "\n" not in str(caught.value)


def test_a_server_that_is_down_is_named_before_anything_is_sampled():
    with pytest.raises(OSError, match="no answer from http://127.0.0.1:9 after 2 attempts .*refused.*vllm serve"):
        UnifiedReward("unified_reward", "http://127.0.0.1:9", attempts=2, wait=0.001)


def test_ratings_read_the_forms_in_which_the_model_answers():
    assert ratings("Alignment Score (1-5): 2.4\nCoherence Score (1-5): 3.1\nStyle Score (1-5): 3.5") == pytest.approx(3)
    assert ratings("- **Alignment**: 4/5\n- **Coherence**: 3.5/5\n- **Style**: 4.5/5") == pytest.approx(4)
    for answer in ("", "Alignment Score (1-5): 2\nStyle Score (1-5): 3", "Alignment: 7\nCoherence: 3\nStyle: 3"):
        with pytest.raises(ValueError, match="score from 1 to 5"):
            ratings(answer)
