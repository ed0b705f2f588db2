"""Every notebook runs in fast mode, and every committed .ipynb is in step with its .py."""

import os
from pathlib import Path

import jupytext
import nbclient
import nbformat
import pytest

FOLDER = Path(__file__).parent.parent / "notebooks"
SOURCES = sorted(FOLDER.glob("[0-9]*.py"))


def test_all_notebooks_are_counted():
    """A notebook that is dropped, or not picked up, fails here."""
    numbers = [source.name[:2] for source in SOURCES]
    assert numbers == sorted(set(numbers)) and len(numbers) == len(list(FOLDER.glob("*.ipynb")))
    assert numbers == [f"{n:02d}" for n in range(1, 9)]


@pytest.mark.parametrize("source", SOURCES, ids=lambda p: p.stem)
def test_notebook_runs_in_fast_mode(source, monkeypatch):
    monkeypatch.setenv("REF_FAST", "1")
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    notebook = jupytext.read(source)
    nbclient.NotebookClient(
        notebook, timeout=300, kernel_name="python3", resources={"metadata": {"path": str(FOLDER)}}
    ).execute()
    assert os.environ["REF_FAST"] == "1"


@pytest.mark.parametrize("source", SOURCES, ids=lambda p: p.stem)
def test_reading_copy_is_in_step_and_was_executed(source):
    copy = nbformat.read(source.with_suffix(".ipynb"), as_version=4)
    assert [c.source for c in jupytext.read(source).cells] == [c.source for c in copy.cells]
    code = [c for c in copy.cells if c.cell_type == "code" and c.source.strip()]
    assert all(c.execution_count for c in code)
    assert not any(o.output_type == "error" for c in code for o in c.outputs)
    assert source.with_suffix(".ipynb").stat().st_size < 1_000_000
