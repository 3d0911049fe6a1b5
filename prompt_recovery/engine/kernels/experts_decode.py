"""Experts of a decode step in Triton: each packed NF4 weight is read once for the rows of a tile.

Four launches, no host sync, no atomics: `_route` lists each expert's rows, `_project` (twice)
multiplies them, `_combine` sums over the choices of a token. Reading the weights is the floor, so
the arithmetic a weight costs is what counts:

- one byte (two weights) is looked up by one load from shared memory, in a table of 256 pairs that
  each of the 32 lanes has a copy of (32 KiB, no bank conflicts). Triton can't address shared
  memory, hence the inline PTX; its array is static and Triton's own is dynamic, so they add up.
  Lookups in registers by `prmt` cost 1.6 times the instructions (sm90).
- the weights are the left operand of a batched dot, a batch entry a warp: mma.sync with operands
  straight from the tile, each weight decoded by one warp (a 2-D dot of this size becomes wgmma or
  repeats the decoding along the columns).
- scales multiply fp32 sums of 64 products instead of weights.
- a thread loads what it multiplies, so that the loop has no barrier. To that end the columns of a
  block are in another order, the same in weights and x (`_columns`). The loads are inline PTX
  because Triton would load in another layout and exchange the values through shared memory behind
  a barrier.
"""

from __future__ import annotations

import functools

import torch
import triton
import triton.language as tl
from torch import nn

from prompt_recovery.engine import storage
from prompt_recovery.engine.kernels import dispatch
from prompt_recovery.engine.kernels.dispatch import Config

# Fills the tables, 256 pairs (a copy a lane) and 256 absmax levels. $1: thread; $2, $3: global
# addresses of pairs and levels; $4: threads, at most 256.
# The declarations stay outside the braces: later PTX of the kernel refers to them.
_FILL = tl.constexpr(
    ".shared .align 16 .b8 nf4_levels[1024]; .shared .align 128 .b8 nf4_pairs[32768];"
    "{ .reg .b32 i, v, t, a, l; .reg .b64 o, p; .reg .pred more; mov.u32 i, $1; "
    "nf4_fill: mul.wide.u32 o, i, 4; add.u64 p, $3, o; ld.global.nc.b32 v, [p]; "
    "mov.u32 t, nf4_levels; mad.lo.u32 a, i, 4, t; st.shared.b32 [a], v; "
    "add.u64 p, $2, o; ld.global.nc.b32 v, [p]; mov.u32 t, nf4_pairs; mad.lo.u32 t, i, 128, t; "
    "shl.b32 l, i, 4; "
    + "and.b32 a, l, 112; add.u32 a, a, t; st.shared.v4.b32 [a], {v, v, v, v}; add.u32 l, l, 16; "
    * 8
    + "add.u32 i, i, $4; setp.lt.u32 more, i, 256; @more bra nf4_fill; bar.sync 0; mov.u32 $0, i; }"
)
_PAIRS_OF_WORD = tl.constexpr(
    "{ .reg .b32 a, l, t; mov.u32 l, %laneid; mov.u32 t, nf4_pairs; mad.lo.u32 l, l, 4, t; "
    + " ".join(
        f"prmt.b32 a, $4, 0, {0x4440 + i}; mad.lo.u32 a, a, 128, l; ld.shared.b32 ${i}, [a];"
        for i in range(4)
    )
    + " }"
)
_SHARED_LEVEL = tl.constexpr(
    "{ .reg .b32 a, t; mov.u32 t, nf4_levels; bfe.u32 a, $1, $2, 8; mad.lo.u32 a, a, 4, t; "
    "ld.shared.b32 $0, [a]; }"
)


def _nf4_values() -> torch.Tensor:
    return storage.lookup_tables(torch.device("cpu"))[1]


def pair_table(dtype: torch.dtype) -> torch.Tensor:
    """int32 [256] on the CPU: for each packed byte its two NF4 values in `dtype`, the even column
    in the low half."""
    bits = _nf4_values().to(dtype).view(torch.int16).int() & 0xFFFF
    byte = torch.arange(256)
    return bits[byte >> 4] | bits[byte & 15] << 16


