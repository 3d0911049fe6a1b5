"""Tiny models with random weights, prompts for them, and what transformers answers."""

import random
from typing import NamedTuple

import torch
from transformers import AutoModelForCausalLM

from prompt_recovery import adapter
from prompt_recovery.engine import Sampling, generation
from prompt_recovery.json_answers import json_object_closed

NEW = 12


def with_lora(base, seed=0, size=0.1):
    """A LoRA that changes most answers."""
    lora = adapter.add_lora(base, base="tiny-mixtral", r=4, seed=seed)
    for name, weight in lora.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(weight, 0, size)
    return lora.eval()


class Text(NamedTuple):
    """An answer, decoded."""

    text: str
    tokens: int
    stopped: str


class Ids:
    """A tokenizer for the ids of a model that never saw text."""

    def __init__(self, eos=-1):
        self.eos_token_id = eos

    def decode(self, ids, skip_special_tokens=True):
        return " ".join(map(str, ids))


def random_model(config, **options):
    torch.manual_seed(0)
    options = (
        dict(
            vocab_size=97,
            hidden_size=32,
            intermediate_size=32,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=8192,
            initializer_range=0.3,
        )
        | options
    )
    return AutoModelForCausalLM.from_config(config(**options)).eval()


def random_prompts(lengths, seed=0, shared=0):
    """Prompts of random ids that begin alike."""
    draw = random.Random(seed)
    prefix = [1] + [draw.randrange(3, 97) for _ in range(shared)]
    return [
        (prefix + [draw.randrange(3, 97) for _ in range(length)])[: max(1, length)]
        for length in lengths
    ]


def closes(tok):
    return lambda ids: json_object_closed(tok.decode(ids, skip_special_tokens=True))


def read(tok, answer):
    ids, ended = answer
    text = tok.decode(ids[: len(ids) - (ended == "eos")], skip_special_tokens=True)
    return Text(text, len(ids), ended)


def run(base, tok, prompts, max_new_tokens=NEW, stop_at_object=False, **options):
    """`generate` as (position, texts), with the fields of Sampling among the options."""
    fields = {
        "answers_per_row": "answers",
        "temperature": "temperature",
        "top_p": "top_p",
        "seed": "seed",
    }
    sampling = Sampling(
        **{field: options.pop(name) for name, field in fields.items() if name in options}
    )
    options |= dict(stop=closes(tok)) if stop_at_object else {}
    for position, found in generation.generate(
        base,
        prompts,
        eos=tok.eos_token_id,
        max_new_tokens=max_new_tokens,
        sampling=sampling,
        **options,
    ):
        yield position, [read(tok, answer) for answer in found]


def answers(base, tok, prompts, max_new_tokens=NEW, **options):
    found = list(run(base, tok, prompts, max_new_tokens, **options))
    assert sorted(position for position, _ in found) == list(range(len(prompts)))  # every row once
    return [each for _, each in sorted(found)]


def stock(base, prompt, max_new_tokens=NEW, eos=2):
    """The ids of transformers' own greedy answer, up to and with EOS."""
    ids = torch.tensor([prompt])
    out = base.generate(
        input_ids=ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=max_new_tokens,
        do_sample=False,
        pad_token_id=0,
        eos_token_id=eos,
    )
    return out[0, len(prompt) :].tolist()
