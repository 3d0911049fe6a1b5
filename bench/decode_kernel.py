"""The experts of a decode step at Mixtral-8x7B's true shape: are they right, how long do 32 layers take, which launch
parameters are best. On one GPU, about 2 minutes with compiling:

python bench/decode_kernel.py [--seconds 140]

8 layers (6 GB, far over the L2 cache) run in a CUDA graph and are scaled to 32. Both projections are timed apart, so
their best parameters can be picked apart.
"""

from __future__ import annotations

import argparse
import functools
import multiprocessing
import time
from concurrent.futures import ProcessPoolExecutor, as_completed, wait
from types import SimpleNamespace

import torch
import triton

from prompt_recovery import kernels_decode as decode
from prompt_recovery import nf4

EXPERTS, HIDDEN, INNER, TOP_K, LAYERS, ALL_LAYERS = 8, 4096, 14336, 2, 8, 32
TOKENS = (1, 4, 16, 32, 64)
C = decode.Config
UP = [
    C(16, 8, 2, 4, 1, 128), C(16, 8, 1, 6, 1, 128), C(16, 8, 1, 8, 1, 128), C(16, 8, 2, 4), C(16, 16, 2, 4),
    C(16, 16, 1, 6), C(32, 4, 2, 4), C(16, 4, 2, 6), C(16, 4, 4, 4), C(16, 8, 4, 3),
    C(16, 8, 2, 4, 1, 128, decode.REGISTERS), C(16, 4, 2, 4, 1, 128, decode.REGISTERS),
]  # fmt: skip
DOWN = [
    C(32, 8, 2, 4, 4, 128), C(32, 8, 2, 4, 8, 128), C(32, 8, 2, 4, 2, 128), C(32, 8, 1, 6, 4, 128),
    C(32, 8, 1, 8, 8, 128), C(16, 16, 2, 4, 4), C(16, 16, 2, 4, 8), C(16, 8, 2, 6, 4, 128), C(16, 8, 4, 4, 4, 128),
    C(32, 4, 2, 6, 4), C(32, 8, 4, 3, 4), C(32, 8, 2, 4, 4, 128, decode.REGISTERS),
]  # fmt: skip


def show(*words: object) -> None:
    print(*words, flush=True)


def compile_one(gate: bool, config: decode.Config, m: int, dtype: torch.dtype = torch.bfloat16) -> int:
    """Fills Triton's cache on disk; gives the kernel's dynamic shared memory in bytes."""
    columns, size = (HIDDEN, INNER) if gate else (INNER, HIDDEN)
    kinds = (
        dtype, torch.uint8, torch.uint8, torch.int32, torch.int32, torch.int32, torch.int32,
        torch.float32 if gate else None, dtype if gate else torch.float32, torch.int32, torch.float32,
    )  # fmt: skip
    kernel = decode._project.warmup(
        *kinds, 2, grid=(1,), K=columns, N=size, X_PER_ROW=TOP_K if gate else 1, GATE=gate, M=m,
        ROWS=config.rows_per_warp, WARPS=config.warps, BLOCKS=config.blocks, SPLIT=config.split, LOOKUP=config.lookup,
        num_warps=config.warps, num_stages=config.stages, maxnreg=config.registers,
    )  # fmt: skip
    return kernel.metadata.shared


def layer(first: SimpleNamespace | None) -> SimpleNamespace:
    """Random experts: quantised from random weights, or random bytes with the first layer's scales."""
    made: dict[str, torch.Tensor] = {}
    for name, shape in (("gate_up_proj", (EXPERTS, 2 * INNER, HIDDEN)), ("down_proj", (EXPERTS, HIDDEN, INNER))):
        if first is None:
            pieces = nf4.quantise(torch.randn(shape, device="cuda", dtype=torch.bfloat16) * 0.02)
        else:
            pieces = {piece: getattr(first, f"{name}_{piece}").clone() for piece in nf4.PIECES}
            pieces["packed"].random_(0, 256)
        made |= {f"{name}_{piece}": tensor for piece, tensor in pieces.items()}
    return SimpleNamespace(**made)


def pieces_of(experts: SimpleNamespace, name: str) -> dict[str, torch.Tensor]:
    return {piece: getattr(experts, f"{name}_{piece}") for piece in nf4.PIECES}


def routing(tokens: int) -> tuple[torch.Tensor, torch.Tensor]:
    weights, index = torch.rand(tokens, EXPERTS, device="cuda").topk(TOP_K)
    return index, weights / weights.sum(1, keepdim=True)


