"""python -m prompt_recovery plan MODEL_DIR --cards 14.7 14.7 [--rows test.csv] [--per-hour 0.80]
                                                  [--train 1500 600 3]
python -m prompt_recovery quantise SOURCE_DIR TARGET_DIR
python -m prompt_recovery score A.csv [B.csv ...] --truth rows.csv --encoder DIR [--html page.html]

plan says, without a GPU, whether a model fits on cards that leave so many GiB to a process, how it
answers on them, and how long a test set and a training on T4s take. quantise writes a 16-bit folder
once more in 4 bits, which loads in seconds. score says what submissions of anyone's score on rows
whose prompts are known, how they differ, and where they fail."""

from __future__ import annotations

import argparse
import math
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

# tokens of a row where no test set is given: as long as the competition's, by which
# docs/MEASURED.md is measured
ROWS, TYPICAL = 1300, 690
NEW_TOKENS = 64
T4_GIB = 16
HELD_OUT = 0.1  # of a training's rows
ROWS_AT_A_TIME = 4  # on two T4s: 4 rows of 640 tokens fit beside Mixtral, 8 do not (reckoned)


def command_line() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m prompt_recovery",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = parser.add_subparsers(dest="command", required=True)
    plan = commands.add_parser("plan", help="what fits on which cards, and how long it takes")
    plan.add_argument(
        "model_dir", type=Path, help="a base model's folder; its weights need not be there"
    )
    plan.add_argument(
        "--cards",
        type=float,
        nargs="+",
        required=True,
        metavar="GIB",
        help="free on each; a T4 has 14.7",
    )
    plan.add_argument(
        "--rows", type=Path, metavar="TEST_CSV", help=f"without it {ROWS} rows of {TYPICAL} tokens"
    )
    plan.add_argument(
        "--per-hour", type=float, metavar="PRICE", help="what the machine costs an hour"
    )
    plan.add_argument(
        "--train",
        type=float,
        nargs=3,
        metavar=("ROWS", "TOKENS", "EPOCHS"),
        help="a training's rows, tokens of each, and epochs",
    )
    quantise = commands.add_parser("quantise", help="write a model once more in 4 bits")
    quantise.add_argument("source_dir", type=Path, help="the 16-bit folder, as the hub has it")
    quantise.add_argument("target_dir", type=Path, help="a new folder")
    score = commands.add_parser("score", help="what submissions score, and where they fail")
    score.add_argument(
        "submissions", type=Path, nargs="+", metavar="CSV", help="with id, rewrite_prompt"
    )
    score.add_argument(
        "--truth",
        type=Path,
        nargs="+",
        required=True,
        metavar="CSV",
        help="rows with the same ids and the true rewrite_prompt",
    )
    score.add_argument(
        "--encoder",
        type=Path,
        metavar="DIR",
        help="a sentence encoder's folder, such as sentence-t5's; without it MiniLM's",
    )
    score.add_argument("--html", type=Path, metavar="PAGE", help="write it as one page too")
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    parser = command_line()
    args = parser.parse_args(arguments)
    if args.command == "score" and args.html and args.html.suffix.lower() not in (".html", ".htm"):
        parser.error(f"--html {args.html}: give a page to write, such as scores.html")
    from prompt_recovery.quiet import silence_known_notices

    silence_known_notices()
    from safetensors import SafetensorError

    from prompt_recovery.engine import ModelError, TooLittleMemory, load_base, save_quantised

    try:
        if args.command == "plan":
            print_plan(args.model_dir, args.cards, args.rows, args.per_hour, args.train)
        elif args.command == "score":
            print_scores(args.submissions, args.truth, args.encoder, args.html)
        elif args.target_dir.exists():
            raise ModelError(
                f"{args.target_dir} is there already; give a new folder, or remove it."
            )
        else:
            args.target_dir.parent.mkdir(parents=True, exist_ok=True)
            if not os.access(args.target_dir.parent, os.W_OK):
                raise ModelError(
                    f"{args.target_dir.parent} can't be written to; give another folder."
                )
            base = load_base(args.source_dir, four_bit=True)
            print(f"written: {save_quantised(base, args.source_dir, args.target_dir)}")
    except (ModelError, TooLittleMemory, SafetensorError, OSError, ValueError) as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr)
        return 1
    return 0


