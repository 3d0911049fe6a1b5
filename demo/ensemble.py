"""`make demo-ensemble`: after `make demo`, a second adapter of another style, and one submission of
both, beside each alone.

python demo/ensemble.py [--rows path.csv]
"""

import argparse
import os
from collections.abc import Sequence
from pathlib import Path

import run  # demo/run.py

from prompt_recovery import metric, score_report, scoring
from prompt_recovery.quiet import silence_known_notices

STYLE = "json"
LONGEST = 48  # tokens of an answer: the object's own take a dozen


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", type=Path, default=run.DEMO / "rows.csv", help="CSV to train on")
    rows = parser.parse_args(arguments).rows.resolve()
    silence_known_notices()  # of libraries, by name: those that are nothing to act on
    os.environ["PYTHONWARNINGS"] = "ignore"
    second = run.OUTPUT / f"train-{STYLE}"
    seconds = run.run_notebook("train", run.training(rows, STYLE, second), second.name)
    adapters = [str(folder / "adapter") for folder in (run.OUTPUT / "train", second)]
    submissions = [run.OUTPUT / "submission.csv"]
    for name, adapter_dir in ((STYLE, adapters[1]), ("joined", adapters)):
        target = run.OUTPUT / f"submission-{name}.csv"
        parameters = run.rehearsal(adapter_dir, target, LONGEST)
        if name == "joined":
            parameters["combine"] = "join"
        seconds += run.run_notebook("submission", parameters, target.stem)
        submissions.append(target)

    folder = metric.minilm_dir()
    scored = scoring.score_files(
        submissions, run.OUTPUT / "rehearsal.csv", metric.load_encoder(folder)
    )
    page = run.OUTPUT / "scores.html"
    name = metric.encoder_name(folder)
    score_report.write_page(scored, name, page)
    print(f"\n== report\n{score_report.text_report(scored, name)}")
    print("\nthe joined submission's notebook ended with:")
    for line in run.rehearsed("submission-joined"):
        print(f"  {line}")
    print(f"\n{seconds:.0f} s; {os.path.relpath(page, run.ROOT)} has all of it with whole texts")


if __name__ == "__main__":
    main()
