"""Rewards and encoders of one's own: FILE.py:NAME is a function, or a class of callables, in that file.

    def my_reward(images, prompts): ...     images [B, 3, H, W] in [0, 1] on the CPU, prompts [B] -> [B] numbers
    def my_phi(images): ...                 -> [B, D] features, used as they are

A class is made without arguments once everything else is right, so it may load a network. A static method or attribute
`check_prompts(prompts)` of a reward may raise a ValueError for prompts that it cannot judge: it is called before anything
is loaded. Any form of the right numbers will do (`sampling.ask`).
"""

import functools
import inspect
import re
from collections.abc import Callable
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path

REWARD, ENCODER = ("images", "prompts"), ("images",)


def is_own(name: str) -> bool:
    return re.fullmatch(r".+\.py:\w+", name) is not None


def find_own(name: str, takes: tuple[str, ...]) -> Callable:
    """The function or class, which takes REWARD's or ENCODER's arguments.

    Raises in one line OSError for a file that is not there, and ValueError for one that cannot be run, for a name that
    it lacks, and for what cannot be called so.
    """
    file, _, word = name.rpartition(":")
    defined = inside(file)
    if word not in defined:
        raise ValueError(f"{file} defines no {word}; write the name of a function or class in it")
    found, itself = defined[word], ()
    call = found
    if isinstance(found, type) and "__call__" in dir(found):
        call, itself = found.__call__, ("self",)
    elif isinstance(found, type) or not callable(found):
        what = (
            "a class without __call__" if isinstance(found, type) else f"of type {type(found).__name__}, not a function"
        )
        raise ValueError(f"{name} is {what}; it must take ({', '.join(takes)})")
    try:
        inspect.signature(call).bind(*itself, *takes)
    except TypeError as error:
        raise ValueError(f"{name} must take ({', '.join(takes)}): {error}") from None
    except ValueError:  # a built-in function does not tell
        pass
    return found


def load_own(name: str, takes: tuple[str, ...]) -> Callable:
    """As `find_own`; a class is made."""
    found = find_own(name, takes)
    return found() if isinstance(found, type) else found


@functools.cache
def inside(file: str) -> dict:
    """What a file of Python defines; it is run once."""
    if not Path(file).is_file():
        raise FileNotFoundError(f"there is no file {file}; write FILE.py:NAME")
    spec = spec_from_file_location(Path(file).stem, file)
    module = module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    except Exception as error:  # whatever the file does
        raise ValueError(f"{file} cannot be run: {type(error).__name__}: {' '.join(str(error).split())}") from error
    return vars(module)
