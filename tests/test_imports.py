"""What importing ref costs."""

import subprocess
import sys
from pathlib import Path

import ref

LIBRARIES = "accelerate diffusers matplotlib onnxruntime open_clip peft scipy sklearn torchvision transformers".split()
LIBRARIES += ["torch._dynamo", "torch.distributed.tensor"]


def loaded_by(modules: list[str]) -> set[str]:
    """Which of the large libraries a fresh interpreter has loaded once it has imported torch and these modules."""
    code = f"import importlib, sys\nfor m in ['torch', *{modules}]: importlib.import_module(m)\n"
    code += f"print(*(m for m in {LIBRARIES} if m in sys.modules))"
    return set(subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split())


def test_importing_ref_takes_little_beyond_torch():
    """Large libraries are imported where they are needed (0.12 s in all on the machine of the README's numbers)."""
    root = Path(ref.__file__).parent
    paths = [path.relative_to(root.parent).with_suffix("") for path in root.rglob("*.py")]
    names = [".".join(path.parts) for path in paths if not path.stem.startswith("__")]
    assert len(names) > 45
    plots = ["ref.figures", "ref.worlds.figures", "ref.benchmark.figures", "ref.compare"]
    assert loaded_by([name for name in names if name not in plots]) == set()
    assert loaded_by(plots) == {"matplotlib"}  # it does see them
