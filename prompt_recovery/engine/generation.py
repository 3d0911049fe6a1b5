"""Answers to many prompts: sorted by length, batched by memory, each batch by `decoding`, yielded as batches finish."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch

from prompt_recovery.engine.decoding import Decoder, cache_columns, kv_bytes
from prompt_recovery.engine.layers import fast_layers
from prompt_recovery.engine.memory import GIB, RESERVE
from prompt_recovery.engine.merging import merged
from prompt_recovery.engine.storage import four_bit_experts, workspace

# answers are padded with <unk>: every base has id 0, while a <pad> added for training lies outside its embeddings
PAD_ID = 0
CPU_CELLS = 16_384  # rows * columns of a batch on the CPU, where larger ones gain nothing
MOST_ROWS = 64  # of a batch


class Sampling(NamedTuple):
    """How a prompt is answered. answers: how many; of several the first is greedy and the others are drawn at
    `temperature` (1 if that is 0) and `top_p`; a single one is drawn if temperature is above 0. A draw depends on
    seed, number of the prompt and number of the answer alone."""

    answers: int = 1
    temperature: float = 0.0
    top_p: float = 1.0
    seed: int = 0


GREEDY = Sampling()


class Answer(NamedTuple):
    """What the model wrote: its token ids, and why they end: eos (the last of them), stop (the caller's), length, or not
    finite (the logits: there are no ids then)."""

    ids: list[int]
    ended: str


class Finished(NamedTuple):
    """A prompt's position and its answers."""

    position: int
    answers: list[Answer]


@dataclass
class Meter:
    """Counts of one or more runs of `generate`, and the rates that follow from them.

    reading, writing: busy seconds of prefill and of decoding. wall: seconds since a run began, until its last batch.
    longest: tokens of the longest answer. slowest: seconds of the slowest batch. left: estimate of the seconds that the
    rest of the run will take.
    """

    rows: int = 0
    tokens_in: int = 0
    tokens_out: int = 0
    batches: int = 0
    reading: float = 0.0
    writing: float = 0.0
    wall: float = 0.0
    longest: int = 0
    slowest: float = 0.0
    left: float = float("nan")
    first: tuple[int, int, float, float] = (0, 0, 0.0, 0.0)  # rows, tokens read, seconds of reading, of writing

    @property
    def seconds(self) -> float:
        return self.reading + self.writing

    @property
    def rate(self) -> float:
        """Tokens written a busy second."""
        return self.tokens_out / max(self.seconds, 1e-9)

    def add(self, lengths: Sequence[int], written: Sequence[int], reading: float, writing: float) -> None:
        """Count a batch. lengths, written: tokens of its prompts and of its answers. reading, writing: seconds."""
        self.rows += len(lengths)
        self.tokens_in += sum(lengths)
        self.tokens_out += sum(written)
        self.batches += 1
        self.reading += reading
        self.writing += writing
        self.longest = max(self.longest, *written)
        self.slowest = max(self.slowest, reading + writing)
        if self.batches == 1:
            self.first = self.rows, self.tokens_in, reading, writing

    def seconds_a_token_in(self) -> float:
        """Of reading. The first batch compiles and captures: once there are others it says nothing about them."""
        _, tokens_in, reading, _ = self.first if self.batches > 1 else (0, 0, 0.0, 0.0)
        return (self.reading - reading) / max(self.tokens_in - tokens_in, 1)

    def seconds_a_row(self) -> float:
        """Of writing, without the first batch likewise."""
        rows, _, _, writing = self.first if self.batches > 1 else (0, 0, 0.0, 0.0)
        return (self.writing - writing) / max(self.rows - rows, 1)

    def estimate(self, lengths: Sequence[int]) -> float:
        """Seconds that prompts of these lengths will take."""
        return self.seconds_a_token_in() * sum(lengths) + self.seconds_a_row() * len(lengths)

    def __str__(self) -> str:
        return (
            f"{self.rows} rows, {self.tokens_in} tokens read, {self.tokens_out} written in {self.seconds:.0f} s"
            f" ({self.rate:.0f} written a second), about {self.left:.0f} s left"
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
    experts = next(iter(four_bit_experts(model)), None)
    buffers = 0  # of dequantised experts, where a layer of them is used whole
    if experts is not None:
        buffers = 4 * (experts.gate_up_proj_packed.numel() + experts.down_proj_packed.numel())
    tokens = []
    for device, size in kv_bytes(model).items():
        reusable = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        reusable += workspace(experts).held(device) if experts is not None else 0
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
    prompts: Sequence[Sequence[int]],
    *,
    eos: int,
    max_new_tokens: int,
    sampling: Sampling = GREEDY,
    stop: Callable[[list[int]], bool] | None = None,
    batch_tokens: int | None = None,
    deadline: float | None = None,
    graphs: bool = True,
    share_prefix: bool = True,
    meter: Meter | None = None,
    numbers: Sequence[int] | None = None,
) -> Iterator[Finished]:
    """Yield rows as their batches finish, in no order; every position of prompts once, unless the deadline comes first.

    Args:
        model: with an adapter, which is merged for the while, or without.
        prompts: token ids that begin with BOS.
        eos: the id at which an answer ends.
        max_new_tokens: of an answer.
        sampling: how many answers a prompt gets, and how they are drawn.
        stop: whether the ids of an answer so far are a whole one; must stay true for longer ones. The answer then ends
            at the first id after which it holds.
        batch_tokens: upper limit of answers * (prompt + max_new_tokens) in a batch; None takes what memory allows. Out of
            memory, a batch is halved and smaller ones follow.
        deadline: time.monotonic() after which no batch may end, judged by the slowest one so far; the rest is not yielded.
        graphs, share_prefix: off only to compare.
        meter: is kept up to date, before the rows that it counts are yielded.
        numbers: by which the prompts' answers are drawn, if they are a part of others; None: their positions.

    Raises torch.OutOfMemoryError if a single row does not fit.
    """
    if not prompts:
        return
    model.eval()
    meter = Meter() if meter is None else meter
    begun, wall = time.monotonic(), meter.wall
    prefix = common_prefix(prompts) if share_prefix else []
    big = torch.cuda.is_available() and torch.cuda.get_device_properties(0).total_memory > 40 * GIB
    prefill_tokens = 16_384 if big or not torch.cuda.is_available() else 4_096
    share, temperature = sampling.answers, sampling.temperature
    greedy = 1 if share > 1 or temperature == 0 else 0
    seeds = [
        [None if n < greedy else (sampling.seed, number, n) for n in range(share)]
        for number in (numbers or range(len(prompts)))
    ]

    with ExitStack() as stack:
        fast = stack.enter_context(merged(model))
        stack.enter_context(fast_layers(fast))
        limit = batch_tokens or room(fast, prefill_tokens)
        lengths = [len(prompt) for prompt in prompts]

        def batched(positions: Sequence[int], cells: int) -> list[list[int]]:
            most = max(1, MOST_ROWS // share)
            made = make_batches([lengths[i] for i in positions], max_new_tokens, cells // share, most)
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
                        fast, prefix, rows=max(map(len, batches)) * share, cells=max(cells) * share,
                        max_new_tokens=max_new_tokens, eos=eos, pad=PAD_ID, temperature=temperature or 1.0,
                        top_p=sampling.top_p, prefill_tokens=prefill_tokens, graphs=graphs,
                    )  # fmt: skip
                written = decoder.answer([prompts[i] for i in batch], [seeds[i] for i in batch], stop)
            except torch.OutOfMemoryError:
                written = None
            if written is None or decoder is None:  # outside of the handler, whose traceback holds memory
                decoder = None
                if torch.cuda.is_available():
                    torch.cuda.empty_cache()
                if len(batch) == 1:
                    raise torch.OutOfMemoryError(
                        f"One prompt of {lengths[batch[0]]} tokens with {share} answers does not fit in memory: "
                        "give fewer answers_per_row, or shorter texts (max_tokens)."
                    )
                # the room is halved, not the rows: shorter ones may still be as many
                limit = len(batch) // 2 * share * (lengths[batch[0]] + max_new_tokens)
                batches = batched([i for each in batches for i in each], limit)
                continue
            batches.pop(0)
            answers = [[_answer(ids, bad, eos, stop) for ids, bad in each] for each in written]
            spent = time.monotonic() - started
            slowest = max(slowest, spent)
            tokens = [len(answer.ids) for each in answers for answer in each]
            reading = decoder.prefill_seconds
            meter.add([lengths[i] for i in batch], tokens, reading, spent - reading)
            meter.wall = wall + time.monotonic() - begun
            meter.left = meter.estimate([lengths[i] for each in batches for i in each])
            yield from map(Finished, batch, answers)


def _answer(ids: list[int], bad: bool, eos: int, stop: Callable[[list[int]], bool] | None) -> Answer:
    if bad:
        return Answer([], "not finite")
    ended = ids[-1] == eos
    body = ids[: len(ids) - ended]
    if stop is not None and stop(body):
        # the shortest beginning that is whole, however often the decoder looked
        low, high = 1, len(body)
        while low < high:
            middle = (low + high) // 2
            low, high = (low, middle) if stop(body[:middle]) else (middle + 1, high)
        return Answer(body[:low], "stop")
    return Answer(ids, "eos" if ended else "length")
