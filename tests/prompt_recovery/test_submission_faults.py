"""The run is killed (SIGKILL) at random points and started again; the result is that of a run that
nobody disturbed.

The test starts this file as a program, which loads the model once and forks a child for each start
of the run. With more kills than the test has time for, in a folder of its own
(with PYTHONPATH=.:tests):

    python tests/prompt_recovery/test_submission_faults.py FOLDER "two stages" 300
"""

import contextlib
import faulthandler
import gc
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pandas as pd
import pytest
import tiny_submission
from conftest import ROOT, TINY, answer_test
from tqdm import tqdm

from prompt_recovery import adapter, data, inputs, submission_file
from prompt_recovery.engine import generation
from prompt_recovery.engine.planning import AnswerPlan
from prompt_recovery.recipe import Format

PATH = os.pathsep.join([str(ROOT), str(ROOT / "tests")])
KILLS = {
    "one answer": 110,
    "two stages": 24,
    "several answers": 12,
    "two adapters": 12,
}  # of the test, by case
ROWS = 16
OPTIONS = tiny_submission.OPTIONS | dict(
    max_tokens=300, max_new_tokens=3, batch_tokens=500, slice_rows=6, write_seconds=0
)


SETTINGS = {
    "several answers": dict(
        answers_per_row=3, combine="join", mean_prompt="Improve it.", seed=7, max_new_tokens=5
    ),
    "two adapters": dict(combine="join", style=None, system_placement=None),
}


@pytest.mark.parametrize("case", KILLS)
def test_kills_leave_no_trace(case, tmp_path):
    """Two stages give the bytes of one."""
    done = subprocess.run(
        [sys.executable, __file__, str(tmp_path), case, str(KILLS[case])],
        cwd=ROOT,
        capture_output=True,
        text=True,
        env=os.environ | dict(OMP_NUM_THREADS="1", TOKENIZERS_PARALLELISM="false", PYTHONPATH=PATH),
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    counts = json.loads(done.stdout.splitlines()[-1])
    assert counts["answered_again"] == 0
    assert counts["kills"] >= KILLS[case] and counts["resumed"] > KILLS[case] / 3
    if case == "one answer":
        # kills met every kind of moment, and restarts went on from the journal
        assert min(counts["moments"].values()) >= 3 and len(counts["moments"]) == 8
        assert counts["runs"] >= 10


# --- the program ----------------------------------------------------------------------------------


def armed(rng):
    """In a child: die before, within or after one of the next writes, syncs or renames."""
    real = {name: getattr(os, name) for name in ("write", "fsync", "replace")}
    left = [rng.randrange(1, 25)]

    def wrap(name):
        def call(*args, **kwargs):
            left[0] -= 1
            if left[0] > 0:
                return real[name](*args, **kwargs)
            moment = rng.choice(
                ["before", "after", "within"] if name == "write" else ["before", "after"]
            )
            if moment == "within":
                real["write"](args[0], args[1][: rng.randrange(len(args[1]))])
            elif moment == "after":
                real[name](*args, **kwargs)
            real["write"](2, f"MOMENT {name} {moment}\n".encode())
            os.kill(os.getpid(), signal.SIGKILL)

        return call

    for name in real:
        setattr(os, name, wrap(name))


def start(folder, model, tokenizer, test, rng, kill, options):
    """Run in a forked child; whether it ended by itself. kill: die at a hook, or by the parent
    after a random while."""
    log = os.open(folder / "log", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    at_hook = kill and rng.random() < 0.7
    pid = os.fork()
    if pid == 0:
        os.dup2(log, 1)
        os.dup2(log, 2)
        # a run takes two seconds; one that hangs fails and says where
        faulthandler.dump_traceback_later(120, exit=True)
        if at_hook:
            armed(rng)
        answer_test(model, tokenizer, test, folder / "s.csv", **options)
        os._exit(0)
    os.close(log)
    if kill and not at_hook:
        time.sleep(rng.random() * 0.2)
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    assert status in (0, -signal.SIGKILL), (folder / "log").read_text()
    return status == 0


def check_at_rest(folder, test, final):
    """After a kill: the file, once there, is whole; its answers are the final ones or the
    fallback."""
    if not (folder / "s.csv").exists():
        return 0
    submission_file.check_submission(test, folder / "s.csv")
    answers = pd.read_csv(folder / "s.csv", dtype=str, keep_default_na=False)["rewrite_prompt"]
    assert all(
        answer in (right, "Fall, back") or right.startswith(answer)
        for answer, right in zip(answers, final, strict=True)
    )
    return sum(answer != "Fall, back" for answer in answers)


def make_adapter(folder, placement):
    """An adapter that was moved at random."""
    import torch

    lora = adapter.add_lora(inputs.load(TINY, None)[0], base="tiny", r=4, seed=len(placement))
    for name, weight in lora.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(weight, 0, 0.03)
    return adapter.save_adapter(lora, folder / placement, Format(system_placement=placement))


def main(folder, case, kills):
    import torch

    options = OPTIONS | SETTINGS.get(case, {})
    torch.set_num_threads(1)  # a fork does not take a pool of threads along
    # tqdm's own lock is shared by all forks: one that dies holding it stops the others. Set before
    # the first bar, since a class of bars that has made its own lock keeps it.
    tqdm.set_lock(threading.RLock())
    tqdm.monitor_interval = 0  # a thread that may hold the lock while the parent forks
    test = data.read_test(ROOT / "demo" / "test.csv").head(ROWS)
    test["id"] = [f"00{n}" if n % 2 else f"-{n}" for n in range(ROWS)]
    model, tokenizer = inputs.load(TINY, None)
    if case == "two adapters":
        options["adapter_dir"] = [make_adapter(folder, place) for place in ("user", "before")]
    rng = random.Random(0)
    calm = folder / "calm"
    calm.mkdir()
    gc.freeze()  # else each child copies what its first collection touches
    assert start(calm, model, tokenizer, test, rng, False, options)
    expected = (calm / "s.csv").read_bytes()
    final = pd.read_csv(calm / "s.csv", dtype=str)["rewrite_prompt"].to_list()
    assert len(set(final)) > ROWS / 2 and "Fall, back" not in final
    if case == "two stages":
        generation.plan_of = lambda model: AnswerPlan((2, 3), True, 64, 500)
    counts = dict(kills=0, runs=0, resumed=0, answered_again=0, moments={})
    while counts["kills"] < kills:
        work = folder / str(counts["runs"])
        work.mkdir()
        answered = 0
        while True:
            over = start(work, model, tokenizer, test, rng, counts["kills"] < kills, options)
            said = (work / "log").read_text()
            counts["resumed"] += " stand in " in said
            now = check_at_rest(work, test, final)
            assert now >= answered, "answers were lost"
            answered = now
            if over:
                break
            counts["kills"] += 1
            moment = re.search(r"MOMENT (.*)", said)
            moment = moment[1] if moment else "any"
            counts["moments"][moment] = counts["moments"].get(moment, 0) + 1
        counts["runs"] += 1
        assert (work / "s.csv").read_bytes() == expected
        (journal,) = work.glob("*.journal")
        rows = []
        for line in journal.read_bytes().split(b"\n"):
            with contextlib.suppress(ValueError):
                entry = json.loads(line)
                rows += [(entry["adapter"], position) for position, _ in entry["rows"]]
        assert {position for _, position in rows} == set(range(ROWS))
        assert len(set(rows)) == ROWS * len(options.get("adapter_dir", "1"))
        counts["answered_again"] += len(rows) - len(set(rows))
        shutil.rmtree(work)
    print(json.dumps(counts))


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2], int(sys.argv[3]))
