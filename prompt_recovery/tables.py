"""A table of texts from the files that people have: CSV in its dialects, JSON lines, Parquet,
packed."""

from __future__ import annotations

import csv
import io
import json
import math
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from prompt_recovery.packing import GET_AGAIN, PACKED, SAVE_AS, DataError, read_bytes, unpacked

# Longer than any text; csv's own limit of 131,072 characters would refuse a long book chapter.
FIELD_LIMIT = 2**31 - 1
SEPARATORS = {",": "commas", ";": "semicolons", "\t": "tabs", "|": "bars"}
TEXTS = ("id", "original_text", "rewritten_text", "rewrite_prompt")
ONE_OBJECT = "is one JSON object: write one a line (pandas: to_json(orient='records', lines=True))"


def read_table(path: Path, needed: Sequence[str]) -> tuple[list[str], list[list[str]]]:
    """Header and records of a file, every value a str; the strict parser refuses a broken CSV.

    The first bytes tell what the file is, not its name. Names of columns are taken without white
    space around them, in lower case. What was read in another way than a plain CSV is printed.

    Args:
        path: the file; it may be packed (zip with one file in it, gzip, bzip2, xz).
        needed: columns by which the separator is told.

    Raises:
        DataError: for no file, an empty one, one that is no table (it says what it is), bad UTF-8,
            malformed records, a header that stands inside in another order.
    """
    notes: list[str] = []
    content = unpacked(path, read_bytes(path), notes)
    if content.startswith(b"PAR1"):
        notes.append("Parquet")
        header, records = _parquet(path, content)
    else:
        text = _decoded(path, content)
        if json_lines := _json(path, text, needed):
            notes.append("JSON")
            header, records = json_lines
        else:
            header, records = _csv(path, text, needed, notes)
    names = [_name(name) for name in header]
    rows = [record for record in records if [_name(value) for value in record] != names]
    if len(rows) < len(records):
        notes.append(f"without {len(records) - len(rows)} repeated headers")
    for number, record in enumerate(rows, 1):
        if set(needed) <= {_name(value) for value in record}:
            raise DataError(
                f"{path} has another header as row {number}, {record}: give files with other "
                "columns apart."
            )
    if notes:
        print(f"{path}: read as {', '.join(notes)}")
    return names, rows


def columns_of(path: Path) -> list[str]:
    """Names of a file's columns, as `read_table` gives them, by as little of it as tells; [] for a
    text that is no table. What is wrong behind the header is not seen.

    Raises DataError for a file that holds something else, or is packed and damaged.
    """
    with path.open("rb") as file:
        start = file.read(2**16)
        whole = start.startswith((b"PK", b"PAR1", b"[", *PACKED)) or b"\n" not in start
        content = unpacked(path, start + (file.read() if whole else b""), [])
    if content.startswith(b"PAR1"):
        return [_name(name) for name in _parquet(path, content)[0]]
    text = content.decode("utf-8-sig", errors="ignore")
    if text[:1] in ("[", "{"):
        try:
            found = json.loads(text if text[0] == "[" else text.partition("\n")[0])
        except (ValueError, RecursionError):
            return []
        rows = found if isinstance(found, list) else [found]
        return [_name(name) for row in rows[:1] if isinstance(row, dict) for name in row]
    text = re.sub(r'\A"?sep=[,;|\t]"?\r?\n', "", text)
    line = re.match(r"[^\r\n]{0,10000}", text)
    headers = [
        next(csv.reader([line[0] if line else ""], delimiter=each), []) for each in SEPARATORS
    ]
    return [_name(name) for name in max(headers, key=len)]


def _name(text: str) -> str:
    """A column's name: no quotes and marks around it, "Original Text" is original_text."""
    return re.sub(r"[\s-]+", "_", text.strip('\ufeff\u200b\u00a0" \t\r\n').lower())


def _decoded(path: Path, content: bytes) -> str:
    if content[:400].count(0) > len(content[:400]) / 4:
        raise DataError(
            f"{path} is not UTF-8 but UTF-16 (Excel's 'Unicode Text'), or no text: {SAVE_AS}."
        )
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        raise DataError(
            f"{path} is not UTF-8: byte {content[error.start]:#04x} in line {line}. Save it as "
            "'CSV UTF-8'."
        ) from error


def _parquet(path: Path, content: bytes) -> tuple[list[str], list[list[str]]]:
    import pandas as pd

    try:
        frame = pd.read_parquet(io.BytesIO(content), engine="pyarrow")
    except ImportError as error:
        raise DataError(
            f"{path} is a Parquet file, and pyarrow, which reads them, is not installed: "
            "`pip install pyarrow`, or write the rows as CSV."
        ) from error
    except (OSError, ValueError) as error:  # pyarrow's own are ValueErrors
        raise DataError(f"{path} is a damaged Parquet file ({error}): {GET_AGAIN}.") from error
    rows = frame.astype(object).where(frame.notna(), None).to_dict("records")
    return _records(path, [{str(name): value for name, value in row.items()} for row in rows])


