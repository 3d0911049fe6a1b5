"""Logits that overflow or are no numbers: no answer is read from them, and the rows beside them are
none the worse."""

import random

import pytest
import torch
from conftest import TINY, answer_test
from peft import LoraConfig, get_peft_model
from tiny_models import random_model, random_prompts
from tiny_submission import FALLBACK, OPTIONS, read, rows
from transformers import MixtralConfig

from prompt_recovery import answers, inputs, submission_answers, submission_file
from prompt_recovery.engine import GREEDY, Answer, Sampling, generate, ready
from prompt_recovery.engine.planning import AnswerPlan
from prompt_recovery.recipe import Format
from prompt_recovery.tokenizer import encode_row

NEW = 12  # tokens of an answer
NONE = Answer([], "not finite")
WAYS = [GREEDY, Sampling(1, 1.0), Sampling(3, 1.0, 0.95, 7)]


def half_model():
    """In fp16, with attention that adds some hundreds to the hidden state, which alone does not
    overflow."""
    base = random_model(MixtralConfig, num_local_experts=4, num_experts_per_tok=2).half()
    base.set_experts_implementation("eager")
    with torch.no_grad():
        for layer in base.model.layers:
            layer.self_attn.o_proj.weight.mul_(64)
    return base


def mark(base, token):
    """Make a token's embedding as large as fp16 has it: what is added to it overflows."""
    with torch.no_grad():
        base.get_input_embeddings().weight[token] = torch.finfo(torch.float16).max


def answered(base, prompts, sampling=GREEDY, **options):
    found = generate(base, prompts, eos=-1, max_new_tokens=NEW, sampling=sampling, **options)
    return dict(sorted(found))


def healthy(found):
    return all(
        len(ids) == NEW and ended == "length" for each in found.values() for ids, ended in each
    )


@pytest.fixture(scope="module")
def prompts():
    """Prompts of several lengths that begin alike."""
    return random_prompts([9, 30, 12, 12, 25, 3, 18], shared=2)


def ids_in(prompts, found=None):
    every = [*prompts, *(answer.ids for each in (found or {}).values() for answer in each)]
    return {token for ids in every for token in ids} | {0}


# --- generate -------------------------------------------------------------------------------------


@pytest.mark.parametrize("layers", [(2,), (1, 1)])
def test_the_batches_after_it_are_none_the_worse(layers):
    """They get the memory of its keys and values."""
    base = half_model()
    mark(base, 96)
    lengths = [200, 150, 30, 20, 10, 9, 8]
    prompts = [
        [1, *map(random.Random(seed).randrange, [3] * n, [96] * n)]
        for seed, n in enumerate(lengths)
    ]
    with ready(base, AnswerPlan(layers, False, 16_384, 300)) as prepared:
        good = answered(prepared, prompts)
        prompts[0][100] = 96
        found = answered(prepared, prompts)
    assert healthy(good) and found.pop(0) == [NONE]
    assert found == {position: answers for position, answers in good.items() if position}


@pytest.mark.parametrize("sampling", WAYS, ids=["greedy", "one drawn", "three"])
def test_weights_too_large_for_fp16_give_no_answer(prompts, sampling):
    base = half_model()
    assert healthy(answered(base, prompts, sampling))
    with torch.no_grad():
        base.lm_head.weight.mul_(1e8)  # infinite, where they are not 0
    expected = {n: [NONE] * sampling.answers for n in range(len(prompts))}
    assert answered(base, prompts, sampling) == expected
    base = half_model()
    with torch.no_grad():
        for layer in base.model.layers:
            layer.self_attn.o_proj.weight.copy_(6e4 * layer.self_attn.o_proj.weight.sign())
    assert all(weight.isfinite().all() for weight in base.parameters())  # what they add is not
    assert answered(base, prompts, sampling) == expected


