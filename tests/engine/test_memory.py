"""Placement and training plans against what torch really holds, and a run that goes on when memory
ends."""

import itertools

import pandas as pd
import pytest
import torch
from accelerate.utils import check_device_map
from hypothesis import given, settings
from hypothesis import strategies as st
from memory_cases import TRUE_SHAPE, Alive
from tiny_bases import MIXTRAL, OTHERS, write
from tiny_training import FAST, SHORT, build, demo_rows, lora_state, make_examples
from transformers import AutoModelForCausalLM, MixtralConfig

from prompt_recovery import adapter, trainer, training
from prompt_recovery.engine import (
    TooLittleMemory,
    TrainingPlan,
    checkpointing,
    loading,
    memory,
    storage,
)
from prompt_recovery.engine.memory import GIB, RESERVED_BYTES, Sizes
from prompt_recovery.engine.summary import summary
from prompt_recovery.examples import IGNORED, collate
from prompt_recovery.recipe import Recipe

# --- placement ------------------------------------------------------------------------------------


def test_sizes_of_mixtral_are_those_of_its_published_parts(true_shape):
    hub, saved = true_shape
    sixteen, four = (
        memory.sizes(hub, torch.float16, four_bit=four_bit) for four_bit in (False, True)
    )
    assert sixteen.weights == 2 * 46_702_792_704
    assert four.before == sixteen.before == 2 * 32000 * 4096
    assert four.behind == sixteen.behind == 2 * (32000 * 4096 + 4096)
    attention, expert_weights = 32 * 2 * (4096 * 4096 + 4096 * 1024), 32 * 8 * 3 * 4096 * 14336
    others = 2 * (32000 * 4096 * 2 + 32 * (8 * 4096 + 2 * 4096) + 4096)
    assert four.weights == pytest.approx(
        (attention + expert_weights) * (0.5 + 1 / 64 + 4 / 64 / 256) + others, rel=1e-6
    )
    assert 22 * GIB < four.weights < 23.5 * GIB
    assert four.kv * 32 == sixteen.kv * 32 == 128 * 1024  # a token
    assert len(set(four.layers)) == 1 and len(four.layers) == 32
    # merging holds gate_up as read and merged; a saved folder is never in 16 bit
    assert four.merging > 2 * 2 * 8 * 2 * 14336 * 4096
    again = memory.sizes(saved, torch.float16, four_bit=True)
    assert again.workspace == 2 * 3 * 14336 * 4096 and again._replace(merging=four.merging) == four
    assert again.merging == 0


@pytest.mark.parametrize(
    "quantised, free, split",
    [
        (False, [140], [32]),  # one GPU: nothing is split
        (False, [140, 140], [32, 0]),
        (True, [14.6, 14.6], [16, 16]),  # two T4
        (True, [14.6] * 4, [16, 16, 0, 0]),
        (True, [7.6] * 4, [8, 8, 8, 8]),
        (False, [14.6] * 4, [16, 16, 0, 0]),  # 16-bit experts are put together by the CPU
        (True, [8, 22], [7, 25]),
    ],
)
def test_mixtral_on_1_2_and_4_gpus(true_shape, quantised, free, split):
    folder = true_shape[quantised]
    sizes = memory.sizes(folder, torch.float16, four_bit=True)
    found = memory.place(sizes, [int(f * GIB) for f in free])
    assert found == split
    places = memory.device_map(sizes, found, range(len(free)))
    with torch.device("meta"):
        whole = AutoModelForCausalLM.from_config(TRUE_SHAPE)
    check_device_map(whole, places)  # accelerate's own: every tensor has a place
    assert (
        places["model.embed_tokens"] == places["model.rotary_emb"] == places["model.layers.0"] == 0
    )
    last = max(n for n, layers in enumerate(split) if layers)
    assert places["lm_head"] == places["model.norm"] == places["model.layers.31"] == last
    assert [
        sum(places[f"model.layers.{n}"] == gpu for n in range(32)) for gpu in range(len(free))
    ] == split
    # weights and KV room together are level: no GPU is fuller than another one by more than a layer
    cost = sizes.layers[0] + memory.KV_TOKENS * sizes.kv
    ends = {0: sizes.before, last: sizes.behind}
    used = [layers * cost + ends.get(gpu, 0) for gpu, layers in enumerate(split) if layers]
    if len(set(free)) == 1:
        assert max(used) - min(used) <= cost + sizes.before


