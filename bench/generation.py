"""Generation with a 4-bit Mixtral at its true shape and a LoRA, beside transformers' `generate`, in
one run on one GPU.

python bench/generation.py --model DIR [--job] [--stock] [--t4] [--profile]

DIR: a folder of save_quantised (bench/true_shape.py writes one). EOS is disabled, so that every
answer takes all its tokens. --t4: in fp16, kernels lowered to sm_75, instead of bf16. The logits of
128 steps are compared with fp32, also with weights scaled like real ones.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from reference import Trace, reference
from true_shape import device_rates, imitate_t4, scale_like_real

from prompt_recovery.adapter import add_lora
from prompt_recovery.engine import Meter, generate, load_base, ready
from prompt_recovery.engine.batching import cache_columns
from prompt_recovery.engine.decoding import Decoder
from prompt_recovery.engine.planning import AnswerPlan

GIB = 2**30
PROMPT, STEPS = 768, 32
EXPERT_PARAMETERS, ATTENTION_PARAMETERS = 45.10e9, 1.342e9
table: list[str] = []


def report(line: str) -> None:
    table.append(line)
    print(line, flush=True)


def random_prompts(lengths: list[int], seed: int = 0) -> list[list[int]]:
    """Prompts of random ids; the first 48 are the same in all, as an instruction is."""
    random = np.random.default_rng(seed)
    shared = random.integers(5, 32000, 48).tolist()
    return [shared + random.integers(5, 32000, max(1, length - 48)).tolist() for length in lengths]


def decode_floor(rows: int, bandwidth: float, layers: int) -> float:
    """Seconds a step takes at least: the weights that are touched, read once. NF4 experts, 16-bit
    attention and head."""
    touched = 1 - 0.75**rows
    read = EXPERT_PARAMETERS * touched * 0.516 + ATTENTION_PARAMETERS * 2
    return read * layers / 32 / (bandwidth * 1e12)


def decode(fast: Any, rows: int, bandwidth: float, layers: int, name: str) -> None:
    """A batch twice: the second time every graph is there."""
    prompts = [prompt[:PROMPT] for prompt in random_prompts([PROMPT] * rows, seed=rows)]
    torch.cuda.reset_peak_memory_stats()
    decoder = Decoder(
        fast.parts,
        [],
        rows=rows,
        cache_tokens=rows * cache_columns(PROMPT, STEPS + 1),
        max_new_tokens=STEPS + 1,
        eos=-1,
        pad=0,
    )
    for _ in range(2):
        torch.cuda.synchronize()
        start = time.monotonic()
        decoder.answer(prompts, [[None]] * rows)
        spent = time.monotonic() - start
    step = (spent - decoder.prefill_seconds) / STEPS
    floor = decode_floor(rows, bandwidth, layers)
    prefill, peak = rows * PROMPT / decoder.prefill_seconds, torch.cuda.max_memory_allocated() / GIB
    mode = "graph" if decoder.stages[0].graphs else "eager"
    report(
        f"{name:<22} B{rows:<3} decode {step * 1e3:7.2f} ms/step ({floor / step:4.0%} of the "
        f"floor {floor * 1e3:.1f}, {mode}, {distinct_experts(fast, prompts):.1f} experts a layer), "
        f"prefill {prefill:7.0f} tok/s, peak {peak:.1f} GiB"
    )


def distinct_experts(fast: Any, prompts: list[list[int]]) -> float:
    """How many experts of a layer a decode step of these rows reads, on average."""
    counts: list[int] = []
    hooks = [
        layer.mlp.gate.register_forward_hook(
            lambda _m, args, out: (
                counts.append(len(out[2].unique())) if len(args[0]) == len(prompts) else None
            )
        )
        for layer in fast.model.get_decoder().layers
    ]
    cache_tokens = len(prompts) * cache_columns(len(prompts[0]), 2)
    decoder = Decoder(
        fast.parts,
        [],
        rows=len(prompts),
        cache_tokens=cache_tokens,
        max_new_tokens=2,
        eos=-1,
        pad=0,
        graphs=False,
    )
    decoder.answer(prompts, [[None]] * len(prompts))
    for hook in hooks:
        hook.remove()
    return float(np.mean(counts))


def profile(fast: Any, rows: int, name: str) -> None:
    """Where a step's GPU time goes, by kernel: four steps without a graph."""
    prompts = [prompt[:PROMPT] for prompt in random_prompts([PROMPT] * rows, seed=rows)]
    cache_tokens = rows * cache_columns(PROMPT, 12)
    decoder = Decoder(
        fast.parts,
        [],
        rows=rows,
        cache_tokens=cache_tokens,
        max_new_tokens=12,
        eos=-1,
        pad=0,
        graphs=False,
    )
    decoder.answer(prompts, [[None]] * rows)
    decoder.number.fill_(3)
    stage = decoder.stages[0]
    stage.column.fill_(PROMPT + 2)
    activities = [torch.profiler.ProfilerActivity.CUDA]
    with torch.inference_mode(), torch.profiler.profile(activities=activities) as record:
        for _ in range(4):
            stage.cache.at(slice(0, rows), stage.column)
            stage.step(rows, decoder.choose)
        if torch.cuda.is_available():
            torch.cuda.synchronize()
    events = sorted(record.key_averages(), key=lambda event: -event.self_device_time_total)
    whole = sum(event.self_device_time_total for event in events) / 4e3
    report(f"{name}, profile of a step of B{rows}: {whole:.2f} ms of GPU time")
    for event in events[:10]:
        report(
            f"  {event.self_device_time_total / 4e3:7.3f} ms {event.count // 4:4d}  "
            f"{event.key[:80]}"
        )


