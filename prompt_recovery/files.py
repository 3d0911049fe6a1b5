"""The one writer and the one reader of our own tables: atomic, and texts come back as they were."""

from __future__ import annotations

import csv
import errno
import hashlib
import os
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import pandas as pd


@contextmanager
def room_said(path: Path) -> Iterator[None]:
    """A full disk is said with the path and the room there: the system's own error has neither."""
    try:
        yield
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            raise
        folder = next(each for each in path.absolute().parents if each.exists())
        free = shutil.disk_usage(folder).free / 2**20
        raise OSError(
            error.errno,
            f"{error.strerror}: {path} could not be written, {free:,.0f} MiB free there. Make "
            "room, or give another place",
        ) from error


@contextmanager
def replaced(path: Path) -> Iterator[Path]:
    """A path beside `path` to write to, moved there at the end. Several processes may write the
    same file."""
    partial = path.with_name(f"{path.name}.{os.getpid()}.partial")
    try:
        with room_said(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            yield partial
            os.replace(partial, path)
    except BaseException:  # behind the replacement the name is the next writer's
        partial.unlink(missing_ok=True)
        raise


def write_text(text: str, path: Path) -> None:
    """Write a UTF-8 text so that a reader never sees half a file."""
    with replaced(path) as partial:
        partial.write_text(text, encoding="utf-8")


def write_csv(frame: pd.DataFrame, path: Path) -> None:
    """Write a CSV so that a reader never sees half a file.

    Texts are quoted where one of them holds a carriage return: readers take a bare one for a line's
    end.
    """
    texts = frame.select_dtypes(exclude="number")
    returns = texts.map(lambda value: "\r" in str(value)).any(axis=None)
    with replaced(path) as partial:
        frame.to_csv(
            partial, index=False, quoting=csv.QUOTE_NONNUMERIC if returns else csv.QUOTE_MINIMAL
        )


def sha256(path: Path) -> str:
    """Of a file's bytes, hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def located(path: str) -> str:
    """A path of a notebook's settings, the same wherever the notebook runs.

    papermill runs it in the caller's folder, editors in its own. There, a relative path that is not
    found means one in the folder above notebooks/, and so does one that is yet to be made.
    """
    here = Path(path).expanduser()
    above = Path.cwd().parent / here  # an absolute path stays itself
    if here.exists() or Path.cwd().name != "notebooks" or here.parts[:1] == ("..",):
        return str(here) if path.startswith("~") else path
    return str(above)


def read_csv(path: Path, numbers: Sequence[str] = ()) -> pd.DataFrame:
    """A table of write_csv: all columns str, never missing ("N/A" and "007" stay), but for those of
    `numbers`."""
    frame = pd.read_csv(path, dtype=str, keep_default_na=False, encoding="utf-8")
    return frame.assign(**{name: pd.to_numeric(frame[name]) for name in numbers})
