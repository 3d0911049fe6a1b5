"""Answers to many prompts: sorted by length, batched by memory, each batch by `decoding`, yielded as batches finish."""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import pandas as pd
import torch
from tqdm import tqdm
from transformers import PreTrainedTokenizerFast

from prompt_recovery.adapter import merged
from prompt_recovery.decoding import Decoder, cache_columns, kv_bytes
from prompt_recovery.fast_layers import fast_layers
from prompt_recovery.memory import GIB, RESERVE, processes
from prompt_recovery.moe_forward import few_tokens
from prompt_recovery.nf4 import release_buffers
from prompt_recovery.templates import json_object_closed, parse_answer
from prompt_recovery.tokenizer import encode_row

# answers are padded with <unk>: every base has id 0, while a <pad> added for training lies outside its embeddings
PAD_ID = 0
CPU_CELLS = 16_384  # rows * columns of a batch on the CPU, where larger ones gain nothing
MOST_ROWS = 64  # of a batch: above it a decode step of a MoE dequantises its experts


class Answer(NamedTuple):
    """What the model wrote for one prompt: the text, its length in tokens, and why it ended: eos, object or length."""

    text: str
    tokens: int
    stopped: str


class Recovered(NamedTuple):
    """A recovered prompt, never blank; how it was found (the parser's word, or "fallback"); stopped and tokens of the
    Answer it was found in."""

    prompt: str
    how: str
    stopped: str
    tokens: int


@dataclass
class Progress:
    """Counts of a running `generate`, and its estimate of the seconds left, by what reading a token and writing a row's
    answers cost in the batches so far."""

    rows: int = 0
    tokens_in: int = 0
    tokens_out: int = 0
    seconds: float = 0.0
    left: float = float("nan")
    batches: list[tuple] = field(default_factory=list)  # rows, tokens in, seconds of prefill and of decoding

    def add(
        self, lengths: Sequence[int], tokens_out: int, prefill: float, decode: float, to_come: Sequence[int]
    ) -> None:
        """Count a batch. lengths, to_come: tokens of its prompts and of those left. prefill, decode: seconds."""
        self.rows += len(lengths)
        self.tokens_in += sum(lengths)
        self.tokens_out += tokens_out
        self.seconds += prefill + decode
        self.batches.append((len(lengths), sum(lengths), prefill, decode))
        # the first batch of a run compiles and captures: once there are others it says nothing about them
        rows, tokens_in, prefills, decodes = map(sum, zip(*(self.batches[1:] or self.batches), strict=True))
        self.left = prefills / tokens_in * sum(to_come) + decodes / rows * len(to_come)

    def __str__(self) -> str:
        rate = self.tokens_out / max(self.seconds, 1e-9)
        return (
            f"{self.rows} rows, {self.tokens_in} tokens read, {self.tokens_out} written in {self.seconds:.0f} s"
            f" ({rate:.0f} written a second), about {self.left:.0f} s left"
        )


def make_batches(
    lengths: Sequence[int], max_new_tokens: int, batch_tokens: int, most_rows: int = MOST_ROWS
) -> list[list[int]]:
    """Positions of the prompts in batches of similar length, the longest first (too little memory then shows at once).

    batch_tokens: upper limit of rows * (longest prompt + max_new_tokens) in a batch; a longer row stands alone.
    """
    batches: list[list[int]] = []
    for position in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        width = (lengths[batches[-1][0]] if batches else 0) + max_new_tokens
        if batches and width * (len(batches[-1]) + 1) <= batch_tokens and len(batches[-1]) < most_rows:
            batches[-1].append(position)
        else:
            batches.append([position])
    return batches


def spread_order(batches: Sequence[list[int]]) -> list[list[int]]:
    """The same batches: the first one first, then halves, quarters, eighths of the way, so that those done so far are like
    those to come. Sorted, the estimate of the time left was 55% off after a tenth (few long rows say little of many short
    ones)."""
    order = sorted(range(1, len(batches)), key=lambda n: f"{n:032b}"[::-1])
    return [*batches[:1], *(batches[n] for n in order)]


