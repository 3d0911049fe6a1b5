"""A training's output_dir: what an earlier run left, and which checkpoints are ours."""

from __future__ import annotations

import json
import re
import shutil
import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from transformers import TrainerState

from prompt_recovery.engine import everywhere
from prompt_recovery.run_lock import claim_together

WRITTEN = (  # what a run leaves in its output_dir
    "adapter",
    "checkpoints",
    "evaluation.json",
    "predictions.csv",
    "held_out.csv",
    "training_log.csv",
    "loss.png",
    "lengths.png",
    "scores.png",
    "split.csv",
)
# What transformers and peft write into a checkpoint
CHECKPOINT_FILES = re.compile(
    r"adapter_config\.json|adapter_model\.safetensors|README\.md|(optimizer|scheduler|scaler)\.pt"
    r"|rng_state(_\d+)?\.pth|training_args\.bin|trainer_state\.json"
)


def begin(output_dir: str | Path, resume: bool | None, earlier: Path | None = None) -> None:
    """Claim output_dir for a run and, unless it resumes, move aside what an earlier one left there.

    earlier: another run's output, of which a run that resumes takes a copy where its own output_dir
    holds no whole checkpoint. It is only read: on Kaggle a session's output is mounted so.
    Under `accelerate launch` one process on each disk does so, and the others wait for it.
    """
    if claim_together(output_dir):
        if not resume:
            set_aside(output_dir)
        elif earlier is not None and last_checkpoint(Path(output_dir) / "checkpoints") is None:
            _copy(earlier, Path(output_dir))
    everywhere(lambda: None)


def _copy(earlier: Path, output: Path) -> None:
    """What a run needs to go on: checkpoints, split and log. The checkpoints come last, and whole:
    without them nothing was copied. Modes are not: those of a mount forbid to write."""
    last = last_checkpoint(earlier / "checkpoints")
    partial = output / "checkpoints.partial"
    shutil.rmtree(partial, ignore_errors=True)
    for path in sorted((earlier / "checkpoints").rglob("*")):
        if path.is_file():
            target = partial / path.relative_to(earlier / "checkpoints")
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(path, target)
    for name in ("split.csv", "training_log.csv"):
        if (earlier / name).is_file():
            shutil.copyfile(earlier / name, output / name)
    set_aside(output, ("checkpoints",))  # of a run without a whole one
    partial.rename(output / "checkpoints")
    print(f"copied from {earlier}: the run goes on from step {step_of(last) if last else 0}")


def set_aside(output_dir: str | Path, names: tuple[str, ...] = WRITTEN) -> Path | None:
    """Move what an earlier run left under these names to output_dir/earlier-1 (or -2, ...), and say
    so; nothing else is touched. Returns the new folder, in which resume=True would go on, or
    None."""
    folder = Path(output_dir)
    found = [name for name in names if (folder / name).exists()]
    if not found:
        return None
    number = 1
    while (folder / f"earlier-{number}").exists():
        number += 1
    target = folder / f"earlier-{number}"
    target.mkdir()
    last = last_checkpoint(folder / "checkpoints")
    for name in found:
        (folder / name).rename(target / name)
    text = f"moved to {target}: {', '.join(found)}"
    if last is not None and "checkpoints" in found:
        text += (
            f". The last checkpoint is that of step {step_of(last)}: output_dir={target} with"
            " resume=True goes on"
        )
    print(text)
    return target


def step_of(checkpoint: Path) -> int:
    return int(checkpoint.name.removeprefix("checkpoint-"))


def checkpoint_folders(checkpoints: str | Path) -> list[Path]:
    """Folders named checkpoint-N, by step."""
    found = Path(checkpoints).glob("checkpoint-*")
    return sorted(
        (path for path in found if re.fullmatch(r"checkpoint-\d+", path.name) and path.is_dir()),
        key=step_of,
    )


def _removable(checkpoint: Path) -> bool:
    """Whether a run wrote all that is in it: a user's own files are never removed."""
    return not checkpoint.is_symlink() and all(
        CHECKPOINT_FILES.fullmatch(path.name) for path in checkpoint.iterdir()
    )


def _state(checkpoint: Path) -> dict[str, Any] | None:
    """Its trainer_state.json, which is written last: None where it was being written when the run
    was killed."""
    try:
        state = json.loads((checkpoint / "trainer_state.json").read_text(encoding="utf-8"))
    except (FileNotFoundError, ValueError):
        return None
    return state if "global_step" in state else None


def whole(path: Path) -> bool:
    """Whether a checkpoint's file is there to its end: a broken copy or a power cut leaves less."""
    if path.suffix != ".safetensors":
        return path.is_file() and zipfile.is_zipfile(path)
    try:
        with safe_open(path, "pt"):
            return True
    except (OSError, SafetensorError):
        return False


def _lacking(checkpoint: Path, there: Callable[[Path], bool] = Path.is_file) -> list[str]:
    """Files that a checkpoint needs and does not have: also the random state of each process."""
    state = _state(checkpoint)
    count = made_by(state or {})
    random = ["rng_state.pth"] if count == 1 else [f"rng_state_{n}.pth" for n in range(count or 0)]
    needed = ["adapter_model.safetensors", "optimizer.pt", "scheduler.pt", *random]
    lacking = [name for name in needed if not there(checkpoint / name)]
    return lacking if state else ["trainer_state.json", *lacking]


def note_processes(state: TrainerState, count: int) -> None:
    """Have trainer_state.json say how many processes made a checkpoint, in the part that
    transformers keeps for callbacks."""
    state.stateful_callbacks["KeepTwo"] = dict(args={}, attributes=dict(processes=count))


def made_by(state: Mapping[str, Any]) -> int | None:
    """How many processes made a checkpoint, by its trainer_state.json; None where an earlier
    version wrote it, which did not say."""
    kept = state.get("stateful_callbacks", {}).get("KeepTwo", {})
    return kept.get("attributes", {}).get("processes")


def last_checkpoint(checkpoints: str | Path) -> Path | None:
    """The whole checkpoint of the highest step."""
    return next(
        (path for path in reversed(checkpoint_folders(checkpoints)) if not _lacking(path)), None
    )


def remove_broken(checkpoints: str | Path, there: Callable[[Path], bool] = Path.is_file) -> None:
    """Remove checkpoints that were being written when the run was killed. One that lost a file
    since is renamed, and said. there: whether a file is, such as `whole`."""
    for folder in checkpoint_folders(checkpoints):
        if _state(folder) is None:
            if _removable(folder):
                shutil.rmtree(folder)
        elif lacking := _lacking(folder, there):
            name, number = f"incomplete-{folder.name}", 1
            while folder.with_name(name).exists():
                number += 1
                name = f"incomplete-{folder.name}-{number}"
            folder.rename(folder.with_name(name))
            print(f"{folder} lacks {', '.join(lacking)}, or the end of it: now it is {name}")


def rotate(checkpoints: str | Path, best: int | None) -> None:
    """Keep two checkpoints: that of the highest step and the best, or the two of the highest steps
    where these are one. Times of files say nothing: they change when a folder is unpacked or
    copied."""
    *older, newest = checkpoint_folders(checkpoints)
    keep = next(
        (folder for folder in older if step_of(folder) == best), older[-1] if older else newest
    )
    for folder in older:
        if folder != keep and _removable(folder):
            shutil.rmtree(folder)