@pytest.mark.parametrize("layers", [(2,), (1, 1)])
@pytest.mark.parametrize("sampling", WAYS, ids=["greedy", "one drawn", "three"])
def test_a_damaged_head_is_no_fault_of_stages_or_of_merging(prompts, sampling, layers, capsys):
    """Neither can be checked then; the adapter stays unmerged, the layers are split, the rows say
    why."""
    base = half_model()
    lora = get_peft_model(base, LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False))
    with torch.no_grad():
        base.lm_head.weight[7] = float("nan")
    with ready(lora, AnswerPlan(layers, True, 16_384, 300)) as prepared:
        assert not prepared.plan.merged and "not finite before merging" in capsys.readouterr().out
        found = answered(prepared, prompts, sampling)
    assert found == {n: [NONE] * sampling.answers for n in range(len(prompts))}


@pytest.mark.parametrize("place", [40, 100, 199])
def test_prompts_longer_than_what_is_checked_at_load_are_looked_at_whole(place):
    """Merging and stages are checked on 32 tokens; a row that overflows behind them is none."""
    base = half_model()
    lora = get_peft_model(base, LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False))
    mark(base, 96)
    prompts = [[1, *random_prompts([199])[0][:199]] for _ in range(2)]
    prompts = [[token if token != 96 else 5 for token in prompt] for prompt in prompts]
    prompts[1][place] = 96
    for layers in ((2,), (1, 1)):
        with ready(lora, AnswerPlan(layers, True, 16_384, 600)) as prepared:
            assert prepared.plan.merged
            found = answered(prepared, prompts)
        assert found[1] == [NONE] and healthy({0: found[0]})


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("sampling", WAYS, ids=["greedy", "one drawn", "three"])
def test_one_row_of_the_head_that_is_no_number_is_enough(prompts, sampling, value):
    """Of an infinite one the logit is infinite, or no number."""
    base = half_model()
    with torch.no_grad():
        base.lm_head.weight[7] = value
    found = answered(base, prompts, sampling)
    assert found == {n: [NONE] * sampling.answers for n in range(len(prompts))}


@pytest.mark.parametrize("sampling", WAYS, ids=["greedy", "one drawn", "three"])
@pytest.mark.parametrize("share_prefix", [True, False])
def test_rows_beside_one_that_overflows_answer_as_without_it(prompts, sampling, share_prefix):
    base, bad = half_model(), [1, 3]
    options = dict(share_prefix=share_prefix)
    calm = answered(base, prompts, sampling, **options)
    assert healthy(calm)
    token = min(set(range(97)) - ids_in(prompts, calm))
    mark(base, token)
    assert answered(base, prompts, sampling, **options) == calm
    mixed = [prompt[:-2] + [token, 5] if n in bad else prompt for n, prompt in enumerate(prompts)]
    found = answered(base, mixed, sampling, **options)
    for n in range(len(prompts)):
        assert found[n] == ([NONE] * sampling.answers if n in bad else calm[n]), n
    rest = [n for n in range(len(prompts)) if n not in bad]
    alone = answered(base, [prompts[n] for n in rest], sampling, numbers=rest, **options)
    assert {rest[n]: each for n, each in alone.items()} == {n: calm[n] for n in rest}


def test_a_prefix_that_overflows_leaves_no_answer(prompts):
    base, token = half_model(), min(set(range(97)) - ids_in(prompts))
    mark(base, token)
    found = answered(base, [[1, token, *prompt[1:]] for prompt in prompts])
    assert found == {n: [NONE] for n in range(len(prompts))}


@pytest.mark.parametrize("sampling", [GREEDY, Sampling(3, 1.0, 1.0, 7)], ids=["greedy", "three"])
def test_an_answer_that_overflows_on_the_way_is_none_and_the_others_stay(prompts, sampling):
    """The tokens until then were finite, but the answer they begin is lost."""
    base = half_model()
    calm = answered(base, prompts, sampling)
    every = [answer.ids for each in calm.values() for answer in each]

    def lost(token):
        return [token in ids[:-1] for ids in every]

    # the token at which about half of the answers would overflow
    usable = set(range(97)) - ids_in(prompts)
    token = min(usable, key=lambda token: abs(sum(lost(token)) - len(every) / 2))
    assert 0 < sum(lost(token)) < len(every)
    mark(base, token)
    found = [answer for each in answered(base, prompts, sampling).values() for answer in each]
    expected = [
        NONE if gone else Answer(ids, "length")
        for gone, ids in zip(lost(token), every, strict=True)
    ]
    assert found == expected


