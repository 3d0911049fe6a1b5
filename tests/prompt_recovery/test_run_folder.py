"""A run's folder: one owner, nothing of an earlier run taken for this one's, no file of a user's
removed."""

import errno
import json
import os
import shutil
import socket
import subprocess
import sys
import time

import pytest
import torch
from conftest import ROOT
from tiny_training import FAST, SHORT, build, demo_rows, lora_state, make_examples

from prompt_recovery import run_folder, run_lock, training
from prompt_recovery.examples import TrainingError
from prompt_recovery.files import sha256
from prompt_recovery.recipe import Recipe

OWNER = f"""
import sys, time; sys.path[:0] = [{str(ROOT)!r}]
from prompt_recovery import run_lock
run_lock.claim(sys.argv[1])
print("claimed", flush=True)
time.sleep(60)
"""


def run(folder, tok, lora, examples, **options):
    recipe = Recipe(output_dir=folder, **FAST | dict(batch_size=2) | options)
    return training.train(lora, tok, examples[:4], examples[4:], recipe)


def steps(folder):
    return sorted(
        run_folder.step_of(path) for path in (folder / "checkpoints").glob("checkpoint-*[0-9]")
    )


def test_a_second_run_is_refused_by_name_and_a_dead_one_s_lock_is_taken_over(tmp_path, capsys):
    owner = subprocess.Popen(
        [sys.executable, "-c", OWNER, str(tmp_path)], stdout=subprocess.PIPE, text=True
    )
    assert owner.stdout.readline() == "claimed\n"
    try:
        name = rf"process {owner.pid} on {socket.gethostname()} since 20"
        with pytest.raises(TrainingError, match=name):
            run_lock.claim(tmp_path)
        tok, lora = build()
        examples = make_examples(tok, demo_rows(6), **SHORT)
        with pytest.raises(TrainingError, match=name):
            run(tmp_path, tok, lora, examples, max_steps=1)
        assert [path.name for path in tmp_path.iterdir()] == [run_lock.LOCK]
    finally:
        owner.kill()
        owner.wait()
    run_lock.claim(tmp_path)
    assert f"took over the lock that process {owner.pid} on" in capsys.readouterr().out
    run_lock.claim(tmp_path)  # a notebook's cell run twice
    run(tmp_path, tok, lora, examples, max_steps=1)
    assert (
        json.loads((tmp_path / run_lock.LOCK).read_text())["process"] == os.getpid()
    )  # train gives back what it took
    run_lock.release(tmp_path)
    assert not (tmp_path / run_lock.LOCK).exists()


def test_another_host_s_lock_counts_while_it_is_touched(tmp_path, monkeypatch):
    monkeypatch.setattr(run_lock, "BEAT", 0.05)
    lock = tmp_path / run_lock.LOCK
    lock.write_text(json.dumps(dict(process=1, host="elsewhere", since="2026-11-26 10:00:00")))
    with pytest.raises(
        TrainingError, match="process 1 on elsewhere since 2026-11-26 10:00:00.*remove"
    ):
        run_lock.claim(tmp_path)
    os.utime(lock, (time.time() - run_lock.STALE - 1,) * 2)
    run_lock.claim(tmp_path)
    os.utime(lock, (1, 1))
    deadline = time.monotonic() + 5
    while lock.stat().st_mtime == 1 and time.monotonic() < deadline:
        time.sleep(0.02)
    assert lock.stat().st_mtime > 1
    run_lock.release(tmp_path)


def test_on_a_drive_without_locks_a_touched_lock_counts_and_an_old_one_does_not(
    tmp_path, monkeypatch, capsys
):
    """There the second run took over the first one's lock, being on the same host."""

    def unsupported(*_):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(run_lock.fcntl, "flock", unsupported)
    lock = tmp_path / run_lock.LOCK
    lock.write_text(json.dumps(dict(process=1, host=socket.gethostname(), since="2026-11-26")))
    with pytest.raises(TrainingError, match="belongs to a run of process 1"):
        run_lock.claim(tmp_path)
    os.utime(lock, (time.time() - run_lock.STALE - 1,) * 2)
    run_lock.claim(tmp_path)
    assert "took over the lock that process 1 on" in capsys.readouterr().out
    run_lock.release(tmp_path)


