import pytest
import torch
from conftest import NASTY, TINY

from prompt_recovery import generation, model
from prompt_recovery.generation import make_batches
from prompt_recovery.tokenizer import encode_row, load_tokenizer


@pytest.fixture(scope="module")
def tiny():
    return model.load_base(TINY), load_tokenizer(TINY, pad="unk", side="left")


@pytest.fixture(scope="module")
def prompts(tiny):
    texts = [*NASTY, "short", "A letter to Rosa. " * 12]
    return [encode_row(tiny[1], {"original_text": t, "rewritten_text": t}, max_tokens=400)[0] for t in texts]


def run(tiny, prompts, **options):
    pairs = list(generation.generate(*tiny, prompts, max_new_tokens=12, **options))
    assert sorted(position for position, _ in pairs) == list(range(len(prompts)))  # every row once
    return [answers[0] if len(answers) == 1 else answers for _, answers in sorted(pairs, key=lambda pair: pair[0])]


def test_batched_equals_one_by_one_and_transformers_own(tiny, prompts):
    single = [run(tiny, [prompt])[0] for prompt in prompts]
    assert run(tiny, prompts) == single == run(tiny, prompts, batch_tokens=900)
    for prompt, answer in zip(prompts, single, strict=True):
        ids = torch.tensor([prompt])
        out = tiny[0].generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=12, do_sample=False, pad_token_id=0
        )
        assert tiny[1].decode(out[0, len(prompt) :], skip_special_tokens=True) == answer.text


def test_samples_follow_the_seed(tiny, prompts):
    options = dict(temperature=1.5, top_p=0.95)
    first = run(tiny, prompts, seed=1, **options)
    assert first == run(tiny, prompts, seed=1, **options) != run(tiny, prompts, seed=2, **options)


def test_batches_hold_the_budget_and_every_row_once():
    lengths = [5, 900, 20, 20, 400, 5, 3000, 1]
    batches = make_batches(lengths, 10, 1000)
    assert sorted(i for batch in batches for i in batch) == list(range(8))
    assert batches[0] == [6]  # over the budget by itself: alone
    for batch in batches[1:]:
        assert (max(lengths[i] for i in batch) + 10) * len(batch) <= 1000
    assert make_batches([], 10, 1000) == []


def test_a_passed_deadline_yields_nothing(tiny, prompts):
    assert list(generation.generate(*tiny, prompts, max_new_tokens=4, deadline=0.0)) == []


def test_json_answers_stop_at_the_closing_brace():
    tok = load_tokenizer(TINY)
    text = '{"prompt": "say {this}"}'
    ids = tok(text, add_special_tokens=False)["input_ids"]
    more = tok(text + " and more", add_special_tokens=False)["input_ids"]
    assert generation._answer(tok, ids, True) == (text, len(ids), "object")
    assert generation._answer(tok, more, True) == (text, len(ids), "object")  # as if it had been looked at every token
    assert generation._answer(tok, [*ids, 2], True) == (text, len(ids), "object")
    assert generation._answer(tok, ids, False).stopped == "length"
