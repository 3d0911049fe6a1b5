"""test.csv -> submission.csv: find the inputs, answer the rows, write the file whole and valid at every moment."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path
from typing import Any

import pandas as pd

from prompt_recovery.generation import answer_rows

KAGGLE_INPUT = Path("/kaggle/input")


class SubmissionError(ValueError):
    """Inputs that cannot be found, or a submission that must not be handed in."""


def find_inputs(
    model_dir: str | None, adapter_dir: str | None, test_csv: str | None, root: str | Path = KAGGLE_INPUT
) -> tuple[Path, Path, Path]:
    """The three paths; those that are None are looked for under root: a folder with adapter_config.json, a test.csv, and
    a folder with a causal language model's config.json. Zero or several matches raise SubmissionError listing them."""
    root = Path(root)

    def look(name: str, pattern: str, is_file: bool) -> Path:
        found = sorted(root.rglob(pattern))
        if pattern == "config.json":
            found = [path for path in found if _is_language_model(path)]
        found = found if is_file else [path.parent for path in found]
        if len(found) != 1:
            listed = "\n  ".join(map(str, found)) or "nothing"
            raise SubmissionError(
                f"{name} is None and {len(found)} places under {root} match {pattern}:\n  {listed}\n"
                f"Attach exactly one as input, or set {name} in the parameters cell."
            )
        return found[0]

    return (
        Path(model_dir) if model_dir else look("model_dir", "config.json", False),
        Path(adapter_dir) if adapter_dir else look("adapter_dir", "adapter_config.json", False),
        Path(test_csv) if test_csv else look("test_csv", "test.csv", True),
    )


def _is_language_model(config: Path) -> bool:
    architectures = json.loads(config.read_text(encoding="utf-8")).get("architectures") or []
    return any(name.endswith("ForCausalLM") for name in architectures)


def write_submission(test: pd.DataFrame, answers: dict[int, str], fallback_prompt: str, path: str | Path) -> None:
    """Write id, rewrite_prompt for every test row in order, the fallback where `answers` (by position) has none.

    Written beside the target and moved over it, so that a reader never sees half a file.
    """
    prompts = [answers.get(position, fallback_prompt) for position in range(len(test))]
    frame = pd.DataFrame({"id": test["id"].to_list(), "rewrite_prompt": prompts}, columns=["id", "rewrite_prompt"])
    target = Path(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    partial = target.with_name(target.name + ".partial")
    frame.to_csv(partial, index=False)
    os.replace(partial, target)


def check_submission(test: pd.DataFrame, path: str | Path) -> None:
    """Read the file back: the same ids in the same order, two columns, no blank. Raises SubmissionError otherwise."""
    frame = pd.read_csv(path, dtype=str, keep_default_na=False)
    if list(frame.columns) != ["id", "rewrite_prompt"]:
        raise SubmissionError(f"{path} has the columns {list(frame.columns)}; it needs id, rewrite_prompt.")
    if frame["id"].to_list() != test["id"].to_list():
        raise SubmissionError(f"{path} does not have the ids of test.csv in its order; write it from test.csv again.")
    blank = frame.index[frame["rewrite_prompt"].str.strip() == ""].to_list()
    if blank:
        raise SubmissionError(
            f"{path}: rows {blank[:5]} are blank, which fails the whole submission; set fallback_prompt."
        )


def answer_test(
    model: Any,
    tokenizer: Any,
    test: pd.DataFrame,
    submission_csv: str | Path,
    *,
    fallback_prompt: str,
    time_budget_hours: float,
    **options: Any,
) -> pd.DataFrame:
    """Answer every test row into submission_csv; returns id, answer, how, stopped in test order.

    The file holds fallbacks first and is rewritten as answers come, at most once in ten seconds; when the time is used
    up the rest keep the fallback (how = "out of time"). options: passed to `answer_rows`.
    Raises SubmissionError for a blank fallback, before anything is answered.
    """
    if not fallback_prompt.strip():
        raise SubmissionError(
            "fallback_prompt is blank; a blank answer fails the whole submission. Give a real prompt."
        )
    deadline = time.monotonic() + time_budget_hours * 3600
    answers: dict[int, str] = {}
    report = pd.DataFrame({"id": test["id"], "answer": fallback_prompt, "how": "out of time", "stopped": ""})
    write_submission(test, answers, fallback_prompt, submission_csv)
    written = time.monotonic()
    results = answer_rows(model, tokenizer, test, fallback_prompt=fallback_prompt, deadline=deadline, **options)
    for position, (recovered, *_) in results:
        answers[position] = recovered.prompt
        report.loc[position, ["answer", "how", "stopped"]] = list(recovered[:3])
        if time.monotonic() - written > 10:
            write_submission(test, answers, fallback_prompt, submission_csv)
            written = time.monotonic()
    write_submission(test, answers, fallback_prompt, submission_csv)
    check_submission(test, submission_csv)
    return report
