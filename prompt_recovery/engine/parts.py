"""A model's layers in parts, one for each device that holds some, which are called without
accelerate's hooks."""

from __future__ import annotations

import copy
import functools
import itertools
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import nn

from prompt_recovery.engine.kernels.dispatch import on
from prompt_recovery.engine.storage import share_workspace


class StageError(RuntimeError):
    """A model whose layers can't be called in parts."""


class Part(NamedTuple):
    """What a stage computes with: a module that takes token ids (the first) or hidden states, and
    gives logits (the last) or hidden states; the numbers of its layers; where they are, and the
    dtype of what they compute; whether its attention knows by itself what a row sees in a decode
    step (`layers.fast_layers`)."""

    module: Any
    layers: range
    device: torch.device
    dtype: torch.dtype
    first: bool
    last: bool
    knows_rows: bool = False

    def __call__(self, x: torch.Tensor, **inputs: Any) -> torch.Tensor:
        """Logits [R, 1, vocabulary] after the last column, or hidden states [R, C, H], of ids [R,
        C] or hidden states."""
        given = {"input_ids": x} if self.first else {"inputs_embeds": x}
        if self.last:
            return self.module(**given, **inputs, logits_to_keep=1).logits
        return self.module(**given, **inputs).last_hidden_state


def layer_devices(model: Any) -> list[torch.device]:
    return [next(layer.parameters()).device for layer in model.get_decoder().layers]


@contextmanager
def in_parts(model: Any, counts: Sequence[int] | None = None) -> Iterator[list[Part]]:
    """Inside the with block, the model without accelerate's hooks, in parts of `counts` layers;
    None: one a device.

    Raises StageError for a model whose parts do not compute what it does as a whole.
    """
    devices, dtype = layer_devices(model), model.get_input_embeddings().weight.dtype
    counts = counts or [len([*same]) for _, same in itertools.groupby(devices)]
    assert sum(counts) == len(devices), f"{counts} are not the model's {len(devices)} layers"
    if len(counts) == 1:
        yield [Part(model, range(len(devices)), devices[0], dtype, True, True)]
        return
    ids = (
        torch.arange(3, 35, device=model.get_input_embeddings().weight.device)[None]
        % model.config.vocab_size
    )
    with torch.inference_mode():
        expected = model(input_ids=ids, use_cache=False, logits_to_keep=1).logits.float()
    try:
        with without_hooks(model):
            parts, last = [], 0
            for count in counts:
                first, last = last, last + count
                parts.append(_part(model, range(first, last), devices[first], dtype))
                share_workspace(parts[-1].module)  # among themselves: stages compute at once
            with torch.inference_mode():
                found = ids
                for part in parts:
                    with on(part.device):
                        found = part(found.to(part.device), use_cache=False)
                found, expected = found.float().cpu(), expected.cpu()
                # of a damaged base they are not: its rows say so themselves
                finite = expected.isfinite()
                same = torch.equal(found.isfinite(), finite)
                found, expected = (each.where(finite, 0.0) for each in (found, expected))
                error = (
                    ((found - expected).norm() / expected.norm().clamp(min=1e-9)).item()
                    if same
                    else torch.nan
                )
            if not error <= 16 * torch.finfo(dtype).eps:
                raise StageError(
                    f"{type(model).__name__} in parts of {[*counts]} layers gives other logits "
                    f"than as a whole (off by {error:.1e}): its layers can't be split. Load it on "
                    "one device."
                )
            yield parts
    finally:
        share_workspace(model)


def _part(model: Any, layers: range, device: torch.device, dtype: torch.dtype) -> Part:
    decoder = model.get_decoder()
    first, last = layers.start == 0, layers.stop == len(decoder.layers)
    children: dict[str, nn.Module] = {}
    for name, child in decoder.named_children():
        if child is decoder.layers:
            children[name] = nn.ModuleList(child[number] for number in layers)
        elif not any(True for _ in child.parameters()):  # tables of the rotary embedding
            children[name] = copy.deepcopy(child).to(device)
        elif "norm" in name and not last:
            children[name] = nn.Identity()
    module = _twin(decoder, children)
    if last:
        module = _twin(
            model, {name: module for name, child in model.named_children() if child is decoder}
        )
    return Part(module, layers, device, dtype, first, last)


def _twin(module: nn.Module, children: dict[str, nn.Module]) -> nn.Module:
    """The module with other children, and the same everything else."""
    twin = copy.copy(module)
    twin.__dict__["_modules"] = module._modules | children
    return twin


@contextmanager
def without_hooks(model: nn.Module) -> Iterator[None]:
    """Inside the with block, the modules' own forward where accelerate wrapped it, to move what
    comes in to its device."""
    wrapped = []
    for module in model.modules():
        forward = vars(module).get("forward")
        if "_old_forward" in vars(module) and isinstance(forward, functools.partial):
            wrapped.append((module, forward))
            own = module._old_forward
            if getattr(own, "__func__", None) is type(module).forward:
                del module.forward
            else:
                module.forward = own  # type: ignore[method-assign]
    try:
        yield
    finally:
        for module, forward in wrapped:
            module.forward = forward  # type: ignore[method-assign]
