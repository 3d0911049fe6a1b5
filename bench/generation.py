"""Generation with a 4-bit Mixtral at its true shape and a LoRA, beside transformers' `generate`, in one run on one GPU.

python bench/generation.py --model DIR [--job] [--stock] [--t4]

DIR: a folder of model.save_quantised (bench/training.py leaves /tmp/bench-training/nf4). EOS is disabled, so that every
answer takes all its tokens. --t4 repeats decoding and a part of the job with fp16 and Triton off.
"""

from __future__ import annotations

import argparse
import gc
import os
import time
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from prompt_recovery.decoding import Decoder, cache_columns
from prompt_recovery.fast_layers import fast_layers
from true_shape import device_rates

from prompt_recovery import generation, model, nf4
from prompt_recovery.adapter import merged

GIB = 2**30
PROMPT, STEPS = 768, 32
EXPERTS, ATTENTION = 45.10e9, 1.342e9  # parameters
table: list[str] = []


def report(line: str) -> None:
    table.append(line)
    print(line, flush=True)


class NoStop:
    """What generate asks of a tokenizer, for ids that are never text and answers that never end."""

    eos_token_id = -1

    def decode(self, ids: list[int], **_: Any) -> str:
        return " ".join(map(str, ids))


def random_prompts(lengths: list[int], seed: int = 0) -> list[list[int]]:
    """Prompts of random ids; the first 48 are the same in all, as an instruction is."""
    random = np.random.default_rng(seed)
    shared = random.integers(5, 32000, 48).tolist()
    return [shared + random.integers(5, 32000, max(1, length - 48)).tolist() for length in lengths]


def decode_floor(rows: int, bandwidth: float, layers: int) -> float:
    """Seconds a step takes at least: the weights that are touched, read once. NF4 experts, 16-bit attention and head."""
    share = 1 - 0.75**rows
    return (EXPERTS * share * 0.516 + ATTENTION * 2) * layers / 32 / (bandwidth * 1e12)


def decode(fast: Any, rows: int, bandwidth: float, layers: int, name: str) -> None:
    """A batch twice: the second time every graph is there."""
    prompts = [prompt[:PROMPT] for prompt in random_prompts([PROMPT] * rows, seed=rows)]
    torch.cuda.reset_peak_memory_stats()
    decoder = Decoder(
        fast, [], rows=rows, cells=rows * cache_columns(PROMPT, STEPS + 1), max_new_tokens=STEPS + 1, eos=-1, pad=0
    )
    for _ in range(2):
        torch.cuda.synchronize()
        start = time.monotonic()
        decoder.answer(prompts, [[None]] * rows)
        spent = time.monotonic() - start
    step = (spent - decoder.prefill_seconds) / STEPS
    floor = decode_floor(rows, bandwidth, layers)
    prefill, peak = rows * PROMPT / decoder.prefill_seconds, torch.cuda.max_memory_allocated() / GIB
    how = "graph" if decoder.graphs else "eager"
    report(
        f"{name:<22} B{rows:<3} decode {step * 1e3:7.2f} ms/step ({floor / step:4.0%} of the floor {floor * 1e3:.1f}, {how}),"
        f" prefill {prefill:7.0f} tok/s, peak {peak:.1f} GiB"
    )


class Trace(NamedTuple):
    """Of the places that give the tokens of an answer: logits [steps, vocabulary], the hidden state after each layer
    [layers, steps, hidden]; fp32."""

    logits: torch.Tensor
    hidden: torch.Tensor


Step = tuple[list[int], list[int], torch.Tensor, Trace]


@torch.inference_mode()
def trace(model: Any, prompt: list[int], answer: list[int], steps: int) -> Trace:
    """Of the first `steps` steps, teacher-forced all at once: the path of many rows, which dequantises."""
    places = slice(len(prompt) - 1, len(prompt) - 1 + steps)
    hidden: list[torch.Tensor] = []
    hooks = [
        layer.register_forward_hook(lambda _m, _i, out: hidden.append(out[0, places].float()))
        for layer in model.get_decoder().layers
    ]
    try:
        ids = torch.tensor([prompt + answer], device=model.device)
        logits = model(input_ids=ids, use_cache=False).logits[0, places].float()
    finally:
        for hook in hooks:
            hook.remove()
    return Trace(logits, torch.stack(hidden))


