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
# a dash in front would be an option of the kaggle program, "." and ".." another folder
NAME = re.compile(r"(?!\.+$)[^\s/-][^\s/]*")
# the API's spelling; a page shows "PyTorch", "TensorFlow 2" or "Gemma C++"
FRAMEWORKS = (
    "tensorFlow1 tensorFlow2 tfLite tfJs pyTorch jax flax pax maxText gemmaCpp ggml gguf coral "
    "scikitLearn mxnet onnx keras transformers api other tensorRtLlm triton vllm"
).split()
SPELLING = {name.lower(): name for name in FRAMEWORKS}
ADDRESS = re.compile(r"(?:https?://)?(?:www\.)?kaggle\.com/([^?#]*)", re.IGNORECASE)
# of an address's path: in front of the parts, between them, behind a dataset's or notebook's
KINDS = dict(models="model", model="model", datasets="dataset", code="notebook")
KINDS |= dict(competitions="competition", c="competition")
LABELS = {"frameworks", "variations", "versions"}
TABS = set("code comments data discussion edit input log metadata notebook output settings".split())


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
    parts = _parts(text, "competition")
    # the pages /overview, /data, /leaderboard ... of an address
    return check_slug(parts[0] if ADDRESS.match(text.strip()) else "/".join(parts), "competition")


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
        parts, version = _split(text, "model", pinned, "OWNER/MODEL/transformers/VARIATION")
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
        parts, version = _split(text, what, pinned, f"OWNER/{what.upper()}")
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


def _split(text: str, what: str, pinned: bool, form: str) -> tuple[list[str], int | None]:
    parts = _parts(text, what)
    count = 4 if what == "model" else 2
    if what == "model" and len(parts) > 2:
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
            f"{bad[0]!r} in {text!r} is empty, holds white space, begins with a dash or is all "
            "dots."
        )
    return parts[:count], int(version[0]) if pinned else None


def _parts(text: str, what: str) -> list[str]:
    """The parts between the slashes; of an address those that name the thing. Raises UploadError
    for the address of something else than `what`."""
    address = ADDRESS.match(text.strip())
    if not address:
        return text.split("/")
    names = [unquote(name) for name in address[1].strip("/").split("/")]
    if names[0] in KINDS:
        if KINDS[names[0]] != what:
            raise UploadError(f"{text} is the page of a {KINDS[names[0]]}; give a {what}'s.")
        names = names[1:] or [""]
    while what in ("dataset", "notebook") and len(names) > 2 and names[-1] in TABS:
        names.pop()
    # .../frameworks/pyTorch/variations/8x7b-instruct-v0.1-hf/versions/1
    return [name for place, name in enumerate(names) if name not in LABELS or place < 2]


def _suffix(version: int | None) -> str:
    return "" if version is None else f"/{version}"
