"""Experts of 32 layers at Mixtral-8x7B's true shape by number of tokens, on one GPU.

python bench/decode_kernel.py [--t4] [--preferred] [--tune SECONDS]

Of each number of tokens: the decode kernel at what dispatch chooses (ms in a CUDA graph, share of
the floor that reading the weights once sets, error against fp32) and the way of many rows. --t4:
fp16, lowered to sm_75. --preferred: routing that prefers some experts, others in each layer; else
it is uniform. --tune: other launch parameters and tiles first, each projection's for so many
seconds. 8 layers are timed and scaled, 5.8 GB.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from types import SimpleNamespace

import torch
from true_shape import device_rates, imitate_t4

from prompt_recovery.engine import forward, storage
from prompt_recovery.engine.kernels import dispatch, experts_decode
from prompt_recovery.engine.kernels.dispatch import Config
from prompt_recovery.engine.memory import NF4_BYTES

EXPERTS, HIDDEN, INNER, TOP_K, LAYERS, ALL_LAYERS = 8, 4096, 14336, 2, 8, 32
TOKENS = (1, 4, 8, 16, 24, 32, 40, 48, 64, 96, 128, 192, 256, 320, 384)
UP = {  # by rows of a tile
    8: [Config(16, 4, 4, registers=128), Config(16, 8, 4), Config(16, 4, 2), Config(32, 4, 4)],
    16: [
        Config(16, 4, 4, short=8),
        Config(16, 8, 4, short=8),
        Config(16, 4, 2, short=8),
        Config(32, 4, 4, short=8),
        Config(16, 4, 4),
    ],
    32: [
        Config(16, 4, 4, short=16),
        Config(16, 4, 4, short=8),
        Config(16, 8, 4, short=16),
        Config(16, 4, 2, short=16),
    ],
}
DOWN = {
    rows: [
        Config(*size, 4, split, short=short)
        for split in (4, 2)
        for size in ((16, 4), (16, 8), (32, 4))
    ]
    for rows, short in ((8, None), (16, 8), (32, 16))
}
TUNED = {8: (1, 8, 24), 16: (16, 32, 48, 64), 32: (32, 48, 64, 96, 128, 256)}  # tokens


def layer(seed: int) -> SimpleNamespace:
    """Random bytes, with scales by which weights have about the spread 0.02."""
    generator = torch.Generator("cuda").manual_seed(seed)
    made: dict[str, object] = dict(num_experts=EXPERTS, act_fn=torch.nn.SiLU())
    for name, size, width in (("gate_up_proj", 2 * INNER, HIDDEN), ("down_proj", HIDDEN, INNER)):
        blocks = size * width // 64
        byte = dict(dtype=torch.uint8, device="cuda", generator=generator)
        made[f"{name}_packed"] = torch.randint(0, 256, (EXPERTS, size, width // 2), **byte)
        made[f"{name}_absmax"] = torch.randint(0, 256, (EXPERTS, blocks), **byte)
        made[f"{name}_nested"] = torch.full(
            (EXPERTS, -(-blocks // 256)), 0.004, device="cuda"
        ).view(torch.int32)
        made[f"{name}_offset"] = torch.full((EXPERTS,), 0.04, device="cuda").view(torch.int32)
    return SimpleNamespace(**made)


def inputs(
    tokens: int, dtype: torch.dtype, preferred: int | None = None
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """preferred: seed of the experts that the router prefers; None: it prefers none."""
    generator = torch.Generator("cuda").manual_seed(100 + tokens)
    x = torch.randn(tokens, HIDDEN, device="cuda", generator=generator).to(dtype)
    logits = torch.randn(tokens, EXPERTS, device="cuda", generator=generator)
    if preferred is not None:  # 3.8 experts of a layer for 16 tokens, 4.4 for 64
        generator.manual_seed(preferred)
        logits = 0.5 * logits + 1.6 * torch.randn(EXPERTS, device="cuda", generator=generator)
    top_k_weights, index = logits.softmax(-1).topk(TOP_K, dim=-1)
    return x, index, top_k_weights / top_k_weights.sum(1, keepdim=True)


def reference(
    experts: SimpleNamespace, x: torch.Tensor, index: torch.Tensor, top_k_weights: torch.Tensor
) -> torch.Tensor:
    out, weight = (
        torch.zeros(x.shape, device="cuda"),
        storage.expert_weights(experts, torch.float32),
    )
    for expert in range(EXPERTS):
        rows, choice = (index == expert).nonzero(as_tuple=True)
        both = x[rows].float() @ weight("gate_up_proj", expert).t()
        gate, up = both.chunk(2, -1)
        part = torch.nn.functional.silu(gate) * up
        part = part @ weight("down_proj", expert).t()
        out.index_add_(0, rows, part * top_k_weights[rows, choice, None])
    return out


def graph_ms(call) -> float:
    """Median ms of a replay of the captured call, for all layers."""
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        call()
    stream.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        call()
    times = []
    for _ in range(9):
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        graph.replay()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end))
    return sorted(times)[4] * ALL_LAYERS / LAYERS


@torch.no_grad()
def tune(
    layers: list[SimpleNamespace], seconds: float, lowered: bool, each_layer: Callable[[int], list]
) -> None:
    """Each projection's other parameters beside the first, the other projection left as dispatch
    has it."""
    for place, choices in ((0, UP), (1, DOWN)):
        begun = time.monotonic()
        for rows, configs in choices.items():
            if lowered and rows == 32:
                continue  # which dispatch never takes there
            tokens = TUNED[rows]
            print(
                f"{('up', 'down')[place]}, tiles of {rows}, tokens {tokens}: ms of both "
                "projections",
                flush=True,
            )
            for config in configs:
                both = list(dispatch.configs(lowered, rows))
                both[place] = config
                texts = []
                for count in tokens:
                    if time.monotonic() - begun > seconds:
                        texts.append("-")
                        continue
                    pairs = [*zip(each_layer(count), layers, strict=True)]
                    chosen = (both[0], both[1])
                    try:
                        spent = graph_ms(lambda pairs=pairs, chosen=chosen, rows=rows: [
                            experts_decode.few_rows(*a, e, chosen, rows) for a, e in pairs
                        ])  # fmt: skip
                        texts.append(f"{spent:.2f}")
                    except Exception as problem:  # parameters that fail are a line
                        texts.append(f"{type(problem).__name__}: {str(problem)[:60]}")
                print(f"  {str(tuple(config)):<28}", *texts, flush=True)


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--t4", action="store_true")
    parser.add_argument("--preferred", action="store_true")
    parser.add_argument("--tune", type=float, default=0.0, metavar="SECONDS")
    args = parser.parse_args()
    rate, bandwidth = device_rates()
    torch.backends.cuda.matmul.allow_tf32 = False
    dtype = torch.bfloat16
    if args.t4:
        imitate_t4()
        dtype = torch.float16
    name, lowered = torch.cuda.get_device_name(), ", lowered to sm_75" if args.t4 else ""
    print(
        f"{name}: {rate:.0f} TFLOP/s in bf16, copy {bandwidth:.1f} TB/s; {dtype}{lowered}",
        flush=True,
    )
    layers = [layer(seed) for seed in range(LAYERS)]

    def each_layer(tokens: int) -> list:
        return [inputs(tokens, dtype, seed if args.preferred else None) for seed in range(LAYERS)]

    if args.tune:
        tune(layers, args.tune, args.t4, each_layer)
    print("tokens  tile  decode kernel, ms  of the floor  error    many rows, ms", flush=True)
    for tokens in TOKENS:
        given = each_layer(tokens)
        arguments = given[0]
        found = experts_decode.few_rows(*arguments, layers[0])
        true = reference(layers[0], *arguments)
        error = ((found.float() - true).norm() / true.norm()).item()
        pairs = [*zip(given, layers, strict=True)]
        spent = graph_ms(lambda pairs=pairs: [experts_decode.few_rows(*a, e) for a, e in pairs])
        many, start = float("nan"), 0.0
        if tokens >= 64:
            for each in [layers[0], *layers]:  # the first one compiles
                torch.cuda.synchronize()
                start = time.monotonic() if each is layers[0] else start
                routing = forward.route(arguments[1], EXPERTS, dtype)
                if args.t4:
                    forward._one_at_a_time(arguments[0], each, routing, arguments[2])
                else:
                    rows = forward._GateUp.apply(arguments[0], each, routing, False)
                    rows = forward._swiglu(rows, arguments[2], routing.order, True)
                    forward._Down.apply(rows, each, routing)
                vars(each).pop("workspace", None)
            torch.cuda.synchronize()
            many = (time.monotonic() - start) * 1e3 * ALL_LAYERS / LAYERS
        hit = sum(len(index.unique()) for _, index, _ in given) / LAYERS
        floor = hit * 3 * HIDDEN * INNER * NF4_BYTES * ALL_LAYERS / (bandwidth * 1e12) * 1e3
        tile = dispatch.tile_rows(args.t4, tokens)
        print(
            f"{tokens:6d} {tile:5d} {spent:18.2f} {floor / spent:13.0%}  {error:.1e} {many:15.1f}",
            flush=True,
        )


if __name__ == "__main__":
    main()
