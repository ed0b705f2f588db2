"""What can go wrong on the way to the hub is one line with the remedy."""

import http.server
import os
import subprocess
import sys
import threading


class Hub(http.server.BaseHTTPRequestHandler):
    """Answers as the hub does for a gated, a missing, and a forbidden model; who asks for this is twice put off."""

    busy = [503, 503]

    def do_GET(self):
        code, reason = (403, "GatedRepo") if "gated" in self.path else (401, "RepoNotFound")
        if "forbidden" in self.path:
            code, reason = Hub.busy.pop() if Hub.busy else 403, None
        self.send_response(code)
        if reason:
            self.send_header("X-Error-Code", reason)
        self.send_header("Content-Length", "0")
        self.end_headers()

    do_HEAD = do_GET

    def log_message(self, *arguments):
        pass


def test_hub_errors_are_one_line_with_the_remedy(tmp_path):
    """A server that answers with the hub's status codes, then no network; the real client in between."""
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    script = """
import sys
from ref.models.hub import locate
for model in sys.argv[1:]:
    try:
        locate(model)
    except OSError as error:
        print(error)
"""

    def lines(*models, offline=False):
        endpoint = f"http://127.0.0.1:{server.server_port}"
        environment = os.environ | {
            "HF_ENDPOINT": endpoint,
            "HF_HOME": str(tmp_path),
            "HF_HUB_OFFLINE": str(int(offline)),
        }
        run = [sys.executable, "-c", script, *models]
        ended = subprocess.run(run, capture_output=True, text=True, env=environment, timeout=120)
        assert ended.stderr == ""
        return ended.stdout.splitlines()

    gated, missing, forbidden = lines("a/gated", "a/missing", "a/forbidden")
    server.shutdown()
    assert not Hub.busy  # tried again, and not a word of it
    assert gated.startswith(
        "no access to a/gated, which is gated: accept its licence at https://huggingface.co/a/gated"
    )
    assert missing.startswith("a/missing is neither a folder nor a public model of the hub")
    assert forbidden.startswith("the hub refused a/forbidden (HTTP 403)")
    assert all("hf auth login" in line for line in (gated, missing, forbidden))
    (alone,) = lines("a/model", offline=True)
    assert "cannot be reached" in alone and "hf download a/model --local-dir" in alone
