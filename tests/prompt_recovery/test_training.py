"""Training by its effects: what moves, what does not, what stops, what a kill loses."""

import os
import signal
import subprocess
import sys
import time
from dataclasses import replace

import pandas as pd
import pytest
import torch
from conftest import NASTY, ROOT, TINY, full_disk
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_training import FAST, OPTIONS, SHORT, build, demo_rows, lora_state, make_examples

from prompt_recovery import adapter, answers, run_folder, trainer, training
from prompt_recovery.engine import loading
from prompt_recovery.examples import (
    IGNORED,
    TrainingError,
    answer_length,
    check_supervised,
    collate,
    show_example,
    usable_examples,
)
from prompt_recovery.recipe import Format, Recipe
from prompt_recovery.settings import SettingError
from prompt_recovery.templates import read_back, render_answer
from prompt_recovery.tokenizer import load_tokenizer


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
@given(
    st.lists(st.tuples(st.integers(1, 30), st.integers(1, 9)), min_size=1, max_size=6),
    st.integers(0, 9),
)
def test_collator_never_supervises_padding_or_prompt(sizes, pad_id):
    examples = [{"input_ids": [5] * (p + a), "labels": [IGNORED] * p + [5] * a} for p, a in sizes]
    batch = collate(examples, pad_id)
    assert [(row != IGNORED).nonzero().flatten().tolist() for row in batch["labels"]] == [
        list(range(p, p + a)) for p, a in sizes
    ]
    assert batch["attention_mask"].sum(1).tolist() == [p + a for p, a in sizes]


def test_rows_without_a_supervised_end_are_refused():
    with pytest.raises(TrainingError, match="positions \\[1\\]"):
        check_supervised(
            [
                {"input_ids": [1, 2], "labels": [IGNORED, 2]},
                {"input_ids": [1, 5], "labels": [IGNORED] * 2},
            ],
            2,
        )
    with pytest.raises(TrainingError, match="no rows"):
        check_supervised([], 2)


def test_nasty_rows_keep_answer_and_eos():
    tok = load_tokenizer(TINY)
    rows = pd.DataFrame(
        {
            "id": [str(n) for n in range(len(NASTY))],
            "original_text": NASTY,
            "rewritten_text": NASTY[::-1],
            "rewrite_prompt": [t[:200] for t in NASTY],
        }
    )
    for example, prompt in zip(
        make_examples(tok, rows, **OPTIONS | dict(max_tokens=900)),
        rows["rewrite_prompt"],
        strict=True,
    ):
        assert tok.decode([i for i in example["labels"] if i != IGNORED]) == prompt.strip() + "</s>"


@pytest.mark.parametrize(
    "prompt", ['"Make it rhyme, please."', "Prompt: write it as a poem", "**Use bold type**"]
)
@pytest.mark.parametrize("style", ["plain", "json"])
def test_prompts_that_look_like_wrapped_ones_are_taught_as_they_are(prompt, style):
    tok = load_tokenizer(TINY)
    rows = demo_rows(1).assign(rewrite_prompt=[prompt])
    (example,) = make_examples(tok, rows, max_tokens=900, format=Format(style=style))
    taught = tok.decode([i for i in example["labels"] if i != IGNORED]).removesuffix("</s>")
    assert taught == render_answer(prompt, style)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_adapter_is_fp32_on_any_base(dtype):
    """fp16's GradScaler refuses gradients of 16-bit weights."""
    lora = adapter.add_lora(loading.load_base(TINY, dtype=dtype), base="tiny-mixtral")
    kinds = {("lora_" in name, p.requires_grad, p.dtype) for name, p in lora.named_parameters()}
    assert kinds == {(True, True, torch.float32), (False, False, dtype)}


def test_adapter_moves_and_the_base_does_not(tmp_path):
    tok, lora = build(dropout=0.1)
    before = {name: p.detach().clone() for name, p in lora.named_parameters()}
    examples = make_examples(tok, demo_rows(24), **OPTIONS)
    log = training.train(lora, tok, examples, [], Recipe(output_dir=tmp_path, max_steps=3, **FAST))
    moved = {name for name, p in lora.named_parameters() if not torch.equal(p, before[name])}
    assert moved == {name for name in before if "lora" in name}
    assert log["loss"].notna().all() and len(log) == 3
    assert not lora.training  # dropout is off afterwards


