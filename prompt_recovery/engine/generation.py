"""Answers to many prompts: sorted by length, batched by memory, each batch by `decoding`, yielded
as batches finish."""

from __future__ import annotations

import gc
import itertools
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from functools import partial
from typing import Any, NamedTuple

import torch
from peft import PeftModel

from prompt_recovery.engine.batching import Waiting
from prompt_recovery.engine.decoding import Decoder
from prompt_recovery.engine.forward import grouped_gemm
from prompt_recovery.engine.kernels.dispatch import uses_triton
from prompt_recovery.engine.layers import bytes_of_copies, fast_layers
from prompt_recovery.engine.memory import free_on
from prompt_recovery.engine.merging import MergeError, merged
from prompt_recovery.engine.meter import Meter
from prompt_recovery.engine.parts import Part, in_parts, layer_devices
from prompt_recovery.engine.planning import CPU_TOKENS, PIECES, AnswerPlan, answer_plan, shape_of

# answers are padded with <unk>: every base has id 0, while a <pad> added for training lies outside
# its embeddings
PAD_ID = 0


class Sampling(NamedTuple):
    """How a prompt is answered. answers: how many; of several the first is greedy and the others
    are drawn at `temperature` (1 if that is 0) and `top_p`; a single one is drawn if temperature is
    above 0. A draw depends on seed, number of the prompt and number of the answer alone."""

    answers: int = 1
    temperature: float = 0.0
    top_p: float = 1.0
    seed: int = 0


GREEDY = Sampling()


class Answer(NamedTuple):
    """What the model wrote: its token ids, and why they end: eos (the last of them), stop (the
    caller's), length, or not finite (the logits: there are no ids then)."""

    ids: list[int]
    ended: str


class Finished(NamedTuple):
    """A prompt's position and its answers."""

    position: int
    answers: list[Answer]


class AttentionError(ValueError):
    """A model whose attention is another one than that of every token to all before it."""


def check_attention(model: Any, longest: int) -> None:
    """Raises AttentionError where tokens see a window that is shorter than the longest prompt with
    its answer, or where SDPA lacks what the model's attention has (sinks, capped scores): the
    answers would be wrong without a word."""
    base = model.get_base_model() if isinstance(model, PeftModel) else model
    window = getattr(base.config.get_text_config(), "sliding_window", None)
    if window and longest > window:
        raise AttentionError(
            f"{type(base).__name__} has a sliding window of {window} tokens, which is not built "
            f"here, and a prompt with its answer takes {longest}: shorten the texts (max_tokens) "
            f"to {window}, or take a model without a window."
        )
    if not getattr(base, "_supports_sdpa", True):
        raise AttentionError(
            f"{type(base).__name__} can't compute its attention by SDPA, the only one that is "
            "built here."
        )


class Ready(NamedTuple):
    """A model as it answers: its parts and its plan, and the plan before an adapter that can't be
    merged changed it."""

    model: Any
    parts: list[Part]
    plan: AnswerPlan
    planned: AnswerPlan

    @property
    def dtype(self) -> torch.dtype:
        return self.parts[0].dtype


@contextmanager
def ready(model: Any, plan: AnswerPlan | None = None) -> Iterator[Ready]:
    """Inside the with block, the model as it answers, by this plan or the fastest one that memory
    allows: the adapter merged or left beside the weights, layers called directly, the small work of
    a decode step in few launches.

    Where merging would change the answers, the adapter stays beside the weights, which is printed.
    Raises StageError for layers that can't be called in parts.
    """
    model.eval()
    base = model.get_base_model() if isinstance(model, PeftModel) else model
    plan = planned = plan or plan_of(model)
    with ExitStack() as stack:
        if plan.merged:
            try:
                base = stack.enter_context(merged(model))
            except MergeError as problem:
                print(f"the adapter stays beside the weights, unmerged: {problem}")
                plan = plan._replace(merged=False)
        parts = stack.enter_context(in_parts(base, plan.layers))
        knows_rows = stack.enter_context(fast_layers(base))
        yield Ready(base, [part._replace(knows_rows=knows_rows) for part in parts], plan, planned)


def plan_of(model: Any) -> AnswerPlan:
    """The fastest plan for a loaded model with the memory that is free now."""
    adapter = isinstance(model, PeftModel) and bool(model.peft_config)
    base = model.get_base_model() if isinstance(model, PeftModel) else model
    stages = [(device, len([*same])) for device, same in itertools.groupby(layer_devices(base))]
    layers = [count for _, count in stages]
    if stages[0][0].type != "cuda":
        return AnswerPlan(tuple(layers), adapter, PIECES[0], CPU_TOKENS)
    dtype = base.get_input_embeddings().weight.dtype
    free = [free_on(base, device) - bytes_of_copies(base, device) for device, _ in stages]
    device = stages[0][0]
    return answer_plan(
        shape_of(base.config, dtype),
        layers,
        free,
        adapter=adapter,
        grouped=grouped_gemm(device, dtype),
        triton=uses_triton(device),
    )


def common_prefix(prompts: Sequence[Sequence[int]]) -> list[int]:
    """The ids that all prompts begin with; each keeps at least one of its own."""
    first, last = min(map(list, prompts)), max(map(list, prompts))
    most = min(len(prompt) for prompt in prompts) - 1
    count = 0
    while count < most and first[count] == last[count]:
        count += 1
    return list(first[:count])


