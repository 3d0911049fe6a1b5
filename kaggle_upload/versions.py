"""versions.csv: what was published, a line a version. People, spreadsheets and git edit it."""

from __future__ import annotations

import csv
import io
import re
import tempfile
from pathlib import Path

from kaggle_upload.handles import UploadError

COLUMNS = tuple("handle version sha256 base rank style rows_hash scores notes commit time".split())
NEEDED = COLUMNS[:3]
MARKER = re.compile(r"<{7}( |$)|>{7}( |$)")


def read(path: Path) -> list[dict[str, str]]:
    """The rows, by column; none where there is no file yet.

    A byte order mark, semicolons or tabs, "2.0" for 2, blank lines, a repeated header, columns of
    the user's own and columns that came later are read. Raises UploadError, with the line, for
    what can't be: `write` must lose nothing.
    """
    if not path.exists():
        return []
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise UploadError(f"{path} is not UTF-8 ({error}): save it as 'CSV UTF-8'.") from error
    text = re.sub(r'\A"?sep=[,;\t|]"?(?=\r|\n)', "", text)  # a line that Excel writes and reads
    lines = text.splitlines()
    if marked := [str(n) for n, line in enumerate(lines, 1) if MARKER.match(line)]:
        raise UploadError(
            f"{path} holds git's conflict markers (line {', '.join(marked)}): delete them, the "
            "line of ======= too, and keep the records of both sides."
        )
    first = next((line for line in lines if line.strip()), "")
    separator = max(",;\t|", key=first.count)
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=separator, strict=True)
    header: list[str] = []
    rows = []
    try:
        for record in reader:
            where = f"{path}, line {reader.line_num}"
            names = [name.strip().lower() for name in record]
            if not any(names):
                continue
            if not header:
                header = names[: max(n for n, name in enumerate(names) if name) + 1]
                if missing := [name for name in NEEDED if name not in header]:
                    raise UploadError(
                        f"{where} is the header and lacks {', '.join(missing)}: give the file, or "
                        "the line, back, or name another file as --versions."
                    )
                if twice := sorted({name for name in header if name and header.count(name) > 1}):
                    raise UploadError(
                        f"{where} has the column {twice[0]} more than once: keep one."
                    )
                continue
            if names[: len(header)] == header:
                continue
            if len(record) < len(header) or any(names[len(header) :]):
                raise UploadError(
                    f"{where} has {len(record)} fields, the header {len(header)}: correct the line."
                )
            row = dict.fromkeys(COLUMNS, "") | dict(zip(header, record, strict=False))
            row |= {"handle": row["handle"].strip(), "sha256": row["sha256"].strip().lower()}
            rows.append(row | {"version": _number(row, where)})
    except csv.Error as error:
        raise UploadError(f"{path}, line {reader.line_num}: {error}; correct the line.") from error
    return rows


def write(path: Path, rows: list[dict[str, str]]) -> None:
    """Replace the file by these rows, at once. Raises OSError; the file is then as it was."""
    from prompt_recovery.files import replaced  # imports pandas

    columns = list(dict.fromkeys([*COLUMNS, *(name for row in rows for name in row)]))
    with replaced(path) as partial, partial.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, columns, restval="", lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)


def check(path: Path) -> list[dict[str, str]]:
    """The rows, once it is clear that more can be written. Raises UploadError."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=path.parent):
            pass
    except OSError as error:
        raise UploadError(
            f"{path} can't be written ({error}): give another file as --versions."
        ) from error
    return read(path)


def _number(row: dict[str, str], where: str) -> str:
    found = re.fullmatch(r"([1-9]\d*)(?:[.,]0+)?", row["version"].strip())
    if not found:
        raise UploadError(f"{where}: the version {row['version']!r} is no number; correct it.")
    return found[1]
