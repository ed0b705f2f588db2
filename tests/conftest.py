"""Shapes are checked, randomness is fixed, claims have marks: `pytest -m claim` runs all of them, `pytest -m P09` one.

Shapes and types in the signatures of ref/ are checked at run time in every test (jaxtyping, beartype).

Every proofs/Pxx_*.md gives a mark Pxx; a test with @pytest.mark.claim("P09") carries it too. A claim with a
failing test is named at the end, with its proof and the functions of ref/ that the proof holds to account.
"""

import re
import threading
from http.server import ThreadingHTTPServer
from pathlib import Path

import hypothesis
import pytest
import torch
from beartype import BeartypeConf, beartype
from jaxtyping import install_import_hook

checked = beartype(conf=BeartypeConf(is_pep484_tower=True))  # an int is a float, as type checkers have it
install_import_hook("ref", f"{__name__}.checked")  # before anything of ref is imported

hypothesis.settings.register_profile("fixed", derandomize=True)  # the same examples in every run
hypothesis.settings.load_profile("fixed")
torch.set_num_threads(1)  # pytest-free determinism, and no fight over two cores

PROOFS = {path.name[:3]: path for path in sorted((Path(__file__).parents[1] / "proofs").glob("P[0-9][0-9]_*.md"))}


def pytest_configure(config):
    for claim, path in PROOFS.items():
        config.addinivalue_line("markers", f"{claim}: a test of proofs/{path.name}")


def pytest_itemcollected(item):
    for mark in list(item.iter_markers("claim")):
        item.add_marker(mark.args[0])


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item, call):
    report = yield
    if report.failed:  # user properties reach the terminal from pytest-xdist's processes too
        report.user_properties += [("claim", mark.args[0]) for mark in item.iter_markers("claim")]
    return report


def pytest_terminal_summary(terminalreporter):
    reports = [r for outcome in ("failed", "error") for r in terminalreporter.stats.get(outcome, [])]
    failed = sorted(
        {value for report in reports for key, value in getattr(report, "user_properties", ()) if key == "claim"}
    )
    if failed:
        terminalreporter.section("claims that do not hold")
    for claim in failed:
        line = re.search(r"^Holds to account: (.*?)\.$", PROOFS[claim].read_text(), re.M | re.S)
        names = " ".join(line[1].replace("`", "").split()) if line else "nothing named"
        terminalreporter.line(f"{claim} (proofs/{PROOFS[claim].name}) failed; it holds to account: {names}")


@pytest.fixture
def rng():
    """A generator with a fixed seed, one for each test."""
    return torch.Generator().manual_seed(0)


@pytest.fixture
def serve():
    """Starts a local server with the given handler, returns its address."""
    servers = []

    def start(handler, port: int = 0) -> str:
        server = ThreadingHTTPServer(("127.0.0.1", port), handler)
        threading.Thread(target=server.serve_forever, daemon=True).start()
        servers.append(server)
        return f"http://127.0.0.1:{server.server_port}"

    yield start
    for server in servers:
        server.shutdown()
        server.server_close()


@pytest.fixture(scope="session")
def world(tmp_path_factory):
    """Tiny pipelines and networks of the real classes, and prompt files. The cache of embeddings is shared by all runs."""
    from ref.models import tiny

    from .small import TRAINING

    folder = tmp_path_factory.mktemp("world")
    for name in ("sd3", "flux", "clip", "dino"):
        getattr(tiny, name)(folder / name)
    (folder / "train.txt").write_text("\n".join(TRAINING) + "\n")
    (folder / "evaluation.jsonl").write_text('{"prompt": "a boat at sea"}\n"a house"\n{"prompt": "an owl"}\n')
    return folder


@pytest.fixture(scope="session")
def finished(tmp_path_factory):
    """An uninterrupted run on the letters."""
    from ref.train import main

    from .small import command

    folder = tmp_path_factory.mktemp("finished")
    assert main(command(folder, "--save-every", "1")) == 0
    return folder
