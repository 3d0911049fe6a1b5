"""Two machines that share no disk, made of network namespaces of this one, train as one: the train
notebook's own script on two launchers over gloo, with the faults that such runs meet.

python bench/two_machines.py WORK    as root, with `ip` and `unshare`; 3 to 7 minutes

Each case must equal one process, or be refused by name before the first step; a machine that
vanishes must be said within the time limit. Prints a line a case, and exits 1 where one is wrong.
"""

from __future__ import annotations

import argparse
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import jupytext
import papermill
import torch
from safetensors.torch import load_file

from prompt_recovery import metric
from prompt_recovery.data import read_rows

ROOT = Path(__file__).resolve().parent.parent
MACHINES = ("machine-a", "machine-b")
STEPS, LIMIT = 8, 60
EQUAL = 1e-5  # of adapter weights: the order of sums


@contextmanager
def network() -> Iterator[None]:
    """A namespace for each machine, with a cable between them."""
    try:
        for name in MACHINES:
            ip("netns", "add", name)
        ip("link", "add", "cable", "netns", MACHINES[0], "type", "veth", "peer", "name", "cable",
           "netns", MACHINES[1])  # fmt: skip
        for number, name in enumerate(MACHINES):
            ip("-n", name, "address", "add", f"10.77.0.{number + 1}/24", "dev", "cable")
            for device in ("lo", "cable"):
                ip("-n", name, "link", "set", device, "up")
        yield
    finally:
        for name in MACHINES:
            subprocess.run(["ip", "netns", "del", name], check=False, capture_output=True)


def ip(*words: str) -> None:
    subprocess.run(["ip", *words], check=True)