def greedy_steps(fast: Any) -> list[Step]:
    """(prompt, answer of the graph path, logits of its steps without graphs, their trace by `trace`), four times."""
    prompts = random_prompts([60, 200, 333, 768], seed=1)
    found = dict(generation.generate(fast, NoStop(), prompts, max_new_tokens=STEPS))
    steps = []
    for position, prompt in enumerate(prompts):
        decoder = Decoder(
            fast, [], rows=1, cells=cache_columns(len(prompt), STEPS), max_new_tokens=STEPS, eos=-1, pad=0, graphs=False
        )
        kept: list[torch.Tensor] = []
        choose = decoder._choose

        def keep(logits: torch.Tensor, rows: int, choose=choose, kept=kept) -> None:
            kept.append(logits.clone())
            choose(logits, rows)

        decoder._choose = keep  # type: ignore[method-assign]
        alone = decoder.answer([prompt], [[None]])[0][0]
        answer = [int(word) for word in found[position][0].text.split()]
        # batched and alone, near ties may fall otherwise: then the texts go apart, and logits compare up to there
        same = next((i for i in range(STEPS) if alone[i] != answer[i]), STEPS - 1) + 1
        steps.append((prompt, answer, torch.cat(kept)[:same], trace(fast, prompt, answer, same)))
    return steps


def check(lora: Any, steps: list[Step]) -> None:
    """Compare with the unmerged model, teacher-forced on its many-rows path: logits, and greedy tokens that differ."""
    gaps = []
    errors: dict[str, list[torch.Tensor]] = {"few rows against many rows": [], "many rows, merged against unmerged": []}
    for number, (prompt, answer, mine, many) in enumerate(steps):
        full = trace(lora, prompt, answer, len(mine))
        for logits, token in zip(full.logits, answer, strict=False):
            if logits.argmax().item() != token:
                gaps.append(((logits.max() - logits[token]) / logits.std()).item())
        for name, a, b in zip(errors, (mine, many.logits), (many.logits, full.logits), strict=True):
            errors[name].append((a - b).norm(dim=-1) / b.norm(dim=-1))
        for step in (errors["many rows, merged against unmerged"][-1] > 0.1).nonzero()[:, 0].tolist():
            # the unmerged model itself on the same text without what follows: only the rounding of its sums is another
            cut = trace(lora, prompt, answer[:step], step + 1)
            true = full.hidden[:4, step]
            off = [(run.hidden[:4, step] - true).norm(dim=-1) / true.norm(dim=-1) for run in (many, cut)]
            here, alone = (", ".join(f"{share:.1%}" for share in each.tolist()) for each in off)
            report(
                f"prompt {number}, step {step}: hidden states after layers 0 to 3 are off by {here};"
                f" those of the unmerged model without the tokens behind by {alone}"
            )
    for name, parts in errors.items():
        found = torch.cat(parts)
        median, most, worst = (found.quantile(q).item() for q in (0.5, 0.9, 1.0))
        report(
            f"logits of {len(found)} steps, {name}: relative error {median:.1e} median, {most:.1e} 90%, {worst:.1e} worst"
        )
    apart = ", ".join(f"{gap:.2f}" for gap in sorted(gaps))
    report(f"greedy tokens that differ: {len(gaps)} ({apart} standard deviations between the two tokens)")


def natural_lengths(count: int, seed: int = 0) -> list[int]:
    """Log-normal, median 600 tokens, the longest 3,000."""
    drawn = np.random.default_rng(seed).lognormal(np.log(600), 0.55, count)
    return np.clip(drawn, 100, 3000).astype(int).tolist()


