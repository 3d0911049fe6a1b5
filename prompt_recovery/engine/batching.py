"""Prompts in batches of like length, and the order in which they are answered."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

MOST_ROWS = 64  # of a batch
GROW = 4  # batches that must have gone well before a limit that memory halved is doubled; not tuned
ALIGNMENT = 64  # cache lengths are multiples, so that batches of like lengths share a graph


def make_batches(
    lengths: Sequence[int], max_new_tokens: int, batch_tokens: int, most_rows: int = MOST_ROWS
) -> list[list[int]]:
    """Positions of the prompts in batches of similar length, the longest first (too little memory
    then shows at once).

    batch_tokens: upper limit of rows * (longest prompt + max_new_tokens) in a batch; a longer row
    stands alone.
    """
    batches: list[list[int]] = []
    for position in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        width = (lengths[batches[-1][0]] if batches else 0) + max_new_tokens
        if (
            batches
            and width * (len(batches[-1]) + 1) <= batch_tokens
            and len(batches[-1]) < most_rows
        ):
            batches[-1].append(position)
        else:
            batches.append([position])
    return batches


def spread_order(batches: Sequence[list[int]]) -> list[list[int]]:
    """The same batches: the first one first, then halves, quarters, eighths of the way, so that
    those done so far are like those to come. Sorted, the estimate of the time left was 55% off
    after a tenth (few long rows say little of many short ones)."""
    order = sorted(range(1, len(batches)), key=lambda n: f"{n:032b}"[::-1])
    return [*batches[:1], *(batches[n] for n in order)]


def cache_columns(longest: int, max_new_tokens: int) -> int:
    """Columns of the cache for prompts of up to `longest` tokens and their answers."""
    return -(-(longest + max_new_tokens) // ALIGNMENT) * ALIGNMENT


class Waiting:
    """Prompts that wait for their answers, in batches within what memory has been seen to allow.

    batches: positions, the next batch first. limit: most answers * (prompt + new tokens) of one.
    pieces: tokens that prefill may read at a time, the most first; the first one is in force.
    """

    def __init__(
        self,
        lengths: Sequence[int],
        *,
        answers: int,
        new_tokens: int,
        limit: int,
        pieces: Sequence[int],
    ) -> None:
        self.lengths, self.answers, self.new_tokens = lengths, answers, new_tokens
        self.limit = self.whole = limit
        self.pieces, self.well = list(pieces), 0
        self._arrange(range(len(lengths)))

    def _arrange(self, positions: Iterable[int]) -> None:
        positions = list(positions)
        most = max(1, MOST_ROWS // self.answers)
        lengths = [self.lengths[i] for i in positions]
        made = make_batches(lengths, self.new_tokens, self.limit // self.answers, most)
        self.batches = [[positions[i] for i in batch] for batch in spread_order(made)]

    def to_come(self) -> list[int]:
        """Positions of the prompts that wait."""
        return [position for batch in self.batches for position in batch]

    def cache_tokens(self, batch: Sequence[int]) -> int:
        """Rows * columns of a batch's cache: columns in multiples, in which batches share graphs,
        as long as that keeps the limit."""
        longest, rows = self.lengths[batch[0]], len(batch) * self.answers
        rounded = min(rows * cache_columns(longest, self.new_tokens), self.limit)
        return max(rows * (longest + self.new_tokens), rounded)

    def most(self) -> tuple[int, int]:
        """The most rows, and the most cache tokens, of the batches that wait."""
        rows = max(len(batch) for batch in self.batches) * self.answers
        return rows, max(map(self.cache_tokens, self.batches))

    def done(self) -> bool:
        """The first batch is answered. Whether the limit grew, once enough batches went well."""
        self.batches.pop(0)
        self.well += 1
        if self.well < GROW or self.limit == self.whole or not self.batches:
            return False
        self.well, self.limit = 0, min(2 * self.limit, self.whole)
        self._arrange(self.to_come())
        return True

    def shrink(self) -> bool:
        """The first batch did not fit. Less from now on; False where there is nothing less."""
        batch, self.well = self.batches[0], 0
        if len(batch) > 1:
            # the tokens are halved, not the rows: shorter ones may still be as many
            columns = self.lengths[batch[0]] + self.new_tokens
            self.limit = len(batch) // 2 * self.answers * columns
        elif self.most()[1] > self.cache_tokens(batch):  # the cache was made for others
            self.limit //= 2
        elif len(self.pieces) > 1:
            self.pieces.pop(0)
        else:
            return False
        self._arrange(self.to_come())
        return True
