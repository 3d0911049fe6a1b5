"""Layers of a transformers model as the decoder runs them: attention that copies no keys, and the
small work of a Mixtral layer in a few launches. In force inside `fast_layers` only; other models
run their own."""

from __future__ import annotations

import types
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import bitsandbytes as bnb
import torch
from peft.tuners.lora import LoraLayer
from torch import nn
from torch.nn.functional import scaled_dot_product_attention
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from prompt_recovery.engine.batching import MOST_ROWS
from prompt_recovery.engine.cache import StaticCache
from prompt_recovery.engine.kernels.dispatch import lowered, on, uses_triton
from prompt_recovery.engine.merging import mergeable
from prompt_recovery.engine.storage import dequantise, linear_pieces

ATTENTION_IMPLEMENTATION = "prompt_recovery_decode"


def _attention(module, query, key, value, attention_mask, scaling=None, **kwargs):
    """SDPA of queries [R, heads, C, D] over keys and values [R, key heads, K, D], none of which is
    copied: for one query a row, the query heads of a key head stand as its queries; for more, one
    of each key head goes at a time."""
    if attention_mask is None:
        return sdpa_attention_forward(module, query, key, value, None, scaling=scaling, **kwargs)
    rows, heads, columns, size = query.shape
    group = heads // key.shape[1]
    if columns == 1:
        grouped = query.reshape(rows, key.shape[1], group, size)
        out = scaled_dot_product_attention(
            grouped, key, value, attn_mask=attention_mask, scale=scaling
        )
        return out.reshape(rows, 1, heads, size), None
    out = query.new_empty(rows, columns, heads, size)
    for number in range(group):
        one = query[:, number::group]
        found = scaled_dot_product_attention(
            one, key, value, attn_mask=attention_mask, scale=scaling
        )
        out[:, :, number::group] = found.transpose(1, 2)
    return out, None


def _cached_attention(
    self, hidden_states, position_embeddings, attention_mask=None, past_key_values=None, **kwargs
):
    """MixtralAttention with the decoder's cache: [R, C, H] -> [R, C, H]."""
    if not isinstance(past_key_values, StaticCache):
        return type(self).forward(
            self,
            hidden_states,
            position_embeddings,
            attention_mask=attention_mask,
            past_key_values=past_key_values,
            **kwargs,
        )
    from prompt_recovery.engine.kernels import decode_step

    cache, (rows, width) = past_key_values, hidden_states.shape[:2]
    x = hidden_states.flatten(0, 1)
    cos, sin = (part.expand(rows, width, -1).flatten(0, 1) for part in position_embeddings)
    keys, values = cache.memory(self.layer_idx)
    with on(x.device):
        q, k, v = self.project(x)
        query = decode_step.rotate_and_store(
            q, k, v, cos, sin, keys, values, cache.now, cache.heads,
            column=cache.column, first_row=cache.rows.start, first_column=cache.where.start or 0,
            width=width,
        )  # fmt: skip
        if self.knows_rows and cache.column is not None:
            out = decode_step.attend(
                query,
                keys,
                values,
                cache.padding,
                cache.column,
                cache.now,
                cache.start,
                cache.heads,
                self.scaling,
            )
        else:
            query = query.view(rows, width, -1, self.head_dim).transpose(1, 2)
            keys, values = cache.layer(self.layer_idx)
            out, _ = _attention(self, query, keys, values, attention_mask, scaling=self.scaling)
    return self.o_proj(out.reshape(rows, width, -1)), None


def _router(self, hidden_states):
    """MixtralTopKRouter without gradients; the logits, which nobody asks for, are None."""
    if torch.is_grad_enabled() or hidden_states.dtype != self.weight.dtype:
        return type(self).forward(self, hidden_states)
    from prompt_recovery.engine.kernels import decode_step

    with on(hidden_states.device):
        return None, *decode_step.choose_experts(
            hidden_states.contiguous(), self.weight, self.top_k
        )


def _four_bit(x: torch.Tensor, matrices: Sequence[dict[str, torch.Tensor]]) -> list[torch.Tensor]:
    """x [T, K] of 16 bit times 4-bit matrices [1, N, K], each transposed, without gradients: for
    the rows of a decode step each weight is read once, for more they are dequantised first."""
    if len(x) <= MOST_ROWS:
        from prompt_recovery.engine.kernels import experts_decode

        return [experts_decode.linear(x, pieces) for pieces in matrices]
    sizes = [pieces["packed"].shape[1] for pieces in matrices]
    weights = x.new_empty(sum(sizes), x.shape[1])
    for pieces, weight in zip(matrices, weights.split(sizes), strict=True):
        dequantise(pieces, x.dtype, weight[None])
    return [*nn.functional.linear(x, weights).split(sizes, -1)]


def _four_bit_forward(self, x):
    """bitsandbytes' Linear4bit in 16 bit without gradients."""
    with on(x.device):
        (y,) = _four_bit(x.flatten(0, -2), [self.pieces])
    return y.view(*x.shape[:-1], -1)


def _lora_forward(self, x, *args, **kwargs):
    """A LoRA beside its layer, in the layer's 16 bit and three launches; peft computes in fp32, in
    some eight."""
    down, up = self.sixteen
    y = self.base_layer(x)
    y.view(-1, y.shape[-1]).addmm_(x.flatten(0, -2) @ down, up)
    return y


