"""A training that ends before its time is over: what is kept, and that a later run goes on as if it
had not ended."""

import shutil
import time

import pytest
import torch
from forked_machines import machines
from safetensors.torch import load_file
from tiny_training import FAST, SHORT, build, demo_rows, lora_state, make_examples

from prompt_recovery import callbacks, run_folder, run_lock, training
from prompt_recovery.recipe import Recipe
from prompt_recovery.time_budget import REST, SAFETY_FACTOR, TrainingTime, must_end

pytestmark = pytest.mark.usefixtures("told")


@pytest.mark.parametrize(
    ("left", "evaluation", "evaluations", "end"),
    [
        (SAFETY_FACTOR * (REST + 100 + 10 + 30) + 1, 30.0, 1, False),
        (SAFETY_FACTOR * (REST + 100 + 10 + 30) - 1, 30.0, 1, True),
        (SAFETY_FACTOR * (REST + 100 + 10 + 60) - 1, 30.0, 2, True),
        (SAFETY_FACTOR * (REST + 100 + 10 + 100) - 1, 0.0, 1, True),  # none was measured yet
        (SAFETY_FACTOR * (REST + 100 + 10 + 100) + 1, 0.0, 1, False),
        (-5.0, 30.0, 1, True),
    ],
)
def test_an_end_is_due_when_one_more_step_would_leave_too_little(
    left, evaluation, evaluations, end
):
    allowed = TrainingTime(ends_at=1000.0 + left, answering=100.0)
    assert must_end(allowed, 1000.0, 10.0, evaluation, evaluations) is end


@pytest.fixture
def ends_after(monkeypatch):
    """Let time be over at that step of a run."""

    def at(step):
        calls = []
        monkeypatch.setattr(
            callbacks, "must_end", lambda *a, **k: calls.append(1) or len(calls) >= step
        )

    return at


NEVER = TrainingTime(float("inf"), 0.0)


def go(folder, allowed=NEVER, scores=None, **options):
    tok, lora = build(dropout=0.1)  # its random numbers must go on, too
    examples = make_examples(tok, demo_rows(16), **SHORT)
    options = FAST | dict(batch_size=2, max_steps=8, evaluations=2, patience=9) | options
    recipe = Recipe(output_dir=folder, **options)
    torch.manual_seed(int(time.time_ns()) % 2**31)  # nothing may rest on what was drawn before
    score = scores and iter(scores).__next__
    sides = examples[:12], examples[12:]
    log = training.train(lora, tok, *sides, recipe, score=score, allowed=allowed)
    return log, lora_state(lora)


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    return go(tmp_path_factory.mktemp("whole"), allowed=None)


@pytest.mark.parametrize("step", [1, 3, 4, 6, 7])
def test_a_run_that_ended_in_time_goes_on_as_if_it_had_not(
    tmp_path, undisturbed, step, ends_after, capsys
):
    """Evaluations are due at steps 4 and 8."""
    whole, expected = undisturbed
    ends_after(step)
    log, _ = go(tmp_path / "parts")
    said = log.attrs["ended"]
    assert f"ENDED IN TIME at step {step} of 8" in said and said in capsys.readouterr().out
    assert (tmp_path / "parts" / "checkpoints" / f"checkpoint-{step}").is_dir()
    assert log["step"].max() == step
    ends_after(99)
    log, state = go(tmp_path / "parts", resume=True)
    assert log.attrs["ended"] == whole.attrs["ended"]
    assert all(torch.equal(state[name], value) for name, value in expected.items())
    by_step = log.set_index("step").loc[whole["step"]]
    assert by_step["eval_loss"].to_list() == pytest.approx(
        whole["eval_loss"].to_list(), nan_ok=True
    )


def test_several_sessions_make_one_run(tmp_path, undisturbed, ends_after):
    _, expected = undisturbed
    for session in range(2):
        ends_after(3)
        log, _ = go(tmp_path / "parts", resume=session > 0)
        assert log["step"].max() == 3 * (session + 1)
    ends_after(3)
    log, state = go(tmp_path / "parts", resume=True)
    assert log["step"].max() == 8 and "all 8 steps done" in log.attrs["ended"]
    assert all(torch.equal(state[name], value) for name, value in expected.items())


