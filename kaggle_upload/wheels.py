"""Wheels for Kaggle's Python: our own, and the pinned ones of wheels.txt; never torch."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Sequence
from pathlib import Path

from packaging.tags import Tag, compatible_tags, cpython_tags
from packaging.utils import InvalidWheelFilename, canonicalize_name, parse_wheel_filename

from kaggle_upload.handles import UploadError
from kaggle_upload.stage import HERE

ROOT = HERE.parent
PYTHONS = ("3.12", "3.13")  # of Kaggle's image, and of what it is built from since 2026-08
# glibc 2.35 (Ubuntu 22.04) and older
PLATFORMS = [
    *(f"manylinux_2_{minor}_x86_64" for minor in range(35, 4, -1)),
    "manylinux2014_x86_64",
    "linux_x86_64",
]
NEVER = re.compile(r"torch|triton|nvidia-.*|cuda-.*|numpy")  # the image's own stay


def build_library(folder: Path) -> Path:
    """The wheel of prompt_recovery in `folder`, the same bytes for the same sources. Raises
    UploadError.

    Built from a copy, so that nothing is written into the repository and no stale build/ comes
    along.
    """
    copy = folder / "source"
    shutil.copytree(
        ROOT / "prompt_recovery",
        copy / "prompt_recovery",
        ignore=shutil.ignore_patterns("__pycache__"),
    )
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, copy)
    # a fixed time in the archive; without it every build would look like new content
    _pip(
        "wheel",
        "--no-deps",
        "-w",
        str(folder),
        str(copy),
        env={"SOURCE_DATE_EPOCH": "1704067200"},
    )
    shutil.rmtree(copy)
    return next(folder.glob("prompt_recovery-*.whl"))


def collect(folder: Path, pythons: Sequence[str] = PYTHONS) -> list[Path]:
    """Our wheel and those of wheels.txt for each Python, downloaded into `folder` and checked.

    Most wheels serve every Python and are there once. Raises UploadError.
    """
    ours = build_library(folder)
    wanted = requirements()
    for python in pythons:
        _pip("download", "--no-deps", *target(python), "-d", str(folder), *wanted)
    wheels = sorted(folder.glob("*.whl"))
    for wheel in wheels:
        check_wheel(wheel, pythons)
    names = {canonicalize_name(line.split("==")[0]) for line in wanted}
    for python in pythons:
        parsed = [parse_wheel_filename(wheel.name) for wheel in wheels if wheel != ours]
        found = {canonicalize_name(name) for name, _, _, tags in parsed if tags & accepted(python)}
        if names - found:
            raise UploadError(
                f"pip gave no wheel for {sorted(names - found)} on Python {python}; correct "
                "wheels.txt."
            )
    return wheels


def target(python: str) -> list[str]:
    """pip's options for wheels of Kaggle's machines with that Python."""
    platforms = [word for platform in PLATFORMS for word in ("--platform", platform)]
    return [
        *("--only-binary=:all:", "--implementation", "cp", "--python-version", python),
        *platforms,
    ]


def requirements() -> list[str]:
    """NAME==VERSION of every line of wheels.txt. Raises UploadError for one without a pin, and for
    torch and the like."""
    lines = [
        line.split("#")[0].strip() for line in (ROOT / "requirements.txt").read_text().splitlines()
    ]
    pins = {canonicalize_name(line.split("==")[0]): line for line in lines if "==" in line}
    wanted = [line.split("#")[0].strip() for line in (HERE / "wheels.txt").read_text().splitlines()]
    result = []
    for line in filter(None, wanted):
        name = canonicalize_name(line.split("==")[0])
        pin = line if "==" in line else pins.get(name)
        if pin is None:
            raise UploadError(
                f"wheels.txt names {line}, which requirements.txt does not pin: write "
                f"{line}==VERSION."
            )
        if NEVER.fullmatch(name):
            raise UploadError(f"wheels.txt names {line}: Kaggle's own stays, take the line out.")
        result.append(pin)
    return result


def check_wheel(path: Path, pythons: Sequence[str] = PYTHONS[:1]) -> None:
    """Raises UploadError for a wheel that no such Python of Kaggle's would install, a broken one,
    and for torch and the like."""
    try:
        name, _, _, tags = parse_wheel_filename(path.name)
        broken = zipfile.ZipFile(path).testzip()
    except (InvalidWheelFilename, zipfile.BadZipFile) as error:
        raise UploadError(f"{path.name} is not a wheel: {error}.") from error
    if broken:
        raise UploadError(f"{path.name} is damaged ({broken}); download it again.")
    if NEVER.fullmatch(name):
        raise UploadError(f"{path.name} must not be sent: Kaggle's own stays.")
    if not any(tags & accepted(each) for each in pythons):
        shown = ", ".join(sorted(map(str, tags)))
        raise UploadError(
            f"{path.name} ({shown}) does not install on Kaggle's Python {' or '.join(pythons)}, "
            "x86_64."
        )


def accepted(python: str) -> frozenset[Tag]:
    """The tags of wheels that Kaggle's machines install with that Python, such as "3.12"."""
    major, minor = map(int, python.split("."))
    pure = compatible_tags((major, minor), f"cp{major}{minor}", PLATFORMS)
    return frozenset(cpython_tags((major, minor), platforms=PLATFORMS)) | frozenset(pure)


def _pip(*arguments: str, env: dict[str, str] | None = None) -> None:
    command = [
        sys.executable,
        "-m",
        "pip",
        "--disable-pip-version-check",
        "--no-cache-dir",
        *arguments,
    ]
    run = subprocess.run(command, capture_output=True, text=True, env=os.environ | (env or {}))
    if run.returncode:
        raise UploadError(f"`pip {arguments[0]}` failed: {run.stderr.strip()[-800:]}")
