"""What a test set takes: by rates measured on H100s with a T4's kernels, and reckoned for T4s; what
a training takes on T4s, reckoned."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from prompt_recovery.engine.batching import make_batches
from prompt_recovery.engine.planning import DEQUANTISED, READ, Planned, step_ms

# A T4: multiplications of its tensor cores a second that a product of many rows reaches, bytes of
# its memory a second; and bytes that Kaggle's mount gives
T4_FLOPS, T4_BYTES, KAGGLE_BYTES = 25e12, 260e9, 0.3e9
MOVED = 2.5  # bytes a weight that dequantising it moves: half a byte in, two out


class Seconds(NamedTuple):
    """What a job takes: reading the weights, the prompts, writing the answers."""

    loading: float
    reading: float
    writing: float


def on_h100s(planned: Planned, lengths: Sequence[int], new_tokens: int) -> Seconds:
    """By the rates measured for Mixtral on H100s with a T4's kernels."""
    groups = _groups(planned, lengths, new_tokens)
    merged = planned.answering.merged
    reading = (
        sum(lengths) * (1 + DEQUANTISED / planned.answering.piece) / READ * (1 if merged else 9 / 8)
    )
    return Seconds(
        20.0, reading, sum(step_ms(rows, merged) for rows, _ in groups) / 1e3 * (new_tokens - 1)
    )


def on_t4s(planned: Planned, lengths: Sequence[int], new_tokens: int) -> Seconds:
    """Reckoned, in one way only: a step is the largest of its bytes over 260 GB/s, and of what its
    tensor cores and its instructions take, which is less (13 to 26 ms and 10 to 20 a card, where
    bytes take 54); prefill its multiplications at 25 TFLOP/s a card and, for each piece, the bytes
    of dequantising every expert, all cards at work; weights are read from Kaggle's mount at 0.3
    GB/s."""
    shape, cards = planned.shape, len(planned.bytes)
    layers = sum(planned.answering.layers)
    active, experts = _parameters(planned)
    pieces = -(-sum(lengths) // planned.answering.piece)
    reading = sum(lengths) * 2 * active / (T4_FLOPS * cards) + pieces * experts * MOVED / (
        T4_BYTES * cards
    )
    step = [part.weights + part.merged for part in planned.bytes]
    writing = sum(
        (sum(step) + rows * columns * layers * 2 * shape.keys * shape.wide) / T4_BYTES
        for rows, columns in _groups(planned, lengths, new_tokens)
    ) * (new_tokens - 1)  # fmt: skip
    stored = (
        2 * (active + experts * (1 - shape.chosen / shape.experts))
        if planned.sizes.merging
        else planned.sizes.weights
    )
    return Seconds(stored / KAGGLE_BYTES, reading, writing)


class TrainingSeconds(NamedTuple):
    """What a training's steps take, their multiplications and dequantising weights, and what one
    evaluation adds: the loss of its rows, and answers to half of them."""

    multiplying: float
    dequantising: float
    losses: float
    answers: float

    @property
    def steps(self) -> float:
        return self.multiplying + self.dequantising


def train_on_t4s(
    planned: Planned,
    rows: int,
    tokens: int,
    epochs: float,
    *,
    at_a_time: int,
    held_out: int,
    new_tokens: int,
) -> TrainingSeconds:
    """Reckoned, as `on_t4s`, with one card at work at a time: a token's forward, recomputation and
    backward are 6 operations for each active weight, those of the adapter aside; each of the three
    dequantises all experts (or a dense model's layers) once for a micro-batch.

    Args:
        planned: the model on its cards, of `plan`.
        rows, tokens: trained on in each epoch, and of each of them.
        epochs: may be a fraction.
        at_a_time: rows of a micro-batch.
        held_out, new_tokens: rows of an evaluation, and tokens of an answer.
    """
    active, experts = _parameters(planned)
    dequantising = experts * MOVED / T4_BYTES
    micro_batches = -(-rows // at_a_time) * epochs
    answering = on_t4s(planned, [tokens] * (held_out // 2), new_tokens)
    return TrainingSeconds(
        rows * tokens * epochs * 6 * active / T4_FLOPS,
        micro_batches * 3 * dequantising,
        held_out * tokens * 2 * active / T4_FLOPS + -(-held_out // at_a_time) * dequantising,
        answering.reading + answering.writing,
    )


def _parameters(planned: Planned) -> tuple[int, int]:
    """Weights that a token is multiplied with, and those of all experts (or of a dense model's
    layers but attention)."""
    shape, layers = planned.shape, sum(planned.answering.layers)
    expert = 3 * shape.hidden * shape.inner
    attention = 2 * shape.hidden * (shape.queries + shape.keys)
    active = layers * (attention + shape.chosen * expert) + shape.hidden * shape.vocabulary
    return active, layers * shape.experts * expert


def _groups(planned: Planned, lengths: Sequence[int], new_tokens: int) -> list[tuple[int, int]]:
    """(rows, columns) of the batches."""
    batches = make_batches(lengths, new_tokens, planned.answering.cache_tokens)
    return [(len(batch), lengths[batch[0]] + new_tokens) for batch in batches]
