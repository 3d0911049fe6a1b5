"""Processes that train as one: what they must share is compared before the first step, one on each
disk writes, a disk without the checkpoint gets it, and a lost process is named."""

import importlib.metadata
import json
import os
import shutil
import signal
import time

import pandas as pd
import pytest
from conftest import TINY, prepared, table
from forked_machines import machines
from safetensors.torch import load_file
from tiny_training import FAST, SHORT, build, demo_rows, make_examples

from prompt_recovery import agreement, comparison, run_folder, run_lock, training
from prompt_recovery.engine import checkpointing, gathered, group
from prompt_recovery.examples import TrainingError
from prompt_recovery.recipe import Recipe

pytestmark = pytest.mark.usefixtures("told")


def both(words):
    """An error that both machines raise, each of whose names it says."""
    first, second = words
    assert first == second and "alpha (process 0)" in first and "beta (process 1)" in first
    return first


def test_what_differs_is_refused_by_machine_and_setting_before_the_base_is_loaded(tmp_path):
    encoders = tmp_path / "one", tmp_path / "two"
    for each in encoders:
        each.mkdir()
        (each / "config.json").write_text(each.name)
    shared = dict(
        model_dir=TINY, encoder_dir=encoders[0], output_dir=tmp_path / "a", resume=False
    )  # fmt: skip
    rows = table([("a b", "c d", "Make it rhyme."), ("e", "f", "Shorten it.")])
    other_base = tmp_path / "base"
    shutil.copytree(TINY, other_base)
    config = json.loads((other_base / "config.json").read_text())
    (other_base / "config.json").write_text(json.dumps(config | {"rms_norm_eps": 1e-3}))
    cases = [
        ("", dict(output_dir=tmp_path / "b", report_to="tensorboard"), rows),  # a machine's own
        ("seed is 0 on alpha", dict(seed=1), rows),
        ("learning_rate is 2e-05 on alpha", dict(learning_rate=1e-3), rows),
        ("resume is false on alpha", dict(resume=True), rows),
        ("batch_size is 8 on alpha", dict(batch_size=4, gradient_accumulation=4), rows),
        ("encoder is ", dict(encoder_dir=encoders[1]), rows),
        ("base is ", dict(model_dir=other_base), rows),
        ("rows is ", {}, rows.iloc[::-1]),
    ]

    def check(number):
        found = []
        for _, settings, given in cases:
            recipe = Recipe(**shared | (settings if number else {}))
            try:
                training.check_together(recipe, given if number else rows)
                found.append("")
            except TrainingError as error:
                found.append(str(error))
        version = importlib.metadata.version
        importlib.metadata.version = lambda name: (
            f"2.1{number}" if name == "torch" else version(name)
        )
        try:
            training.check_together(Recipe(**shared), rows)
        except TrainingError as error:
            found.append(str(error))
        return found

    first, second = machines(check)
    assert first == second
    for (words, *_), said in zip([*cases, ('torch is "2.10" on alpha',)], first, strict=True):
        assert (words in said and " on beta (process 1)" in said) if words else not said, said


def test_rows_that_cannot_be_shared_are_said_before_anything_is_read():
    def check(number):
        training.check_together(Recipe(model_dir="nowhere", batch_size=7), pd.DataFrame())

    for said in machines(check, names=("a", "b", "c")):
        assert "14 rows can't be shared by 3 processes" in said


def test_one_process_writes_on_each_disk_and_another_run_s_folder_is_refused_everywhere(tmp_path):
    places = ["one", "one"], ["one", "two"]

    def share(number):
        found = []
        for pair in places:
            with run_lock.claimed(tmp_path / pair[number]) as writes:
                found.append(writes)
                gathered(None)
        return found

    assert machines(share) == [[True, True], [False, True]]
    assert not [*tmp_path.rglob(run_lock.LOCK)]

    def taken(number):
        with run_lock.claimed(tmp_path / ["one", "two"][number]):
            pass

    claimed, tells = os.pipe()
    worker = os.fork()
    if worker == 0:  # whose launcher was killed
        try:
            run_lock.claim(tmp_path / "two")
            os.write(tells, b".")
            signal.pause()
        finally:
            os._exit(1)
    os.close(tells)
    try:
        assert os.read(claimed, 1) == b"."
        for said in machines(taken):
            assert f"{tmp_path}/two belongs to a run of process {worker}" in said
    finally:
        os.kill(worker, signal.SIGKILL)
        os.waitpid(worker, 0)


