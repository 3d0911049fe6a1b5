"""Answers by their effects: those of transformers' own `generate`, for any batch; what sampling,
stopping, running out of memory or time and merging do to them."""

import random
from itertools import pairwise

import numpy as np
import pytest
import torch
from conftest import NASTY, TINY
from tiny_models import (
    Ids,
    Text,
    answers,
    random_model,
    random_prompts,
    run,
    stock,
    with_lora,
)
from transformers import LlamaConfig, MixtralConfig
from transformers.generation import TemperatureLogitsWarper, TopPLogitsWarper

from prompt_recovery.engine import (
    MergeError,
    Meter,
    batching,
    decoding,
    generation,
    loading,
    merged,
)
from prompt_recovery.engine.batching import make_batches, spread_order
from prompt_recovery.engine.parts import in_parts
from prompt_recovery.tokenizer import encode_row, load_tokenizer


@pytest.fixture(scope="module")
def tok():
    return load_tokenizer(TINY, pad="unk", side="left")


@pytest.fixture(scope="module")
def prompts(tok):
    texts = [*NASTY, "", "short", "A letter to Rosa. " * 12]
    return [
        encode_row(tok, {"original_text": t, "rewritten_text": t}, max_tokens=400)[0] for t in texts
    ]


@pytest.fixture(scope="module")
def lora():
    return with_lora(loading.load_base(TINY))


@pytest.fixture(scope="module")
def small():
    base = random_model(MixtralConfig, num_local_experts=4, num_experts_per_tok=2)
    base.set_experts_implementation("eager")
    return base


def first(found):
    return [each[0] for each in found]


class Forwards:
    """Inside the with block, (rows, columns) of the ids of each forward pass; `before` is called
    with them."""

    def __init__(self, base, before=lambda rows, columns: None):
        self.shapes, self.before, self.module = [], before, base.get_input_embeddings()

    def __enter__(self):
        def note(module, args):
            self.before(*args[0].shape)
            self.shapes.append(tuple(args[0].shape))

        self.hook = self.module.register_forward_pre_hook(note)
        return self.shapes

    def __exit__(self, *_):
        self.hook.remove()


# --- greedy ---------------------------------------------------------------------------------------


def test_greedy_answers_are_transformers_own_for_any_batch(lora, tok, prompts):
    found = first(answers(lora, tok, prompts))
    for prompt, answer in zip(prompts, found, strict=True):
        ids = stock(lora, prompt)
        ended = ids[-1] == 2
        assert answer == (
            tok.decode(ids[: len(ids) - ended]),
            len(ids),
            "eos" if ended else "length",
        )
    for options in (
        dict(batch_tokens=1),
        dict(batch_tokens=900, share_prefix=False),
        dict(answers_per_row=2),
    ):
        assert first(answers(lora, tok, prompts, **options)) == found, options
    base = lora.get_base_model()
    with lora.disable_adapter():
        plain = [tok.decode(ids) for ids in (stock(base, prompt) for prompt in prompts)]
    # the LoRA matters
    assert sum(a != b.text for a, b in zip(plain, found, strict=True)) > len(prompts) / 2


CASES = [  # lengths, tokens the prompts begin with alike, max_new_tokens, how EOS is chosen
    ([1], 0, 1, "never"),
    ([1] * 64, 0, 3, "never"),
    ([4096, 1, 700], 0, 3, "never"),
    ([random.Random(1).randrange(1, 90) for _ in range(64)], 0, 17, "often"),
    ([random.Random(2).randrange(21, 90) for _ in range(33)], 20, 17, "at once"),
    ([2, 300, 64, 65, 63, 127, 128, 129, 20, 20, 20], 19, 8, "often"),
    ([40] * 7, 37, 16, "often"),
    ([40, 40], 40, 16, "never"),  # the same prompt twice
]