def test_pad_token_and_unk_give_the_same_losses_and_adapter(tmp_path):
    results = {}
    for pad in ("<pad>", "unk"):
        tok, lora = build(pad)
        examples = make_examples(tok, demo_rows(20), **OPTIONS)
        recipe = Recipe(output_dir=tmp_path / pad.strip("<>"), max_steps=4, **FAST)
        log = training.train(lora, tok, examples, examples[:4], recipe)
        results[pad] = (log, lora_state(lora))
    (log, state), (other_log, other) = results.values()
    pd.testing.assert_frame_equal(log, other_log, atol=1e-5)
    assert all(torch.allclose(state[name], other[name], atol=1e-5) for name in state)


def test_masking_by_id_with_pad_eos_never_stops_and_ours_does():
    """Both ways in one place: only the pad id and the labels differ."""
    stopped = {}
    rows = demo_rows(4).assign(rewrite_prompt="Make it rhyme.")
    for way in ("by position", "by id, pad = eos"):
        tok, lora = build()
        examples = make_examples(tok, rows, **OPTIONS)
        optimizer = torch.optim.AdamW([p for p in lora.parameters() if p.requires_grad], lr=5e-3)
        for _ in range(15):
            batch = collate(examples, tok.pad_token_id)
            # what a collator does that masks every label with the id of the pad token
            if way != "by position":
                batch = collate(examples, pad_id=tok.eos_token_id)
                batch["labels"][batch["input_ids"] == tok.eos_token_id] = IGNORED
            lora(**batch).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        options = OPTIONS | dict(max_new_tokens=40, fallback_prompt="-", description=None)
        found = answers.answer_table(lora, tok, rows, **options)
        # both have learned the answer
        assert found["answer"].str.startswith("Make it rhyme.").all()
        stopped[way] = (found["stopped"] == "eos").mean()
    assert stopped == {"by position": 1.0, "by id, pad = eos": 0.0}


def test_best_checkpoint_is_kept_and_training_stops_early(tmp_path):
    from safetensors.torch import load_file
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    tok, lora = build()
    examples = make_examples(tok, demo_rows(6), **SHORT)
    scores = iter([0.1, 0.9, 0.2, 0.3, 0.4, 1.0])
    options = FAST | dict(batch_size=2, max_steps=20, patience=3, report_to="tensorboard")
    recipe = Recipe(output_dir=tmp_path, **options)
    log = training.train(lora, tok, examples[:4], examples[4:], recipe, score=lambda: next(scores))
    assert log["eval_scs"].dropna().to_list() == [0.1, 0.9, 0.2, 0.3, 0.4]
    assert (
        log.loc[log["eval_scs"].notna(), "step"].to_list() == [2, 4, 6, 8, 10]
        and log["step"].max() == 10
    )
    assert log["eval_loss"].notna().sum() == 5
    best = load_file(tmp_path / "checkpoints" / "checkpoint-4" / "adapter_model.safetensors")
    last = load_file(tmp_path / "checkpoints" / "checkpoint-10" / "adapter_model.safetensors")
    kept = {name.replace(".default", ""): value for name, value in lora_state(lora).items()}
    assert kept.keys() == best.keys()
    assert all(torch.equal(kept[name], best[name]) for name in best)
    assert not all(torch.equal(kept[name], last[name]) for name in best)
    (events,) = (tmp_path / "checkpoints").rglob("events.out.tfevents.*")
    board = EventAccumulator(str(events.parent))
    board.Reload()
    assert [round(point.value, 1) for point in board.Scalars("eval/scs")] == [
        0.1,
        0.9,
        0.2,
        0.3,
        0.4,
    ]
    assert len(board.Scalars("train/loss")) == 10


def test_batches_hold_similar_lengths_in_an_order_of_their_own_each_epoch(tmp_path):
    lengths = list(range(1, 401))
    sampler = trainer.LengthGroupedBatches(lengths, batch=4, seed=0)
    orders = []
    for epoch in (0, 1, 0):
        sampler.set_epoch(epoch)
        orders.append(list(sampler))
    assert orders[0] == orders[2] != orders[1] and sorted(orders[0]) == sorted(orders[1]) == list(
        range(400)
    )
    spread = [max(orders[0][i : i + 4]) - min(orders[0][i : i + 4]) for i in range(0, 400, 4)]
    assert sum(spread) / len(spread) < 40  # about 240 in a plain shuffle
    # and Trainer uses it: little padding, and another order in the second epoch
    tok, lora = build()
    examples = [
        {"input_ids": [1] + [9] * n + [2], "labels": [IGNORED] * (n + 1) + [2]}
        for n in range(3, 35)
    ]
    pads = []
    lora.get_input_embeddings().register_forward_pre_hook(
        lambda _, args: pads.append((args[0] == 2400).sum().item())
    )
    recipe = Recipe(output_dir=tmp_path, **FAST | dict(max_steps=32, batch_size=2))
    training.train(lora, tok, examples, [], recipe)
    assert len(pads) == 32 and sum(pads) / 32 < 6  # about 11 in a plain shuffle
    assert pads[:16] != pads[16:]