def room(model: Any, prefill_tokens: int) -> int:
    """Tokens whose KV cache fits beside the activations of a prefill, by the memory that is free now."""
    if not torch.cuda.is_available():
        return CPU_CELLS
    config = model.config.get_text_config()
    inner = getattr(config, "num_experts_per_tok", 1) * getattr(
        config, "moe_intermediate_size", config.intermediate_size
    )
    # gate, up and product rows of the experts, and some twelve copies of the hidden state, in 16 bit
    activations = prefill_tokens * 2 * (3 * inner + 12 * config.hidden_size)
    buffers = 0  # of dequantised experts, where a layer of them is used whole
    for module in model.modules():
        if hasattr(module, "gate_up_proj_packed"):
            buffers = 4 * (module.gate_up_proj_packed.numel() + module.down_proj_packed.numel())
            break
    release_buffers()
    tokens = []
    for device, size in kv_bytes(model).items():
        reusable = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        free = torch.cuda.mem_get_info(device)[0] + reusable
        tokens.append((free - RESERVE - activations - (buffers if free > 24 * GIB else 0)) // size)
    return max(0, min(tokens))


def common_prefix(prompts: Sequence[Sequence[int]]) -> list[int]:
    """The ids that all prompts begin with; each keeps at least one of its own."""
    first, last = min(map(list, prompts)), max(map(list, prompts))
    most = min(len(prompt) for prompt in prompts) - 1
    count = 0
    while count < most and first[count] == last[count]:
        count += 1
    return list(first[:count])


def generate(
    model: Any,
    tokenizer: PreTrainedTokenizerFast,
    prompts: Sequence[Sequence[int]],
    *,
    max_new_tokens: int,
    answers_per_row: int = 1,
    batch_tokens: int | None = None,
    stop_at_object: bool = False,
    temperature: float = 0.0,
    top_p: float = 1.0,
    seed: int = 0,
    deadline: float | None = None,
    graphs: bool = True,
    share_prefix: bool = True,
    progress: Progress | None = None,
    numbers: Sequence[int] | None = None,
) -> Iterator[tuple[int, list[Answer]]]:
    """Yield (position in prompts, its answers) as batches finish; every position once, unless the deadline comes first.

    prompts: token ids that begin with BOS. model: with an adapter, which is merged for the while, or without.
    answers_per_row: of which the first is greedy and the others are drawn at `temperature` (1 if that is 0) and `top_p`;
    a single answer is drawn if temperature is above 0. A draw depends on seed, position and number of the answer alone.
    batch_tokens: upper limit of answers * (prompt + max_new_tokens) in a batch; None takes what memory allows. Out of
    memory, a batch is halved and smaller ones follow. stop_at_object: also end an answer when its JSON object closes.
    deadline: time.monotonic() after which no batch may end, judged by the slowest batch so far; the rest is not yielded.
    graphs, share_prefix: off only to compare. progress: is kept up to date. numbers: the positions by which answers are
    drawn, if the prompts are a part of others.
    Raises torch.OutOfMemoryError if a single row does not fit.
    """
    if not prompts:
        return
    model.eval()
    progress = Progress() if progress is None else progress
    prefix = common_prefix(prompts) if share_prefix else []
    big = torch.cuda.is_available() and torch.cuda.get_device_properties(0).total_memory > 40 * GIB
    prefill_tokens = 16_384 if big or not torch.cuda.is_available() else 4_096
    greedy = 1 if answers_per_row > 1 or temperature == 0 else 0
    seeds = [
        [None if n < greedy else (seed, number, n) for n in range(answers_per_row)]
        for number in (numbers or range(len(prompts)))
    ]

    def finished(ids: list[int]) -> bool:
        return json_object_closed(tokenizer.decode(ids, skip_special_tokens=True))

    with ExitStack() as stack:
        fast = stack.enter_context(merged(model))
        stack.enter_context(fast_layers(fast))
        limit = batch_tokens or room(fast, prefill_tokens)
        most_rows = min(MOST_ROWS, few_tokens(fast))
        lengths = [len(prompt) for prompt in prompts]

        def batched(positions: Sequence[int], cells: int) -> list[list[int]]:
            most = max(1, most_rows // answers_per_row)
            made = make_batches([lengths[i] for i in positions], max_new_tokens, cells // answers_per_row, most)
            return [[positions[i] for i in batch] for batch in spread_order(made)]

        batches = batched(range(len(prompts)), limit)
        decoder: Decoder | None = None
        slowest = 0.0
        while batches:
            started = time.monotonic()
            if deadline is not None and started + slowest > deadline:
                return
            batch = batches[0]
            try:
                if decoder is None:
                    cells = [len(each) * cache_columns(lengths[each[0]], max_new_tokens) for each in batches]
                    decoder = Decoder(
                        fast, prefix, rows=max(map(len, batches)) * answers_per_row, cells=max(cells) * answers_per_row,
                        max_new_tokens=max_new_tokens, eos=tokenizer.eos_token_id, pad=PAD_ID,
                        temperature=temperature or 1.0, top_p=top_p, prefill_tokens=prefill_tokens, graphs=graphs,
                    )  # fmt: skip
                written = decoder.answer(
                    [prompts[i] for i in batch], [seeds[i] for i in batch], finished if stop_at_object else None
                )
            except torch.OutOfMemoryError:
                written = None
            if written is None or decoder is None:  # outside of the handler, whose traceback holds memory
                decoder = None
                if torch.cuda.is_available():
                    torch.cuda.empty_cache()
                if len(batch) == 1:
                    raise torch.OutOfMemoryError(
                        f"One prompt of {lengths[batch[0]]} tokens with {answers_per_row} answers does not fit in memory: "
                        "give fewer answers_per_row, or shorter texts (max_tokens)."
                    )
                # the room is halved, not the rows: shorter ones may still be as many
                limit = len(batch) // 2 * answers_per_row * (lengths[batch[0]] + max_new_tokens)
                batches = batched([i for each in batches for i in each], limit)
                continue
            batches.pop(0)
            answers = [[_answer(tokenizer, ids, stop_at_object) for ids in each] for each in written]
            spent = time.monotonic() - started
            slowest = max(slowest, spent)
            tokens_out = sum(answer.tokens for each in answers for answer in each)
            prefill = decoder.prefill_seconds
            to_come = [lengths[i] for each in batches for i in each]
            progress.add([lengths[i] for i in batch], tokens_out, prefill, spent - prefill, to_come)
            yield from zip(batch, answers, strict=True)


def _answer(tokenizer: PreTrainedTokenizerFast, ids: list[int], stop_at_object: bool) -> Answer:
    ended = ids[-1] == tokenizer.eos_token_id
    text = tokenizer.decode(ids[: len(ids) - ended], skip_special_tokens=True)
    if stop_at_object and json_object_closed(text):
        # the shortest beginning in which it is closed, however often the decoder looked
        low, high = 1, len(ids)
        while low < high:
            middle = (low + high) // 2
            closed = json_object_closed(tokenizer.decode(ids[:middle], skip_special_tokens=True))
            low, high = (low, middle) if closed else (middle + 1, high)
        return Answer(tokenizer.decode(ids[:low], skip_special_tokens=True), low, "object")
    return Answer(text, len(ids), "eos" if ended else "length")


def generate_shared(
    model: Any, tokenizer: PreTrainedTokenizerFast, prompts: Sequence[Sequence[int]], folder: str | Path, **options: Any
) -> dict[int, list[Answer]]:
    """`generate` by all processes of `accelerate launch`, each with a whole model: the answers by position in prompts, in
    order, on every process. Positions that a deadline cut off are missing.

    Each process writes what it finished to a file of its own in `folder`. A run that was killed goes on: rows that stand
    in any of the files are not answered again, those of a worker that died are shared out anew. Files made for other
    prompts or options are not read; for another model or adapter, give another folder.
    """
    state = processes()
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    same = {name: value for name, value in options.items() if name not in ("deadline", "progress", "batch_tokens")}
    job = hashlib.sha256(json.dumps([list(map(list, prompts)), sorted(same.items())]).encode()).hexdigest()[:16]
    done = _read_shared(folder, job)
    state.wait_for_everyone()  # nobody writes before all have read
    missing = sorted((i for i in range(len(prompts)) if i not in done), key=lambda i: -len(prompts[i]))
    mine = missing[state.process_index :: state.num_processes]
    with (folder / f"answers-{job}-{state.process_index}.jsonl").open("a", encoding="utf-8") as file:
        file.write("\n")  # a killed worker's last line may have no end
        for position, found in generate(model, tokenizer, [prompts[i] for i in mine], numbers=mine, **options):
            file.write(json.dumps([mine[position], found]) + "\n")
            file.flush()
    state.wait_for_everyone()
    return dict(sorted(_read_shared(folder, job).items()))


def _read_shared(folder: Path, job: str) -> dict[int, list[Answer]]:
    done = {}
    for path in folder.glob(f"answers-{job}-*.jsonl"):
        for line in path.read_text(encoding="utf-8").splitlines():
            try:
                position, found = json.loads(line)
            except json.JSONDecodeError:  # the line that a killed worker was writing
                continue
            done[position] = [Answer(*each) for each in found]
    return done


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
) -> Iterator[tuple[int, list[Recovered]]]:
    """Yield (row position, its recovered prompts) as batches finish.

    description: the progress bar's, which also shows the rate; None shows no bar.
    max_tokens: limit of prompt and answer together, so prompts get max_tokens - max_new_tokens.
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
    progress = options.setdefault("progress", Progress())
    options.setdefault("stop_at_object", style != "plain")
    with tqdm(total=len(prompts), desc=description, unit="row", disable=description is None) as bar:
        for position, answers in generate(model, tokenizer, prompts, max_new_tokens=max_new_tokens, **options):
            bar.update()
            rate = progress.tokens_out / max(progress.seconds, 1e-9)
            bar.set_postfix_str(f"{rate:.0f} tokens/s, {progress.left:.0f} s left", refresh=False)
            yield position, [_recover(answer, style, fallback_prompt) for answer in answers]


def _recover(answer: Answer, style: str, fallback_prompt: str) -> Recovered:
    parsed = parse_answer(answer.text, style)
    if parsed.prompt is None:
        return Recovered(fallback_prompt, "fallback", answer.stopped, answer.tokens)
    return Recovered(parsed.prompt, parsed.how, answer.stopped, answer.tokens)


def answer_table(model: Any, tokenizer: PreTrainedTokenizerFast, rows: pd.DataFrame, **options: Any) -> pd.DataFrame:
    """The first answer of each row in the rows' order, as a table: id, answer, how, stopped."""
    results = sorted(answer_rows(model, tokenizer, rows, **options))
    table = pd.DataFrame([answers[0][:3] for _, answers in results], columns=["answer", "how", "stopped"])
    table.insert(0, "id", rows["id"].to_list())
    return table
