"""Some consecutive layers of a model on one device: called without accelerate's hooks, with a KV
cache and CUDA graphs of their own. A model on one card is one stage; one whose layers lie on
several cards has a stage a card."""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from typing import Any

import torch

from prompt_recovery.engine.cache import StaticCache
from prompt_recovery.engine.kernels.dispatch import on
from prompt_recovery.engine.parts import Part, StageError
from prompt_recovery.engine.turns import turn

GRAPHS = 12  # captured steps that a stage keeps; each takes memory of its own on the card
AHEAD = 2  # pieces that a stage may be ahead of the next one, for which its hidden states wait


@functools.cache
def _capture_stream(device: torch.device) -> torch.cuda.Stream:
    """A stream for a card's captures: torch's own one belongs to the card that captured first, and
    cuBLAS keeps a workspace for each stream."""
    return torch.cuda.Stream(device)


class Stage:
    """A part, the KV cache of its layers, and where the rows of the batch stand.

    start: columns of the prefix. positions [R, 1]: of the next token. column [1]: where it goes. x:
    what a step takes, ids [R, 1] or hidden states [R, 1, H]; y: what it gives.
    """

    def __init__(
        self, part: Part, start: int, *, rows: int, cache_tokens: int, graphs: bool, alone: bool
    ) -> None:
        self.part, self.device, self.start = part, part.device, start
        self.cache = StaticCache(
            part.module.config, part.layers, cache_tokens, rows, start, part.device, part.dtype
        )
        whole = dict(device=part.device, dtype=torch.long)
        self.padding, self.positions = self.cache.padding, torch.zeros(rows, 1, **whole)
        self.column = torch.zeros(1, **whole)
        hidden = (rows, 1, part.module.config.get_text_config().hidden_size)
        states = dict(device=part.device, dtype=part.dtype)
        self.x = torch.zeros(rows, 1, **whole) if part.first else torch.zeros(hidden, **states)
        self.y = torch.zeros(() if part.last else hidden, **states)
        self.prefix_kv: list[list[torch.Tensor]] = [[] for _ in part.layers]
        self.worker = None if alone else ThreadPoolExecutor(1)
        self.graphs: dict[tuple, torch.cuda.CUDAGraph] | None = None
        if graphs and part.device.type == "cuda":
            self.graphs, self.pool = {}, torch.cuda.graph_pool_handle()

    def read(self, x: torch.Tensor, rows: slice, columns: slice) -> torch.Tensor:
        """A piece of the prompts: ids or hidden states of these rows and columns, whose keys and
        values are kept. Gives what the part gives."""
        places = torch.arange(columns.start, columns.stop, device=self.device)
        # rows of the mask begin at multiples of 16 values, or SDPA would copy it in each layer
        seen = torch.arange(-(-columns.stop // 16) * 16, device=self.device)
        shift = self.padding[rows]
        visible = (seen[None] < self.start) | (seen[None] >= self.start + shift)
        # a padded place sees itself, lest a softmax over nothing makes NaN that 0 weights would
        # spread
        visible = (visible[:, None] & (seen[None, :] <= places[:, None])) | (
            seen[None, :] == places[:, None]
        )
        mask = self._added(visible)[..., : columns.stop]
        del visible
        self.cache.at(rows, columns)
        positions = torch.where(
            places[None] < self.start, places[None], (places[None] - shift).clamp(min=0)
        )
        return self._forward(x, positions, mask[:, None])

    def _added(self, visible: torch.Tensor) -> torch.Tensor:
        """A mask to add to the scores, rather than true or false: SDPA would make the one of the
        other in every layer."""
        mask = torch.zeros(visible.shape, dtype=self.part.dtype, device=self.device)
        return mask.masked_fill_(~visible, float("-inf"))

    def _forward(
        self, x: torch.Tensor, positions: torch.Tensor, mask: torch.Tensor
    ) -> torch.Tensor:
        return self.part(
            x,
            position_ids=positions,
            attention_mask=mask,
            past_key_values=self.cache,
            use_cache=True,
        )

    def keep_prefix(self) -> None:
        """Keep the keys and values that the only row now holds, for the front of every row of the
        batches to come."""
        self.prefix_kv = [[view.clone() for view in layer] for layer in self.cache.views]

    def begin(self, rows: int, columns: int, padding: torch.Tensor) -> None:
        """A batch of prompts: the shape of its cache, which begins with the prefix."""
        self.cache.shape(rows, columns)
        self.cache.clear()
        self.padding.zero_()
        self.padding[: len(padding)] = padding.to(self.device)
        for views, fixed in zip(self.cache.views, self.prefix_kv, strict=True):
            for view, part in zip(views, fixed, strict=False):
                view[: len(padding), :, : self.start] = part

    def select(self, index: torch.Tensor, rows: int) -> None:
        """Go on with the rows of the index, in its order."""
        index = index.to(self.device)
        self.cache.select(index, rows)
        for state in (self.padding, self.positions):
            state[: len(index)] = state.index_select(0, index)

    def step(self, rows: int, choose: Callable[[torch.Tensor, int], None]) -> None:
        """One token of each row; the last stage hands its logits, fp32 [R, vocabulary], to
        `choose`."""
        if self.part.knows_rows:
            # for nobody but transformers
            mask = torch.zeros(1, 1, dtype=self.part.dtype, device=self.device)
        else:
            seen = torch.arange(self.cache.columns, device=self.device)[None]
            visible = ((seen < self.start) | (seen >= self.start + self.padding[:rows])) & (
                seen <= self.column
            )
            mask = self._added(visible)
        y = self._forward(self.x[:rows], self.positions[:rows], mask[:, None, None])
        if self.part.last:
            choose(y[:, -1].float(), rows)
        else:
            self.y[:rows] = y
        self.positions[:rows] += 1
        self.column += 1

    def replay(self, rows: int, sampled: bool, choose: Callable[[torch.Tensor, int], None]) -> None:
        """`step` by its CUDA graph, which the first step of its kind runs before and captures."""
        self.cache.at(slice(0, rows), self.column)
        key = rows, sampled, 0 if self.part.knows_rows else self.cache.columns
        if self.graphs is not None and key in self.graphs:
            with on(self.device):
                self.graphs[key].replay()
            return
        # also what a capture needs: everything is compiled and allocated
        self.call(self.step, rows, choose).result()
        if self.graphs is not None:
            self.call(self._capture, rows, key, choose).result()

    def _capture(self, rows: int, key: tuple, choose: Callable[[torch.Tensor, int], None]) -> None:
        assert self.graphs is not None
        while len(self.graphs) >= GRAPHS:
            self.graphs.pop(next(iter(self.graphs)))
        torch.cuda.synchronize(self.device)
        graph = torch.cuda.CUDAGraph()
        try:
            # not torch.cuda.graph, which empties the allocator's cache each time
            with torch.cuda.stream(_capture_stream(self.device)):
                graph.capture_begin(pool=self.pool, capture_error_mode="thread_local")
                try:
                    self.step(rows, choose)
                finally:
                    graph.capture_end()
        except RuntimeError as error:  # something in this model's step asks the host
            print(
                "steps run one by one, since this model's can't be a CUDA graph: "
                f"{str(error).splitlines()[0]}"
            )
            torch.cuda.synchronize(self.device)
            self.graphs = None
        else:
            self.graphs[key] = graph

    def call(self, function: Callable[..., Any], *arguments: Any) -> Future:
        """A call on this stage's device, in its thread if it has one."""

        @torch.inference_mode()
        def there() -> Any:
            with on(self.device):
                return function(*arguments)

        if self.worker is not None:
            return self.worker.submit(there)
        done: Future = Future()
        done.set_result(there())
        return done


def hand_over(tensor: torch.Tensor, target: torch.Tensor) -> None:
    """Copy to another card, in the order of both cards' work; the host does not wait."""
    target.copy_(tensor, non_blocking=True)


def flow(
    stages: Sequence[Stage], pieces: Sequence[torch.Tensor], read: Callable[..., torch.Tensor]
) -> list[torch.Tensor]:
    """Pieces through the stages, a thread a stage, so that all cards work: read(stage, x, number of
    the piece) for each.
    Gives what the last stage gives.

    A thread is the plain way because experts ask the host for their rows in each layer where there
    is no grouped GEMM.
    """
    if len(stages) == 1:
        (only,) = stages
        return [
            only.call(read, only, x.to(only.device), number).result()
            for number, x in enumerate(pieces)
        ]
    free = [threading.Semaphore(AHEAD) for _ in stages]
    stopped = threading.Event()

    def work(number: int, piece: int, before: Future | None) -> torch.Tensor:
        stage = stages[number]
        try:
            x = (pieces[piece] if before is None else before.result()).to(stage.device)
        finally:
            if number:
                free[number - 1].release()
        if not stage.part.last:
            free[number].acquire()
        if stopped.is_set():
            raise StageError("a piece before this one failed")
        with turn():
            return read(stage, x, piece)

    lines: list[list[Future]] = []
    for piece in range(len(pieces)):
        line: list[Future] = []
        for number, stage in enumerate(stages):
            line.append(stage.call(work, number, piece, line[-1] if line else None))
        lines.append(line)
    try:
        return [line[-1].result() for line in lines]
    except BaseException:
        stopped.set()
        raise
    finally:
        wait([future for line in lines for future in line])
        lines.clear()  # what was raised holds this frame, and they hold what was raised
