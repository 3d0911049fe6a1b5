"""The one writer of files."""

import os
from pathlib import Path

import pytest

from prompt_recovery import files


def test_the_next_writers_file_is_not_removed_behind_a_replacement(tmp_path, monkeypatch):
    """Threads of one process write under the same name, one after the other."""
    replace = os.replace

    def another_begins(partial, path):
        replace(partial, path)
        Path(partial).write_text("next")

    monkeypatch.setattr(os, "replace", another_begins)
    with files.replaced(tmp_path / "table.csv") as partial:
        partial.write_text("first")
    assert partial.read_text() == "next" and (tmp_path / "table.csv").read_text() == "first"


def test_what_was_begun_and_failed_is_removed(tmp_path):
    with pytest.raises(ValueError, match="half"), files.replaced(tmp_path / "a.csv") as partial:
        partial.write_text("ha")
        raise ValueError("half")
    assert list(tmp_path.iterdir()) == []