def job(fast: Any, rows: int, of: int, name: str, rate: float) -> None:
    lengths = natural_lengths(of)[:: max(1, of // rows)]
    prompts = random_prompts(lengths, seed=2)
    progress = generation.Progress()
    start = time.monotonic()
    early = None
    for _ in generation.generate(fast, NoStop(), prompts, max_new_tokens=64, progress=progress):
        if early is None and progress.rows >= len(prompts) / 10:
            early = (time.monotonic() - start, progress.left)
    spent = time.monotonic() - start
    whole = f", {of / len(prompts) * spent:.0f} s for {of} by extrapolation" if len(prompts) < of else ""
    share = progress.tokens_in * 12.75e9 * 2 / (rate * 1e12) / spent
    report(
        f"{name}: {len(prompts)} rows, {progress.tokens_in} tokens in, {progress.tokens_out} out: {spent:.0f} s{whole}"
    )
    report(f"  the prefill's multiplications at the matrix rate would be {share:.0%} of that")
    if early:
        report(f"  after a tenth: {early[1]:.0f} s left by its estimate, {spent - early[0]:.0f} s in truth")


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
            input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=new, min_new_tokens=new, **options
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
            speed = f"decode {step * 1e3:7.1f} ms/step, prefill {rows * PROMPT / prefill:7.0f} tok/s"
            report(f"stock, {kind:<30} B{rows:<3} {speed}, peak {peak:.1f} GiB")
        if kind.startswith("dequantise"):
            lengths = sorted(natural_lengths(1300))
            batches = [lengths[i : i + 16] for i in range(0, 1300, 16)]
            some = batches[5::27]
            spent = sum(once(len(batch), batch[-1], 64) for batch in some)
            scale = sum(len(b) * b[-1] for b in batches) / sum(len(b) * b[-1] for b in some)
            report(
                f"stock, whole job, sorted batches of 16: {spent * scale:.0f} s, extrapolated from {len(some)} batches"
            )
            some = lengths[100::500]
            spent = sum(once(1, length, 64) for length in some)
            report(f"stock, whole job row by row: {spent / len(some) * 1300:.0f} s, extrapolated from {len(some)} rows")
            parametrise(base)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True)
    for name in ("job", "stock", "t4"):
        parser.add_argument(f"--{name}", action="store_true")
    args = parser.parse_args()
    rate, bandwidth = device_rates()
    torch.cuda.empty_cache()
    report(
        f"{torch.cuda.get_device_name()}: {rate:.0f} TFLOP/s in bf16, copy {bandwidth:.1f} TB/s, prompts of {PROMPT} tokens"
    )
    for dtype in (torch.bfloat16, torch.float16) if args.t4 else (torch.bfloat16,):
        base = model.load_base(args.model, dtype, four_bit=True)
        args.layers = base.config.num_hidden_layers
        lora = model.add_lora(base, base="bench")
        for name, weight in lora.named_parameters():
            if "lora_B" in name:
                torch.nn.init.normal_(weight, 0, 0.01)
        lora.eval()
        if dtype == torch.float16:
            os.environ["PROMPT_RECOVERY_TRITON"] = "0"
            nf4.fast_kernels.cache_clear()
        start = time.monotonic()
        with merged(lora) as fast, fast_layers(fast):
            report(f"adapter merged and checked in {time.monotonic() - start:.1f} s")
            name = "ours" if dtype == torch.bfloat16 else "ours, fp16, no Triton"
            for rows in (1, 16, 64) if dtype == torch.bfloat16 else (1, 16, 32):
                decode(fast, rows, bandwidth, args.layers, name)
            steps = greedy_steps(fast) if dtype == torch.bfloat16 else []
            if args.job:
                job(fast, 1300 if dtype == torch.bfloat16 else 100, 1300, f"{name}, whole job", rate)
        if steps:
            check(lora, steps)
        del fast, lora, base, steps
        nf4.release_buffers()
        gc.collect()
        torch.cuda.empty_cache()
    if args.stock:
        stock(args)
    print("\n== table")
    print("\n".join(table))


if __name__ == "__main__":
    main()
