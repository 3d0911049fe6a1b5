"""Forks of a test that train as machines of one group."""

import gc
import json
import os
import signal
import socket
import sys
import traceback
from pathlib import Path

from accelerate.state import AcceleratorState, GradientState

from prompt_recovery.engine import group


def free_port():
    with socket.socket() as opened:
        opened.bind(("127.0.0.1", 0))
        return opened.getsockname()[1]


def start(act, limit, names):
    """Forks that run act(number), one a machine by its name, as one group over gloo."""
    port, started = free_port(), []
    for number, name in enumerate(names):
        process = os.fork()
        if process == 0:
            gc.freeze()  # else a collection copies what the parent holds
            signal.alarm(120)  # ends it
            os.environ |= dict(
                RANK=str(number), WORLD_SIZE=str(len(names)), LOCAL_RANK="0",
                LOCAL_WORLD_SIZE="1", MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port),
            )  # fmt: skip
            os.environ[group.TIME_LIMIT] = str(limit)
            status = 1
            try:
                AcceleratorState._reset_state(reset_partial_state=True)
                GradientState._reset_state()
                socket.gethostname = lambda name=name: name
                act(number)
                status = 0
            except BaseException:
                traceback.print_exc()
            finally:
                sys.stdout.flush()
                os._exit(status)
        started.append(process)
    return started


def machines(act, limit=60, names=("alpha", "beta")):
    """What act(number) gives or raises on each of these machines, as text or JSON's values."""
    folder = Path(os.environ["PYTEST_FOLDER"])

    def tell(number):
        try:
            found = act(number)
        except Exception as error:
            found = f"{type(error).__name__}: {error}"
        (folder / f"{number}.json").write_text(json.dumps(found))

    for path in folder.glob("*.json"):
        path.unlink()
    for process in start(tell, limit, names):
        os.waitpid(process, 0)
    return [
        json.loads(path.read_text()) if path.is_file() else None
        for path in (folder / f"{number}.json" for number in range(len(names)))
    ]
