"""The train notebook's script as it stands, on a 4-bit model folder of the true shape and rows of natural length.

python bench/train_notebook.py --model DIR --tokenizer tokenizer.model.v1 [--steps 20]

The weights are random, so losses and scores mean nothing; the seconds are those of a user with real ones. The encoder is
an untrained one made here, since only its place in the run matters.
"""

from __future__ import annotations

import argparse
import os
import random
import shutil
import sys
import time
import types
from pathlib import Path

import pandas as pd
import torch

ROOT = Path(__file__).resolve().parent.parent


def lengthened_rows(path: Path, count: int, seed: int = 0) -> pd.DataFrame:
    """Rows as long as the competition's: one to three of demo/natural_rows.csv after another, with the first one's prompt
    and a number, so that no two are duplicates."""
    natural = pd.read_csv(path, keep_default_na=False)
    choose = random.Random(seed)
    rows = []
    for number in range(count):
        parts = natural.sample(choose.choice([1, 1, 2, 2, 3]), random_state=choose.randrange(2**31))
        prompt = f"{parts['rewrite_prompt'].iloc[0]} ({number})"
        rows.append(["\n\n".join(parts["original_text"]), "\n\n".join(parts["rewritten_text"]), prompt])
    return pd.DataFrame(rows, columns=["original_text", "rewritten_text", "rewrite_prompt"])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--tokenizer", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--work", type=Path, default=Path("/tmp/bench-train-notebook"))
    args = parser.parse_args()
    shutil.rmtree(args.work, ignore_errors=True)
    args.work.mkdir(parents=True)
    shutil.copy2(args.tokenizer, args.model / "tokenizer.model")

    from sentence_transformers import SentenceTransformer
    from sentence_transformers.models import StaticEmbedding
    from tokenizers import Tokenizer

    words = Tokenizer.from_file(str(ROOT / "demo" / "tiny-mixtral" / "tokenizer.json"))
    SentenceTransformer(modules=[StaticEmbedding(words, embedding_dim=64)]).save(str(args.work / "encoder"))
    lengthened_rows(ROOT / "demo" / "natural_rows.csv", 480).to_csv(args.work / "rows.csv", index=False)

    if "IPython" not in sys.modules:
        try:
            import IPython.display  # noqa: F401
        except ImportError:  # pictures are not looked at here
            shown = types.ModuleType("IPython.display")
            shown.Image, shown.display = str, lambda *_: None  # type: ignore[attr-defined]
            top = types.ModuleType("IPython")
            top.get_ipython, top.version_info = lambda: None, (0,)  # type: ignore[attr-defined]
            sys.modules["IPython"], sys.modules["IPython.display"] = top, shown
            os.environ["MPLBACKEND"] = "agg"
    settings = dict(
        model_dir=str(args.model), train_csv=str(args.work / "rows.csv"), output_dir=str(args.work / "out"),
        encoder_dir=str(args.work / "encoder"), max_steps=args.steps, eval_fraction=0.05,
    )  # fmt: skip
    script = (ROOT / "notebooks" / "train.py").read_text()
    cells = script.split("# %%")
    place = next(number for number, cell in enumerate(cells) if 'tags=["parameters"]' in cell)
    cells.insert(place + 1, "\n" + "".join(f"{name} = {value!r}\n" for name, value in settings.items()))
    start = time.monotonic()
    variables = {"__name__": "__main__"}
    exec(compile("# %%".join(cells), "notebooks/train.py", "exec"), variables)  # our own notebook, as a kernel would

    seconds = time.monotonic() - start
    examples = variables["train_examples"]
    lengths = pd.Series([len(example["input_ids"]) for example in examples])
    log = pd.read_csv(args.work / "out" / "training_log.csv")
    print(f"\nrows {len(examples)}, tokens a row: median {lengths.median():.0f}, longest {lengths.max()}")
    print(f"whole notebook {seconds:.0f} s, peak {torch.cuda.max_memory_allocated() / 2**30:.1f} GiB; adapter of",
          sum(path.stat().st_size for path in (args.work / "out" / "adapter").iterdir()) // 2**20, "MiB")  # fmt: skip
    print(log.tail(3).to_string())


if __name__ == "__main__":
    main()
