"""Rows -> input ids and labels, and what a batch of them is."""

from __future__ import annotations

from collections.abc import Sequence

import pandas as pd
import torch
from transformers import PreTrainedTokenizerFast

from prompt_recovery.recipe import Format
from prompt_recovery.templates import TemplateError, render_answer
from prompt_recovery.tokenizer import TokenizerError, encode_row

IGNORED = -100  # torch's cross_entropy leaves this label out
Example = dict[str, list[int]]


class TrainingError(ValueError):
    """Rows or settings that cannot be trained on."""


def make_examples(
    tokenizer: PreTrainedTokenizerFast, rows: pd.DataFrame, *, max_tokens: int, format: Format
) -> list[Example]:
    """Rows as `input_ids` and `labels` (lists of equal length, at most max_tokens): labels are the ids where the answer
    and its EOS stand and -100 elsewhere. Masked by position, so it does not matter which id pads.

    Raises TrainingError naming the rows that have no answer in this style, whose answer does not fit, or that have no
    supervised token.
    """
    examples = []
    refused: list[tuple[str, str]] = []
    for number, row in enumerate(rows.to_dict("records"), 1):
        try:
            answer = render_answer(row["rewrite_prompt"], format.style, row.get("response", ""))
            ids, supervised = encode_row(tokenizer, row, max_tokens=max_tokens, format=format, answer=answer)
        except (TemplateError, TokenizerError) as error:
            refused.append((str(row.get("source", f"row {number}")), str(error)))
            continue
        labels = [i if keep else IGNORED for i, keep in zip(ids, supervised, strict=True)]
        examples.append({"input_ids": ids, "labels": labels})
    if refused:
        places = ", ".join(place for place, _ in refused[:10]) + (" ..." if len(refused) > 10 else "")
        raise TrainingError(f"{len(refused)} of {len(rows)} rows are refused ({places}); the first: {refused[0][1]}")
    check_supervised(examples, tokenizer.eos_token_id)
    return examples


def check_supervised(examples: Sequence[Example], eos: int) -> None:
    """Raises TrainingError for examples without a supervised token (their loss is silently 0), or not ending in EOS."""
    if not examples:
        raise TrainingError("there are no rows to train on; check what was dropped and eval_fraction.")
    bad = [n for n, example in enumerate(examples) if example["labels"][-1] != eos]
    if bad:
        raise TrainingError(
            f"{len(bad)} of {len(examples)} rows do not end in a supervised EOS (positions {bad[:5]}): the model would "
            "never learn to stop. Do not truncate examples; encode_row shortens the texts instead."
        )


def collate(examples: Sequence[Example], pad_id: int) -> dict[str, torch.Tensor]:
    """int64 input_ids, attention_mask and labels of shape [batch, longest], padded on the right.

    Padding is pad_id / 0 / -100 by position; an id equal to pad_id inside an example keeps its label and attention.
    """
    width = max(len(example["input_ids"]) for example in examples)

    def pad(name: str, value: int) -> torch.Tensor:
        return torch.tensor([example[name] + [value] * (width - len(example[name])) for example in examples])

    mask = [[1] * len(e["input_ids"]) + [0] * (width - len(e["input_ids"])) for e in examples]
    return {
        "input_ids": pad("input_ids", pad_id),
        "attention_mask": torch.tensor(mask),
        "labels": pad("labels", IGNORED),
    }


def answer_length(example: Example) -> int:
    """Number of supervised tokens, EOS included."""
    return sum(label != IGNORED for label in example["labels"])


def show_example(tokenizer: PreTrainedTokenizerFast, example: Example) -> str:
    """The example decoded, with the supervised part between »»» and «««."""
    ids, labels = example["input_ids"], example["labels"]
    start = next(n for n, label in enumerate(labels) if label != IGNORED)
    return f"{tokenizer.decode(ids[:start])}»»»{tokenizer.decode(ids[start:])}«««"
