"""Answers to one batch of prompts: prefill into a static KV cache, then steps that a CUDA graph replays.

Columns of the cache, the same for all rows: the prefix that all prompts share (computed once), padding up to the longest
rest, the rests, the answers. A step reads nothing back to the host: tokens, positions and the rows that are done live on
the device, and the host looks at them every CHECK steps, to end or shrink the batch.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch

from prompt_recovery.engine.memory import kv_shape

# rows that a batch shrinks to: so few shapes that their graphs serve many batches
ROWS = (1, 2, 4, 8, 16, 24, 32, 48, 64, 96, 128, 192, 256)
CHECK = 8  # steps between two looks at what is done, for which the host waits; not tuned
ALIGNMENT = 64  # cache lengths are multiples, so that batches of like lengths share a graph and masks are aligned


def kv_bytes(model: Any) -> dict[torch.device, int]:
    """Bytes of the KV cache for one token, by device that holds layers."""
    sizes: dict[torch.device, int] = {}
    heads, size = kv_shape(model.config)
    for device in _layer_devices(model):
        sizes[device] = sizes.get(device, 0) + 2 * heads * size * torch.finfo(model.dtype).bits // 8
    return sizes


def _layer_devices(model: Any) -> list[torch.device]:
    return [next(layer.parameters()).device for layer in model.get_decoder().layers]


class _StaticCache:
    """Keys and values of [rows, heads, columns, size] a layer, in one piece of memory a layer that batches of other
    shapes use again: a captured graph finds them where they were. It has what attention layers ask of transformers' Cache."""

    def __init__(self, model: Any, cells: int) -> None:
        self.heads, self.size = kv_shape(model.config)
        self.devices = _layer_devices(model)
        self.room = [
            torch.zeros(2, cells * self.heads * self.size, dtype=model.dtype, device=device) for device in self.devices
        ]

    def shape(self, rows: int, columns: int) -> None:
        count = rows * columns * self.heads * self.size
        self.views = [[part[:count].view(rows, self.heads, columns, self.size) for part in room] for room in self.room]
        self.columns = columns

    def at(self, rows: slice, columns: slice | torch.Tensor) -> None:
        """Where the next forward writes; it reads everything up to there, or all columns for a tensor of one column."""
        self.rows = rows
        self.column = None if isinstance(columns, slice) else columns
        self.where = columns if isinstance(columns, slice) else slice(None)
        self.on = {} if isinstance(columns, slice) else {device: columns.to(device) for device in set(self.devices)}

    def layer(self, layer_idx: int) -> tuple[torch.Tensor, torch.Tensor]:
        keys, values = self.views[layer_idx]
        return keys[self.rows], values[self.rows]

    def update(self, key_states, value_states, layer_idx, *args, **kwargs):
        keys, values = self.layer(layer_idx)
        if self.on:
            at = self.on[self.devices[layer_idx]]
            keys.index_copy_(2, at, key_states)
            values.index_copy_(2, at, value_states)
            return keys, values
        keys[:, :, self.where] = key_states
        values[:, :, self.where] = value_states
        return keys[:, :, : self.where.stop], values[:, :, : self.where.stop]

    def get_seq_length(self, layer_idx: int = 0) -> int:
        return self.columns

    def select(self, index: torch.Tensor, rows: int) -> None:
        """Keep the rows of the index, in its order, as the first rows of a cache of `rows` rows."""
        old = self.views
        self.shape(rows, self.columns)
        for layer, device in enumerate(self.devices):
            for new, before in zip(self.views[layer], old[layer], strict=True):
                new[: len(index)] = before.index_select(0, index.to(device))


