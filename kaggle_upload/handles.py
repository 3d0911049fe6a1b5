"""Names on Kaggle, parsed and checked once: a model's variation, a dataset, a notebook.

A name of something to be made follows Kaggle's rules for new names. A name of something that
stands follows none of ours: its page may hold dots, underscores and capitals.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from urllib.parse import unquote

OWNER = re.compile(r"[a-z0-9]+(?:[_-][a-z0-9]+)*")
SLUG = re.compile(r"[a-z0-9]+(?:-[a-z0-9]+)*")
NAME = re.compile(r"[^\s/-][^\s/]*")  # a dash in front would be an option of the kaggle program
# the API's spelling; a page shows "PyTorch", "TensorFlow 2" or "Gemma C++"
FRAMEWORKS = (
    "tensorFlow1 tensorFlow2 tfLite tfJs pyTorch jax flax pax maxText gemmaCpp ggml gguf coral "
    "scikitLearn mxnet onnx keras transformers api other tensorRtLlm triton vllm"
).split()
SPELLING = {name.lower(): name for name in FRAMEWORKS}
# of an address's path, in front of the parts and between them
KINDS = {"models", "model", "datasets", "code", "competitions", "c"}
LABELS = {"frameworks", "variations", "versions"}


class UploadError(RuntimeError):
    """Nothing, or not what was asked for, stands on Kaggle; the message says what and what to
    do."""


def check_slug(slug: str, what: str, pattern: re.Pattern[str] = SLUG) -> str:
    """The slug itself; the kaggle program does not check all of them. Raises UploadError."""
    if not pattern.fullmatch(slug):
        raise UploadError(
            f"The {what} {slug!r} is not a slug: use lower-case letters, digits and single hyphens."
        )
    return slug


def competition_slug(text: str) -> str:
    """A competition's slug from itself or its page's address. Raises UploadError."""
    parts = _parts(text)
    # the pages /overview, /data, /leaderboard ... of an address
    return check_slug(parts[0] if _is_address(text) else text, "competition")


@dataclass(frozen=True)
class Variation:
    """OWNER/MODEL/FRAMEWORK/VARIATION, pinned to a version by /N."""

    owner: str
    model: str
    framework: str
    variation: str
    version: int | None = None

    @classmethod
    def parse(cls, text: str, pinned: bool = False) -> Variation:
        """A variation to publish to or, with `pinned`, a version that stands; an address is read.

        Raises UploadError where a part is missing, a version is missing (`pinned`) or too much, a
        new name is no slug, or the framework is one that the kaggle program can't publish.
        """
        parts, version = _split(text, 4, pinned, "OWNER/MODEL/transformers/VARIATION")
        if pinned:
            return cls(parts[0], parts[1], parts[2], parts[3], version)
        check_slug(parts[0], "owner", OWNER)
        check_slug(parts[1], "model"), check_slug(parts[3], "variation")
        if parts[2] != "transformers":
            raise UploadError(
                f"The framework {parts[2]!r} in {text} must be 'transformers': the kaggle program "
                "fails on others ('peft')."
            )
        return cls(parts[0], parts[1], parts[2], parts[3])

    def __str__(self) -> str:
        parts = (self.owner, self.model, self.framework, self.variation)
        return "/".join(parts) + _suffix(self.version)


@dataclass(frozen=True)
class Page:
    """OWNER/SLUG of a dataset or a notebook, pinned to a version by /N."""

    owner: str
    slug: str
    version: int | None = None

    @classmethod
    def parse(cls, text: str, what: str, pinned: bool = False, new: bool = True) -> Page:
        """A page from its name or its address.

        Args:
            what: 'dataset' or 'notebook'.
            pinned: whether a version's number must follow.
            new: whether it may have to be made, so that its parts must be slugs.

        Raises:
            UploadError: as Variation.parse, and for slugs of a length that Kaggle refuses (dataset
                6 to 50, notebook 5 to 50).
        """
        parts, version = _split(text, 2, pinned, f"OWNER/{what.upper()}")
        if new and not pinned:
            check_slug(parts[0], "owner", OWNER), check_slug(parts[1], what)
        least = {"dataset": 6, "notebook": 5}[what]
        if not least <= len(parts[1]) <= 50:
            raise UploadError(
                f"The {what} slug {parts[1]!r} has {len(parts[1])} characters; it needs {least} to "
                "50."
            )
        return cls(parts[0], parts[1], version)

    def __str__(self) -> str:
        return f"{self.owner}/{self.slug}" + _suffix(self.version)


def _split(text: str, count: int, pinned: bool, form: str) -> tuple[list[str], int | None]:
    parts = _parts(text)
    if count == 4 and len(parts) > 2:
        parts[2] = SPELLING.get(
            re.sub(r"[\W_]", "", parts[2].replace("++", "pp")).lower(), parts[2]
        )
    version = parts[count:]
    if len(parts) != count + pinned or (pinned and not re.fullmatch(r"[1-9][0-9]*", version[0])):
        raise UploadError(
            f"{text!r} must have the form {form}{'/N, N the version number' if pinned else ''}."
        )
    if bad := [part for part in parts if not NAME.fullmatch(part)]:
        raise UploadError(
            f"{bad[0]!r} in {text!r} is empty, holds white space or begins with a dash."
        )
    return parts[:count], int(version[0]) if pinned else None


def _is_address(text: str) -> bool:
    return re.match(r"(?:https?://)?(?:www\.)?kaggle\.com/", text) is not None


def _parts(text: str) -> list[str]:
    """The parts between the slashes; of an address those that name the thing."""
    if not _is_address(text):
        return text.split("/")
    path = re.split(r"[?#]", text.partition("kaggle.com/")[2].strip())[0].strip("/")
    names = [unquote(name) for name in path.split("/")]
    names = names[1:] if names[0] in KINDS else names
    # .../frameworks/pyTorch/variations/8x7b-instruct-v0.1-hf/versions/1
    return [name for place, name in enumerate(names) if name not in LABELS or place < 2]


def _suffix(version: int | None) -> str:
    return "" if version is None else f"/{version}"
