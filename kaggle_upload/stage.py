"""What is sent: allow-lists, refusals, hashes, metadata from the templates, the staging folder."""

from __future__ import annotations

import fnmatch
import hashlib
import json
import os
import shutil
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kaggle_upload.handles import Page, UploadError, Variation

HERE = Path(__file__).resolve().parent
ADAPTER = ("adapter_config.json", "adapter_model.safetensors")
BASE = (
    *(
        "config.json",
        "generation_config.json",
        "model*.safetensors",
        "model.safetensors.index.json",
    ),
    *("tokenizer.json", "tokenizer.model", "tokenizer_config.json", "special_tokens_map.json"),
)
# names that may hold credentials; their presence in the folder means that somebody is about to make
# a mistake
SECRETS = (
    ".env*",
    "kaggle.json",
    "access_token*",
    "credentials.json",
    "*.pem",
    "*.key",
    "id_rsa*",
    ".netrc",
)
# https://github.com/Kaggle/kaggle-cli/blob/main/docs/models_metadata.md
LICENCES = (
    "Apache 2.0|Attribution 3.0 IGO (CC BY 3.0 IGO)|Attribution 3.0 Unported (CC BY "
    "3.0)|Attribution 4.0 International (CC BY 4.0)|Attribution-NoDerivatives 4.0 International "
    "(CC BY-ND 4.0)|Attribution-NonCommercial 4.0 International (CC BY-NC 4.0)|BSD-3-Clause|CC "
    "BY-NC-SA 4.0|CC BY-SA 3.0|CC BY-SA 4.0|CC0: Public Domain|GNU Affero General Public License "
    "3.0|GNU Lesser General Public License 3.0|GPL 2|GPL 3|MIT"
).split("|")
DATASET_LICENCES = (
    "CC0-1.0",
    "CC-BY-4.0",
    "CC-BY-SA-4.0",
    "GPL-2.0",
    "apache-2.0",
    "other",
    "unknown",
)


@dataclass(frozen=True)
class Content:
    """The files to send by name, each with its sha256, size in bytes and modification stamp when it
    was hashed."""

    files: dict[str, tuple[Path, str, int, tuple[int, int]]]

    @property
    def sha256(self) -> str:
        """Of the lines that `sha256sum *` would print: one hash for all files and their names."""
        lines = [f"{digest}  {name}\n" for name, (_, digest, _, _) in sorted(self.files.items())]
        return hashlib.sha256("".join(lines).encode()).hexdigest()

    @property
    def sizes(self) -> dict[str, int]:
        return {name: size for name, (_, _, size, _) in self.files.items()}

    @property
    def hashes(self) -> dict[str, str]:
        return {name: digest for name, (_, digest, _, _) in self.files.items()}

    def changed(self) -> list[str]:
        """Files that were written to since they were hashed."""
        return [name for name, (path, _, _, stamp) in self.files.items() if _stamp(path) != stamp]


def pick(folder: Path, allowed: Iterable[str]) -> list[Path]:
    """The folder's files that match the allow-list. Raises UploadError where it is no folder, or
    holds a symlink or what may be a credential: kaggle's program would send such a file, or what
    the link points to."""
    if not folder.is_dir():
        raise UploadError(f"{folder} is not a folder.")
    for path in sorted([folder, *folder.iterdir()]):
        if path.is_symlink():
            raise UploadError(
                f"{path} is a symlink, which may point to anything: put a copy of the file there."
            )
        if any(fnmatch.fnmatch(path.name.lower(), pattern) for pattern in SECRETS):
            raise UploadError(f"{path} may hold credentials: move it out of the folder first.")
    patterns = tuple(allowed)
    return sorted(
        path
        for path in folder.iterdir()
        if path.is_file() and any(fnmatch.fnmatchcase(path.name, pattern) for pattern in patterns)
    )


def read(paths: Iterable[Path]) -> Content:
    """Hash the files. Raises UploadError for none and for an empty file."""
    files = {}
    for path in paths:
        stamp = _stamp(path)
        if not path.stat().st_size:
            raise UploadError(f"{path} is empty; write it again.")
        if path.stat().st_size > 10**9:
            print(f"Hashing {path.name} ...", flush=True)
        files[path.name] = (path, _sha256(path), path.stat().st_size, stamp)
    if not files:
        raise UploadError(
            "There is nothing to send; the kaggle program would publish an empty version."
        )
    return Content(files)


def lay_out(content: Content, folder: Path, metadata: dict[str, dict[str, Any]]) -> None:
    """Make `folder` hold exactly the content (hard links where the file system allows, else copies)
    and the metadata.

    What an interrupted run left there is kept if its bytes are right, so that the program can
    resume its upload.
    """
    folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    for path in folder.iterdir():
        if path.name not in content.files:
            path.unlink()
    for name, (path, digest, _, _) in content.files.items():
        target = folder / name
        if target.exists() and not target.samefile(path) and _sha256(target) != digest:
            target.unlink()
        if not target.exists():
            try:
                os.link(path, target)
            except OSError:  # another file system, or one without hard links
                shutil.copy2(path, target)
    for name, values in metadata.items():
        (folder / name).write_text(
            json.dumps(values, indent=2, ensure_ascii=False) + "\n", encoding="utf-8"
        )