class Step(NamedTuple):
    """One prompt and what was answered. few: logits of the decode steps [steps, vocabulary]; many:
    the same places and the hidden states by the way of many rows, teacher-forced."""

    text: list[int]
    places: slice
    few: torch.Tensor
    many: Trace


@torch.inference_mode()
def greedy_steps(fast: Any) -> list[Step]:
    """The greedy answers to four prompts, one at a time and without graphs."""
    steps = []
    for prompt in random_prompts([60, 200, 333, 768], seed=1):
        decoder = Decoder(
            fast.parts,
            [],
            rows=1,
            cache_tokens=cache_columns(len(prompt), STEPS),
            max_new_tokens=STEPS,
            eos=-1,
            pad=0,
            graphs=False,
        )
        kept: list[torch.Tensor] = []
        choose = decoder.choose

        def keep(logits: torch.Tensor, rows: int, choose=choose, kept=kept) -> None:
            kept.append(logits.clone())
            choose(logits, rows)

        decoder.choose = keep  # type: ignore[method-assign]
        answer = decoder.answer([prompt], [[None]])[0][0][0]
        text, places = prompt + answer[:-1], slice(len(prompt) - 1, len(prompt) + STEPS - 1)
        hidden: list[torch.Tensor] = []

        def keep(_module, _inputs, out, hidden=hidden, places=places):
            hidden.append(out[0, places].float())

        hooks = [layer.register_forward_hook(keep) for layer in fast.model.get_decoder().layers]
        # padded to the way of many rows
        ids = torch.tensor([text + [5] * max(0, 400 - len(text))], device=fast.model.device)
        logits = fast.model(input_ids=ids, use_cache=False).logits[0, places].float()
        for hook in hooks:
            hook.remove()
        steps.append(Step(text, places, torch.cat(kept), Trace(logits, torch.stack(hidden))))
    return steps


def check(lora: Any, steps: list[Step], name: str) -> None:
    """Relative errors against fp32 with the adapter merged in fp32: of the logits, and of the
    hidden states."""
    exact = reference(lora, [step.text for step in steps], [step.places for step in steps])

    def show(what: str, pairs: list[tuple[torch.Tensor, torch.Tensor]]) -> None:
        found = torch.cat([(a - b).norm(dim=-1) / b.norm(dim=-1) for a, b in pairs])
        median, most, worst = (found.quantile(q).item() for q in (0.5, 0.9, 1.0))
        report(
            f"{name}, {what}: {median:.1e} median, {most:.1e} 90%, {worst:.1e} worst of "
            f"{len(found)}"
        )

    pairs = list(zip(steps, exact, strict=True))
    layers = exact[0].hidden.shape[0]
    for number in sorted({n for n in (0, 1, 3, 7, 15) if n < layers} | {layers - 1}):
        show(
            f"hidden state after layer {number}",
            [(s.many.hidden[number], e.hidden[number]) for s, e in pairs],
        )
    show("logits, many rows against fp32", [(s.many.logits, e.logits) for s, e in pairs])
    show("logits, few rows against fp32", [(s.few, e.logits) for s, e in pairs])
    show("logits, few rows against many rows", [(s.few, s.many.logits) for s, _ in pairs])
    differ = sum((s.few.argmax(-1) != e.logits.argmax(-1)).sum().item() for s, e in pairs)
    report(f"{name}, greedy tokens that differ from fp32: {differ}")


def natural_lengths(count: int, seed: int = 0) -> list[int]:
    """Log-normal, median 600 tokens, the longest 3,000."""
    drawn = np.random.default_rng(seed).lognormal(np.log(600), 0.55, count)
    return np.clip(drawn, 100, 3000).astype(int).tolist()


