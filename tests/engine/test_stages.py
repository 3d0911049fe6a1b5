"""A model whose layers are called in parts answers as one: row by row, however many stages, however
small the pieces."""

import gc
import random
import threading
import time
import weakref
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from accelerate.hooks import AlignDevicesHook, add_hook_to_module
from conftest import TINY
from peft.tuners.lora import LoraLayer
from tiny_models import Ids, answers, random_model, random_prompts, stock, with_lora
from transformers import LlamaConfig, MistralConfig, MixtralConfig, Qwen3Config

from prompt_recovery.engine import GREEDY, Sampling, decoding, generate, loading, stage, turns
from prompt_recovery.engine.cache import StaticCache
from prompt_recovery.engine.generation import AttentionError, Ready, ready
from prompt_recovery.engine.parts import StageError, in_parts
from prompt_recovery.engine.planning import AnswerPlan

LENGTHS = [random.Random(3).randrange(1, 90) for _ in range(20)] + [400, 2, 130]


@pytest.fixture(scope="module")
def small():
    base = random_model(
        MixtralConfig, num_local_experts=4, num_experts_per_tok=2, num_hidden_layers=4
    )
    base.set_experts_implementation("eager")
    return base


def plan(*layers, merged=True, piece=16_384, cache_tokens=6_000):
    return AnswerPlan(layers, merged, piece, cache_tokens)


def found(model, prompts, plan, sampling=GREEDY, new=12, **options):
    with ready(model, plan) as prepared:
        rows = sorted(
            generate(prepared, prompts, eos=-1, max_new_tokens=new, sampling=sampling, **options)
        )
    assert [row.position for row in rows] == list(range(len(prompts)))
    return [row.answers for row in rows]


@pytest.mark.parametrize("layers", [(2, 2), (1, 3), (1, 1, 1, 1)])
@pytest.mark.parametrize("sampling", [GREEDY, Sampling(3, 1.3, 0.9, seed=5)])
def test_stages_answer_as_one(small, layers, sampling):
    prompts = random_prompts(LENGTHS, shared=9)
    assert found(small, prompts, plan(*layers), sampling) == found(
        small, prompts, plan(4), sampling
    )


@pytest.mark.parametrize("layers", [(4,), (2, 2)])
def test_small_pieces_answer_as_large_ones(small, layers):
    prompts = random_prompts(LENGTHS, shared=9)
    assert found(small, prompts, plan(*layers, piece=16)) == found(small, prompts, plan(4))


def test_pieces_give_the_logits_of_the_whole(small):
    prompts = random_prompts([300, 7, 299, 120])
    logits = {}
    for piece in (4096, 300, 64, 10):
        with in_parts(small) as parts:
            decoder = decoding.Decoder(
                parts,
                [],
                rows=4,
                cache_tokens=4 * 320,
                max_new_tokens=1,
                eos=-1,
                pad=0,
                piece=piece,
            )
            decoder.choose = lambda logits_, rows, piece=piece: logits.setdefault(piece, logits_)
            decoder.answer(prompts, [[None]] * 4)
    for piece, each in logits.items():
        assert torch.allclose(each, logits[4096], atol=1e-4), piece
    assert len(logits) == 4


@pytest.mark.parametrize(
    "rows, columns, piece",
    [(5, 90, 200), (3, 1100, 2048), (1, 4032, 2048), (64, 33, 16), (7, 1, 3)],
)
def test_pieces_cover_everything_once_and_in_order(rows, columns, piece):
    seen = torch.zeros(rows, columns, dtype=torch.int)
    for place in decoding.cut(rows, columns, piece):
        assert seen[place].numel() <= piece
        # columns before are there
        assert seen[place[0], : place[1].start].all() and not seen[place].any()
        height = seen[place].shape[0]
        assert height == 1 or height * columns <= 2 * piece  # what attention copies
        seen[place] += 1
    assert (seen == 1).all()


@pytest.mark.parametrize("merged", [True, False])
def test_an_adapter_on_four_bits_answers_as_one_stage(merged):
    lora = with_lora(loading.load_base(TINY, four_bit=True))
    prompts = [[1, *random_prompts([n], seed=n)[0]] for n in (5, 40, 17, 33)]
    whole = found(lora, prompts, plan(5, merged=merged), new=8)
    assert found(lora, prompts, plan(2, 3, merged=merged, piece=32), new=8) == whole
    bare = found(loading.load_base(TINY, four_bit=True), prompts, plan(5), new=8)
    assert bare != whole  # the adapter counts