def checkpoint(folder, step, text="", processes=2):
    path = folder / "checkpoints" / f"checkpoint-{step}"
    path.mkdir(parents=True)
    for name in ("adapter_model.safetensors", "optimizer.pt", "scheduler.pt"):
        (path / name).write_text(f"{name} {step} {text}")
    for number in range(processes):
        (path / f"rng_state_{number}.pth").write_text(f"{number}")
    kept = dict(KeepTwo=dict(attributes=dict(processes=processes)))
    state = dict(global_step=step, best_global_step=None, stateful_callbacks=kept, host=str(folder))
    (path / "trainer_state.json").write_text(json.dumps(state))
    return path


def test_a_disk_gets_the_first_machine_s_checkpoint_and_loses_nothing(tmp_path):
    a, b = tmp_path / "a", tmp_path / "b"
    checkpoint(a, 2)
    checkpoint(a, 4)
    (a / "checkpoints/settings.json").write_text("{}")

    def go_on(number):
        last = agreement.same_checkpoint((a, b)[number], writes=True, every=2)
        return last and last.name

    def files(folder):
        return {
            str(path.relative_to(folder)): path.read_text()
            for path in (folder / "checkpoints").rglob("*")
            if path.is_file()
        }

    assert machines(go_on) == ["checkpoint-4"] * 2
    assert files(a) == files(b)
    # paths and times of a machine make no other checkpoint
    (b / "checkpoints/checkpoint-4/trainer_state.json").write_text('{"global_step": 4}')
    assert machines(go_on) == ["checkpoint-4"] * 2 and not (b / "earlier-1").exists()
    # other weights, and one that was written just before a kill, are moved aside
    checkpoint(b, 6, "later")
    assert machines(go_on) == ["checkpoint-4"] * 2
    assert files(a) == files(b)
    assert (b / "earlier-1/checkpoints/checkpoint-6/optimizer.pt").is_file()
    # much later ones, or any where the first machine has none, are not
    checkpoint(b, 8, "later")
    said = both(machines(go_on))
    assert "beta (process 1) has the checkpoint of step 8" in said and "that of step 4" in said
    shutil.rmtree(a)
    shutil.rmtree(b / "checkpoints/checkpoint-8")
    assert "has none. Copy output_dir's folder checkpoints from beta to alpha" in both(
        machines(go_on)
    )
    assert (b / "checkpoints/checkpoint-4/optimizer.pt").is_file()


def test_a_checkpoint_is_whole_with_the_random_state_of_every_process(tmp_path, capsys):
    for count in (1, 2):
        checkpoint(tmp_path, 2 * count, processes=2)
    checkpoints = tmp_path / "checkpoints"
    last = checkpoints / "checkpoint-4"
    assert run_folder.last_checkpoint(checkpoints) == last
    (last / "rng_state_1.pth").rename(last / "notes.txt")
    assert run_folder.last_checkpoint(checkpoints) == checkpoints / "checkpoint-2"
    run_folder.remove_broken(checkpoints)  # nothing was being written there
    assert "checkpoint-4 lacks rng_state_1.pth" in capsys.readouterr().out
    assert (checkpoints / "incomplete-checkpoint-4" / "notes.txt").is_file()


@pytest.mark.parametrize("how", ["killed", "silent"])
def test_a_lost_process_is_named_within_the_time_limit(how):
    def lose(number):
        gathered("here")
        if number == 1 and how == "killed":
            os.kill(os.getpid(), signal.SIGKILL)
        if number == 1:
            time.sleep(5)
            os._exit(0)
        started = time.monotonic()
        try:
            gathered("still here")
        finally:
            assert time.monotonic() - started < 4

    said, nothing = machines(lose, limit=2)
    assert nothing is None
    assert "ProcessLost: Another process is lost (beta (process 1))" in said and "2 s" in said


def test_a_process_that_never_comes_is_waited_for_no_longer(monkeypatch):
    def alone(number):
        os.environ["WORLD_SIZE"] = "2"
        group.processes()

    (said,) = machines(alone, limit=1, names=("alpha",))
    assert "ProcessLost" in said and "1/2 clients" in said
    monkeypatch.setenv(group.TIME_LIMIT, "soon")
    with pytest.raises(ValueError, match="'soon': give seconds"):
        group.processes()


