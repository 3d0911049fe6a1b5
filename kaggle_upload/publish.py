"""The one way to publish: stage, create what is missing, send, find the version that holds the
bytes, record it.

The program's word is not taken for anything: it exits with 0 on errors, loses files, repeats
creations whose reply was lost, and does not say which version it made. So versions are listed
before and after, and compared with what was sent.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import re
import shutil
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from kaggle_upload import cli, versions
from kaggle_upload.handles import UploadError
from kaggle_upload.remote import Remote
from kaggle_upload.stage import HERE, Content, lay_out
from kaggle_upload.versions import COLUMNS

POLL = 1.0  # seconds between two looks at the list of versions, doubled each time up to 30
LISTING = 300.0  # seconds to wait for a version to be listed, and for new files
PROCESSING = 2**26  # bytes/s, a guess: how fast Kaggle gets through them
SETTLE = 3  # looks at the list after a call that went wrong, in case its version appears late


@dataclass
class Publish:
    """One publish: what goes where, and how sure it must be."""

    remote: Remote
    content: Content
    metadata: dict[str, dict[str, Any]]
    notes: str
    work: Path
    versions_csv: Path
    verify: str = "list"  # or "download": compare sha256 instead of sizes
    force: bool = False  # publish content that stands already once more
    details: dict[str, Any] = field(default_factory=dict)  # for versions.csv
    # versions whose bytes were compared: are they ours?
    compared: dict[int, bool] = field(default_factory=dict)

    def run(self) -> int:
        """The number of the version that holds the content, new or old. Raises UploadError in any
        other case; run again, it goes on where it stopped."""
        self._note_other_base(versions.check(self.versions_csv))
        try:
            self.work.mkdir(parents=True, exist_ok=True, mode=0o700)
        except OSError as error:
            raise UploadError(
                f"{self.work} can't be made ({error}): give another --work."
            ) from error
        with locked(self.work / f"{str(self.remote.handle).replace('/', '_')}.lock"):
            key = hashlib.sha256(
                f"{self.remote.handle} {self.content.sha256}".encode()
            ).hexdigest()[:16]
            folder = self.work / key
            # own staging path and own TMPDIR for each content: kaggle's program resumes a session
            # by path, size and time alone, and would publish the bytes of an earlier file
            (folder / "tmp").mkdir(parents=True, exist_ok=True, mode=0o700)
            if longest := [
                name for name in self.content.files if len(f"{folder}/files/{name}.json") > 255
            ]:
                raise UploadError(
                    f"{folder}/files/{longest[0]} is too long for the kaggle program: give a "
                    "shorter --work."
                )
            lay_out(self.content, folder / "files", self.metadata)
            numbers = self._send(folder)
            if changed := self.content.changed():
                raise UploadError(
                    f"{changed} changed while being published; {self.remote.handle}/{numbers[0]} "
                    "holds neither state for sure. Publish again when nothing writes to the "
                    "folder."
                )
            if self.remote.private() is not True:
                raise UploadError(
                    f"{self.remote.handle}/{numbers[0]} stands, but it is PUBLIC: make it private "
                    "now."
                )
            self._record(numbers)
            shutil.rmtree(folder)
        handle, *copies = (f"{self.remote.handle}/{number}" for number in numbers)
        for copy in copies:
            print(
                f"duplicate: {copy} holds the same bytes (the creation was repeated); you may "
                "delete it."
            )
        print(handle)
        return numbers[0]

    def _send(self, folder: Path) -> list[int]:
        """The versions with the content, ascending; sent only if there are none."""
        private = self.remote.private()
        if private is None:
            self.remote.create_container(folder / "files")
            private = self.remote.private()
        if private is False:
            raise UploadError(
                f"{self.remote.handle} is public, and so would the new version be. Make it "
                "private on its page, or choose another handle."
            )
        standing = self.remote.versions()
        # the newest version before an earlier, interrupted run for this content
        journal = folder / "before.json"
        before = json.loads(journal.read_text()) if journal.exists() else None
        since = [n for n in standing if before is not None and n > before]
        if ours := self._matching(since, self.verify == "download" or len(since) > 1):
            print("An earlier run has published this already.")
            return ours
        if not self.force and (ours := self._known(standing)):
            print(
                "Unchanged: this content is published already, no new version is made (--force "
                "would)."
            )
            return ours
        newest = max(standing, default=0)
        journal.write_text(json.dumps(newest if before is None else before))
        timeout = cli.transfer_timeout(self.remote.timeout, sum(self.content.sizes.values()))
        for first in [False] if standing else [True, False]:
            reply = self.remote.create_version(
                folder / "files", self.notes, first, timeout, folder / "tmp"
            )
            ours, others = self._find(newest, reply)
            if ours and first:
                print(
                    f"note: Kaggle takes no notes for a first version; {self.versions_csv} has "
                    "them."
                )
            if ours:
                return ours
            _forget_sessions(folder / "tmp", reply)
            if not others or reply.lost or reply.kind != "failed":
                # else another publish made the variation first: ours becomes its next version
                break
        raise self._not_found(reply, others)

    def _find(self, newest: int, reply: cli.Reply) -> tuple[list[int], list[int]]:
        """Versions above `newest`: those with the content, and others. Waits for them to be listed,
        longer if the program reported success."""
        said_so = reply.kind == "ok" and (
            re.search(r"^(?:Your [\w ]+|Dataset version) (?:was|is being) created", reply.out, re.M)
            is not None
        )
        clean = said_so and "Will retry" not in reply.err
        deadline = time.monotonic() + LISTING + sum(self.content.sizes.values()) / PROCESSING
        pause, looks = POLL, 0
        ours, fresh = [], []
        while True:
            looks += 1
            try:
                fresh = [n for n in self.remote.versions() if n > newest]
                ours = self._matching(
                    fresh, self.verify == "download" or not clean or len(fresh) > 1
                )
            except UploadError:
                if time.monotonic() > deadline or not said_so:
                    raise
            done = bool(ours) if said_so else looks >= SETTLE
            if done and (clean or looks >= SETTLE) or time.monotonic() + pause > deadline:
                return ours, [n for n in fresh if n not in ours]
            time.sleep(pause)
            pause = min(2 * pause, 30)

    def _matching(self, numbers: list[int], exact: bool) -> list[int]:
        """Those versions whose names and sizes are ours and, if `exact`, whose bytes are."""
        same = [number for number in numbers if self.remote.files(number) == self.content.sizes]
        size = sum(self.content.sizes.values())
        for number in same if exact else ():
            if number not in self.compared:
                print(
                    f"Comparing the bytes of version {number} ({size / 1e6:,.1f} MB) ...",
                    flush=True,
                )
                self.compared[number] = (
                    self.remote.hashes(number, size, self.work) == self.content.hashes
                )
        return [number for number in same if not exact or self.compared[number]]

    def _known(self, standing: list[int]) -> list[int]:
        """A version with this content: recorded in versions.csv and still listed, or the newest one
        if its bytes are ours."""
        handle, newest = str(self.remote.handle), standing[-1:]
        recorded = {
            int(row["version"]): row["sha256"]
            for row in versions.read(self.versions_csv)
            if row["handle"] == handle and re.fullmatch("[0-9a-f]{64}", row["sha256"])
        }
        ours = [
            n for n, sha256 in recorded.items() if sha256 == self.content.sha256 and n in standing
        ]
        if ours := self._matching(sorted(ours), exact=False):
            return ours[-1:]
        return [] if newest and newest[0] in recorded else self._matching(newest, exact=True)

    def _not_found(self, reply: cli.Reply, others: list[int]) -> UploadError:
        """The error for a publish after which no version holds the content."""
        found = [f"{self.remote.handle}/{n} holds {self._difference(n)}" for n in others]
        stand = (
            f" What stands instead: {'; '.join(found)}. Delete what is yours and wrong."
            if found
            else ""
        )
        if reply.lost:
            return UploadError(
                f"The upload of {', '.join(reply.lost)} failed.{stand} {cli.REMEDIES['failed']}"
            )
        if reply.kind == "ok":
            return UploadError(
                f"Kaggle reports success but lists no such version.{stand} {cli.REMEDIES['failed']}"
            )
        error = reply.failure(f"Publishing {self.remote.handle}")
        return UploadError(f"{error}{stand}")

    def _difference(self, number: int) -> str:
        files, sizes = self.remote.files(number), self.content.sizes
        missing = sorted(sizes.keys() - files.keys())
        if files == sizes:
            return "other bytes of the same size"
        return f"no {', '.join(missing)}" if missing else f"other files or sizes ({files})"

    def _note_other_base(self, rows: list[dict[str, str]]) -> None:
        """Say it where the handle's versions are of another base than this content."""
        handle, base = str(self.remote.handle), self.details.get("base")
        others = {row["base"] for row in rows if row["handle"] == handle} - {"", base}
        if base and others:
            print(
                f"note: {handle} holds versions of another base ({', '.join(sorted(others))}); "
                f"this one is of {base}. Pin the versions that belong together, or use another "
                "handle."
            )

    def _record(self, numbers: list[int]) -> None:
        """Append the versions that versions.csv lacks, with the notes."""
        handle, now = str(self.remote.handle), datetime.now(UTC).isoformat(timespec="seconds")
        try:
            with locked(self.versions_csv):
                rows = versions.read(self.versions_csv)
                known = {(row["handle"], row["version"]) for row in rows}
                about = dict.fromkeys(COLUMNS, "") | self.details
                about |= {"handle": handle, "sha256": self.content.sha256, "notes": self.notes}
                about |= {"commit": commit(), "time": now}
                rows += [
                    about | {"version": str(number)}
                    for number in numbers
                    if (handle, str(number)) not in known
                ]
                before = self.versions_csv.read_bytes()
                versions.write(self.versions_csv, rows)
            if not self.versions_csv.read_bytes().startswith(before):
                print(f"note: {self.versions_csv} had another form, and is written anew in ours.")
        except OSError as error:
            raise UploadError(
                f"{handle}/{numbers[0]} stands, but {self.versions_csv} can't be written "
                f"({error}): run the same command again, it records the version and sends nothing."
            ) from error


