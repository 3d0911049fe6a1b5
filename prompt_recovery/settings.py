"""Values that somebody typed, read as what they plainly are or refused, before anything loads."""

from __future__ import annotations

import ast
import importlib.util
import math
import numbers
import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, fields
from typing import Any, Self

from prompt_recovery.files import located

REPORTERS = ("none", "tensorboard", "wandb", "trackio")

Reader = Callable[[Any], Any]  # the value as it is meant, or a ValueError that says what to give


class SettingError(ValueError):
    """Settings that can't work: a line for each, with value, rule and remedy."""


def setting(default: Any, read: Reader, *kinds: str) -> Any:
    """A field of a `Settings`. kinds: what depends on it, by which `Settings.values` picks
    fields."""
    return field(default=default, metadata={"read": read, "kinds": frozenset(kinds)})


@dataclass(frozen=True, kw_only=True)
class Settings:
    """Fields that are read and checked when an object is made, all of them before one error."""

    def __post_init__(self) -> None:
        wrong = []
        for each in fields(self):
            value = getattr(self, each.name)
            value = value.tolist() if hasattr(value, "tolist") else value  # of numpy, of pandas
            try:
                object.__setattr__(self, each.name, each.metadata["read"](value))
            except (ValueError, TypeError, OverflowError) as rule:
                wrong.append(f"{each.name}={repr(value)[:80]}: {rule}.")
        wrong = wrong or list(self.conflicts())
        if wrong:
            raise SettingError("\n".join(wrong))

    def conflicts(self) -> Iterator[str]:
        """A line for each pair of settings that don't go together."""
        return iter(())

    @classmethod
    def of(cls, names: Mapping[str, Any]) -> Self:
        """From a notebook's globals(): those that are fields here."""
        return cls(**{each.name: names[each.name] for each in fields(cls) if each.name in names})

    @classmethod
    def names(cls, *kinds: str) -> list[str]:
        return [each.name for each in fields(cls) if each.metadata["kinds"] & set(kinds)]

    def values(self, *kinds: str) -> dict[str, Any]:
        """The fields of these kinds by name: what a hash of them is made of."""
        return {name: getattr(self, name) for name in self.names(*kinds)}


# --- readers ------------------------------------------------------------------------------------


def _number(value: Any) -> Any:
    if isinstance(value, str):
        value = float(value)
    if isinstance(value, bool) or not isinstance(value, numbers.Real) or not math.isfinite(value):
        raise ValueError("not a finite number")
    return value


def whole(least: int, most: int, special: str = "") -> Reader:
    """An int from least to most. special: said of another value that counts, -1."""

    def read(value: Any) -> int:
        rule = f"give a whole number from {least} to {most}" + (
            f", or -1 {special}" if special else ""
        )
        try:
            number = _number(value)
        except ValueError:
            raise ValueError(rule) from None
        if number != int(number) or not (least <= number <= most or (special and number == -1)):
            raise ValueError(rule)
        return int(number)

    return read


def number(least: float, most: float, *, above: bool = False, below: bool = False) -> Reader:
    """A float from least to most. above, below: without least, without most."""

    def read(value: Any) -> float:
        try:
            found = float(_number(value))
            fits = (found > least if above else found >= least) and (
                found < most if below else found <= most
            )
        except ValueError:
            fits = False
        if not fits:
            low, high = "above" if above else "from", "below" if below else "up to"
            raise ValueError(f"give a number {low} {least:g} and {high} {most:g}")
        return found

    return read


def flag(value: Any) -> bool:
    if str(value).strip().lower() not in ("true", "false"):
        raise ValueError("give True or False")
    return str(value).strip().lower() == "true"


def choice(*options: str) -> Reader:
    def read(value: Any) -> str:
        if not isinstance(value, str) or value not in options:
            raise ValueError(f"choose one of {', '.join(options)}")
        return value

    return read


def reporter(value: Any) -> str:
    name: str = choice(*REPORTERS)(value)
    if name != "none" and importlib.util.find_spec(name) is None:
        raise ValueError(f"the package {name} is not installed; pip install {name}, or choose none")
    return name


def text(value: Any) -> str:
    if not isinstance(value, str) or not value.strip():
        raise ValueError("give a text that is not blank")
    return value


def path(value: Any) -> str:
    value = os.fspath(value) if isinstance(value, os.PathLike) else value
    if isinstance(value, str) and value.strip():
        return located(value)
    raise ValueError("give a path")


def texts(value: Any) -> tuple[str, ...]:
    """One or several, such as paths. papermill's -p hands a list over as the text of one."""
    if isinstance(value, str) and value.strip()[:1] in "[(" and value.strip()[-1:] in "])":
        try:
            value = ast.literal_eval(value.strip())
        except (ValueError, SyntaxError):
            raise ValueError("give one, or a list such as ['a', 'b']") from None
    many = value if isinstance(value, (list, tuple)) else [value]
    if not many:
        raise ValueError("give at least one")
    return tuple(path(each) for each in many)


def cell_numbers(value: Any) -> tuple[int, ...]:
    """Two or more different whole numbers, such as those of a grid's cells."""
    rule = "give two or more different numbers of cells, such as [1, 2]"
    if not isinstance(value, (list, tuple)) or any(isinstance(each, bool) for each in value):
        raise ValueError(rule)
    found = tuple(each for each in value if isinstance(each, int) and each >= 0)
    if len(found) < 2 or len(found) < len(value) or len(set(found)) < len(found):
        raise ValueError(rule)
    return found


def mapping(value: Any) -> dict[str, Any]:
    if not isinstance(value, Mapping | None):
        raise ValueError("give a mapping of names to values")
    return dict(value or {})


def optional(read: Reader, none: str = "") -> Reader:
    """None, or what read gives. none: what None stands for. YAML and shells write it as a text."""

    def read_or_none(value: Any) -> Any:
        if value is None or str(value).lower() in ("", "none", "null", "~"):
            return None
        try:
            return read(value)
        except ValueError as rule:
            raise ValueError(f"{rule}, or None{none and f' for {none}'}") from None

    return read_or_none
