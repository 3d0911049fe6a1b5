"""Prompts in batches of like length, and the order in which they are answered."""

from __future__ import annotations

from collections.abc import Sequence

MOST_ROWS = 64  # of a batch


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
