"""The forward of 4-bit experts, with gradients to activations only; transformers' experts interface
calls it.

The routing weight multiplies the rows before the down-projection, so its gradient needs no output
of the down-projection, and nothing after SwiGLU is saved: activation checkpointing stops its
recomputation there (early stop), without the down-projection. Grouped GEMM without host syncs on
sm90 and sm100, one cuBLAS call an expert elsewhere.
"""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable, Collection, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import NamedTuple

import torch
from torch import nn
from transformers.integrations import moe

from prompt_recovery.engine.kernels.dispatch import FEW_TOKENS, on, training_kernels, uses_triton
from prompt_recovery.engine.storage import expert_weights, four_bit_experts, projection_weights
from prompt_recovery.engine.turns import pause, waiting


def rows_at_once(tokens: int) -> int:
    """Most rows of an expert that are computed at a time without gradients, of so many tokens: gate
    and up take 56 KiB a row of Mixtral's, and each slice dequantises the weights again, so that a
    large piece has two at most."""
    return max(1, min(tokens, 2_048), -(-tokens // 2))


class Routing(NamedTuple):
    """Where the R = T * top_k rows go. order [R]: flat (token, choice) index of each row in expert
    order; inverse [R]: row of each flat index; ends [E] int32 on the device: end of each expert's
    rows; bounds: the same on the host, read (one host sync) only where no grouped GEMM takes `ends`
    from the device."""

    order: torch.Tensor
    inverse: torch.Tensor
    ends: torch.Tensor
    bounds: list[int] | None
    top_k: int


def grouped_gemm(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether torch multiplies all experts' rows in one launch."""
    # the real kernel is for bf16 on sm90 and sm100; elsewhere torch loops over the experts itself,
    # with a host sync each time
    return (
        device.type == "cuda" and dtype == torch.bfloat16 and hasattr(nn.functional, "grouped_mm")
        and torch.cuda.get_device_capability(device)[0] in (9, 10)
    )  # fmt: skip


def route(top_k_index: torch.Tensor, experts: int, dtype: torch.dtype) -> Routing:
    """Sort once for the whole layer. top_k_index: [T, top_k] integers in [0, experts)."""
    flat = top_k_index.reshape(-1).to(torch.int32)
    ordered, order = torch.sort(flat, stable=True)
    places = torch.arange(order.numel(), device=order.device)
    inverse = torch.empty_like(order).scatter_(0, order, places)
    numbers = torch.arange(experts, device=order.device, dtype=torch.int32)
    ends = torch.searchsorted(ordered, numbers, right=True, out_int32=True)
    bounds = None
    if not grouped_gemm(flat.device, dtype):
        with waiting():
            bounds = ends.tolist()
    return Routing(order, inverse, ends, bounds, top_k_index.shape[-1])


def _matmul(
    rows: torch.Tensor, experts: nn.Module, projection: str, routing: Routing, transpose: bool
) -> torch.Tensor:
    """Each expert's rows times its weight [N, K], transposed (rows [R, K] -> [R, N]) or not ([R, N]
    -> [R, K])."""
    packed = getattr(experts, f"{projection}_packed")
    size, width = packed.shape[1], packed.shape[2] * 2
    matrices: Callable[[int], torch.Tensor]
    if getattr(experts, "one_at_a_time", False):
        matrices = functools.partial(expert_weights(experts, rows.dtype), projection)
    else:
        weight = projection_weights(experts, projection, rows.dtype)
        if routing.bounds is None and not (size % 8 or width % 8) and rows.shape[0]:
            return nn.functional.grouped_mm(
                rows, weight.transpose(1, 2) if transpose else weight, offs=routing.ends
            )
        matrices = weight.__getitem__
    out = rows.new_empty(rows.shape[0], size if transpose else width)
    start = 0
    for expert, end in enumerate(
        routing.ends.tolist() if routing.bounds is None else routing.bounds
    ):
        if end > start:
            matrix = matrices(expert)
            torch.mm(rows[start:end], matrix.t() if transpose else matrix, out=out[start:end])
        start = end
    return out


def _few_rows(
    x: torch.Tensor, experts: nn.Module, top_k_index: torch.Tensor, top_k_weights: torch.Tensor
) -> torch.Tensor | None:
    """The output [T, H] where x has few rows and Triton's kernel for them is there, else None. No
    gradients."""
    if torch.is_grad_enabled() or not 0 < x.shape[0] <= FEW_TOKENS or not uses_triton(x.device):
        return None
    if x.dtype not in (torch.float16, torch.bfloat16) or not _plain_swiglu(experts):
        return None
    from prompt_recovery.engine.kernels import experts_decode

    return experts_decode.few_rows(x, top_k_index, top_k_weights, experts)


def _plain_swiglu(experts: nn.Module) -> bool:
    silu = isinstance(experts.act_fn, nn.SiLU) or type(experts.act_fn).__name__ == "SiLUActivation"
    return silu and type(experts)._apply_gate is moe._default_apply_gate


def _gather(x: torch.Tensor, routing: Routing) -> torch.Tensor:
    kernels = training_kernels(x.device)
    if kernels is not None and x.shape[0]:
        return kernels.gather(x.contiguous(), routing.order, routing.top_k)
    return x.index_select(0, routing.order // routing.top_k)


def _combine(rows: torch.Tensor, routing: Routing) -> torch.Tensor:
    kernels = training_kernels(rows.device)
    if kernels is not None and rows.shape[0]:
        return kernels.combine(rows, routing.inverse, routing.top_k)
    tokens = rows.index_select(0, routing.inverse).view(-1, routing.top_k, rows.shape[1])
    return tokens.sum(1, dtype=torch.float32).to(rows.dtype)


class _GateUp(torch.autograd.Function):
    """x [T, H] -> gate and up rows [R, 2I] in expert order."""

    @staticmethod
    def forward(ctx, x, experts, routing, keep):
        ctx.experts, ctx.routing = experts, routing
        kept, again = getattr(_here, "kept", None), getattr(_here, "again", False)
        if again and kept and experts in kept:
            return kept.pop(experts)
        out = _matmul(_gather(x, routing), experts, "gate_up_proj", routing, transpose=True)
        if keep and kept is not None and not again:
            kept[experts] = out.detach()
        return out

    @staticmethod
    def backward(ctx, grad):
        rows = _matmul(grad.contiguous(), ctx.experts, "gate_up_proj", ctx.routing, transpose=False)
        return _combine(rows, ctx.routing), None, None, None


def _swiglu(
    gate_up: torch.Tensor,
    top_k_weights: torch.Tensor,
    order: torch.Tensor,
    in_place: bool,
    first: int = 0,
) -> torch.Tensor:
    """Gate and up rows [R, 2I] of the places from `first` on in the order, routing weights [T,
    top_k] -> silu(gate) * up * weight [R, I]; with Triton in_place, over the gates."""
    kernels = training_kernels(gate_up.device)
    if kernels is not None and gate_up.shape[0]:
        return kernels.swiglu(gate_up, top_k_weights.contiguous(), order, in_place, first)
    gate, up = gate_up.float().chunk(2, dim=-1)
    weight = top_k_weights.reshape(-1)[order[first : first + len(gate_up)], None].float()
    return (nn.functional.silu(gate) * up * weight).to(gate_up.dtype)


class _SwiGlu(torch.autograd.Function):
    """`_swiglu` of all rows, with gradients."""

    @staticmethod
    def forward(ctx, gate_up, top_k_weights, order):
        ctx.order = order
        ctx.save_for_backward(gate_up, top_k_weights)
        return _swiglu(gate_up, top_k_weights, order, in_place=False)

    @staticmethod
    def backward(ctx, grad):
        gate_up, top_k_weights = ctx.saved_tensors
        kernels = training_kernels(gate_up.device)
        if kernels is not None and gate_up.shape[0]:
            weight, grad = top_k_weights.contiguous(), grad.contiguous()
            return *kernels.swiglu_backward(gate_up, weight, ctx.order, grad), None
        gate, up = gate_up.float().chunk(2, dim=-1)
        sigmoid = gate.sigmoid()
        silu = gate * sigmoid
        received = grad.float()
        grad_weights = torch.empty_like(top_k_weights).reshape(-1)
        grad_weights[ctx.order] = (received * silu * up).sum(1).to(grad_weights.dtype)
        received = received * top_k_weights.reshape(-1)[ctx.order, None].float()
        grad_gate = received * up * (sigmoid + silu * (1 - sigmoid))
        grad_gate_up = torch.cat((grad_gate, received * silu), dim=1).to(gate_up.dtype)
        return grad_gate_up, grad_weights.view_as(top_k_weights), None


class _Down(torch.autograd.Function):
    """Weighted rows [R, I] -> sums over each token's experts [T, H]. It saves no tensor: activation
    checkpointing would recompute the down-projection to hand it one."""

    @staticmethod
    def forward(ctx, rows, experts, routing):
        ctx.experts, ctx.routing = experts, routing
        return _combine(_matmul(rows, experts, "down_proj", routing, transpose=True), routing)

    @staticmethod
    def backward(ctx, grad):
        rows = _matmul(
            _gather(grad, ctx.routing), ctx.experts, "down_proj", ctx.routing, transpose=False
        )
        return rows, None, None


@torch.compiler.disable
def experts_forward(
    self: nn.Module,
    hidden_states: torch.Tensor,
    top_k_index: torch.Tensor,
    top_k_weights: torch.Tensor,
) -> torch.Tensor:
    """The experts' output [T, H] in the dtype of hidden_states [T, H]; top_k_index and
    top_k_weights: [T, top_k].

    Computes in autocast's dtype where autocast is on, else in that of hidden_states. Gradients go
    to hidden_states and top_k_weights only.
    """
    kind = hidden_states.device.type
    autocast = torch.is_autocast_enabled(kind)
    dtype = torch.get_autocast_dtype(kind) if autocast else hidden_states.dtype
    exact = torch.autocast(kind, enabled=False) if autocast else nullcontext()
    with exact, on(hidden_states.device):
        few = _few_rows(hidden_states.to(dtype), self, top_k_index, top_k_weights)
        if few is not None:
            return few.to(hidden_states.dtype)
        training = torch.is_grad_enabled()
        routing = route(top_k_index, self.num_experts, dtype)
        if routing.bounds is not None and not training:
            return _one_at_a_time(hidden_states.to(dtype), self, routing, top_k_weights).to(
                hidden_states.dtype
            )
        keep = getattr(self, "keep_gate_up", False) and training
        rows = _GateUp.apply(hidden_states.to(dtype), self, routing, keep)
        rows = _activate(rows, self, top_k_weights, routing.order)
        return _Down.apply(rows, self, routing).to(hidden_states.dtype)


def _activate(
    rows: torch.Tensor,
    experts: nn.Module,
    top_k_weights: torch.Tensor,
    order: torch.Tensor,
    first: int = 0,
) -> torch.Tensor:
    """Gate and up rows [R, 2I] of the places from `first` on in the order (of flat (token, choice)
    indices) -> [R, I], weighted; without gradients, for which nothing is kept, over the gates."""
    if not _plain_swiglu(experts):
        weight = top_k_weights.reshape(-1)[order[first : first + len(rows)], None]
        return (experts._apply_gate(rows) * weight).to(rows.dtype)
    if torch.is_grad_enabled():  # of all rows
        return _SwiGlu.apply(rows, top_k_weights, order)
    return _swiglu(rows, top_k_weights, order, True, first)


def _one_at_a_time(
    x: torch.Tensor, experts: nn.Module, routing: Routing, top_k_weights: torch.Tensor
) -> torch.Tensor:
    """The output [T, H], with the 16-bit weights of one projection of one expert at a time: a T4
    has no room for a layer's. No gradients."""
    assert routing.bounds is not None
    rows, weight = _gather(x, routing), expert_weights(experts, x.dtype)
    start, most = 0, rows_at_once(len(x))
    for expert, end in enumerate(routing.bounds):
        for first in range(start, end, most):
            some = rows[first : min(first + most, end)]
            gate_up = nn.functional.linear(some, weight("gate_up_proj", expert))
            inner = _activate(gate_up, experts, top_k_weights, routing.order, first)
            torch.mm(inner, weight("down_proj", expert).t(), out=some)
            del gate_up, inner  # before the next ones are made
        start = end
    out = _combine(rows, routing)
    pause()  # the card has work for as long as this host took to launch it, or longer
    return out


def keep_gate_up(model: nn.Module, layers: Collection[int]) -> None:
    """Let these layers, which recompute their activations, keep the gate and up rows (2 * 2I *
    top_k bytes a token) from the forward pass: only attention and norms are then computed again."""
    for number, experts in enumerate(four_bit_experts(model)):
        experts.keep_gate_up = number in layers


# what one checkpointed call of a layer keeps, and whether it is being recomputed
_here = threading.local()


def recomputation() -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
    """torch.utils.checkpoint's `context_fn`: around a layer's forward pass and around its
    recomputation, for which the gate and up rows lie in a place of that call's own."""
    kept: dict[nn.Module, torch.Tensor] = {}
    return _keeping(kept, again=False), _keeping(kept, again=True)


@contextmanager
def _keeping(kept: dict[nn.Module, torch.Tensor], again: bool) -> Iterator[None]:
    before = getattr(_here, "kept", None), getattr(_here, "again", False)
    _here.kept, _here.again = kept, again
    try:
        yield
    finally:
        _here.kept, _here.again = before
