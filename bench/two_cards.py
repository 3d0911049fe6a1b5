"""Two cards that look like T4s: the submission notebook's script on the whole test set, and what
stands behind its figures.

python bench/two_cards.py WORK TOKENIZER PART...     parts run in turn, each at most 9 minutes
    prepare   a 4-bit folder of the true shape, an adapter, 1,306 rows (60 s)
    t4        the submission's script: rows answered, peak a card, seconds, tokens a second
    adapters  200 rows by one adapter and by three: answering, swapping, peak
    merged    the same on the first card as it is, where adapters are merged (not run yet)
    equal     200 rows on the two cards and on one: the same plan, and one card's own
    speed     prefill with both cards at work and a stage at a time; decode steps
    kill      200 rows, killed half-way and run again: what was answered before stays
    load      the 16-bit folder, of zeros, quantised while it loads
    bf16      two cards of 22.9 GiB in bf16: 50 rows by the submission's script, the training's
    train     steps, layers split: 8 x 512 tokens on those, 4 x 640 on cards like T4s
    alike     20 steps on one card in fp16 as a T4 makes them, in bf16 and in fp32: losses, adapters
    ddp       steps of 8 x 512 tokens a card, by one process and, with accelerate launch, by two
    dense     Mistral-7B's shape on the first card, like a T4 and with 22.9 GiB in bf16: steps, 50
              rows by the submission's script
--one runs both stages on the first card, without a ballast, to debug.

A ballast process leaves 14.7 GiB a card and samples how much is free. Patched, after Triton has
made its driver: capability 7.5, 40 multiprocessors, 64 KiB of shared memory, no bf16, no flash or
cuDNN attention. Kernels are lowered to sm_75.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import random
import shutil
import signal
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
import torch

ROOT = Path(__file__).resolve().parent.parent
GIB = 2**30
T4, CARD_24 = 14.7, 22.9  # GiB that such cards leave to a process
BALLAST = """
import sys, select, time, torch
leave, kept = float(sys.argv[1]) * 2**30, []
cards = range(torch.cuda.device_count())
for d in cards:
    torch.zeros(1, device=d)
    size = int(torch.cuda.mem_get_info(d)[0] - leave)
    kept.append(torch.empty(size, dtype=torch.uint8, device=d))
low = [torch.cuda.mem_get_info(d)[0] for d in cards]
print("ready", flush=True)
while True:
    low = [min(l, torch.cuda.mem_get_info(d)[0]) for l, d in zip(low, cards)]
    if select.select([sys.stdin], [], [], 0.02)[0]:
        if not sys.stdin.readline():
            break
        print(*[f"{leave / 2**30 - l / 2**30:.2f}" for l in low], flush=True)
"""


class Ballast:
    """A process that holds all but so many GiB of each card, and knows the most that others
    took."""

    def __init__(self, leave: float) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-c", BALLAST, str(leave)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        assert self.process.stdout and "ready" in self.process.stdout.readline()

    def peak(self) -> str:
        assert self.process.stdin and self.process.stdout
        self.process.stdin.write("\n")
        self.process.stdin.flush()
        return self.process.stdout.readline().strip()


def look_like_t4() -> None:
    from triton.runtime import driver

    capability = torch.cuda.get_device_capability()
    driver.active.get_current_target()  # makes the driver
    # it shall make PTX for the card that is there
    driver.active.get_device_capability = lambda *_: capability
    real = torch.cuda.get_device_properties

    class Small:
        total_memory, major, minor = int(14.74 * GIB), 7, 5
        multi_processor_count = 40  # bitsandbytes chooses its kernels by it
        shared_memory_per_block_optin = 64 * 1024

        def __init__(self, inner: Any) -> None:
            self.inner = inner

        def __getattr__(self, name: str) -> Any:
            return getattr(self.inner, name)

    torch.cuda.get_device_properties = lambda *a, **k: Small(real(*a, **k))
    torch.cuda.get_device_capability = lambda *a, **k: (7, 5)
    torch.cuda.is_bf16_supported = lambda *a, **k: False
    torch.backends.cuda.enable_flash_sdp(False)
    torch.backends.cuda.enable_cudnn_sdp(False)


class Work:
    """The files of a run, and the cards it sees."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.args, self.folder = args, args.work
        self.nf4, self.adapter = args.work / "nf4", args.work / "adapter"
        self.ballast: Ballast | None = None

    def t4s(self) -> None:
        from prompt_recovery.engine import generation
        from prompt_recovery.engine.kernels import dispatch

        if not self.args.one:
            self.ballast = Ballast(self.args.leave)
        look_like_t4()
        planned = generation.plan_of

        def plan_of(model: Any) -> Any:
            assert dispatch.uses_triton(torch.device("cuda", 0)), (
                "not the kernels that are to be measured"
            )
            plan = planned(model)
            half = sum(plan.layers) // 2
            if self.args.one:
                plan = generation.AnswerPlan((half, half), False, 2048, self.args.cells)
            if self.args.unmerged:
                plan = plan._replace(merged=False)
            free = [
                round(torch.cuda.mem_get_info(d)[0] / GIB, 2)
                for d in range(torch.cuda.device_count())
            ]
            print(f"plan: {plan}, free {free} GiB")
            return plan

        generation.plan_of = plan_of

    def peak(self) -> str:
        return f"peak a card {self.ballast.peak()} GiB" if self.ballast else "no ballast"

    def submission(self, test: str, to: str, **settings: Any) -> dict[str, Any]:
        import notebooks

        notebooks.without_pictures()
        paths = dict(
            model_dir=str(self.nf4),
            adapter_dir=str(self.adapter),
            test_csv=str(self.folder / test),
            submission_csv=str(self.folder / to),
            input_dir=str(self.folder / "none"),
        )
        return notebooks.run_notebook("submission", **paths | settings)


