"""The README keeps its promises: its example runs, its map is complete, its links and options exist."""

import doctest
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()


def test_the_tenth_method_example_runs(tmp_path, monkeypatch):
    from ref.methods import METHODS

    monkeypatch.chdir(tmp_path)
    try:
        failed, tried = doctest.testfile(str(ROOT / "README.md"), module_relative=False)
    finally:
        METHODS.pop("rank", None)
    assert failed == 0 and tried >= 5


def test_the_map_lists_every_module():
    named = set(re.findall(r"\(ref/(\w+)\.py\)", README))
    modules = {path.stem for path in (ROOT / "ref").glob("*.py")} - {"__init__", "__main__"}
    assert named == modules


@pytest.mark.parametrize("link", sorted(set(re.findall(r"\]\((?!http)([^)#]+)\)", README))))
def test_links_lead_somewhere(link):
    assert (ROOT / link).exists()


@pytest.mark.parametrize("line", re.findall(r"^python -m ref\S* .*$|^accelerate launch .*$", README, re.M))
def test_options_in_commands_exist(line):
    """Every --option that the README shows is one that its command's --help knows."""
    import contextlib
    import importlib
    import io

    module = re.search(r"-m (ref[\w.]*)", line)[1]
    main = importlib.import_module("ref.__main__" if module == "ref" else module).main
    text = io.StringIO()
    with contextlib.redirect_stdout(text), pytest.raises(SystemExit):
        main(["--help"])
    options = re.findall(r"(--[\w-]+)", line.split(module, 1)[1].split("#")[0])
    assert set(options) <= set(re.findall(r"--[\w-]+", text.getvalue()))
