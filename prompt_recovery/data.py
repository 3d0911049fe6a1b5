"""Rows from CSV files: read, check, clean with an account of what was dropped."""

from __future__ import annotations

import hashlib
import json
import os
import re
import unicodedata
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import pandas as pd

from prompt_recovery.cleaning import strip_lead_in
from prompt_recovery.refusals import is_refusal
from prompt_recovery.tables import DataError, read_table
from prompt_recovery.unwrap import is_prompt

ROW_COLUMNS = ("original_text", "rewritten_text", "rewrite_prompt")
TEST_COLUMNS = ("id", "original_text", "rewritten_text")
ACCOUNT_COLUMNS = ("id", "origin", "reason", "action")
# what astype(str) makes of a value that is missing; "NA" and "null" may be somebody's texts
MISSING = ("nan", "None", "NaT", "<NA>")


def read_rows(
    paths: str | Path | Sequence[str | Path], columns: Sequence[str] = ROW_COLUMNS
) -> pd.DataFrame:
    """Read one or several files of training rows into one table.

    The files are CSV (UTF-8, header) or what tables.read_table reads besides. columns: those that
    each file must have; truths need no texts.

    Columns, all str and never NA: id, original_text, rewritten_text, rewrite_prompt, response (''
    where the file has none), origin ("file.csv:7" is data row 7, counted from 1 under the header),
    file (its path); and split, of the file's own, where some file has it ('' in the others). A file
    without an id column gets ids of its stem and row number; where most ids of a file stand in
    another one too, each has its file's stem before it. Windows line ends inside a text become
    "\\n"; nothing else is changed.

    Raises DataError for a missing or empty file, missing columns, bad UTF-8, malformed CSV, blank
    or duplicate ids.
    """
    files = [Path(paths)] if isinstance(paths, (str, Path)) else [Path(path) for path in paths]
    if not files:
        raise DataError("No CSV file was given: name at least one.")
    repeated = [path for path, n in Counter(map(os.path.realpath, files)).items() if n > 1]
    if repeated:
        raise DataError(f"{repeated[0]} is given more than once: name each file once.")
    parts = []
    for path, stem in zip(files, _apart(files), strict=True):
        table = _read_csv(path, columns)
        if table.empty:
            raise DataError(f"{path} has a header but no rows: give at least one row.")
        numbers = range(1, len(table) + 1)
        if "id" not in table:
            table["id"] = _numbered(stem, len(table))
        if "response" not in table:
            table["response"] = ""
        kept = [name for name in ("id", "response", "split") if name in table]
        table[kept] = table[kept].where(~table[kept].isin(MISSING), "")
        table["origin"] = [f"{path.name}:{n}" for n in numbers]
        table["file"] = str(path)
        parts.append(table[["id", *columns, *kept[1:], "origin", "file"]])
    for part in parts:
        _refuse_bad_ids(part)
    rows = pd.concat(parts, ignore_index=True).fillna("")
    collisions = rows["id"].duplicated(keep=False).groupby(rows["file"]).mean()
    if collisions.max() > 0.5:  # public files that count from 0 each; a few equal ids are a mistake
        names = rows["file"].map(
            {str(path): name for path, name in zip(files, _apart(files), strict=True)}
        )
        rows["id"] = names + "-" + rows["id"]
        print(
            "ids stand in several files: each has its file's name before it, as in "
            f"{rows['id'].iloc[0]!r}"
        )
    _refuse_bad_ids(rows)
    return rows


def _apart(files: Sequence[Path]) -> list[str]:
    """The stems of the files. Two folders may each hold a rows.csv: the second one's carries a
    number."""
    seen: Counter[str] = Counter()
    names = []
    for path in files:
        seen[path.stem] += 1
        names.append(path.stem if seen[path.stem] == 1 else f"{path.stem}-{seen[path.stem]}")
    return names


def rows_hash(rows: pd.DataFrame) -> str:
    """12 hexadecimal digits that stand for what rows teach: their ids, texts, prompts and
    responses, in this order."""
    kept = rows[["id", *ROW_COLUMNS, "response"]]
    return hashlib.sha256(json.dumps(kept.to_numpy().tolist()).encode()).hexdigest()[:12]


def read_test(path: str | Path) -> pd.DataFrame:
    """Read a test CSV: columns id (exactly as written), original_text, rewritten_text, all str, in
    file order. A file of training rows is read too, without their prompts and responses; where it
    has no ids, its rows are called as read_rows calls them.

    No row is ever dropped: blank texts stay, and a file with a header and no rows gives an empty
    table.
    Raises DataError as read_rows does.
    """
    path = Path(path)
    table = _read_csv(path, TEST_COLUMNS)
    if "id" not in table:
        table["id"] = _numbered(path.stem, len(table))
    table = table[list(TEST_COLUMNS)]
    checked = table.assign(
        origin=[f"{path.name}:{n}" for n in range(1, len(table) + 1)], file=str(path)
    )
    _refuse_bad_ids(checked)
    return table


def _numbered(stem: str, count: int) -> list[str]:
    """Ids of rows that have none."""
    return [f"{stem}-{n}" for n in range(1, count + 1)]


def _read_csv(path: Path, needed: Sequence[str]) -> pd.DataFrame:
    header, records = read_table(path, [name for name in needed if name != "id"])
    missing = [name for name in needed if name not in header]
    if missing == ["id"] and "rewrite_prompt" in header:
        missing = []  # training rows need none
    if missing:
        hint = ""
        if len(header) == 1 and re.search(r"[;\t|]", header[0]):
            hint = " The columns must be separated by commas."
        raise DataError(
            f"{path} has no column {', '.join(missing)}; its columns are {str(header)[:300]}.{hint}"
        )
    twice = [name for name in (*needed, "id", "response", "split") if header.count(name) > 1]
    if twice:
        raise DataError(f"{path} has the column {twice[0]} more than once: keep one.")
    wanted = [
        name for name in dict.fromkeys(("id", *needed, "response", "split")) if name in header
    ]
    columns = {name: [record[header.index(name)] for record in records] for name in wanted}
    for name in wanted:
        if name != "id":
            columns[name] = [value.replace("\r\n", "\n") for value in columns[name]]
    return pd.DataFrame(columns, columns=wanted, dtype=str)