def natural_rows(count: int, tokenizer: Any, seed: int = 1) -> pd.DataFrame:
    """Rows of log-normal length, median 600 tokens as the model is asked, the longest 3,000, and 6
    of 4,032."""
    from generation import natural_lengths

    texts = pd.read_csv(ROOT / "demo" / "natural_rows.csv", keep_default_na=False)
    words = " ".join(pd.concat([texts["original_text"], texts["rewritten_text"]])).split()
    ratio = len(tokenizer(" ".join(words[:20_000]))["input_ids"]) / 20_000
    draw = random.Random(seed)
    rows = []
    for number, length in enumerate([*natural_lengths(count), *[5_000] * 6]):
        half = int((length - 110) / ratio / 2)
        start = draw.randrange(len(words) - 2 * half)
        parts = words[start : start + half], words[start + half : start + 2 * half]
        rows.append([f"t{number}", *(" ".join(part) for part in parts)])
    return pd.DataFrame(rows, columns=["id", "original_text", "rewritten_text"])


def prepare(work: Work) -> None:
    import shutil

    import true_shape

    import notebooks
    from prompt_recovery.tokenizer import load_tokenizer

    start = time.monotonic()
    true_shape.write_quantised(work.nf4, work.args.layers)
    shutil.copy2(work.args.tokenizer, work.nf4 / "tokenizer.model")
    write_adapter(work.nf4, work.adapter)
    notebooks.lengthened_rows(ROOT / "demo" / "natural_rows.csv", 160).to_csv(
        work.folder / "rows.csv", index=False
    )
    test = natural_rows(work.args.rows, load_tokenizer(work.nf4, pad="unk", side="left"))
    test.to_csv(work.folder / "test.csv", index=False)
    test.sample(min(200, len(test)), random_state=0).to_csv(
        work.folder / "test200.csv", index=False
    )
    test.sample(50, random_state=1).to_csv(work.folder / "test50.csv", index=False)
    print(f"prepared in {time.monotonic() - start:.0f} s")


def write_adapter(model_dir: Path, adapter_dir: Path) -> None:
    from prompt_recovery import adapter
    from prompt_recovery.engine import base_id, load_base
    from prompt_recovery.recipe import Format

    lora = adapter.add_lora(load_base(model_dir), base=base_id(model_dir))
    for name, weight in lora.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(weight, 0, 0.01)
    adapter.save_adapter(lora, adapter_dir, Format())


def load_16_bit(work: Work) -> None:
    import true_shape

    from prompt_recovery.engine import load_base

    zeros = work.folder / "zeros"
    if not zeros.exists():
        true_shape.write_checkpoint(zeros, work.args.layers)
    work.t4s()
    start = time.monotonic()
    base = load_base(zeros, four_bit=True)
    where = [str(next(layer.parameters()).device) for layer in base.model.layers]
    layers = [where.count(device) for device in sorted(set(where))]
    print(
        f"quantised while loading in {time.monotonic() - start:.0f} s, layers {layers}; "
        f"{work.peak()}"
    )


