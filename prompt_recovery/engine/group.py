"""The processes that `accelerate launch` or torchrun started together: their group, what one tells
the others, and what is said when one is lost."""

from __future__ import annotations

import os
import socket
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any, NamedTuple, TypeVar

import torch
from accelerate import PartialState
from accelerate.utils import gather_object

Found = TypeVar("Found")

TIME_LIMIT = "PROMPT_RECOVERY_GROUP_TIMEOUT"  # in the environment: seconds
# torch's own for gloo; NCCL's 600 would end runs whose machines take unlike times to load the base
# and to answer before training
SECONDS = 1800.0


class ProcessLost(RuntimeError):
    """Another process ended, raised, or did not answer within the time limit; the message says
    which there are."""


class Member(NamedTuple):
    """A process of the group, by its rank."""

    host: str
    rank: int

    def __str__(self) -> str:
        return f"{self.host} (process {self.rank})"


def launched() -> int:
    """How many processes were started together, this one among them."""
    return int(os.environ.get("WORLD_SIZE", 1)) if "LOCAL_RANK" in os.environ else 1


def time_limit() -> float:
    """Seconds that a process waits for the others at most. Raises ValueError where the environment
    gives no such number."""
    given = os.environ.get(TIME_LIMIT, str(SECONDS))
    try:
        seconds = float(given)
    except ValueError:
        seconds = 0.0
    if not 1 <= seconds <= 10**6:
        raise ValueError(f"{TIME_LIMIT}={given!r}: give seconds, from 1 to 1,000,000.")
    return seconds


def processes() -> PartialState:
    """The processes of `accelerate launch` and this one's place among them. Makes the GPU of its
    rank the current one, and the group, whose collectives end after `time_limit()`.

    Raises RuntimeError where something made accelerate's state before, as if this process were
    alone: on a CPU it then stays alone, and each process would train on all rows. ProcessLost where
    not all of them came.
    """
    limit = timedelta(seconds=time_limit())
    with named_if_lost():
        state = PartialState(cpu=not torch.cuda.is_available(), timeout=limit)
    if state.num_processes != launched():
        raise RuntimeError(
            f"accelerate launch started {launched()} processes, accelerate's state knows of "
            f"{state.num_processes}: it was made without cpu=True. Call memory.processes() before "
            "anything that uses accelerate."
        )
    return state


_members: list[Member] = []  # as far as they have told their names


@contextmanager
def named_if_lost() -> Iterator[None]:
    """Raises ProcessLost in place of what torch says when a collective fails, on a CPU (gloo) or
    between GPUs."""
    try:
        yield
    except RuntimeError as error:
        if not isinstance(error, torch.distributed.DistError) and "gloo/" not in str(error):
            raise
        others = [str(each) for each in _members if each.rank != int(os.environ.get("RANK", 0))]
        raise ProcessLost(
            f"Another process is lost ({', '.join(others) or 'it has not told its name'}): it "
            "ended, or its machine can't be reached. What it printed last says why. Waiting ends "
            f"after {time_limit():g} s ({TIME_LIMIT}). Checkpoints are kept: start all processes "
            f"again, with resume=True. torch says: {str(error)[:300]}"
        ) from error


def gathered(value: Found) -> list[Found]:
    """Each process's value, by rank; all of them must call it."""
    state = processes()
    if state.num_processes == 1:
        return [value]
    with named_if_lost():
        told = gather_object([(Member(socket.gethostname(), state.process_index), value)])
    _members[:] = [member for member, _ in told]
    return [each for _, each in told]


def members() -> list[Member]:
    """All processes by rank, once something was `gathered`."""
    return list(_members)


def everywhere(act: Callable[[], Found]) -> list[Found]:
    """What act gives in each process, by rank. Where it raises in one, all raise: those in which it
    did not, ProcessLost with the other's words, instead of waiting for it."""
    found: Any = None
    error: Exception | None = None
    try:
        found = act()
    except Exception as raised:
        error = raised
    told = gathered((found, error and f"{type(error).__name__}: {error}"))
    if error:
        raise error
    for member, (_, words) in zip(members(), told, strict=False):
        if words:
            raise ProcessLost(f"{member} can't go on: {words}")
    return [value for value, _ in told]
