"""Run the kaggle program and read what it prints. It is never imported: on import it logs in and
may end the process."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kaggle_upload.handles import UploadError

SLOWEST = 2**18  # bytes/s; a transfer below it runs into its deadline
REMEDIES = {
    "login": "Log in with `kaggle auth login`, or save a token from "
    "https://www.kaggle.com/settings/api as "
    "~/.kaggle/access_token.",
    "forbidden": "It belongs to somebody else, or your token may not do this: check the owner in "
    "the handle.",
    "timeout": "Kaggle does not answer; run the same command again later, it goes on where it "
    "stopped.",
    "failed": "Run the same command again; it goes on where it stopped.",
}


@dataclass(frozen=True)
class Reply:
    """What one call printed. `code` is None where it was ended at its deadline or after a lost
    file."""

    code: int | None
    out: str
    err: str
    lost: tuple[str, ...] = ()  # files whose upload failed
    given: tuple[str, ...] = ()  # the call's arguments

    @property
    def kind(self) -> str:
        """ok, timeout, login, forbidden, missing or failed. The program exits with 0 on many
        errors, and 2.2.4 shows the server's message without the status, so that the words have to
        do."""
        text = _without(" | ".join(self._lines), self.given).lower()
        if (
            self.code == 0
            and not self.lost
            and not re.search(r"^[A-Z][\w ]* error: ", self.out, re.M)
        ):
            return "ok"
        if self.code is None and not self.lost:
            return "timeout"
        if "authentication required to call" in text or re.search(
            r"\b401\b|unauthorized|unauthenticated", text
        ):
            return "login"
        if re.search(r"\b403\b|forbidden|denied|permission|don't have access", text):
            return "forbidden"
        return "missing" if re.search(r"\b404\b|not found|does not exist", text) else "failed"

    @property
    def said(self) -> str:
        """The last lines of what it said, without its progress."""
        return _unsigned(" | ".join(self._lines[-4:])) or "it said nothing"

    @property
    def _lines(self) -> list[str]:
        lines = [line.split("\r")[-1].strip() for line in f"{self.out}\n{self.err}".splitlines()]
        progress = re.compile(r"B/s\]|^Starting upload|^Upload successful|^$")
        return [line for line in lines if not progress.search(line)]

    def json(self) -> Any:
        """The JSON that it printed, whatever stood before (page tokens, notes about newer
        versions)."""
        found = re.search(r"^[\[{]", self.out, re.M)
        try:
            return json.loads(self.out[found.start() :]) if found else None
        except json.JSONDecodeError as error:
            raise UploadError(
                f"The kaggle program printed something unreadable: {self.said}"
            ) from error

    def failure(self, doing: str) -> UploadError:
        remedy = REMEDIES.get(self.kind, REMEDIES["failed"])
        return UploadError(f"{doing} failed: {self.said}. {remedy}")


def run(*arguments: str, timeout: float, temp: Path | None = None, show: bool = False) -> Reply:
    """One call of the kaggle program, ended after `timeout` seconds, with `temp` as its TMPDIR (its
    upload sessions).

    Ended too when it reports a file whose upload failed: 2.2.4 would go on and register a version
    without that file. `show` passes its output on as it comes. Its credentials are its own
    business: nothing here reads or holds them.
    """
    command = [sys.executable, "-P", "-m", "kaggle", "-W", *arguments]
    env = (
        os.environ
        | {"PYTHONUNBUFFERED": "1", "PYTHONUTF8": "1"}
        | ({"TMPDIR": str(temp)} if temp else {})
    )
    pipe = subprocess.PIPE
    child = subprocess.Popen(
        command, stdin=subprocess.DEVNULL, stdout=pipe, stderr=pipe, env=env, start_new_session=True
    )
    out: list[str] = []
    err: list[str] = []
    lost: list[str] = []

    def read_out() -> None:
        for raw in child.stdout or ():
            out.append(raw.decode(errors="replace"))
            if out[-1].startswith("Upload unsuccessful: "):
                lost.append(out[-1].split(": ", 1)[1].strip())
                _kill(child)
            if show:
                print("  " + _unsigned(out[-1].rstrip()), flush=True)

    def read_err() -> None:
        while child.stderr and (raw := os.read(child.stderr.fileno(), 4096)):
            err.append(raw.decode(errors="replace"))
            if show and sys.stderr.isatty():
                print(_unsigned(err[-1]), end="", file=sys.stderr, flush=True)

    readers = [threading.Thread(target=read_out), threading.Thread(target=read_err)]
    for reader in readers:
        reader.start()
    code: int | None = None
    try:
        readers[0].join(timeout)  # not child.wait, which sleeps between its looks
        if readers[0].is_alive():
            err.append(f"\nno end after {timeout:.0f} s")
        else:
            code = child.wait()
    finally:
        _kill(child)
        for reader in readers:
            reader.join()
        for stream in (child.stdout, child.stderr):
            if stream:
                stream.close()
    # 2.2.5 ends by itself
    lost += re.findall(r"^Upload unsuccessful: (.+?)\s*$", "".join(err), re.M)
    return Reply(None if lost else code, "".join(out), "".join(err), tuple(lost), arguments)


def ask(*arguments: str, timeout: float) -> Reply:
    """A call that only asks. Raises UploadError unless it went well or says that the thing is
    missing or forbidden."""
    reply = run(*arguments, timeout=timeout)
    if reply.kind not in ("ok", "missing", "forbidden"):
        raise reply.failure(f"`kaggle {' '.join(arguments)}`")
    return reply


def pages(*arguments: str, timeout: float) -> list[dict[str, Any]] | None:
    """All rows of a list command as JSON, over all its pages; None where the thing is missing or
    forbidden."""
    rows: list[dict[str, Any]] = []
    token: list[str] = []
    while True:
        reply = ask(*arguments, "--format", "json", "--page-size", "200", *token, timeout=timeout)
        if reply.kind != "ok":
            return None
        rows += reply.json() or []
        following = re.search(r"^Next Page Token = (\S+)$", reply.out, re.M)
        if not following:
            return rows
        token = ["--page-token", following[1]]


def login_name(timeout: float) -> str | None:
    """The user that the program is logged in as."""
    found = re.search(r"^- username: (\S+)$", run("config", "view", timeout=timeout).out, re.M)
    return None if found is None or found[1] == "None" else found[1]


def transfer_timeout(timeout: float, size: int) -> float:
    """`timeout` seconds besides a transfer of `size` bytes at the slowest bearable rate."""
    return timeout + size / SLOWEST


def _without(text: str, given: Sequence[str]) -> str:
    """The program's and the server's own words: no addresses, nothing that the call was given.

    A handle or a note may hold "denied" or "404", and goes with the names of its owner and model.
    """
    text = re.sub(r"https?://\S+", "", text)
    for word in sorted(given, key=len, reverse=True):
        parts = word.split("/")
        handles = ["/".join(parts[:end]) for end in range(len(parts), 1, -1)]
        for own in handles if len(parts) > 1 else [word.partition("=")[2]]:
            text = text.replace(own, "") if own else text
    return text


def _unsigned(text: str) -> str:
    """Without the queries of addresses: whoever knows a signed one may write the file."""
    return re.sub(r"\?[\w%.+~-]+=[^\s'\")]*", "?...", text)


def _kill(child: subprocess.Popen[bytes]) -> None:
    if child.poll() is None:
        os.killpg(child.pid, signal.SIGKILL)
        child.wait()