def t4(work: Work) -> None:
    from prompt_recovery.engine import planning

    work.t4s()
    meters: list[Any] = []
    (work.folder / "submission.csv").unlink(missing_ok=True)
    keep_meters(meters)
    start = time.monotonic()
    answered = work.submission("test.csv", "submission.csv")
    spent = time.monotonic() - start
    report = answered["report"]
    print(report.groupby(["source", "how", "stopped"]).size().to_string())
    by_model = (report["source"] == "model").sum()
    meter = max(meters, key=lambda each: each.rows)
    print(f"{by_model} of {len(report)} rows by the model in {spent:.0f} s; {work.peak()}")
    print(
        f"{meter.tokens_in} tokens read in {meter.reading:.0f} s, "
        f"{meter.tokens_in / meter.reading:.0f} a second; {meter.tokens_out} written in "
        f"{meter.writing:.0f} s, {meter.tokens_out / meter.writing:.0f} a second, in "
        f"{meter.batches} batches of {meter.rows / meter.batches:.1f} rows"
    )
    table = planning.plan(work.nf4, [work.args.leave] * torch.cuda.device_count()).bytes
    for device, part in enumerate(table):
        reckoned = sum(part) - part.context - part.margin
        print(
            f"card {device}: torch's own peak {torch.cuda.max_memory_allocated(device) / GIB:.2f} "
            f"GiB, reserved {torch.cuda.max_memory_reserved(device) / GIB:.2f}; by the table "
            f"{reckoned / GIB:.2f}"
        )


def adapters(work: Work) -> None:
    """Three adapters beside one: seconds of answering, and of all else that more of them take."""
    three_beside_one(work, "_t4", dict(os.environ))


def merged(work: Work) -> None:
    three_beside_one(work, "", {**os.environ, "CUDA_VISIBLE_DEVICES": "0"})


def three_beside_one(work: Work, cards: str, environment: dict[str, str]) -> None:
    for count in (1, 3, 1):  # the first compiles Triton's kernels
        part = f"_adapters{count}{cards}"
        subprocess.run(command(work.args, part), check=True, env=environment)
    (answering3, other3), (answering1, other1) = (
        json.loads((work.folder / f"adapters{count}.json").read_text()) for count in (3, 1)
    )
    print(
        f"three take {answering3 / answering1:.2f} times one's answering and "
        f"{other3 - other1:.0f} s more of all else"
    )


def adapters3_t4(work: Work) -> None:
    work.t4s()
    adapters3(work)


def adapters1_t4(work: Work) -> None:
    work.t4s()
    adapters1(work)


def adapters3(work: Work) -> None:
    from safetensors.torch import load_file, save_file

    from prompt_recovery.adapter_files import WEIGHTS, read_header

    folders = [work.adapter]
    for number in (1, 2):
        folder = work.folder / f"adapter-{number}"
        shutil.copytree(work.adapter, folder, dirs_exist_ok=True)
        tensors = load_file(work.adapter / WEIGHTS)
        rolled = {name: tensor.roll(number, 0) for name, tensor in tensors.items()}
        save_file(rolled, folder / WEIGHTS, read_header(work.adapter))
        folders.append(folder)
    answer_with(work, folders)


def adapters1(work: Work) -> None:
    answer_with(work, [work.adapter])


def answer_with(work: Work, folders: list[Path]) -> None:
    meters: list[Any] = []
    keep_meters(meters)
    count = len(folders)
    to = f"adapters{count}.csv"
    for path in work.folder.glob(f"{to}*"):
        path.unlink()
    start = time.monotonic()
    report = work.submission(
        "test200.csv",
        to,
        adapter_dir=[str(folder) for folder in folders],
        combine="join" if count > 1 else "first",
    )["report"]
    answering = sum(meter.wall for meter in meters)
    other = time.monotonic() - start - answering
    (work.folder / f"adapters{count}.json").write_text(json.dumps([answering, other]))
    print(report.groupby(["adapters", "source"]).size().to_string())
    print(
        f"{count} adapters: {answering:.0f} s of answering, {other:.0f} s of all else; "
        f"{work.peak()}",
        flush=True,
    )


def keep_meters(meters: list[Any]) -> None:
    from prompt_recovery import submission_answers

    class Kept(submission_answers.Meter):
        def __init__(self, *arguments: Any) -> None:
            super().__init__(*arguments)
            meters.append(self)

    submission_answers.Meter = Kept  # type: ignore[misc]


def prompts_of(work: Work, count: int) -> list[list[int]]:
    from prompt_recovery.answers import encode_rows
    from prompt_recovery.recipe import Format
    from prompt_recovery.tokenizer import load_tokenizer

    test = pd.read_csv(work.folder / "test200.csv", dtype=str, keep_default_na=False).head(count)
    tokenizer = load_tokenizer(work.nf4, pad="unk", side="left")
    return encode_rows(tokenizer, test, max_tokens=4096 - 64, format=Format())


