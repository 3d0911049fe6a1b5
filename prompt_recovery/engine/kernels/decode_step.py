"""Triton kernels for the small work of a layer that answers: what takes some twenty launches in
transformers takes four.

Rows and columns of the cache are read from the device, so that one captured step serves batches of
all lengths.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from prompt_recovery.engine.kernels.dispatch import launch_options
from prompt_recovery.engine.kernels.launching import launch, power_of_2

# Programs that a launch of attention should have: twice the multiprocessors of an H100, three times
# those of a T4
PROGRAMS = 264


@triton.jit(do_not_specialize=["first_row", "first_column", "width"])
def _rotate_and_store(
    q, k, v, cos, sin, column, now, query, keys, values,
    q_stride, k_stride, v_stride, first_row, first_column, width,
    HEADS: tl.constexpr, KEY_HEADS: tl.constexpr, HALF: tl.constexpr,
):  # fmt: skip
    token = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1)
    size: tl.constexpr = HALF * 2
    at = tl.arange(0, HALF)
    row, place, columns = first_row + token // width, first_column + token % width, tl.load(now)
    if column is not None:
        place += tl.load(column)
    # rows beyond those of the batch have no cache
    there = (head < HEADS) | (row < tl.load(now + 1))
    if head < HEADS:
        source = q + token * q_stride + head * size
        target = query + (token * HEADS + head) * size
    elif head < HEADS + KEY_HEADS:
        source = k + token * k_stride + (head - HEADS) * size
        target = keys + ((row * KEY_HEADS + head - HEADS) * columns + place) * size
    else:
        source = v + token * v_stride + (head - HEADS - KEY_HEADS) * size
        target = values + ((row * KEY_HEADS + head - HEADS - KEY_HEADS) * columns + place) * size
    low, high = tl.load(source + at), tl.load(source + HALF + at)
    kind = q.dtype.element_ty
    if head < HEADS + KEY_HEADS:
        cosine, sine = (
            tl.load(cos + token * size + at).to(tl.float32),
            tl.load(sin + token * size + at).to(tl.float32),
        )
        left, right = low.to(tl.float32), high.to(tl.float32)
        low, high = (left * cosine - right * sine).to(kind), (right * cosine + left * sine).to(kind)
    tl.store(target + at, low, mask=(at >= 0) & there)
    tl.store(target + HALF + at, high, mask=(at >= 0) & there)


def rotate_and_store(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    now: torch.Tensor,
    key_heads: int,
    *,
    column: torch.Tensor | None = None,
    first_row: int = 0,
    first_column: int = 0,
    width: int = 1,
) -> torch.Tensor:
    """Rotary embedding of tokens, `width` of each row; their keys and values go to the cache. Gives
    the queries [T, heads, D].

    Args:
        q, k, v: [T, heads * D] and [T, key_heads * D] of 16 or 32 bit, a row after the other.
        cos, sin: [T, D], both halves alike.
        keys, values: memory that begins with [rows, key_heads, columns, D].
        now: int64 [2], columns and rows of the cache. Rows beyond these leave nothing there.
        key_heads: heads of keys and values.
        column: int64 [1] on the device, the first column of the tokens; None: first_column.
        first_row, first_column: of the cache, where the tokens go.
    """
    tokens, size = cos.shape
    heads = q.shape[1] // size
    query = q.new_empty(tokens, heads, size)
    launch(
        _rotate_and_store,
        (tokens, heads + 2 * key_heads, 1),
        (q, k, v, cos, sin, column, now, query, keys, values,
         q.stride(0), k.stride(0), v.stride(0)),
        {"HEADS": heads, "KEY_HEADS": key_heads, "HALF": size // 2},
        (first_row, first_column, width),
        num_warps=1,
    )  # fmt: skip
    return query


@triton.jit(do_not_specialize=["start"])
def _attend(
    query,
    keys,
    values,
    padding,
    column,
    now,
    partial,
    sums,
    start,
    scale,
    HEADS: tl.constexpr,
    KEY_HEADS: tl.constexpr,
    SIZE: tl.constexpr,
    PADDED: tl.constexpr,
    BLOCK: tl.constexpr,
    SPLIT: tl.constexpr,
):
    row, head, split = tl.program_id(0).to(tl.int64), tl.program_id(1), tl.program_id(2)
    group: tl.constexpr = HEADS // KEY_HEADS
    columns, place = tl.load(now), tl.load(column)
    pad = tl.load(padding + row)
    # rows beyond the batch's read its last one's
    cell = tl.minimum(row, tl.load(now + 1) - 1) * KEY_HEADS + head
    keys += cell * columns * SIZE
    values += cell * columns * SIZE
    mine, at, near = tl.arange(0, PADDED), tl.arange(0, SIZE), tl.arange(0, BLOCK)
    own = mine < group
    q = tl.load(
        query + (row * HEADS + head * group + mine[:, None]) * SIZE + at[None, :],
        mask=own[:, None],
        other=0.0,
    )
    each = tl.cdiv(tl.cdiv(place + 1, BLOCK), SPLIT) * BLOCK
    top = tl.full((PADDED,), float("-inf"), tl.float32)
    total = tl.zeros((PADDED,), tl.float32)
    found = tl.zeros((PADDED, SIZE), tl.float32)
    for first in range(split * each, tl.minimum((split + 1) * each, place + 1), BLOCK):
        there = first + near
        seen = (there <= place) & ((there < start) | (there >= start + pad))
        k = tl.load(keys + there[None, :] * SIZE + at[:, None], mask=seen[None, :], other=0.0)
        score = tl.where(seen[None, :], tl.dot(q, k) * scale, float("-inf"))
        higher = tl.maximum(top, tl.max(score, 1))
        level = tl.where(higher == float("-inf"), 0.0, higher)  # so far nothing but padding
        odds = tl.exp(score - level[:, None])
        before = tl.exp(top - level)
        v = tl.load(values + there[:, None] * SIZE + at[None, :], mask=seen[:, None], other=0.0)
        found = found * before[:, None] + tl.dot(odds.to(v.dtype), v)
        total = total * before + tl.sum(odds, 1)
        top = higher
    part = ((row * KEY_HEADS + head) * SPLIT + split) * group + mine
    tl.store(partial + part[:, None] * SIZE + at[None, :], found, mask=own[:, None])
    tl.store(sums + part * 2, top, mask=own)
    tl.store(sums + part * 2 + 1, total, mask=own)


@triton.jit
def _join_parts(
    partial, sums, out,
    HEADS: tl.constexpr, KEY_HEADS: tl.constexpr, SIZE: tl.constexpr, SPLIT: tl.constexpr,
):  # fmt: skip
    row, head = tl.program_id(0).to(tl.int64), tl.program_id(1)
    group: tl.constexpr = HEADS // KEY_HEADS
    split, at = tl.arange(0, SPLIT), tl.arange(0, SIZE)
    part = ((row * KEY_HEADS + head // group) * SPLIT + split) * group + head % group
    top, total = tl.load(sums + part * 2), tl.load(sums + part * 2 + 1)
    share = tl.exp(top - tl.max(top, 0))
    found = tl.load(partial + part[:, None] * SIZE + at[None, :]) * share[:, None]
    value = tl.sum(found, 0) / tl.sum(total * share, 0)
    tl.store(out + (row * HEADS + head) * SIZE + at, value.to(out.dtype.element_ty))


def attend(
    query: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    padding: torch.Tensor,
    column: torch.Tensor,
    now: torch.Tensor,
    start: int,
    key_heads: int,
    scale: float,
) -> torch.Tensor:
    """Attention of one token a row over the columns of the cache up to `column`, but for `padding`
    columns from `start` on.

    Args:
        query: [R, heads, D] of 16 bit, D a power of 2 from 16 on.
        keys, values, column, now, key_heads: of `rotate_and_store`.
        padding: int64 [R, 1].
        start: the first of the columns that may be padding, the same for all rows.
        scale: of query times key before the softmax.

    Gives [R, heads, D]. The columns are split among programs where rows are few, and summed in a
    fixed order.
    """
    rows, heads, size = query.shape
    group, device = heads // key_heads, query.device
    split = min(32, triton.next_power_of_2(triton.cdiv(PROGRAMS, rows * key_heads)))
    partial = torch.empty(rows, key_heads, split, group, size, dtype=torch.float32, device=device)
    sums = torch.empty(rows, key_heads, split, group, 2, dtype=torch.float32, device=device)
    options = {"num_stages": 2, **launch_options(device)}
    _attend[(rows, key_heads, split)](
        query,
        keys,
        values,
        padding,
        column,
        now,
        partial,
        sums,
        start,
        scale,
        HEADS=heads,
        KEY_HEADS=key_heads,
        SIZE=size,
        PADDED=max(16, triton.next_power_of_2(group)),
        BLOCK=64,
        SPLIT=split,
        num_warps=4,
        **options,
    )
    out = torch.empty_like(query)
    _join_parts[(rows, heads)](
        partial, sums, out, HEADS=heads, KEY_HEADS=key_heads, SIZE=size, SPLIT=split, num_warps=1,
        **launch_options(device),
    )  # fmt: skip
    return out


@triton.jit
def _choose_experts(
    x,
    gate,
    weights,
    index,
    hidden,
    EXPERTS: tl.constexpr,
    PADDED: tl.constexpr,
    TOP_K: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    expert = tl.arange(0, PADDED)
    total = tl.zeros((PADDED, BLOCK), tl.float32)
    for start in range(0, hidden, BLOCK):
        at = start + tl.arange(0, BLOCK)
        inside = (expert[:, None] < EXPERTS) & (at < hidden)[None, :]
        value = tl.load(x + row * hidden + at, mask=at < hidden, other=0.0).to(tl.float32)
        total += (
            tl.load(gate + expert[:, None] * hidden + at[None, :], mask=inside, other=0.0).to(
                tl.float32
            )
            * value[None, :]
        )
    # rounded as the linear layer of transformers rounds it, so that ties fall as there
    logits = tl.sum(total, 1).to(x.dtype.element_ty).to(tl.float32)
    logits = tl.where(expert < EXPERTS, logits, float("-inf"))
    odds = tl.exp(logits - tl.max(logits, 0))
    left = odds
    chosen = tl.sum(odds, 0) * 0.0  # NaN if a logit is, which a maximum leaves out
    for _ in tl.static_range(TOP_K):
        best = tl.argmax(left, 0)
        chosen += tl.max(left, 0)
        left = tl.where(expert == best, -1.0, left)
    left = odds
    for choice in tl.static_range(TOP_K):
        best = tl.minimum(tl.argmax(left, 0), EXPERTS - 1)  # where all are NaN, too
        tl.store(index + row * TOP_K + choice, best.to(tl.int64))
        tl.store(weights + row * TOP_K + choice, tl.max(left, 0) / chosen)
        left = tl.where(expert == best, -1.0, left)


def choose_experts(
    x: torch.Tensor, gate: torch.Tensor, top_k: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Mixtral's router: the top_k of softmax(x gate^T), their weights made to sum to 1. x: [T, H];
    gate: [E, H] of the same 16 bit. Gives top_k_weights fp32 and top_k_index int64, [T, top_k]."""
    tokens, experts = x.shape[0], gate.shape[0]
    top_k_weights = torch.empty(tokens, top_k, dtype=torch.float32, device=x.device)
    top_k_index = torch.empty(tokens, top_k, dtype=torch.int64, device=x.device)
    launch(
        _choose_experts,
        (tokens, 1, 1),
        (x, gate, top_k_weights, top_k_index, x.shape[1]),
        {
            "EXPERTS": experts,
            "PADDED": power_of_2(experts),
            "TOP_K": top_k,
            "BLOCK": 2048,
        },
        num_warps=8,  # one token is one program: long reads, few of them
    )
    return top_k_weights, top_k_index
