"""How a model answers with the memory that is left beside its weights: one table of bytes, which
`plan` prints, `generate` obeys and tests check."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from prompt_recovery.engine import memory
from prompt_recovery.engine.batching import MOST_ROWS
from prompt_recovery.engine.forward import rows_at_once
from prompt_recovery.engine.memory import GIB, Sizes, kv_shape

# CUDA's context at load, which grows by 0.1 GiB until the end of a run (docs/MEASURED.md); that is
# in the margin, which also leaves half a GiB free
CONTEXT = round(0.55 * GIB)
# a stage's captured steps and what they compute in; what the allocator holds in vain
GRAPHS = round(0.15 * GIB)
MARGIN = round(0.7 * GIB)
PIECES = (16_384, 8_192, 4_096, 2_048, 1_024, 512, 256)  # tokens that prefill reads at a time
LONGEST = 4_096  # tokens of a prompt and its answer
# What choosing takes a row to be: tokens read and written, in a cache with padding
TYPICAL_READ, TYPICAL_WRITTEN, TYPICAL_COLUMNS = 700, 64, 832
CPU_TOKENS = 16_384  # rows * columns of a batch on the CPU, where larger ones gain nothing
ADAPTER_RANK = 16  # assumed where the adapter isn't known


class Shape(NamedTuple):
    """What a model's forward computes with: sizes of the hidden state, of an expert (or of a dense
    layer), of all query heads and of all key heads; experts, and how many a token has; the
    vocabulary; bytes of a value."""

    hidden: int
    inner: int
    queries: int
    keys: int
    experts: int
    chosen: int
    vocabulary: int
    wide: int


def shape_of(config: Any, dtype: torch.dtype) -> Shape:
    config = config.get_text_config()
    heads, size = kv_shape(config)
    experts = (
        getattr(config, "num_local_experts", None) or getattr(config, "num_experts", None) or 1
    )
    inner = getattr(config, "moe_intermediate_size", None) or config.intermediate_size
    chosen = getattr(config, "num_experts_per_tok", None) or 1
    wide = torch.finfo(dtype).bits // 8
    return Shape(
        config.hidden_size,
        inner,
        config.num_attention_heads * size,
        heads * size,
        experts,
        chosen,
        config.vocab_size,
        wide,
    )


class StageBytes(NamedTuple):
    """Bytes on a card whose stage answers: the weights of its layers; the adapter's; the layers
    that it adapts once more, merged in 16 bit; the KV cache; 16-bit weights of the experts that are
    computed at a time; what a piece of prefill computes in; captured steps; CUDA's context; what is
    left free on purpose."""

    weights: int
    adapter: int
    merged: int
    cache: int
    experts: int
    activations: int
    graphs: int
    context: int = CONTEXT
    margin: int = MARGIN

    @property
    def to_come(self) -> int:
        """What a loaded model has yet to ask for."""
        return sum(self) - self.weights - self.adapter - self.context


def bytes_of(
    shape: Shape,
    layers: int,
    *,
    weights: int,
    last: bool,
    piece: int,
    rows: int,
    cache_tokens: int,
    merged: bool,
    adapter: bool = True,
    grouped: bool = False,
    triton: bool = True,
    sampled: bool = False,
) -> StageBytes:
    """What a stage of so many layers takes on its card.

    Args:
        shape: of the model.
        layers, weights: of the stage, how many and their bytes.
        last: it has the head.
        piece: tokens that prefill reads at a time.
        rows, cache_tokens: of the largest batch; each cache token is keys and values in every
            layer.
        merged: the adapter is merged, else it stands beside the weights.
        adapter: there is one, of rank 16.
        grouped: experts by one grouped GEMM, for which a layer's weights are dequantised; else an
            expert's.
        triton: its kernels run; torch's SwiGLU has fp32 copies.
        sampled: some answers are drawn.
    """
    hidden, wide = shape.hidden * shape.wide, shape.wide
    # of q, k, v and o beside the hidden state
    sides = [shape.queries, shape.keys, shape.keys, shape.queries]
    attention = wide * shape.hidden * sum(sides)
    # in fp32, and in 16 bit beside the weights
    lora = (
        (4 if merged else 6) * ADAPTER_RANK * sum(shape.hidden + side for side in sides)
        if adapter
        else 0
    )
    # queries, keys and values, rotated and not, with the parts that the rotation makes
    looking = piece * wide * (5 * shape.queries + 6 * shape.keys)
    if adapter and not merged:
        looking += shape.queries * hidden  # a dequantised weight
    matrix = 2 * shape.inner * hidden  # gate and up of an expert
    if shape.experts == 1:
        weight, computing = 0, piece * 3 * shape.inner * wide
    elif grouped:
        weight, computing = (
            shape.experts * matrix * 3 // 2,
            shape.chosen * piece * (2 * hidden + 3 * shape.inner * wide),
        )
    else:
        # rows in expert order; gate and up of the worst case, in which one expert has all tokens
        at_once = rows_at_once(piece) * shape.inner
        weight, computing = matrix, shape.chosen * piece * hidden + 2 * at_once * wide
        computing += 0 if triton else 4 * at_once * 4
    logits = rows * shape.vocabulary * (60 if sampled else 14) if last else 0
    return StageBytes(
        weights,
        layers * lora,
        layers * attention if merged and adapter else 0,
        layers * 2 * shape.keys * wide * cache_tokens,
        weight,
        5 * piece * hidden + piece * LONGEST * wide + max(looking, computing),
        GRAPHS + logits,
    )


class AnswerPlan(NamedTuple):
    """How a model answers: layers of each stage; whether the adapter is merged into 16-bit weights
    or computed beside those in 4 bits; tokens that prefill reads at a time; most tokens of a
    batch's KV cache, rows * columns with their padding."""

    layers: tuple[int, ...]
    merged: bool
    piece: int
    cache_tokens: int


