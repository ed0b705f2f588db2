"""Text files as people save them: the one reader of prompts, tables and JSON.

UTF-8 with or without a byte order mark, UTF-16 and UTF-32 with one; lines end with LF, CR LF or CR and with
nothing else; tables are separated by commas, semicolons or tabs. What cannot be read is refused in one line
that names the file, the line and the remedy.
"""

import codecs
import csv
import io
import json
import re
import stat
from pathlib import Path

MARKS = (  # the longer first: UTF-32's mark begins with UTF-16's
    (codecs.BOM_UTF32_LE, "utf-32-le"),
    (codecs.BOM_UTF32_BE, "utf-32-be"),
    (codecs.BOM_UTF8, "utf-8"),
    (codecs.BOM_UTF16_LE, "utf-16-le"),
    (codecs.BOM_UTF16_BE, "utf-16-be"),
)
LINE_END = re.compile(r"\r\n|\n|\r")
SEPARATORS = {",": "commas", ";": "semicolons", "\t": "tabs"}


def read_text(path: Path | str) -> str:
    """The file's text. Raises OSError (missing, a folder, no permission) or ValueError (binary, another encoding)."""
    path = Path(path)
    try:
        kind = path.stat().st_mode
        if stat.S_ISDIR(kind):
            raise IsADirectoryError(f"{path} is a folder; give a file in it")
        if stat.S_ISCHR(kind) or stat.S_ISBLK(kind):
            raise OSError(f"{path} is a device; give a file")
        data = path.read_bytes()
    except ValueError as error:  # a null character in the name
        raise FileNotFoundError(f"there is no file {str(path)!r}; give a text file") from error
    except OSError as error:
        if error.errno is None:
            raise
        if isinstance(error, FileNotFoundError | NotADirectoryError):
            raise FileNotFoundError(f"there is no file {path}; give a text file") from error
        raise OSError(f"cannot read {path}: {error.strerror}; give another file") from error
    mark, encoding = next(((mark, name) for mark, name in MARKS if data.startswith(mark)), (b"", "utf-8"))
    if not mark and b"\0" in data[:2] and data.count(0) >= 0.4 * len(data) > 1:
        raise ValueError(f"{path} is UTF-16 without a byte order mark; save it as UTF-8")
    data = data[len(mark) :]
    try:
        text = data.decode(encoding)
    except UnicodeDecodeError as error:
        if encoding == "utf-8" and any(byte < 32 and byte not in b"\t\n\v\f\r\x1b" for byte in data):
            raise ValueError(f"{path} is a binary file, not text; save it as UTF-8 text") from error
        line = 1 + len(LINE_END.findall(data[: error.start].decode(encoding, errors="ignore")))
        wrong = "UTF-8; it may be Latin-1 or Windows-1252" if encoding == "utf-8" else f"whole {encoding[:6].upper()}"
        byte = f"byte 0x{data[error.start]:02x}"
        raise ValueError(f"{path}, line {line}: {byte} is not {wrong}; save the file as UTF-8") from error
    if "\0" in text:
        raise ValueError(f"{path} is a binary file, not text; save it as UTF-8 text")
    return text


def read_lines(path: Path | str) -> list[str]:
    """The file's lines without their ends; a last line that is ended is followed by none."""
    lines = LINE_END.split(read_text(path))
    return lines[:-1] if lines[-1] == "" else lines


def read_json(path: Path | str, kind=dict, remedy: str = "fetch the file again"):
    """The file's JSON, an object unless told otherwise. Raises as `read_text`, and ValueError naming file and line."""
    text = read_text(path)
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:
        place = f", line {error.lineno}" if isinstance(error, json.JSONDecodeError) else ""
        reason = getattr(error, "msg", None) or ("an empty file" if not text.strip() else "too deep or too long")
        raise ValueError(f"{path}{place}: bad JSON ({reason}); {remedy}") from error
    if not isinstance(value, kind):
        wanted = {dict: "an object {...}", list: "an array [...]"}.get(kind, "an object or an array")
        raise ValueError(f"{path} holds JSON, but not {wanted}; {remedy}")
    return value


def read_table(path: Path | str, needs: tuple[str, ...]) -> list[tuple[int, dict[str, str]]]:
    """(line, {column: cell}) of every row; column names in small letters, cells without white space around them.

    needs   names of which the header must hold one; they tell which separator the file has

    Raises ValueError naming file and line: none of `needs`, a name twice, a row with more or fewer cells than
    the header (a comma that is not quoted), an open quote, an empty line, no rows.
    """
    text, wanted = read_text(path), " or ".join(needs)
    if not text.strip():
        raise ValueError(f"{path} is empty; its first line must name the columns, {wanted} among them")
    first = LINE_END.split(text, maxsplit=1)[0]
    separators = sorted(SEPARATORS, key=lambda s: (s == "\t") != (Path(path).suffix.casefold() == ".tsv"))
    headers = [(next(csv.reader([first], delimiter=s), []), s) for s in separators]
    headers = [([name.strip().casefold() for name in names], s) for names, s in headers]
    header, between = next((found for found in headers if set(needs) & set(found[0])), ([], ","))
    if not header:
        raise ValueError(f"{path}, line 1: no column {wanted}, got {first[:60]!r}; name the columns in the first line")
    for name in header:
        if header.count(name) > 1:
            raise ValueError(f"{path}, line 1: two columns are called {name!r}; give each a name of its own")
    rows, reader = [], csv.reader(io.StringIO(text, newline=""), delimiter=between, strict=True)
    line = 1  # the one that a row begins with; a quoted cell may hold several
    try:
        for cells in reader:
            cells = [cell.strip() for cell in cells]
            if not any(cells):
                raise ValueError(f"{path}, line {line}: empty line; every line must hold a row")
            if len(cells) != len(header):
                raise ValueError(
                    f"{path}, line {line}: {len(cells)} cells where the header has {len(header)}; put a cell that "
                    f"holds {SEPARATORS[between]} into double quotes"
                )
            rows.append((line, dict(zip(header, cells))))
            line = reader.line_num + 1
    except csv.Error as error:
        raise ValueError(f"{path}, line {line}: {error}; close every quote, and double those within a cell") from error
    if not rows[1:]:
        raise ValueError(f"{path} has a header and no rows; give a file with rows")
    return rows[1:]
