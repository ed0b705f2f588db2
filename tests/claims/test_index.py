"""proofs/Pxx_*.md, the index in proofs/README.md, the tests' marks and the names in ref/ agree one to one.

The list of claims is what files there are in proofs/; nothing else holds it.
"""

import importlib
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PROOFS = sorted((ROOT / "proofs").glob("P[0-9][0-9]_*.md"))
SOURCES = {path.relative_to(ROOT).as_posix(): path.read_text() for path in sorted((ROOT / "tests").rglob("test_*.py"))}


def marks_of(function: str, source: str) -> set[str]:
    """The claims that a test function is marked with; None if the source has no such function."""
    decorated = re.search(rf"((?:^@.*\n(?:^(?!def |@).*\n)*)*)^def {function}\(", source, re.M)
    return None if decorated is None else set(re.findall(r"mark\.claim\(\s*[\"'](P\d\d)[\"']", decorated[1]))


def account(text: str) -> list[str]:
    """The names of ref/ in a proof's line 'Holds to account: `module.name`, ...'."""
    line = re.search(r"^Holds to account:(.*?)\.$", text, re.M | re.S)
    return re.findall(r"`([\w.]+)`", line[1]) if line else []


def test_proofs_are_numbered_without_gaps_and_index_and_marks_agree():
    names = [path.name for path in PROOFS]
    claims = [f"P{n:02d}" for n in range(1, len(PROOFS) + 1)]
    assert len(names) >= 13 and [name[:3] for name in names] == claims
    indexed = re.findall(r"^\|.*\((P\d\d_\w+\.md)\)", (ROOT / "proofs" / "README.md").read_text(), re.M)
    assert indexed == names
    marked = {m for text in SOURCES.values() for m in re.findall(r"mark\.claim\(\s*[\"'](P\d\d)[\"']", text)}
    assert sorted(marked) == claims


@pytest.mark.parametrize("path", PROOFS, ids=lambda path: path.name[:3])
def test_every_proof_names_existing_tests_of_its_own_claim(path):
    text = path.read_text()
    for part in ("claim", "assumption", "proof", "numeric", "tested by"):
        assert part in text.lower(), f"{path.name} lacks '{part}'"
    named, file = set(), None
    for mentioned, function in re.findall(r"(tests/[\w/]+\.py)?::(test_\w+)", text):  # `::name` keeps the last file
        file = mentioned or file
        assert file in SOURCES, f"{path.name} names {file}, which does not exist"
        marks = marks_of(function, SOURCES[file])
        assert marks is not None, f"{path.name} names {file}::{function}, which does not exist"
        assert path.name[:3] in marks, f"{file}::{function} lacks the mark of {path.name[:3]}"
        named.add(function)
    carried = {
        function
        for source in SOURCES.values()
        for function in re.findall(r"^def (test_\w+)\(", source, re.M)
        if path.name[:3] in marks_of(function, source)
    }
    assert named == carried, f"{path.name}: 'Tested by' and the marks differ by {sorted(named ^ carried)}"


@pytest.mark.parametrize("path", PROOFS, ids=lambda path: path.name[:3])
def test_every_proof_names_what_it_holds_to_account(path):
    """`module.name` is a public name of the module with that stem, in whichever folder of ref/ it lies."""
    names = account(path.read_text())
    assert names, f"{path.name} lacks a line 'Holds to account: `module.name`, ... .'"
    for name in names:
        stem, *attributes = name.split(".")
        found = list((ROOT / "ref").rglob(f"{stem}.py"))
        assert len(found) == 1, f"{path.name} names {name}; modules called {stem}: {found}"
        thing = importlib.import_module(".".join(found[0].relative_to(ROOT).with_suffix("").parts))
        for attribute in attributes:
            assert hasattr(thing, attribute), f"{path.name} names {name}, which does not exist"
            thing = getattr(thing, attribute)