@functools.cache
def _tables(device: torch.device, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    with torch.inference_mode(False):
        return pair_table(dtype).to(device), storage.lookup_tables(device)[0]


@triton.jit(do_not_specialize=["rows", "m"])
def _route(
    index, order, tiles, rows, m, ROWS: tl.constexpr, EXPERTS: tl.constexpr, TILES: tl.constexpr
):
    """index [rows]: experts; m: most rows of a tile. order [rows]: rows by expert. tiles [TILES,
    3]: expert, first place in order, number of rows (0: no such tile)."""
    row = tl.arange(0, ROWS)
    expert = tl.arange(0, EXPERTS)
    mine = tl.load(index + row, mask=row < rows, other=EXPERTS).to(tl.int32)
    chosen = (mine[:, None] == expert[None, :]).to(tl.int32)
    count = tl.sum(chosen, 0)
    start = tl.cumsum(count, 0) - count
    place = tl.sum(chosen * (tl.cumsum(chosen, 0) - 1 + start[None, :]), 1)
    tl.store(order + place, row, mask=row < rows)
    needed = (count + m - 1) // m
    first = tl.cumsum(needed, 0) - needed
    tile = tl.arange(0, TILES)
    within = tile[:, None] - first[None, :]
    inside = ((within >= 0) & (within < needed[None, :])).to(tl.int32)
    tl.store(tiles + tile * 3, tl.sum(inside * expert[None, :], 1))
    tl.store(tiles + tile * 3 + 1, tl.sum(inside * (start[None, :] + within * m), 1))
    tl.store(tiles + tile * 3 + 2, tl.sum(inside * tl.minimum(count[None, :] - within * m, m), 1))


@triton.jit
def _columns(a, b, c, d, e, f, g, h, kind: tl.constexpr):
    """[R, 64] of `kind` from eight int32 [R, 4] of two values each. Thread t of four loads 16
    neighbours and holds columns 4 t to 4 t + 3 of each 16 of a dot's operands, as Triton lays them
    out: that is where they go. In another layout they would be exchanged, and be right too."""
    # [R, thread, 2, 2, 2], the last three by the bits of a word's number: 2's, 1's, 4's
    words = tl.join(tl.join(tl.join(a, c), tl.join(b, d)), tl.join(tl.join(e, g), tl.join(f, h)))
    even = words.to(tl.int16).to(kind, bitcast=True)
    odd = (words >> 16).to(tl.int16).to(kind, bitcast=True)
    return tl.reshape(tl.permute(tl.join(even, odd), (0, 4, 2, 1, 3, 5)), (a.shape[0], 64))


@triton.jit
def _load_16_bytes(pointer, INTERPRETED: tl.constexpr):
    """Four int32 from each address."""
    if INTERPRETED:
        words = pointer.to(tl.pointer_type(tl.int32))
        return tl.load(words), tl.load(words + 1), tl.load(words + 2), tl.load(words + 3)
    return tl.inline_asm_elementwise(
        "ld.global.nc.v4.b32 {$0, $1, $2, $3}, [$4];", "=r,=r,=r,=r,l", [pointer.to(tl.int64)],
        (tl.int32, tl.int32, tl.int32, tl.int32), True, 1,
    )  # fmt: skip


@triton.jit
def _load_8_bytes(pointer, INTERPRETED: tl.constexpr):
    """Two int32 from each address."""
    if INTERPRETED:
        words = pointer.to(tl.pointer_type(tl.int32))
        return tl.load(words), tl.load(words + 1)
    return tl.inline_asm_elementwise(
        "ld.global.nc.v2.b32 {$0, $1}, [$2];", "=r,=r,l", [pointer.to(tl.int64)],
        (tl.int32, tl.int32), True, 1,
    )  # fmt: skip


@triton.jit
def _look_up(word, pairs, INTERPRETED: tl.constexpr):
    """The pairs of NF4 values of the four bytes of int32 `word`."""
    if INTERPRETED:
        return (
            tl.load(pairs + (word & 255)),
            tl.load(pairs + ((word >> 8) & 255)),
            tl.load(pairs + ((word >> 16) & 255)),
            tl.load(pairs + ((word >> 24) & 255)),
        )
    return tl.inline_asm_elementwise(
        _PAIRS_OF_WORD, "=&r,=&r,=&r,=&r,r", [word],
        (tl.int32, tl.int32, tl.int32, tl.int32), True, 1,
    )  # fmt: skip


@triton.jit
def _values(x, INTERPRETED: tl.constexpr):
    """[64, M], 16 values from each address of [M, 4]."""
    a, b, c, d = _load_16_bytes(x, INTERPRETED)
    e, f, g, h = _load_16_bytes(x + 8, INTERPRETED)
    values = tl.trans(_columns(a, b, c, d, e, f, g, h, x.dtype.element_ty))
    # (the interpreter's dot takes no bf16, hence fp32 there)
    return values.to(tl.float32) if INTERPRETED else values


@triton.jit
def _weights(packed, pairs, kind: tl.constexpr, INTERPRETED: tl.constexpr):
    """NF4 values [R, 64] of `kind`, unscaled, 16 from each address of [R, 4]."""
    low, high = _load_8_bytes(packed, INTERPRETED)
    a, b, c, d = _look_up(low, pairs, INTERPRETED)
    e, f, g, h = _look_up(high, pairs, INTERPRETED)
    weights = _columns(a, b, c, d, e, f, g, h, kind)
    return weights.to(tl.float32) if INTERPRETED else weights


@triton.jit
def _load_levels(absmax, at, BLOCKS: tl.constexpr, INTERPRETED: tl.constexpr):
    """The 8-bit absmax of BLOCKS neighbours as one int32; `at` is a multiple of BLOCKS."""
    if INTERPRETED:
        levels = tl.load(absmax + at).to(tl.int32)
        for i in tl.static_range(1, BLOCKS):
            levels |= tl.load(absmax + at + i).to(tl.int32) << 8 * i
        return levels
    address = (absmax + at).to(tl.int64)
    if BLOCKS == 4:
        return tl.inline_asm_elementwise(
            "ld.global.nc.b32 $0, [$1];", "=r,l", [address], tl.int32, True, 1
        )
    elif BLOCKS == 2:
        return tl.inline_asm_elementwise(
            "ld.global.nc.u16 $0, [$1];", "=r,l", [address], tl.int32, True, 1
        )
    else:
        return tl.inline_asm_elementwise(
            "ld.global.nc.u8 $0, [$1];", "=r,l", [address], tl.int32, True, 1
        )


@triton.jit
def _load_nested(nested, block, INTERPRETED: tl.constexpr):
    """fp32 scale of the absmax of `block` and those beside it, as 256 of them share one."""
    if INTERPRETED:
        bits = tl.load(nested + (block >> 8))
    else:
        address = (nested + (block >> 8)).to(tl.int64)
        bits = tl.inline_asm_elementwise(
            "ld.global.nc.b32 $0, [$1];", "=r,l", [address], tl.int32, True, 1
        )
    return bits.to(tl.float32, bitcast=True)


@triton.jit
def _scale(levels, i: tl.constexpr, second, offset, table, INTERPRETED: tl.constexpr):
    """fp32 absmax of the i-th of the blocks in `levels`."""
    if INTERPRETED:
        level = tl.load(table + ((levels >> 8 * i) & 255))
    else:
        level = tl.inline_asm_elementwise(
            _SHARED_LEVEL, "=r,r,r", [levels, 8 * i], tl.float32, True, 1
        )
    return level * second + offset


@triton.jit
def _multiply(
    x,
    packed,
    absmax,
    nested,
    offset,
    order,
    tile,
    count,
    routing,
    out,
    pairs,
    table,
    rows,
    M: tl.constexpr,
    K: tl.constexpr,
    N: tl.constexpr,
    X_PER_ROW: tl.constexpr,
    GATE: tl.constexpr,
    ROWS: tl.constexpr,
    WARPS: tl.constexpr,
    BLOCKS: tl.constexpr,
    SPLIT: tl.constexpr,
    INTERPRETED: tl.constexpr,
):
    """What `_project` computes, of a tile of at most M rows."""
    kind: tl.constexpr = x.dtype.element_ty
    PER_ROW: tl.constexpr = K // 64
    STEPS: tl.constexpr = PER_ROW // BLOCKS // SPLIT
    MATRIX: tl.constexpr = N * 2 if GATE else N
    expert = tl.load(tile).to(tl.int64)
    packed += expert * (MATRIX * (K // 2))
    absmax += expert * (MATRIX * PER_ROW)
    nested += expert * ((MATRIX * PER_ROW + 255) // 256)
    shift = tl.load(offset + expert).to(tl.float32, bitcast=True)

    m = tl.arange(0, M)
    # places beyond `count` read row 0, and their sums are not stored
    row = tl.load(order + tl.load(tile + 1) + m, mask=m < count, other=0)
    quarter = tl.arange(0, 4)
    x_row = x + (row // X_PER_ROW).to(tl.int64)[:, None] * K + quarter[None, :] * 16
    n = tl.program_id(1) * (WARPS * ROWS) + tl.arange(0, WARPS * ROWS)
    line = tl.minimum(n, N - 1)
    bytes_of = packed + line[:, None] * (K // 2) + quarter[None, :] * 8
    by_warp = tl.reshape(line, (WARPS, ROWS)) * PER_ROW
    first = tl.zeros((WARPS, ROWS, M), tl.float32)
    second = tl.zeros((WARPS, ROWS, M), tl.float32)
    begin = tl.program_id(2) * STEPS
    for step in range(begin, begin + STEPS):
        block = by_warp + step * BLOCKS
        nested_scale = _load_nested(nested, block, INTERPRETED)
        levels = _load_levels(absmax, block, BLOCKS, INTERPRETED)
        if GATE:
            up_nested_scale = _load_nested(nested, block + N * PER_ROW, INTERPRETED)
            up_levels = _load_levels(absmax, block + N * PER_ROW, BLOCKS, INTERPRETED)
        for i in tl.static_range(BLOCKS):
            column = step * BLOCKS + i
            values = _values(x_row + column * 64, INTERPRETED)
            values = tl.broadcast_to(values[None, :, :], (WARPS, 64, M))
            gate = bytes_of + column * 32
            weight = tl.reshape(_weights(gate, pairs, kind, INTERPRETED), (WARPS, ROWS, 64))
            scale = _scale(levels, i, nested_scale, shift, table, INTERPRETED)
            first += tl.dot(weight, values) * scale[:, :, None]
            if GATE:
                up = bytes_of + N * (K // 2) + column * 32
                weight = tl.reshape(_weights(up, pairs, kind, INTERPRETED), (WARPS, ROWS, 64))
                scale = _scale(up_levels, i, up_nested_scale, shift, table, INTERPRETED)
                second += tl.dot(weight, values) * scale[:, :, None]
    # read again: kept over the loop it would be spilled
    row = tl.load(order + tl.load(tile + 1) + m, mask=m < count, other=0, volatile=True)
    inside = (tl.reshape(n, (WARPS, ROWS)) < N)[:, :, None] & (m < count)[None, None, :]
    at = row.to(tl.int64)[None, None, :] * N + tl.reshape(n, (WARPS, ROWS))[:, :, None]
    if GATE:
        share = tl.load(routing + row, mask=m < count, other=0.0).to(tl.float32)
        first = first * tl.sigmoid(first) * second * share[None, None, :]
    else:
        at += tl.program_id(2).to(tl.int64) * rows * N
    tl.store(out + at, first.to(out.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["rows"])
def _project(
    x,
    packed,
    absmax,
    nested,
    offset,
    order,
    tiles,
    routing,
    out,
    pairs,
    table,
    rows,
    K: tl.constexpr,
    N: tl.constexpr,
    X_PER_ROW: tl.constexpr,
    GATE: tl.constexpr,
    M: tl.constexpr,
    SHORT: tl.constexpr,
    ROWS: tl.constexpr,
    WARPS: tl.constexpr,
    BLOCKS: tl.constexpr,
    SPLIT: tl.constexpr,
    INTERPRETED: tl.constexpr,
):
    """GATE: out [rows, N] = silu(x gate) * (x up) * routing weight, with gate and up of packed [E,
    2N, K / 2] and row r of x at r // X_PER_ROW. Else out fp32 [SPLIT, rows, N] = part of x [rows,
    K] times packed [E, N, K / 2]. Tiles of at most SHORT rows are computed as ones of SHORT, which
    takes less than as ones of M."""
    tile = tiles + tl.program_id(0) * 3
    count = tl.load(tile + 2)
    if count == 0:
        return
    if not INTERPRETED:
        tl.inline_asm_elementwise(
            _FILL,
            "=r,r,l,l,r",
            [tl.arange(0, WARPS * 32), pairs.to(tl.int64), table.to(tl.int64), WARPS * 32],
            dtype=tl.int32,
            is_pure=False,
            pack=1,
        )
    data = (x, packed, absmax, nested, offset, order, tile, count, routing, out, pairs, table, rows)
    if SHORT == M:
        _multiply(*data, M, K, N, X_PER_ROW, GATE, ROWS, WARPS, BLOCKS, SPLIT, INTERPRETED)
    elif count <= SHORT:
        _multiply(*data, SHORT, K, N, X_PER_ROW, GATE, ROWS, WARPS, BLOCKS, SPLIT, INTERPRETED)
    else:
        _multiply(*data, M, K, N, X_PER_ROW, GATE, ROWS, WARPS, BLOCKS, SPLIT, INTERPRETED)


@triton.jit(do_not_specialize=["rows"])
def _combine(partial, out, rows, N, TOP_K: tl.constexpr, SPLIT: tl.constexpr, BLOCK: tl.constexpr):
    token = tl.program_id(0).to(tl.int64)
    at = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    total = tl.zeros((BLOCK,), tl.float32)
    for choice in tl.static_range(TOP_K):
        for part in tl.static_range(SPLIT):
            source = partial + (part * rows + token * TOP_K + choice) * N
            total += tl.load(source + at, mask=at < N, other=0.0)
    tl.store(out + token * N + at, total.to(out.dtype.element_ty), mask=at < N)


def _route_rows(
    top_k_index: torch.Tensor, experts: int, m: int
) -> tuple[torch.Tensor, torch.Tensor, int]:
    """order int32 [R], tiles int32 [.., 3] and how many tiles there can be at most."""
    rows = top_k_index.numel()
    most = min(rows, experts + rows // m)
    capacity = max(16, triton.next_power_of_2(most))  # few variants, so that few are compiled
    order = torch.empty(rows, dtype=torch.int32, device=top_k_index.device)
    tiles = torch.empty(capacity, 3, dtype=torch.int32, device=top_k_index.device)
    _route[(1,)](
        top_k_index, order, tiles, rows, m, ROWS=max(64, triton.next_power_of_2(rows)),
        EXPERTS=triton.next_power_of_2(experts), TILES=capacity, num_warps=4,
        **dispatch.launch_options(top_k_index.device),
    )  # fmt: skip
    return order, tiles, most


def _check(config: Config, gate: bool) -> None:
    if config.blocks not in (1, 2, 4):
        raise ValueError(
            f"Config.blocks is {config.blocks}; an iteration reads 1, 2 or 4 blocks of absmax as "
            "one word."
        )
    if config.warps > 8:
        raise ValueError(
            f"Config.warps is {config.warps}; the threads of at most 8 fill the tables, of more "
            "they would write beyond them."
        )
    if gate and config.split > 1:
        raise ValueError(
            f"Config.split is {config.split}; gate and up are multiplied with each other, which "
            "parts of their sums can't be: take 1."
        )


def _launch_project(
    x: torch.Tensor,
    pieces: dict[str, torch.Tensor],
    order: torch.Tensor,
    tiles: torch.Tensor,
    most: int,
    routing: torch.Tensor | None,
    m: int,
    per_row: int,
    config: Config,
) -> torch.Tensor:
    """`_project` with a gate where there are routing weights; [R, N] in the dtype of x, or fp32
    [split, R, N].

    Raises ValueError for a Config by which it would be wrong.
    """
    packed, rows, gate = pieces["packed"], order.numel(), routing is not None
    _check(config, gate)
    if x.data_ptr() % 16:  # of which a thread reads that many bytes at a time
        x = x.clone()
    columns = packed.shape[2] * 2
    size = packed.shape[1] // 2 if gate else packed.shape[1]
    blocks, split = config.blocks, config.split
    while (columns // 64) % (blocks * split):  # other shapes than the one this was tuned at
        blocks, split = (blocks, split // 2) if split > 1 else (blocks // 2, split)
    if gate:
        out = x.new_empty(rows, size)
    else:
        out = torch.empty(split, rows, size, dtype=torch.float32, device=x.device)
    pairs, table = _tables(x.device, x.dtype)
    _project[(most, triton.cdiv(size, config.warps * config.rows_per_warp), split)](
        x, packed, pieces["absmax"], pieces["nested"], pieces["offset"], order, tiles, routing,
        out, pairs, table, rows, K=columns, N=size, X_PER_ROW=per_row, GATE=gate,
        M=m, SHORT=min(config.short or m, m), ROWS=config.rows_per_warp, WARPS=config.warps,
        BLOCKS=blocks, SPLIT=split, INTERPRETED=dispatch.interpreted(), num_warps=config.warps,
        maxnreg=config.registers, **dispatch.launch_options(x.device),
    )  # fmt: skip
    return out


def few_rows(
    x: torch.Tensor,
    top_k_index: torch.Tensor,
    top_k_weights: torch.Tensor,
    experts: nn.Module,
    configs: tuple[Config, Config] | None = None,
    rows: int | None = None,
) -> torch.Tensor | None:
    """The experts' output [T, H], of x's dtype.

    Args:
        x: [T, H] of 16 bit.
        top_k_index, top_k_weights: [T, K] int, and of 16 or 32 bit.
        experts: module with the NF4 pieces of `storage`.
        configs, rows: launch parameters and rows of a tile, other ones than dispatch's, to tune
            them.

    Can be captured in a CUDA graph. None where the shape does not fit: hidden or expert size no
    multiple of 64, or more than 16 experts on sm_75, where `_route` would sum whole warps by
    redux.sync, over which LLVM ends the process.
    """
    gate_up, down = (
        {piece: getattr(experts, f"{name}_{piece}") for piece in storage.PIECES}
        for name in storage.PROJECTIONS
    )
    count, hidden = gate_up["packed"].shape[0], x.shape[1]
    lowered = dispatch.lowered(x.device)
    if hidden % 64 or down["packed"].shape[2] % 32 or (lowered and count > 16):
        return None
    tokens, top_k = top_k_index.shape
    m = rows or dispatch.tile_rows(lowered, tokens)
    first, second = configs or dispatch.configs(lowered, m)
    order, tiles, most = _route_rows(top_k_index.contiguous(), count, m)
    inner = _launch_project(
        x.contiguous(), gate_up, order, tiles, most, top_k_weights.contiguous(), m, top_k, first
    )
    partial = _launch_project(inner, down, order, tiles, most, None, m, 1, second)
    return _sum(partial, tokens, x.dtype)


def _sum(partial: torch.Tensor, tokens: int, dtype: torch.dtype) -> torch.Tensor:
    """[tokens, N] of `dtype`: the parts [split, tokens * choices, N] of each token, added in
    fp32."""
    split, rows, size = partial.shape
    out = torch.empty(tokens, size, dtype=dtype, device=partial.device)
    block = min(1024, triton.next_power_of_2(size))
    _combine[(tokens, triton.cdiv(size, block))](
        partial, out, rows, size, TOP_K=rows // tokens, SPLIT=split, BLOCK=block, num_warps=4,
        **dispatch.launch_options(partial.device),
    )  # fmt: skip
    return out


@functools.cache
def _whole(device: torch.device, tokens: int, m: int) -> tuple[torch.Tensor, torch.Tensor]:
    """order and tiles, as `_route` makes them, of tokens that all go to one matrix."""
    with torch.inference_mode(False):
        first = torch.arange(0, tokens, m, dtype=torch.int32)
        tiles = torch.stack((torch.zeros_like(first), first, (tokens - first).clamp(max=m)), 1)
        return torch.arange(tokens, dtype=torch.int32).to(device), tiles.to(device)


def linear(x: torch.Tensor, pieces: dict[str, torch.Tensor]) -> torch.Tensor:
    """x [T, K] of 16 bit times the only matrix [1, N, K] of these NF4 pieces, transposed: [T, N].

    K a multiple of 64. Once it has run for so many tokens, it can be captured in a CUDA graph.
    """
    tokens, lowered = x.shape[0], dispatch.lowered(x.device)
    m = dispatch.tile_rows(lowered, tokens)
    order, tiles = _whole(x.device, tokens, m)
    config = dispatch.configs(lowered, m)[1]
    partial = _launch_project(x.contiguous(), pieces, order, tiles, len(tiles), None, m, 1, config)
    return _sum(partial, tokens, x.dtype)