def _json(path: Path, text: str, needed: Sequence[str]) -> tuple[list[str], list[list[str]]] | None:
    """Rows of JSON lines or of a list of objects; None for a text that is no JSON."""
    if not re.match(r"\s*[\[{]", text):
        return None
    listed = text.lstrip().startswith("[")
    place = 1
    try:
        if listed:
            rows = json.loads(text, object_pairs_hook=_object)
        else:
            rows = []
            for place, line in enumerate(text.split("\n"), 1):  # noqa: B007  (for the message)
                rows += [json.loads(line, object_pairs_hook=_object)] if line.strip() else []
    except json.JSONDecodeError as error:
        try:
            json.loads(text)
        except json.JSONDecodeError:
            where = error if listed else f"line {place}: {error}"
            raise DataError(f"{path} is JSON, and broken ({where}); write it again.") from error
        raise DataError(f"{path} {ONE_OBJECT}.") from error
    except (RecursionError, ValueError) as error:  # nested too deep; numbers of 4,300 digits
        raise DataError(f"{path} is JSON that can't be read, line {place}: {error}.") from error
    wrong = [n for n, row in enumerate(rows, 1) if not isinstance(row, dict)]
    if wrong:
        raise DataError(f"{path} is JSON, and row {wrong[0]} is no object: write an object a row.")
    nested = [value for row in rows for value in row.values() if isinstance(value, (list, dict))]
    if nested and len(rows) == 1 and not any(isinstance(rows[0].get(n), str) for n in needed):
        raise DataError(f"{path} {ONE_OBJECT}.")
    return _records(path, rows)


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """A JSON object; json itself takes the last of several values of one name without a word."""
    values = dict(pairs)
    if len(values) < len(pairs):
        raise ValueError(f"an object has a name twice: {[name for name, _ in pairs]}"[:300])
    return values


def _records(path: Path, rows: list[dict[str, Any]]) -> tuple[list[str], list[list[str]]]:
    """The values as text; what is missing is ''."""
    header = list(dict.fromkeys(name for row in rows for name in row))
    records = [[_text(row.get(name)) for name in header] for row in rows]
    for number, (row, record) in enumerate(zip(rows, records, strict=True), 1):
        for name, value in zip(header, record, strict=True):
            if isinstance(row.get(name), (list, dict)) and _name(name) in TEXTS:
                raise DataError(f"{path}: {name} of row {number} is no text but {value[:60]}.")
            if re.search("[\ud800-\udfff]", value):
                raise DataError(
                    f"{path}: {name} of row {number} holds half a character (a surrogate)."
                )
    return header, records


def _text(value: Any) -> str:
    if isinstance(value, str):
        return value
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return ""
    nested = isinstance(value, (list, dict, bool))
    return json.dumps(value, ensure_ascii=False) if nested else str(value)


def _csv(
    path: Path, text: str, needed: Sequence[str], notes: list[str]
) -> tuple[list[str], list[list[str]]]:
    named = re.match(r'"?sep=([,;|\t])"?\r?\n', text)  # a line that Excel writes and reads
    if named:
        text = text[named.end() :]
    line = re.match(r"[^\r\n]{0,10000}", text.lstrip())
    separator = ","
    for each in SEPARATORS:
        first = next(csv.reader([line[0] if line else ""], delimiter=each), [])
        if set(needed) <= {_name(name) for name in first}:
            separator = each
            spaced = len(first) > 1 and all(name.startswith(" ") for name in first[1:])
            break
    else:
        spaced = False
    if separator != ",":
        notes.append(f"separated by {SEPARATORS[separator]}")
    if spaced:
        notes.append("a space behind each separator")
    header, records, wrong = _parse(path, text, separator, spaced)
    if not text.strip():
        raise DataError(f"{path} is empty: it needs a header and rows.")
    for number, record in enumerate(records, 1):
        if len(record) > len(header) > 1 and record[1 - len(header) :] == header[1:]:
            raise DataError(
                f"{path} holds the header inside row {number}: files were put together, and the "
                "first does not end in a line end. Give each file by itself."
            )
        if record[0].startswith("<<<<<<< ") and len(record) != len(header):
            raise DataError(f"{path} holds git's conflict markers (row {number}): settle them.")
    if wrong:
        remedy = "Put texts that hold commas or line ends in double quotes."
        if not set(needed) <= {_name(name) for name in header}:
            remedy = f"The first line must be the header; it is {str(header)[:200]}."
        raise DataError(
            f"{path} has {len(header)} columns, but "
            f"{'; '.join(wrong[:5])}{' ...' if len(wrong) > 5 else ''}. {remedy}"
        )
    return header, records


def _parse(
    path: Path, text: str, separator: str, spaced: bool
) -> tuple[list[str], list[list[str]], list[str]]:
    """Header and records of a CSV text, and what is said of records of another length than the
    header. csv, not pandas: pandas pads short rows without a word."""
    old_limit = csv.field_size_limit(FIELD_LIMIT)
    try:
        # newline="" keeps the line ends inside quotes as they are; strict refuses stray and
        # unclosed quotes.
        lines = io.StringIO(text, newline="")
        reader = csv.reader(lines, delimiter=separator, skipinitialspace=spaced, strict=True)
        header: list[str] = []
        records: list[list[str]] = []
        wrong: list[str] = []
        start = 1
        try:
            for record in reader:
                line, start = start, reader.line_num + 1
                if not record:
                    continue
                if not header:
                    header = record
                    continue
                records.append(record)
                if len(record) != len(header):
                    wrong.append(f"row {len(records)} (line {line}) has {len(record)}")
        except csv.Error as error:
            raise DataError(
                f"{path} is malformed at row {len(records) + 1} (from line {start}): {error}. "
                "Put texts in double quotes, and write a quote inside a text as two."
            ) from error
    finally:
        csv.field_size_limit(old_limit)
    return header, records, wrong
