"""What a loaded model takes, by part and precision."""

from __future__ import annotations

from typing import NamedTuple

import bitsandbytes as bnb
import torch
from torch import nn
from transformers import PreTrainedModel

from prompt_recovery.engine.quantiser import GATE, fused_experts
from prompt_recovery.engine.storage import PIECES


class Part(NamedTuple):
    """One row of `summary`: a part of the model, its parameters, how they are kept, and the memory
    they take."""

    part: str
    parameters: int
    precision: str
    gib: float


def _part(name: str, module: nn.Module, model: PreTrainedModel) -> str:
    if fused_experts(module):
        return "experts"
    if module is model.get_input_embeddings():
        return "embeddings"
    if module is model.get_output_embeddings():
        return "lm_head"
    if "norm" in name.rsplit(".", 1)[-1]:
        return "norms"
    if name.endswith(GATE) or "Router" in type(module).__name__:
        return "router"
    if "lora_" in name:
        return "adapter"
    return "attention" if "attn" in name or "attention" in name else "other layers"


def summary(model: PreTrainedModel) -> list[Part]:
    """The model by part and precision, largest first. A part that is kept in two precisions gets
    two rows."""
    rows: dict[tuple[str, str], list[int]] = {}
    seen: set[int] = set()  # a head that is tied to the embeddings is counted once, as embeddings
    for name, module in model.named_modules():
        for key, tensor in module.named_parameters(recurse=False):
            if id(tensor) in seen:
                continue
            seen.add(id(tensor))
            count, size = tensor.numel(), tensor.numel() * tensor.element_size()
            precision = str(tensor.dtype).removeprefix("torch.")
            if fused_experts(module) and key.endswith(PIECES):
                precision, count = "nf4", count * 2 if key.endswith("_packed") else 0
            elif isinstance(tensor, bnb.nn.Params4bit) and tensor.quant_state is not None:
                state = tensor.quant_state
                precision, count = "nf4", int(torch.Size(state.shape).numel())
                size += state.absmax.numel() * state.absmax.element_size()
                size += state.state2.absmax.numel() * 4 if state.nested else 0
            total = rows.setdefault((_part(name, module, model), precision), [0, 0])
            total[0] += count
            total[1] += size
    parts = [
        Part(part, count, precision, size / 2**30)
        for (part, precision), (count, size) in rows.items()
    ]
    return sorted(parts, key=lambda part: -part.gib)


def summary_text(model: PreTrainedModel) -> str:
    """`summary` as lines of text, with the sum."""
    parts = summary(model)
    lines = [
        f"{part.part:<12}{part.parameters / 1e9:9.3f} B  {part.precision:<10}{part.gib:7.2f} GiB"
        for part in parts
    ]
    total = f"{'together':<12}{sum(part.parameters for part in parts) / 1e9:9.3f} B  {'':<10}"
    return "\n".join([*lines, f"{total}{sum(part.gib for part in parts):7.2f} GiB"])