def test_the_last_step_is_kept_where_it_is_the_best(tmp_path, ends_after):
    """It is evaluated behind its checkpoint; before the first evaluation it is all there is."""
    for step, worse in ((6, False), (6, True), (2, False)):
        folder = tmp_path / f"{step}-{worse}"
        ends_after(step)
        log, state = go(folder, scores=[0.5, 0.1 if worse else 0.9])
        at = log.set_index("step")["eval_scs"].dropna()
        kept = log.attrs["ended"].split(",")[0].split(";")[0]
        if step == 2:
            assert at.empty and kept == "kept: step 2"
        else:
            assert at.index.to_list() == [4, 6] and (at[6] < at[4]) == worse
            assert kept == f"kept: step {4 if worse else 6}"
        number = kept.rpartition(" ")[2]
        held = load_file(folder / f"checkpoints/checkpoint-{number}/adapter_model.safetensors")
        for name, value in state.items():
            assert torch.equal(value, held[name.replace(".default", "")])


def test_the_best_of_an_earlier_session_is_kept_where_none_is_better(tmp_path, ends_after):
    """In another folder, as a session goes on from a copy of the first one's output."""
    ends_after(6)
    go(tmp_path / "first", scores=[0.9, 0.1])
    best = load_file(tmp_path / "first/checkpoints/checkpoint-4/adapter_model.safetensors")
    run_folder.begin(tmp_path / "second", True, tmp_path / "first")
    shutil.rmtree(tmp_path / "first")
    ends_after(99)
    log, state = go(tmp_path / "second", resume=True, scores=[0.2])
    run_lock.release(tmp_path / "second")
    assert log.attrs["ended"].startswith("kept: step 4, eval_scs 0.9")
    for name, value in state.items():
        assert torch.equal(value, best[name.replace(".default", "")])


def test_patience_that_ends_in_the_same_step_is_said_and_stays(tmp_path, ends_after):
    ends_after(4)
    options = dict(evaluations=4, patience=1, scores=[0.9, 0.1])
    log, state = go(tmp_path / "out", **options)
    assert "STOPPED EARLY at step 4" in log.attrs["ended"]
    again, same = go(tmp_path / "out", resume=True, **options)
    assert again.attrs["ended"] == log.attrs["ended"]
    assert all(torch.equal(state[name], value) for name, value in same.items())


def test_processes_end_at_the_step_at_which_the_first_one_must(tmp_path):
    """Their clocks differ; what one decided alone would leave the other waiting."""

    def act(number):
        allowed = TrainingTime(float("inf") if number else 0.0, 0.0)
        log, _ = go(tmp_path / "both", allowed=allowed, scores=[0.5])
        return [int(log["step"].max()), log.attrs["ended"]]

    first, second = machines(act, names=("alpha", "alpha"))
    assert first == second and first[0] == 1 and "ENDED IN TIME at step 1 of 8" in first[1]


def test_what_was_measured_decides(tmp_path):
    """With time for two steps or so more, on the real clock; the last step ends in time anyway."""
    start = time.monotonic()
    shutil.rmtree(tmp_path / "out", ignore_errors=True)
    allowed = TrainingTime(start + SAFETY_FACTOR * REST + 4.0, answering=0.5)
    log, _ = go(tmp_path / "out", allowed=allowed, max_steps=5000, evaluations=100)
    assert 1 < log["step"].max() < 5000 and "ENDED IN TIME" in log.attrs["ended"]
    assert time.monotonic() - start < 4.0 + 3.0  # the model is built in that time, too
    log, _ = go(tmp_path / "none", allowed=TrainingTime(start - 1, 0.5), max_steps=50)
    assert log["step"].max() == 1  # one step at least, or no session would get on
