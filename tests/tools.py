"""What the tests of several modules share."""

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
        words += [f"--{dashed}" if value else f"--no-{dashed}"] if isinstance(value, bool) else [f"--{dashed}", str(value)]
    return words
