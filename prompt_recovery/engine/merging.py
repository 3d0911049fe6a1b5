"""An adapter merged into the base's weights for the while of answering."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from bitsandbytes import functional as bnb_functional
from peft import PeftModel
from peft.tuners.lora import LoraLayer
from torch import nn


class MergeError(ValueError):
    """An adapter that can't be merged into its base without changing what it computes."""


@contextmanager
def merged(model: Any) -> Iterator[Any]:
    """Inside the with block, the base model with the active adapter merged into 16-bit (or 32-bit) weights of the layers
    it adapts; afterwards the model is as it was, tensor for tensor. A model without an adapter is given back as it is.

    4-bit layers are dequantised for it and never quantised again: at Mixtral's shape 2 GiB more, and no launches for the
    adapter. Raises MergeError if the logits move by more than the rounding of the dtype.
    """
    if not isinstance(model, PeftModel) or not model.peft_config:
        yield model
        return
    base = model.get_base_model()
    ids = torch.arange(3, 35, device=model.get_input_embeddings().weight.device)[None] % base.config.vocab_size
    replaced: list[tuple[nn.Module, str, nn.Module]] = []
    with torch.inference_mode():
        expected = base(input_ids=ids, use_cache=False).logits.float()
    try:
        for name, layer in list(base.named_modules()):
            if isinstance(layer, LoraLayer):
                parent = base.get_submodule(name.rpartition(".")[0])
                setattr(parent, name.rpartition(".")[2], _merged_linear(layer, base.dtype))
                replaced.append((parent, name.rpartition(".")[2], layer))
        with torch.inference_mode():
            moved = base(input_ids=ids, use_cache=False).logits.float() - expected
        # of the middle token: a single one can be so sharp a case that rounding moves it entirely (LOG.md)
        difference = (moved.norm(dim=-1) / expected.norm(dim=-1)).median()
        # roundings of both ways pile up over the layers. Measured (LOG.md): 5e-3 in bf16 at Mixtral's shape, 3e-6 in fp32
        # with a LoRA as large as the weights; fp16 passed there, its figure was not kept
        limit = max(16 * torch.finfo(base.dtype).eps, 1e-4)
        if not difference <= limit:
            raise MergeError(
                f"merging the adapter moved the logits by {difference:.1e} of their size (limit {limit:.1e}): its weights are"
                " too large for the base's precision, or the base is damaged."
            )
        yield base
    finally:
        for parent, name, layer in replaced:
            setattr(parent, name, layer)


def _merged_linear(layer: LoraLayer, dtype: torch.dtype) -> nn.Linear:
    stored = layer.get_base_layer()
    state = getattr(stored.weight, "quant_state", None)
    weight = stored.weight.detach() if state is None else bnb_functional.dequantize_4bit(stored.weight.data, state)
    weight = weight.float()
    for adapter in layer.active_adapters:
        weight = weight + layer.get_delta_weight(adapter).detach().float()
    linear = nn.Linear(weight.shape[1], weight.shape[0], bias=stored.bias is not None, device="meta")
    linear.weight = nn.Parameter(weight.to(dtype), requires_grad=False)
    linear.bias = stored.bias
    return linear