def test_what_raises_in_one_process_ends_all_with_its_words():
    def act(number):
        group.everywhere(lambda: 1 // number)

    first, second = machines(act)
    assert first.startswith("ZeroDivisionError")
    assert second.startswith("ProcessLost: alpha (process 0) can't go on: ZeroDivisionError")


def test_all_processes_take_the_plan_of_the_card_with_the_least_room():
    _, lora = build()
    rooms = [2**32, 2**30 + 2**26]
    expected = [checkpointing.training_plan(lora, 300, 20, 16, free=room) for room in rooms]
    assert expected[0] != expected[1]  # else this proves nothing

    def plan(number):
        checkpointing.free_on = lambda base, device: rooms[number]
        return str(checkpointing.training_plan(lora, 300, 20, 16))

    assert machines(plan) == [str(expected[1])] * 2


def test_a_comparison_and_a_submission_run_as_one_process(tmp_path, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("LOCAL_RANK", "1")
    rows = table([("a b", "c d", "Make it rhyme.")])
    with pytest.raises(agreement.SeveralProcesses, match="one script a card.*own submission_csv"):
        prepared(rows, tmp_path / "submission.csv", model_dir=TINY)
    with pytest.raises(agreement.SeveralProcesses, match="2 were launched .*its own output_dir"):
        comparison.read_split([], tmp_path / "rows.csv", 0.1, 0, tmp_path)
    assert not [*tmp_path.iterdir()]


def test_only_the_first_process_of_a_machine_writes(tmp_path):
    tok, lora = build()
    examples = make_examples(tok, demo_rows(4), **SHORT)

    def go(number):
        os.environ["LOCAL_RANK"] = str(number)  # two processes of one machine
        folder = tmp_path / ("first", "second")[number]
        recipe = Recipe(output_dir=folder, **FAST | dict(batch_size=2, max_steps=1))
        return list(training.train(lora, tok, examples, [], recipe)["step"])

    assert machines(go, names=("alpha", "alpha")) == [[1], [1]]
    names = {path.name for path in (tmp_path / "first/checkpoints/checkpoint-1").iterdir()}
    assert {"adapter_model.safetensors", "rng_state_0.pth", "rng_state_1.pth"} < names
    assert not (tmp_path / "second").exists()


def test_a_worker_killed_on_one_machine_and_all_gone_on_with_equals_one_process(tmp_path):
    """Two machines with a disk each; the second one comes back with an empty one."""
    tok, lora = build()
    examples = make_examples(tok, demo_rows(14), **SHORT)
    options = FAST | dict(batch_size=2, gradient_accumulation=2, max_steps=6, evaluations=3)

    def go(folder, model, **more):
        recipe = Recipe(output_dir=folder, **options | more)
        return training.train(model, tok, examples[:11], examples[11:], recipe)

    log = go(tmp_path / "one", lora)
    _, lora = build()  # the same again
    half = tmp_path / "alpha/checkpoints/checkpoint-4"

    def killed(number):
        lora.get_base_model().register_forward_pre_hook(
            lambda *_: (
                os.kill(os.getpid(), signal.SIGKILL)
                if number and (half / "trainer_state.json").is_file()
                else None
            )
        )
        go(tmp_path / ("alpha", "beta")[number], lora)

    said, nothing = machines(killed)
    assert nothing is None
    assert "lost (beta (process 1))" in said
    assert {f"rng_state_{n}.pth" for n in (0, 1)} < {path.name for path in half.iterdir()}
    shutil.rmtree(tmp_path / "beta")

    def resumed(number):
        return list(go(tmp_path / ("alpha", "beta")[number], lora, resume=True)["step"])

    steps = log["step"].to_list()
    assert machines(resumed) == [steps, steps]
    expected = load_file(tmp_path / "one/checkpoints/checkpoint-6/adapter_model.safetensors")
    for name in ("alpha", "beta"):
        last = tmp_path / name / "checkpoints/checkpoint-6"
        assert run_folder.last_checkpoint(last.parent) == last
        found = load_file(last / "adapter_model.safetensors")
        assert max((found[key] - expected[key]).abs().max() for key in expected) < 1e-5
    other = pd.read_csv(tmp_path / "alpha/training_log.csv")
    pd.testing.assert_frame_equal(log, other, rtol=1e-4)
    assert not (tmp_path / "beta/training_log.csv").exists()