def print_plan(
    model_dir: Path,
    cards: Sequence[float],
    test_csv: Path | None,
    per_hour: float | None,
    training: Sequence[float] | None,
) -> None:
    """Print what `plan` says.

    Args:
        model_dir: a base model's folder; config.json is enough, without a test_csv.
        cards: GiB that each card leaves to a process.
        test_csv: rows to answer; None: as many and as long as the competition's.
        per_hour: what the machine costs; None: no price is printed.
        training: rows, tokens of each, and epochs of a training on T4s; None: none is reckoned.

    Raises ValueError for cards or a training that can't be, FileNotFoundError for no config,
    TooLittleMemory for a model that does not fit.
    """
    from prompt_recovery.engine import on_h100s, on_t4s, plan

    if not all(math.isfinite(card) for card in cards):
        raise ValueError(f"--cards {' '.join(map(str, cards))}: give GiB, such as 14.7.")
    if not (model_dir / "config.json").is_file():
        raise FileNotFoundError(
            f"{model_dir} has no config.json; give a base model's folder as the hub has it."
        )
    lengths = _lengths(model_dir, test_csv) if test_csv else [TYPICAL] * ROWS
    planned = plan(model_dir, cards)
    answering, gib = planned.answering, 2**30
    print(
        f"layers a card: {', '.join(map(str, answering.layers))} of {sum(answering.layers)}, in 4 "
        "bits\n"
    )
    print(f"{'GiB':<12}" + "".join(f"{f'card {n}':>8}" for n in range(len(planned.bytes))))
    for field in planned.bytes[0]._fields:
        print(
            f"{field:<12}" + "".join(f"{getattr(part, field) / gib:8.2f}" for part in planned.bytes)
        )
    print(f"{'together':<12}" + "".join(f"{sum(part) / gib:8.2f}" for part in planned.bytes))
    placed = "merged into 16-bit weights" if answering.merged else "beside the 4-bit weights"
    print(
        f"\nadapter {placed}; prompts read {answering.piece} tokens at a time; room for "
        f"{answering.cache_tokens} tokens of a batch"
    )
    if planned.on_cpu:
        print(
            "16-bit experts are put together in the host's memory while the model loads and "
            "quantises"
        )
    print(
        f"\n{len(lengths)} rows, {sum(lengths)} tokens to read, answers of {NEW_TOKENS}; seconds "
        "to load, read and write:"
    )
    times = {
        "at the rates measured on H100s with a T4's kernels": on_h100s(planned, lengths, NEW_TOKENS)
    }
    if max(cards) <= T4_GIB:
        times["on T4s, reckoned"] = on_t4s(planned, lengths, NEW_TOKENS)
    for name, spent in times.items():
        price = (
            ""
            if per_hour is None
            else f", {sum(spent) / 3600 * per_hour:.2f} at {per_hour:.2f} an hour"
        )
        parts = " + ".join(f"{part:.0f}" for part in spent)
        print(f"  {name}: {parts} = {sum(spent):.0f} s{price}")
    if training:
        if max(cards) > T4_GIB:
            raise ValueError("--train is reckoned for T4s: give --cards 14.7 14.7, or 14.7.")
        print_training(planned, *training)


def print_training(planned: Any, rows: float, tokens: float, epochs: float) -> None:
    from prompt_recovery.engine import train_on_t4s

    if not (rows >= 1 and tokens >= 1 and epochs > 0 and rows * tokens * epochs < math.inf):
        raise ValueError(f"--train {rows:g} {tokens:g} {epochs:g}: give such as 1500 600 3.")
    held_out = round(rows * HELD_OUT)
    spent = train_on_t4s(
        planned,
        round(rows),
        round(tokens),
        epochs,
        at_a_time=ROWS_AT_A_TIME,
        held_out=held_out,
        new_tokens=NEW_TOKENS,
    )
    print(
        f"\ntraining on T4s, reckoned: {rows:g} rows x {tokens:g} tokens x {epochs:g} epochs, "
        f"{ROWS_AT_A_TIME} rows at a time, one card at work at a time:\n"
        f"  steps alone {spent.steps / 3600:.2f} h (multiplying {spent.multiplying / 3600:.2f}, "
        f"dequantising {spent.dequantising / 3600:.2f})\n"
        f"  each evaluation of {held_out} rows beside it: losses {spent.losses / 60:.1f} min, "
        f"answers to half of them {spent.answers / 60:.1f} min"
    )


def _lengths(model_dir: Path, test_csv: Path) -> list[int]:
    from prompt_recovery.answers import encode_rows
    from prompt_recovery.data import read_test
    from prompt_recovery.recipe import MOST_TOKENS, Format
    from prompt_recovery.tokenizer import load_tokenizer

    tokenizer = load_tokenizer(model_dir, pad="unk", side="left")
    prompts = encode_rows(
        tokenizer, read_test(test_csv), max_tokens=MOST_TOKENS - NEW_TOKENS, format=Format()
    )
    return [len(prompt) for prompt in prompts]


def print_scores(
    submissions: Sequence[Path], truths: Sequence[Path], encoder_dir: Path | None, page: Path | None
) -> None:
    from prompt_recovery import metric, score_report, scoring

    folder = encoder_dir or metric.minilm_dir()
    scored = scoring.score_files(submissions, truths, metric.load_encoder(folder))
    name = f"{metric.encoder_name(folder)} ({metric.encoder_hash(folder)})"
    print(score_report.text_report(scored, name))
    if page:
        score_report.write_page(scored, name, page)
        print(f"written: {page}")


if __name__ == "__main__":
    sys.exit(main())