def load(work: Work) -> Any:
    from prompt_recovery import adapter, inputs

    base, _ = inputs.load(work.nf4, work.adapter)
    return adapter.load_adapter(base, work.adapter, work.nf4)


def answers(model: Any, prompts: list[list[int]], plan: Any) -> list[list[int]]:
    from prompt_recovery.engine import generate
    from prompt_recovery.engine.generation import ready

    with ready(model, plan) as prepared:
        found = sorted(generate(prepared, prompts, eos=2, max_new_tokens=64))
    return [each.answers[0].ids for each in found]


def equal(work: Work) -> None:
    """Two cards here; one card in a process of its own, which compares."""
    from prompt_recovery.engine import generation

    work.t4s()
    prompts, model = prompts_of(work, 200), load(work)
    plan = generation.plan_of(model)
    found = answers(model, prompts, plan)
    (work.folder / "two.json").write_text(json.dumps([plan, found]))
    print(f"two stages: {plan}, {work.peak()}", flush=True)
    if work.ballast:
        work.ballast.process.kill()
    del model
    torch.cuda.empty_cache()
    subprocess.run(
        command(work.args, "_one"), check=True, env={**os.environ, "CUDA_VISIBLE_DEVICES": "0"}
    )


def one(work: Work) -> None:
    from prompt_recovery.engine import generation

    look_like_t4()
    prompts, model = prompts_of(work, 200), load(work)
    plan, two = json.loads((work.folder / "two.json").read_text())
    same = generation.AnswerPlan((sum(plan[0]),), *plan[1:])
    own = generation.plan_of(model)
    for name, each in (("the same plan", same), ("its own plan", own)):
        found = answers(model, prompts, each)
        alike = first = tokens = 0
        gaps = []
        for prompt, a, b in zip(prompts, found, two, strict=True):
            differs = next((n for n, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), None)
            alike += sum(x == y for x, y in zip(a, b, strict=False))
            tokens += max(len(a), len(b))
            if differs is not None:
                first += 1
                with torch.inference_mode():
                    ids = torch.tensor([prompt + a[:differs]], device="cuda")
                    logits = (
                        model(input_ids=ids, use_cache=False, logits_to_keep=1)
                        .logits[0, -1]
                        .float()
                    )
                gaps.append(((logits[a[differs]] - logits[b[differs]]).abs() / logits.std()).item())
        upto = sum(
            next((n + 1 for n, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), len(a))
            for a, b in zip(found, two, strict=True)
        )
        worst = ", ".join(f"{gap:.2g}" for gap in sorted(gaps, reverse=True)) or "0"
        print(
            f"one card, {name} {each}: {alike / tokens:.2%} of {tokens} tokens equal, {first} of "
            f"{len(prompts)} rows differ; up to and with the first that differs "
            f"{(upto - first) / upto:.2%} of {upto} equal; the two logits there are apart by "
            f"{worst} of the logits' spread",
            flush=True,
        )


def in_turn(stages: Any, pieces: Any, read: Any) -> Any:
    """As decoding.flow, but one stage works at a time."""
    found = []
    for number, x in enumerate(pieces):
        for each in stages:
            x = each.call(read, each, x.to(each.device), number).result()
            torch.cuda.synchronize(each.device)
        found.append(x)
    return found


def through_host(tensor: torch.Tensor, target: torch.Tensor) -> None:
    """As decoding.hand_over, but through pinned memory, as cards without a link copy."""
    pinned = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
    pinned.copy_(tensor, non_blocking=True)
    torch.cuda.synchronize(tensor.device)
    target.copy_(pinned, non_blocking=True)
    torch.cuda.synchronize(target.device)


def timed(
    prepared: Any, rows: int, length: int, new: int, piece: int, events: dict[bool, list[Any]]
) -> tuple[float, float]:
    """Seconds of prefill and of a decode step; of two runs the second. events: emptied before each
    run."""
    from prompt_recovery.engine import decoding

    draw = np.random.default_rng(0)
    prompts = [draw.integers(5, 32000, length).tolist() for _ in range(rows)]
    decoder = decoding.Decoder(
        prepared.parts,
        [],
        rows=rows,
        cache_tokens=rows * decoding.cache_columns(length, new),
        max_new_tokens=new,
        eos=-1,
        pad=0,
        piece=piece,
    )
    spent = float("inf")
    for _ in range(2):
        for each in events.values():
            each.clear()
        start = time.monotonic()
        decoder.answer(prompts, [[None]] * rows)
        spent = time.monotonic() - start
    return decoder.prefill_seconds, (spent - decoder.prefill_seconds) / max(1, new - 1)