@pytest.mark.parametrize(("lengths", "shared", "new", "eos"), CASES)
def test_any_length_and_any_batch(small, lengths, shared, new, eos):
    prompts = random_prompts(lengths, seed=len(lengths), shared=shared)
    some = range(0, len(prompts), 1 + len(prompts) // 20)
    free = [stock(small, prompts[n], new, eos=-1) for n in some]
    counts = np.bincount(
        [ids[0] if eos == "at once" else token for ids in free for token in ids], minlength=97
    )
    stop = -1 if eos == "never" else int(counts.argmax())
    ended = [ids[: ids.index(stop) + 1] if stop in ids else ids for ids in free]
    if eos != "never":
        assert len(set(map(len, ended))) > 1 and (1 in map(len, ended) or eos == "often")
    want = [
        (
            " ".join(map(str, ids[: len(ids) - (ids[-1] == stop)])),
            len(ids),
            "eos" if ids[-1] == stop else "length",
        )
        for ids in ended
    ]
    for options in (dict(), dict(batch_tokens=4000, share_prefix=False)):
        found = first(answers(small, Ids(stop), prompts, new, **options))
        assert [found[n] for n in some] == want, options


def test_other_models_answer_as_in_transformers():
    base = random_model(LlamaConfig, head_dim=16)
    prompts = random_prompts([3, 70, 5], shared=2)
    want = [" ".join(map(str, stock(base, prompt, eos=-1))) for prompt in prompts]
    assert [answer.text for answer in first(answers(base, Ids(), prompts))] == want


def test_a_four_bit_folder_answers_as_in_transformers(tmp_path, tok, prompts):
    four_bit = loading.load_base(TINY, four_bit=True)
    folder = loading.save_quantised(four_bit, TINY, tmp_path / "nf4")
    base = loading.load_base(folder)
    some = prompts[::3]
    want = [tok.decode(stock(base, prompt), skip_special_tokens=True) for prompt in some]
    assert [answer.text for answer in first(answers(base, tok, some))] == want


def test_the_prefix_is_read_once_and_answers_of_a_row_share_what_was_read(small):
    prompts = random_prompts([50, 60, 55], shared=40)
    with Forwards(small) as shapes:
        answers(small, Ids(), prompts, 3, answers_per_row=4, temperature=1.0)
    assert shapes == [(1, 41), (3, 19), (12, 1), (12, 1)]
    with Forwards(small) as shapes:
        answers(small, Ids(), prompts, 1, share_prefix=False)
    assert shapes == [(3, 60)]


def test_long_prefills_go_in_parts(small):
    prompts = random_prompts([100] * 5, shared=9)
    with in_parts(small) as parts, Forwards(small) as shapes:
        decoder = decoding.Decoder(
            parts,
            prompts[0][:10],
            rows=5,
            cache_tokens=5 * 128,
            max_new_tokens=2,
            eos=-1,
            pad=0,
            piece=200,
        )
        found = decoder.answer(prompts, [[None]] * 5)
    assert shapes == [(1, 10), (2, 90), (2, 90), (1, 90), (5, 1)]
    assert [each[0] for each in found] == [
        (stock(small, prompt, 2, eos=-1), False) for prompt in prompts
    ]


def test_finished_rows_leave_the_batch(small):
    prompts = random_prompts([10] * 20, shared=3)
    free = [
        [*map(int, answer.text.split())] for answer in first(answers(small, Ids(), prompts, 64))
    ]
    # the token that ends most rows, but not all
    ends = {
        token: [ids.index(token) if token in ids else 99 for ids in free] for token in range(97)
    }
    stop = min(ends, key=lambda token: abs(np.mean([end < 40 for end in ends[token]]) - 0.8))
    with Forwards(small) as shapes:
        found = first(answers(small, Ids(stop), prompts, 64))
    steps = [rows for rows, columns in shapes if columns == 1]
    assert steps[0] == 20 and steps[-1] <= 8 and set(steps[1:]) <= {20, *decoding.ROWS}
    assert all(a >= b for a, b in pairwise(steps))
    assert [answer.tokens for answer in found] == [min(64, end + 1) for end in ends[stop]]


# --- sampling -------------------------------------------------------------------------------------


def test_samples_follow_seed_row_and_number_and_not_the_batch(lora, tok, prompts):
    prompts = prompts[:7]
    options = dict(temperature=1.5, top_p=0.95, answers_per_row=3)
    found = answers(lora, tok, prompts, seed=1, **options)
    assert found == answers(
        lora, tok, prompts, seed=1, batch_tokens=1500, share_prefix=False, **options
    )
    part = [5, 2, 6]
    assert [found[n] for n in part] == answers(
        lora, tok, [prompts[n] for n in part], seed=1, numbers=part, batch_tokens=1, **options
    )
    other = answers(lora, tok, prompts, seed=2, **options)
    # the first answer is greedy
    assert first(other) == first(found) == first(answers(lora, tok, prompts))
    for a, b in zip(found, other, strict=True):
        assert len({*a[1:], *b[1:]}) > 2
    drawn = first(answers(lora, tok, prompts, temperature=1.5))
    assert drawn != first(found) and drawn == first(answers(lora, tok, prompts, temperature=1.5))


@pytest.mark.parametrize(
    ("temperature", "top_p"), [(1.0, 1.0), (0.7, 0.9), (1.5, 0.5), (1.0, 0.0), (3.0, 1.0)]
)
def test_draws_have_transformers_distribution(temperature, top_p):
    logits = torch.randn(3, 50, generator=torch.Generator().manual_seed(0)) * 3
    expected = TopPLogitsWarper(top_p)(
        None, TemperatureLogitsWarper(temperature)(None, logits)
    ).softmax(-1)
    grid = 20_000
    draws = (torch.arange(grid, dtype=torch.float64) + 0.5) / grid
    for row, probabilities in zip(logits, expected, strict=True):
        tokens = decoding.sample(row.expand(grid, -1), draws, temperature, top_p)
        found = torch.bincount(tokens, minlength=50) / grid
        assert (found - probabilities).abs().max() < 1e-4
        assert not found[probabilities == 0].any()


# --- stopping -------------------------------------------------------------------------------------


class Braces(Ids):
    """Reads ids as the inside of a JSON object, which one token in seven closes."""

    def decode(self, ids, skip_special_tokens=True):
        return '{"prompt": "' + "".join('"} ' if token % 7 == 0 else "x" for token in ids)


def test_answers_stop_where_their_object_closes(small, monkeypatch):
    prompts = random_prompts([10] * 20)
    braces = Braces()
    want = []
    for ids in (stock(small, prompt, 30, eos=-1) for prompt in prompts):
        closed = next((n + 1 for n, token in enumerate(ids) if token % 7 == 0), None)
        want.append(
            Text(
                braces.decode(ids[:closed]).rstrip(" "),
                closed or 30,
                "stop" if closed else "length",
            )
        )
    assert len({answer.tokens for answer in want}) > 5
    steps = []
    for check in (1, 3, 8, 100):
        monkeypatch.setattr(decoding, "CHECK", check)
        with Forwards(small) as shapes:
            found = first(answers(small, braces, prompts, 30, stop_at_object=True))
        assert [a._replace(text=a.text.rstrip(" ")) for a in found] == want, check
        steps.append(sum(rows for rows, columns in shapes if columns == 1))
    assert steps == sorted(steps) and steps[0] < steps[-1]
    assert {answer.stopped for answer in first(answers(small, braces, prompts, 30))} == {"length"}


def test_json_answers_are_cut_at_the_closing_brace(lora, tok, monkeypatch):
    text = '{"prompt": "say {this}"}'
    ids = tok(text, add_special_tokens=False)["input_ids"]
    more = tok(text + " and more", add_special_tokens=False)["input_ids"]

    choose = decoding.Decoder.choose

    def cut(tokens, stop_at_object):
        """The answer where the model writes these."""

        def told(decoder, logits, rows):
            only = torch.zeros_like(logits)
            only[:, tokens[decoder.number]] = 1
            choose(decoder, only, rows)

        monkeypatch.setattr(decoding.Decoder, "choose", told)
        ((found,),) = answers(lora, tok, [[1]], len(tokens), stop_at_object=stop_at_object)
        return found

    for tokens in (ids, more, [*ids, 2], [*more, 2]):
        assert cut(tokens, True) == (text, len(ids), "stop")
    assert cut([*ids, 2], False) == (text, len(ids) + 1, "eos")
    assert cut(ids, False) == (text, len(ids), "length")
    assert cut([2], True) == ("", 1, "eos")


# --- batches, memory and time ---------------------------------------------------------------------


def test_batches_hold_the_budget_and_every_row_once():
    lengths = [5, 900, 20, 20, 400, 5, 3000, 1]
    batches = make_batches(lengths, 10, 1000)
    assert sorted(i for batch in batches for i in batch) == list(range(8))
    assert batches[0] == [6]  # over the budget by itself: alone
    for batch in batches[1:]:
        assert (max(lengths[i] for i in batch) + 10) * len(batch) <= 1000
    assert make_batches([], 10, 1000) == []
    assert max(map(len, make_batches([1] * 1000, 1, 10**6))) == batching.MOST_ROWS
    for count in range(20):
        spread = spread_order([[n] for n in range(count)])
        assert sorted(spread) == [[n] for n in range(count)] and spread[:1] == [[0]][:count]


def test_out_of_memory_halves_the_batch_and_goes_on(small):
    prompts = random_prompts([400, 390, 380, 370, *([20] * 30)])
    want = answers(small, Ids(), prompts)
    # cache tokens (of all rows) that fit, and rows that short ones are still read by
    for most, many in ((1700, 20), (900, 12), (420, 6)):
        refused = []

        def refuse(rows, columns, most=most, refused=refused):
            if columns > 1 and rows * columns > most:
                refused.append(rows)
                raise torch.OutOfMemoryError("injected")

        with Forwards(small, refuse) as shapes:
            assert answers(small, Ids(), prompts, batch_tokens=2500) == want
        assert refused
        assert max(rows for rows, columns in shapes if columns == 1) >= many
    with (
        Forwards(small, lambda rows, columns: refuse(10**9, columns)),
        pytest.raises(torch.OutOfMemoryError, match="One prompt of 400 tokens"),
    ):
        answers(small, Ids(), prompts)


def test_out_of_memory_while_decoding_keeps_what_is_finished(small):
    prompts = random_prompts([100] * 8 + [30] * 8)
    want = dict(enumerate(answers(small, Ids(), prompts)))
    refused, yielded = [], []

    def refuse(rows, columns):
        if columns == 1 and rows > 3 and yielded:
            refused.append(rows)
            raise torch.OutOfMemoryError("injected")

    with Forwards(small, refuse):
        for position, found in run(small, Ids(), prompts, batch_tokens=1000):
            assert found == want.pop(position)
            yielded.append(position)
    assert not want and refused and len(yielded) == 16


class Clock:
    """A clock that only the model's work moves on: by what a forward pass, its rows and its tokens
    cost."""

    def __init__(self, monkeypatch, token, row, step):
        self.now, self.costs = 0.0, (token, row, step)
        for module in (generation, decoding):
            monkeypatch.setattr(module, "time", self)

    def monotonic(self):
        return self.now

    def work(self, rows, columns):
        token, row, step = self.costs
        self.now += step + row * rows + token * rows * columns


@pytest.mark.parametrize("costs", [(1e-3, 0, 0.05), (1e-4, 0.02, 0.0), (1e-3, 0.004, 0.02)])
def test_the_time_left_is_right_within_a_fifth_after_a_tenth(small, monkeypatch, costs):
    lengths = (
        np.clip(np.random.default_rng(0).lognormal(4.5, 0.8, 200), 5, 600).astype(int).tolist()
    )
    clock, meter, seen = Clock(monkeypatch, *costs), Meter(), []
    with Forwards(small, clock.work):
        for _ in run(small, Ids(), random_prompts(lengths), 8, batch_tokens=1500, meter=meter):
            seen.append((clock.now, meter.left))
    for now, left in seen:
        if 0.1 * clock.now <= now <= 0.9 * clock.now:
            assert abs(left / (clock.now - now) - 1) < 0.2, (now / clock.now, left, clock.now - now)
    assert seen[-1][1] == 0 and meter.seconds == meter.wall == pytest.approx(clock.now)
    assert (meter.rows, meter.tokens_in, meter.tokens_out) == (200, sum(lengths), 1600)
    assert "200 rows" in str(meter) and f"{sum(lengths)} tokens read" in str(meter)


def test_no_batch_ends_after_the_deadline(small, monkeypatch):
    prompts = random_prompts([50] * 40)
    assert list(run(small, Ids(), prompts, 4, deadline=0.0)) == []
    clock = Clock(monkeypatch, 0, 0, 1.0)
    with Forwards(small, clock.work):
        found = dict(run(small, Ids(), prompts, 4, batch_tokens=300, deadline=30.5))
    assert 0 < len(found) < 40 and 26 < clock.now <= 30.5


# --- merging --------------------------------------------------------------------------------------


def logits(base):
    with torch.inference_mode():
        return base(torch.tensor([[1, 300, 400, 500, 7]])).logits.float()


@pytest.mark.parametrize(("dtype", "four_bit"), [(torch.float32, False), (torch.bfloat16, True)])
def test_merging_keeps_the_logits_and_is_undone_tensor_for_tensor(dtype, four_bit, tok, prompts):
    base = loading.load_base(TINY, dtype, four_bit)
    bare = logits(base)
    lora = with_lora(base)
    before, modules = logits(lora), dict(base.named_modules())
    with merged(lora) as fast:
        assert fast is base and not any("lora_" in name for name, _ in base.named_parameters())
        weight = fast.model.layers[0].self_attn.q_proj.weight
        assert weight.dtype == dtype and weight.shape == (fast.config.hidden_size,) * 2
        moved = logits(fast)
        assert (moved - before).norm() / before.norm() < 8 * torch.finfo(dtype).eps
        assert (moved - bare).norm() / bare.norm() > 0.1
    assert dict(base.named_modules()) == modules and torch.equal(logits(lora), before)
    with pytest.raises(KeyError), merged(lora):
        raise KeyError
    left = run(lora, tok, prompts, 2, batch_tokens=1)
    next(left)
    left.close()  # as when the loop over it is left
    assert dict(base.named_modules()) == modules and torch.equal(logits(lora), before)
    lora.unload()
    assert torch.equal(logits(base), bare)
    with merged(with_lora(base, seed=1)) as fast:  # another adapter
        assert (logits(fast) - before).norm() / before.norm() > 0.1
    with merged(base.eval()) as same:
        assert same is base


def test_a_merge_that_changes_the_logits_is_refused_and_undone():
    # dropout: what it computes is not what the weights say
    lora = with_lora(loading.load_base(TINY)).train()
    modules = dict(lora.named_modules())
    with pytest.raises(MergeError, match="moved the logits by"), merged(lora):
        pytest.fail("it must not be used")
    assert dict(lora.named_modules()) == modules
