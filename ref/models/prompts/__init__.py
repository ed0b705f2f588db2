"""Prompts come from files; train.txt, evaluation.txt and ocr.txt beside this one are of our own writing.

.txt (and whatever is not listed)   a prompt a line
.jsonl, .ndjson                     a line is a string, or an object with a "prompt"; with GenEval's "include", too,
                                    it is kept as the prompt's `wants`
.json                               an array of such
.csv, .tsv                          a table with a column `prompt`
"""

import json
from collections.abc import Iterator
from pathlib import Path

from ref.options import near
from ref.scale.textfiles import read_json, read_lines, read_table

FOLDER = Path(__file__).parent
OWN = tuple(sorted(path.stem for path in FOLDER.glob("*.txt")))


class Prompt(str):
    """A prompt that knows what its image is asked to show: `wants`, a line of GenEval's file (scoring/geneval.py)."""

    wants: dict


def read_prompts(source: str | Path) -> list[str]:
    """The prompts of a file in their order, without white space around them; one that comes twice stays twice.

    train, evaluation and ocr name the files that come with this package. Raises OSError for what is no file, and
    ValueError that names file and line for an empty line, bad JSON, an object or a table without a prompt, and
    what is no text (`textfiles`).
    """
    path = FOLDER / f"{source}.txt" if str(source) in OWN else Path(source)
    kind = path.suffix.casefold()
    try:
        if kind in (".jsonl", ".ndjson"):
            found = json_lines(path)
        elif kind == ".json":
            items = read_json(path, list, 'write ["a prompt", ...], or an object a line and call the file .jsonl')
            found = ((f"{path}, entry {number}", item) for number, item in enumerate(items, 1))
        elif kind in (".csv", ".tsv"):
            found = ((f"{path}, line {line}", row["prompt"]) for line, row in read_table(path, ("prompt",)))
        else:
            found = ((f"{path}, line {number}", line) for number, line in enumerate(read_lines(path), 1))
        prompts = [clean(place, prompt) for place, prompt in found]
    except FileNotFoundError:
        raise FileNotFoundError(missing(path)) from None
    if not prompts:
        raise ValueError(f"{path} holds no prompts; write one a line")
    return prompts


def json_lines(path: Path) -> Iterator[tuple[str, object]]:
    for number, line in enumerate(read_lines(path), 1):
        place = f"{path}, line {number}"
        try:
            yield place, json.loads(line) if line.strip() else ""
        except (ValueError, RecursionError) as error:
            reason = getattr(error, "msg", "too deep or too long")
            raise ValueError(f"{place}: bad JSON ({reason}); a line is one object") from error


def clean(place: str, item) -> str:
    """The prompt of a line or a JSON value as it is used. Raises ValueError where there is nothing to see."""
    prompt = item.get("prompt") if isinstance(item, dict) else item
    if not isinstance(prompt, str):
        raise ValueError(f'{place}: no prompt; write {{"prompt": "..."}} or a string')
    prompt = prompt.strip().strip("\ufeff").strip()  # marks stay between files that were put together
    if not any(letter.isprintable() and not letter.isspace() for letter in prompt):
        raise ValueError(f"{place}: empty line; every line must hold a prompt")
    if any("\ud800" <= letter <= "\udfff" for letter in prompt):
        raise ValueError(f"{place}: half of a surrogate pair; write the character itself")
    if isinstance(item, dict) and "include" in item:
        prompt = Prompt(prompt)
        prompt.wants = item
    return prompt


def missing(path: Path) -> str:
    """What is meant, perhaps, by a file that is not there."""
    try:
        beside = [file.name for file in path.parent.iterdir()]
    except (OSError, ValueError):
        beside = []
    bare = path.suffix in ("", ".txt") and path.name == str(path)
    guess = near(path.stem, OWN) * bare or near(path.name, beside)
    return f"there is no file {str(path)!r}; {guess}give a file with a prompt a line, or {', '.join(OWN)}"
