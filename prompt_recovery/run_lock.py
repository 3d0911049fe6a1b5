"""Who writes to a folder or file: one run, by a lock that is said with its owner's name."""

from __future__ import annotations

import fcntl
import json
import os
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any, NamedTuple

from prompt_recovery.engine import everywhere, gathered, processes
from prompt_recovery.examples import TrainingError
from prompt_recovery.files import room_said

LOCK = "run.lock"
BEAT = 60  # seconds between two touches of the lock file
# A lock of another host, or on a drive without locks, counts as stale when it was not touched for
# so long; of this host, the kernel knows.
STALE = 5 * BEAT


class RunFolderError(TrainingError):
    """A folder in which a run can't begin or go on; the message says who or what stands there."""


class _Held(NamedTuple):
    """A lock of this process: its file, what stands in it, and the event that ends its beat."""

    file: IO[str]
    owner: dict[str, Any]
    done: threading.Event


_held: dict[Path, _Held] = {}


def claim(place: str | Path, setting: str = "output_dir") -> None:
    """Make a run's folder, or the one file that it writes, this process's own until `release` or
    its end; it may be claimed more than once.

    setting: which names it. Raises RunFolderError where another process has it. A lock that a dead
    process left is taken over.
    """
    owner = _lock(lock_of(place, setting))
    if owner is not None:
        raise _refusal(place, owner, setting)


def lock_of(place: str | Path, setting: str = "output_dir") -> Path:
    """The lock in a folder, or beside a file."""
    path = Path(place).resolve()
    return path / LOCK if setting == "output_dir" else path.with_name(f"{path.name}.lock")


def _lock(path: Path) -> dict[str, Any] | None:
    """Claims a lock file; where another process has it, what that one wrote into it."""
    if path in _held:
        return None
    path.parent.mkdir(parents=True, exist_ok=True)
    while True:
        file, locked = path.open("a+"), True
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            with file:
                return _owner(file)
        except OSError as error:  # a network drive without locks
            locked = False
            print(
                f"{path.parent} can't be locked ({error}): see to it that no second run writes "
                "there."
            )
        if path.exists() and os.path.samestat(os.fstat(file.fileno()), path.stat()):
            break
        file.close()  # removed by its owner in between
    owner = _owner(file)
    if owner:
        known_dead = locked and owner.get("host") == socket.gethostname()
        if not known_dead and time.time() - path.stat().st_mtime < STALE:
            file.close()
            return owner
        print(
            f"took over the lock that process {owner.get('process')} on {owner.get('host')} left "
            f"in {path.parent}"
        )
    mine = dict(
        process=os.getpid(), host=socket.gethostname(), since=time.strftime("%Y-%m-%d %H:%M:%S")
    )
    with room_said(path):
        file.truncate(0)
        file.write(json.dumps(mine) + "\n")
        file.flush()
    done = threading.Event()
    threading.Thread(target=_beat, args=(path, done), daemon=True).start()
    _held[path] = _Held(file, mine, done)
    return None


def release(place: str | Path, setting: str = "output_dir") -> None:
    """Give a claimed folder or file back; nothing happens if this process has not claimed it."""
    path = lock_of(place, setting)
    if path in _held:
        held = _held.pop(path)
        held.done.set()
        path.unlink(missing_ok=True)
        held.file.close()


def claim_together(output_dir: str | Path) -> bool:
    """`claim` by one process on each disk that the processes of `accelerate launch` write to; each
    of them must call it. Returns whether this one writes: the first of all does, and the first on
    every machine that does not see its folder.

    Raises RunFolderError, in all of them, where another run's process has a folder.
    """
    state, path = processes(), Path(output_dir).resolve() / LOCK
    everywhere(lambda: claim(output_dir) if state.is_main_process else None)
    # a machine that sees the first one's lock shares its disk
    other = _lock(path) if state.is_local_main_process else None
    ours = gathered(_held[path].owner if path in _held else None)
    refused = None if other is None or other in ours else _refusal(output_dir, other)
    everywhere(lambda: _raise(refused))
    return path in _held


def _raise(error: Exception | None) -> None:
    if error is not None:
        raise error


@contextmanager
def claimed(output_dir: str | Path) -> Iterator[bool]:
    """`claim_together` for a block, unless `begin` has done so already. Gives whether this process
    writes."""
    held = Path(output_dir).resolve() / LOCK in _held
    writes = claim_together(output_dir)
    try:
        yield writes
    finally:
        if not held:
            release(output_dir)


def _beat(path: Path, done: threading.Event) -> None:
    while not done.wait(BEAT):
        try:
            os.utime(path)
        except FileNotFoundError:
            return


def _owner(file: IO[str]) -> dict[str, Any]:
    file.seek(0)
    try:
        owner = json.loads(file.read())
    except ValueError:
        return {}
    return owner if isinstance(owner, dict) else {}


def _refusal(
    place: str | Path, owner: dict[str, Any], setting: str = "output_dir"
) -> RunFolderError:
    return RunFolderError(
        f"{Path(place).resolve()} belongs to a run of process {owner.get('process', '?')} on "
        f"{owner.get('host', '?')} since {owner.get('since', '?')}. Wait for it or end it (a "
        f"notebook's kernel holds it until it is shut down), or give another {setting}. If that "
        f"host is gone, remove {lock_of(place, setting)}."
    )
