"""The comparison of bench/training.py at a small shape on the CPU: one MoE layer, forward and
backward to its input.

python bench/experts_cpu.py [--tokens 512] [--hidden 512] [--inner 1024] [--experts 8]
"""

from __future__ import annotations

import argparse
import copy
import time

import torch
from bitsandbytes import functional as bnb_functional
from bitsandbytes.nn.parametrize import Bnb4bitParametrization, _register_parametrization_hooks
from torch import nn
from torch.nn.utils import parametrize
from transformers import MixtralConfig
from transformers.models.mixtral.modeling_mixtral import MixtralExperts

from prompt_recovery.engine import quantiser, storage


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    for name, value in (("tokens", 512), ("hidden", 512), ("inner", 1024), ("experts", 8)):
        parser.add_argument(f"--{name}", type=int, default=value)
    args = parser.parse_args()
    torch.manual_seed(0)
    quantiser.register()
    config = MixtralConfig(
        hidden_size=args.hidden,
        intermediate_size=args.inner,
        num_local_experts=args.experts,
        num_experts_per_tok=2,
    )
    config._experts_implementation = "eager"
    stock = MixtralExperts(config)
    for parameter in stock.parameters():
        nn.init.normal_(parameter, 0, 0.02).requires_grad_(False)
    index = torch.stack([torch.randperm(args.experts)[:2] for _ in range(args.tokens)])
    top_k_weights = torch.rand(args.tokens, 2)
    x = torch.randn(args.tokens, args.hidden)

    ours, parametrised = copy.deepcopy(stock), copy.deepcopy(stock)
    ours.config = copy.deepcopy(config)
    ours.config._experts_implementation = quantiser.METHOD
    for name in storage.PROJECTIONS:
        weight = getattr(stock, name).data
        for piece, tensor in storage.quantise(weight).items():
            ours.register_parameter(f"{name}_{piece}", nn.Parameter(tensor, requires_grad=False))
        delattr(ours, name)
        packed, state = bnb_functional.quantize_4bit(
            weight, quant_type="nf4", compress_statistics=True
        )
        setattr(parametrised, name, nn.Parameter(packed, requires_grad=False))
        parametrize.register_parametrization(
            parametrised, name, Bnb4bitParametrization(state), unsafe=True
        )
        _register_parametrization_hooks(parametrised, name)
    dequantised = storage.expert_weights(ours, torch.float32)
    for name in storage.PROJECTIONS:
        getattr(stock, name).data = torch.stack(
            [dequantised(name, expert).clone() for expert in range(args.experts)]
        )

    print(f"{args.tokens} tokens, {args.experts} experts of {args.hidden} x {args.inner}, fp32")
    print(f"{'experts':<44}{'tok/s':>9}{'weights MB':>12}{'gradient error':>16}")
    reference = None
    for name, module in (
        ("16/32 bit, transformers' eager", stock),
        ("NF4, bitsandbytes parametrisation + eager", parametrised),
        ("NF4, ours", ours),
    ):
        times = []
        for _ in range(5):
            entered = x.clone().requires_grad_()
            start = time.perf_counter()
            module(entered, index, top_k_weights).square().sum().backward()
            times.append(time.perf_counter() - start)
        reference = entered.grad if reference is None else reference
        error = ((entered.grad - reference).norm() / reference.norm()).item()
        size = sum(p.numel() * p.element_size() for p in module.parameters()) / 1e6
        print(f"{name:<44}{args.tokens / min(times):9.0f}{size:12.1f}{error:16.1e}")


if __name__ == "__main__":
    main()
