"""Rows -> the prompts that a model's answers hold: encoded once, answered by the engine, decoded
and parsed."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import pandas as pd
from tqdm.auto import tqdm
from transformers import PreTrainedTokenizerFast

from prompt_recovery.engine import GREEDY, Answer, Meter, Sampling, generate
from prompt_recovery.json_answers import json_object_closed
from prompt_recovery.recipe import Format
from prompt_recovery.templates import find_prompt
from prompt_recovery.tokenizer import encode_row

NOT_FINITE = "not finite"


class Recovered(NamedTuple):
    """A recovered prompt, never blank, or None; as what it was parsed (the parser's word); why the
    answer ended (eos, object, length, or "not finite": the model's logits, which then say nothing);
    its length in tokens."""

    prompt: str | None
    parsed_as: str
    stopped: str
    tokens: int


def encode_rows(
    tokenizer: PreTrainedTokenizerFast, rows: pd.DataFrame, *, max_tokens: int, **options: Any
) -> list[list[int]]:
    """Token ids of each row as the model is asked, at most max_tokens. options: see
    `encode_row`."""
    return [
        encode_row(tokenizer, row, max_tokens=max_tokens, **options)[0]
        for row in rows.to_dict("records")
    ]


def answer_prompts(
    model: Any,
    tokenizer: PreTrainedTokenizerFast,
    prompts: Sequence[Sequence[int]],
    *,
    style: str,
    sampling: Sampling = GREEDY,
    stop_at_object: bool | None = None,
    meter: Meter | None = None,
    description: str | None = "answers",
    **options: Any,
) -> Iterator[tuple[int, list[Recovered]]]:
    """Yield (position in prompts, its recovered prompts) as batches finish.

    Args:
        model, tokenizer: as `generate` takes the one, and the one that made the prompts.
        prompts: token ids, of `encode_rows`.
        style: by which answers are parsed.
        sampling: how many answers a prompt gets, and how they are drawn.
        stop_at_object: end an answer where its JSON object closes; None: unless the style is plain.
        meter: counts tokens and seconds; None: one of its own.
        description: the progress bar's, which also shows the rate; None shows no bar.
        options: passed to `generate`.
    """
    meter = Meter() if meter is None else meter
    broken = 0

    def closed(ids: list[int]) -> bool:
        return json_object_closed(tokenizer.decode(ids, skip_special_tokens=True))

    stop = closed if (style != "plain" if stop_at_object is None else stop_at_object) else None
    with tqdm(total=len(prompts), desc=description, unit="row", disable=description is None) as bar:
        for position, answers in generate(
            model,
            prompts,
            eos=tokenizer.eos_token_id,
            sampling=sampling,
            stop=stop,
            meter=meter,
            **options,
        ):
            bar.update()
            bar.set_postfix_str(
                f"{meter.rate:.0f} tokens/s, {meter.left:.0f} s left", refresh=False
            )
            broken += sum(answer.ended == NOT_FINITE for answer in answers)
            yield position, [_recover(tokenizer, answer, style) for answer in answers]
    if broken:
        print(
            f"{broken} answers are none, since their logits were not finite: the weights are "
            f"damaged, or too large for {str(model.dtype).removeprefix('torch.')}."
        )


def _recover(tokenizer: PreTrainedTokenizerFast, answer: Answer, style: str) -> Recovered:
    ids, ended = answer
    text = tokenizer.decode(ids[:-1] if ended == "eos" else ids, skip_special_tokens=True)
    stopped = "object" if ended == "stop" else ended
    found = find_prompt("" if ended == NOT_FINITE else text, style, at_limit=ended == "length")
    return Recovered(found.prompt, found.parsed_as, stopped, len(ids))


def answer_rows(
    model: Any,
    tokenizer: PreTrainedTokenizerFast,
    rows: pd.DataFrame,
    *,
    format: Format,
    max_tokens: int,
    max_new_tokens: int,
    examples: Sequence[Mapping[str, Any]] = (),
    **options: Any,
) -> Iterator[tuple[int, list[Recovered]]]:
    """`answer_prompts` of a table: yield (row position, its recovered prompts).

    Args:
        model, tokenizer, options: of `answer_prompts`.
        rows: with original_text and rewritten_text.
        format: how a row is put to the model and how it answers.
        max_tokens: limit of prompt and answer together: prompts get max_tokens - max_new_tokens.
        max_new_tokens: limit of an answer.
        examples: rows with their prompts, which stand before each row as earlier turns.

    Raises TokenizerError for a row that does not fit.
    """
    max_prompt_tokens = max_tokens - max_new_tokens
    prompts = encode_rows(
        tokenizer, rows, max_tokens=max_prompt_tokens, format=format, examples=examples
    )
    return answer_prompts(
        model,
        tokenizer,
        prompts,
        style=format.style,
        max_new_tokens=max_new_tokens,
        **options,
    )


def answer_table(
    model: Any,
    tokenizer: PreTrainedTokenizerFast,
    rows: pd.DataFrame,
    *,
    fallback_prompt: str,
    **options: Any,
) -> pd.DataFrame:
    """The first answer of each row in the rows' order, as a table: id, answer, how ("fallback"
    where no prompt was found), stopped."""
    firsts = [found[0] for _, found in sorted(answer_rows(model, tokenizer, rows, **options))]
    lines = [(*or_fallback(first, fallback_prompt), first.stopped) for first in firsts]
    table = pd.DataFrame(lines, columns=["answer", "how", "stopped"])
    table.insert(0, "id", rows["id"].to_list())
    return table


def or_fallback(found: Recovered, fallback_prompt: str) -> tuple[str, str]:
    """(answer, how) as a table has them."""
    if found.prompt is None:
        return fallback_prompt, "fallback"
    return found.prompt, found.parsed_as