def show(handle: object, content: Content, metadata: dict[str, dict[str, Any]], notes: str) -> None:
    """What a publish would send (--dry-run)."""
    print(f"would publish to {handle} (private), notes {notes!r}, content sha256 {content.sha256}")
    for name, (_, digest, size, _) in sorted(content.files.items()):
        print(f"  {size:>14,} bytes  {digest}  {name}")
    for name, values in metadata.items():
        print(f"{name}: {json.dumps(values, indent=2, ensure_ascii=False)}")


def commit() -> str:
    """The repository's commit, with -dirty if files differ from it; empty where there is no git."""
    command = ["git", "describe", "--always", "--dirty", "--abbrev=12"]
    if shutil.which("git") is None:
        return ""
    run = subprocess.run(command, cwd=HERE, capture_output=True, text=True)
    return run.stdout.strip() if run.returncode == 0 else ""


def _forget_sessions(temp: Path, reply: cli.Reply) -> None:
    """Drop the upload sessions of lost files, so that the next run starts them afresh: 2.2.4 would
    try an expired or refused one again and again. One that broke with its connection is kept, to be
    resumed."""
    for name in reply.lost:
        if "onnection" not in reply.out:
            for session in temp.rglob(f"*{name}.json"):
                session.unlink()


@contextmanager
def locked(path: Path) -> Iterator[None]:
    """Hold the file, made where it is missing; a second publish to the same handle waits here."""
    while True:
        with path.open("a") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                print(f"Waiting for another publish that holds {path.name} ...", flush=True)
                fcntl.flock(file, fcntl.LOCK_EX)
            if path.exists() and os.path.samestat(os.fstat(file.fileno()), path.stat()):
                yield
                return
            # else the one before has put another file in its place
