"""Several answers to one row, and a mean prompt if you like, made into one answer that the scorer
reads to its end.

A mean prompt is one sentence that fits many rows a little. It and the joining of answers raise the
score and recover nothing, so report the score with and without them. Nothing here writes text made
for the encoder alone.
"""

from __future__ import annotations

import re
import unicodedata
from bisect import bisect_right
from collections.abc import Callable, Sequence
from functools import cache
from itertools import product
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from sentencepiece import SentencePieceProcessor

from prompt_recovery.data import normalise
from prompt_recovery.metric import sharpened_cosine
from prompt_recovery.recipe import STRATEGIES

if TYPE_CHECKING:
    from sentence_transformers import SentenceTransformer

# tokens of sentence-t5, EOS included: what goes beyond is not read, and such answers scored about
# 0.41
LIMIT = 128


@cache
def _pieces() -> SentencePieceProcessor:
    # T5's pieces, scores and normaliser (Apache 2.0), sentence-t5's too by all that is known;
    # LOG.md: where they are from
    return SentencePieceProcessor(model_file=str(Path(__file__).with_name("t5_pieces.model")))


def count_tokens(text: str) -> int:
    """Tokens of a text as the scorer counts them: T5's raw SentencePiece pieces and one for EOS. A
    `</s>` in the text is spelled out, not taken for EOS."""
    return len(_pieces().encode(text)) + 1


def similarities(answers: Sequence[str], encoder: SentenceTransformer | None = None) -> np.ndarray:
    """Sharpened cosine of each answer to each, float64 [n, n]; without an encoder 1 where the
    wording is the same, else 0."""
    pairs = list(product(answers, repeat=2))
    if encoder is None:
        scores = np.array([float(normalise(left) == normalise(right)) for left, right in pairs])
    else:
        scores = sharpened_cosine(
            [left for left, _ in pairs], [right for _, right in pairs], encoder
        )
    return scores.reshape(len(answers), len(answers))


def agreements(answers: Sequence[str], encoder: SentenceTransformer | None = None) -> np.ndarray:
    """Mean similarity of each answer to the others, float64 [n]; 1 for a single answer."""
    if len(answers) < 2:
        return np.ones(len(answers))
    matrix = similarities(answers, encoder)
    return (matrix.sum(axis=1) - matrix.diagonal()) / (len(answers) - 1)


def combine(
    answers: Sequence[str],
    strategy: str = "first",
    *,
    mean_prompt: str | None = None,
    encoder: SentenceTransformer | None = None,
    threshold: float | None = None,
    count: Callable[[str], int] = count_tokens,
    limit: int = LIMIT,
) -> str:
    """One answer, never blank, from the answers to a row, the greedy one first.

    Args:
        answers: texts; one that is too long for the limit loses its end where it leads.
        strategy: "first" takes the first answer, "agree" the one that agrees most with the others
            (of equals the earlier), "join" all of different wording, most agreed first, as long as
            they fit.
        mean_prompt: goes behind them, and has precedence over all but the leading answer.
        encoder: of `metric.load_encoder`, by which answers agree; without one, by their wording.
        threshold: if the mean of the answers' agreements lies below it (see pick_threshold),
            mean_prompt alone is the answer.
        count, limit: tokens of a text, and how many the scorer reads.

    Raises ValueError for an unknown strategy, no answer that is not blank and no mean_prompt,
    "agree" or threshold without an encoder, threshold without a mean_prompt, a limit that holds
    nothing.
    """
    if strategy not in STRATEGIES:
        raise ValueError(f"combine={strategy!r} is unknown: choose one of {', '.join(STRATEGIES)}.")
    if encoder is None and (strategy == "agree" or threshold is not None):
        raise ValueError(
            "Agreement and threshold need an encoder: give one, or combine='first' or 'join'."
        )
    mean_prompt = (mean_prompt or "").strip()
    if threshold is not None and not mean_prompt:
        raise ValueError(
            f"threshold={threshold}, but there is no mean_prompt to fall back to: give one, or no "
            "threshold."
        )
    answers = [answer.strip() for answer in answers if answer.strip()]
    if not answers and not mean_prompt:
        raise ValueError(
            "All answers are blank and there is no mean_prompt: a blank fails the whole submission."
        )
    if strategy != "first" or threshold is not None:
        agreed = agreements(answers, encoder)
        if answers and threshold is not None and agreed.mean() < threshold:
            answers = []
        elif strategy != "first":
            answers = [answers[i] for i in np.argsort(-agreed.round(6), kind="stable")]
    *rest, last = [*(answers if strategy == "join" else answers[:1]), mean_prompt]
    if not rest:
        rest, last = [last], ""
    kept = [_cut(rest[0], count, limit)]
    end: list[str] = []
    for text in [last, *rest[1:]]:
        if not text or normalise(text) in map(normalise, kept + end):
            continue
        if count(_joined([*kept, text, *end])) <= limit:
            (end if text is last else kept).append(text)
    return _joined([*kept, *end])


def _joined(texts: Sequence[str]) -> str:
    closed = [
        text if unicodedata.category(text[-1])[0] == "P" else text + "." for text in texts[:-1]
    ]
    return " ".join([*closed, texts[-1]])


def _cut(text: str, count: Callable[[str], int], limit: int) -> str:
    """The longest beginning of whole words, or of one word that is too long, that fits."""
    if count(text) <= limit:
        return text
    ends: Sequence[int] = [word.end() for word in re.finditer(r"\S+", text)]
    if count(text[: ends[0]]) > limit:
        ends = range(1, len(text) + 1)
    fitting = bisect_right(ends, limit, key=lambda end: count(text[:end]))
    if fitting == 0:
        raise ValueError(
            f"limit={limit} tokens hold not one character: the scorer's limit is {LIMIT}."
        )
    return text[: ends[fitting - 1]]


def pick_threshold(
    agreed: Sequence[float] | np.ndarray,
    scores: Sequence[float] | np.ndarray,
    mean_scores: Sequence[float] | np.ndarray,
) -> float | None:
    """The threshold with the best mean score on held-out rows, when rows of lower agreement take
    the mean prompt instead.

    agreed: mean of agreements(answers) by row; scores, mean_scores: SCS of the combined answer and
    of the mean prompt, all [n]. Of equals the lowest; None if no threshold gains. Picked for the
    best on these rows, its gain on others is less.
    Raises ValueError for unequal lengths, none, or values that are not finite.
    """
    columns = [np.asarray(each, dtype=np.float64) for each in (agreed, scores, mean_scores)]
    shapes = [each.shape for each in columns]
    if (
        len(set(shapes)) > 1
        or columns[0].ndim != 1
        or not columns[0].size
        or not np.isfinite(columns).all()
    ):
        raise ValueError(
            f"Shapes {shapes}: give agreement and both scores of the same rows, at least one, all "
            "finite."
        )
    order = np.argsort(columns[0], kind="stable")
    agreed, scores, mean_scores = (each[order] for each in columns)
    gains = np.cumsum(mean_scores - scores)
    # a threshold can't part rows of equal agreement
    gains[:-1][agreed[:-1] == agreed[1:]] = -np.inf
    best = int(np.argmax(gains))
    if gains[best] <= 1e-9:
        return None
    above = agreed[best + 1] if best + 1 < len(agreed) else agreed[best] + 1
    return float(agreed[best] + above) / 2