def _sixteen(layer: LoraLayer, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor] | None:
    """A LoRA's two matrices, [in, r] and [r, out], the second scaled; None for one that is more
    than that."""
    if not mergeable(layer) or len(layer.active_adapters) != 1:
        return None
    (name,) = layer.active_adapters
    if name not in layer.lora_A:
        return None
    down, up = layer.lora_A[name].weight, layer.lora_B[name].weight
    return (
        down.detach().t().to(dtype).contiguous(),
        (up.detach().t() * layer.scaling[name]).to(dtype).contiguous(),
    )


def bytes_of_copies(model: Any, device: torch.device) -> int:
    """What the LoRAs' 16-bit copies take, by which `fast_layers` computes them unmerged."""
    named = model.named_parameters()
    return sum(
        2 * each.numel() for name, each in named if ".lora_" in name and each.device == device
    )


def _projections(attention: nn.Module, dtype: torch.dtype) -> dict[str, Any]:
    """`project`, a function of x [T, H] that gives queries, keys and values [T, heads * D], in as
    few launches as their layers allow, and the LoRAs' 16-bit copies if it has taken them over."""
    layers = [attention.q_proj, attention.k_proj, attention.v_proj]
    if all(type(layer) is nn.Linear and layer.bias is None for layer in layers):
        return {"project": _one_product(layers)}
    loras = [_sixteen(layer, dtype) for layer in layers if isinstance(layer, LoraLayer)]
    bases = [layer.base_layer if isinstance(layer, LoraLayer) else layer for layer in layers]
    four_bit = [linear_pieces(base) for base in bases if isinstance(base, bnb.nn.Linear4bit)]
    matrices = [pieces for pieces in four_bit if pieces is not None]
    there = [lora for lora in loras if lora is not None]
    if len(matrices) < len(layers) or len(there) < len(loras):
        return {"project": lambda x: [layer(x) for layer in layers]}
    if not there:
        return {"project": lambda x: _four_bit(x, matrices)}
    changed = [number for number, layer in enumerate(layers) if isinstance(layer, LoraLayer)]
    down, ups = torch.cat([each[0] for each in there], 1), [each[1] for each in there]

    def project(x: torch.Tensor) -> list[torch.Tensor]:
        out = _four_bit(x, matrices)
        low = (x @ down).split([len(up) for up in ups], -1)
        for number, part, up in zip(changed, low, ups, strict=True):
            out[number].addmm_(part, up)
        return out

    return {"project": project, "sixteen": (down, *ups)}


def _one_product(layers: Sequence[nn.Module]) -> Callable[[torch.Tensor], Sequence[torch.Tensor]]:
    """A function of x that multiplies it with the weights of all these layers at once. They become
    parts of one matrix."""
    joined = torch.cat([layer.weight.data for layer in layers])
    sizes = [layer.weight.shape[0] for layer in layers]
    for layer, part in zip(layers, joined.split(sizes), strict=True):
        layer.weight.data = part
    return lambda x: nn.functional.linear(x, joined).split(sizes, -1)


@contextmanager
def fast_layers(model: Any) -> Iterator[bool]:
    """Let the model's attention, its LoRAs in 16 bit, and Mixtral's layers on devices with Triton,
    be those of this module inside. Gives whether every layer's attention knows by itself what a row
    sees in a decode step, which then needs no mask."""
    ALL_ATTENTION_FUNCTIONS.register(ATTENTION_IMPLEMENTATION, _attention)
    before = model.config._attn_implementation
    model.config._attn_implementation = ATTENTION_IMPLEMENTATION
    changed: list[nn.Module] = []

    def change(module: nn.Module, forward: Any, **kept: Any) -> None:
        vars(module).update(kept, forward=types.MethodType(forward, module))
        changed.append(module)

    try:
        devices = {parameter.device for parameter in model.parameters()}
        dtype = model.get_input_embeddings().weight.dtype
        triton = all(map(uses_triton, devices)) and dtype.itemsize == 2
        # elsewhere SDPA has kernels for one query a row, beside which ours has not been measured
        ours = triton and all(map(lowered, devices))
        taken: set[nn.Module] = set()  # whose work the attention does
        for module in model.modules():
            kind = type(module).__name__
            if "forward" in vars(module) or module in taken:
                continue
            if isinstance(module, LoraLayer) and dtype.itemsize == 2:
                matrices = _sixteen(module, dtype)
                if matrices is not None:
                    change(module, _lora_forward, sixteen=matrices)
            elif isinstance(module, bnb.nn.Linear4bit) and triton:
                pieces = linear_pieces(module)
                if pieces is not None:
                    change(module, _four_bit_forward, pieces=pieces)
            elif kind == "MixtralAttention" and triton and module.head_dim.bit_count() == 1:
                knows_rows = ours and module.head_dim in (16, 32, 64, 128, 256)
                kept = _projections(module, dtype)
                change(module, _cached_attention, knows_rows=knows_rows, **kept)
                if "sixteen" in kept:
                    taken |= {module.q_proj, module.k_proj, module.v_proj}
            elif kind == "MixtralTopKRouter" and triton:
                change(module, _router)
        yield sum(vars(module).get("knows_rows", False) for module in changed) == len(
            model.get_decoder().layers
        )
    finally:
        model.config._attn_implementation = before
        for module in changed:
            del module.forward
            for name in ("project", "knows_rows", "sixteen", "pieces"):
                vars(module).pop(name, None)