def test_devices_have_the_numbers_they_are_given(true_shape):
    sizes = memory.sizes(true_shape[1], torch.float16, four_bit=True)
    assert set(memory.device_map(sizes, [32], [3]).values()) == {3}
    assert set(memory.device_map(sizes, [16, 16, 0], [5, 2, 0]).values()) == {5, 2}


@settings(max_examples=150, deadline=None)
@given(
    st.lists(st.integers(1, 20), min_size=1, max_size=7),
    st.integers(0, 30), st.integers(0, 30), st.integers(0, 5),
    st.lists(st.integers(0, 120), min_size=1, max_size=4), st.integers(0, 10),
)  # fmt: skip
def test_the_split_is_the_best_of_all(layers, before, behind, kv, free, workspace):
    """Against every possible split, by brute force: fewest GPUs, then the emptiest fullest one."""
    sizes = Sizes(tuple(layers), before, behind, kv, workspace, ())
    count = len(layers)

    def worst(bounds):
        shares = []
        for gpu, (first, last) in enumerate(itertools.pairwise((0, *bounds, count))):
            used = sum(layers[first:last]) + (last - first) * 2 * kv
            used += before * (gpu == 0) + behind * (gpu == len(bounds))
            room = free[gpu] - workspace
            shares.append(used / room if room > 0 else float("inf"))
        return max(shares)

    expected = None
    for used in range(1, min(len(free), count) + 1):
        options = [worst(bounds) for bounds in itertools.combinations(range(1, count), used - 1)]
        if options and min(options) <= 1:
            expected = used, min(options)
            break
    room = [f + RESERVED_BYTES for f in free]
    if expected is None:
        with pytest.raises(TooLittleMemory):
            memory.place(sizes, room, kv_tokens=2)
        return
    split = memory.place(sizes, room, kv_tokens=2)
    assert sum(split) == count and len(split) == len(free)
    assert sum(n > 0 for n in split) == expected[0] and not any(split[expected[0] :])
    bounds = list(itertools.accumulate(split[: expected[0]]))[:-1]
    assert worst(bounds) == pytest.approx(expected[1])


@pytest.mark.parametrize("name", ["mixtral", *OTHERS])
@pytest.mark.parametrize("four_bit", [True, False])
def test_sizes_are_those_of_the_loaded_model(name, four_bit, tmp_path):
    folder = write(tmp_path / name, MixtralConfig(**MIXTRAL) if name == "mixtral" else OTHERS[name])
    sizes = memory.sizes(folder, torch.bfloat16, four_bit)
    base = loading.load_base(folder, torch.bfloat16, four_bit=four_bit)
    loaded = sum(part.gib for part in summary(base)) * GIB
    # so small a model has many fp32 offsets and half-filled blocks of the double quantisation
    assert sizes.weights == pytest.approx(loaded, rel=0.02 if four_bit else 1e-9)
    places = memory.device_map(sizes, [2, 1], [0, 1])
    check_device_map(base, places)
    tied = base.config.tie_word_embeddings
    assert places["lm_head"] == (0 if tied else 1) and places["model.embed_tokens"] == 0
    if four_bit:
        saved = loading.save_quantised(base, folder, tmp_path / "saved")
        assert memory.sizes(saved, torch.bfloat16, True).weights == sizes.weights