def answer_plan(
    shape: Shape,
    layers: Sequence[int],
    free: Sequence[int],
    *,
    adapter: bool = True,
    rows: int = MOST_ROWS,
    **options: bool,
) -> AnswerPlan:
    """The fastest plan, by `seconds_a_row`. Where nothing fits, the smallest pieces and no cache
    tokens.

    Args:
        shape: of the model.
        layers, free: of each stage, and the bytes that are free on its card beside the weights.
        adapter: there is one.
        rows: most of a batch.
        options: grouped, triton and sampled of `bytes_of`.
    """
    best: tuple[float, AnswerPlan] | None = None
    for merged in (True, False) if adapter else (False,):
        for piece in PIECES:
            cache_tokens = min(
                (
                    free_bytes
                    - bytes_of(
                        shape,
                        count,
                        weights=0,
                        last=number == len(layers) - 1,
                        piece=piece,
                        rows=rows,
                        cache_tokens=0,
                        merged=merged,
                        adapter=adapter,
                        **options,
                    ).to_come
                )
                // (count * 2 * shape.keys * shape.wide)
                for number, (count, free_bytes) in enumerate(zip(layers, free, strict=True))
            )
            if cache_tokens >= LONGEST:
                plan = AnswerPlan(tuple(layers), merged, piece, cache_tokens)
                spent = seconds_a_row(plan, adapter)
                if best is None or spent < best[0]:
                    best = spent, plan
    return best[1] if best else AnswerPlan(tuple(layers), False, PIECES[-1], 0)


# A decode step's milliseconds by rows, fp16 lowered to sm_75, measured on an H100 (docs/MEASURED.md
# has later runs): merged, and beside 4-bit weights
STEPS = {
    True: ((1, 7.4), (16, 15.6), (32, 18.6), (64, 32.2)),
    False: ((1, 9.1), (8, 18.4), (16, 20.7), (24, 23.5), (32, 24.5), (40, 31.5), (64, 38.0)),
}
# tokens a second of prefill there, in pieces of 16,384; a ninth fewer beside 4-bit weights
READ = 20_900
DEQUANTISED = 800  # tokens in whose time all experts are dequantised, which each piece does


def step_ms(rows: int, merged: bool) -> float:
    """Milliseconds of a decode step there, between the rows that were measured."""
    rows_measured, spent = zip(*STEPS[merged], strict=True)
    return float(np.interp(rows, rows_measured, spent))


def seconds_a_row(plan: AnswerPlan, adapter: bool = True) -> float:
    """Seconds that a row takes on an H100 with a T4's kernels: what plans are compared by."""
    merged = plan.merged or not adapter
    rows = max(1, min(MOST_ROWS, plan.cache_tokens // TYPICAL_COLUMNS))
    reading = TYPICAL_READ * (1 + DEQUANTISED / plan.piece) / READ * (1 if merged else 9 / 8)
    return reading + step_ms(rows, merged) / 1e3 * (TYPICAL_WRITTEN - 1) / rows


class Planned(NamedTuple):
    """A model on cards that need not be there: its sizes, its shape, its layers by card, how it
    answers, what that takes on each card that has layers, and whether the 16-bit folder must be put
    together by the CPU."""

    sizes: Sizes
    shape: Shape
    answering: AnswerPlan
    bytes: list[StageBytes]
    on_cpu: bool


def plan(model_dir: str | Path, cards: Sequence[float]) -> Planned:
    """How the model of a folder answers in 4 bits, with an adapter, on cards that leave so many GiB
    to a process.

    Raises TooLittleMemory with what is needed and what there is.
    """
    sizes = memory.sizes(model_dir, torch.float16, four_bit=True)
    free = [round(card * GIB) - CONTEXT for card in cards]
    split = memory.place(sizes, free)
    weights = memory.stage_weights(sizes, split)
    layers = [count for count in split if count]
    shape = shape_of(memory.load_config(model_dir), torch.float16)
    used = [free_bytes for free_bytes, count in zip(free, split, strict=True) if count]

    def table(cache_tokens: int, merged: bool, piece: int) -> list[StageBytes]:
        return [
            bytes_of(
                shape,
                count,
                weights=own,
                last=number == len(layers) - 1,
                piece=piece,
                rows=MOST_ROWS,
                cache_tokens=cache_tokens,
                merged=merged,
            )
            for number, (count, own) in enumerate(zip(layers, weights, strict=True))
        ]

    beside = [
        free_bytes - own - part.adapter
        for free_bytes, own, part in zip(used, weights, table(0, False, 1), strict=True)
    ]
    answering = answer_plan(shape, layers, beside)
    found = table(answering.cache_tokens, answering.merged, answering.piece)
    return Planned(sizes, shape, answering, found, memory.merges_on_cpu(sizes, split, free))
