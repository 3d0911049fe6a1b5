"""Triton kernels for the small work of a decode step: what takes some twenty launches a layer in
transformers takes two. With a mask made once a step and the experts' launches tuned, a step at B1
took 1.7 ms less on an H200 (LOG.md)."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from prompt_recovery.engine.kernels.dispatch import launch_options


@triton.jit
def _rotate_and_store(
    qkv, cos, sin, column, query, keys, values, columns,
    HEADS: tl.constexpr, KEY_HEADS: tl.constexpr, HALF: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1)
    size: tl.constexpr = HALF * 2
    at = tl.arange(0, HALF)
    source = qkv + (row * (HEADS + 2 * KEY_HEADS) + head) * size
    low, high = tl.load(source + at), tl.load(source + HALF + at)
    kind = qkv.dtype.element_ty
    place = tl.load(column)
    if head < HEADS + KEY_HEADS:
        cosine, sine = tl.load(cos + row * size + at).to(tl.float32), tl.load(sin + row * size + at).to(tl.float32)
        left, right = low.to(tl.float32), high.to(tl.float32)
        low, high = (left * cosine - right * sine).to(kind), (right * cosine + left * sine).to(kind)
    if head < HEADS:
        target = query + (row * HEADS + head) * size
    elif head < HEADS + KEY_HEADS:
        target = keys + ((row * KEY_HEADS + head - HEADS) * columns + place) * size
    else:
        target = values + ((row * KEY_HEADS + head - HEADS - KEY_HEADS) * columns + place) * size
    tl.store(target + at, low)
    tl.store(target + HALF + at, high)


def rotate_and_store(
    qkv: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    column: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
) -> torch.Tensor:
    """Rotary embedding of one token a row; its key and value go to `column` of the cache. Gives the query [R, heads, D].

    qkv: [R, (heads + 2 * key heads) * D], one after the other; cos, sin: [R, D], both halves alike; column: int64 [1];
    keys, values: contiguous [R, key heads, columns, D].
    """
    rows, key_heads, columns, size = keys.shape
    heads = qkv.shape[1] // size - 2 * key_heads
    query = qkv.new_empty(rows, heads, size)
    _rotate_and_store[(rows, heads + 2 * key_heads)](
        qkv, cos, sin, column, query, keys, values, columns,
        HEADS=heads, KEY_HEADS=key_heads, HALF=size // 2, num_warps=1, **launch_options(qkv.device),
    )  # fmt: skip
    return query


@triton.jit
def _choose_experts(
    x, gate, weights, index, hidden, EXPERTS: tl.constexpr, ROOM: tl.constexpr, TOP_K: tl.constexpr, BLOCK: tl.constexpr
):
    row = tl.program_id(0).to(tl.int64)
    expert = tl.arange(0, ROOM)
    total = tl.zeros((ROOM, BLOCK), tl.float32)
    for start in range(0, hidden, BLOCK):
        at = start + tl.arange(0, BLOCK)
        inside = (expert[:, None] < EXPERTS) & (at < hidden)[None, :]
        value = tl.load(x + row * hidden + at, mask=at < hidden, other=0.0).to(tl.float32)
        total += (
            tl.load(gate + expert[:, None] * hidden + at[None, :], mask=inside, other=0.0).to(tl.float32)
            * value[None, :]
        )
    # rounded as the linear layer of transformers rounds it, so that ties fall as there
    logits = tl.sum(total, 1).to(x.dtype.element_ty).to(tl.float32)
    logits = tl.where(expert < EXPERTS, logits, float("-inf"))
    odds = tl.exp(logits - tl.max(logits, 0))
    left = odds
    chosen = 0.0
    for _ in tl.static_range(TOP_K):
        best = tl.argmax(left, 0)
        chosen += tl.max(left, 0)
        left = tl.where(expert == best, -1.0, left)
    left = odds
    for choice in tl.static_range(TOP_K):
        best = tl.argmax(left, 0)
        tl.store(index + row * TOP_K + choice, best.to(tl.int64))
        tl.store(weights + row * TOP_K + choice, tl.max(left, 0) / chosen)
        left = tl.where(expert == best, -1.0, left)


def choose_experts(x: torch.Tensor, gate: torch.Tensor, top_k: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Mixtral's router: the top_k of softmax(x gate^T), their weights made to sum to 1. x: [T, H]; gate: [E, H] of the
    same 16 bit. Gives weights fp32 [T, top_k] and experts int64 [T, top_k]."""
    tokens, experts = x.shape[0], gate.shape[0]
    weights = torch.empty(tokens, top_k, dtype=torch.float32, device=x.device)
    index = torch.empty(tokens, top_k, dtype=torch.int64, device=x.device)
    _choose_experts[(tokens,)](
        x, gate, weights, index, x.shape[1], EXPERTS=experts, ROOM=triton.next_power_of_2(experts), TOP_K=top_k,
        BLOCK=2048, num_warps=8,  # one token is one program: long reads, few of them
        **launch_options(x.device),
    )  # fmt: skip
    return weights, index
