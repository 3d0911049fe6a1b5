"""Push the submission notebook with its pinned sources, and hand a version of it in."""

from __future__ import annotations

import json
import re
import tempfile
from pathlib import Path
from typing import Any

from kaggle_upload import cli
from kaggle_upload.handles import Page, UploadError
from kaggle_upload.stage import lay_out, read


def push(handle: Page, path: Path, metadata: dict[str, Any], timeout: float) -> int:
    """Push the notebook and compare what Kaggle then holds with what was sent; the version number.

    Raises UploadError where it was not saved, or was saved without a source, public, or with internet.
    """
    with tempfile.TemporaryDirectory() as folder:
        lay_out(read([path]), Path(folder), {"kernel-metadata.json": metadata})
        reply = cli.run("kernels", "push", "-p", folder, timeout=timeout)
    print(reply.out.strip())
    pushed = re.search(r"^Kernel version (\d+) successfully pushed", reply.out, re.M)
    if reply.kind != "ok" or not pushed:
        raise UploadError(
            f"{reply.failure(f'Pushing {handle}')} If the reply was lost it may be there all the same: look at "
            f"https://www.kaggle.com/code/{handle} before pushing again, each push starts a run."
        )
    version = int(pushed[1])
    with tempfile.TemporaryDirectory() as folder:
        pulled = cli.run("kernels", "pull", f"{handle}/{version}", "-p", folder, "-m", timeout=timeout)
        if pulled.kind != "ok":
            raise pulled.failure(f"{handle}/{version} was pushed; reading it back to compare")
        held = json.loads((Path(folder) / "kernel-metadata.json").read_text(encoding="utf-8"))
        cells = json.loads((Path(folder) / held["code_file"]).read_text(encoding="utf-8"))["cells"]
    # the program does not report sources that Kaggle dropped
    wrong = [
        f"{kind} {source} was not attached"
        for kind in ("model", "dataset", "competition")
        for source in metadata[f"{kind}_sources"]
        if not any(source.lower() in got.lower() for got in held[f"{kind}_sources"] or ())
    ]
    wrong += ["it is public"] if held["is_private"] is not True else []
    wrong += ["it has internet"] if held["enable_internet"] else []
    if held["machine_shape"] not in (
        None,
        "",
        metadata["machine_shape"],
    ):  # of the last session, which may be an old one
        print(f"note: Kaggle names {held['machine_shape']} as accelerator; {metadata['machine_shape']} was asked for.")
    if _sources(cells) != _sources(json.loads(path.read_text(encoding="utf-8"))["cells"]):
        wrong.append("its cells are not those that were sent")
    if wrong:
        raise UploadError(
            f"{handle}/{version} was pushed, but {'; '.join(wrong)}. Check that each source exists, that you may use it and "
            "that you have accepted the competition's rules, then push again."
        )
    return version


def submit(notebook: Page, competition: str, file: str, message: str, timeout: float) -> None:
    """Hand in a finished version of a notebook; prints the remaining submissions before.

    Raises UploadError where none remain, the notebook's run has not ended well, or no new submission is listed afterwards.
    """
    limits = cli.run("competitions", "submission-limits", competition, "--json", timeout=timeout)
    remaining = (limits.json() or {}).get("numAllowedNow", 0) if limits.kind == "ok" else None
    if remaining is None:
        raise limits.failure(f"Asking for the remaining submissions of {competition}")
    print(f"{remaining} submissions to {competition} remain today.")
    if remaining < 1:
        raise UploadError(f"No submission to {competition} remains today; nothing was handed in.")
    place = f"{notebook.owner}/{notebook.slug}"
    status = cli.run("kernels", "status", place, timeout=timeout)
    if status.kind != "ok" or "COMPLETE" not in status.out.upper():
        raise UploadError(
            f"The run of {place} has not ended well: {status.said}. Wait for it, or look at its log: "
            f"`kaggle kernels logs {place}`. Nothing was handed in."
        )
    before = {row["ref"] for row in _submissions(competition, timeout)}
    command = ("competitions", "submit", competition, "-k", place, "-f", file, "-m", message)
    reply = cli.run(*command, "--version", str(notebook.version), timeout=timeout)
    fresh = [row for row in _submissions(competition, timeout) if row["ref"] not in before]
    ours = [row for row in fresh if row["description"] == message]
    if not ours:
        raise reply.failure(f"No new submission {message!r} is listed: handing in {notebook}")
    print(reply.out.strip())
    for row in ours:
        print(f"submission {row['ref']}: {row['status']}, {row['description']!r}")
    print(f"Its score: kaggle competitions submissions {competition}")


def _submissions(competition: str, timeout: float) -> list[dict[str, Any]]:
    reply = cli.ask("competitions", "submissions", competition, "--format", "json", timeout=timeout)
    if reply.kind != "ok":
        raise reply.failure(f"Listing the submissions to {competition}")
    return reply.json() or []


def _sources(cells: list[dict[str, Any]]) -> list[tuple[str, str]]:
    return [(cell["cell_type"], "".join(cell["source"])) for cell in cells]
