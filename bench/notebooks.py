"""The scripts of the train and submission notebooks, one after the other and without early
stopping, on a 4-bit model folder of the true shape and texts of natural length.

python bench/notebooks.py --model DIR --tokenizer tokenizer.model.v1 [--steps 20] [--rows 1300]

The weights are random, so losses, answers and scores mean nothing; the seconds are those of a user
with real ones whose answers all take 64 tokens. The encoder is an untrained one made here, since
only its place in the run matters.
"""

from __future__ import annotations

import argparse
import gc
import os
import random
import shutil
import sys
import time
import types
from pathlib import Path
from typing import Any

import pandas as pd
import torch

ROOT = Path(__file__).resolve().parent.parent
GIB = 2**30


def lengthened_rows(path: Path, count: int, seed: int = 0) -> pd.DataFrame:
    """Rows as long as the competition's: one to three of demo/natural_rows.csv after another, with
    the first one's prompt and a number, so that no two are duplicates."""
    natural = pd.read_csv(path, keep_default_na=False)
    choose = random.Random(seed)
    rows = []
    for number in range(count):
        parts = natural.sample(choose.choice([1, 1, 2, 2, 3]), random_state=choose.randrange(2**31))
        prompt = f"{parts['rewrite_prompt'].iloc[0]} ({number})"
        rows.append(
            ["\n\n".join(parts["original_text"]), "\n\n".join(parts["rewritten_text"]), prompt]
        )
    return pd.DataFrame(rows, columns=["original_text", "rewritten_text", "rewrite_prompt"])


def run_notebook(name: str, **settings: Any) -> dict[str, Any]:
    """Run a notebook's script with these parameters, as a kernel would; its variables."""
    script = (ROOT / "notebooks" / f"{name}.py").read_text()
    cells = script.split("# %%")
    place = next(number for number, cell in enumerate(cells) if 'tags=["parameters"]' in cell)
    cells.insert(
        place + 1, "\n" + "".join(f"{name} = {value!r}\n" for name, value in settings.items())
    )
    variables: dict[str, Any] = {"__name__": "__main__"}
    torch.cuda.reset_peak_memory_stats()
    start = time.monotonic()
    exec(compile("# %%".join(cells), f"notebooks/{name}.py", "exec"), variables)  # our own notebook
    seconds, peak = time.monotonic() - start, torch.cuda.max_memory_allocated() / GIB
    print(
        f"\n== notebooks/{name}: {seconds:.0f} s as a whole, peak {peak:.1f} GiB of GPU memory\n",
        flush=True,
    )
    return variables


def without_pictures() -> None:
    os.environ["MPLBACKEND"] = "agg"
    try:
        import IPython.display  # noqa: F401
    except ImportError:
        shown = types.ModuleType("IPython.display")
        shown.Image, shown.display = str, lambda *_: None  # type: ignore[attr-defined]
        top = types.ModuleType("IPython")
        top.get_ipython, top.version_info = lambda: None, (0,)  # type: ignore[attr-defined]
        sys.modules["IPython"], sys.modules["IPython.display"] = top, shown


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--tokenizer", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--rows", type=int, default=1300)
    parser.add_argument("--work", type=Path, default=Path("/tmp/bench-notebooks"))
    args = parser.parse_args()
    shutil.rmtree(args.work, ignore_errors=True)
    args.work.mkdir(parents=True)
    shutil.copy2(args.tokenizer, args.model / "tokenizer.model")
    without_pictures()
    torch.cuda.init()

    from sentence_transformers import SentenceTransformer
    from sentence_transformers.models import StaticEmbedding
    from tokenizers import Tokenizer

    words = Tokenizer.from_file(str(ROOT / "demo" / "tiny-mixtral" / "tokenizer.json"))
    SentenceTransformer(modules=[StaticEmbedding(words, embedding_dim=64)]).save(
        str(args.work / "encoder")
    )
    natural = ROOT / "demo" / "natural_rows.csv"
    lengthened_rows(natural, 480).to_csv(args.work / "rows.csv", index=False)
    test = lengthened_rows(natural, args.rows, seed=1).drop(columns="rewrite_prompt")
    test.to_csv(args.work / "test.csv", index_label="id")

    trained = run_notebook(
        "train",
        model_dir=str(args.model),
        train_csv=str(args.work / "rows.csv"),
        output_dir=str(args.work / "out"),
        encoder_dir=str(args.work / "encoder"),
        max_steps=args.steps,
        eval_fraction=0.05,
        patience=10**9,  # random weights do not learn, which would end the run
    )
    lengths = pd.Series([len(example["input_ids"]) for example in trained["train_examples"]])
    print(
        f"rows {len(lengths)}, tokens a row: median {lengths.median():.0f}, longest {lengths.max()}"
    )
    size = sum(path.stat().st_size for path in (args.work / "out" / "adapter").iterdir())
    print(f"adapter of {size / 2**20:.1f} MiB; {trained['evaluation']}")
    print(pd.read_csv(args.work / "out" / "training_log.csv").tail(3).to_string())
    trained.clear()
    gc.collect()
    torch.cuda.empty_cache()

    answered = run_notebook(
        "submission", model_dir=str(args.model), adapter_dir=str(args.work / "out" / "adapter"),
        test_csv=str(args.work / "test.csv"), submission_csv=str(args.work / "submission.csv"),
        input_dir=str(args.work / "out"),
    )  # fmt: skip
    report = answered["report"]
    print(report.groupby(["source", "how", "stopped"]).size().to_string())
    print(f"{report['tokens'].sum()} tokens written for {len(report)} rows")


if __name__ == "__main__":
    main()