def test_a_lora_in_16_bit_is_as_near_to_fp32_as_peft_s():
    lora, exact = (
        with_lora(loading.load_base(TINY, dtype, four_bit=True))
        for dtype in (torch.bfloat16, torch.float32)
    )
    ids = torch.tensor([[1, *range(300, 340)]])
    layers = [module for module in lora.modules() if isinstance(module, LoraLayer)]

    def distance(a, b):
        return ((a - b).norm() / b.norm()).item()

    with torch.inference_mode():
        expected, truth = lora(input_ids=ids).logits.float(), exact(input_ids=ids).logits
        with lora.disable_adapter():
            plain = lora(input_ids=ids).logits.float()
        with ready(lora, plan(5, merged=False)) as prepared:
            assert all("sixteen" in vars(layer) for layer in layers)
            found = prepared.model(input_ids=ids).logits.float()
        assert distance(found, truth) < 1.3 * distance(expected, truth) < distance(plain, truth) / 3
        assert not any({"sixteen", "forward"} & set(vars(layer)) for layer in layers)
        assert torch.equal(lora(input_ids=ids).logits.float(), expected)
        with lora.disable_adapter(), ready(lora, plan(5, merged=False)) as prepared:
            assert not any("sixteen" in vars(layer) for layer in layers)
            assert torch.equal(prepared.model(input_ids=ids).logits.float(), plain)


@pytest.mark.parametrize("config", [LlamaConfig, Qwen3Config])
def test_other_models_in_parts(config):
    base = random_model(config, head_dim=16)
    prompts = random_prompts(LENGTHS[:6])
    assert found(base, prompts, plan(1, 1)) == found(base, prompts, plan(2))


def test_a_window_shorter_than_the_texts_is_refused():
    base = random_model(MistralConfig, sliding_window=40)
    with pytest.raises(AttentionError, match="sliding window of 40 tokens.*takes 42"):
        found(base, random_prompts([30, 5]), plan(2))
    prompts = random_prompts([28, 5])
    expected = [stock(base, prompt, 12, eos=-1) for prompt in prompts]
    assert [row[0].ids for row in found(base, prompts, plan(2))] == expected


def test_a_model_that_can_t_be_split_is_refused(small):
    class Scaled(type(small.model)):
        def forward(self, input_ids=None, inputs_embeds=None, **options):
            embedded = self.embed_tokens(input_ids) if inputs_embeds is None else inputs_embeds
            # once a stage, where once a model is right
            return super().forward(inputs_embeds=embedded * 3, **options)

    before = type(small.model)
    small.model.__class__ = Scaled
    try:
        with (
            pytest.raises(StageError, match="can't be split. Load it on one device"),
            in_parts(small, (2, 2)),
        ):
            pass
        with in_parts(small, (4,)) as parts:
            assert len(parts) == 1
    finally:
        small.model.__class__ = before


def test_hooks_are_off_inside_and_back_afterwards(small):
    calls = []

    class Noted(AlignDevicesHook):
        def pre_forward(self, module, *args, **kwargs):
            calls.append(module)
            return args, kwargs

    modules = [small.model.layers[1], small.model.layers[2].self_attn, small.lm_head]
    for module in modules:
        add_hook_to_module(module, Noted())
    try:
        prompts = random_prompts([5, 9])
        expected = answers(small, Ids(), prompts)
        calls.clear()
        with ready(small, plan(2, 2)) as prepared:
            # by the check alone
            assert isinstance(prepared, Ready) and set(map(id, calls)) == set(map(id, modules))
            calls.clear()
            rows = sorted(generate(prepared, prompts, eos=-1, max_new_tokens=12))
            assert not calls
        assert [" ".join(map(str, row.answers[0].ids)) for row in rows] == [
            each[0].text for each in expected
        ]
        small(input_ids=torch.tensor([[1, 5]]))
        assert set(map(id, calls)) == set(map(id, modules))
    finally:
        for module in modules:
            module.forward = module._old_forward
            del module._hf_hook, module._old_forward, module.forward


@pytest.mark.parametrize("layers", [(4,), (2, 2)])
def test_too_large_a_plan_halves_finishes_and_grows_back(small, layers, monkeypatch):
    prompts = random_prompts([60] * 64)
    expected = found(small, prompts, plan(4))
    shapes, read = [], stage.Stage.read
    full = [True]

    def tight(self, x, rows, columns):
        if self.part.last:
            shapes.append(len(self.padding))
            if full[0] and self.cache.views[0][0].shape[0] > 10:
                raise torch.OutOfMemoryError("no room")
            full[0] = len(shapes) < 6  # other programs leave the card
        return read(self, x, rows, columns)

    monkeypatch.setattr(stage.Stage, "read", tight)
    assert (
        found(small, prompts, plan(*layers, cache_tokens=64 * 72), share_prefix=False) == expected
    )
    assert max(shapes[:2]) > 10 and min(shapes) <= 10 and shapes[-1] > min(shapes)


