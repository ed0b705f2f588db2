"""The README keeps its promises: its example runs, its map is complete, its links and options exist."""

import doctest
import json
import re
from pathlib import Path
from statistics import mean, stdev

import pytest

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text().replace("\\\n", " ")


def test_the_example_of_a_method_runs(tmp_path, monkeypatch):
    from ref.methods import METHODS

    monkeypatch.chdir(tmp_path)
    try:
        failed, tried = doctest.testfile(str(ROOT / "README.md"), module_relative=False)
    finally:
        METHODS.pop("rank", None)
    assert failed == 0 and tried >= 5


def test_one_s_own_reward_and_encoder_run_as_written(world, tmp_path, monkeypatch):
    """The file and the command, on the tiny pipeline and with few images; their numbers are what the file says."""
    from ref.train import main

    from .small import LARGE_SETTINGS, options
    from .tools import flags

    file, command = re.search(
        r"`mine\.py`.*?\n\n```python\n(.*?)```\n```bash\npython -m ref\.train (.*?)\n```", README, re.S
    ).groups()
    (tmp_path / "mine.py").write_text(file)
    monkeypatch.chdir(tmp_path)
    tiny = {name: value for name, value in options(world, "sd3").items() if name != "reward"}
    assert main([*command.split(), *flags(tiny | LARGE_SETTINGS | dict(group_size=3))]) == 0
    record = json.loads(Path("outputs/red/run.json").read_text())
    assert record["encoder"] == "mine.py:colours" and record["options"]["reward"] == "mine.py:red:0.5+jpeg"
    assert len(json.loads(Path("outputs/red/metrics.json").read_text())) == 2


def test_the_map_names_every_module():
    """ref/__init__.py names every module and wing beside it, and each wing's __init__.py every module of its own."""
    for folder in [ROOT / "ref", *(path.parent for path in (ROOT / "ref").glob("*/__init__.py"))]:
        inside = {path.stem for path in folder.glob("*.py")} | {
            path.parent.name for path in folder.glob("*/__init__.py")
        }
        said = set(re.findall(r"\w+", (folder / "__init__.py").read_text()))
        assert inside - {"__init__", "__main__"} <= said, f"{folder.name}/__init__.py does not name {inside - said}"


def test_its_table_of_savers_is_what_the_command_wrote():
    from ref.benchmark.savers import table

    costs = ROOT / "notebooks" / "data" / "costs"
    assert table(*(json.loads((costs / f"savers_{name}.json").read_text()) for name in ("sd3", "flux"))) in README
    seeds = json.loads((costs / "race_letters.json").read_text())
    shares = sorted(seed["twin"]["seconds"] / seed["preset"]["seconds"] for seed in seeds)
    assert f"in {shares[0]:.2f} to {shares[-1]:.2f} of the preset's seconds" in README
    for key in ("reward", "feature_variance"):
        twin, preset = ([seed[name][key] for seed in seeds] for name in ("twin", "preset"))
        assert f"{mean(twin):.2f} ± {stdev(twin):.2f} for {mean(preset):.2f} ± {stdev(preset):.2f}" in README


def test_it_is_short():
    assert len((ROOT / "README.md").read_text().splitlines()) <= 190


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
    package = (ROOT / Path(*module.split("."))).is_dir()
    main = importlib.import_module(f"{module}.__main__" if package else module).main
    text = io.StringIO()
    with contextlib.redirect_stdout(text), pytest.raises(SystemExit):
        main(["--help"])
    options = re.findall(r"(--[\w-]+)", line.split(module, 1)[1].split("#")[0])
    assert set(options) <= set(re.findall(r"--[\w-]+", text.getvalue()))


def test_the_memory_table_says_what_the_presets_do():
    """The one in presets.py: every variant's micro-batch, and whether it is checkpointed."""
    from ref import presets

    for name in ("sd35_medium", "flux_dev", "flux_dev_720"):
        cells = re.search(rf"^\| `{name}`.*GiB.*$", presets.__doc__, re.M)[0].split("|")[-4:-1]
        for memory, cell in zip((24, 48, 80), cells):
            variant = presets.PRESETS[name].variants.get(memory)
            if variant is None:
                assert cell.strip() == "none"
                continue
            assert int(re.match(r"\s*(\d+)", cell)[1]) == variant["micro_batch"]
            assert ("ckpt" in cell) == ("gradient_checkpointing" in variant)
    twins = {"sd35_medium_fast": "sd35_medium", "flux_dev_fast": "flux_dev", "flux_dance": "flux_dev_720"}
    assert all(presets.PRESETS[name].variants == presets.PRESETS[of].variants for name, of in twins.items())
