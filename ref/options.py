"""A command line from a declaration: pydantic says what is allowed, tyro reads and helps, a refusal is one line.

A command declares its options as a class whose fields have a type, a range, a default and a comment; `read`
makes the command line of it, help included. What Python is given is checked by the same class.
"""

import io
import os
import re
import sys
from collections.abc import Callable, Iterable
from contextlib import redirect_stderr
from difflib import get_close_matches
from pathlib import Path
from typing import Annotated, Literal, TypeVar

from annotated_types import Ge, Gt, Le
from pydantic import BaseModel, ConfigDict

from ref.settings import in_one_line

T = TypeVar("T")
Pixels = Annotated[int, Ge(16), Le(8192)]


@in_one_line
class Options(BaseModel):
    """The base of all options: unknown names are refused, and so are NaN and infinity."""

    model_config = ConfigDict(extra="forbid", allow_inf_nan=False)


@in_one_line
class Pipeline(Options):
    """Options of the large presets: which pipeline, towards what, and how it is held in memory."""

    memory: Literal[24, 48, 80] | None = None  # of the GPU in GB: computed settings in place of a trial
    model: str = "sd35_medium"  # a diffusers folder, a hub id, sd35_medium or flux_dev
    reward: str = "pickscore"  # what to raise, or a sum: pickscore:0.7+ocr:0.3, my_file.py:my_reward, http://HOST:PORT
    prompts: str = "train"  # a .txt, .jsonl, .json, .csv or .tsv file, or train, evaluation or ocr; GenEval's too
    evaluation_prompts: str | None = None  # for evaluations (None: evaluation; with other --prompts at most 64 of them)
    evaluation_steps: Annotated[int, Ge(1), Le(1000)] = 40  # denoising steps of evaluations
    height: Pixels = 512  # of the images in pixels
    width: Pixels = 512  # likewise
    guidance_scale: Annotated[float, Ge(0), Le(100)] | None = None  # 1 is off on SD3 (None: 4.5 on SD3, 3.5 on FLUX)
    shift: Annotated[float, Gt(0), Le(100)] | None = None  # of the time grid (None: the pipeline's)
    lora_rank: Annotated[int, Ge(0), Le(4096)] = 32  # 0 trains all weights, which several processes hold in parts
    lora_alpha: Annotated[float, Gt(0), Le(10**6)] | None = None  # (None: twice the rank)
    lora_targets: Literal["all", "attention"] = "all"  # Flow-GRPO's layers, or to_q, to_k, to_v, to_out (DanceGRPO's)
    gradient_checkpointing: bool = False  # less memory, a third more time
    tiling: bool = False  # decode in tiles
    compile_blocks: bool = False  # compile the transformer's repeated blocks: minutes at first, then faster steps
    decode_batch: Annotated[int, Ge(1)] = 2  # images at once through the VAE
    max_sequence_length: Annotated[int, Ge(1), Le(512)] | None = None  # T5 tokens (None: 256 on SD3, 512 on FLUX)
    cache_dir: Path | None = None  # of prompt embeddings (None: ~/.cache/ref/prompt_embeddings)


def near(given: str, choices: Iterable[str], alike: float = 0.65) -> str:
    """A question, "did you mean train? ", where one of the choices is spelled nearly so; else nothing."""
    names = {str(name).casefold(): str(name) for name in choices}
    found = get_close_matches(given.casefold(), names, 1, alike)
    return f"did you mean {names[found[0]]}? " if found else ""


def read(declared: type[T], program: str, arguments: list[str] | None, default: T | None = None) -> T:
    """What the command line asks for. Ends the process with exit code 2 and one line where it asks for nonsense.

    default: an instance whose values stand where the command line is silent.
    """
    import tyro

    arguments = sys.argv[1:] if arguments is None else arguments
    if "--version" in arguments:
        from importlib.metadata import version

        print(f"ref {version('ref')}, torch {version('torch')}, diffusers {version('diffusers')}")
        raise SystemExit(0)
    said, width = io.StringIO(), os.environ.get("COLUMNS")
    if not {"-h", "--help"} & set(arguments):
        os.environ["COLUMNS"] = "10000"  # a refusal is not to be wrapped
    try:
        with redirect_stderr(said):
            return tyro.cli(declared, prog=f"python -m {program}", args=arguments, default=default)
    except SystemExit as end:
        if end.code:
            print(f"error: {refusal(said.getvalue())}; see python -m {program} --help", file=sys.stderr)
        raise
    finally:
        os.environ.pop("COLUMNS", None) if width is None else os.environ.update(COLUMNS=width)


def refusal(box: str) -> str:
    """tyro's box of several lines as one. Where stdout's encoding is not called utf-8, two spaces are its left side."""
    lines = [line.strip("│ ") for line in box.splitlines() if line.startswith(("│", "  "))]
    text = " ".join(
        line for line in lines if line and not line.startswith(("─", "---", "For full helptext", "Argument help"))
    )
    text = re.sub(r"^Missing from python -m [\w.]+:", "missing:", text)
    text = re.sub(r"^Error parsing [\w.-]+: |python -m [\w.]+ --help", "", text).strip()
    wrong = re.search(r"invalid choice '(.*?)' for argument '\S+'(?=\. Expected one of \((.*?)\))", text)
    if wrong and (guess := near(wrong[1], re.findall(r"'(.*?)'", wrong[2]))):
        text = text.replace(wrong[0] + ".", f"{wrong[0]}; {guess.strip()}", 1)
    return text


def command(main: Callable[[list[str] | None], None], arguments: list[str] | None = None) -> int:
    """Run a command; what a user can mend ends it with one line and exit code 2."""
    try:
        main(arguments)
    except (ValueError, OSError) as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    return 0
