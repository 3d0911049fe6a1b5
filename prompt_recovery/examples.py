"""Rows -> input ids and labels, and what a batch of them is."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import pandas as pd
import torch
from transformers import PreTrainedTokenizerFast

from prompt_recovery.data import ACCOUNT_COLUMNS, normalise
from prompt_recovery.recipe import Format
from prompt_recovery.responses import TemplateError, prompt_of
from prompt_recovery.templates import read_back, render_answer
from prompt_recovery.tokenizer import TokenizerError, encode_row

IGNORED = -100  # torch's cross_entropy leaves this label out
Example = dict[str, list[int]]


class TrainingError(ValueError):
    """Rows or settings that cannot be trained on."""


def usable_examples(
    tokenizer: PreTrainedTokenizerFast, rows: pd.DataFrame, *, max_tokens: int, format: Format
) -> tuple[pd.DataFrame, dict[str, Example], pd.DataFrame]:
    """The rows that can be taught, their examples by id, and an account of the others.

    An example is `input_ids` and `labels`, lists of equal length, at most max_tokens: labels are
    the ids where the answer and its EOS stand and -100 elsewhere. They are masked by position, so
    it does not matter which id pads. A row has none where it has no answer in this style, or one
    that does not fit or can't be read back.

    account has the columns of data.ACCOUNT_COLUMNS: a line for each dropped row, with the reason,
    and one for each row whose response names another prompt than rewrite_prompt, which is taught.
    Raises TrainingError if no row is left, naming the first.
    """
    examples, refused = _encode(tokenizer, rows, max_tokens=max_tokens, format=format)
    if not len(rows):
        raise TrainingError(
            "There are no rows left to train on: see the account of what was dropped."
        )
    if len(refused) == len(rows):
        raise _refusal(rows, refused)
    kept = {n: example for n, example in enumerate(examples) if example is not None}
    check_supervised(list(kept.values()), tokenizer.eos_token_id)
    account = []
    for n, row in enumerate(rows.to_dict("records")):
        named = (
            prompt_of(row.get("response", ""))
            if format.style == "reason_json" and n in kept
            else None
        )
        if n in refused:
            account.append((row["id"], row["origin"], refused[n][0], "dropped"))
        elif named is not None and normalise(named) != normalise(row["rewrite_prompt"]):
            account.append((row["id"], row["origin"], "response names another prompt", "overruled"))
    clean = rows.iloc[list(kept)].reset_index(drop=True)
    by_id = dict(zip(clean["id"], kept.values(), strict=True))
    return clean, by_id, pd.DataFrame(account, columns=list(ACCOUNT_COLUMNS), dtype=str)


def _encode(
    tokenizer: PreTrainedTokenizerFast, rows: pd.DataFrame, *, max_tokens: int, format: Format
) -> tuple[list[Example | None], dict[int, tuple[str, str]]]:
    """Each row's example or None, and for those without one (by position) the reason in short and
    in full."""
    examples: list[Example | None] = []
    refused: dict[int, tuple[str, str]] = {}
    for n, row in enumerate(rows.to_dict("records")):
        try:
            answer = render_answer(row["rewrite_prompt"], format.style, row.get("response", ""))
            found = read_back(answer, format.style)
            # of a plain answer, quotes and the like around the whole are taken off, and nothing is
            # lost
            if format.style != "plain" and found != row["rewrite_prompt"].strip():
                raise TemplateError(
                    f"rewrite_prompt={row['rewrite_prompt'][:80]!r} would be read back as "
                    f"{found!r}."
                )
            ids, supervised = encode_row(
                tokenizer, row, max_tokens=max_tokens, format=format, answer=answer
            )
        except TemplateError as error:
            refused[n] = (f"no {format.style} answer that can be read back", str(error))
        except TokenizerError as error:
            refused[n] = ("prompt and answer do not fit in max_tokens", str(error))
        if n in refused:
            examples.append(None)
            continue
        labels = [i if keep else IGNORED for i, keep in zip(ids, supervised, strict=True)]
        examples.append({"input_ids": ids, "labels": labels})
    return examples, refused


def _refusal(rows: pd.DataFrame, refused: Mapping[int, tuple[str, str]]) -> TrainingError:
    named = [str(rows["origin"].iloc[n]) if "origin" in rows else f"row {n + 1}" for n in refused]
    places = ", ".join(named[:10]) + (" ..." if len(refused) > 10 else "")
    first = next(iter(refused.values()))[1]
    return TrainingError(
        f"{len(refused)} of {len(rows)} rows are refused ({places}); the first: {first}"
    )


def check_supervised(examples: Sequence[Example], eos: int) -> None:
    """Raises TrainingError for examples without a supervised token (their loss is silently 0), or
    not ending in EOS."""
    if not examples:
        raise TrainingError(
            "there are no rows to train on; check what was dropped and eval_fraction."
        )
    bad = [n for n, example in enumerate(examples) if example["labels"][-1] != eos]
    if bad:
        raise TrainingError(
            f"{len(bad)} of {len(examples)} rows do not end in a supervised EOS (positions "
            f"{bad[:5]}): the model would never learn to stop. Do not truncate examples; "
            "encode_row shortens the texts instead."
        )


def collate(examples: Sequence[Example], pad_id: int) -> dict[str, torch.Tensor]:
    """int64 input_ids, attention_mask and labels of shape [batch, longest], padded on the right.

    Padding is pad_id / 0 / -100 by position; an id equal to pad_id inside an example keeps its
    label and attention.
    """
    width = max(len(example["input_ids"]) for example in examples)

    def pad(name: str, value: int) -> torch.Tensor:
        return torch.tensor(
            [example[name] + [value] * (width - len(example[name])) for example in examples]
        )

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
