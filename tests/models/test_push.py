"""--push-to-hub, by the hub's own client against a hub of this file; before a run it is asked who the user is."""

import base64
import json
from http.server import BaseHTTPRequestHandler

import pytest

from ref.models.push import push, refuse

from ..small import LARGE_SETTINGS, options
from ..tools import exit_code, flags, refusal


class Hub(BaseHTTPRequestHandler):
    """What a hub answers to whoami, to a new repository and to a commit whose files are all small."""

    asked, files = [], {}

    def reply(self, said: dict, status: int = 200):
        content = json.dumps(said).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def do_GET(self):
        known = self.headers["Authorization"] == "Bearer hf_right"
        self.reply(*([{"type": "user", "name": "me", "orgs": []}] if known else [{"error": "Invalid token"}, 401]))

    def do_POST(self):
        data, page = self.rfile.read(int(self.headers["Content-Length"])), f"http://{self.headers['Host']}/me/weights"
        self.asked.append(self.path)
        if self.path.endswith("/preupload/main"):
            small = {"uploadMode": "regular", "shouldIgnore": False}
            self.reply({"files": [{"path": file["path"]} | small for file in json.loads(data)["files"]]})
        elif self.path.endswith("/commit/main"):
            for line in map(json.loads, data.splitlines()):
                if line["key"] == "file":
                    self.files[line["value"]["path"]] = base64.b64decode(line["value"]["content"])
            self.reply({"commitUrl": f"{page}/commit/1", "commitOid": "1", "success": True})
        else:
            self.reply({"url": page} | json.loads(data))

    def log_message(self, *_):
        pass


@pytest.fixture
def hub(serve, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", address := serve(Hub))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setenv("HF_TOKEN", "hf_right")
    return address


def test_weights_card_and_samples_arrive(hub, world, tmp_path, capsys):
    from ref.train import main

    command = [
        "--preset",
        "sd35_medium",
        "--method",
        "flow_grpo",
        "--output-dir",
        tmp_path / "run",
        "--push-to-hub",
        "me/weights",
    ]
    settings = options(world, "sd3") | LARGE_SETTINGS | dict(iterations=1, reward="jpeg")
    assert exit_code(main, [*command, "--encoder", f"pickscore={world / 'clip'}", *flags(settings)]) == 0
    assert f"pushed to {hub}/me/weights" in capsys.readouterr().err
    kept = {path.name: path.read_bytes() for path in (tmp_path / "run" / "weights").iterdir()}
    assert Hub.files == kept and {"README.md", "after.png", "pytorch_lora_weights.safetensors"} <= kept.keys()


@pytest.mark.parametrize("login, reach, message", [("hf_wrong", True, "Invalid"), ("hf_right", False, "refused")])
def test_a_login_that_the_hub_does_not_take_is_said_before_the_run(
    login, reach, message, hub, tmp_path, capsys, monkeypatch
):
    from ref.train import main

    monkeypatch.setenv("HF_TOKEN", login)
    if not reach:
        monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "http://127.0.0.1:9")
    command = [
        "--preset",
        "sd35_medium",
        "--method",
        "pec",
        "--output-dir",
        tmp_path / "run",
        "--push-to-hub",
        "me/weights",
    ]
    line = refusal(main, command, capsys)
    assert message in line and "run `hf auth login` again, or leave it out" in line
    assert not (tmp_path / "run").exists()


def test_an_upload_that_fails_says_how_to_do_it_again(hub, tmp_path, monkeypatch):
    refuse("me/x")
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "http://127.0.0.1:9")
    again = f"all is in {tmp_path}: hf upload me/x {tmp_path}"
    with pytest.raises(OSError, match=f"cannot push to me/x: .*; {again}") as caught:
        push("me/x", tmp_path)
    assert "\n" not in str(caught.value)