def test_activation_checkpointing_recomputes_the_layers_and_changes_nothing(tmp_path):
    results = []
    for on in (False, True):
        tok, lora = build()
        calls = []
        lora.get_base_model().model.layers[1].mlp.register_forward_pre_hook(
            lambda *args, calls=calls: calls.append(1)
        )
        examples = make_examples(tok, demo_rows(4), **SHORT)
        options = FAST | dict(batch_size=2, max_steps=2, activation_checkpointing=on)
        training.train(lora, tok, examples, [], Recipe(output_dir=tmp_path / str(on), **options))
        results.append((len(calls), lora_state(lora)))
    assert [calls for calls, _ in results] == [2, 4]
    assert all(
        torch.allclose(value, results[1][1][name], atol=1e-6)
        for name, value in results[0][1].items()
    )


# a falling score: the first checkpoint stays the best, and patience runs out after 5 more, at step
# 12 of 20
RUN = f"""
import sys; sys.path[:0] = [{str(ROOT)!r}, {str(ROOT / "tests")!r}]
from pathlib import Path
from tiny_training import FAST, SHORT, build, demo_rows, make_examples
from prompt_recovery import adapter, training
from prompt_recovery.recipe import Recipe
tok, lora = build(dropout=0.1)
examples = make_examples(tok, demo_rows(20), **SHORT)
options = FAST | dict(batch_size=2, gradient_accumulation=2, max_steps=20, patience=5, resume=True)
recipe = Recipe(output_dir=sys.argv[1], **options)
score = lambda: -len(Path(sys.argv[1], "training_log.csv").read_text().splitlines())
training.train(lora, tok, examples[:16], examples[16:], recipe, score=score)
adapter.save_adapter(lora, Path(sys.argv[1], "adapter"))
print("finished")
"""


def test_killed_and_resumed_equals_uninterrupted(tmp_path):
    from safetensors.torch import load_file

    # the sums' order, and so the last bits, depend on the threads
    environment = os.environ | {"OMP_NUM_THREADS": "1"}

    def start(folder):
        return subprocess.Popen(
            [sys.executable, "-c", RUN, str(folder)],
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
        )

    whole, killed = start(tmp_path / "whole"), start(tmp_path / "killed")
    while not (tmp_path / "killed/checkpoints/checkpoint-4/trainer_state.json").is_file():
        assert killed.poll() is None, "the run ended before its second checkpoint"
        time.sleep(0.02)
    killed.send_signal(signal.SIGKILL)
    assert b"finished" not in killed.communicate()[0] and killed.returncode == -signal.SIGKILL
    moved = tmp_path / "moved"  # a rented machine may go on elsewhere
    (tmp_path / "killed").rename(moved)
    # killed while writing: no trainer_state.json yet
    half = moved / "checkpoints" / "checkpoint-9999"
    half.mkdir()
    early = (moved / "checkpoints" / "checkpoint-2" / "trainer_state.json").stat().st_mtime_ns
    assert b"finished" in start(moved).communicate()[0] and b"finished" in whole.communicate()[0]
    assert not half.exists()
    # went on, did not begin again
    assert (
        moved / "checkpoints" / "checkpoint-2" / "trainer_state.json"
    ).stat().st_mtime_ns == early
    # the best, the last, the kept
    for name in ("checkpoints/checkpoint-2", "checkpoints/checkpoint-12", "adapter"):
        expected, found = (
            load_file(folder / name / "adapter_model.safetensors")
            for folder in (tmp_path / "whole", moved)
        )
        assert all(torch.equal(expected[name], found[name]) for name in expected), name
    log, other = (
        pd.read_csv(folder / "training_log.csv") for folder in (tmp_path / "whole", moved)
    )
    pd.testing.assert_frame_equal(log, other, check_exact=True)
    assert log["step"].to_list() == list(range(1, 13))


