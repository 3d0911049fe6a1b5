"""A grid of settings: each cell trains an adapter, or takes the base as it is, and answers the same
held-out rows.

What a cell answered lies in a CSV named by a key of what it depends on; such a cell is not run
again. Scores are computed from the answers, so that ways to combine them cost nothing.
"""

from __future__ import annotations

import shutil
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pandas as pd
from peft.tuners.tuners_utils import BaseTunerLayer
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from prompt_recovery import adapter, data, files, splitting, training
from prompt_recovery.agreement import refuse_several
from prompt_recovery.answers import answer_prompts, encode_rows, or_fallback
from prompt_recovery.base import base_digest
from prompt_recovery.comparison_grid import ComparisonError
from prompt_recovery.engine import Sampling, base_id
from prompt_recovery.examples import Example, usable_examples
from prompt_recovery.keys import answers_key, key
from prompt_recovery.recipe import Cell, Joined


def read_split(
    cells: Sequence[Cell | Joined],
    train_csv: str | Path | Sequence[str | Path],
    eval_fraction: float,
    seed: int,
    output_dir: str | Path | None = None,
    encoder: Any = None,
) -> tuple[pd.DataFrame, pd.DataFrame]:
    """(train, eval) rows of train_csv and of all files that cells name, cleaned, split once by
    prompt groups; the column file names the file. A cell takes its part of train with `rows_of`, so
    no cell trains on a prompt that is held out.

    Args:
        cells: of `comparison_grid.make_cells`.
        train_csv: one file of rows or several.
        eval_fraction, seed: the part of the rows that is held out, and what draws it.
        output_dir: the split is kept there as split.csv, and read back where an earlier run left
            it; None: it is not kept.
        encoder: tells prompts that are one task; None: their words alone do.

    Raises DataError as `splitting.read_or_split` does, and SeveralProcesses where this process was
    launched with others.
    """
    refuse_several(
        "A comparison",
        "start one script a card, each with its own CUDA_VISIBLE_DEVICES, its part of grid and its "
        "own output_dir",
    )
    own = [cell.train_csv for cell in cells if isinstance(cell, Cell)]
    named = [_paths(each) for each in [train_csv, *own] if each]
    names = list(dict.fromkeys(path for paths in named for path in paths))
    rows, account = data.clean_rows(data.read_rows(names))
    print(data.describe(rows, account))
    path = Path(output_dir) / "split.csv" if output_dir else None
    train, held_out = splitting.read_or_split(rows, path, eval_fraction, seed, encoder, again=True)
    print(splitting.describe_split(train, held_out))
    return train, held_out


def _paths(train_csv: str | Path | Sequence[str | Path]) -> list[str]:
    paths = [train_csv] if isinstance(train_csv, (str, Path)) else train_csv
    return [str(Path(path)) for path in paths]


def rows_of(cell: Cell, train_rows: pd.DataFrame) -> pd.DataFrame:
    """The rows that a cell trains on: its files, its filter, its number. Raises ComparisonError if
    too few are left."""
    rows = train_rows
    if cell.train_csv:
        rows = rows[rows["file"].isin(_paths(cell.train_csv))]
    if cell.row_filter:
        try:
            rows = rows.query(cell.row_filter)
        except Exception as error:  # whatever a text that is no query raises
            raise ComparisonError(
                f"row_filter={cell.row_filter!r}: {error}. Give a query for pandas."
            ) from error
    wanted = len(rows) if cell.train_rows is None else cell.train_rows
    if not len(rows) or wanted > len(rows) or wanted < 1:
        raise ComparisonError(
            f"A cell wants {wanted} rows, and train_csv and row_filter leave {len(rows)}: {cell}."
        )
    if wanted < len(rows):
        rows = rows.sample(frac=1, random_state=cell.seed).head(
            wanted
        )  # a smaller train_rows is a subset of a larger one
    return rows.reset_index(drop=True)


