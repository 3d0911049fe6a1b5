"""Answers to one batch of prompts: prefill into a static KV cache, then steps that CUDA graphs
replay.

Columns of the cache, the same for all rows: the prefix that all prompts share (computed once),
padding up to the longest rest, the rests, the answers. A step reads nothing back to the host:
tokens, positions and the rows that are done live on the devices, and the host looks at them every
CHECK steps, to end or shrink the batch.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence

import numpy as np
import torch

from prompt_recovery.engine.batching import cache_columns
from prompt_recovery.engine.kernels.dispatch import on
from prompt_recovery.engine.parts import Part
from prompt_recovery.engine.stage import Stage, flow, hand_over

# rows of a step, and those that a batch shrinks to: so few shapes that their graphs serve many
# batches
ROWS = (1, 2, *range(4, 64, 4), 64, 96, 128, 192, 256)
CHECK = 8  # steps between two looks at what is done, for which the host waits; not tuned


def cut(rows: int, columns: int, piece: int) -> list[tuple[slice, slice]]:
    """Slices of rows and columns, each of at most `piece` tokens, in an order in which a row's
    columns come one after the other; as few as can be, of rows whose columns together are at most
    two pieces, or of one row: attention copies the keys and values of all of these."""

    def count(height: int) -> int:
        return -(-rows // height) * -(-columns // max(1, piece // height))

    height = min(range(1, max(1, min(rows, piece, 2 * piece // columns)) + 1), key=count)
    parts = -(-columns // max(1, piece // height))
    width = -(-columns // parts)
    return [
        (slice(row, min(row + height, rows)), slice(column, min(column + width, columns)))
        for row in range(0, rows, height)
        for column in range(0, columns, width)
    ]


class Decoder:
    """Answers batches of prompts that share a prefix, with a model in parts.

    rows: most rows (answers) of a batch. cache_tokens: that the KV cache holds, at least rows *
    (prompt + max_new_tokens) of every batch, or rows * `cache_columns` of those that shall share a
    graph.
    prefill_seconds: of the last batch.
    temperature, top_p: of the sampled answers. piece: most tokens that prefill reads at a time.
    graphs: replay steps as CUDA graphs where that can be.
    """

    def __init__(
        self,
        parts: Sequence[Part],
        prefix: Sequence[int],
        *,
        rows: int,
        cache_tokens: int,
        max_new_tokens: int,
        eos: int,
        pad: int,
        temperature: float = 1.0,
        top_p: float = 1.0,
        piece: int = 16_384,
        graphs: bool = True,
    ) -> None:
        # a step whose attention knows the rows of the batch may have more: its graph serves batches
        # of all lengths
        self.rounds = parts[-1].knows_rows
        rows = self._step_rows(rows)
        self.prefix, self.max_new, self.eos, self.pad = list(prefix), max_new_tokens, eos, pad
        self.temperature, self.top_p = temperature, top_p
        self.piece, self.cache_tokens = piece, cache_tokens
        self.stages = [
            Stage(
                part,
                len(prefix),
                rows=rows,
                cache_tokens=cache_tokens,
                graphs=graphs,
                alone=len(parts) == 1,
            )
            for part in parts
        ]
        self.device = self.stages[-1].device  # where tokens are chosen
        whole = dict(device=self.device, dtype=torch.long)
        # the tokens that the next step takes; with one stage its own
        self.tokens = self.stages[0].x if len(parts) == 1 else torch.zeros(rows, 1, **whole)
        self.number, self.out = torch.zeros(1, **whole), torch.zeros(rows, max_new_tokens, **whole)
        self.done, self.bad = (
            torch.zeros(rows, device=self.device, dtype=torch.bool) for _ in range(2)
        )
        self.draws = torch.zeros(rows, max_new_tokens, device=self.device, dtype=torch.float64)
        self.knows_prefix = not prefix

    @torch.inference_mode()
    def answer(
        self,
        prompts: Sequence[Sequence[int]],
        seeds: Sequence[Sequence[Sequence[int] | None]],
        finished: Callable[[list[int]], bool] | None = None,
    ) -> list[list[tuple[list[int], bool]]]:
        """(token ids, whether logits were not finite) of the answers to each prompt, each up to and
        with EOS, or max_new_tokens long. An answer ends where its logits are not finite, and those
        ids are none.

        prompts: ids that begin with the prefix. seeds: for each prompt its answers' seeds, None for
        a greedy one; the same number for each. finished: whether an answer without EOS may end,
        judged from its ids.
        """
        count, per_prompt = len(prompts), len(seeds[0])
        if self.device.type == "cuda":
            # a batch of another shape: what the allocator keeps of the last one's would grow until
            # the card is full
            torch.cuda.empty_cache()
        rests = [list(prompt[len(self.prefix) :]) for prompt in prompts]
        width = max(len(rest) for rest in rests)
        longest = len(self.prefix) + width
        columns = cache_columns(longest, self.max_new)
        if count * per_prompt * columns > self.cache_tokens:
            columns = longest + self.max_new
        started = time.monotonic()
        logits = self._prefill(rests, width, columns)
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        self.prefill_seconds = time.monotonic() - started
        rows = count * per_prompt
        spread = torch.arange(count).repeat_interleave(per_prompt)
        for stage in self.stages:
            with on(stage.device):
                stage.positions[:count] = longest - stage.padding[:count]
                stage.column.fill_(longest)
                if per_prompt > 1:
                    stage.select(spread, rows)
        logits = logits[spread.to(self.device)] if per_prompt > 1 else logits
        flat = [seed for each in seeds for seed in each]
        draws = [
            np.zeros(self.max_new)
            if s is None
            else np.random.Generator(np.random.Philox(s)).random(self.max_new)
            for s in flat
        ]
        self.sampled = any(seed is not None for seed in flat)
        # a draw of -1 marks the greedy rows
        self.draws[:rows] = torch.from_numpy(
            np.stack([d - (s is None) for d, s in zip(draws, flat, strict=True)])
        )
        self.number.zero_()
        self.done[:rows] = self.bad[:rows] = False
        self.done[rows:] = True
        with on(self.device):
            self.choose(logits, rows)
        return self._decode(rows, count, per_prompt, finished)

    def _prefill(self, rests: list[list[int]], width: int, columns: int) -> torch.Tensor:
        """Logits after the last token of each prompt, fp32 [rows, vocabulary]; the caches are
        filled."""
        start = len(self.prefix)
        if not self.knows_prefix:
            self._read(torch.tensor([self.prefix]), torch.zeros(1, 1, dtype=torch.long), 0, start)
            for stage in self.stages:
                stage.call(stage.keep_prefix).result()
            self.knows_prefix = True
        padding = torch.tensor([[width - len(rest)] for rest in rests])
        ids = torch.tensor([[self.pad] * (width - len(rest)) + rest for rest in rests])
        return self._read(ids, padding, start, columns)

    def _read(
        self, ids: torch.Tensor, padding: torch.Tensor, start: int, columns: int
    ) -> torch.Tensor:
        """Keys and values of ids [R, C] go to the columns from `start` on of a cache of so many;
        gives the last logits."""
        rows, width = ids.shape
        for stage in self.stages:
            stage.call(stage.begin, rows, columns, padding).result()
        pieces = cut(rows, width, self.piece)

        def read(stage: Stage, x: torch.Tensor, number: int) -> torch.Tensor:
            rows, columns = pieces[number]
            y = stage.read(x, rows, slice(start + columns.start, start + columns.stop))
            return y[:, -1].float() if stage.part.last else y

        found = flow(self.stages, [ids[piece] for piece in pieces], read)
        return torch.cat(
            [y for y, (_, columns) in zip(found, pieces, strict=True) if columns.stop == width]
        )

    def choose(self, logits: torch.Tensor, rows: int) -> None:
        """Write the next token of each row, and move on. logits: fp32 [rows, vocabulary]."""
        done = self.done[:rows]
        # one that is not finite would be chosen, or, drawn from, the vocabulary's last; a row that
        # is done has no say
        self.bad[:rows] |= ~done & ~logits.isfinite().all(-1)
        done |= self.bad[:rows]
        tokens = logits.argmax(-1)
        if self.sampled:
            draws = self.draws[:rows].index_select(1, self.number)[:, 0]
            tokens = torch.where(
                draws < 0, tokens, sample(logits, draws, self.temperature, self.top_p)
            )
        tokens = torch.where(done, self.pad, tokens)
        self.out[:rows].index_copy_(1, self.number, tokens[:, None])
        done |= tokens == self.eos
        self.tokens[:rows] = tokens[:, None]
        self.number += 1

    def _step_rows(self, rows: int) -> int:
        return next((size for size in ROWS if size >= rows), rows) if self.rounds else rows

    def _step(self, rows: int) -> None:
        """One token of each row, through the stages; nothing waits for the host."""
        rows = self._step_rows(rows)
        y = self.tokens
        for stage in self.stages:
            if y is not stage.x:
                hand_over(y[:rows], stage.x[:rows])
            stage.replay(rows, self.sampled, self.choose)
            y = stage.y

    def _decode(
        self, rows: int, count: int, per_prompt: int, finished: Callable | None
    ) -> list[list[tuple[list[int], bool]]]:
        answers: dict[int, tuple[list[int], bool]] = {}
        # which answer each row of the batch is, None for one that fills it
        live: list[int | None] = list(range(rows))
        for number in range(1, self.max_new + 1):
            if number % CHECK == 0 or number == self.max_new:
                over, bad = self.done[: len(live)].tolist(), self.bad[: len(live)].tolist()
                written = self.out[: len(live), :number].tolist()
                for row, (which, ids) in enumerate(zip(live, written, strict=True)):
                    if which is None:
                        continue
                    over[row] = (
                        over[row]
                        or number == self.max_new
                        or (finished is not None and finished(ids))
                    )
                    if over[row]:
                        answers[which] = (
                            ids[: ids.index(self.eos) + 1] if self.eos in ids else ids,
                            bad[row],
                        )
                        live[row] = None
                if not any(which is not None for which in live):
                    break
                live = self._keep(live, over)
            if number < self.max_new:
                self._step(len(live))
        return [
            [answers[position * per_prompt + n] for n in range(per_prompt)]
            for position in range(count)
        ]

    def _keep(self, live: list[int | None], over: list[bool]) -> list[int | None]:
        """Once half of the rows are over, the others go on alone, filled up to one of ROWS with
        rows that are over: the step gets cheaper, but may want a graph of its own."""
        self.done[: len(live)] |= torch.tensor(over, device=self.device)
        left = [row for row, which in enumerate(live) if which is not None]
        rows = next((size for size in ROWS if size >= len(left)), len(left))
        if rows * 2 > len(live):
            return live
        fill = [row for row, which in enumerate(live) if which is None]
        kept = left + fill[: rows - len(left)]
        index = torch.tensor(kept)
        for stage in self.stages:
            stage.select(index, rows)
        index = index.to(self.device)
        for state in (self.tokens, self.out, self.done, self.bad, self.draws):
            state[:rows] = state.index_select(0, index)
        self.done[rows:] = True
        return [live[row] for row in kept]


def sample(
    logits: torch.Tensor, draws: torch.Tensor, temperature: float, top_p: float
) -> torch.Tensor:
    """One token a row by inverting the cumulative distribution at draws [rows] in [0, 1);
    temperature and top_p as transformers' warpers have them, which always keep the likeliest.
    logits [rows, vocabulary] fp32."""
    probabilities = (logits / temperature).softmax(-1).double()
    if top_p < 1:
        falling, order = probabilities.sort(dim=-1, descending=True, stable=True)
        # the token that crosses top_p is still in
        kept = falling.cumsum(-1) - falling < max(top_p, 1e-9)
        probabilities = torch.where(
            torch.empty_like(kept).scatter_(-1, order, kept), probabilities, 0.0
        )
    # summed in the order of the ids: sorted, rounding (which the batch decides) would swap tokens
    # of like probability
    sums = probabilities.cumsum(-1)
    return (sums <= draws[:, None] * sums[:, -1:]).sum(-1).clamp(max=logits.shape[-1] - 1)