def test_too_little_memory_is_said_before_anything_loads(tmp_path, monkeypatch, true_shape):
    folder = write(tmp_path / "m", MixtralConfig(**MIXTRAL))
    memory.processes()  # accelerate's state is made once, and for the CPU that is really there
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(memory, "free_memory", lambda: {0: GIB // 2, 1: GIB})
    # would raise another error
    monkeypatch.setattr(loading.AutoModelForCausalLM, "from_pretrained", None)
    with pytest.raises(
        TooLittleMemory, match=r"needs 0\.0 GiB.*free are \[0\.5, 1\.0\] GiB.*four_bit=True"
    ):
        loading.load_base(folder, torch.float16)
    sizes = memory.sizes(true_shape[0], torch.float16, four_bit=False)
    with pytest.raises(
        TooLittleMemory,
        match=r"needs 88\.0 GiB \(weights 87\.0, KV cache of 8192 tokens\).*free are \[14\.6",
    ):
        memory.place(sizes, [int(14.6 * GIB)] * 2)


def test_a_process_of_several_has_the_gpu_of_its_rank(monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (100 + device, 200))
    assert memory.free_memory() == {0: 100, 1: 101, 2: 102, 3: 103}
    monkeypatch.setenv("LOCAL_RANK", "2")
    assert memory.free_memory() == {2: 102}


# --- training plans -------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def lora(tmp_path_factory):
    # Mixtral's proportions
    folder = write(
        tmp_path_factory.mktemp("plan") / "m",
        MixtralConfig(**MIXTRAL | dict(intermediate_size=448)),
    )
    return adapter.add_lora(
        loading.load_base(folder, torch.float32, four_bit=True), base="m", dropout=0.1
    ).train()


def step(lora, rows, tokens, answer, autocast=None):
    """A forward and backward pass as the trainer does it; bytes alive between the two and at the
    peak."""
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(3, 320, (rows, tokens), generator=generator)
    labels = ids.clone()
    labels[:, :-answer] = IGNORED
    inputs = dict(input_ids=ids, attention_mask=torch.ones_like(ids), labels=labels)
    lora.zero_grad(set_to_none=True)
    with Alive() as alive:
        with torch.autocast("cpu", dtype=autocast, enabled=autocast is not None):
            loss = trainer.RowTrainer.compute_loss(None, lora, inputs)
        between = alive.now
        loss.backward()
    return between, alive.peak


@pytest.mark.parametrize("autocast", [None, torch.bfloat16])
def test_saved_bytes_are_what_stays_alive_after_a_forward_pass(lora, autocast):
    lora.eval()
    slope = checkpointing.saved_bytes(lora, autocast)
    assert not lora.training
    lora.train()
    checkpointing.apply_plan(lora, TrainingPlan(1, 1))
    held = [step(lora, 1, tokens, 8, autocast)[0] for tokens in (100, 300)]
    assert (held[1] - held[0]) / 200 == pytest.approx(slope, rel=0.02)


def plan_cost(plan, longest, layers):
    again = (
        plan.checkpointed - plan.kept
    ) * checkpointing.RECOMPUTED + plan.kept * checkpointing.RECOMPUTED_KEPT
    overhead = checkpointing.OVERHEAD_TOKENS * (
        checkpointing.DEQUANTISATIONS if plan.one_expert else 1
    )
    return plan.accumulation * ((1 + again / layers) * plan.rows * longest + overhead)


@pytest.mark.parametrize("autocast", [None, torch.bfloat16])
def test_more_memory_never_makes_training_slower_and_every_plan_fits(lora, autocast):
    seen, costs = {}, []
    for room in (int(4e6 * 1.28**n) for n in range(14)):
        try:
            plan = checkpointing.training_plan(lora, 64, 8, 6, autocast, free=RESERVED_BYTES + room)
        except TooLittleMemory as error:
            assert not costs  # more memory never takes a way away
            assert "one row of 64 tokens" in str(error) and "Lower max_tokens" in str(error)
            continue
        assert plan.rows * plan.accumulation == 6 and 0 <= plan.kept <= plan.checkpointed <= 3
        assert 0 < plan.peak <= room
        costs.append(plan_cost(plan, 64, 3))
        seen[plan[:4], plan.one_expert] = plan
    assert costs == sorted(costs, reverse=True) and len(costs) > 8
    plans = list(seen.values())
    assert plans[0].rows < 4 and plans[0].checkpointed == 3 and plans[-1][:4] == (6, 1, 0, 0)
    assert any(0 < plan.checkpointed < 3 for plan in plans) and any(plan.kept for plan in plans)
    # and the peak that a plan expects is the one that a step has (on a CPU, gate and up are copied
    # into their buffer)
    copied = 4 * 2 * 448 * 128 * (2 if autocast else 4)
    for plan in plans[:: max(1, len(plans) // 3)] + plans[-1:]:
        checkpointing.apply_plan(lora, plan)
        storage.release_buffers(lora)
        peak = step(lora, plan.rows, 64, 8, autocast)[1]
        assert 0.5 * plan.peak < peak <= plan.peak + copied, plan
    checkpointing.apply_plan(lora, TrainingPlan(1, 1))


def test_layers_on_two_cards_are_planned_by_the_room_of_each(lora):
    """One layer on a narrow card, two on a wide one, which has room to recompute nothing."""
    one = checkpointing.training_plan(
        lora, 64, 8, 4, torch.bfloat16, free=[2**40, 2**40], layers=(1, 2)
    )
    assert one.cards == ((1, 0, 0), (2, 0, 0)) and one.rows == 4 and not one.one_expert
    plans = []
    for room in (int(3e6 * 1.06**n) for n in range(30)):
        try:
            plan = checkpointing.training_plan(
                lora, 64, 8, 4, torch.bfloat16, free=[RESERVED_BYTES + room, 2**40], layers=(1, 2)
            )
        except TooLittleMemory:
            continue
        assert plan.cards[1] == (2, 0, 0) and plan.checkpointed == plan.cards[0].checkpointed
        plans.append(plan)
    assert plans[0].one_expert and not plans[-1].one_expert
    assert any(plan.cards[0].checkpointed for plan in plans)
    with pytest.raises(TooLittleMemory, match=r"one row of 64 tokens needs .*, 0\.0 are free"):
        checkpointing.training_plan(
            lora, 64, 8, 4, torch.bfloat16, free=[2**40, 2**20], layers=(1, 2)
        )

    layers = lora.get_base_model().model.layers
    cards = (checkpointing.CardPlan(1, 1, 0), checkpointing.CardPlan(2, 1, 1))
    checkpointing.apply_plan(lora, TrainingPlan(1, 1, 2, 1, one_expert=True, cards=cards))
    assert [layer.gradient_checkpointing for layer in layers] == [True, True, False]
    experts = storage.four_bit_experts(lora)
    assert [each.keep_gate_up for each in experts] == [False, True, False] and all(
        each.one_at_a_time for each in experts
    )
    checkpointing.apply_plan(lora, TrainingPlan(1, 1))
    assert not any(each.one_at_a_time or each.keep_gate_up for each in experts)


def test_a_plan_says_what_it_does():
    text = str(TrainingPlan(4, 2, checkpointed=20, kept=5, peak=30 * GIB))
    assert (
        "4 rows at a time x 2" in text
        and "20 layers" in text
        and "5 of them" in text
        and "30.0 GiB" in text
    )
    assert "one at a time" not in text and "one at a time" in str(
        TrainingPlan(1, 1, one_expert=True)
    )


# --- training -------------------------------------------------------------------------------------


def run(folder, *, break_it=None, rows=12, steps=4, dropout=0.0, **options):
    """A short run on the tiny model: its log and its adapter. break_it(lora) may install hooks."""
    tok, lora = build(dropout=dropout)
    examples = make_examples(tok, demo_rows(rows), **SHORT)
    if break_it is not None:
        break_it(lora)
    log = training.train(
        lora, tok, examples, [], Recipe(output_dir=folder, max_steps=steps, **FAST | options)
    )
    return log, lora_state(lora)


def same(found, expected):
    (log, state), (other_log, other) = found, expected
    # transformers counts an epoch in micro-batches
    pd.testing.assert_frame_equal(
        log.drop(columns="epoch"), other_log.drop(columns="epoch"), rtol=1e-4
    )
    for name in state:
        # AdamW divides by the size of the gradient: where that is near 0, a rounding difference
        # moves a weight
        torch.testing.assert_close(state[name], other[name], atol=5e-4, rtol=0)


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    return run(tmp_path_factory.mktemp("undisturbed"))


def test_loss_on_label_columns_is_the_model_s_own_loss():
    tok, lora = build()
    examples = make_examples(tok, demo_rows(5), **SHORT)
    batch = collate(examples, tok.pad_token_id)
    asked = []
    lora.get_base_model().lm_head.register_forward_hook(
        lambda module, args, out: asked.append(out.shape[1])
    )
    results = []
    for ours in (True, False):
        lora.zero_grad()
        loss = trainer.RowTrainer.compute_loss(None, lora, batch) if ours else lora(**batch).loss
        loss.backward()
        results.append(
            (
                loss.item(),
                {n: p.grad.clone() for n, p in lora.named_parameters() if p.requires_grad},
            )
        )
    (found, grads), (expected, others) = results
    assert found == pytest.approx(expected, rel=1e-5)
    assert all(torch.allclose(grads[name], others[name], atol=1e-6) for name in grads)
    assert asked[0] < asked[1] / 2  # lm_head ran on the columns that some answer has, not on all


def test_micro_batches_leave_loss_and_gradients_as_the_batch_asked_for_has_them(
    undisturbed, tmp_path
):
    """8 rows a step as 8 x 1, 4 x 2 and 1 x 8; 12 rows, so the second step of an epoch has 4."""
    assert len(undisturbed[0]) == 4 and undisturbed[0]["loss"].is_unique
    for rows in (4, 1):
        same(
            run(tmp_path / str(rows), batch_size=rows, gradient_accumulation=8 // rows), undisturbed
        )


def too_many(most, calls=None, only=None):
    """A hook like a card that has room for `most` rows. calls counts; only: the calls that fail."""
    calls = [] if calls is None else calls

    def hook(module, args, *_):
        calls.append(args[0].shape[0])
        if args[0].shape[0] > most and (only is None or len(calls) in only):
            raise torch.OutOfMemoryError("injected")

    return hook


def test_out_of_memory_halves_the_rows_and_loses_nothing(undisturbed, tmp_path, capsys):
    calls = []

    def break_it(lora):
        lora.get_base_model().model.layers[3].mlp.register_forward_pre_hook(too_many(2, calls))

    same(run(tmp_path, break_it=break_it), undisturbed)
    # learned once, not at every step
    assert calls[:6] == [8, 4, 2, 2, 2, 2] and max(calls[6:]) == 2
    out = capsys.readouterr().out
    assert "8 rows at a time: going on with 4" in out and "4 rows at a time: going on with 2" in out


def test_out_of_memory_in_a_backward_pass_leaves_no_half_gradients(undisturbed, tmp_path):
    """In the second micro-batch of the second step, when the layers above have added their
    gradients already."""
    grads = []

    def break_it(lora):
        layer = lora.get_base_model().model.layers[2]
        above = lora.get_base_model().model.layers[4].self_attn.q_proj.lora_B["default"].weight
        count = [0]

        def hook(module, grad):
            count[0] += 1
            if count[0] == 4:
                grads.append(above.grad.clone())
                raise torch.OutOfMemoryError("injected")

        layer.register_full_backward_pre_hook(hook)

    # 16 rows: every step has two micro-batches of 4
    options = dict(rows=16, batch_size=4, gradient_accumulation=2)
    same(run(tmp_path / "broken", break_it=break_it, **options), run(tmp_path / "whole", **options))
    assert len(grads) == 1 and grads[0].abs().sum() > 0


def test_out_of_memory_with_one_row_checkpoints_every_layer(undisturbed, tmp_path):
    layers = []

    def break_it(lora):
        def hook(module, args):
            on = [m.gradient_checkpointing for m in lora.get_base_model().model.layers]
            if not all(on):
                raise torch.OutOfMemoryError("injected")
            layers.append(args[0].shape[0])

        lora.get_base_model().model.layers[1].mlp.register_forward_pre_hook(hook)

    same(run(tmp_path, break_it=break_it), undisturbed)
    assert set(layers) == {1}


def test_out_of_memory_with_nothing_left_to_save_says_so(tmp_path):
    def break_it(lora):
        lora.get_base_model().model.layers[1].mlp.register_forward_pre_hook(too_many(0))

    with pytest.raises(TooLittleMemory, match=r"1 rows at a time.*Lower max_tokens"):
        run(tmp_path, break_it=break_it)


def test_a_run_goes_on_with_another_plan(undisturbed, tmp_path, monkeypatch):
    """Killed in the middle of an epoch with 8 x 1, resumed on a card where 2 x 4 with three layers
    checkpointed fits."""

    class Killed(Exception):
        pass

    def break_it(lora):
        def hook(module, args):
            if (tmp_path / "checkpoints" / "checkpoint-1" / "trainer_state.json").is_file():
                raise Killed

        lora.register_forward_pre_hook(hook)

    with pytest.raises(Killed):
        run(tmp_path, break_it=break_it, evaluations=4)
    monkeypatch.setattr(training, "plan_of", lambda *args: TrainingPlan(2, 4, checkpointed=3))
    same(run(tmp_path, resume=True, evaluations=4), undisturbed)


def test_a_4_bit_model_trains_and_resumes(tmp_path, capsys):
    """The whole of training.train on 4 bits: the loss falls, the base stays, resuming gives the
    same bits."""
    logs, states = [], []
    tok, _ = build()
    saved = tmp_path / "4-bit"
    for number, folder in enumerate(("a", "b", "b")):
        base = loading.load_base(
            saved if number else "demo/tiny-mixtral", torch.float32, four_bit=True
        )
        if not number:
            loading.save_quantised(base, "demo/tiny-mixtral", saved)
        adapter.resize_input_embeddings(base, len(tok))
        lora = adapter.add_lora(base, base="tiny-mixtral", dropout=0.1, seed=0)
        before = {
            name: p.detach().clone() for name, p in lora.named_parameters() if "lora" not in name
        }
        examples = make_examples(tok, demo_rows(4), **SHORT)
        options = FAST | dict(max_steps=3, resume=number == 2, activation_checkpointing=True)
        log = training.train(
            lora, tok, examples, examples[:2], Recipe(output_dir=tmp_path / folder, **options)
        )
        assert all(
            torch.equal(p, before[name])
            for name, p in lora.named_parameters()
            if "lora" not in name
        )
        logs.append(log)
        states.append(lora_state(lora))
    assert logs[0]["loss"].iloc[-1] < 0.9 * logs[0]["loss"].iloc[0]
    for log, state in zip(logs[1:], states[1:], strict=True):
        pd.testing.assert_frame_equal(log, logs[0], check_exact=True)
        assert all(torch.equal(state[name], states[0][name]) for name in state)
    experts = [module for module in lora.modules() if hasattr(module, "down_proj_packed")]
    # training gives the room back
    assert experts and not any(storage.workspace(each).buffers for each in experts)
    assert "5 layers" in capsys.readouterr().out