def script(path: Path, **parameters: Any) -> Path:
    """The train notebook with these parameters, as README makes a script of it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    notebook = path.with_suffix(".ipynb")
    papermill.execute_notebook(
        ROOT / "notebooks" / "train.ipynb", notebook, parameters=parameters, prepare_only=True,
        progress_bar=False,
    )  # fmt: skip
    jupytext.write(jupytext.read(notebook), path, fmt="py:percent")
    return path


class Machine:
    """A launcher with its one process, in a namespace and with a host name of its own."""

    def __init__(self, number: int, path: Path, port: int) -> None:
        self.name, self.log = MACHINES[number], path.with_suffix(".log")
        launch = [
            sys.executable, "-m", "accelerate.commands.accelerate_cli", "launch", "--multi_gpu",
            "--num_processes", "2", "--num_machines", "2", "--machine_rank", str(number),
            "--main_process_ip", "10.77.0.1", "--main_process_port", str(port),
            "--mixed_precision", "no", "--dynamo_backend", "no", str(path),
        ]  # fmt: skip
        named = ["unshare", "--uts", "sh", "-c", 'hostname "$0" && exec "$@"', self.name, *launch]
        environment = os.environ | dict(
            OMP_NUM_THREADS="1", HF_HUB_OFFLINE="1", TOKENIZERS_PARALLELISM="false",
            GLOO_SOCKET_IFNAME="cable", PROMPT_RECOVERY_GROUP_TIMEOUT=str(LIMIT),
        )  # fmt: skip
        with self.log.open("w") as log:
            self.process = subprocess.Popen(
                ["ip", "netns", "exec", self.name, *named], env=environment, cwd=ROOT, stdout=log,
                stderr=subprocess.STDOUT, start_new_session=True,
            )  # fmt: skip

    def worker(self) -> int:
        """The process id of the script."""
        children = Path(f"/proc/{self.process.pid}/task/{self.process.pid}/children").read_text()
        return int(children.split()[0])

    def end(self, seconds: float = 300) -> tuple[int, str]:
        """(exit status, what it printed)."""
        try:
            self.process.wait(seconds)
        except subprocess.TimeoutExpired:
            os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait()
            return 124, self.log.read_text() + f"\n[still there after {seconds:.0f} s]"
        return self.process.returncode, self.log.read_text()


class Bench:
    def __init__(self, work: Path) -> None:
        self.work, self.port, self.wrong = work, 29700, 0
        rows = ROOT / "demo" / "rows.csv"
        table = read_rows([str(rows)]).sample(24, random_state=1)
        table.to_csv(work / "rows.csv", index=False)
        table.iloc[::-1].to_csv(work / "others.csv", index=False)
        self.shared = dict(
            model_dir=str(ROOT / "demo" / "tiny-mixtral"), train_csv=str(work / "rows.csv"),
            encoder_dir=str(metric.minilm_dir()), max_steps=STEPS, evaluations=4, patience=99,
            learning_rate=1e-3, lora_dropout=0.0, batch_size=2, gradient_accumulation=2,
            max_tokens=160, four_bit=True,
        )  # fmt: skip

    def start(self, case: str, both: dict[str, Any], second: dict[str, Any]) -> list[Machine]:
        self.port += 1
        found = []
        for number, name in enumerate(MACHINES):
            given = self.shared | dict(output_dir=str(self.disk(number))) | both
            path = script(self.work / case / f"{name}.py", **given | (second if number else {}))
            found.append(Machine(number, path, self.port))
        return found

    def disk(self, number: int) -> Path:
        return self.work / "disks" / MACHINES[number]

    def say(self, case: str, right: bool, what: str, started: float) -> None:
        self.wrong += not right
        print(
            f"{'right' if right else 'WRONG'}  {case}: {what} ({time.monotonic() - started:.0f} s)",
            flush=True,
        )

    def equal(self, case: str, started: float, ended: list[tuple[int, str]]) -> None:
        """Both machines' last checkpoints and the adapter beside those of one process."""
        worst = 0.0
        pairs = [("adapter", 0), *((f"checkpoints/checkpoint-{STEPS}", n) for n in (0, 1))]
        for folder, number in pairs:
            try:
                one, two = (
                    load_file(place / folder / "adapter_model.safetensors")
                    for place in (self.work / "one", self.disk(number))
                )
            except FileNotFoundError as error:
                worst = float("inf")
                print(error)
                continue
            worst = max(worst, *((one[name] - two[name]).abs().max().item() for name in one))
        right = worst < EQUAL and all(status == 0 for status, _ in ended)
        self.say(case, right, f"adapters differ from one process's by {worst:.1e}", started)

    def refused(self, case: str, words: str, **second: Any) -> None:
        started = time.monotonic()
        before = sorted(self.work.glob("disks/*/checkpoints/*"))
        ended = [machine.end() for machine in self.start(case, dict(resume=True), second)]
        right = all(
            status != 0 and words in said and MACHINES[0] in said and MACHINES[1] in said
            for status, said in ended
        ) and before == sorted(self.work.glob("disks/*/checkpoints/*"))
        lines = [line for line in ended[0][1].splitlines() if words in line]
        self.say(case, right, lines[-1].strip()[:230] if lines else "not refused", started)

    def broken(self, case: str, act: Callable[[list[Machine]], None], most: float) -> None:
        """A run that is hit after its second checkpoint: both sides must say so and end."""
        started = time.monotonic()
        machines = self.start(case, {}, {})
        while not (self.disk(0) / "checkpoints/checkpoint-4/trainer_state.json").is_file():
            if machines[0].process.poll() is not None or time.monotonic() - started > 300:
                self.say(case, False, "no second checkpoint", started)
                return
            time.sleep(0.01)
        act(machines)
        hit = time.monotonic()
        ended = [machine.end(most + 60) for machine in machines]
        took = time.monotonic() - hit
        words = "Another process is lost"
        said = [words in said or status == -signal.SIGKILL for status, said in ended]
        right = words in ended[0][1] and took < most and all(status for status, _ in ended)
        self.say(case, right, f"{sum(said)} of 2 say so, both ended after {took:.0f} s", started)


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("work", type=Path)
    work = parser.parse_args().work.resolve()
    shutil.rmtree(work, ignore_errors=True)
    work.mkdir(parents=True)
    torch.set_num_threads(1)
    bench = Bench(work)
    alone = script(work / "one.py", **bench.shared | dict(output_dir=str(work / "one")))
    environment = os.environ | dict(OMP_NUM_THREADS="1", HF_HUB_OFFLINE="1")
    subprocess.run(
        [sys.executable, alone], env=environment, cwd=ROOT, check=True, capture_output=True
    )
    with network():
        started = time.monotonic()
        ended = [machine.end() for machine in bench.start("first", {}, {})]
        bench.equal("first run", started, ended)
        # the adapter of one's own run would hide what the next cases do
        shutil.rmtree(work / "disks")

        def kill(machines: list[Machine]) -> None:
            os.kill(machines[1].worker(), signal.SIGKILL)

        bench.broken("killed worker", kill, 30)
        for case, words, second in (
            ("other seed", "seed is", dict(seed=1)),
            ("other rate", "learning_rate is", dict(learning_rate=2e-3)),
            ("other rows", "rows is", dict(train_csv=str(work / "others.csv"))),
        ):
            bench.refused(case, words, **second)
        shutil.rmtree(bench.disk(1))  # the second machine comes back with an empty disk
        started = time.monotonic()
        ended = [machine.end() for machine in bench.start("resumed", dict(resume=True), {})]
        if (
            "going on from" not in ended[0][1]
            or "is a copy of that on machine-a" not in ended[1][1]
        ):
            bench.say("resume", False, "began again, or the empty disk got no checkpoint", started)
        bench.equal("resume, one disk empty", started, ended)
        shutil.rmtree(work / "disks")
        bench.broken(
            "vanished link",
            lambda _: ip("-n", MACHINES[1], "link", "set", "cable", "down"),
            LIMIT + 30,
        )
    return 1 if bench.wrong else 0


if __name__ == "__main__":
    sys.exit(main())
