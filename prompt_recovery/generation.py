"""Batched answers: rows sorted by length, left padding, greedy or sampled, ended by EOS or by a closed JSON object."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import pandas as pd
import torch
from tqdm import tqdm
from transformers import PreTrainedTokenizerFast, StoppingCriteria, StoppingCriteriaList

from prompt_recovery.templates import json_object_closed, parse_answer
from prompt_recovery.tokenizer import encode_row

# answers are padded with <unk>: every base has id 0, while a <pad> added for training lies outside its embeddings
PAD_ID = 0


@dataclass(frozen=True)
class Answer:
    """What the model wrote for one prompt: the text, its length in tokens, and why it ended: eos, object or length."""

    text: str
    tokens: int
    stopped: str


class _ObjectClosed(StoppingCriteria):
    def __init__(self, tokenizer: PreTrainedTokenizerFast, prompt_width: int) -> None:
        self.tokenizer, self.prompt_width = tokenizer, prompt_width

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor, **kwargs: Any) -> torch.Tensor:
        texts = self.tokenizer.batch_decode(input_ids[:, self.prompt_width :], skip_special_tokens=True)
        return torch.tensor([json_object_closed(text) for text in texts], device=input_ids.device)


def make_batches(lengths: Sequence[int], max_new_tokens: int, batch_tokens: int) -> list[list[int]]:
    """Positions of the prompts in batches of similar length, the longest first (too little memory then shows at once).

    batch_tokens: upper limit of rows * (longest prompt + max_new_tokens) in a batch; a longer row stands alone.
    """
    batches: list[list[int]] = []
    for position in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        width = (lengths[batches[-1][0]] if batches else 0) + max_new_tokens
        if batches and width * (len(batches[-1]) + 1) <= batch_tokens:
            batches[-1].append(position)
        else:
            batches.append([position])
    return batches


def generate(
    model: Any,
    tokenizer: PreTrainedTokenizerFast,
    prompts: Sequence[Sequence[int]],
    *,
    max_new_tokens: int,
    batch_tokens: int = 16_384,
    stop_at_object: bool = False,
    temperature: float = 0.0,
    top_p: float = 1.0,
    seed: int = 0,
    deadline: float | None = None,
) -> Iterator[tuple[int, Answer]]:
    """Yield (position in prompts, Answer) as batches finish; every position once, unless the deadline comes first.

    prompts: token ids that begin with BOS. stop_at_object: also stop a row when its JSON object closes.
    temperature 0 is greedy; above it, samples are drawn after seeding every batch with `seed`.
    deadline: time.monotonic() after which no batch may end, judged by the slowest batch so far; the rest is not yielded.
    """
    model.eval()
    device = model.get_input_embeddings().weight.device
    choice = dict(do_sample=True, temperature=temperature, top_p=top_p) if temperature > 0 else dict(do_sample=False)
    batches = make_batches([len(prompt) for prompt in prompts], max_new_tokens, batch_tokens)
    slowest = 0.0
    for batch in batches:
        started = time.monotonic()
        if deadline is not None and started + slowest > deadline:
            return
        width = len(prompts[batch[0]])
        ids = torch.tensor([[PAD_ID] * (width - len(prompts[i])) + list(prompts[i]) for i in batch], device=device)
        mask = torch.tensor([[0] * (width - len(prompts[i])) + [1] * len(prompts[i]) for i in batch], device=device)
        criteria = StoppingCriteriaList([_ObjectClosed(tokenizer, width)] if stop_at_object else [])
        if temperature > 0:
            torch.manual_seed(seed)
        with torch.inference_mode():
            output = model.generate(
                input_ids=ids,
                attention_mask=mask,
                max_new_tokens=max_new_tokens,
                pad_token_id=PAD_ID,
                eos_token_id=tokenizer.eos_token_id,
                stopping_criteria=criteria,
                use_cache=True,
                **choice,
            )
        for position, new in zip(batch, output[:, width:].tolist(), strict=True):
            yield position, _answer(tokenizer, new, stop_at_object)
        slowest = max(slowest, time.monotonic() - started)


def _answer(tokenizer: PreTrainedTokenizerFast, ids: list[int], stop_at_object: bool) -> Answer:
    end = ids.index(tokenizer.eos_token_id) if tokenizer.eos_token_id in ids else None
    text = tokenizer.decode(ids[:end], skip_special_tokens=True)
    if end is not None:
        return Answer(text, end + 1, "eos")
    closed = stop_at_object and json_object_closed(text)
    return Answer(text, len(ids), "object" if closed else "length")


def answer_rows(
    model: Any,
    tokenizer: PreTrainedTokenizerFast,
    rows: pd.DataFrame,
    *,
    style: str,
    system_placement: str,
    max_tokens: int,
    max_new_tokens: int,
    fallback_prompt: str,
    examples: Sequence[Mapping[str, Any]] = (),
    description: str | None = "answers",
    **options: Any,
) -> Iterator[tuple[int, str, str, str]]:
    """Yield (row position, answer, how, stopped) as batches finish; the answer is never blank.

    description: the progress bar's; None shows no bar.

    max_tokens: limit of prompt and answer together, so prompts get max_tokens - max_new_tokens.
    how: the parser's word for where the answer was found, or "fallback" where it found none; stopped: see Answer.
    options: passed to `generate`.
    """
    encoded = (
        encode_row(
            tokenizer, row, max_tokens=max_tokens - max_new_tokens, style=style, system_placement=system_placement,
            examples=examples,
        )
        for row in rows.to_dict("records")
    )  # fmt: skip
    prompts = [ids for ids, _ in encoded]
    options = dict(max_new_tokens=max_new_tokens, stop_at_object=style != "plain") | options
    with tqdm(total=len(prompts), desc=description, unit="row", disable=description is None) as bar:
        for position, answer in generate(model, tokenizer, prompts, **options):
            parsed = parse_answer(answer.text, style)
            bar.update()
            if parsed.prompt is None:
                yield position, fallback_prompt, "fallback", answer.stopped
            else:
                yield position, parsed.prompt, parsed.how, answer.stopped


def answer_table(model: Any, tokenizer: PreTrainedTokenizerFast, rows: pd.DataFrame, **options: Any) -> pd.DataFrame:
    """`answer_rows` in the rows' order, as a table: id, answer, how, stopped."""
    results = sorted(answer_rows(model, tokenizer, rows, **options))
    table = pd.DataFrame([result[1:] for result in results], columns=["answer", "how", "stopped"])
    table.insert(0, "id", rows["id"].to_list())
    return table
