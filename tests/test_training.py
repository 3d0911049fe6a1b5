"""Training by its effects: what moves, what does not, what stops, what a kill loses."""

import os
import signal
import subprocess
import sys
import time

import pandas as pd
import pytest
import torch
from conftest import NASTY, ROOT, TINY
from hypothesis import given, settings
from hypothesis import strategies as st

from prompt_recovery import generation, model, training
from prompt_recovery.tokenizer import load_tokenizer
from prompt_recovery.training import IGNORED, TrainingError, collate

OPTIONS = dict(max_tokens=320, style="plain", system_placement="user")
FAST = dict(learning_rate=5e-3, batch_size=8, gradient_accumulation=1)


def demo_rows(n):
    return pd.read_csv(ROOT / "demo" / "rows.csv", dtype=str).head(n)


def build(pad="<pad>", dropout=0.0):
    torch.manual_seed(0)
    tok = load_tokenizer(TINY, pad=pad)
    base = model.load_base(TINY)
    model.resize_input_embeddings(base, len(tok))
    return tok, model.add_lora(base, base="tiny-mixtral", dropout=dropout, seed=0)


def lora_state(lora):
    return {name: p.detach().clone() for name, p in lora.named_parameters() if "lora" in name}


def test_labels_are_the_answer_and_eos_even_where_the_pad_id_stands_in_it():
    examples = [
        {"input_ids": [1, 7, 0, 2], "labels": [IGNORED, IGNORED, 0, 2]},
        {"input_ids": [1, 2], "labels": [IGNORED, 2]},
    ]
    batch = collate(examples, pad_id=0)
    assert batch["input_ids"].tolist() == [[1, 7, 0, 2], [1, 2, 0, 0]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1, 1], [1, 1, 0, 0]]
    assert batch["labels"].tolist() == [[IGNORED, IGNORED, 0, 2], [IGNORED, 2, IGNORED, IGNORED]]


@settings(max_examples=100, deadline=None)
@given(st.lists(st.tuples(st.integers(1, 30), st.integers(1, 9)), min_size=1, max_size=6), st.integers(0, 9))
def test_collator_never_supervises_padding_or_prompt(sizes, pad_id):
    examples = [{"input_ids": [5] * (p + a), "labels": [IGNORED] * p + [5] * a} for p, a in sizes]
    batch = collate(examples, pad_id)
    assert [(row != IGNORED).nonzero().flatten().tolist() for row in batch["labels"]] == [
        list(range(p, p + a)) for p, a in sizes
    ]
    assert batch["attention_mask"].sum(1).tolist() == [p + a for p, a in sizes]


def test_rows_without_a_supervised_end_are_refused():
    with pytest.raises(TrainingError, match="positions \\[1\\]"):
        training.check_supervised(
            [{"input_ids": [1, 2], "labels": [IGNORED, 2]}, {"input_ids": [1, 5], "labels": [IGNORED] * 2}], 2
        )
    with pytest.raises(TrainingError, match="no rows"):
        training.check_supervised([], 2)


def test_nasty_rows_keep_answer_and_eos():
    tok = load_tokenizer(TINY)
    rows = pd.DataFrame(
        {"original_text": NASTY, "rewritten_text": NASTY[::-1], "rewrite_prompt": [t[:200] for t in NASTY]}
    )
    for example, prompt in zip(
        training.make_examples(tok, rows, **OPTIONS | dict(max_tokens=900)), rows["rewrite_prompt"], strict=True
    ):
        assert tok.decode([i for i in example["labels"] if i != IGNORED]) == prompt.strip() + "</s>"


def test_adapter_moves_in_fp32_and_the_base_does_not(tmp_path):
    tok, lora = build(dropout=0.1)
    before = {name: p.detach().clone() for name, p in lora.named_parameters()}
    examples = training.make_examples(tok, demo_rows(24), **OPTIONS)
    log = training.train(lora, tok, examples, [], tmp_path, max_steps=3, **FAST)
    moved = {name for name, p in lora.named_parameters() if not torch.equal(p, before[name])}
    assert moved == {name for name in before if "lora" in name}
    assert {p.dtype for name, p in lora.named_parameters() if "lora" in name} == {torch.float32}
    assert log["loss"].notna().all() and len(log) == 3
    assert not lora.training  # dropout is off afterwards


def test_pad_token_and_unk_give_the_same_losses_and_adapter(tmp_path):
    results = {}
    for pad in ("<pad>", "unk"):
        tok, lora = build(pad)
        examples = training.make_examples(tok, demo_rows(20), **OPTIONS)
        log = training.train(lora, tok, examples, examples[:4], tmp_path / pad.strip("<>"), max_steps=4, **FAST)
        results[pad] = (log, lora_state(lora))
    (log, state), (other_log, other) = results.values()
    pd.testing.assert_frame_equal(log, other_log, atol=1e-5)
    assert all(torch.allclose(state[name], other[name], atol=1e-5) for name in state)