def job(fast: Any, rows: int, name: str, rate: float) -> None:
    prompts = random_prompts(natural_lengths(rows), seed=2)
    meter, start = Meter(), time.monotonic()
    early = None
    for _ in generate(fast, prompts, eos=-1, max_new_tokens=64, meter=meter):
        if early is None and meter.rows >= rows / 10:
            early = (time.monotonic() - start, meter.left)
    spent = time.monotonic() - start
    share = meter.tokens_in * 12.75e9 * 2 / (rate * 1e12) / spent
    report(
        f"{name}: {rows} rows, {meter.tokens_in} tokens in, {meter.tokens_out} out: {spent:.0f} s"
    )
    report(
        f"  reading {meter.reading:.0f} s, writing {meter.writing:.0f} s in {meter.batches} "
        f"batches; the prefill's multiplications at the matrix rate would be {share:.0%}"
    )
    if early:
        report(
            f"  after a tenth: {early[1]:.0f} s left by its estimate, {spent - early[0]:.0f} s in "
            "truth"
        )


@torch.inference_mode()
def stock(args: argparse.Namespace) -> None:
    from stock import build, parametrise

    lora, base = build(args.layers)
    lora.eval()
    options = dict(do_sample=False, pad_token_id=0, eos_token_id=None)

    def once(rows: int, length: int, new: int) -> float:
        ids = torch.randint(5, 32000, (rows, length), device="cuda")
        torch.cuda.synchronize()
        start = time.monotonic()
        lora.generate(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=new,
            min_new_tokens=new,
            **options,
        )
        torch.cuda.synchronize()
        return time.monotonic() - start

    for kind in ("dequantise + grouped_mm", "parametrisation + grouped_mm"):
        for rows in (1, 16, 64):
            once(rows, PROMPT, 2)
            torch.cuda.reset_peak_memory_stats()
            prefill = once(rows, PROMPT, 1)
            step = (once(rows, PROMPT, 9) - prefill) / 8
            peak = torch.cuda.max_memory_allocated() / GIB
            speed = (
                f"decode {step * 1e3:7.1f} ms/step, prefill {rows * PROMPT / prefill:7.0f} tok/s"
            )
            report(f"stock, {kind:<30} B{rows:<3} {speed}, peak {peak:.1f} GiB")
        if kind.startswith("dequantise"):
            lengths = sorted(natural_lengths(1300))
            batches = [lengths[i : i + 16] for i in range(0, 1300, 16)]
            some = batches[5::27]
            spent = sum(once(len(batch), batch[-1], 64) for batch in some)
            scale = sum(len(b) * b[-1] for b in batches) / sum(len(b) * b[-1] for b in some)
            report(
                f"stock, whole job, sorted batches of 16: {spent * scale:.0f} s, extrapolated from "
                f"{len(some)} batches"
            )
            some = lengths[100::500]
            spent = sum(once(1, length, 64) for length in some)
            report(
                f"stock, whole job row by row: {spent / len(some) * 1300:.0f} s, extrapolated from "
                f"{len(some)} rows"
            )
            parametrise(base)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", type=Path, required=True)
    for name in ("job", "stock", "t4", "profile"):
        parser.add_argument(f"--{name}", action="store_true")
    args = parser.parse_args()
    rate, bandwidth = device_rates()
    torch.cuda.empty_cache()
    report(
        f"{torch.cuda.get_device_name()}: {rate:.0f} TFLOP/s in bf16, copy {bandwidth:.1f} TB/s, "
        f"prompts of {PROMPT} tokens"
    )
    dtype, name = torch.bfloat16, "bf16"
    if args.t4:
        imitate_t4()
        dtype, name = torch.float16, "fp16, lowered to sm_75"
    base = load_base(args.model, dtype, four_bit=True)
    args.layers = base.config.num_hidden_layers
    lora = add_lora(base, base="bench")
    for key, weight in lora.named_parameters():
        if "lora_B" in key:
            torch.nn.init.normal_(weight, 0, 0.01)
    lora.eval()
    plan = AnswerPlan((args.layers,), True, 16_384, 400_000)  # as on a card of 80 GB
    start = time.monotonic()
    with ready(lora, plan) as fast:
        report(f"adapter merged and checked in {time.monotonic() - start:.1f} s")
        for rows in (1, 16, 32, 64):
            decode(fast, rows, bandwidth, args.layers, name)
            if args.profile and rows in (16, 64):
                profile(fast, rows, name)
        steps = greedy_steps(fast)
        if args.job:
            job(fast, 1300, f"{name}, whole job", rate)
    check(lora, steps, name)
    scale_like_real(lora)
    with ready(lora, plan) as fast:
        steps = greedy_steps(fast)
    check(lora, steps, f"{name}, scaled like real weights")
    if args.stock:
        del fast, lora, base, steps
        torch.cuda.empty_cache()
        stock(args)
    print("\n== table")
    print("\n".join(table))


if __name__ == "__main__":
    main()
