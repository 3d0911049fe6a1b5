"""A tiny model to train in a second or two, and rows."""

import pandas as pd
import torch
from conftest import ROOT, TINY

from prompt_recovery import adapter
from prompt_recovery.engine import loading
from prompt_recovery.examples import usable_examples
from prompt_recovery.recipe import Format
from prompt_recovery.tokenizer import load_tokenizer

OPTIONS = dict(max_tokens=320, format=Format())
SHORT = OPTIONS | dict(max_tokens=120)
FAST = dict(learning_rate=5e-3, batch_size=8, gradient_accumulation=1)


def demo_rows(n):
    return pd.read_csv(ROOT / "demo" / "rows.csv", dtype=str).head(n)


def build(pad="<pad>", dropout=0.0):
    torch.manual_seed(0)
    tok = load_tokenizer(TINY, pad=pad)
    base = loading.load_base(TINY)
    adapter.resize_input_embeddings(base, len(tok))
    return tok, adapter.add_lora(base, base="tiny-mixtral", dropout=dropout, seed=0)


def lora_state(lora):
    return {name: p.detach().clone() for name, p in lora.named_parameters() if "lora" in name}


def make_examples(tok, rows, **options):
    """The examples of rows that can all be taught."""
    kept, by_id, _ = usable_examples(tok, rows, **options)
    assert len(kept) == len(rows)
    return list(by_id.values())
