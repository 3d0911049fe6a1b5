"""`make demo`: run both notebooks as they stand on the embedded tiny Mixtral, then report what came
out.

python demo/run.py [--rows path.csv]
"""

import argparse
import json
import os
import resource
import shutil
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import papermill
from make_rows import family_of

from prompt_recovery import data, files, metric
from prompt_recovery.quiet import silence_known_notices

ROOT = Path(__file__).resolve().parent.parent
DEMO = ROOT / "demo"
OUTPUT = ROOT / "outputs" / "demo"
MODEL = str(DEMO / "tiny-mixtral")

# Found on the tiny model (LOG.md): attention-only LoRA learns the task at rates far above Mixtral's
# 2e-5
# patience: the score of a dozen held-out prompts stands still for four of the ten evaluations
# (LOG.md, 2026-11-27)
SETTINGS = dict(
    learning_rate=5e-3,
    epochs=2.5,
    batch_size=8,
    gradient_accumulation=1,
    lora_dropout=0.0,
    patience=10,
)


def run_notebook(name: str, parameters: dict, target: str | None = None) -> float:
    """Run notebooks/NAME.ipynb into OUTPUT, as TARGET.ipynb, its prints and bars shown as they
    come; returns seconds.

    An error in a cell ends the program with that cell's message.
    """
    print(f"\n== notebooks/{name}.ipynb", flush=True)
    started = time.monotonic()
    try:
        papermill.execute_notebook(
            ROOT / "notebooks" / f"{name}.ipynb",
            OUTPUT / f"{target or name}.ipynb",
            parameters=parameters,
            cwd=ROOT,
            kernel_name="python3",
            progress_bar=False,
            stdout_file=sys.stdout,
            stderr_file=sys.stderr,
            # errors of cells come as such; the kernel's own log says that it talks over TCP, and
            # that it was ended
            extra_arguments=["--IPKernelApp.log_level=CRITICAL"],
        )
    except papermill.PapermillExecutionError as error:
        sys.exit(f"notebooks/{name}.ipynb stopped: {error.ename}: {error.evalue}")
    return time.monotonic() - started


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", type=Path, default=DEMO / "rows.csv", help="CSV to train on")
    rows = parser.parse_args(arguments).rows.resolve()
    silence_known_notices()  # of libraries, by name: those that are nothing to act on
    # the libraries' deprecation notes to each other, in the notebooks' kernels
    os.environ["PYTHONWARNINGS"] = "ignore"
    try:
        # a bad file is refused before any notebook starts and before earlier results go
        data.read_rows(rows)
    except data.DataError as error:
        sys.exit(str(error))
    shutil.rmtree(OUTPUT, ignore_errors=True)  # nothing of an earlier run is used
    OUTPUT.mkdir(parents=True)

    seconds = run_notebook("train", training(rows, "plain", OUTPUT / "train"))
    # a rehearsal: rows with their prompts, of which the model is shown the texts alone
    test, truths = (files.read_csv(DEMO / name) for name in ("test.csv", "test_truths.csv"))
    files.write_csv(test.merge(truths[["id", "rewrite_prompt"]], on="id"), OUTPUT / "rehearsal.csv")
    adapter = str(OUTPUT / "train" / "adapter")
    seconds += run_notebook("submission", rehearsal(adapter, OUTPUT / "submission.csv"))
    report(rows, seconds)


def training(rows: Path, style: str, output: Path) -> dict:
    """Parameters of notebooks/train."""
    return SETTINGS | dict(
        model_dir=MODEL,
        train_csv=str(rows),
        output_dir=str(output),
        style=style,
        four_bit=False,
        encoder_dir=str(metric.minilm_dir()),
    )


def rehearsal(adapter_dir: str | list[str], submission: Path, max_new_tokens: int = 32) -> dict:
    """Parameters of notebooks/submission. adapter_dir: one path or a list."""
    return dict(
        model_dir=MODEL,
        adapter_dir=adapter_dir,
        test_csv=str(OUTPUT / "rehearsal.csv"),
        submission_csv=str(submission),
        four_bit=False,
        max_new_tokens=max_new_tokens,
    )


def rehearsed(notebook: str = "submission") -> list[str]:
    """What a submission's notebook printed of its rehearsal, from the score on."""
    cells = json.loads((OUTPUT / f"{notebook}.ipynb").read_text())["cells"]
    outputs = [each for each in cells[-1]["outputs"] if each.get("name") == "stdout"]
    printed = "".join(part for each in outputs for part in each["text"])
    return printed[printed.index("rehearsal: ") :].splitlines()


def report(rows: Path, seconds: float) -> None:
    evaluation = json.loads((OUTPUT / "train" / "evaluation.json").read_text())
    predictions = files.read_csv(OUTPUT / "train" / "predictions.csv")
    truths = files.read_csv(DEMO / "test_truths.csv")
    answers = files.read_csv(OUTPUT / "submission.csv")["rewrite_prompt"]
    families = sum(
        family_of(answer) == family
        for answer, family in zip(answers, truths["family"], strict=True)
    )

    print("\n== report")
    print(
        f"rows        {len(data.read_rows(rows))} in {rows.name}, {evaluation['n']} of them held "
        "out for the report"
    )
    memory = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 2**20
    print(f"time        {seconds:.0f} s, peak memory {memory:.1f} GiB")
    interval = "{:.3f} to {:.3f}".format(*evaluation["scs_after_ci"])
    print(
        f"held out    SCS {evaluation['scs_before']:.3f} before, {evaluation['scs_after']:.3f} "
        f"after (95%: {interval}), {evaluation['stopped_by_eos']:.0%} of answers ended by "
        "themselves"
    )
    print("test.csv    other wordings, answered by notebooks/submission, which ended with:")
    for line in rehearsed():
        print(f"            {line}")
    if rows == DEMO / "rows.csv":  # the families are those of the embedded rows
        print(
            f"            {families} of {len(answers)} answers name the right family of rewriting"
        )
    else:
        print(
            "            The tiny model of 4.4 million parameters has read the embedded rows' kind "
            "alone.\n"
            "            On other rows its score stays near 0: it shows that your file is read and "
            "that\n"
            "            both notebooks run to their end. For answers, give notebooks/train a real "
            "base."
        )
    print(f"            encoder {metric.encoder_name(metric.minilm_dir())}")
    print("\nfive held-out answers beside their truths")
    for row in predictions.sample(min(5, len(predictions)), random_state=0).to_dict("records"):
        print(
            f"  truth   {row['rewrite_prompt']}\n  before  {row['before'][:90]!r}\n  after   "
            f"{row['after']}\n"
        )
    for path in (
        "train/adapter/",
        "train/evaluation.json",
        "train/predictions.csv",
        "train/loss.png",
        "rehearsal.csv",
        "submission.csv",
    ):
        print(f"  {os.path.relpath(OUTPUT / path, ROOT)}")
    gain = evaluation["scs_after"] - evaluation["scs_before"] if evaluation["n"] else 0
    if rows == DEMO / "rows.csv" and (
        gain < 0.25 or evaluation["stopped_by_eos"] < 1 or families < 0.6 * len(answers)
    ):
        sys.exit(
            "the demo misses its bar: gain in SCS >= 0.25, every answer ended by EOS, 60% of the "
            "right family"
        )


if __name__ == "__main__":
    main()
