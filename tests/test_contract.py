"""Imports run downwards (pyproject.toml, [tool.importlinter]); each contract is shown able to fail."""

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
CHECK = "import sys; sys.path.insert(0, ''); from importlinter.cli import lint_imports; sys.exit(lint_imports(no_cache=True))"


def contract(folder: Path) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, "-c", CHECK], cwd=folder, capture_output=True, text=True)


@pytest.fixture
def copy(tmp_path):
    shutil.copytree(ROOT / "ref", tmp_path / "ref", ignore=shutil.ignore_patterns("__pycache__", "weights"))
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    return tmp_path


def test_the_contract_is_kept():
    done = contract(ROOT)
    assert done.returncode == 0, done.stdout
    assert "0 broken" in done.stdout


@pytest.mark.parametrize(
    "module, planted, broken",
    [
        ("schedule", "from ref.policy import rollout", "Arrows run downwards"),
        ("methods", "from ref.scoring.load import load_reward", "Arrows run downwards"),
        ("models/sd3", "from ref.worlds.letters import data", "Arrows run downwards"),
        ("scale/memory", "def f():\n    from ref.grpo import train", "Arrows run downwards"),
        ("scoring/reward", "from ref.scoring.rules import OCR", "No circle anywhere"),
        ("metrics", "import matplotlib.pyplot", "Only the figures draw"),
        ("compare", "from matplotlib.figure import Figure", "Only the figures draw"),
        ("grpo", "def f():\n    import diffusers", "The paper needs no model library"),
        ("new", "", "Arrows run downwards"),  # a module that nobody gave a place
    ],
)
def test_a_planted_import_breaks_it(module, planted, broken, copy):
    file = copy / "ref" / f"{module}.py"
    file.write_text((file.read_text() if file.exists() else "") + f"\n{planted}\n")
    done = contract(copy)
    assert done.returncode == 1
    assert re.search(rf"^{broken}.*BROKEN", done.stdout, re.M) or module == "new" and "ref.new" in done.stdout


def test_importing_the_paper_loads_no_large_library():
    paper = "schedule policy entropy perceptual methods settings sampling grpo metrics"
    large = "accelerate diffusers transformers open_clip peft torchvision matplotlib scipy sklearn tyro"
    code = f"import sys; [__import__(f'ref.{{m}}') for m in {paper.split()}]; print([m for m in {large.split()} if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
