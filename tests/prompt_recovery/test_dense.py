"""A dense base (Mistral-7B's kind) where the engine's own parts are for experts: it trains and
answers the same in 16 and in 4 bits, merged and not, recomputed and not."""

import pytest
import torch
from conftest import TINY
from tiny_training import FAST, SHORT, demo_rows, lora_state, make_examples

from prompt_recovery import adapter, inputs, training
from prompt_recovery.engine import (
    GREEDY,
    TooLittleMemory,
    base_id,
    generate,
    load_base,
    ready,
    training_plan,
)
from prompt_recovery.engine.memory import GIB
from prompt_recovery.engine.planning import AnswerPlan
from prompt_recovery.recipe import Format, Recipe
from prompt_recovery.tokenizer import load_tokenizer


@pytest.fixture(params=["mistral", "nf4"])
def folder(mistral, request):
    return mistral / request.param


def build(folder):
    tok = load_tokenizer(folder)
    base = load_base(folder)
    adapter.resize_input_embeddings(base, len(tok))
    return tok, adapter.add_lora(base, base=base_id(folder), dropout=0.0)


def test_it_learns_recomputed_or_not_and_its_adapter_answers(folder, tmp_path):
    states = []
    for recomputed in (False, True):
        tok, lora = build(folder)
        examples = make_examples(tok, demo_rows(16), **SHORT)
        options = dict(max_steps=12, activation_checkpointing=recomputed)
        recipe = Recipe(output_dir=tmp_path / str(recomputed), **FAST | options)
        log = training.train(lora, tok, examples, [], recipe)
        assert log["loss"].iloc[-1] < 0.95 * log["loss"].iloc[0]
        states.append(lora_state(lora))
    assert all(torch.allclose(states[0][name], states[1][name], atol=1e-5) for name in states[0])
    adapter.save_adapter(lora, tmp_path / "adapter", Format())
    adapter.check_adapter(tmp_path / "adapter", folder)
    model, _ = inputs.load(folder, tmp_path / "adapter")
    prompts = [example["input_ids"][:n] for example, n in zip(examples, (40, 9, 25), strict=False)]
    found = {}
    for layers, merged in (((3,), False), ((3,), True), ((2, 1), False)):
        with ready(model, AnswerPlan(layers, merged, 256, 600)) as prepared:
            answers = generate(prepared, prompts, eos=2, max_new_tokens=6, sampling=GREEDY)
            found[layers, merged] = {n: each[0].ids for n, each in answers}
    assert found[(3,), False] == found[(2, 1), False]
    with torch.inference_mode():
        ids = prompts[0] + found[(3,), False][0]
        logits = model(input_ids=torch.tensor([ids])).logits[0, len(prompts[0]) - 1 : -1]
    assert logits.argmax(-1).tolist() == found[(3,), False][0]
    if folder.name == "mistral":  # in 4 bits the merged weights are rounded once more
        assert found[(3,), True] == found[(3,), False]


def test_its_plan_fits_cards_and_says_where_it_does_not(folder):
    _, lora = build(folder)
    plan = training_plan(lora, 640, 60, 16, torch.float16, free=4 * GIB)
    assert plan.rows * plan.accumulation == 16 and not plan.one_expert and not plan.kept
    small = training_plan(lora, 640, 60, 16, torch.float16, free=round(1.05 * GIB))
    assert small.rows < plan.rows or small.checkpointed > plan.checkpointed
    split = training_plan(lora, 640, 60, 16, torch.float16, free=[4 * GIB] * 2, layers=[2, 1])
    assert split.rows * split.accumulation == 16 and [card.layers for card in split.cards] == [2, 1]
    with pytest.raises(TooLittleMemory, match="one row of 640 tokens needs"):
        training_plan(lora, 640, 60, 16, torch.float16, free=GIB)


def test_an_adapter_of_the_dense_base_is_none_of_the_mixture(folder, tmp_path):
    _, lora = build(folder)
    with torch.no_grad():
        for name, weight in lora.named_parameters():
            if "lora_B" in name:
                weight.fill_(0.01)
    adapter.save_adapter(lora, tmp_path / "adapter", Format())
    with pytest.raises(adapter.AdapterError):
        adapter.check_adapter(tmp_path / "adapter", TINY)
