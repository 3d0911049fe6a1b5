"""Triton kernels of the 4-bit experts for many rows: dequantisation, routing gather and sum,
SwiGLU.

Imported only where Triton runs; `storage` and `forward` have the same in plain torch. No kernel
uses atomics, so results do not vary between runs.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from prompt_recovery.engine.kernels.launching import launch, power_of_2


@triton.jit(do_not_specialize=["first"])
def _dequantise(
    packed,
    absmax,
    nested,
    offset,
    code,
    table,
    out,
    blocks_per_expert,
    nested_per_expert,
    first,
    BLOCKS: tl.constexpr,
):
    number = tl.program_id(1).to(tl.int64)
    expert = first + number
    block = tl.program_id(0) * BLOCKS + tl.arange(0, BLOCKS)
    inside = block < blocks_per_expert
    where = expert * blocks_per_expert + block
    level = tl.load(absmax + where, mask=inside, other=0).to(tl.int32)
    second = tl.load(nested + expert * nested_per_expert + block // 256, mask=inside, other=0.0)
    scale = tl.load(code + level) * second + tl.load(offset + expert)
    byte = tl.load(
        packed + where[:, None] * 32 + tl.arange(0, 32)[None, :], mask=inside[:, None], other=0
    ).to(tl.int32)
    kind = out.dtype.element_ty
    high = (tl.load(table + (byte >> 4)) * scale[:, None]).to(kind)
    low = (tl.load(table + (byte & 15)) * scale[:, None]).to(kind)
    at = (number * blocks_per_expert + block)[:, None] * 64 + tl.arange(0, 64)[None, :]
    tl.store(out + at, tl.interleave(high, low), mask=inside[:, None])


def dequantise(
    packed: torch.Tensor,
    absmax: torch.Tensor,
    nested: torch.Tensor,
    offset: torch.Tensor,
    code: torch.Tensor,
    table: torch.Tensor,
    out: torch.Tensor,
    first: int = 0,
    blocks: int = 64,
    warps: int = 4,
) -> None:
    """Write the weights of the experts from `first` on that `out` has room for, bit for bit what
    bitsandbytes' two dequantisations give.

    Args:
        packed: [E, rows, columns / 2] uint8.
        absmax: [E, B] uint8, one a block of 64 weights.
        nested, offset: [E, ceil(B / 256)] and [E] fp32, by which absmax is dequantised.
        code, table: [256] and [16] fp32, values of a byte of absmax and of half a byte of packed.
        out: [N, rows, columns] of 16 or 32 bit.
        blocks, warps: of a program; launch parameters.
    """
    per_expert = absmax.shape[1]
    # no fused multiply-add: bitsandbytes rounds the product before it adds the offset
    launch(
        _dequantise,
        (-(-per_expert // blocks), out.shape[0], 1),
        (packed, absmax, nested, offset, code, table, out, per_expert, nested.shape[1]),
        {"BLOCKS": blocks},
        [first],
        num_warps=warps,
        enable_fp_fusion=False,
    )


@triton.jit
def _gather(x, order, out, columns, K: tl.constexpr, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    source = tl.load(order + row).to(tl.int64) // K
    for start in range(0, columns, BLOCK):
        at = start + tl.arange(0, BLOCK)
        inside = at < columns
        tl.store(
            out + row * columns + at, tl.load(x + source * columns + at, mask=inside), mask=inside
        )


def gather(x: torch.Tensor, order: torch.Tensor, top_k: int) -> torch.Tensor:
    """Rows of x [T, H] in expert order: row r is x[order[r] // top_k]. Gives [T * top_k, H]."""
    out = x.new_empty(order.numel(), x.shape[1])
    grid, constants = (
        (order.numel(), 1, 1),
        {"K": top_k, "BLOCK": min(4096, power_of_2(x.shape[1]))},
    )
    launch(_gather, grid, (x, order, out, x.shape[1]), constants, num_warps=4)
    return out


@triton.jit
def _combine(rows, inverse, out, columns, K: tl.constexpr, BLOCK: tl.constexpr):
    token = tl.program_id(0).to(tl.int64)
    at = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = at < columns
    total = tl.zeros((BLOCK,), tl.float32)
    for k in tl.static_range(K):
        source = tl.load(inverse + token * K + k).to(tl.int64)
        total += tl.load(rows + source * columns + at, mask=inside, other=0.0).to(tl.float32)
    tl.store(out + token * columns + at, total.to(out.dtype.element_ty), mask=inside)


def combine(rows: torch.Tensor, inverse: torch.Tensor, top_k: int) -> torch.Tensor:
    """Sum, in fp32, of the top_k rows of each token: rows [T * top_k, H] in expert order -> [T,
    H]."""
    out = rows.new_empty(inverse.numel() // top_k, rows.shape[1])
    block = min(2048, power_of_2(rows.shape[1]))
    grid = (out.shape[0], -(-rows.shape[1] // block), 1)
    arguments, constants = (rows, inverse, out, rows.shape[1]), {"K": top_k, "BLOCK": block}
    launch(_combine, grid, arguments, constants, num_warps=4)
    return out


@triton.jit(do_not_specialize=["first"])
def _swiglu(gate_up, weights, order, out, width, stride, first, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    at = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = at < width
    gate = tl.load(gate_up + row * 2 * width + at, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(gate_up + row * 2 * width + width + at, mask=inside, other=0.0).to(tl.float32)
    weight = tl.load(weights + tl.load(order + first + row)).to(tl.float32)
    value = gate * tl.sigmoid(gate) * up * weight
    tl.store(out + row * stride + at, value.to(out.dtype.element_ty), mask=inside)


def swiglu(
    gate_up: torch.Tensor,
    top_k_weights: torch.Tensor,
    order: torch.Tensor,
    in_place: bool = False,
    first: int = 0,
) -> torch.Tensor:
    """silu(gate) * up * routing weight of the rows in expert order from `first` on: gate_up [R, 2 *
    I], top_k_weights [T, K], order [T * K] -> [R, I], in_place over the gates."""
    width = gate_up.shape[1] // 2
    out = gate_up[:, :width] if in_place else gate_up.new_empty(gate_up.shape[0], width)
    block = min(2048, power_of_2(width))
    grid = (gate_up.shape[0], -(-width // block), 1)
    arguments = gate_up, top_k_weights, order, out, width, out.stride(0)
    launch(_swiglu, grid, arguments, {"BLOCK": block}, [first], num_warps=4)
    return out


@triton.jit
def _swiglu_backward(
    gate_up, weights, order, grad, grad_gate_up, grad_weights, width, BLOCK: tl.constexpr
):
    row = tl.program_id(0).to(tl.int64)
    place = tl.load(order + row)
    weight = tl.load(weights + place).to(tl.float32)
    total = tl.zeros((BLOCK,), tl.float32)
    for start in range(0, width, BLOCK):
        at = start + tl.arange(0, BLOCK)
        inside = at < width
        left = row * 2 * width + at
        gate = tl.load(gate_up + left, mask=inside, other=0.0).to(tl.float32)
        up = tl.load(gate_up + left + width, mask=inside, other=0.0).to(tl.float32)
        received = tl.load(grad + row * width + at, mask=inside, other=0.0).to(tl.float32)
        sigmoid = tl.sigmoid(gate)
        silu = gate * sigmoid
        total += received * silu * up
        received *= weight
        kind = grad_gate_up.dtype.element_ty
        grad_gate = received * up * (sigmoid + silu * (1.0 - sigmoid))
        tl.store(grad_gate_up + left, grad_gate.to(kind), mask=inside)
        tl.store(grad_gate_up + left + width, (received * silu).to(kind), mask=inside)
    tl.store(grad_weights + place, tl.sum(total).to(grad_weights.dtype.element_ty))


def swiglu_backward(
    gate_up: torch.Tensor, top_k_weights: torch.Tensor, order: torch.Tensor, grad: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Gradients of `swiglu` to gate_up [R, 2 * I] and to top_k_weights [T, K], from grad
    [R, I]."""
    width = gate_up.shape[1] // 2
    grad_gate_up, grad_weights = torch.empty_like(gate_up), torch.empty_like(top_k_weights)
    launch(
        _swiglu_backward,
        (gate_up.shape[0], 1, 1),
        (gate_up, top_k_weights, order, grad, grad_gate_up, grad_weights, width),
        {"BLOCK": min(2048, power_of_2(width))},
        num_warps=8,
    )
    return grad_gate_up, grad_weights
