"""Places that can be written, tried before the work rather than noticed after it."""

import tempfile
from pathlib import Path


def refuse_unwritable(path: Path | str, what: str) -> None:
    """Raise OSError in one line where a file at `path` could not be written; `what` is its option, such as "--output".

    Folders that are missing are made, a file is written there, and all of it is taken away again: permissions alone
    do not tell of a read-only disk, nor do they stop root.
    """
    path, made = Path(path), []
    try:
        if path.is_dir():
            raise IsADirectoryError(f"is a folder; give the name of a file in it, such as {path / 'result'}")
        if path.exists() and not path.is_file():  # replacing /dev/null would be no service
            raise OSError("is a device, not a file; choose another name")
        for folder in (path.parent, *path.parent.parents):
            if folder.exists():
                if not folder.is_dir():
                    raise NotADirectoryError(f"{folder} is a file, not a folder; choose another place")
                break
            made.append(folder)
        path.parent.mkdir(parents=True, exist_ok=True)
        # the longest name that writing takes: `atomic_write` puts ".tmp" behind it
        with tempfile.NamedTemporaryFile(dir=path.parent, prefix=f"{path.name}.", suffix="") as file:
            file.write(b" ")
            file.flush()
    except (OSError, ValueError) as error:  # ValueError: a name with a null character
        own = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
        remedy = "" if ";" in own else "; choose another place"
        raise OSError(f"cannot write {what} {str(path)!r}: {own}{remedy}") from error
    finally:
        for folder in made:
            try:
                folder.rmdir()
            except (OSError, ValueError):  # never made, or another process has put something into it meanwhile
                pass