def check_cells(
    cells: Sequence[Cell | Joined],
    tokenizer: PreTrainedTokenizerFast,
    train_rows: pd.DataFrame,
    eval_rows: pd.DataFrame,
    model_dir: str | Path,
) -> None:
    """Raises ComparisonError naming the cells that can't be trained on their rows, or can't answer,
    before one is run. train_rows, eval_rows: of `read_split`. model_dir: the base's folder, of
    which the tokenizer is; no weights are read."""
    wrong = []
    for number, cell in enumerate(cells):
        if isinstance(cell, Joined):
            continue
        try:
            rows = rows_of(cell, train_rows)
            if cell.max_steps != 0:
                adapter.check_target_modules(cell.target_modules, model_dir)
                left_out = len(rows) - len(examples_of(cell, tokenizer, rows))
                if left_out:
                    print(
                        f"cell {number}: {left_out} of {len(rows)} rows can't be taught and are "
                        "left out"
                    )
            max_prompt_tokens = cell.max_tokens - cell.max_new_tokens
            encode_rows(
                tokenizer,
                eval_rows,
                max_tokens=max_prompt_tokens,
                format=cell.format,
                examples=shots_of(cell, rows),
            )
        except ValueError as error:
            wrong.append(f"cell {number}: {error}")
    if wrong:
        raise ComparisonError("\n".join(wrong))


def shots_of(cell: Cell, rows: pd.DataFrame) -> list[dict[Any, Any]]:
    """The rows that stand as examples before each row that is answered. Raises ComparisonError for
    too few rows."""
    if cell.few_shot > len(rows):
        raise ComparisonError(
            f"few_shot={cell.few_shot}, and the cell has {len(rows)} rows: give fewer, or more "
            "rows."
        )
    return rows.sample(cell.few_shot, random_state=cell.seed).to_dict("records")


def run_cells(cells: Sequence[Cell | Joined], *rows: Any, **options: Any) -> list[pd.DataFrame]:
    """`run_cell`'s table of each cell; that of joined cells holds their answers one after the
    other, and takes no run."""
    tables = {n: run_cell(c, *rows, **options) for n, c in enumerate(cells) if isinstance(c, Cell)}
    for number, cell in enumerate(cells):
        if isinstance(cell, Joined):
            tables[number] = joined([tables[each] for each in cell.adapters])
    return [tables[number] for number in range(len(cells))]


def joined(tables: Sequence[pd.DataFrame]) -> pd.DataFrame:
    table = pd.concat(tables, ignore_index=True)
    return table.assign(
        number=table.groupby("id", sort=False).cumcount(),
        seconds=sum(each["seconds"].iloc[0] for each in tables),
        adapter=" + ".join(each["adapter"].iloc[0] for each in tables),
    )


def run_cell(
    cell: Cell,
    base: PreTrainedModel,
    tokenizer: PreTrainedTokenizerFast,
    train_rows: pd.DataFrame,
    eval_rows: pd.DataFrame,
    output_dir: str | Path,
    *,
    model_dir: str | Path,
    fallback_prompt: str = "Please improve this text.",
) -> pd.DataFrame:
    """What the cell answers to eval_rows, one line an answer: id, number, answer, how, stopped,
    tokens, seconds (of the whole cell's answering), adapter (its folder's name, "" for the base).
    Read from output_dir if the cell was run before; adapters there serve other cells of the same
    training, and training that was killed goes on. base is left as it was.

    few-shot examples stand before rows that are answered; training sees none.

    Args:
        base, tokenizer: of the folder model_dir; base has no adapter on it.
        train_rows, eval_rows: of `read_split`.
        output_dir: keeps adapters and answers, each under a key of what it depends on.
        fallback_prompt: stands where an answer holds no prompt.

    Raises ComparisonError for a base with an adapter, and where too few rows are left.
    """
    if any(isinstance(module, BaseTunerLayer) for module in base.modules()):
        raise ComparisonError(
            "base holds a LoRA, of a cell that was interrupted, say: load the base again."
        )
    rows = rows_of(cell, train_rows)
    trained = cell.max_steps != 0
    # what the answers depend on, itself: the base as loaded, what it is trained on and asked, and
    # how it is read
    loaded = base_digest(base)
    examples = examples_of(cell, tokenizer, rows) if trained else []
    max_prompt_tokens = cell.max_tokens - cell.max_new_tokens
    prompts = encode_rows(
        tokenizer,
        eval_rows,
        max_tokens=max_prompt_tokens,
        format=cell.format,
        examples=shots_of(cell, rows),
    )
    made_of = key(loaded, cell.values("adapter"), examples)
    adapter_dir = Path(output_dir) / f"adapter-{made_of}" if trained else None
    answering: Any = base
    if adapter_dir is not None and not adapter_dir.is_dir():
        answering = _train(cell, base, base_id(model_dir), tokenizer, examples, adapter_dir)
    try:
        asked = cell.values("answers") | dict(fallback_prompt=fallback_prompt)
        named = answers_key(
            loaded, adapter_dir, tokenizer, eval_rows["id"].to_list(), prompts, asked
        )
        answers_csv = Path(output_dir) / f"answers-{named}.csv"
        if answers_csv.is_file():
            return files.read_csv(answers_csv, ("number", "tokens", "seconds"))
        if adapter_dir is not None and answering is base:
            answering = adapter.load_adapter(base, adapter_dir, model_dir)
        table = _answer(cell, answering, tokenizer, prompts, eval_rows, fallback_prompt)
    finally:
        if answering is not base:
            answering.unload()
    files.write_csv(table.assign(adapter=adapter_dir.name if adapter_dir else ""), answers_csv)
    return files.read_csv(answers_csv, ("number", "tokens", "seconds"))