def generate(
    model: Any | Ready,
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
    """Yield rows as their batches finish, in no order; every position of prompts once, unless the
    deadline comes first.

    Args:
        model: with an adapter or without; or what `ready` gives, which spares the preparation of
            each call.
        prompts: token ids that begin with BOS.
        eos: the id at which an answer ends.
        max_new_tokens: of an answer.
        sampling: how many answers a prompt gets, and how they are drawn.
        stop: whether the ids of an answer so far are a whole one; must stay true for longer ones.
            The answer then ends at the first id after which it holds.
        batch_tokens: upper limit of answers * (prompt + max_new_tokens) in a batch; None takes what
            memory allows. Out of memory all the same, a batch is halved, then what prefill reads at
            a time; after some that went well, they grow again.
        deadline: time.monotonic() after which no batch may end, judged by the slowest one so far;
            the rest is not yielded.
        graphs, share_prefix: off only to compare.
        meter: is kept up to date, before the rows that it counts are yielded.
        numbers: by which the prompts' answers are drawn, if they are a part of others; None: their
            positions.

    Raises torch.OutOfMemoryError if a single row does not fit, AttentionError for a model whose
    attention is not the one that runs here.
    """
    if not prompts:
        return
    check_attention(
        model.model if isinstance(model, Ready) else model, max(map(len, prompts)) + max_new_tokens
    )
    with nullcontext(model) if isinstance(model, Ready) else ready(model) as prepared:
        plan = prepared.plan
        waiting = Waiting(
            [len(prompt) for prompt in prompts],
            answers=sampling.answers,
            new_tokens=max_new_tokens,
            limit=batch_tokens or plan.cache_tokens,
            pieces=[plan.piece, *(piece for piece in PIECES if piece < plan.piece)],
        )
        decoder = partial(
            Decoder,
            prepared.parts,
            common_prefix(prompts) if share_prefix else [],
            max_new_tokens=max_new_tokens,
            eos=eos,
            pad=PAD_ID,
            temperature=sampling.temperature or 1.0,
            top_p=sampling.top_p,
            graphs=graphs,
        )
        seeds = _seeds(sampling, numbers or range(len(prompts)))
        yield from _batches(
            prompts, seeds, waiting, decoder, eos=eos, stop=stop, deadline=deadline,
            meter=Meter() if meter is None else meter,
        )  # fmt: skip


def _seeds(sampling: Sampling, numbers: Sequence[int]) -> list[list[tuple[int, int, int] | None]]:
    """What each answer of each prompt is drawn by; None: it is greedy."""
    greedy = 1 if sampling.answers > 1 or sampling.temperature == 0 else 0
    return [
        [None if n < greedy else (sampling.seed, number, n) for n in range(sampling.answers)]
        for number in numbers
    ]


def _batches(
    prompts: Sequence[Sequence[int]],
    seeds: Sequence[Sequence[tuple[int, int, int] | None]],
    waiting: Waiting,
    new_decoder: Callable[..., Decoder],
    *,
    eos: int,
    stop: Callable[[list[int]], bool] | None,
    deadline: float | None,
    meter: Meter,
) -> Iterator[Finished]:
    """Batch after batch of what is waiting, by one decoder for all that memory does not cut
    short."""
    lengths = [len(prompt) for prompt in prompts]
    begun, wall = time.monotonic(), meter.wall
    decoder: Decoder | None = None
    slowest = 0.0
    while waiting.batches:
        started = time.monotonic()
        if deadline is not None and started + slowest > deadline:
            return
        batch = waiting.batches[0]
        try:
            if decoder is None:
                rows, cache_tokens = waiting.most()
                decoder = new_decoder(rows=rows, cache_tokens=cache_tokens, piece=waiting.pieces[0])
            written = decoder.answer([prompts[i] for i in batch], [seeds[i] for i in batch], stop)
        except torch.OutOfMemoryError:
            written = None
        # outside of the handler, whose traceback holds memory
        if written is None or decoder is None:
            decoder = None
            gc.collect()  # stages' threads and what they raised hold each other, and the cache
            if torch.cuda.is_available():
                torch.cuda.empty_cache()
            if not waiting.shrink():
                raise torch.OutOfMemoryError(
                    f"One prompt of {lengths[batch[0]]} tokens with {len(seeds[batch[0]])} answers "
                    "does not fit in memory: give fewer answers_per_row, or shorter texts "
                    "(max_tokens)."
                )
            continue
        answers = [[_answer(ids, bad, eos, stop) for ids, bad in each] for each in written]
        spent = time.monotonic() - started
        slowest = max(slowest, spent)
        tokens = [len(answer.ids) for each in answers for answer in each]
        reading = decoder.prefill_seconds
        if waiting.done():
            decoder = None
        meter.add([lengths[i] for i in batch], tokens, reading, spent - reading)
        meter.wall = wall + time.monotonic() - begun
        meter.left = meter.estimate([lengths[i] for i in waiting.to_come()])
        yield from map(Finished, batch, answers)


def _answer(
    ids: list[int], bad: bool, eos: int, stop: Callable[[list[int]], bool] | None
) -> Answer:
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