def test_masking_by_id_with_pad_eos_never_stops_and_ours_does(tmp_path):
    """facts.md 9, both ways in one place: only the labels differ."""
    stopped = {}
    rows = demo_rows(16).assign(rewrite_prompt="Make it rhyme.")
    for way in ("by position", "by id, pad = eos"):
        tok, lora = build()
        examples = training.make_examples(tok, rows, **OPTIONS)
        if way != "by position":  # what a collator with pad = eos does: mask every label that equals the pad id
            examples = [e | {"labels": [IGNORED if i == 2 else i for i in e["labels"]]} for e in examples]
            with pytest.raises(TrainingError, match="never learn to stop"):
                training.check_supervised(examples, 2)
        optimizer = torch.optim.AdamW([p for p in lora.parameters() if p.requires_grad], lr=5e-3)
        for _ in range(15):
            batch = collate(examples, 0)
            lora(**batch).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        options = OPTIONS | dict(max_new_tokens=40, fallback_prompt="-", description=None)
        answers = generation.answer_table(lora, tok, rows, **options)
        stopped[way] = (answers["stopped"] == "eos").mean()
    assert stopped == {"by position": 1.0, "by id, pad = eos": 0.0}


RUN = f"""
import sys; sys.path[:0] = [{str(ROOT)!r}, {str(ROOT / "tests")!r}]
from pathlib import Path
from safetensors.torch import save_file
from test_training import FAST, OPTIONS, build, demo_rows, lora_state
from prompt_recovery import training
tok, lora = build(dropout=0.1)
examples = training.make_examples(tok, demo_rows(40), **OPTIONS)
out = Path(sys.argv[1])
training.train(lora, tok, examples[:32], examples[32:], out, max_steps=20, resume=True, patience=99, **FAST)
save_file({{k.replace("default.", ""): v for k, v in lora_state(lora).items()}}, out / "final.safetensors")
"""


def test_killed_and_resumed_equals_uninterrupted(tmp_path):
    from safetensors.torch import load_file

    command = [sys.executable, "-c", RUN]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}  # the sums' order, and so the last bits, depend on the threads
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    subprocess.run([*command, str(whole)], check=True, env=environment, capture_output=True)
    process = subprocess.Popen(
        [*command, str(killed)], env=environment, stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL
    )
    checkpoints = killed / "checkpoints"
    while not list(checkpoints.glob("checkpoint-*/trainer_state.json")):
        assert process.poll() is None, "the run ended before its first checkpoint"
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not (killed / "final.safetensors").exists()
    half = checkpoints / "checkpoint-9999"  # killed while writing: no trainer_state.json yet
    half.mkdir()
    subprocess.run([*command, str(killed)], check=True, env=environment, capture_output=True)
    assert not half.exists()
    expected, found = load_file(whole / "final.safetensors"), load_file(killed / "final.safetensors")
    assert all(torch.equal(expected[name], found[name]) for name in expected)
    log, other = (pd.read_csv(folder / "training_log.csv") for folder in (whole, killed))
    pd.testing.assert_frame_equal(log, other)
    assert log["step"].is_unique and log["step"].max() == 20


def test_checkpoints_of_other_settings_are_refused_and_removed_without_resume(tmp_path):
    tok, lora = build()
    examples = training.make_examples(tok, demo_rows(8), **OPTIONS)
    training.train(lora, tok, examples, [], tmp_path, max_steps=1, **FAST)
    with pytest.raises(TrainingError, match="other rows or settings"):
        training.train(lora, tok, examples[1:], [], tmp_path, max_steps=1, resume=True, **FAST)
    training.train(lora, tok, examples[1:], [], tmp_path, max_steps=2, activation_checkpointing=True, **FAST)
    assert [path.name for path in (tmp_path / "checkpoints").glob("checkpoint-*")] == ["checkpoint-2"] or sorted(
        path.name for path in (tmp_path / "checkpoints").glob("checkpoint-*")
    ) == ["checkpoint-1", "checkpoint-2"]


def test_shown_example_marks_the_supervised_part():
    tok = load_tokenizer(TINY)
    example = training.make_examples(tok, demo_rows(1), **OPTIONS)[0]
    prompt = demo_rows(1)["rewrite_prompt"][0]
    assert training.show_example(tok, example).endswith(f"[/INST]»»»{prompt}</s>«««")
    assert training.answer_length(example) == len(tok(prompt, add_special_tokens=False)["input_ids"]) + 1