def _answer(
    cell: Cell, model: Any, tokenizer: PreTrainedTokenizerFast, prompts: Sequence[Sequence[int]],
    eval_rows: pd.DataFrame, fallback_prompt: str,
) -> pd.DataFrame:  # fmt: skip
    temperature = cell.temperature if cell.answers_per_row > 1 else 0.0
    sampling = Sampling(cell.answers_per_row, temperature, cell.top_p, cell.seed)
    started = time.monotonic()
    results = answer_prompts(
        model,
        tokenizer,
        prompts,
        style=cell.style,
        max_new_tokens=cell.max_new_tokens,
        sampling=sampling,
        stop_at_object=False,  # else JSON would never be seen to end by EOS
    )
    lines = [
        (
            eval_rows["id"].iloc[position],
            number,
            *or_fallback(found, fallback_prompt),
            found.stopped,
            found.tokens,
        )
        for position, answers in sorted(results)
        for number, found in enumerate(answers)
    ]
    table = pd.DataFrame(lines, columns=["id", "number", "answer", "how", "stopped", "tokens"])
    return table.assign(seconds=round(time.monotonic() - started, 2))


def _train(
    cell: Cell, base: PreTrainedModel, base_name: str, tokenizer: PreTrainedTokenizerFast,
    examples: Sequence[Example], adapter_dir: Path,
) -> Any:  # fmt: skip
    lora = adapter.add_lora(
        base, base=base_name, r=cell.lora_r, alpha=cell.lora_alpha, dropout=cell.lora_dropout,
        target_modules=cell.target_modules, seed=cell.seed,
    )  # fmt: skip
    working = adapter_dir.with_name(adapter_dir.name.replace("adapter", "training"))
    try:
        training.train(
            lora, tokenizer, examples, [], replace(cell, output_dir=str(working), resume=True)
        )
        adapter.save_adapter(lora, adapter_dir, cell.format)
    except BaseException:  # the next cell gets the base as it was, after an interrupt too
        lora.unload()
        raise
    shutil.rmtree(working / "checkpoints")
    return lora


def examples_of(
    cell: Cell, tokenizer: PreTrainedTokenizerFast, rows: pd.DataFrame
) -> list[Example]:
    """The rows as this cell trains on them; those that can't be taught are left out. Raises
    TrainingError where none is left."""
    _, by_id, _ = usable_examples(tokenizer, rows, max_tokens=cell.max_tokens, format=cell.format)
    examples = list(by_id.values())
    if cell.supervise == "text":
        return [{"input_ids": each["input_ids"], "labels": each["input_ids"]} for each in examples]
    return examples
