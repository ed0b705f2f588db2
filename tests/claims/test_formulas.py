"""Every formula of proofs/ and README.md parses, and stands in the form that GitHub and GitLab leave alone.

Inline that is a dollar and a backtick on both sides, displayed a ```math block. Between bare dollars GitHub reads
Markdown first: it drops the backslash before punctuation (`\\{`, `\\,`), and it does not see a formula that touches
a letter.
"""

import re
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import pytest
from latex2mathml.converter import convert

ROOT = Path(__file__).parents[2]
DOCUMENTS = [*sorted((ROOT / "proofs").glob("*.md")), ROOT / "README.md"]
KNOWN = {"\\arg"}  # to TeX, MathJax and KaTeX, not to latex2mathml
REFUSED = re.compile(r"\\(operatorname|mbox|phantom|[hv]phantom|(re)?newcommand|def)(?![a-zA-Z])")  # by GitHub
ARGUMENTS = dict(mfrac=2, msub=2, msup=2, msubsup=3, munder=2, mover=2, munderover=3, mroot=2)
FENCE = re.compile(r"^( *)```(\w*)\n(.*?)^\1```$", re.S | re.M)
INLINE = re.compile(r"\$`([^`]+)`\$")


def formulas(text: str) -> tuple[list[str], str]:
    """The formulas of a Markdown text, and what is left of it without formulas and code."""
    found = [body for _, language, body in FENCE.findall(text) if language == "math"]
    text = FENCE.sub("", text)
    found += INLINE.findall(text)
    return found, re.sub(r"`[^`]*`", "", INLINE.sub("", text))


def defects(formula: str) -> list[str]:
    """What is wrong with a formula; empty if nothing.

    latex2mathml raises for missing ends, scripts and arguments, but passes an unknown command through as its
    name, an unclosed brace in silence, and a fraction with one argument.
    """
    wrong = [f"GitHub refuses {command[0]}" for command in REFUSED.finditer(formula)]
    depth = 0
    for brace in re.findall(r"(?<!\\)[{}]", formula.replace("\\\\", "")):
        depth += 1 if brace == "{" else -1
        if depth < 0:
            break
    if depth:
        wrong.append("braces do not match")
    for left, right in (("lvert", "rvert"), ("lVert", "rVert"), ("langle", "rangle"), ("lfloor", "rfloor")):
        count = [len(re.findall(rf"\\{name}(?![a-zA-Z])", formula)) for name in (left, right)]
        if count[0] != count[1]:
            wrong.append(f"\\{left} and \\{right} do not match")
    try:
        tree = ElementTree.fromstring(convert(formula))
    except Exception as error:
        return [*wrong, repr(error)]
    for element in tree.iter():
        tag = element.tag.split("}")[-1]
        if "\\" in (element.text or "") and element.text not in KNOWN:
            wrong.append(f"unknown command {element.text}")
        if len(element) != ARGUMENTS.get(tag, len(element)):
            wrong.append(f"{tag} with {len(element)} arguments")
    return wrong


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: path.stem)
def test_every_formula_parses_in_the_robust_form(path):
    text = path.read_text()
    found, rest = formulas(text)
    assert path.stem == "README" or found, "no formula at all: are they in another form?"
    bare = [line for line in rest.split("\n") if "$" in line]
    assert not bare, f"{path.name}: formulas between bare dollars, or a backtick missing: {bare}"
    wrong = {formula: found for formula in found if (found := defects(formula))}
    assert not wrong, f"{path.name}: {wrong}"
    assert not [f for f in INLINE.findall(FENCE.sub("", text)) if "\n" in f], "an inline formula breaks over a line"
    for row in re.findall(r"^\|.*\|$", text, re.M):
        assert not any("|" in f for f in INLINE.findall(row)), f"a | in a formula cuts the table's cell: {row}"


@pytest.mark.parametrize(
    "formula",
    [
        r"\frac{1}{2",
        r"a}b{",
        r"\nosuchcommand x",
        r"\left( x",
        r"x_",
        r"\frac1",
        r"x^2^3",
        r"\sqrt",
        r"\lVert x",
        r"\begin{cases} a",
        r"\operatorname{rank} A",
    ],
)
def test_a_broken_formula_is_refused(formula):
    assert defects(formula)


@pytest.mark.parametrize("text", ["a $x$ b", "$$\nx\n$$", "the $`x$ of", "$K`$-th", "costs 3$"])
def test_the_fragile_form_is_seen(text):
    assert "$" in formulas(text)[1]
    assert "$" not in formulas("a $`x_k`$-th, `echo $HOME`\n```math\ny\n```\n")[1]
