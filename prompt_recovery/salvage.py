"""A hidden test.csv that breaks the rules, read as far as it can be: nobody can mend it while a
submission is scored."""

from __future__ import annotations

import csv
import io
from pathlib import Path

import pandas as pd

from prompt_recovery.data import TEST_COLUMNS, DataError
from prompt_recovery.tables import FIELD_LIMIT

# stands for a bare CR while lines are split, as pandas' writer leaves them unquoted in a text
BARE_CR = "\ue00d"


def salvage_test(path: str | Path) -> pd.DataFrame:
    """The columns of `data.read_test`, a row for every row of the file in its order, ids as
    written: blank and doubled ones too.

    Bytes that are not UTF-8 are read as UTF-16 if they say so, else as Windows-1252; bare CRs
    belong to their text, unless the file has no other line ends; a row with too many fields keeps
    the rest in its last text, one with too few has blank ones. Raises DataError where there is no
    column id.
    """
    text = _decode(Path(path).read_bytes())
    if "\n" in text:
        text = text.replace("\r\n", "\n").replace("\r", BARE_CR)
    old_limit = csv.field_size_limit(FIELD_LIMIT)
    try:
        # a NUL would end the reading; without strict a stray quote stays in its text
        lines = [row for row in csv.reader(io.StringIO(text.replace("\0", ""), newline="")) if row]
    finally:
        csv.field_size_limit(old_limit)
    header, records = (lines[0], lines[1:]) if lines else ([], [])
    header = [name.strip(f" {BARE_CR}\ufeff") for name in header]
    if "id" not in header:
        raise DataError(
            f"{path} has no column id; its columns are {header}. Nothing can be answered."
        )
    width = len(header)
    rows = [
        [*row[: width - 1], ",".join(row[width - 1 :])] + [""] * (width - len(row))
        for row in records
    ]
    columns = {
        name: [row[header.index(name)] if name in header else "" for row in rows]
        for name in TEST_COLUMNS
    }
    return pd.DataFrame(columns, dtype=str).map(lambda value: value.replace(BARE_CR, "\r"))


def _decode(content: bytes) -> str:
    wide = content.startswith((b"\xff\xfe", b"\xfe\xff"))
    for encoding in ("utf-16",) if wide else ("utf-8-sig", "cp1252"):
        try:
            return content.decode(encoding)
        except UnicodeDecodeError:
            continue
    return content.decode("latin-1")  # has a character for every byte
