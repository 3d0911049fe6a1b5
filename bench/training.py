"""Loading and training of a 4-bit Mixtral at its true shape beside the stock stack, in one run on
one GPU.

python bench/training.py [--layers 32] [--work DIR]   (DIR: 26 GB of room at 32 layers)
"""

from __future__ import annotations

import argparse
import gc
import resource
import shutil
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import bitsandbytes as bnb
import peft
import torch
import transformers
from stock import build, parametrise
from torch import nn
from torch.nn import functional
from true_shape import device_rates, fill, write_checkpoint

from prompt_recovery.adapter import add_lora
from prompt_recovery.engine import (
    TooLittleMemory,
    checkpointing,
    forward,
    load_base,
    release_buffers,
    save_quantised,
    storage,
)
from prompt_recovery.examples import IGNORED

GIB = 2**30
LENGTH, LABELS = 512, 64
ACTIVE, FORWARD = 12.75e9, 2.0  # active parameters; floating-point operations a parameter and token
rows_of_table: list[tuple[str, ...]] = []


def report(*texts: str) -> None:
    rows_of_table.append(texts)
    print("  ".join(texts), flush=True)


def fits(name: str, call: Callable[[], Any]) -> Any:
    """What `call` returns; None and a line of the table where the card has too little memory."""
    try:
        return call()
    except (torch.OutOfMemoryError, TooLittleMemory) as error:
        report(f"{name:<58}", f"does not fit: {str(error).partition('. GPU')[0][:90]}")
    # behind the except: what raised holds the tensors of its frames
    gc.collect()
    torch.cuda.empty_cache()
    return None


