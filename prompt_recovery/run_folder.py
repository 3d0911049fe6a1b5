"""A training's output_dir: who writes there, what an earlier run left, which checkpoints are
ours."""

from __future__ import annotations

import fcntl
import json
import os
import re
import shutil
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

from prompt_recovery.engine import processes
from prompt_recovery.examples import TrainingError

LOCK = "run.lock"
BEAT = 60  # seconds between two touches of the lock file
# A lock of another host counts as stale when it was not touched for so long; of this one, the
# kernel knows.
STALE = 5 * BEAT
WRITTEN = (  # what a run leaves in its output_dir
    "adapter",
    "checkpoints",
    "evaluation.json",
    "predictions.csv",
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


class RunFolderError(TrainingError):
    """A folder in which a run can't begin or go on; the message says who or what stands there."""


_held: dict[Path, tuple[IO[str], threading.Event]] = {}


def claim(output_dir: str | Path) -> None:
    """Make output_dir this process's own until `release` or its end; it may be claimed more than
    once.

    Raises RunFolderError where another process has it. A lock that a dead process left is taken
    over.
    """
    path = Path(output_dir).resolve() / LOCK
    if path in _held:
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    while True:
        file = path.open("a+")
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise _refusal(path, _owner(file)) from None
        except OSError as error:  # a network drive without locks
            print(
                f"{path.parent} can't be locked ({error}): see to it that no second run writes "
                "there."
            )
        if path.exists() and os.path.samestat(os.fstat(file.fileno()), path.stat()):
            break
        file.close()  # removed by its owner in between
    owner = _owner(file)
    if owner:
        if owner.get("host") != socket.gethostname() and time.time() - path.stat().st_mtime < STALE:
            file.close()
            raise _refusal(path, owner)
        print(
            f"took over the lock that process {owner.get('process')} on {owner.get('host')} left "
            f"in {path.parent}"
        )
    file.truncate(0)
    mine = dict(
        process=os.getpid(), host=socket.gethostname(), since=time.strftime("%Y-%m-%d %H:%M:%S")
    )
    file.write(json.dumps(mine) + "\n")
    file.flush()
    done = threading.Event()
    threading.Thread(target=_beat, args=(path, done), daemon=True).start()
    _held[path] = (file, done)


def release(output_dir: str | Path) -> None:
    """Give a claimed folder back; nothing happens if this process has not claimed it."""
    path = Path(output_dir).resolve() / LOCK
    if path in _held:
        file, done = _held.pop(path)
        done.set()
        path.unlink(missing_ok=True)
        file.close()


@contextmanager
def claimed(output_dir: str | Path) -> Iterator[None]:
    """`claim` for a block, unless this process has the folder already."""
    mine = Path(output_dir).resolve() / LOCK not in _held
    claim(output_dir)
    try:
        yield
    finally:
        if mine:
            release(output_dir)


def _beat(path: Path, done: threading.Event) -> None:
    while not done.wait(BEAT):
        try:
            os.utime(path)
        except FileNotFoundError:
            return


def _owner(file: IO[str]) -> dict[str, str]:
    file.seek(0)
    try:
        owner = json.loads(file.read())
    except ValueError:
        return {}
    return owner if isinstance(owner, dict) else {}


def _refusal(path: Path, owner: dict[str, str]) -> RunFolderError:
    return RunFolderError(
        f"{path.parent} belongs to a run of process {owner.get('process', '?')} on "
        f"{owner.get('host', '?')} since {owner.get('since', '?')}. Wait for it or end it (a "
        "notebook's kernel holds it until it is shut down), or give another output_dir. If that "
        f"host is gone, remove {path}."
    )


def begin(output_dir: str | Path, resume: bool) -> None:
    """Claim output_dir for a run and, unless it resumes, move aside what an earlier one left there.

    Under `accelerate launch` the first process does so, and the others wait for it.
    """
    state = processes()
    if state.is_main_process:
        claim(output_dir)
        if not resume:
            set_aside(output_dir)
    state.wait_for_everyone()


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


def _named(checkpoints: str | Path) -> list[Path]:
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


def _whole(checkpoint: Path) -> bool:
    # trainer_state.json is written last, so one without a readable one is not whole
    try:
        state = json.loads((checkpoint / "trainer_state.json").read_text(encoding="utf-8"))
    except (FileNotFoundError, ValueError):
        return False
    needed = ("adapter_model.safetensors", "optimizer.pt", "scheduler.pt")
    return "global_step" in state and all((checkpoint / name).is_file() for name in needed)


def last_checkpoint(checkpoints: str | Path) -> Path | None:
    """The whole checkpoint of the highest step."""
    return next((folder for folder in reversed(_named(checkpoints)) if _whole(folder)), None)


def remove_broken(checkpoints: str | Path) -> None:
    """Remove checkpoints that were being written when the run was killed."""
    for folder in _named(checkpoints):
        if not _whole(folder) and _removable(folder):
            shutil.rmtree(folder)


def rotate(checkpoints: str | Path, best: int | None) -> None:
    """Keep two checkpoints: that of the highest step and the best, or the two of the highest steps
    where these are one. Times of files say nothing: they change when a folder is unpacked or
    copied."""
    *older, newest = _named(checkpoints)
    keep = next(
        (folder for folder in older if step_of(folder) == best), older[-1] if older else newest
    )
    for folder in older:
        if folder != keep and _removable(folder):
            shutil.rmtree(folder)