def model_metadata(handle: Variation) -> dict[str, dict[str, Any]]:
    """The two model templates with the handle's parts. Raises UploadError as `_template`, and for
    an unknown licence."""
    model = _template("model-metadata.json", "description", "subtitle")
    model |= {"ownerSlug": handle.owner, "slug": handle.model, "title": _title(model, handle.model)}
    if model.get("isPrivate") is not True:
        raise UploadError(
            "model-metadata.json: isPrivate must be true; make the model public on its page if you "
            "want."
        )
    instance = _template("model-instance-metadata.json", "overview", "usage")
    instance |= {
        "ownerSlug": handle.owner,
        "modelSlug": handle.model,
        "instanceSlug": handle.variation,
    }
    instance["framework"] = handle.framework
    _check_licence("model-instance-metadata.json", str(instance.get("licenseName")), LICENCES)
    return {"model-metadata.json": model, "model-instance-metadata.json": instance}


def dataset_metadata(handle: Page) -> dict[str, dict[str, Any]]:
    """The dataset template with the handle's parts. Raises UploadError for a title or subtitle of a
    wrong length."""
    data = _template("dataset-metadata.json", "description", "subtitle")
    data |= {"id": str(handle), "title": _title(data, handle.slug)}
    names = [licence.get("name") for licence in data.get("licenses", [])]
    if len(names) != 1:
        raise UploadError(
            f"dataset-metadata.json names {len(names)} licences; Kaggle wants exactly one."
        )
    _check_licence("dataset-metadata.json", str(names[0]), DATASET_LICENCES)
    for key, least, most in (("title", 6, 50), ("subtitle", 20, 80)):
        if data.get(key) and not least <= len(data[key]) <= most:
            raise UploadError(
                f"dataset-metadata.json: {key} has {len(data[key])} characters; it needs {least} "
                f"to {most}."
            )
    return {"dataset-metadata.json": data}


def notebook_metadata(
    handle: Page,
    code_file: str,
    models: list[Variation],
    datasets: list[Page],
    competitions: Sequence[str] = (),
    notebooks: Sequence[Page] = (),
) -> dict:
    """The notebook template with the handle and its sources, internet off, private.

    Args:
        handle: the notebook's page.
        code_file: the .ipynb's name in the folder that is sent.
        models, datasets, competitions: that are attached as inputs.
        notebooks: of which the output is attached.

    Raises UploadError for a short title or one that does not turn into the slug: Kaggle would put
    the notebook at another address.
    """
    data = _template("kernel-metadata.json")
    title = _title(data, handle.slug)
    if (
        "-".join("".join(c if c.isalnum() else " " for c in title.lower()).split()) != handle.slug
        or len(title) < 5
    ):
        raise UploadError(
            f"kernel-metadata.json: the title {title!r} must give the slug {handle.slug!r}; empty "
            "it."
        )
    return data | {
        "id": str(handle),
        "title": title,
        "code_file": code_file,
        "is_private": True,
        "enable_gpu": True,
        "enable_internet": False,  # the program's own default is true
        "model_sources": [str(model) for model in models],
        # those of the template: an encoder's, say
        "dataset_sources": [*map(str, datasets), *(data.get("dataset_sources") or [])],
        "competition_sources": list(competitions),
        "kernel_sources": [*map(str, notebooks), *(data.get("kernel_sources") or [])],
    }


def _template(name: str, *texts: str) -> dict[str, Any]:
    """A template as edited. Raises UploadError for broken JSON and for <, > or & in the texts,
    which kaggle's HTML cleaner would turn into something else."""
    try:
        data = json.loads((HERE / name).read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise UploadError(f"kaggle_upload/{name} is not JSON: {error}; correct it.") from error
    for key in texts:
        bad = sorted(set(str(data.get(key) or "")) & set("<>&"))
        if bad:
            raise UploadError(
                f"kaggle_upload/{name}: {key} holds {bad}, which the kaggle program garbles; "
                "reword it."
            )
    return data


def _title(data: dict[str, Any], slug: str) -> str:
    return str(data.get("title") or "").strip() or slug.replace("-", " ")


def _check_licence(file: str, name: str, known: Iterable[str]) -> None:
    if name not in known:
        raise UploadError(
            f"kaggle_upload/{file}: the licence {name!r} is not one of Kaggle's: "
            f"{', '.join(known)}."
        )


def _stamp(path: Path) -> tuple[int, int]:
    stat = path.stat()
    return stat.st_mtime_ns, stat.st_size


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
