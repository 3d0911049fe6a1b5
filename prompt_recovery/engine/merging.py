"""An adapter merged into the base's weights for the while of answering."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import bitsandbytes as bnb
import torch
from bitsandbytes import functional as bnb_functional
from peft import PeftModel
from peft.tuners.lora import Linear, LoraLayer
from peft.tuners.lora.bnb import Linear4bit
from torch import nn


class MergeError(ValueError):
    """An adapter that can't be merged into its base without changing what it computes."""


@contextmanager
def merged(model: Any) -> Iterator[Any]:
    """Inside the with block, the base model with its active adapters merged into 16-bit (or 32-bit)
    weights of the layers they adapt; afterwards the model is as it was, tensor for tensor. A model
    without an adapter is given back as it is.

    Layers with more than a plain LoRA (see `mergeable`) stay peft's and compute what they do
    unmerged, which is printed. 4-bit layers are dequantised for merging and never quantised again:
    at Mixtral's shape 2 GiB more, and no launches for the adapter.
    Raises MergeError if the logits move by more than the rounding of the dtype.
    """
    if not isinstance(model, PeftModel) or not model.peft_config:
        yield model
        return
    base = model.get_base_model()
    layers = {name: layer for name, layer in base.named_modules() if isinstance(layer, LoraLayer)}
    able = {name: layer for name, layer in layers.items() if mergeable(layer)}
    if len(able) < len(layers):
        first = next(name for name in layers if name not in able)
        print(
            f"{len(layers) - len(able)} of {len(layers)} adapted layers stay unmerged, the first is"
            f" {first}: more than a plain LoRA, which peft computes."
        )
    if not able:
        yield base
        return
    device = model.get_input_embeddings().weight.device
    ids = torch.arange(3, 35, device=device)[None] % base.config.vocab_size
    replaced: list[tuple[nn.Module, str, nn.Module]] = []
    with torch.inference_mode():
        expected = base(input_ids=ids, use_cache=False).logits.float()
    if not expected.isfinite().all():
        raise MergeError(
            "the logits are not finite before merging, so that nothing can be compared: the base or"
            " the adapter is damaged, or its weights are too large for the precision."
        )
    try:
        for name, layer in able.items():
            parent = base.get_submodule(name.rpartition(".")[0])
            setattr(parent, name.rpartition(".")[2], _merged_linear(name, layer, base.dtype))
            replaced.append((parent, name.rpartition(".")[2], layer))
        with torch.inference_mode():
            moved = base(input_ids=ids, use_cache=False).logits.float() - expected
        # of the middle token: a single one can be so sharp a case that rounding moves it entirely
        # (LOG.md)
        difference = (moved.norm(dim=-1) / expected.norm(dim=-1)).median()
        # roundings of both ways pile up over the layers. Measured (LOG.md): 5e-3 in bf16 at
        # Mixtral's shape, 3e-6 in fp32 with a LoRA as large as the weights; fp16 passed there, its
        # figure was not kept
        limit = max(16 * torch.finfo(base.dtype).eps, 1e-4)
        if not difference <= limit:
            raise MergeError(
                f"merging the adapter moved the logits by {difference:.1e} of their size (limit "
                f"{limit:.1e}): its weights are too large for the base's precision, or the model "
                "magnifies rounding."
            )
        yield base
    finally:
        for parent, name, layer in replaced:
            setattr(parent, name, layer)


def mergeable(layer: LoraLayer) -> bool:
    """Whether an adapted layer computes its linear layer plus the `get_delta_weight` of its active
    adapters, and nothing else: no DoRA or other variant, no bias, no embedding or experts, neither
    disabled nor merged by peft already."""
    return (
        type(layer) in (Linear, Linear4bit)
        and type(layer.get_base_layer()) in (nn.Linear, bnb.nn.Linear4bit)
        and not (layer.disable_adapters or layer.merged or layer.fan_in_fan_out)
        and not any(
            layer.lora_variant.get(n) or layer.lora_bias.get(n) for n in layer.active_adapters
        )
    )


def _merged_linear(name: str, layer: LoraLayer, dtype: torch.dtype) -> nn.Linear:
    stored = layer.get_base_layer()
    state = getattr(stored.weight, "quant_state", None)
    weight = (
        stored.weight.detach()
        if state is None
        else bnb_functional.dequantize_4bit(stored.weight.data, state)
    )
    weight = weight.float()
    for adapter in layer.active_adapters:
        if adapter in layer.lora_A:  # another adapter may not reach this layer
            weight = weight + layer.get_delta_weight(adapter).detach().float()
    weight = weight.to(dtype)
    if not weight.isfinite().all():
        raise MergeError(
            f"{name} with the adapter is not finite in {str(dtype).removeprefix('torch.')}: a "
            f"weight is above {torch.finfo(dtype).max:.0f}, or damaged."
        )
    linear = nn.Linear(
        weight.shape[1], weight.shape[0], bias=stored.bias is not None, device="meta"
    )
    linear.weight = nn.Parameter(weight, requires_grad=False)
    linear.bias = stored.bias
    return linear