def prefill_speed(prepared: Any, rows: int, length: int) -> None:
    from prompt_recovery.engine import decoding, stage

    # events around each piece, by whether the stage is the last
    begun: dict[bool, list[Any]] = {True: [], False: []}
    plain_read, flow = stage.Stage.read, decoding.flow

    def read(self: Any, *arguments: Any) -> Any:
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        y = plain_read(self, *arguments)
        end.record()
        begun[self.part.last].append((start, end))
        return y

    stage.Stage.read = read
    for piece in (2048, 4096):
        times = {}
        for name, way in (("a stage at a time", in_turn), ("both at work", flow)):
            decoding.flow = way
            times[name] = timed(prepared, rows, length, 1, piece, begun)[0]
            busy = [sum(a.elapsed_time(b) for a, b in begun[last]) / 1e3 for last in (False, True)]
            shares = ", ".join(f"{each / times[name]:.0%}" for each in busy)
            print(
                f"prefill of {rows} x {length} in pieces of {piece}, {name}: "
                f"{rows * length / times[name]:.0f} tok/s, busy {shares}",
                flush=True,
            )
        ratio = times["a stage at a time"] / times["both at work"]
        print(f"both at work: {ratio:.2f} times as fast")
    stage.Stage.read, decoding.flow = plain_read, flow