def test_a_checkpoint_cut_short_or_without_settings_is_named_and_the_one_before_goes_on(
    tmp_path, capsys
):
    tok, lora = build()
    examples = make_examples(tok, demo_rows(6), **SHORT)
    options = dict(max_steps=4, evaluations=4, patience=9, learning_rate=1e-3)
    run(tmp_path, tok, lora, examples, **options)
    whole, checkpoints = lora_state(lora), tmp_path / "checkpoints"
    for name in ("optimizer.pt", "rng_state.pth", "adapter_model.safetensors"):
        path = checkpoints / "checkpoint-4" / name
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
        _, lora = build()
        run(tmp_path, tok, lora, examples, resume=True, **options)
        said = capsys.readouterr().out
        assert f"checkpoint-4 lacks {name}, or the end of it" in said
        assert "going on from" in said and "checkpoint-3" in said
        assert all(torch.equal(value, whole[key]) for key, value in lora_state(lora).items())
    # three times, each beside those before
    assert len(list(checkpoints.glob("incomplete-checkpoint-4*"))) == 3
    for text in ("", "[]"):
        (checkpoints / "settings.json").write_text(text)
        with pytest.raises(TrainingError, match="settings.json does not say with which settings"):
            run(tmp_path, tok, lora, examples, resume=True, **options)


def test_what_an_earlier_run_left_is_moved_aside_and_goes_on_there(tmp_path, capsys):
    tok, lora = build()
    examples = make_examples(tok, demo_rows(6), **SHORT)
    run(tmp_path, tok, lora, examples, max_steps=2)
    for name in ("evaluation.json", "mine.txt"):
        (tmp_path / name).write_text("{}")
    run_folder.begin(tmp_path, resume=False)
    said = capsys.readouterr().out
    aside = tmp_path / "earlier-1"
    assert (
        f"moved to {aside}: checkpoints, evaluation.json, training_log.csv" in said
        and "step 2" in said
    )
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "earlier-1",
        "mine.txt",
        run_lock.LOCK,
    ]
    run_lock.release(tmp_path)
    run_folder.begin(tmp_path, resume=False)  # nothing to move, nothing said
    assert "moved" not in capsys.readouterr().out and not (tmp_path / "earlier-2").exists()
    run_lock.release(tmp_path)
    _, again = build()
    log = run(aside, tok, again, examples, max_steps=2, resume=True)
    assert log["step"].max() == 2 and "all 2 steps done" in capsys.readouterr().out


def test_checkpoints_rotate_by_step_whatever_the_times_of_their_files(tmp_path):
    """Unpacked with times in the future, the old ones stayed and each new one went as it was
    written."""
    tok, lora = build()
    examples = make_examples(tok, demo_rows(6), **SHORT)
    options = dict(max_steps=6, evaluations=6, patience=9, learning_rate=1e-3)
    run(tmp_path, tok, lora, examples, **options)
    assert steps(tmp_path)[-1] == 6 and len(steps(tmp_path)) == 2
    # as after a kill at step 3, on a machine whose clock was ahead
    whole = tmp_path / "checkpoints"
    _, lora = build()
    killed = tmp_path / "killed"
    run(killed, tok, lora, examples, **options | dict(max_steps=6))
    shutil.rmtree(killed / "checkpoints" / "checkpoint-6")
    future = time.time() + 1e6
    for path in (killed / "checkpoints").rglob("*"):
        os.utime(path, (future, future))
    _, lora = build()
    log = run(killed, tok, lora, examples, resume=True, **options)
    assert log["step"].max() == 6 and steps(killed) == steps(tmp_path)
    assert sha256(killed / "checkpoints/checkpoint-6/adapter_model.safetensors") == sha256(
        whole / "checkpoint-6/adapter_model.safetensors"
    )


