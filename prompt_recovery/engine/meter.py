"""What generating has counted, and the rates that follow from it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass
class Meter:
    """Counts of one or more runs of `generate`, and the rates that follow from them.

    reading, writing: busy seconds of prefill and of decoding. wall: seconds since a run began,
    until its last batch.
    longest: tokens of the longest answer. slowest: seconds of the slowest batch. left: estimate of
    the seconds that the rest of the run will take.
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
    # rows, tokens read, seconds of reading, of writing
    first: tuple[int, int, float, float] = (0, 0, 0.0, 0.0)

    @property
    def seconds(self) -> float:
        return self.reading + self.writing

    @property
    def rate(self) -> float:
        """Tokens written a busy second."""
        return self.tokens_out / max(self.seconds, 1e-9)

    def add(
        self, lengths: Sequence[int], written: Sequence[int], reading: float, writing: float
    ) -> None:
        """Count a batch. lengths, written: tokens of its prompts and of its answers. reading,
        writing: seconds."""
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
        """Of reading. The first batch compiles and captures: once there are others it says nothing
        about them."""
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
            f"{self.rows} rows, {self.tokens_in} tokens read, {self.tokens_out} written in "
            f"{self.seconds:.0f} s ({self.rate:.0f} written a second), about {self.left:.0f} s "
            "left"
        )