def check(experts: SimpleNamespace) -> bool:
    """Against the dequantised weights in fp32; a replayed graph gives the same bits as an eager call."""
    gate_up, down = (nf4.dequantise(pieces_of(experts, name), torch.float32) for name in nf4.PROJECTIONS)
    right = True
    up_config, down_config = decode._configs(16)
    registers = up_config._replace(lookup=decode.REGISTERS), down_config._replace(lookup=decode.REGISTERS)
    for dtype, limit in ((torch.bfloat16, 5e-3), (torch.float16, 1e-3)):
        errors = []
        cases: list[tuple[int, str, tuple[decode.Config, decode.Config] | None]]
        cases = [(tokens, "", None) for tokens in (1, 2, 5, 16, 17, 64, 200)]
        for tokens, kind, configs in [*cases, (16, " one expert", None), (16, " registers", registers)]:
            x = torch.randn(tokens, HIDDEN, device="cuda", dtype=dtype)
            index, weights = routing(tokens)
            if kind == " one expert":
                index = torch.tensor([[6, 1]], device="cuda").expand(tokens, 2)
            want = torch.zeros(tokens, HIDDEN, device="cuda")
            for expert in range(EXPERTS):
                at, choice = torch.where(index == expert)
                gate, up = (x[at].float() @ gate_up[expert].T).chunk(2, dim=-1)
                value = torch.nn.functional.silu(gate) * up @ down[expert].T
                want.index_add_(0, at, value * weights[at, choice, None])
            try:
                got = decode.few_rows(x, index, weights, experts, configs)
                torch.cuda.synchronize()
                again = decode.few_rows(x, index, weights, experts, configs)
                assert got is not None and again is not None, "no kernel for this shape"
                error = ((got.float() - want).norm() / want.norm()).item()
            except Exception as failure:
                show(f"{dtype} {tokens} tokens{kind}: {type(failure).__name__} {str(failure)[:300]}")
                right = False
                continue
            good = error <= limit and torch.equal(got, again)
            right &= good
            errors.append(f"{tokens}{kind}: {error:.1e}{'' if good else ' WRONG'}")
        show(f"{dtype} relative errors", ", ".join(errors))
    return right


def project(layers, gate: bool, x, weights, routed: tuple, m: int, config: decode.Config) -> None:
    """One of the two projections of every layer."""
    name = "gate_up_proj" if gate else "down_proj"
    order, tiles, most = routed
    for experts in layers:
        pieces = pieces_of(experts, name)
        decode._launch_project(
            x, pieces, order, tiles, most, weights if gate else None, m, TOP_K if gate else 1, config
        )


def every_layer(layers, x, index, weights, configs: tuple[decode.Config, decode.Config]) -> None:
    for experts in layers:
        decode.few_rows(x, index, weights, experts, configs)


