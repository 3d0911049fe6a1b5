"""The writer of tables that a reader never sees half of."""

from __future__ import annotations

import os
from pathlib import Path

import pandas as pd


def write_csv(frame: pd.DataFrame, path: Path) -> None:
    """Write a CSV beside `path` and move it there, so that a reader never sees half a file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(path.name + ".partial")
    frame.to_csv(partial, index=False)
    os.replace(partial, path)


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