@pytest.mark.parametrize("layers", [(4,), (2, 2)])
def test_out_of_memory_frees_the_caches_before_others_are_made(small, layers, monkeypatch):
    alive, made, read = [], [], stage.Stage.read
    init = StaticCache.__init__

    def noted(self, *args):
        alive.append(sum(each() is not None for each in made))
        init(self, *args)
        made.append(weakref.ref(self))

    def tight(self, x, rows, columns):
        if self.part.last and self.cache.views[0][0].shape[0] > 2:
            raise torch.OutOfMemoryError("no room")
        return read(self, x, rows, columns)

    monkeypatch.setattr(StaticCache, "__init__", noted)
    monkeypatch.setattr(stage.Stage, "read", tight)
    gc.collect()
    gc.disable()
    try:
        found(small, random_prompts([60] * 8), plan(*layers))
    finally:
        gc.enable()
    assert len(made) >= 3 * len(layers) and max(alive) < len(layers)


@pytest.mark.parametrize("layers", [(4,), (1, 3)])
def test_a_long_row_is_not_to_blame_for_the_cache_of_others(small, layers, monkeypatch):
    prompts = random_prompts([900] + [60] * 40)
    expected = found(small, prompts, plan(*layers))
    init = StaticCache.__init__

    def tight(self, config, layers, cache_tokens, *args):
        if cache_tokens > 1100:
            raise torch.OutOfMemoryError("no room")
        init(self, config, layers, cache_tokens, *args)

    monkeypatch.setattr(StaticCache, "__init__", tight)
    assert found(small, prompts, plan(*layers, cache_tokens=2500)) == expected


def test_a_row_that_does_not_fit_is_read_in_smaller_pieces(small, monkeypatch):
    prompts = random_prompts([900])
    expected = found(small, prompts, plan(4))
    read, seen = stage.Stage.read, []

    def tight(self, x, rows, columns):
        seen.append(x.shape[1])
        if x.shape[1] > 300:
            raise torch.OutOfMemoryError("no room")
        return read(self, x, rows, columns)

    monkeypatch.setattr(stage.Stage, "read", tight)
    assert found(small, prompts, plan(4, piece=1024)) == expected
    # all but the last token stand for a prefix
    assert seen[0] == 899 and seen[1] == 450 and max(seen[2:]) <= 300


def test_a_failure_in_one_stage_ends_the_others(small, monkeypatch):
    read = stage.Stage.read

    def broken(self, x, rows, columns):
        if self.part.last and columns.start > 50:
            raise ValueError("damaged")
        return read(self, x, rows, columns)

    monkeypatch.setattr(stage.Stage, "read", broken)
    with pytest.raises(ValueError, match="damaged"):
        found(small, random_prompts([900]), plan(2, 2, piece=32))


def test_no_batch_takes_more_cells_than_planned(small, monkeypatch):
    """Columns are rounded up to multiples, but not beyond the plan, which a card of 14.7 GiB has no
    room for."""
    shapes, shape = [], StaticCache.shape

    def noted(self, rows, columns):
        shapes.append((rows, columns))
        shape(self, rows, columns)

    monkeypatch.setattr(StaticCache, "shape", noted)
    prompts = random_prompts([60, 59, 58, 57, 30, 29, 28, 5])
    whole = found(small, prompts, plan(4), new=12)
    shapes.clear()
    assert found(small, prompts, plan(2, 2, cache_tokens=300), new=12) == whole
    batches = [(rows, columns) for rows, columns in shapes if columns > 12]
    assert (
        max(rows for rows, _ in batches) == 4
        and max(rows * columns for rows, columns in batches) <= 300
    )
    assert {columns for _, columns in batches} & {64, 72}  # both kinds are there


def test_a_thread_that_waits_for_its_card_lets_another_launch():
    order, may = [], threading.Event()

    def first():
        with turns.turn():
            order.append("first launches")
            with turns.waiting():
                assert may.wait(10)
            order.append("first goes on")

    def second():
        with turns.turn():
            order.append("second launches")
            may.set()
            time.sleep(0.05)  # the first wants its turn back meanwhile
            order.append("second is done")

    with ThreadPoolExecutor(2) as pool:
        one = pool.submit(first)
        while not order:
            time.sleep(0.001)
        pool.submit(second).result(10)
        one.result(10)
    assert order == ["first launches", "second launches", "second is done", "first goes on"]
    with turns.waiting():  # without a turn there is nothing to let go
        pass


def test_turns_go_round():
    order = []

    def work(name):
        with turns.turn():
            for _ in range(3):
                order.append(name)
                turns.pause()

    with ThreadPoolExecutor(3) as pool, turns.turn():
        for number, name in enumerate("abc"):
            pool.submit(work, name)
            while len(turns._line.waiting) <= number:
                time.sleep(0.001)
    assert "".join(order) == "abcabcabc"
    with turns.turn(), turns.waiting(), turns.waiting():
        with ThreadPoolExecutor(1) as pool:  # the turn is let go once
            pool.submit(turns._line.take).result(10)
            turns._line.give()
    turns.pause()  # without a turn there is nothing to let go