def graph_ms(call, repeats: int = 10) -> float:
    """Median milliseconds of a replay."""
    call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        call()
    for _ in range(3):
        graph.replay()
    events = [torch.cuda.Event(enable_timing=True) for _ in range(repeats + 1)]
    events[0].record()
    for event in events[1:]:
        graph.replay()
        event.record()
    torch.cuda.synchronize()
    spent = sorted(a.elapsed_time(b) for a, b in zip(events, events[1:], strict=False))
    return spent[repeats // 2]


def copy_rate() -> float:
    """Bytes a second of a large copy, read and written."""
    source = torch.randint(0, 255, (2**31,), device="cuda", dtype=torch.uint8)
    target = torch.empty_like(source)
    return 2 * source.numel() / graph_ms(lambda: target.copy_(source)) * 1e3


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=140, help="stop the sweep after so long (default 140)")
    args = parser.parse_args()
    start = time.monotonic()
    torch.manual_seed(0)
    sizes = [(tokens, decode.block_m(tokens, tokens * TOP_K, EXPERTS)) for tokens in TOKENS] + [(64, 16)]
    tasks = [
        (gate, config, m)
        for m in (16, 8, 32)
        for pair in zip(UP, DOWN, strict=True)
        for gate, config in zip((True, False), pair, strict=True)
    ]
    first = [
        (gate, config._replace(lookup=lookup), m, dtype)
        for m, lookup in (*((m, decode.SHARED) for m in (8, 16, 32, 64)), (16, decode.REGISTERS))
        for gate, config in zip((True, False), decode._configs(16), strict=True)
        for dtype in (torch.bfloat16, torch.float16)
    ]
    shared: dict[tuple[bool, decode.Config, int], int] = {}
    failed: dict[tuple[bool, decode.Config, int], str] = {}
    with ProcessPoolExecutor(12, mp_context=multiprocessing.get_context("spawn")) as pool:
        checked = [pool.submit(compile_one, *task) for task in first]
        futures = {pool.submit(compile_one, *task): task for task in tasks}
        layers = [layer(None)]
        layers += [layer(layers[0]) for _ in range(LAYERS - 1)]
        rate = copy_rate()
        show(f"{torch.cuda.get_device_name()} torch {torch.__version__} triton {triton.__version__}")
        show(f"copy {rate / 1e12:.2f} TB/s, layers made after {time.monotonic() - start:.0f} s")
        wait(checked)
        for case, done in zip(first, checked, strict=True):
            if done.exception() is not None:
                show("not compiled", *case, str(done.exception())[:300])
        right = check(layers[0])
        show(f"{'all right' if right else 'WRONG'}, after {time.monotonic() - start:.0f} s")
        for future in as_completed(futures):
            if future.exception() is not None:
                failed[futures[future]] = str(future.exception())[:150]
            else:
                shared[futures[future]] = future.result()
    most_shared = decode._most_shared(torch.device("cuda", 0))
    for task, size in shared.items():
        if task[1].lookup == decode.SHARED and not decode._SMALL < size <= most_shared:
            failed[task] = f"{size} bytes of shared memory are too few or too many"
    for task, message in failed.items():
        show("left out", "up" if task[0] else "down", tuple(task[1]), task[2], message)
    show(f"compiled after {time.monotonic() - start:.0f} s")

    inputs = {}
    for tokens in TOKENS:
        index, weights = routing(tokens)
        x = torch.randn(tokens, HIDDEN, device="cuda", dtype=torch.bfloat16)
        inner = torch.randn(tokens * TOP_K, INNER, device="cuda", dtype=torch.bfloat16)
        inputs[tokens] = (x, inner, index, weights)
    scale = ALL_LAYERS / LAYERS
    best: dict[tuple[bool, int, int], tuple[float, decode.Config]] = {}
    for gate, configs in ((True, UP), (False, DOWN)):
        part = 2 if gate else 1
        show(f"\n{'up' if gate else 'down'}: ms of {ALL_LAYERS} layers, tokens/tile", *sizes)
        for config in configs:
            cells = []
            for tokens, m in sizes:
                x, inner, index, weights = inputs[tokens]
                if time.monotonic() - start > args.seconds or (gate, config, m) in failed:
                    cells.append("     -")
                    continue
                routed = decode._route_rows(index, EXPERTS, m)
                call = functools.partial(project, layers, gate, x if gate else inner, weights, routed, m, config)
                try:
                    spent = graph_ms(call) * scale
                except Exception as failure:
                    show("skipped", tuple(config), tokens, m, str(failure)[:150])
                    cells.append("     -")
                    continue
                cells.append(f"{spent:6.2f}")
                key = (gate, tokens, m)
                best[key] = min(best.get(key, (spent, config)), (spent, config), key=lambda pair: pair[0])
            show(f"{str(tuple(config)):<32}", *cells)
        floors = []
        for tokens, _ in sizes:
            hit = len(inputs[tokens][2].unique())
            floors.append(f"{hit * part * HIDDEN * INNER * (0.5 + 1 / 64) / rate * 1e3 * ALL_LAYERS:6.2f}")
        show(f"{'floor at the copy rate':<32}", *floors)

    show("\ntokens  tile  experts  up+down  whole  floor  share  (ms of 32 layers)")
    picked = {}
    for tokens, m in sizes:
        if (True, tokens, m) not in best or (False, tokens, m) not in best:
            continue
        x, _, index, weights = inputs[tokens]
        up, down = best[True, tokens, m], best[False, tokens, m]
        hit = len(index.unique())
        floor = hit * 3 * HIDDEN * INNER * (0.5 + 1 / 64) / rate * 1e3 * ALL_LAYERS
        whole = float("nan")
        if m == decode.block_m(tokens, tokens * TOP_K, EXPERTS):
            call = functools.partial(every_layer, layers, x, index, weights, (up[1], down[1]))
            whole = graph_ms(call) * scale
        show(f"{tokens:6d} {m:5d} {hit:8d} {up[0] + down[0]:8.2f} {whole:6.2f} {floor:6.2f} {floor / whole:6.0%}")
        picked[tokens, m] = (tuple(up[1]), tuple(down[1]))
    show("best (up, down) by (tokens, tile):", picked)
    show(f"{time.monotonic() - start:.0f} s")


if __name__ == "__main__":
    main()
