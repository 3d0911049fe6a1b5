"""The experts of a mixture-of-experts layer in 4 bits: quantised while loading, computed without weight gradients.

transformers 5 keeps a layer's experts in two 3-D parameters, which its 4-bit loading leaves in 16 bit. `register()`
adds a quantiser that loads them as NF4 (blocks of 64, double quantisation), each expert's matrix on its own and bit for
bit as bitsandbytes does it, and a forward for them. Everything else is bitsandbytes' own: linear layers become
`Linear4bit`; router, norms, embeddings and head keep 16 bit.

In the forward the routing weight multiplies the rows before the down-projection, so its gradient needs no output of
the down-projection, and nothing after SwiGLU is saved: activation checkpointing stops its recomputation there (early
stop), without the down-projection. Dequantised weights go into one buffer a device and projection that remembers
whose weights it holds, so that a layer's recomputation and backward share one dequantisation.
"""

from __future__ import annotations

import functools
import json
import weakref
from pathlib import Path
from typing import Any, NamedTuple

import bitsandbytes as bnb
import bitsandbytes.functional as bnb_functional
import torch
from torch import nn
from transformers import BitsAndBytesConfig, PreTrainedModel
from transformers.core_model_loading import ConversionOps
from transformers.integrations import moe
from transformers.quantizers.auto import AUTO_QUANTIZER_MAPPING, register_quantization_config, register_quantizer
from transformers.quantizers.quantizer_bnb_4bit import Bnb4BitHfQuantizer

METHOD = "prompt_recovery_nf4"
LAYOUT = "nf4-per-expert-1"  # of the saved tensors; another layout gets another name
BLOCK, NESTED_BLOCK = 64, 256
PROJECTIONS = ("gate_up_proj", "down_proj")
# what a projection [E, N, K] becomes; fp32 values are kept as int32 bits so that `model.to(dtype)` can't round them
PIECES = ("packed", "absmax", "nested", "offset")


class Nf4Error(ValueError):
    """A model or folder that is not 4-bit the way this module needs it."""


def fused_experts(module: nn.Module) -> bool:
    """Whether a module has transformers' fused experts, in 16 bit or already in 4."""
    return any(hasattr(module, name) or hasattr(module, f"{name}_packed") for name in PROJECTIONS) and hasattr(
        module, "is_transposed"
    )


def check_supported(name: str, experts: nn.Module) -> None:
    """Raises Nf4Error for experts in another form than gate_up_proj [E, 2I, H] and down_proj [E, H, I]."""
    odd = [flag for flag in ("is_transposed", "has_bias", "has_post_expert_norm", "_is_expert_parallel")
           if getattr(experts, flag, False)]  # fmt: skip
    odd += [] if experts.has_gate and experts.is_concatenated else ["no concatenated gate and up projections"]
    for projection in PROJECTIONS:
        weight = getattr(experts, projection, None)
        if weight is not None and (weight.shape[1:].numel() % BLOCK or weight.shape[2] % 2):
            odd.append(f"{projection} {tuple(weight.shape)}: an expert must have a multiple of {BLOCK} weights")
    if odd:
        raise Nf4Error(f"The experts {name} can't become 4-bit ({', '.join(odd)}); load this model with four_bit=False.")


def quantise(weight: torch.Tensor) -> dict[str, torch.Tensor]:
    """NF4 pieces of a projection [E, N, K] of 16 or 32 bit: packed uint8 [E, N, K / 2], absmax uint8 [E, B],
    nested int32 (bits of fp32) [E, ceil(B / 256)], offset int32 (bits of fp32) [E], with B = N * K / 64."""
    rows = []
    for matrix in weight:
        packed, state = bnb_functional.quantize_4bit(
            matrix.contiguous(), blocksize=BLOCK, compress_statistics=True, quant_type="nf4"
        )
        rows.append((packed.view(matrix.shape[0], -1), state.absmax, state.state2.absmax, state.offset))
    packed, absmax, nested, offset = (torch.stack(piece) for piece in zip(*rows, strict=True))
    return {"packed": packed, "absmax": absmax, "nested": nested.view(torch.int32), "offset": offset.view(torch.int32)}