def test_resuming_a_finished_run_trains_no_further(tmp_path):
    """Killed while answering after the training: the same adapter and log come back, wherever the
    folder is now."""
    results = []
    for folder in ("first", "first", "moved"):
        tok, lora = build(dropout=0.1)
        examples = make_examples(tok, demo_rows(6), **SHORT)
        options = FAST | dict(batch_size=2, max_steps=8, patience=2, evaluations=4, resume=True)
        recipe, score = (
            Recipe(output_dir=tmp_path / folder, **options),
            iter([0.5, 0.4, 0.3]).__next__,
        )
        log = training.train(lora, tok, examples[:4], examples[4:], recipe, score=score)
        assert not lora.training
        results.append((log, lora_state(lora)))
        if len(results) == 2:
            (tmp_path / "first").rename(tmp_path / "moved")
    (log, state), *others = results
    assert log["step"].to_list() == [1, 2, 3, 4, 5, 6]
    for other, weights in others:
        pd.testing.assert_frame_equal(log, other, check_exact=True)
        assert all(torch.equal(state[name], weights[name]) for name in state)
    pd.testing.assert_frame_equal(log, pd.read_csv(tmp_path / "moved" / "training_log.csv"))


@pytest.mark.parametrize(
    "report_to, why",
    [
        ("mlflow", "choose one of none, tensorboard, wandb, trackio"),
        ("wandb", "wandb is not installed; pip install wandb"),
    ],
)
def test_who_is_reported_to_is_checked_without_a_model(report_to, why):
    with pytest.raises(SettingError, match=why):
        Recipe(report_to=report_to)


def test_checkpoints_of_other_settings_are_refused_and_removed_without_resume(tmp_path):
    tok, lora = build()
    examples = make_examples(tok, demo_rows(4), **SHORT)
    recipe = Recipe(output_dir=tmp_path, max_steps=1, **FAST)
    training.train(lora, tok, examples, [], recipe)
    stale = tmp_path / "checkpoints" / "checkpoint-1" / "stale"
    stale.touch()
    with pytest.raises(TrainingError, match="other rows or settings"):
        training.train(lora, tok, examples[1:], [], replace(recipe, resume=True))
    with pytest.raises(TrainingError, match="other rows or settings"):
        training.train(lora, tok, examples, [], replace(recipe, resume=True, warmup_steps=1))
    training.train(lora, tok, examples[1:], [], replace(recipe, max_steps=2))
    assert (
        not stale.exists()
        and run_folder.last_checkpoint(tmp_path / "checkpoints").name == "checkpoint-2"
    )


def test_rows_without_an_answer_in_the_style_are_named():
    tok = load_tokenizer(TINY)
    rows = demo_rows(2).assign(response=["", " "], origin=["a.csv:2", "a.csv:3"])
    with pytest.raises(
        TrainingError, match=r"2 of 2 rows are refused \(a.csv:2, a.csv:3\).*reason_json"
    ):
        usable_examples(tok, rows, max_tokens=400, format=Format(style="reason_json"))
    with pytest.raises(
        TrainingError, match=r"1 of 1 rows are refused \(row 1\).*raise max_tokens to"
    ):
        usable_examples(tok, demo_rows(1), max_tokens=20, format=Format())


def test_shown_example_marks_the_supervised_part():
    tok = load_tokenizer(TINY)
    example = make_examples(tok, demo_rows(1), **OPTIONS)[0]
    prompt = demo_rows(1)["rewrite_prompt"][0]
    assert show_example(tok, example).endswith(f"[/INST]»»»{prompt}</s>«««")
    assert answer_length(example) == len(tok(prompt, add_special_tokens=False)["input_ids"]) + 1


def test_a_host_that_shows_several_cards_trains_on_the_planned_rows_of_a_step(
    tmp_path,
    monkeypatch,
):
    """Trainer would give each card a batch: with two of them, twice the rows, and half as many
    steps an epoch."""
    import functools

    tok, lora = build()
    examples = make_examples(tok, demo_rows(24), **SHORT)
    given, set_up = [], vars(training.TrainingArguments)["_setup_devices"].func

    def two_cards(arguments):
        device = set_up(arguments)
        arguments._n_gpu = 2
        return device

    once = functools.cached_property(two_cards)  # as transformers' own: set up at the first look
    once.__set_name__(training.TrainingArguments, "_setup_devices")
    monkeypatch.setattr(training.TrainingArguments, "_setup_devices", once)
    probe = training.TrainingArguments(output_dir=str(tmp_path / "probe"), use_cpu=True)
    assert probe.n_gpu == 2 and probe.train_batch_size == 2 * probe.per_device_train_batch_size
    embeddings = lora.get_input_embeddings()
    embeddings.register_forward_pre_hook(lambda _, args: given.append(len(args[0])))
    options = FAST | dict(batch_size=4, gradient_accumulation=2, max_steps=3)
    log = training.train(lora, tok, examples, [], Recipe(output_dir=tmp_path / "run", **options))
    assert given == [4] * 6 and len(log) == 3 and log["epoch"].to_list()[-1] == 1


