"""Keys of what a result depends on: answers and checkpoints are kept under them, and taken up again
by a run of the same key alone.

A key is made of what goes in, never of names or places: token ids, weights, bytes, settings.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerFast

from prompt_recovery.adapter_files import digests

# Of the code that reads a prompt from an answer (templates, unwrap). A change of what it finds
# raises the number, else kept answers stay as they were read; test_keys.py notices one.
PARSER = 4


def key(*parts: Any) -> str:
    """16 hexadecimal digits of values that JSON can hold."""
    text = json.dumps(parts, sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def answers_key(
    base: str,
    adapter_dir: str | Path | None,
    tokenizer: PreTrainedTokenizerFast,
    ids: Sequence[str],
    prompts: Sequence[Sequence[int] | None],
    settings: Mapping[str, Any],
) -> str:
    """The key of a table's answers by one adapter.

    Args:
        base: of `base.base_digest`.
        adapter_dir: the adapter counts by its files' bytes; None: the base alone.
        tokenizer: counts by how it makes a text of ids; what it makes of texts stands in prompts.
        ids: of the rows, in order.
        prompts: token ids of the rows as the model is asked; None for one that can't be asked.
        settings: all else that changes answers.
    """
    adapter = [] if adapter_dir is None else digests(adapter_dir)
    state = json.loads(tokenizer.backend_tokenizer.to_str())
    decoding = [state["model"]["vocab"], state["decoder"], state["added_tokens"]]
    asked = list(ids), list(prompts), dict(settings)
    return key(PARSER, base, adapter, decoding, tokenizer.eos_token_id, asked)