def meta_pieces(weight: torch.Tensor) -> dict[str, torch.Tensor]:
    """Empty pieces on the meta device for a projection of the same shape."""
    count, rows, columns = weight.shape
    blocks = rows * columns // BLOCK
    empty = functools.partial(torch.empty, device="meta")
    return {
        "packed": empty((count, rows, columns // 2), dtype=torch.uint8),
        "absmax": empty((count, blocks), dtype=torch.uint8),
        "nested": empty((count, -(-blocks // NESTED_BLOCK)), dtype=torch.int32),
        "offset": empty((count,), dtype=torch.int32),
    }


@functools.cache
def _tables(device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """bitsandbytes' tables on the device: [256] of the absmax levels, [16] of NF4; fp32."""
    with torch.inference_mode(False):
        code = bnb_functional.create_dynamic_map().to(device=device, dtype=torch.float32)
        nf4 = bnb_functional.get_4bit_type("nf4", device=device).float()
    return code, nf4


@functools.cache
def _kernels(device: torch.device) -> Any:
    """The Triton kernels, or None where there is no CUDA device of sm80 or newer."""
    if device.type != "cuda" or torch.cuda.get_device_capability(device) < (8, 0) or torch.version.hip:
        return None
    from prompt_recovery import kernels

    return kernels


def dequantise(pieces: dict[str, torch.Tensor], dtype: torch.dtype, out: torch.Tensor | None = None) -> torch.Tensor:
    """The weights [E, N, K] in `dtype`, bit for bit bitsandbytes' dequantisation of every expert; into `out` if given."""
    packed, absmax = pieces["packed"], pieces["absmax"]
    nested, offset = pieces["nested"].view(torch.float32), pieces["offset"].view(torch.float32)
    shape = (*packed.shape[:2], packed.shape[2] * 2)
    code, nf4 = _tables(packed.device)
    triton_kernels = _kernels(packed.device)
    if triton_kernels is not None:
        out = packed.new_empty(shape, dtype=dtype) if out is None else out
        triton_kernels.dequantise(packed, absmax, nested, offset, code, nf4, out)
        return out
    second = nested.repeat_interleave(NESTED_BLOCK, dim=1)[:, : absmax.shape[1]]
    scale = (code[absmax.int()] * second + offset[:, None]).reshape(-1)
    bits = packed.reshape(-1, 1)
    if out is None or packed.device.type == "cpu":
        result = torch.ops.bitsandbytes.dequantize_4bit(bits, scale, BLOCK, "nf4", list(shape), dtype)
        return result if out is None else out.copy_(result)
    torch.ops.bitsandbytes.dequantize_4bit.out(bits, scale, BLOCK, "nf4", list(shape), dtype, out=out)
    return out


class _Buffer:
    """Room for one projection's 16-bit weights, and a weak reference to the packed tensor that it holds now."""

    room: torch.Tensor | None = None
    owner: weakref.ref | None = None
    key: tuple = ()


_buffers: dict[tuple, _Buffer] = {}


def release_buffers() -> None:
    """Give back the memory of the dequantised weights (one layer's experts in 16 bit a device)."""
    _buffers.clear()


def weights(experts: nn.Module, projection: str, dtype: torch.dtype) -> torch.Tensor:
    """A projection's weights [E, N, K] in `dtype`, valid until the same projection of another layer is asked for."""
    pieces = {piece: getattr(experts, f"{projection}_{piece}").detach() for piece in PIECES}
    packed = getattr(experts, f"{projection}_packed")
    buffer = _buffers.setdefault((packed.device, projection, dtype), _Buffer())
    key = (packed.data_ptr(), None if packed.is_inference() else packed._version, packed.shape)
    if buffer.owner is not None and buffer.owner() is packed and buffer.key == key and buffer.room is not None:
        return buffer.room.view(*packed.shape[:2], -1)
    if buffer.room is None or buffer.room.numel() != packed.numel() * 2:
        buffer.room = None  # freed before the new one is asked for
        with torch.inference_mode(False):
            buffer.room = torch.empty(packed.numel() * 2, dtype=dtype, device=packed.device)
    buffer.owner = None  # a dequantisation that fails leaves nothing that looks valid
    dequantise(pieces, dtype, out=buffer.room.view(*packed.shape[:2], -1))
    buffer.owner, buffer.key = weakref.ref(packed), key
    return buffer.room.view(*packed.shape[:2], -1)


class Routing(NamedTuple):
    """Where the R = T * top_k rows go. order [R]: flat (token, choice) index of each row in expert order; inverse [R]:
    row of each flat index; ends [E] int32 on the device: end of each expert's rows; bounds: the same on the host, read
    (one host sync) only where no grouped GEMM takes `ends` from the device."""

    order: torch.Tensor
    inverse: torch.Tensor
    ends: torch.Tensor
    bounds: list[int] | None
    top_k: int


def _grouped_gemm(device: torch.device, dtype: torch.dtype) -> bool:
    # the real kernel is for bf16 on sm90 and sm100; elsewhere torch loops over the experts itself, with a host sync each time
    return (
        device.type == "cuda" and dtype == torch.bfloat16 and hasattr(nn.functional, "grouped_mm")
        and torch.cuda.get_device_capability(device)[0] in (9, 10)
    )  # fmt: skip


def route(top_k_index: torch.Tensor, experts: int, dtype: torch.dtype) -> Routing:
    """Sort once for the whole layer. top_k_index: [T, top_k] integers in [0, experts)."""
    flat = top_k_index.reshape(-1).to(torch.int32)
    ordered, order = torch.sort(flat, stable=True)
    inverse = torch.empty_like(order)
    inverse[order] = torch.arange(order.numel(), device=order.device)
    numbers = torch.arange(experts, device=order.device, dtype=torch.int32)
    ends = torch.searchsorted(ordered, numbers, right=True, out_int32=True)
    bounds = None if _grouped_gemm(flat.device, dtype) else ends.tolist()
    return Routing(order, inverse, ends, bounds, top_k_index.shape[-1])


def _matmul(rows: torch.Tensor, weight: torch.Tensor, routing: Routing, transpose: bool) -> torch.Tensor:
    """Each expert's rows times its weight [N, K], transposed (rows [R, K] -> [R, N]) or not ([R, N] -> [R, K])."""
    weight = weight.transpose(1, 2) if transpose else weight
    if routing.bounds is None and not (rows.shape[1] % 8 or weight.shape[2] % 8) and rows.shape[0]:
        return nn.functional.grouped_mm(rows, weight, offs=routing.ends)
    out = rows.new_empty(rows.shape[0], weight.shape[2])
    start = 0
    for expert, end in enumerate(routing.ends.tolist() if routing.bounds is None else routing.bounds):
        if end > start:
            torch.mm(rows[start:end], weight[expert], out=out[start:end])
        start = end
    return out


def _gather(x: torch.Tensor, routing: Routing) -> torch.Tensor:
    triton_kernels = _kernels(x.device)
    if triton_kernels is not None and x.shape[0]:
        return triton_kernels.gather(x.contiguous(), routing.order, routing.top_k)
    return x.index_select(0, routing.order // routing.top_k)


def _combine(rows: torch.Tensor, routing: Routing) -> torch.Tensor:
    triton_kernels = _kernels(rows.device)
    if triton_kernels is not None and rows.shape[0]:
        return triton_kernels.combine(rows, routing.inverse, routing.top_k)
    tokens = rows.index_select(0, routing.inverse).view(-1, routing.top_k, rows.shape[1])
    return tokens.sum(1, dtype=torch.float32).to(rows.dtype)


class _GateUp(torch.autograd.Function):
    """x [T, H] -> gate and up rows [R, 2I] in expert order."""

    @staticmethod
    def forward(ctx, x, experts, routing, keep):
        ctx.experts, ctx.routing = experts, routing
        kept = experts.__dict__.pop("_kept_gate_up", None)
        # inside a backward pass this is a recomputation by activation checkpointing
        if torch._C._current_graph_task_id() != -1 and kept is not None and kept.shape[0] == routing.order.numel():
            return kept
        out = _matmul(_gather(x, routing), weights(experts, "gate_up_proj", x.dtype), routing, transpose=True)
        if keep and torch._C._current_graph_task_id() == -1:
            experts._kept_gate_up = out
        return out

    @staticmethod
    def backward(ctx, grad):
        weight = weights(ctx.experts, "gate_up_proj", grad.dtype)
        return _combine(_matmul(grad.contiguous(), weight, ctx.routing, transpose=False), ctx.routing), None, None, None


class _SwiGlu(torch.autograd.Function):
    """Gate and up rows [R, 2I], routing weights [T, top_k] -> silu(gate) * up * weight [R, I]."""

    @staticmethod
    def forward(ctx, gate_up, top_k_weights, order):
        ctx.order = order
        ctx.save_for_backward(gate_up, top_k_weights)
        triton_kernels = _kernels(gate_up.device)
        if triton_kernels is not None and gate_up.shape[0]:
            return triton_kernels.swiglu(gate_up, top_k_weights.contiguous(), order)
        gate, up = gate_up.float().chunk(2, dim=-1)
        weight = top_k_weights.reshape(-1)[order, None].float()
        return (nn.functional.silu(gate) * up * weight).to(gate_up.dtype)

    @staticmethod
    def backward(ctx, grad):
        gate_up, top_k_weights = ctx.saved_tensors
        triton_kernels = _kernels(gate_up.device)
        if triton_kernels is not None and gate_up.shape[0]:
            weight, grad = top_k_weights.contiguous(), grad.contiguous()
            return *triton_kernels.swiglu_backward(gate_up, weight, ctx.order, grad), None
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
    """Weighted rows [R, I] -> sums over each token's experts [T, H]. It saves no tensor: activation checkpointing would
    recompute the down-projection to hand it one."""

    @staticmethod
    def forward(ctx, rows, experts, routing):
        ctx.experts, ctx.routing = experts, routing
        return _combine(_matmul(rows, weights(experts, "down_proj", rows.dtype), routing, transpose=True), routing)

    @staticmethod
    def backward(ctx, grad):
        weight = weights(ctx.experts, "down_proj", grad.dtype)
        return _matmul(_gather(grad, ctx.routing), weight, ctx.routing, transpose=False), None, None


@torch.compiler.disable
def experts_forward(
    self: nn.Module, hidden_states: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor
) -> torch.Tensor:
    """The experts' output [T, H] in the dtype of hidden_states [T, H]; top_k_index and top_k_weights: [T, top_k].

    Computes in autocast's dtype where autocast is on, else in that of hidden_states. Gradients go to hidden_states and
    top_k_weights only.
    """
    kind = hidden_states.device.type
    dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else hidden_states.dtype
    with torch.autocast(kind, enabled=False):
        routing = route(top_k_index, self.num_experts, dtype)
        keep = getattr(self, "keep_gate_up", False) and torch.is_grad_enabled()
        rows = _GateUp.apply(hidden_states.to(dtype), self, routing, keep)
        silu = isinstance(self.act_fn, nn.SiLU) or type(self.act_fn).__name__ == "SiLUActivation"
        if silu and type(self)._apply_gate is moe._default_apply_gate:
            rows = _SwiGlu.apply(rows, top_k_weights, routing.order)
        else:
            rows = (self._apply_gate(rows) * top_k_weights.reshape(-1)[routing.order, None]).to(dtype)
        return _Down.apply(rows, self, routing).to(hidden_states.dtype)


def keep_gate_up(model: nn.Module, layers: int) -> None:
    """Under activation checkpointing, keep the gate and up rows (4 * I * top_k bytes a token) of the last `layers` MoE
    layers instead of recomputing them: then only attention and norms are recomputed there. 0 keeps none. Only with
    checkpointing, and one forward before each backward."""
    found = [module for module in model.modules() if fused_experts(module)]
    for number, experts in enumerate(found):
        experts.__dict__.pop("_kept_gate_up", None)
        experts.keep_gate_up = number >= len(found) - layers