def test_a_loss_that_is_not_finite_stops_the_run_at_once_and_says_what_is_kept(tmp_path):
    tok, lora = build()
    examples = make_examples(tok, demo_rows(12), **SHORT)
    weight = lora.get_base_model().lm_head.weight
    steps = []

    def damage(*_):
        steps.append(1)
        # two micro-batches a step and one evaluation of two batches before: in the third step
        if len(steps) == 7:
            weight.data[5] = float("nan")

    lora.get_base_model().model.layers[0].register_forward_pre_hook(damage)
    options = FAST | dict(batch_size=2, gradient_accumulation=2, max_steps=10, evaluations=5)
    recipe = Recipe(output_dir=tmp_path, **options)
    with pytest.raises(
        TrainingError, match=r"loss of step 3 is nan.*checkpoint-2 is kept.*learning_rate 0.005"
    ):
        training.train(lora, tok, examples[:8], examples[8:], recipe)
    assert len(steps) <= 8  # stopped in that step
    # before they were changed by it
    assert all(torch.isfinite(tensor).all() for tensor in lora_state(lora).values())
    with pytest.raises(TrainingError, match="loss of step 1 is nan.*no checkpoint was written yet"):
        training.train(
            lora, tok, examples[:8], [], Recipe(output_dir=tmp_path / "other", **options)
        )
    assert lora.config.use_cache and not lora.training


@pytest.mark.parametrize("at", [2, 4])
def test_a_gradient_that_is_not_finite_stops_the_run_before_it_changes_the_weights(tmp_path, at):
    """With a finite loss and no held-out rows, the checkpoint of a NaN step was kept, and at the
    last step the run ended well."""
    tok, lora = build()
    examples = make_examples(tok, demo_rows(8), **SHORT)
    weight = next(p for name, p in lora.named_parameters() if "lora_B" in name)
    seen = []

    def damage(grad):
        seen.append(1)
        return grad * float("nan") if len(seen) == at else grad

    weight.register_hook(damage)
    recipe = Recipe(output_dir=tmp_path, **FAST | dict(batch_size=2, max_steps=4, evaluations=4))
    with pytest.raises(
        TrainingError, match=rf"gradients of step {at} .*checkpoint-{at - 1} is kept"
    ):
        training.train(lora, tok, examples, [], recipe)
    assert all(torch.isfinite(tensor).all() for tensor in lora_state(lora).values())


# neither the lock nor the settings fit, nor the adapter
@pytest.mark.parametrize(
    ("room", "name"), [(10, "run.lock"), (400, "checkpoints/settings.json"), (60_000, "adapter")]
)
def test_a_full_disk_is_said_wherever_a_run_writes(tmp_path, room, name):
    """The system's own error has neither the path nor the room there."""
    tok, lora = build()
    examples = make_examples(tok, demo_rows(4), **SHORT)
    with pytest.raises(
        OSError, match=f"{tmp_path / name} could not be .*MiB free there. Make room"
    ):
        with full_disk(room):
            if name == "adapter":
                adapter.save_adapter(lora, tmp_path / name)
            training.train(lora, tok, examples, [], Recipe(output_dir=tmp_path, **FAST))
    assert name != "adapter" or not list(tmp_path.iterdir())


# the adapter does not fit; the optimiser's state does not
@pytest.mark.parametrize("room", [60_000, 150_000])
def test_a_full_disk_is_said_with_path_and_room(tmp_path, room):
    tok, lora = build()
    examples = make_examples(tok, demo_rows(4), **SHORT)
    recipe = Recipe(output_dir=tmp_path, **FAST | dict(max_steps=2, evaluations=2))
    with pytest.raises(TrainingError) as raised, full_disk(room):
        training.train(lora, tok, examples, [], recipe)
    said = str(raised.value)
    assert said.startswith(
        f"The checkpoint of step 1 could not be written to {tmp_path / 'checkpoints'} ("
    )
    assert "MiB free there)" in said and "no checkpoint is there yet" in said
    assert not list((tmp_path / "checkpoints").glob("checkpoint-*"))  # nothing half-written is left


