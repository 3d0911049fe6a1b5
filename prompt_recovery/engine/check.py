"""Triton's kernels beside plain torch, when a model is loaded."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import bitsandbytes as bnb
import torch
from torch import nn

from prompt_recovery.engine.forward import experts_forward
from prompt_recovery.engine.kernels import dispatch
from prompt_recovery.engine.kernels.dispatch import FEW_TOKENS, on
from prompt_recovery.engine.memory import kv_shape
from prompt_recovery.engine.storage import dequantise, four_bit_experts, linear_pieces, workspace


def check_kernels(model: nn.Module) -> None:
    """Compare Triton's kernels with plain torch on one layer's experts, and where ours is used on
    attention, once a device. Where they differ by more than rounding or can't run, plain torch
    computes there from then on, which is printed."""
    for experts in four_bit_experts(model):
        device = experts.gate_up_proj_packed.device
        if not dispatch.to_check(device):
            continue
        dtype = next(model.parameters()).dtype
        try:
            errors = [_experts_error(experts, dtype)]
            # a decode step in fp32 has plain torch's matrices and attention
            if dtype.itemsize == 2:
                errors += _step_errors(model, dtype, device)
        # a compiler's or a driver's; plain torch goes on, and says why
        except Exception as problem:
            dispatch.refuse(
                device, f"{type(problem).__name__}: {str(problem).strip().splitlines()[0][:200]}"
            )
            continue
        limit = 4 * torch.finfo(dtype).eps  # rounding gives 3e-3 to 5e-3 in bf16, 5e-4 in fp16
        wrong = [error for error in errors if not error <= limit]  # NaN too
        if wrong:
            dispatch.refuse(device, f"off by {wrong[0]:.1e}, at most {limit:.1e}")


def _step_errors(model: nn.Module, dtype: torch.dtype, device: torch.device) -> list[float]:
    """Of what a decode step computes beside the experts on this device."""
    errors = []
    linear = next((each for each in _four_bit_layers(model) if each.weight.device == device), None)
    if linear is not None:
        errors.append(_linear_error(linear, dtype))
    if dispatch.lowered(device):
        errors.append(_attention_error(model.config, dtype, device))
    return errors


@torch.no_grad()
def _experts_error(experts: nn.Module, dtype: torch.dtype) -> float:
    """The larger relative error of Triton's two ways, for few rows and for many, against plain
    torch."""
    device, count = experts.gate_up_proj_packed.device, experts.num_experts
    generator = torch.Generator(device).manual_seed(0)
    errors = []
    for tokens in (5, FEW_TOKENS + 1):
        x = torch.randn(
            tokens, experts.gate_up_proj_packed.shape[2] * 2, generator=generator, device=device
        ).to(dtype)
        chosen, index = torch.rand(tokens, count, generator=generator, device=device).topk(
            min(2, count)
        )
        with dispatch.using(device, "torch"):
            expected = experts_forward(experts, x, index, chosen.to(dtype)).float()
        workspace(experts).buffers.clear()  # else Triton would be spared the dequantisation
        found = experts_forward(experts, x, index, chosen.to(dtype)).float()
        workspace(experts).buffers.clear()
        # weights of zeros give 0 of 0
        errors.append(
            (found - expected).norm() / expected.norm().clamp(min=torch.finfo(torch.float32).tiny)
        )
    return torch.stack(errors).max().item()  # NaN if one of them is


def _four_bit_layers(model: nn.Module) -> Iterator[bnb.nn.Linear4bit]:
    return (
        module
        for module in model.modules()
        if isinstance(module, bnb.nn.Linear4bit) and linear_pieces(module)
    )


@torch.no_grad()
def _linear_error(layer: bnb.nn.Linear4bit, dtype: torch.dtype) -> float:
    """The relative error of one 4-bit matrix for the rows of a decode step, against plain torch."""
    from prompt_recovery.engine.kernels import experts_decode

    pieces, device = linear_pieces(layer), layer.weight.device
    assert pieces is not None
    x = torch.randn(
        20, layer.in_features, generator=torch.Generator(device).manual_seed(0), device=device
    ).to(dtype)
    with dispatch.using(device, "torch"):
        expected = nn.functional.linear(x, dequantise(pieces, dtype)[0]).float()
    with on(device):
        found = experts_decode.linear(x, pieces).float()
    return (
        (found - expected).norm() / expected.norm().clamp(min=torch.finfo(torch.float32).tiny)
    ).item()


@torch.no_grad()
def _attention_error(config: Any, dtype: torch.dtype, device: torch.device) -> float:
    """The largest relative error of attention of one token a row, of few rows and of many."""
    from prompt_recovery.engine.kernels import decode_step

    key_heads, size = kv_shape(config)
    heads, columns, start = config.get_text_config().num_attention_heads, 320, 9
    generator = torch.Generator(device).manual_seed(0)

    def drawn(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator, device=device).to(dtype)

    errors = []
    for rows in (1, 20):
        query, keys, values = (
            drawn(rows, heads, size),
            *(drawn(rows, key_heads, columns, size) for _ in range(2)),
        )
        padding = torch.arange(rows, device=device)[:, None] * 5
        place = torch.tensor([columns - 30], device=device)
        now = torch.tensor([columns, rows], device=device)
        with on(device):
            found = decode_step.attend(
                query, keys, values, padding, place, now, start, key_heads, size**-0.5
            ).float()
        seen = torch.arange(columns, device=device)
        visible = ((seen < start) | (seen >= start + padding)) & (seen <= place)
        grouped = query.view(rows, key_heads, -1, size).float()
        odds = (grouped @ keys.float().transpose(2, 3) * size**-0.5).masked_fill(
            ~visible[:, None, None], -torch.inf
        )
        expected = (odds.softmax(-1) @ values.float()).view(rows, heads, size)
        errors.append((found - expected).norm() / expected.norm())
    return torch.stack(errors).max().item()