def _refuse_bad_ids(rows: pd.DataFrame) -> None:
    """Raise DataError for blank ids and for ids that stand twice; rows has id, origin and file."""
    blank = rows[rows["id"].str.strip() == ""]
    if len(blank):
        places = ", ".join(blank["origin"].head(10))
        raise DataError(
            f"{blank['file'].iloc[0]}: column id is blank in {len(blank)} rows: {places}. Fill "
            "them in."
        )
    doubled = rows[rows["id"].duplicated(keep=False)]
    if len(doubled):
        shown = []
        for value, group in list(doubled.groupby("id", sort=False))[:5]:
            shown.append(f"{value!r} in {', '.join(group['origin'].head(5))}")
        files = ", ".join(dict.fromkeys(doubled["file"]))
        raise DataError(
            f"{files}: column id has {doubled['id'].nunique()} values more than once (file:row): "
            f"{'; '.join(shown)}. Make every id unique within and across the files."
        )


def clean_rows(
    rows: pd.DataFrame, strip_lead_ins: bool = False
) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Drop rows that teach nothing; returns (kept rows, account).

    account has one line per dropped or changed row: id, origin, reason, action ('dropped' |
    'changed').
    Reasons: "blank <column>", "<column> is 'nan'" (or another of MISSING),
    "rewrite_prompt is 'N/A', which says nothing" (see unwrap.is_prompt), "identical original and
    rewritten", "refusal", "exact duplicate" (the first one stays), and with strip_lead_ins
    "lead-in stripped" (changed). The tables given are not altered.
    """
    entries: list[tuple[str, str, str, str]] = []
    kept: list[int] = []
    rewritten_texts: list[str] = []
    seen: set[tuple[str, str, str]] = set()
    columns = [rows[name].tolist() for name in ("id", "origin", *ROW_COLUMNS)]
    for position, (row_id, origin, original, rewritten, prompt) in enumerate(
        zip(*columns, strict=True)
    ):
        if strip_lead_ins:
            stripped = strip_lead_in(rewritten)
            if stripped != rewritten:
                entries.append((row_id, origin, "lead-in stripped", "changed"))
                rewritten = stripped
        texts = (original.strip(), rewritten.strip(), prompt.strip())
        blank = [name for name, text in zip(ROW_COLUMNS, texts, strict=True) if not text]
        unsaid = [name for name, text in zip(ROW_COLUMNS, texts, strict=True) if text in MISSING]
        if blank:
            reason = f"blank {blank[0]}"
        elif unsaid:
            reason = f"{unsaid[0]} is {texts[ROW_COLUMNS.index(unsaid[0])]!r}"
        elif not is_prompt(texts[2]):  # an answer like it would be read as none
            reason = f"rewrite_prompt is {texts[2][:20]!r}, which says nothing"
        elif texts[0] == texts[1]:
            reason = "identical original and rewritten"
        elif is_refusal(rewritten):
            reason = "refusal"
        elif texts in seen:
            reason = "exact duplicate"
        else:
            seen.add(texts)
            kept.append(position)
            rewritten_texts.append(rewritten)
            continue
        entries.append((row_id, origin, reason, "dropped"))
    clean = rows.iloc[kept].reset_index(drop=True)
    clean["rewritten_text"] = pd.Series(rewritten_texts, dtype=rows["rewritten_text"].dtype)
    return clean, pd.DataFrame(entries, columns=list(ACCOUNT_COLUMNS), dtype=str)


def describe(rows: pd.DataFrame, account: pd.DataFrame) -> str:
    """A short report of the rows that stay and of the account of clean_rows, several lines of
    text."""
    dropped = int((account["action"] == "dropped").sum())
    lines = [
        f"{len(rows) + dropped} rows read, {dropped} dropped, {len(rows)} kept",
        *describe_account(account),
    ]
    if len(rows):
        words = [
            int(rows[name].map(lambda text: len(text.split())).median()) for name in ROW_COLUMNS
        ]
        lines.append(f"median words: original {words[0]}, rewritten {words[1]}, prompt {words[2]}")
        lines.append(f"distinct prompts: {rows['rewrite_prompt'].map(normalise).nunique()}")
    return "\n".join(lines)


def describe_account(account: pd.DataFrame) -> list[str]:
    """A line for each action and reason of an account: how many rows, and the first five."""
    lines = []
    for (verb, reason), group in account.groupby(["action", "reason"], sort=True):
        places = ", ".join(group["origin"].head(5)) + (" ..." if len(group) > 5 else "")
        lines.append(f"  {verb} {len(group)}: {reason} ({places})")
    return lines


# --- wording --------------------------------------------------------------------------------------


def normalise(text: str) -> str:
    """Wording alone: NFKC, casefold, apostrophes removed, other punctuation and white space to
    single spaces.

    A text of punctuation alone stays itself (stripped), so that "?" and "!" are not the same.
    """
    folded = unicodedata.normalize("NFKC", text).casefold()
    folded = re.sub(r"['\u2018\u2019`]", "", folded)
    spaced = "".join(" " if unicodedata.category(char).startswith("P") else char for char in folded)
    return " ".join(spaced.split()) or text.strip()
