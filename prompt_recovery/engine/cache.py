"""Keys and values of a stage's layers, at fixed places in memory."""

from __future__ import annotations

from typing import Any

import torch

from prompt_recovery.engine.memory import kv_shape


class StaticCache:
    """Keys and values of [rows, heads, columns, size] a layer, in one piece of memory a layer that
    batches of other shapes use again: a captured graph finds them where they were. It has what
    attention layers ask of transformers' Cache.

    now: int64 [2] on the device, columns and rows of the batch. padding [R, 1]: columns of each row
    that hold nothing, from `start` on.
    """

    def __init__(
        self,
        config: Any,
        layers: range,
        cache_tokens: int,
        rows: int,
        start: int,
        device: torch.device,
        dtype: torch.dtype,
    ) -> None:
        self.heads, self.size = kv_shape(config)
        self.start = start
        self.padding = torch.zeros(rows, 1, dtype=torch.long, device=device)
        self.now = torch.zeros(2, dtype=torch.long, device=device)
        self.before = layers.start
        count = cache_tokens * self.heads * self.size
        self.buffers = [torch.zeros(2, count, dtype=dtype, device=device) for _ in layers]

    def shape(self, rows: int, columns: int) -> None:
        count = rows * columns * self.heads * self.size
        self.views = [
            [part[:count].view(rows, self.heads, columns, self.size) for part in buffer]
            for buffer in self.buffers
        ]
        self.columns = columns
        self.now.copy_(torch.tensor([columns, rows]))

    def clear(self) -> None:
        """Zeros for the batch. What another batch left may be NaN, which a weight of 0 in attention
        would not undo."""
        for views in self.views:
            for view in views:
                view.zero_()

    def memory(self, layer_idx: int) -> tuple[torch.Tensor, torch.Tensor]:
        """A layer's keys and values, of which the batch takes the first part."""
        keys, values = self.buffers[layer_idx - self.before]
        return keys, values

    def at(self, rows: slice, columns: slice | torch.Tensor) -> None:
        """Where the next forward writes. A slice of columns: prefill, which reads those up to its
        end. A tensor of one: a decode step, which reads all."""
        self.rows = rows
        self.column = None if isinstance(columns, slice) else columns
        self.where = columns if isinstance(columns, slice) else slice(None)

    def layer(self, layer_idx: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values that the forward reads, once its own are there."""
        keys, values = self.views[layer_idx - self.before]
        seen = self.rows, slice(None), slice(self.where.stop)
        return keys[seen], values[seen]

    def update(self, key_states, value_states, layer_idx, *args, **kwargs):
        keys, values = self.layer(layer_idx)
        if self.column is not None:
            keys.index_copy_(2, self.column, key_states)
            values.index_copy_(2, self.column, value_states)
        else:
            keys[:, :, self.where] = key_states
            values[:, :, self.where] = value_states
        return keys, values

    def get_seq_length(self, layer_idx: int = 0) -> int:
        return self.columns

    def select(self, index: torch.Tensor, rows: int) -> None:
        """Keep the rows of the index, in its order, as the first rows of a cache of `rows` rows."""
        old = self.views
        self.shape(rows, self.columns)
        for views, before in zip(self.views, old, strict=True):
            for new, kept in zip(views, before, strict=True):
                new[: len(index)] = kept.index_select(0, index)
