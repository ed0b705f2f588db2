"""The README keeps its promises: its example runs, its map is complete, its links and options exist."""

import doctest
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text().replace("\\\n", " ")


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


def test_the_memory_tables_say_what_the_presets_do():
    """README's table and the one in presets.py: every variant's micro-batch, and whether it is checkpointed."""
    from ref import presets

    for preset, variants in presets.VARIANTS.items():
        for text, mark in ((README, "with checkpointing"), (presets.__doc__, "ckpt")):
            cells = re.search(rf"^\| `{preset}`.*GiB.*$", text, re.M)[0].split("|")[-4:-1]
            for memory, cell in zip((24, 48, 80), cells):
                if memory not in variants:
                    assert re.fullmatch(r"none|does not fit", cell.strip())
                    continue
                assert int(re.match(r"\s*(\d+)", cell)[1]) == variants[memory]["micro_batch"]
                assert (mark in cell) == ("gradient_checkpointing" in variants[memory])
