"""Names on Kaggle, parsed and checked once: a model's variation, a dataset, a notebook."""

from __future__ import annotations

import re
from dataclasses import dataclass

OWNER = re.compile(r"[a-z0-9]+(?:[_-][a-z0-9]+)*")
SLUG = re.compile(r"[a-z0-9]+(?:-[a-z0-9]+)*")


class UploadError(RuntimeError):
    """Nothing, or not what was asked for, stands on Kaggle; the message says what does and what to do."""


def check_slug(slug: str, what: str, pattern: re.Pattern[str] = SLUG) -> str:
    """The slug itself; the kaggle program does not check all of them. Raises UploadError."""
    if not pattern.fullmatch(slug):
        raise UploadError(f"The {what} {slug!r} is not a slug: use lower-case letters, digits and single hyphens.")
    return slug


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
        """Raises UploadError where a part is missing, is no slug, or a version is missing (`pinned`) or too much."""
        parts, version = _split(text, 4, pinned, "OWNER/MODEL/transformers/VARIATION")
        check_slug(parts[0], "owner", OWNER), check_slug(parts[1], "model"), check_slug(parts[3], "variation")
        if not re.fullmatch(r"[A-Za-z0-9]+", parts[2]) or (not pinned and parts[2] != "transformers"):
            raise UploadError(
                f"The framework {parts[2]!r} in {text} must be 'transformers': the kaggle program fails on others ('peft')."
            )
        return cls(parts[0], parts[1], parts[2], parts[3], version)

    def __str__(self) -> str:
        return "/".join((self.owner, self.model, self.framework, self.variation)) + _suffix(self.version)


@dataclass(frozen=True)
class Page:
    """OWNER/SLUG of a dataset or a notebook, pinned to a version by /N."""

    owner: str
    slug: str
    version: int | None = None

    @classmethod
    def parse(cls, text: str, what: str, pinned: bool = False) -> Page:
        """`what` is 'dataset' or 'notebook'. Raises UploadError as Variation.parse, and for slugs of a length that Kaggle
        refuses (dataset 6 to 50, notebook 5 to 50)."""
        parts, version = _split(text, 2, pinned, f"OWNER/{what.upper()}")
        check_slug(parts[0], "owner", OWNER), check_slug(parts[1], what)
        least = {"dataset": 6, "notebook": 5}[what]
        if not least <= len(parts[1]) <= 50:
            raise UploadError(f"The {what} slug {parts[1]!r} has {len(parts[1])} characters; it needs {least} to 50.")
        return cls(parts[0], parts[1], version)

    def __str__(self) -> str:
        return f"{self.owner}/{self.slug}" + _suffix(self.version)


def _split(text: str, count: int, pinned: bool, form: str) -> tuple[list[str], int | None]:
    parts = text.split("/")
    if len(parts) != count + pinned or (pinned and not re.fullmatch(r"[1-9][0-9]*", parts[-1])):
        raise UploadError(f"{text!r} must have the form {form}{'/N, N the version number' if pinned else ''}.")
    return parts[:count], int(parts[-1]) if pinned else None


def _suffix(version: int | None) -> str:
    return "" if version is None else f"/{version}"