def cache_columns(longest: int, max_new_tokens: int) -> int:
    """Columns of the cache for prompts of up to `longest` tokens and their answers."""
    return -(-(longest + max_new_tokens) // ALIGNMENT) * ALIGNMENT


class Decoder:
    """Answers batches of prompts that share a prefix, with one model.

    rows: most rows (answers) of a batch; cells: most rows * `cache_columns`. prefill_seconds: of the last batch.
    temperature, top_p: of the sampled answers. graphs: replay steps as CUDA graphs where that can be.
    """

    def __init__(
        self,
        model: Any,
        prefix: Sequence[int],
        *,
        rows: int,
        cells: int,
        max_new_tokens: int,
        eos: int,
        pad: int,
        temperature: float = 1.0,
        top_p: float = 1.0,
        prefill_tokens: int = 16_384,
        graphs: bool = True,
    ) -> None:
        self.model, self.prefix, self.max_new, self.eos, self.pad = model, list(prefix), max_new_tokens, eos, pad
        self.temperature, self.top_p, self.prefill_tokens = temperature, top_p, prefill_tokens
        self.device = model.get_input_embeddings().weight.device
        self.cache = _StaticCache(model, cells)
        self.graphs: dict[tuple, torch.cuda.CUDAGraph] | None = None
        if graphs and self.device.type == "cuda" and len(set(self.cache.devices)) == 1:
            self.graphs, self.pool = {}, torch.cuda.graph_pool_handle()
        whole = dict(device=self.device, dtype=torch.long)
        self.ids, self.positions = torch.zeros(rows, 1, **whole), torch.zeros(rows, 1, **whole)
        self.padding = torch.zeros(rows, 1, **whole)
        self.column, self.number = torch.zeros(1, **whole), torch.zeros(1, **whole)
        self.out = torch.zeros(rows, max_new_tokens, **whole)
        self.done, self.bad = (torch.zeros(rows, device=self.device, dtype=torch.bool) for _ in range(2))
        self.draws = torch.zeros(rows, max_new_tokens, device=self.device, dtype=torch.float64)
        self.prefix_kv: list[list[torch.Tensor]] | None = None

    @torch.inference_mode()
    def answer(
        self,
        prompts: Sequence[Sequence[int]],
        seeds: Sequence[Sequence[Sequence[int] | None]],
        finished: Callable[[list[int]], bool] | None = None,
    ) -> list[list[tuple[list[int], bool]]]:
        """(token ids, whether logits were not finite) of the answers to each prompt, each up to and with EOS, or
        max_new_tokens long. An answer ends where its logits are not finite, and those ids are none.

        prompts: ids that begin with the prefix. seeds: for each prompt its answers' seeds, None for a greedy one; the
        same number for each. finished: whether an answer without EOS may end, judged from its ids.
        """
        count, share = len(prompts), len(seeds[0])
        rests = [list(prompt[len(self.prefix) :]) for prompt in prompts]
        width = max(len(rest) for rest in rests)
        self.cache.shape(count * share, cache_columns(len(self.prefix) + width, self.max_new))
        padding = torch.tensor([[width - len(rest)] for rest in rests], device=self.device)
        started = time.monotonic()
        logits = self._prefill(rests, padding, width)
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        self.prefill_seconds = time.monotonic() - started
        rows = count * share
        if share > 1:
            spread = torch.arange(count, device=self.device).repeat_interleave(share)
            self.cache.select(spread, rows)
            logits, padding = logits[spread], padding[spread]
        flat = [seed for each in seeds for seed in each]
        draws = [np.zeros(self.max_new) if s is None else np.random.Generator(np.random.Philox(s)).random(self.max_new)
                 for s in flat]  # fmt: skip
        self.sampled = any(seed is not None for seed in flat)
        # a draw of -1 marks the greedy rows
        self.draws[:rows] = torch.from_numpy(np.stack([d - (s is None) for d, s in zip(draws, flat, strict=True)]))
        self.padding[:rows] = padding
        self.positions[:rows] = len(self.prefix) + width - padding
        self.column.fill_(len(self.prefix) + width)
        self.number.zero_()
        self.done[:rows] = self.bad[:rows] = False
        self._choose(logits, rows)
        return self._decode(rows, count, share, finished)

    def _prefill(self, rests: list[list[int]], padding: torch.Tensor, width: int) -> torch.Tensor:
        """Logits after the last token of each prompt, fp32 [rows, vocabulary]; the cache is filled."""
        start = len(self.prefix)
        if start and self.prefix_kv is None:
            self.prefix_kv = self._prefix_kv()
        for views, fixed in zip(self.cache.views, self.prefix_kv or [[]] * len(self.cache.views), strict=True):
            for view, part in zip(views, fixed, strict=False):
                view[: len(rests), :, :start] = part
        places = torch.arange(width, device=self.device)
        seen = torch.arange(start + width, device=self.device)
        causal = seen[None, :] <= start + places[:, None]
        itself = seen[None, :] == start + places[:, None]
        logits = []
        step = max(1, self.prefill_tokens // width)
        for first in range(0, len(rests), step):
            rows = slice(first, min(first + step, len(rests)))
            shift = padding[rows]
            ids = [[self.pad] * (width - len(rest)) + rest for rest in rests[rows]]
            visible = (seen[None] < start) | (seen[None] >= start + shift)
            # a padded place sees itself, lest a softmax over nothing makes NaN that 0 weights would spread
            mask = (visible[:, None] & causal) | itself
            self.cache.at(rows, slice(start, start + width))
            output = self.model(
                input_ids=torch.tensor(ids, device=self.device),
                position_ids=(start + places[None] - shift).clamp(min=0),
                attention_mask=mask[:, None],
                past_key_values=self.cache,
                use_cache=True,
                logits_to_keep=1,
            )
            logits.append(output.logits[:, -1].float())
        return torch.cat(logits)

    def _prefix_kv(self) -> list[list[torch.Tensor]]:
        views, columns = self.cache.views, self.cache.columns
        self.cache.shape(1, len(self.prefix))
        self.cache.at(slice(0, 1), slice(0, len(self.prefix)))
        ids = torch.tensor([self.prefix], device=self.device)
        places = torch.arange(len(self.prefix), device=self.device)
        mask = places[None, :] <= places[:, None]
        self.model(
            input_ids=ids, position_ids=places[None], attention_mask=mask[None, None], past_key_values=self.cache,
            use_cache=True, logits_to_keep=1,
        )  # fmt: skip
        kept = [[view.clone() for view in layer] for layer in self.cache.views]
        self.cache.views, self.cache.columns = views, columns
        return kept

    def _choose(self, logits: torch.Tensor, rows: int) -> None:
        """Write the next token of each row, and move on. logits: fp32 [rows, vocabulary]."""
        done = self.done[:rows]
        # one that is not finite would be chosen, or, drawn from, the vocabulary's last; a row that is done has no say
        self.bad[:rows] |= ~done & ~logits.isfinite().all(-1)
        done |= self.bad[:rows]
        tokens = logits.argmax(-1)
        if self.sampled:
            draws = self.draws[:rows].index_select(1, self.number)[:, 0]
            tokens = torch.where(draws < 0, tokens, sample(logits, draws, self.temperature, self.top_p))
        tokens = torch.where(done, self.pad, tokens)
        self.out[:rows].index_copy_(1, self.number, tokens[:, None])
        done |= tokens == self.eos
        self.ids[:rows] = tokens[:, None]
        self.number += 1

    def _step(self, rows: int) -> None:
        seen = torch.arange(self.cache.columns, device=self.device)[None]
        start = len(self.prefix)
        visible = ((seen < start) | (seen >= start + self.padding[:rows])) & (seen <= self.column)
        # added to the scores rather than true or false: SDPA would make the one of the other in every layer
        mask = torch.where(visible, 0.0, float("-inf")).to(self.model.dtype)
        output = self.model(
            input_ids=self.ids[:rows],
            position_ids=self.positions[:rows],
            attention_mask=mask[:, None, None],
            past_key_values=self.cache,
            use_cache=True,
            logits_to_keep=1,
        )
        self._choose(output.logits[:, -1].float(), rows)
        self.positions[:rows] += 1
        self.column += 1

    def _replay(self, rows: int) -> None:
        self.cache.at(slice(0, rows), self.column)
        key = (rows, self.cache.columns, self.sampled)
        if self.graphs is None or key not in self.graphs:
            self._step(rows)  # also what a capture needs before it: everything is compiled and allocated
            if self.graphs is not None:
                self._capture(key, rows)
        else:
            self.graphs[key].replay()

    def _capture(self, key: tuple, rows: int) -> None:
        assert self.graphs is not None
        graph = torch.cuda.CUDAGraph()
        try:
            with torch.cuda.graph(graph, pool=self.pool):
                self._step(rows)
        except RuntimeError as error:  # something in this model's step asks the host
            print(f"steps run one by one, since this model's can't be a CUDA graph: {str(error).splitlines()[0]}")
            torch.cuda.synchronize()
            self.graphs = None
        else:
            self.graphs[key] = graph

    def _decode(
        self, rows: int, count: int, share: int, finished: Callable | None
    ) -> list[list[tuple[list[int], bool]]]:
        answers: dict[int, tuple[list[int], bool]] = {}
        live: list[int | None] = list(range(rows))  # which answer each row of the batch is, None for one that fills it
        for number in range(1, self.max_new + 1):
            if number % CHECK == 0 or number == self.max_new:
                over, bad = self.done[: len(live)].tolist(), self.bad[: len(live)].tolist()
                written = self.out[: len(live), :number].tolist()
                for row, (which, ids) in enumerate(zip(live, written, strict=True)):
                    if which is None:
                        continue
                    over[row] = over[row] or number == self.max_new or (finished is not None and finished(ids))
                    if over[row]:
                        answers[which] = ids[: ids.index(self.eos) + 1] if self.eos in ids else ids, bad[row]
                        live[row] = None
                if not any(which is not None for which in live):
                    break
                live = self._keep(live, over)
            if number < self.max_new:
                self._replay(len(live))
        return [[answers[position * share + n] for n in range(share)] for position in range(count)]

    def _keep(self, live: list[int | None], over: list[bool]) -> list[int | None]:
        """Once half of the rows are over, the others go on alone, filled up to one of ROWS with rows that are over: the
        step gets cheaper, but may want a graph of its own."""
        self.done[: len(live)] |= torch.tensor(over, device=self.device)
        left = [row for row, which in enumerate(live) if which is not None]
        rows = next((size for size in ROWS if size >= len(left)), len(left))
        if rows * 2 > len(live):
            return live
        fill = [row for row, which in enumerate(live) if which is None]
        kept = left + fill[: rows - len(left)]
        index = torch.tensor(kept, device=self.device)
        self.cache.select(index, rows)
        for state in (self.ids, self.positions, self.padding, self.out, self.done, self.bad, self.draws):
            state[:rows] = state.index_select(0, index)
        return [live[row] for row in kept]


def sample(logits: torch.Tensor, draws: torch.Tensor, temperature: float, top_p: float) -> torch.Tensor:
    """One token a row by inverting the cumulative distribution at draws [rows] in [0, 1); temperature and top_p as
    transformers' warpers have them, which always keep the likeliest. logits [rows, vocabulary] fp32."""
    probabilities = (logits / temperature).softmax(-1).double()
    if top_p < 1:
        falling, order = probabilities.sort(dim=-1, descending=True, stable=True)
        # the token that crosses top_p is still in
        kept = falling.cumsum(-1) - falling < max(top_p, 1e-9)
        probabilities = torch.where(torch.empty_like(kept).scatter_(-1, order, kept), probabilities, 0.0)
    # summed in the order of the ids: sorted, rounding (which the batch decides) would swap tokens of like probability
    sums = probabilities.cumsum(-1)
    return (sums <= draws[:, None] * sums[:, -1:]).sum(-1).clamp(max=logits.shape[-1] - 1)
