"""Training in fp16 with a loss scaler, as on a T4; here on the CPU, whose autocast and scaler are
torch's own."""

import shutil
from types import SimpleNamespace

import pandas as pd
import pytest
import torch
from accelerate.state import AcceleratorState
from tiny_training import FAST, SHORT, build, demo_rows, lora_state, make_examples

from prompt_recovery import training, training_log
from prompt_recovery.examples import TrainingError
from prompt_recovery.recipe import Recipe


@pytest.fixture
def half(monkeypatch):
    """What accelerate does on a GPU without bf16; it makes no scaler on a CPU."""
    plain, ours = training.TrainingArguments, SimpleNamespace(scale=2.0**16, trained=[])

    class Trainer(training.RowTrainer):
        def __init__(self, **options):
            super().__init__(**options)
            assert self.accelerator.mixed_precision == "fp16"
            self.accelerator.native_amp = True
            self.accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=ours.scale)
            ours.trained.append(self)

    AcceleratorState._reset_state()
    monkeypatch.setattr(training, "TrainingArguments", lambda **o: plain(**o | dict(fp16=True)))
    monkeypatch.setattr(training, "RowTrainer", Trainer)
    yield ours
    AcceleratorState._reset_state()


def overflowing(lora, steps):
    """Let the gradients of these steps (counted from 1) be infinite, while the loss is not."""
    calls = []

    def spoil(grad):
        calls.append(1)
        return torch.full_like(grad, float("inf")) if len(calls) in steps else grad

    next(p for n, p in lora.named_parameters() if "lora_B" in n).register_hook(spoil)


def go(folder, spoiled=(), **options):
    tok, lora = build()
    overflowing(lora, spoiled)
    examples = make_examples(tok, demo_rows(16), **SHORT)
    options = FAST | dict(batch_size=2, max_steps=6, evaluations=3, learning_rate=1e-3) | options
    recipe = Recipe(output_dir=folder, **options)
    return training.train(lora, tok, examples[:12], examples[12:], recipe), lora


def moved(lora, start):
    """What the adapter adds to the base, of all layers in one vector."""
    state = lora_state(lora)
    names = [name for name in state if "lora_B" in name]
    change = [state[name] @ state[name.replace("lora_B", "lora_A")] for name in names]
    before = [start[name] @ start[name.replace("lora_B", "lora_A")] for name in names]
    return torch.cat([(a - b).flatten() for a, b in zip(change, before, strict=True)])


def test_fp16_learns_what_fp32_learns_and_the_adapter_stays_in_fp32(tmp_path, request):
    options = dict(max_steps=20, patience=99, learning_rate=5e-3)
    full, lora = go(tmp_path / "full", **options)
    start = lora_state(build()[1])
    expected = moved(lora, start)
    half = request.getfixturevalue("half")
    half.scale = 2.0**8  # with 2**16 a step is left out now and then
    log, lora = go(tmp_path / "half", **options)
    (trained,) = half.trained
    assert {p.dtype for p in trained.model.parameters() if p.requires_grad} == {torch.float32}
    assert not log["skipped_steps"].any() and log.attrs["ended"].endswith("; all 20 steps done")
    assert "not finite" not in log.attrs["ended"]
    assert full["loss"].iloc[-1] < 0.9 * full["loss"].iloc[0]  # else this proves nothing
    assert log["loss"].mean() == pytest.approx(full["loss"].mean(), rel=0.01)
    assert torch.cosine_similarity(moved(lora, start), expected, dim=0) > 0.98


def test_skipped_steps_are_counted_where_they_happened_and_said(tmp_path, half, capsys):
    log, _ = go(tmp_path, spoiled={2, 3, 6})
    assert log["skipped_steps"].to_list() == [0, 1, 1, 0, 0, 1]
    assert log["loss_scale"].to_list() == [2.0**n for n in (16, 15, 14, 14, 14, 13)]
    written = pd.read_csv(tmp_path / "training_log.csv")
    assert written["skipped_steps"].sum() == training_log.skipped_steps(log) == 3
    assert "3 of 6 steps changed nothing" in capsys.readouterr().out


def test_the_last_steps_are_counted_where_the_log_has_no_line_for_them(tmp_path, half):
    log, _ = go(tmp_path, spoiled={11}, max_steps=11, evaluations=1)
    assert log["step"].to_list() == [2, 4, 6, 8, 10, 11] and training_log.skipped_steps(log) == 1


def test_a_skipped_step_changes_no_weight(tmp_path, half):
    _, lora = go(tmp_path, spoiled=set(range(1, 7)))
    before = lora_state(build()[1])
    assert all(torch.equal(value, before[name]) for name, value in lora_state(lora).items())


def test_a_resumed_run_keeps_scale_and_count(tmp_path, half):
    whole, lora = go(tmp_path / "whole", spoiled={1, 3})
    shutil.copytree(tmp_path / "whole", tmp_path / "killed")
    shutil.rmtree(tmp_path / "killed" / "checkpoints" / "checkpoint-6")
    again, resumed = go(tmp_path / "killed", resume=True)
    pd.testing.assert_frame_equal(again, whole)
    assert again["loss_scale"].iloc[-1] == 2.0**14
    states = lora_state(lora), lora_state(resumed)
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])


def test_gradients_that_stay_not_finite_stop_the_run(tmp_path, half):
    with pytest.raises(TrainingError, match=r"gradients of step 21 .*loss scale, which is 0.5 now"):
        go(tmp_path, spoiled=range(5, 99), max_steps=40, evaluations=10, patience=99)
    (trained,) = half.trained
    assert trained.state.global_step == 20


def test_fp32_has_no_such_columns(tmp_path):
    log, _ = go(tmp_path)
    assert "skipped_steps" not in log and training_log.skipped_steps(log) == 0