# --- rows and submission.csv ----------------------------------------------------------------------


@pytest.fixture
def broken():
    """The tiny model, one row of whose head is no number."""
    base, tok = inputs.load(TINY, None)
    with torch.no_grad():
        base.lm_head.weight[5] = float("nan")
    return base, tok


SETTINGS = dict(
    format=Format(),
    max_tokens=400,
    max_new_tokens=4,
    description=None,
)


@pytest.mark.parametrize("share", [1, 3])
def test_rows_get_the_fallback_and_one_line_counts_them(broken, capsys, share):
    capsys.readouterr()
    sampling = Sampling(share, 0.8 if share > 1 else 0.0)
    found = dict(answers.answer_rows(*broken, rows(5), sampling=sampling, **SETTINGS))
    expected = [answers.Recovered(None, "nothing", "not finite", 0)] * share
    assert found == {n: expected for n in range(5)}
    said = capsys.readouterr().out
    assert said.startswith(f"{5 * share} answers are none") and said.count("\n") == 1
    assert "not finite" in said and "float32" in said


def test_sound_rows_print_nothing(capsys):
    loaded = inputs.load(TINY, None)
    capsys.readouterr()
    found = dict(answers.answer_rows(*loaded, rows(5), **SETTINGS))
    assert all(each.stopped != "not finite" for one in found.values() for each in one)
    assert capsys.readouterr().out == ""


def test_the_submission_says_why_and_holds_the_fallback(broken, tmp_path, capsys):
    out = tmp_path / "s.csv"
    report = answer_test(*broken, rows(6), out, **OPTIONS)
    assert set(report["how"]) == {"logits not finite"} and set(report["source"]) == {"fallback"}
    assert set(report["answer"]) == {FALLBACK} == set(read(out)["rewrite_prompt"])
    assert report["tokens"].sum() == 0
    said = capsys.readouterr().out
    assert "0 by the model, 6 by the fallback (6 logits not finite)" in said
    submission_file.check_submission(rows(6), out)
    # the journal knows it: a restart says the same, and asks the model nothing
    again = answer_test(None, None, rows(6), out, **OPTIONS)
    assert again.equals(report)


def test_rows_without_an_answer_raise_nothing(broken, tmp_path):
    """Nor does the estimate of the time left when no token at all was written: after so many rows
    that raise, the others would be given up."""
    test = rows(submission_answers.GIVE_UP + 1)
    report = answer_test(*broken, test, tmp_path / "s.csv", **OPTIONS, slice_rows=1)
    assert set(report["how"]) == {"logits not finite"}


def test_only_the_rows_that_break_keep_the_fallback(tmp_path, capsys):
    base, tok = inputs.load(TINY, None)
    test = rows(12)
    calm = answer_test(base, tok, test, tmp_path / "calm.csv", **OPTIONS)

    def ids(table):
        options = dict(max_tokens=396, format=Format())
        return [encode_row(tok, row, **options)[0] for row in table.to_dict("records")]

    before = {token for prompt in ids(test) for token in prompt}
    bad = [2, 7]
    test.loc[bad, "original_text"] += " 漢"
    token = next(token for token in ids(test)[2] if token not in before)
    with torch.no_grad():
        base.get_input_embeddings().weight[token] = float("nan")
    report = answer_test(base, tok, test, tmp_path / "s.csv", **OPTIONS)
    assert report.index[report["how"] == "logits not finite"].to_list() == bad
    assert report.loc[bad, "answer"].to_list() == [FALLBACK] * 2
    kept = [n for n in range(12) if n not in bad]
    assert (
        report.loc[kept].equals(calm.loc[kept])
        and "(2 logits not finite" in capsys.readouterr().out
    )
