"""Prompts come from files; train.txt, evaluation.txt and ocr.txt beside this one are of our own writing."""

import json
from pathlib import Path

FOLDER = Path(__file__).parent
OWN = tuple(sorted(path.stem for path in FOLDER.glob("*.txt")))


def read_prompts(source: str | Path) -> list[str]:
    """The prompts of a file, one a line; in a .jsonl file a line is a string or an object with a "prompt".

    train, evaluation and ocr name the files that come with this package. Raises OSError for a missing
    file, and ValueError that names the line for an empty line, bad JSON or an object without a prompt.
    """
    path = FOLDER / f"{source}.txt" if str(source) in OWN else Path(source)
    prompts = []
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        prompt = line.strip()
        if path.suffix == ".jsonl" and prompt:
            try:
                prompt = json.loads(prompt)
            except json.JSONDecodeError as error:
                raise ValueError(f"{path}, line {number}: bad JSON ({error.msg}); a line is one object") from error
            prompt = prompt.get("prompt") if isinstance(prompt, dict) else prompt
            if not isinstance(prompt, str):
                raise ValueError(f'{path}, line {number}: no prompt; write {{"prompt": "..."}}')
        if not prompt.strip():
            raise ValueError(f"{path}, line {number}: empty line; every line must hold a prompt")
        prompts.append(prompt)
    if not prompts:
        raise ValueError(f"{path} holds no prompts")
    return prompts
