"""What the tests of several modules share: commands and their refusals, paths, groups of features."""

from pathlib import Path

import torch
from hypothesis import strategies as st

ROOT = Path(__file__).parents[1]
DATA = Path(__file__).parent / "data"


def exit_code(main, arguments: list) -> int:
    """Of a command, whether its main returns it or ends the process."""
    try:
        return main([str(argument) for argument in arguments])
    except SystemExit as end:
        return end.code


def refusal(main, arguments: list, capsys) -> str:
    """The one line with which a command refuses its arguments, with exit code 2."""
    capsys.readouterr()
    assert exit_code(main, arguments) == 2
    lines = capsys.readouterr().err.strip().splitlines()
    assert len(lines) == 1 and lines[0].startswith("error: "), lines
    return lines[0]


def flags(values: dict) -> list[str]:
    """Options as a command line spells them; True and False are --name and --no-name."""
    words = []
    for name, value in values.items():
        dashed = name.replace("_", "-")
        words += (
            [f"--{dashed}" if value else f"--no-{dashed}"] if isinstance(value, bool) else [f"--{dashed}", str(value)]
        )
    return words


@st.composite
def features(draw):
    G, K, D = draw(st.integers(1, 4)), draw(st.integers(2, 9)), draw(st.integers(1, 12))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    return torch.randn(G, K, D, generator=generator, dtype=torch.float64) * draw(st.floats(0.01, 100))
