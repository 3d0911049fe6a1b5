"""What the processes of one training must share, compared before it begins: settings, rows, the
base, libraries, and the checkpoint from which they go on."""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from accelerate.utils import broadcast_object_list

from prompt_recovery.engine import (
    gathered,
    launched,
    members,
    named_if_lost,
    processes,
    time_limit,
)
from prompt_recovery.examples import TrainingError
from prompt_recovery.files import replaced, sha256
from prompt_recovery.run_folder import checkpoint_folders, last_checkpoint, set_aside, step_of

LIBRARIES = ("torch", "transformers", "peft", "accelerate", "bitsandbytes")
# of a checkpoint's files, those that hold paths and times of the machine that wrote them
OF_A_MACHINE = ("trainer_state.json", "training_args.bin", "README.md", "settings.json")


class SeveralProcesses(RuntimeError):
    """Processes that were launched together for what one process does."""


def refuse_several(what: str, remedy: str) -> None:
    """Raises SeveralProcesses where this process was launched with others, which would do the same
    work once more and write the same files."""
    if launched() > 1:
        raise SeveralProcesses(
            f"{what} runs as one process, and {launched()} were launched together: {remedy}."
        )


def check_same(**parts: Any) -> None:
    """Compares parts, with the versions of libraries and our own code, in all processes, each of
    which must call it.

    Raises TrainingError, in all of them, with the names of the machines and what differs.
    """
    if processes().num_processes == 1:
        return
    texts = {
        name: json.dumps(value, sort_keys=True, default=sorted)
        for name, value in (parts | _versions()).items()
    }
    digest = hashlib.sha256(json.dumps(texts, sort_keys=True).encode()).hexdigest()
    if len(set(gathered(digest))) == 1:
        return
    told = gathered(texts)
    differences = [
        f"{name} is {told[0].get(name, 'missing')[:80]} on {members()[0]}, "
        f"{each.get(name, 'missing')[:80]} on {member}"
        for member, each in zip(members(), told, strict=True)
        for name in sorted(told[0].keys() | each.keys())
        if each.get(name) != told[0].get(name)
    ]
    raise TrainingError(
        "The processes of one training must share rows, settings and libraries: "
        f"{'; '.join(differences)}. Make them the same everywhere, and start all again."
    )


def _versions() -> dict[str, str | None]:
    found: dict[str, str | None] = {}
    for name in LIBRARIES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = None
    sources = sorted(Path(__file__).parent.rglob("*.py"))
    digests = "".join(sha256(path) for path in sources)
    return found | dict(prompt_recovery=hashlib.sha256(digests.encode()).hexdigest()[:12])


def describe() -> str:
    """Who trains together, and how long one waits for the others."""
    return (
        f"{len(members())} processes: {', '.join(map(str, members()))}. Each waits at most "
        f"{time_limit():g} s for the others."
    )


def same_checkpoint(output_dir: Path, writes: bool, every: int) -> Path | None:
    """The first process's last checkpoint, which all of them go on from, or None; each must call
    it. A machine with a disk of its own gets a copy, and what differs there is moved aside.

    writes: whether this process writes to output_dir; see `run_lock.claim_together`. every: steps
    from one checkpoint to the next, by which a killed run's machines may be apart.
    Raises TrainingError, in all processes, where a machine has a later checkpoint.
    """
    checkpoints = output_dir / "checkpoints"
    first = processes().is_main_process
    last = last_checkpoint(checkpoints) if writes else None
    steps = gathered(step_of(last) if last else 0)
    latest = max(steps)
    if latest > steps[0] + (every if steps[0] else 0):
        owner = members()[steps.index(latest)]
        raise TrainingError(
            f"{owner} has the checkpoint of step {latest}, and {members()[0]}, from which all go "
            f"on, has {f'that of step {steps[0]}' if steps[0] else 'none'}. Copy output_dir's "
            f"folder checkpoints from {owner.host} to {members()[0].host}, or start {owner.host} "
            "as the first machine; resume=False begins again, and moves them aside."
        )
    if steps[0] and processes().num_processes > 1:
        _copy(output_dir, own_disk=writes and not first)
    return checkpoints / f"checkpoint-{steps[0]}" if steps[0] else None


def _copy(output_dir: Path, own_disk: bool) -> None:
    """Send the first process's checkpoints to disks that hold others or none."""
    checkpoints = output_dir / "checkpoints"
    first = processes().is_main_process
    digests = _digests(checkpoints) if first or own_disk else {}
    wanted, *_ = gathered(digests)
    lacks = own_disk and _of_all(digests) != _of_all(wanted)
    if not any(gathered(lacks)):
        return
    if lacks:
        set_aside(output_dir, ("checkpoints", "training_log.csv"))
    # a checkpoint is whole once it has its trainer_state.json
    for name in sorted(wanted, key=lambda name: (name.endswith("trainer_state.json"), name)):
        sent = [(checkpoints / name).read_bytes() if first else None]
        with named_if_lost():
            broadcast_object_list(sent)
        if lacks:
            with replaced(checkpoints / name) as partial:
                partial.write_bytes(sent[0] or b"")
    if lacks:
        print(f"{checkpoints} is a copy of that on {members()[0]}")


def _digests(checkpoints: Path) -> dict[str, str]:
    """sha256 of the files of checkpoints, and of their settings.json."""
    files = [path for folder in checkpoint_folders(checkpoints) for path in folder.iterdir()]
    files += checkpoints.glob("settings.json")
    return {str(path.relative_to(checkpoints)): sha256(path) for path in files if path.is_file()}


def _of_all(digests: Mapping[str, str]) -> dict[str, str]:
    """Of the files that are the same on all machines."""
    return {name: each for name, each in digests.items() if Path(name).name not in OF_A_MACHINE}
