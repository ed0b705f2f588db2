"""proofs/Pxx_*.md, the index in proofs/README.md and the marks of the tests agree one to one."""

import re
from pathlib import Path

ROOT = Path(__file__).parent.parent
CLAIMS = [f"P{n:02d}" for n in range(1, 14)]


def files() -> dict[str, Path]:
    return {path.name[:3]: path for path in sorted((ROOT / "proofs").glob("P[0-9][0-9]_*.md"))}


def sources() -> dict[str, str]:
    return {path.name: path.read_text() for path in sorted((ROOT / "tests").glob("test_*.py"))}


def test_proofs_index_and_marks_agree():
    proofs = [path.name for path in sorted((ROOT / "proofs").glob("P[0-9][0-9]_*.md"))]
    indexed = re.findall(r"^\|.*\((P\d\d_\w+\.md)\)", (ROOT / "proofs" / "README.md").read_text(), re.M)
    assert [name[:3] for name in proofs] == CLAIMS
    assert indexed == proofs
    marked = {m for text in sources().values() for m in re.findall(r"mark\.claim\(\s*[\"'](P\d\d)[\"']", text)}
    assert sorted(marked) == CLAIMS


def test_every_proof_names_existing_tests_of_its_own_claim():
    tests = sources()
    for claim, path in files().items():
        text = path.read_text()
        for part in ("claim", "assumption", "proof", "numeric", "tested by"):
            assert part in text.lower(), f"{path.name} lacks '{part}'"
        named, file = [], None
        for mentioned, function in re.findall(r"(test_\w+\.py)?::(test_\w+)", text):  # `::name` keeps the last file
            file = mentioned or file
            named.append((file, function))
        assert named, f"{path.name} names no test"
        for file, function in named:
            body = re.search(rf"((?:@.*\n(?:(?!def |@).*\n)*)*)def {function}\(", tests[file])
            assert body, f"{path.name} names {file}::{function}, which does not exist"
            assert claim in body.group(1), f"{file}::{function} lacks the mark of {claim}"