def timed_steps(step, rows: int, steps: int = 4, warm: int = 2) -> tuple[float, float]:
    """Median seconds and peak GiB of a training step on fresh random ids; the last LABELS tokens
    are supervised."""
    torch.cuda.reset_peak_memory_stats()
    times = []
    for _ in range(warm + steps):
        ids = torch.randint(5, 32000, (rows, LENGTH), device="cuda")
        labels = ids.clone()
        labels[:, :-LABELS] = IGNORED
        torch.cuda.synchronize()
        start = time.monotonic()
        step(ids, labels)
        torch.cuda.synchronize()
        times.append(time.monotonic() - start)
    times = sorted(times[warm:])
    return times[len(times) // 2], torch.cuda.max_memory_allocated() / GIB


def row(
    name: str, tokens: int, spent: float, peak: float, floor_flops: float, rate: float, scale: float
) -> None:
    share = tokens * ACTIVE * floor_flops * scale / (rate * 1e12) / spent
    report(
        f"{name:<58}",
        f"{tokens / spent:7.0f} tok/s",
        f"{peak:6.1f} GiB",
        f"{share:5.0%} of the {floor_flops:.0f}N floor",
    )


def check_experts(experts: nn.Module) -> None:
    """Forward and input gradient against the dequantised weights in fp32, at the true shape of one
    layer."""
    hidden = experts.hidden_dim
    pieces = [
        {piece: getattr(experts, f"{name}_{piece}") for piece in storage.PIECES}
        for name in storage.PROJECTIONS
    ]
    gate_up, down = (storage.dequantise(each, torch.float32) for each in pieces)
    for dtype in (torch.bfloat16, torch.float16):
        for tokens in (1, 77, 8192):
            for routing in ("random", "two experts only"):
                x = torch.randn(tokens, hidden, device="cuda", dtype=dtype, requires_grad=True)
                index = torch.stack(
                    [torch.randperm(experts.num_experts, device="cuda")[:2] for _ in range(tokens)]
                )
                index = (
                    index
                    if routing == "random"
                    else index * 0 + torch.tensor([1, 6], device="cuda")
                )
                top_k_weights = torch.rand(tokens, 2, device="cuda", dtype=dtype)
                grad = torch.randn(tokens, hidden, device="cuda", dtype=dtype)
                out = forward.experts_forward(experts, x, index, top_k_weights)
                out.backward(grad)
                exact = x.detach().float().requires_grad_()
                want = torch.zeros_like(exact)
                for expert in range(experts.num_experts):
                    at, choice = torch.where(index == expert)
                    gate, up = (exact[at] @ gate_up[expert].T).chunk(2, dim=-1)
                    value = (
                        functional.silu(gate)
                        * up
                        @ down[expert].T
                        * top_k_weights[at, choice, None].float()
                    )
                    want = want.index_add(0, at, value)
                want.backward(grad.float())
                errors = [
                    ((a.float() - b).norm() / b.norm()).item()
                    for a, b in ((out, want), (x.grad, exact.grad))
                ]
                limit = 1e-2 if dtype == torch.bfloat16 else 2e-3
                verdict = "ok" if max(errors) < limit else "TOO LARGE"
                print(
                    f"experts {dtype} {tokens} tokens, {routing}: relative errors {errors[0]:.1e} "
                    f"{errors[1]:.1e} {verdict}"
                )
    storage.workspace(experts).buffers.clear()


def loaded(folder: Path, args: argparse.Namespace) -> Any:
    """The base from its 16-bit folder, saved in 4 bits and loaded again, with what each takes."""
    torch.cuda.reset_peak_memory_stats()
    start = time.monotonic()
    base = load_base(folder, four_bit=True)
    torch.cuda.synchronize()
    fresh = time.monotonic() - start
    peak, resident = torch.cuda.max_memory_allocated() / GIB, torch.cuda.memory_allocated() / GIB
    host = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    anonymous = (
        next(
            int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("RssAnon")
        )
        / 2**20
    )
    size = sum(path.stat().st_size for path in folder.glob("*.safetensors")) / GIB
    report(
        f"load {size:.0f} GiB of 16 bit and quantise: {fresh:.0f} s (zeros from a sparse file: no "
        "disk read is in it)"
    )
    report(f"resident {resident:.1f} GiB, GPU peak while loading {peak:.1f} GiB")
    report(f"host peak {host:.1f} GiB, of which {anonymous:.1f} GiB are not pages of the files")
    fill(base)
    check_experts(base.model.layers[0].mlp.experts)
    start = time.monotonic()
    save_quantised(base, folder, args.work / "nf4")
    saved = time.monotonic() - start
    ids = torch.randint(5, 32000, (2, 64), device="cuda")
    with torch.inference_mode():
        logits = base(ids).logits
    del base
    gc.collect()
    torch.cuda.empty_cache()
    start = time.monotonic()
    base = load_base(args.work / "nf4", four_bit=True)
    torch.cuda.synchronize()
    again = time.monotonic() - start
    with torch.inference_mode():
        same = torch.equal(base(ids).logits, logits)
    report(
        f"saved 4-bit folder: written in {saved:.0f} s, loaded in {again:.0f} s, logits bit for "
        f"bit the same: {same}"
    )
    return base


def ours(folder: Path, args: argparse.Namespace, rate: float, scale: float) -> None:
    base = loaded(folder, args)
    lora = add_lora(base, base="bench", dropout=0.1)
    optimiser = bnb.optim.PagedAdamW8bit([p for p in lora.parameters() if p.requires_grad], lr=1e-5)

    def step(ids: torch.Tensor, labels: torch.Tensor) -> None:
        columns = (labels[:, 1:] != IGNORED).any(0).nonzero()[:, 0]
        with torch.autocast("cuda", dtype=torch.bfloat16):
            output = lora(
                input_ids=ids, attention_mask=torch.ones_like(ids), logits_to_keep=columns
            )
        targets = labels[:, columns + 1].flatten()
        functional.cross_entropy(output.logits.float().flatten(0, 1), targets).backward()
        optimiser.step()
        optimiser.zero_grad()

    lora.train()
    lora.config.use_cache = False
    saved_per_token = checkpointing.saved_bytes(lora, torch.bfloat16)
    report(
        f"activations saved for the backward pass: {saved_per_token / args.layers / 1024:.0f} KiB "
        "a token and layer"
    )
    total = torch.cuda.get_device_properties(0).total_memory
    plans = [("B8, every layer checkpointed", checkpointing.TrainingPlan(8, 1, args.layers, 0))]
    for name, rows, budget in (
        ("B8 within 32 GiB", 8, 32 * GIB),
        ("plan within 40 GiB, batch of 16", 16, 40 * GIB),
        ("plan within 40 GiB, batch of 32", 32, 40 * GIB),
        ("plan for the card, batch of 16", 16, total),
        ("plan for the card, batch of 64", 64, total),
    ):
        free = min(budget, total) - torch.cuda.memory_allocated()
        wanted = (lora, LENGTH, LABELS, rows, torch.bfloat16, free)
        planned = fits(f"ours, {name}", partial(checkpointing.training_plan, *wanted))
        plans += [(name, planned)] if planned else []
    fitting = None  # the last plan that did
    for name, plan in plans[: args.plans]:
        checkpointing.apply_plan(lora, plan)
        release_buffers(lora)
        gc.collect()
        torch.cuda.empty_cache()
        allocated = torch.cuda.memory_allocated()
        name = f"ours, {name}: {plan.rows} rows, {plan.checkpointed} recomputed, {plan.kept} kept"
        steps = 4 if plan.rows < 32 else 3
        measured = fits(name, partial(timed_steps, step, plan.rows, steps=steps))
        if measured is None:
            optimiser.zero_grad()
            continue
        spent, peak = measured
        fitting = plan
        recomputing = plan.checkpointed > plan.kept
        row(name, plan.rows * LENGTH, spent, peak, 6 if recomputing else 4, rate, scale)
        if plan.peak:
            print(f"    expected peak {(allocated + plan.peak) / GIB:.1f} GiB, measured {peak:.1f}")
    if fitting is None:
        return
    checkpointing.apply_plan(lora, fitting)
    ids = torch.randint(5, 32000, (fitting.rows, LENGTH), device="cuda")
    supervised = torch.arange(LENGTH, device="cuda") >= LENGTH - LABELS
    fits("profile", lambda: profile(lambda: step(ids, torch.where(supervised, ids, IGNORED))))


def profile(call) -> None:
    """Where a step's GPU time goes, by kind of kernel."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as record:
        call()
        torch.cuda.synchronize()
    events = sorted(record.key_averages(), key=lambda event: -event.self_device_time_total)
    whole = sum(event.self_device_time_total for event in events)
    print(f"profile of the last step: {whole / 1e3:.0f} ms of GPU time")
    for event in events[:16]:
        print(f"  {event.self_device_time_total / whole:6.1%} {event.count:6d}  {event.key[:100]}")


def stock(args: argparse.Namespace, rate: float, scale: float) -> None:
    lora, base = build(args.layers)
    lora.train()
    optimiser = torch.optim.AdamW([p for p in lora.parameters() if p.requires_grad], lr=1e-5)

    def step(ids: torch.Tensor, labels: torch.Tensor) -> None:
        lora(input_ids=ids, labels=labels, use_cache=False).loss.backward()
        optimiser.step()
        optimiser.zero_grad()

    lora.enable_input_require_grads()
    for rows, recomputed in ((8, True), (32, True), (16, False)):
        base.gradient_checkpointing_enable({"use_reentrant": False})
        if not recomputed:
            base.gradient_checkpointing_disable()
        name = (
            f"stock parts, dequantise + grouped_mm, B{rows}{' checkpointed' if recomputed else ''}"
        )
        measured = fits(name, partial(timed_steps, step, rows, steps=3, warm=1))
        if measured:
            row(name, rows * LENGTH, *measured, 6 if recomputed else 4, rate, scale)
        optimiser.zero_grad()
        gc.collect()
        torch.cuda.empty_cache()
    parametrise(base)
    base.gradient_checkpointing_enable({"use_reentrant": False})
    name = "stock, bitsandbytes parametrisation + grouped_mm, B8"
    measured = fits(name, lambda: timed_steps(step, 8, steps=3, warm=1))
    if measured:
        row(name, 8 * LENGTH, *measured, 6, rate, scale)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--layers", type=int, default=32)
    parser.add_argument("--work", type=Path, default=Path("/tmp/bench-training"))
    parser.add_argument("--no-stock", action="store_true")
    parser.add_argument(
        "--plans",
        type=int,
        help="only so many of them, the first is B8 with every layer checkpointed",
    )
    args = parser.parse_args()
    shutil.rmtree(args.work, ignore_errors=True)
    torch.manual_seed(0)
    rate, bandwidth = device_rates()
    report(f"{torch.cuda.get_device_name()}: {rate:.0f} TFLOP/s in bf16, copy {bandwidth:.1f} TB/s")
    report(
        *(
            f"{package.__name__} {package.__version__}"
            for package in (torch, transformers, peft, bnb)
        )
    )
    torch.cuda.empty_cache()
    folder = args.work / "Mixtral-true-shape"
    write_checkpoint(folder, args.layers)
    scale = args.layers / 32
    ours(folder, args, rate, scale)
    gc.collect()
    torch.cuda.empty_cache()
    if not args.no_stock:
        fits("stock", lambda: stock(args, rate, scale))
    print("\n== table")
    for texts in rows_of_table:
        print("  ".join(texts))


if __name__ == "__main__":
    main()