def test_rows_that_cannot_be_taught_are_dropped_and_counted_unless_all_are():
    tok = load_tokenizer(TINY)
    rows = demo_rows(5).assign(origin=[f"a.csv:{n}" for n in range(1, 6)])
    rows["response"] = [
        '1. Tone changed.\n2. {"instruction": "Make it formal."}',
        "",
        '1. Shorter.\n2. {"prompt": "x"}',
        "1. Longer.",
        "why",
    ]
    rows.loc[0, "rewrite_prompt"] = "make it formal"
    rows.loc[3, "rewrite_prompt"] = "very " * 1250 + "formal"
    render = dict(max_tokens=400, format=Format(style="reason_json"))
    kept, example_of, account = usable_examples(tok, rows, **render)
    assert (
        kept["origin"].to_list() == ["a.csv:1", "a.csv:3", "a.csv:5"]
        and list(example_of) == kept["id"].to_list()
    )
    assert account[["origin", "reason", "action"]].values.tolist() == [
        ["a.csv:2", "no reason_json answer that can be read back", "dropped"],
        ["a.csv:3", "response names another prompt", "overruled"],
        ["a.csv:4", "prompt and answer do not fit in max_tokens", "dropped"],
    ]
    for example, row in zip(
        make_examples(tok, kept, **render), kept.to_dict("records"), strict=True
    ):
        assert example == example_of[row["id"]]
        taught = tok.decode([i for i in example["labels"] if i != IGNORED]).removesuffix("</s>")
        assert read_back(taught, "reason_json") == row["rewrite_prompt"] and taught.count("{") == 1
    with pytest.raises(
        TrainingError, match=r"2 of 2 rows are refused \(a.csv:2, a.csv:4\); the first: response=''"
    ):
        usable_examples(tok, rows.iloc[[1, 3]], **render)
    with pytest.raises(TrainingError, match="no rows left"):
        usable_examples(tok, rows.head(0), **render)


def test_equal_scores_go_by_loss_and_the_end_is_said(tmp_path, capsys):
    """No answer holds a prompt while the loss falls: the lowest loss is kept, and the training goes
    on."""
    kept = {}
    for folder, patience in (("zeros", 2), ("falling", 2)):
        tok, lora = build()
        examples = make_examples(tok, demo_rows(12), **SHORT)
        score = (lambda: 0.0) if folder == "zeros" else iter([0.3, 0.2, 0.1]).__next__
        options = FAST | dict(
            batch_size=4, max_steps=6, evaluations=6, patience=patience, learning_rate=1e-3
        )
        recipe = Recipe(output_dir=tmp_path / folder, **options)
        log = training.train(lora, tok, examples[:8], examples[8:], recipe, score=score)
        kept[folder] = (log, capsys.readouterr().out)
    log, said = kept["zeros"]
    losses = log["eval_loss"].to_list()
    assert len(losses) == 6 and losses == sorted(losses, reverse=True)  # else this proves nothing
    assert f"kept: step 6, eval_scs 0, eval_loss {losses[-1]:.4g}; all 6 steps done" in said
    log, said = kept["falling"]
    assert log["step"].max() == 3
    assert (
        "kept: step 1, eval_scs 0.3" in said
        and "STOPPED EARLY at step 3 of 6, since 2 evaluations in a row" in said
    )


def test_a_short_run_goes_to_its_end_whatever_its_first_steps_score(tmp_path, capsys):
    """Its first step stood as the best, and three more steps ended it."""
    tok, lora = build()
    examples = make_examples(tok, demo_rows(6), **SHORT)
    scores = iter([0.5, 0.1, 0.1, 0.1, 0.2, 0.3, 0.6])
    recipe = Recipe(output_dir=tmp_path, **FAST | dict(batch_size=2, max_steps=7))
    log = training.train(lora, tok, examples[:4], examples[4:], recipe, score=scores.__next__)
    assert log["step"].to_list() == [*range(1, 8)]
    assert "kept: step 7, eval_scs 0.6" in capsys.readouterr().out


@pytest.mark.parametrize("loss", [0.0, 0.5, 30.0])
def test_a_higher_score_is_chosen_whatever_the_loss(loss):
    assert trainer.choice(0.1 + 1e-5, loss) > trainer.choice(0.1, 0.0)
    assert trainer.choice(0.1, loss) > trainer.choice(0.1, loss + 0.01)
