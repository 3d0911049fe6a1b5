"""The bytes of a file of rows, unpacked; a file that holds something else is named for what it is.
The first bytes tell, not the name."""

from __future__ import annotations

import bz2
import gzip
import io
import lzma
import re
import zipfile
import zlib
from pathlib import Path

UNPACKING = (zipfile.BadZipFile, zlib.error, lzma.LZMAError, EOFError, OSError, RuntimeError)
PACKED = {b"\x1f\x8b": gzip.decompress, b"BZh": bz2.decompress, b"\xfd7zXZ": lzma.decompress}
GET_AGAIN = "download the file itself once more"
SAVE_AS = "save it as 'CSV UTF-8'"
# what a file is that begins so, and what to do
OTHERS = (
    (rb"version https://git-lfs", "a Git LFS pointer, not the file: run `git lfs pull`"),
    (
        rb"[./]*\.git/annex/|/annex/objects/",
        "a git-annex pointer, not the file: run `git annex get`",
    ),
    (rb"(?i)\s*(<!--.*?-->\s*)*<(!doctype\s+html|html|head|body)", f"an HTML page: {GET_AGAIN}"),
    (rb"\s*<\?xml", f"an XML page: {GET_AGAIN}"),
    (rb"%PDF", "a PDF: give the rows as CSV"),
    (rb"\xd0\xcf\x11\xe0", f"an old Excel workbook: {SAVE_AS}"),
    (rb"SQLite format 3", "an SQLite database: write the table as CSV"),
    (rb"ARROW1|FEA1|\xff\xff\xff\xff", "an Arrow file: write it as CSV or Parquet"),
    (rb"\x28\xb5\x2f\xfd", "packed by zstd: unpack it with `unzstd`"),
    (rb"7z\xbc\xaf|Rar!", "a 7z or RAR archive: unpack it"),
    (rb".{257}ustar", "a tar archive: unpack it, and give the file of rows"),
    (rb"\x80[\x02-\x05]", "a pickle, which can run code when it is loaded: write it as CSV"),
    (rb"\x93NUMPY|\x89PNG|\xff\xd8\xff|GIF8", "no table of texts: check the path"),
    (rb"\s*\|[^\n]*\n\s*\|[ \t\r:|-]+\n", "a Markdown table: write it as CSV"),
)
# office files are zips
OFFICE = {
    r"xl/workbook\.(xml|bin)": f"an Excel workbook: {SAVE_AS}",
    r"word/document\.xml": "a Word document: give the rows as CSV",
    r"content\.xml": f"an OpenDocument file: {SAVE_AS}",
}


class DataError(ValueError):
    """Rows that can't be used as they are; the message names the file, the column and the rows."""


def read_bytes(path: Path) -> bytes:
    """The bytes of a file. Raises DataError for what is none, and for one that can't be read."""
    try:
        if path.is_dir():
            found = sorted(each.name for each in path.iterdir() if each.is_file())[:5]
            raise DataError(
                f"{path.absolute()} is a folder: give one of its files, such as {found}."
            )
        if path.exists() and not path.is_file():
            raise DataError(f"{path} is a pipe or a device: write what it gives into a file first.")
        return path.read_bytes()
    except FileNotFoundError as error:
        link = f", to which {path} links" if path.is_symlink() else ""
        place = path.readlink() if link else path.absolute()
        raise DataError(f"No file at {place}{link}: check the path.") from error
    except OSError as error:
        raise DataError(f"{path} can't be read: {error.strerror}.") from error


def unpacked(path: Path, content: bytes, notes: list[str]) -> bytes:
    """What is in the packing, and in that one's. Raises DataError for what is no table."""
    for start, meaning in OTHERS:
        if re.match(start, content[:400], re.DOTALL):
            raise DataError(f"{path} is {meaning}.")
    try:
        if content.startswith(b"PK\x03\x04") or content.startswith(b"PK\x05\x06"):
            with zipfile.ZipFile(io.BytesIO(content)) as archive:
                names = [each.filename for each in archive.infolist() if not each.is_dir()]
                for sign, meaning in OFFICE.items():
                    if any(re.fullmatch(sign, name) for name in names):
                        raise DataError(f"{path} is {meaning}.")
                names = [
                    n for n in names if not n.startswith("__MACOSX/") and n[-9:] != ".DS_Store"
                ]
                if len(names) != 1:
                    raise DataError(
                        f"{path} is a zip with {len(names)} files in it ({', '.join(names[:5])}): "
                        "unpack it, and give the one with the rows."
                    )
                notes.append(f"zip of {names[0]}")
                return unpacked(path, archive.read(names[0]), notes)
        for start, unpack in PACKED.items():
            if content.startswith(start):
                notes.append(unpack.__module__.lstrip("_"))
                return unpacked(path, unpack(content), notes)
    except DataError:
        raise  # it is a ValueError too, as is bz2's error for a file cut short
    except (*UNPACKING, ValueError) as error:
        raise DataError(
            f"{path} is packed and can't be unpacked ({error}): {GET_AGAIN}."
        ) from error
    return content
