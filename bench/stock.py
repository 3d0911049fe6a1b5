"""The stock stack at the true shape: transformers + peft + bitsandbytes without our code. bf16
attention and head, NF4 experts, random weights; two ways to compute with them."""

from __future__ import annotations

import torch
from bitsandbytes import functional as bnb_functional
from bitsandbytes.nn.parametrize import Bnb4bitParametrization, _register_parametrization_hooks
from peft import LoraConfig, get_peft_model
from torch import nn
from torch.nn import functional
from torch.nn.utils import parametrize
from transformers import MixtralConfig, MixtralForCausalLM
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

PROJECTIONS = ("gate_up_proj", "down_proj")


class _Probe(torch.autograd.Function):
    """The fastest of the stock-like variants that were tried: dequantise and grouped_mm, no weight
    gradients."""

    @staticmethod
    def forward(ctx, x, packed, state, ends):
        ctx.packed, ctx.state = packed, state
        ctx.save_for_backward(ends)
        return functional.grouped_mm(
            x, bnb_functional.dequantize_4bit(packed, state).transpose(-2, -1), offs=ends
        )

    @staticmethod
    def backward(ctx, grad):
        (ends,) = ctx.saved_tensors
        weight = bnb_functional.dequantize_4bit(ctx.packed, ctx.state)
        return functional.grouped_mm(grad.contiguous(), weight, offs=ends), None, None, None


def _probe_forward(self, x, index, top_k_weights):
    flat = index.reshape(-1)
    order = torch.argsort(flat)
    ends = torch.cumsum(torch.bincount(flat, minlength=self.num_experts), 0).to(torch.int32)
    rows = _Probe.apply(x[order // index.shape[-1]], *self._gate_up_proj, ends)
    rows = _Probe.apply(self._apply_gate(rows), *self._down_proj, ends) * top_k_weights.reshape(-1)[
        order, None
    ].to(x.dtype)
    inverse = torch.empty_like(order)
    inverse[order] = torch.arange(order.numel(), device=order.device)
    return rows[inverse].view(x.shape[0], index.shape[-1], -1).sum(1)


def build(layers: int) -> tuple[nn.Module, nn.Module]:
    """(model with a LoRA, its base), experts by dequantise + grouped_mm; a layer's 16-bit experts
    at a time are held."""
    torch.set_default_dtype(torch.bfloat16)
    ALL_EXPERTS_FUNCTIONS.register("probe", _probe_forward)
    config = MixtralConfig(num_hidden_layers=layers, vocab_size=32000)
    with torch.device("meta"):
        base = MixtralForCausalLM(config)
    for module in (layer.mlp.experts for layer in base.model.layers):
        for name in PROJECTIONS:
            weight = torch.randn(getattr(module, name).shape, device="cuda") * 0.02
            setattr(
                module,
                f"_{name}",
                bnb_functional.quantize_4bit(weight, quant_type="nf4", compress_statistics=True),
            )
            delattr(module, name)
    rotary = type(base.model.rotary_emb)(config).to("cuda")
    base.to_empty(device="cuda")
    base.model.rotary_emb = rotary
    for parameter in base.parameters():
        nn.init.normal_(parameter, 0, 0.02) if parameter.dim() > 1 else nn.init.ones_(parameter)
    base.requires_grad_(False)
    targets = ["q_proj", "k_proj", "v_proj", "o_proj"]
    lora = get_peft_model(
        base, LoraConfig(r=16, lora_alpha=64, target_modules=targets, task_type="CAUSAL_LM")
    )
    base.set_experts_implementation("probe")
    torch.set_default_dtype(torch.float32)
    return lora, base


def parametrise(base: nn.Module) -> None:
    """Let the experts be bitsandbytes' parametrisation, dequantised on access, with transformers'
    grouped_mm."""
    for module in (layer.mlp.experts for layer in base.model.layers):
        for name in PROJECTIONS:
            packed, state = getattr(module, f"_{name}")
            setattr(module, name, nn.Parameter(packed, requires_grad=False))
            parametrize.register_parametrization(
                module, name, Bnb4bitParametrization(state), unsafe=True
            )
            _register_parametrization_hooks(module, name)
    base.set_experts_implementation("grouped_mm")
