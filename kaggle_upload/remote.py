"""What Kaggle holds under a handle, asked through the kaggle program: a model's variation or a
dataset."""

from __future__ import annotations

import hashlib
import json
import tarfile
import tempfile
import zipfile
from pathlib import Path
from typing import Any

from kaggle_upload import cli
from kaggle_upload.handles import Page, UploadError, Variation


class RemoteModel:
    """A variation of a model. `timeout`: seconds a call may take besides transfers."""

    def __init__(self, handle: Variation, timeout: float):
        self.handle, self.timeout = handle, timeout
        self.model = f"{handle.owner}/{handle.model}"

    def private(self) -> bool | None:
        """Whether it is private; None where it is missing."""
        reply = cli.ask("models", "get", self.model, timeout=self.timeout)
        # Kaggle may answer 403 for a model that does not exist; in one's own name space nobody
        # else's can be hit
        if reply.kind == "forbidden" and cli.login_name(self.timeout) != self.handle.owner:
            raise reply.failure(f"Reading the model {self.model}")
        # false is left out of the program's JSON, so that a missing key means public
        return None if reply.kind != "ok" else (reply.json() or {}).get("isPrivate") is True

    def create_container(self, folder: Path) -> None:
        """Create the model, private, from the metadata in the folder."""
        reply = cli.run("models", "create", "-p", str(folder), timeout=self.timeout)
        # it may be there all the same: lost reply, another publish
        if reply.kind != "ok" and self.private() is None:
            raise reply.failure(f"Creating the model {self.model}")

    def versions(self) -> list[int]:
        """The version numbers, ascending."""
        rows = cli.pages(
            "models", "variations", "versions", "list", str(self.handle), timeout=self.timeout
        )
        return sorted(int(row["version"]) for row in rows or ())

    def files(self, version: int) -> dict[str, int]:
        """Sizes in bytes by name."""
        place = f"{self.handle}/{version}"
        return _files("models", "variations", "versions", "files", place, timeout=self.timeout)

    def hashes(self, version: int, size: int, work: Path) -> dict[str, str]:
        """sha256 by name, of what a download of about `size` bytes gives."""
        command = ("models", "variations", "versions", "download", f"{self.handle}/{version}")
        return _download(command, cli.transfer_timeout(self.timeout, size), work)

    def create_version(
        self, folder: Path, notes: str, first: bool, timeout: float, temp: Path
    ) -> cli.Reply:
        """Send the folder as the first or next version.

        Args:
            folder: the files, and the metadata that the program reads.
            notes: of the version; Kaggle takes none for a first one.
            first: there is no version yet.
            timeout: seconds, transfers included.
            temp: the program's TMPDIR.
        """
        command = ["models", "variations", *([] if first else ["versions"]), "create"]
        command += ["-p", str(folder)] if first else [str(self.handle), "-p", str(folder)]
        # in one word: notes may begin with a dash. The first version takes none
        command += [] if first else [f"--version-notes={notes}"]
        return cli.run(*command, timeout=timeout, temp=temp, show=True)


class RemoteDataset:
    """A dataset. Its methods are those of `RemoteModel`."""

    def __init__(self, handle: Page, timeout: float):
        self.handle, self.timeout = handle, timeout

    def private(self) -> bool | None:
        with tempfile.TemporaryDirectory() as folder:
            reply = cli.ask(
                "datasets", "metadata", str(self.handle), "-p", folder, timeout=self.timeout
            )
            if reply.kind == "forbidden" and cli.login_name(self.timeout) != self.handle.owner:
                raise reply.failure(f"Reading the dataset {self.handle}")
            if reply.kind != "ok":
                return None
            info = json.loads((Path(folder) / "dataset-metadata.json").read_text(encoding="utf-8"))
        return (info.get("info") or info).get("isPrivate") is True

    def create_container(self, folder: Path) -> None:
        """Nothing: `datasets create` makes it together with its first version, private unless told
        otherwise."""

    def versions(self) -> list[int]:
        reply = cli.ask(
            "datasets", "status", str(self.handle), "--format", "json", timeout=self.timeout
        )
        found = reply.json() if reply.kind == "ok" else {}
        newest = int(found.get("current_version_number") or 0)
        return list(range(1, newest + 1))

    def files(self, version: int) -> dict[str, int]:
        return _files("datasets", "files", f"{self.handle}/{version}", timeout=self.timeout)

    def hashes(self, version: int, size: int, work: Path) -> dict[str, str]:
        command = ("datasets", "download", f"{self.handle}/{version}")
        return _download(command, cli.transfer_timeout(self.timeout, size), work)

    def create_version(
        self, folder: Path, notes: str, first: bool, timeout: float, temp: Path
    ) -> cli.Reply:
        command = ["datasets", "create"] if first else ["datasets", "version", f"--message={notes}"]
        return cli.run(*command, "-p", str(folder), timeout=timeout, temp=temp, show=True)


Remote = RemoteModel | RemoteDataset


def _files(*command: str, timeout: float) -> dict[str, int]:
    rows = cli.pages(*command, timeout=timeout)
    return {str(row["name"]): int(row["size"] or 0) for row in rows or ()}


def _sha256(file: Any) -> str:
    return hashlib.file_digest(file, "sha256").hexdigest()


def _download(command: tuple[str, ...], timeout: float, work: Path) -> dict[str, str]:
    """Download an archive beside the staging folder and hash what it holds, without unpacking
    it."""
    hashes: dict[str, str] = {}
    with tempfile.TemporaryDirectory(dir=work) as folder:
        reply = cli.run(*command, "-p", folder, timeout=timeout)
        archives = list(Path(folder).iterdir())
        if reply.kind != "ok" or len(archives) != 1:
            raise reply.failure(f"Downloading {command[-1]} to compare its bytes")
        try:
            if archives[0].suffix == ".zip":
                with zipfile.ZipFile(archives[0]) as archive:
                    for name in archive.namelist():
                        with archive.open(name) as file:
                            hashes[name] = _sha256(file)
            else:
                with tarfile.open(archives[0], "r|*") as tar:
                    for member in tar:
                        if extracted := tar.extractfile(member):
                            hashes[member.name.removeprefix("./")] = _sha256(extracted)
        except (tarfile.TarError, zipfile.BadZipFile, EOFError, OSError) as error:
            raise UploadError(
                f"The download of {command[-1]} is broken: {error}. Run the same command again."
            ) from error
    return hashes