def speed(work: Work) -> None:
    from prompt_recovery.engine import decoding, generation

    work.t4s()
    model = load(work)
    plan = generation.plan_of(model)
    with generation.ready(model, plan) as prepared:
        prefill_speed(prepared, min(24, plan.cache_tokens // 704), 640)
        hand_over = decoding.hand_over
        for count in (8, 16, 24, 32, 40):
            if count * 704 > plan.cache_tokens:
                break
            step = timed(prepared, count, 640, 64, plan.piece, {})[1]
            decoding.hand_over = through_host
            slow = timed(prepared, count, 640, 64, plan.piece, {})[1]
            decoding.hand_over = hand_over
            print(
                f"decode, {count} rows x 704: {step * 1e3:.2f} ms a step, {count / step:.0f} "
                f"tokens/s; copies through pinned memory {slow * 1e3:.2f} ms; {work.peak()}",
                flush=True,
            )


def kill(work: Work) -> None:
    """The submission's script in a process that is killed, then again."""
    for path in work.folder.glob("killed.csv*"):
        path.unlink()

    def answered() -> dict[int, Any]:
        """Rows in the journal, by position; the line that a kill cut holds none."""
        found = {}
        for path in work.folder.glob("killed.csv*.journal"):
            for line in path.read_text().splitlines():
                with contextlib.suppress(ValueError):
                    found.update(
                        (position, answers) for position, answers in json.loads(line)["rows"]
                    )
        return found

    process = subprocess.Popen(command(work.args, "_rows200"), start_new_session=True)
    while process.poll() is None and len(answered()) < min(200, work.args.rows) // 3:
        time.sleep(0.2)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    before = answered()
    subprocess.run(command(work.args, "_rows200"), check=True)
    after = answered()
    same = sum(after[position] == answers for position, answers in before.items())
    print(
        f"killed with {len(before)} rows in the journal; {len(after)} afterwards, {same} of the "
        f"first {len(before)} unchanged"
    )


def rows200(work: Work) -> None:
    work.t4s()
    report = work.submission("test200.csv", "killed.csv")["report"]
    print(report.groupby(["source", "how", "stopped"]).size().to_string())


def bf16(work: Work) -> None:
    """Both scripts, each in a process of its own."""
    with_ballast = Ballast(CARD_24)
    for part in ("_answer24", "_train24"):
        done = subprocess.run(command(work.args, part))
        print(
            f"{part}: rc {done.returncode}, peak a card {with_ballast.peak()} GiB so far",
            flush=True,
        )
    with_ballast.process.kill()


def answer24(work: Work) -> None:
    report = work.submission("test50.csv", "bf16.csv")["report"]
    print(report.groupby(["source", "how", "stopped"]).size().to_string())


def train24(work: Work) -> None:
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.models import StaticEmbedding
    from tokenizers import Tokenizer

    import notebooks

    notebooks.without_pictures()
    words = Tokenizer.from_file(str(ROOT / "demo" / "tiny-mixtral" / "tokenizer.json"))
    encoder = work.folder / "encoder"
    SentenceTransformer(modules=[StaticEmbedding(words, embedding_dim=64)]).save(str(encoder))
    trained = notebooks.run_notebook(
        "train",
        model_dir=str(work.nf4),
        train_csv=str(work.folder / "rows.csv"),
        output_dir=str(work.folder / "out"),
        encoder_dir=str(encoder),
        max_steps=2,
        eval_fraction=0.05,
        evaluations=1,
        patience=10**9,
    )
    print(
        pd.read_csv(work.folder / "out" / "training_log.csv").tail(2).to_string(),
        trained["evaluation"],
    )


def train(work: Work) -> None:
    with_ballast = Ballast(CARD_24)
    done = subprocess.run(command(work.args, "_steps24"))
    print(
        f"two cards of {CARD_24} GiB: rc {done.returncode}, peak a card {with_ballast.peak()} GiB",
        flush=True,
    )
    with_ballast.process.kill()
    subprocess.run(command(work.args, "_steps_t4"))


def steps24(work: Work) -> None:
    steps(work, rows=8, length=512)


def steps_t4(work: Work) -> None:
    work.t4s()
    steps(work, rows=4, length=640)
    print(work.peak())


def steps(work: Work, rows: int, length: int, count: int = 8) -> None:
    """The rate of training's steps alone on so many rows a process, after the first two."""
    from prompt_recovery import adapter
    from prompt_recovery.engine import base_id, load_base, processes

    lora = adapter.add_lora(load_base(work.nf4), base=base_id(work.nf4), dropout=0.1)
    sharing = processes().num_processes
    rows *= sharing
    examples = random_examples(rows * count, length)
    recipe = dict(batch_size=rows, gradient_accumulation=1, max_steps=count, evaluations=1)
    taken = train_on(work, lora, examples, recipe)
    rate = rows * length / statistics.median(each.seconds for each in taken[2:])
    processes().print(
        f"{sharing} processes, {rows} rows of {length} tokens a step: {rate:.0f} tokens/s, "
        "torch's own peak "
        + ", ".join(
            f"{torch.cuda.max_memory_allocated(device) / GIB:.2f}" for device in devices_of(lora)
        )
        + " GiB",
        flush=True,
    )


def devices_of(model: Any) -> list[torch.device]:
    return sorted({parameter.device for parameter in model.parameters()}, key=str)


def random_examples(count: int, length: int) -> list[dict[str, list[int]]]:
    """Rows of random ids; the last 24 are supervised."""
    draw = np.random.default_rng(0)
    examples = []
    for _ in range(count):
        ids = [1, *draw.integers(5, 32_000, length - 2).tolist(), 2]
        examples.append({"input_ids": ids, "labels": [-100] * (length - 24) + ids[length - 24 :]})
    return examples


class Taken(NamedTuple):
    """A step: how long it took, the loss before it, whether fp16's scaler left it out."""

    seconds: float
    loss: float
    skipped: bool


def train_on(
    work: Work,
    lora: Any,
    examples: list[dict[str, list[int]]],
    recipe: dict[str, Any],
    applied: int | None = None,
) -> list[Taken]:
    """The steps of training.train, up to so many that were not left out."""
    from prompt_recovery import training
    from prompt_recovery.recipe import Recipe
    from prompt_recovery.tokenizer import load_tokenizer

    taken: list[Taken] = []
    losses: list[torch.Tensor] = []
    began: list[float] = []
    plain_step, plain_end = training.RowTrainer.training_step, training.WatchGradients.on_step_end

    def step(self: Any, *arguments: Any, **options: Any) -> torch.Tensor:
        began.append(time.monotonic())
        losses.append(plain_step(self, *arguments, **options))
        return losses[-1]

    def end(self: Any, args: Any, state: Any, control: Any, **options: Any) -> None:
        plain_end(self, args, state, control, **options)
        for device in devices_of(lora):
            torch.cuda.synchronize(device)
        skipped = self.trainer.accelerator.optimizer_step_was_skipped
        taken.append(Taken(time.monotonic() - began[0], float(sum(losses)), skipped))
        losses.clear()
        began.clear()
        if sum(not each.skipped for each in taken) == applied:
            control.should_training_stop = True

    training.RowTrainer.training_step = step  # type: ignore[method-assign]
    training.WatchGradients.on_step_end = end  # type: ignore[method-assign]
    try:
        log = training.train(
            lora,
            load_tokenizer(work.nf4, pad="unk", side="right"),
            examples,
            [],
            Recipe(output_dir=str(work.folder / "steps"), **recipe),
        )
    finally:
        training.RowTrainer.training_step = plain_step  # type: ignore[method-assign]
        training.WatchGradients.on_step_end = plain_end  # type: ignore[method-assign]
    if os.environ.get("RANK", "0") == "0":
        print(log.to_string())
    return taken


# in the first bf16's loss falls by a tenth; fp32 takes the first alone
RATES = {"t4": (1e-4, 3e-4), "bf16": (1e-4, 3e-4), "fp32": (1e-4,)}


def alike(work: Work) -> None:
    from safetensors.torch import load_file

    for part in ("_alike_t4", "_alike_bf16", "_alike_fp32"):
        alone = {**os.environ, "CUDA_VISIBLE_DEVICES": "0"}
        subprocess.run(command(work.args, part), env=alone, check=True)
    for kind, other, rate in (
        *(("t4", "bf16", rate) for rate in RATES["bf16"]),
        *((kind, "fp32", rate) for kind in ("t4", "bf16") for rate in RATES["fp32"]),
    ):
        (losses, changed), (exact, changed_so) = (
            (
                json.loads((work.folder / f"alike-{each}-{rate}.json").read_text()),
                load_file(work.folder / f"alike-{each}-{rate}.safetensors"),
            )
            for each in (kind, other)
        )
        apart = [abs(a - b) / b for a, b in zip(losses, exact, strict=True)]
        squares = inner(changed, changed) * inner(changed_so, changed_so)
        print(
            f"rate {rate:g}: {other} {exact[0]:.4f} -> {exact[-1]:.4f} "
            f"({exact[-1] / exact[0] - 1:+.1%}), {kind} {losses[0]:.4f} -> {losses[-1]:.4f}; "
            f"apart by {max(apart):.2%} at most, {apart[-1]:.2%} at the last; cosine of the "
            f"changes {inner(changed, changed_so) / squares**0.5:.4f}"
        )


def inner(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> float:
    """The inner product of two LoRAs' changes BA of all matrices."""
    total = 0.0
    for name in one:
        if "lora_A" in name:
            up = name.replace("lora_A", "lora_B")
            total += ((one[up].T @ other[up]) * (one[name] @ other[name].T)).sum().item()
    return total


def alike_t4(work: Work) -> None:
    look_like_t4()
    alike_steps(work, "t4", one_expert=True)


def alike_bf16(work: Work) -> None:
    alike_steps(work, "bf16", one_expert=False)


def alike_fp32(work: Work) -> None:
    from prompt_recovery import training

    arguments = training.TrainingArguments
    training.TrainingArguments = lambda **kwargs: arguments(  # type: ignore[misc, assignment]
        **kwargs | dict(bf16=False, fp16=False)
    )
    alike_steps(work, "fp32", one_expert=False, dtype=torch.float32)


def alike_steps(work: Work, kind: str, one_expert: bool, dtype: torch.dtype | None = None) -> None:
    """Twenty steps that count, on the same four rows each, with weights like real ones."""
    from safetensors.torch import save_file
    from true_shape import scale_like_real

    from prompt_recovery import adapter, training
    from prompt_recovery.engine import TrainingPlan, base_id, load_base

    base = load_base(work.nf4, dtype)
    scale_like_real(base)
    training.plan_of = lambda *_: TrainingPlan(4, 1, work.args.layers, one_expert=one_expert)
    for rate in RATES[kind]:
        lora = adapter.add_lora(base, base=base_id(work.nf4), dropout=0.0)
        recipe = dict(batch_size=4, gradient_accumulation=1, max_steps=40, learning_rate=rate)
        taken = train_on(work, lora, random_examples(4, 256), recipe, applied=20)
        counted = [each.loss for each in taken if not each.skipped]
        print(f"{kind}, rate {rate:g}: {len(taken) - len(counted)} steps left out", flush=True)
        (work.folder / f"alike-{kind}-{rate}.json").write_text(json.dumps(counted))
        save_file(
            {n: p.detach().cpu() for n, p in lora.named_parameters() if p.requires_grad},
            work.folder / f"alike-{kind}-{rate}.safetensors",
        )
        base = lora.unload()


def ddp(work: Work) -> None:
    for count in (1, torch.cuda.device_count()):
        launch = [sys.executable, "-m", "accelerate.commands.launch", f"--num_processes={count}"]
        launch += ["--multi_gpu"] if count > 1 else []
        visible = ",".join(map(str, range(count)))
        subprocess.run(
            [
                *launch,
                "--mixed_precision=no",
                "--num_machines=1",
                "--dynamo_backend=no",
                *command(work.args, "_ddp")[1:],
            ],
            env={**os.environ, "CUDA_VISIBLE_DEVICES": visible},
        )


def ddp_steps(work: Work) -> None:
    steps(work, rows=8, length=512, count=12)


def dense(work: Work) -> None:
    """Each part in a process of its own, which sees the first card only."""
    for part in ("_dense_write", "_dense_t4", "_dense24"):
        alone = {**os.environ, "CUDA_VISIBLE_DEVICES": "0"}
        done = subprocess.run(command(work.args, part), env=alone)
        print(f"{part}: rc {done.returncode}", flush=True)


def dense_write(work: Work) -> None:
    import shutil

    import true_shape

    folder = work.folder / "dense"
    true_shape.write_dense(folder, work.args.layers)
    shutil.copy2(work.args.tokenizer, folder / "tokenizer.model")
    write_adapter(folder, work.folder / "dense-adapter")


def dense_t4(work: Work) -> None:
    work.t4s()
    dense_run(work, "dense-t4.csv")


def dense24(work: Work) -> None:
    work.ballast = Ballast(CARD_24)
    dense_run(work, "dense-24.csv")


def dense_run(work: Work, to: str) -> None:
    work.nf4, work.adapter = work.folder / "dense", work.folder / "dense-adapter"
    steps(work, rows=8, length=512)
    print(f"training: {work.peak()}")
    torch.cuda.empty_cache()
    start = time.monotonic()
    report = work.submission("test50.csv", to)["report"]
    print(report.groupby(["source", "how", "stopped"]).size().to_string())
    print(f"{len(report)} rows in {time.monotonic() - start:.0f} s; {work.peak()}")


PARTS = {
    "prepare": prepare,
    "t4": t4,
    "adapters": adapters,
    "merged": merged,
    "equal": equal,
    "speed": speed,
    "kill": kill,
    "load": load_16_bit,
    "bf16": bf16,
    "train": train,
    "alike": alike,
    "ddp": ddp,
    "dense": dense,
    "_adapters3_t4": adapters3_t4,
    "_adapters1_t4": adapters1_t4,
    "_adapters3": adapters3,
    "_adapters1": adapters1,
    "_dense_write": dense_write,
    "_dense_t4": dense_t4,
    "_dense24": dense24,
    "_one": one,
    "_rows200": rows200,
    "_answer24": answer24,
    "_train24": train24,
    "_steps24": steps24,
    "_steps_t4": steps_t4,
    "_alike_t4": alike_t4,
    "_alike_bf16": alike_bf16,
    "_alike_fp32": alike_fp32,
    "_ddp": ddp_steps,
}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("work", type=Path)
    parser.add_argument("tokenizer", type=Path)
    parser.add_argument("parts", nargs="+", choices=PARTS)
    parser.add_argument("--one", action="store_true")
    parser.add_argument("--cells", type=int, default=25_000, help="of a batch with --one")
    parser.add_argument("--layers", type=int, default=32, help="fewer to debug")
    parser.add_argument("--rows", type=int, default=1300)
    parser.add_argument(
        "--leave", type=float, default=T4, help="GiB that the ballast leaves of a card"
    )
    parser.add_argument(
        "--unmerged", action="store_true", help="as T4s have it, also with few layers"
    )
    parser.add_argument("--here", action="store_true", help="in this process")
    args = parser.parse_args()
    args.work.mkdir(parents=True, exist_ok=True)
    for part in args.parts:
        if args.here:
            work = Work(args)
            PARTS[part](work)
            if work.ballast:
                work.ballast.process.kill()
            continue
        print(
            f"\n== {part}, {torch.cuda.device_count()} x {torch.cuda.get_device_name()}", flush=True
        )
        start = time.monotonic()
        done = subprocess.run(command(args, part))
        print(f"== {part}: rc {done.returncode} after {time.monotonic() - start:.0f} s", flush=True)


def command(args: argparse.Namespace, part: str) -> list[str]:
    """A part in a process of its own."""
    options = [f"--{name}={getattr(args, name)}" for name in ("cells", "layers", "rows", "leave")]
    flags = [f"--{name}" for name in ("one", "unmerged") if getattr(args, name)]
    return [
        sys.executable,
        __file__,
        str(args.work),
        str(args.tokenizer),
        part,
        *options,
        *flags,
        "--here",
    ]


if __name__ == "__main__":
    main()