def test_only_what_a_run_wrote_is_removed(tmp_path):
    checkpoints = tmp_path / "checkpoints"
    tok, lora = build()
    examples = make_examples(tok, demo_rows(6), **SHORT)
    run(tmp_path, tok, lora, examples, max_steps=1)
    (checkpoints / "checkpoint-best").mkdir()
    (checkpoints / "checkpoint-best" / "adapter_model.safetensors").touch()
    (checkpoints / "checkpoint-8.zip").touch()
    (checkpoints / "checkpoint-0").mkdir()
    (checkpoints / "checkpoint-0" / "notes.txt").touch()
    # killed while they were written
    for half, text in (("checkpoint-7", ""), ("checkpoint-9", '{"global_step"')):
        (checkpoints / half).mkdir()
        (checkpoints / half / "adapter_model.safetensors").touch()
        (checkpoints / half / "trainer_state.json").write_text(text)
    outside = tmp_path / "elsewhere"
    outside.mkdir()
    (checkpoints / "checkpoint-3").symlink_to(outside)
    _, lora = build()
    run(tmp_path, tok, lora, examples, max_steps=1, resume=True)
    assert sorted(path.name for path in checkpoints.iterdir()) == [
        "checkpoint-0",
        "checkpoint-1",
        "checkpoint-3",
        "checkpoint-8.zip",
        "checkpoint-best",
        "settings.json",
    ]
    assert outside.is_dir()


def test_a_resumed_run_names_the_setting_that_differs_and_takes_the_same_step_in_other_parts(
    tmp_path,
):
    tok, lora = build()
    examples = make_examples(tok, demo_rows(12), **SHORT)
    train, held = examples[:8], examples[8:]

    def next_score(options):
        return iter([0.4] if options.get("resume") else [0.1, 0.2, 0.3, 0.4]).__next__

    def go(folder, scored_with=None, **options):
        _, lora = build()
        recipe = Recipe(
            output_dir=tmp_path / folder,
            **FAST | dict(max_steps=4, patience=9, evaluations=4) | options,
        )
        training.train(
            lora, tok, train, held, recipe, scored_with=scored_with, score=next_score(options)
        )
        return lora_state(lora)

    encoder = dict(encoder="aaaa", max_new_tokens=9)
    whole = go("whole", encoder, batch_size=2, gradient_accumulation=4)
    shutil.copytree(tmp_path / "whole", tmp_path / "killed")
    shutil.rmtree(tmp_path / "killed/checkpoints/checkpoint-4")
    for changed, scored_with in [
        ({"learning_rate": 1e-3}, encoder),
        ({"four_bit": True}, encoder),
        ({"batch_size": 3}, encoder),
        ({}, encoder | {"encoder": "bbbb"}),
        ({}, encoder | {"max_new_tokens": 10}),
    ]:
        name = next(iter(changed), None) or next(k for k in encoder if scored_with[k] != encoder[k])
        options = dict(batch_size=2, gradient_accumulation=4, resume=True) | changed
        with pytest.raises(
            TrainingError,
            match=f"settings: {name.replace('batch_size', 'rows_a_step')} was .*, now ",
        ):
            go("killed", scored_with, **options)
    other = go("killed", encoder, batch_size=4, gradient_accumulation=2, resume=True)
    assert all((value - other[name]).abs().max() < 1e-4 for name, value in whole.items())
    last = tmp_path / "killed/checkpoints/checkpoint-4/trainer_state.json"
    last.write_text(json.dumps(json.loads(last.read_text()) | {"best_global_step": 33}))
    with pytest.raises(TrainingError, match="checkpoint-33, is no longer in"):
        go("killed", encoder, batch_size=4, gradient_accumulation=2, resume=True)
