"""Layers of a transformers model as the decoder runs them: attention that copies no keys, and for
one token a row the small work of a Mixtral layer in a few launches. In force inside `fast_layers`
only; other models run their own."""

from __future__ import annotations

import types
from collections.abc import Iterator
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
from prompt_recovery.engine.kernels.dispatch import FEW_TOKENS, card, on, uses_triton
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


def _decode_attention(
    self, hidden_states, position_embeddings, attention_mask=None, past_key_values=None, **kwargs
):
    """MixtralAttention for one token a row and the decoder's cache: [R, 1, H] -> [R, 1, H]."""
    at = getattr(past_key_values, "column", None)
    if hidden_states.shape[1] != 1 or at is None:
        return type(self).forward(
            self,
            hidden_states,
            position_embeddings,
            attention_mask=attention_mask,
            past_key_values=past_key_values,
            **kwargs,
        )
    from prompt_recovery.engine.kernels import decode_step

    x = hidden_states[:, 0]
    if self.joined is None:
        qkv = torch.cat([layer(x) for layer in (self.q_proj, self.k_proj, self.v_proj)], dim=-1)
    else:
        qkv = nn.functional.linear(x, self.joined)
    cos, sin = (part.expand(len(x), 1, -1)[:, 0].contiguous() for part in position_embeddings)
    cache, (keys, values) = past_key_values, past_key_values.memory(self.layer_idx)
    with on(x.device):
        query = decode_step.rotate_and_store(
            qkv, cos, sin, keys, values, at, cache.now, cache.heads
        )
        if self.knows_rows:
            out = decode_step.attend(
                query,
                keys,
                values,
                cache.padding,
                at,
                cache.now,
                cache.start,
                cache.heads,
                self.scaling,
            )
        else:
            keys, values = cache.layer(self.layer_idx)
            out, _ = _attention(
                self, query[:, :, None], keys, values, attention_mask, scaling=self.scaling
            )
    return self.o_proj(out.reshape(len(x), 1, -1)), None


def _decode_router(self, hidden_states):
    """MixtralTopKRouter for few tokens without gradients; the logits, which nobody asks for, are
    None."""
    if (
        torch.is_grad_enabled()
        or hidden_states.shape[0] > FEW_TOKENS
        or hidden_states.dtype != self.weight.dtype
    ):
        return type(self).forward(self, hidden_states)
    from prompt_recovery.engine.kernels import decode_step

    with on(hidden_states.device):
        return None, *decode_step.choose_experts(
            hidden_states.contiguous(), self.weight, self.top_k
        )


def _four_bit_forward(self, x):
    """bitsandbytes' Linear4bit in 16 bit without gradients: for the rows of a decode step each
    weight is read once, for more they are dequantised first."""
    rows = x.flatten(0, -2)
    with on(x.device):
        if len(rows) > MOST_ROWS:
            y = nn.functional.linear(rows, dequantise(self.pieces, x.dtype)[0])
        else:
            from prompt_recovery.engine.kernels import experts_decode

            y = experts_decode.linear(rows, self.pieces)
    return y.view(*x.shape[:-1], -1)


def _lora_forward(self, x, *args, **kwargs):
    """A LoRA beside its layer, in the layer's 16 bit and three launches; peft computes in fp32, in
    some eight."""
    down, up = self.sixteen
    y = self.base_layer(x)
    return torch.addmm(y.flatten(0, -2), x.flatten(0, -2) @ down, up).view(y.shape)


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


def _join(attention: nn.Module) -> torch.Tensor | None:
    """The weights of q, k and v as one matrix, of which theirs become parts; None where they aren't
    plain matrices."""
    layers = [attention.q_proj, attention.k_proj, attention.v_proj]
    if any(type(layer) is not nn.Linear or layer.bias is not None for layer in layers):
        return None
    joined = torch.cat([layer.weight.data for layer in layers])
    parts = joined.split([layer.weight.shape[0] for layer in layers])
    for layer, part in zip(layers, parts, strict=True):
        layer.weight.data = part
    return joined


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
        lowered = triton and all(card(device).lowered for device in devices)
        for module in model.modules():
            kind = type(module).__name__
            if "forward" in vars(module):
                continue
            if isinstance(module, LoraLayer) and dtype.itemsize == 2:
                matrices = _sixteen(module, dtype)
                if matrices is not None:
                    change(module, _lora_forward, sixteen=matrices)
            elif isinstance(module, bnb.nn.Linear4bit) and triton:
                pieces = linear_pieces(module)
                if pieces is not None:
                    change(module, _four_bit_forward, pieces=pieces)
            elif kind == "MixtralAttention" and triton:
                knows_rows = lowered and module.head_dim in (16, 32, 64, 128, 256)
                change(module, _decode_attention, joined=_join(module), knows_rows=knows_rows)
            elif kind == "MixtralTopKRouter" and triton:
                change(module, _decode_router)
        yield sum(vars(module).get("knows_rows", False) for module in changed) == len(
            model.get_decoder().layers
        )
    finally:
        model.config._attn_implementation = before
        for module in changed:
            del module.forward
            for name in ("joined", "knows_rows", "sixteen", "pieces"):
                vars(module).pop(name, None)
