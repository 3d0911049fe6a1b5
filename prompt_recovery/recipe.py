"""The settings of a training and of its answers: every default once, each value read and checked.

A notebook's parameters are flat variables. `Recipe.of(globals())` makes them a Recipe, and refuses
what can't work, before anything loads. What is plainly a number is read as one: "2e-5", 64.0, "64".
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from prompt_recovery.settings import (
    Settings,
    cell_numbers,
    choice,
    flag,
    mapping,
    number,
    optional,
    path,
    reporter,
    setting,
    text,
    texts,
    whole,
)
from prompt_recovery.templates import STYLES, SYSTEM_PLACEMENTS

PADS = ("<pad>", "unk")
STRATEGIES = ("first", "join", "agree")  # to make one answer of several
FALLBACK = "Please improve this text while keeping its original meaning but altering the tone."
MOST_TOKENS = 4096  # of a prompt with its answer, in a submission


@dataclass(frozen=True, kw_only=True)
class Format(Settings):
    """How rows are put to the model and how it answers. An adapter answers in the one it was
    trained for."""

    style: str = setting("plain", choice(*STYLES))
    system_placement: str = setting("user", choice(*SYSTEM_PLACEMENTS))


@dataclass(frozen=True, kw_only=True)
class Answering(Settings):
    """How many answers a row gets, how long they are, how they are drawn and made into one."""

    max_new_tokens: int = setting(64, whole(1, MOST_TOKENS // 2), "answers")
    answers_per_row: int = setting(1, whole(1, 64), "answers")
    # of all answers but the first, which is greedy; 0 is for one that draws none
    temperature: float = setting(0.8, number(0, 5), "answers")
    top_p: float = setting(0.95, number(0.01, 1), "answers")
    combine: str = setting("first", choice(*STRATEGIES), "score")

    def conflicts(self) -> Iterator[str]:
        if self.temperature < 0.01 and (self.answers_per_row > 1 or self.temperature > 0):
            yield (
                f"temperature={self.temperature:g}: all answers_per_row={self.answers_per_row} "
                "answers would be the same; give a number from 0.01 up to 5, or 0 with "
                "answers_per_row=1."
            )


@dataclass(frozen=True, kw_only=True)
class Recipe(Settings):
    """A training, from its rows to its adapter.

    Figures are those of the system this design comes from: rank 16, alpha 64, dropout 0.1 on q, k,
    v and o; learning rate 2e-5, linear, 30 steps of warm-up; 8 rows times 2 a step.

    Kinds: "adapter", what its weights depend on; "run", what else a resumed run must share;
    "rows", which rows are trained on; "answers", what answers depend on beside the model.
    """

    model_dir: Any = setting(None, optional(path, "the one under input_dir"))
    # a tuple of paths
    train_csv: Any = setting(None, optional(texts, "all files of rows under input_dir"), "rows")
    input_dir: str = setting("/kaggle/input", path)
    output_dir: str = setting("outputs/train", path)
    style: str = setting("plain", choice(*STYLES), "adapter", "answers")
    system_placement: str = setting("user", choice(*SYSTEM_PLACEMENTS), "adapter", "answers")
    # prompt and answer together
    max_tokens: int = setting(640, whole(32, 32768), "adapter", "answers")
    max_steps: int = setting(-1, whole(1, 10**7, "for as many as the epochs take"), "adapter")
    epochs: float = setting(5.0, number(0, 1000, above=True), "adapter")
    learning_rate: float = setting(2e-5, number(1e-9, 1), "adapter")
    warmup_steps: int = setting(30, whole(0, 10**7), "adapter")  # at most a tenth of all steps
    lora_r: int = setting(16, whole(1, 1024), "adapter")
    lora_alpha: int = setting(64, whole(1, 65536), "adapter")
    lora_dropout: float = setting(0.1, number(0, 1, below=True), "adapter")
    target_modules: tuple[str, ...] = setting(
        ("q_proj", "k_proj", "v_proj", "o_proj"), texts, "adapter"
    )
    batch_size: int = setting(8, whole(1, 65536), "adapter")
    gradient_accumulation: int = setting(2, whole(1, 65536), "adapter")
    eval_fraction: float = setting(0.1, number(0, 1, below=True))
    four_bit: bool | None = setting(None, optional(flag), "run")
    pad: str = setting("<pad>", choice(*PADS))
    encoder_dir: Any = setting(None, optional(path, "the one under input_dir"))
    seed: int = setting(0, whole(0, 2**32 - 1), "adapter", "answers")
    resume: bool | None = setting(None, optional(flag, "what input_dir holds"))
    time_budget_hours: float | None = setting(None, optional(number(0, 168, above=True)))
    # evaluations without gain; not in fewer than 20 steps that are evaluated one by one
    patience: int = setting(3, whole(1, 10**9), "run")
    evaluations: int = setting(10, whole(1, 10**6), "run")  # in the whole run
    report_to: str = setting("none", reporter)
    # None: a memory plan's, on a GPU
    activation_checkpointing: bool | None = setting(None, optional(flag))

    @property
    def format(self) -> Format:
        return Format(style=self.style, system_placement=self.system_placement)


@dataclass(frozen=True, kw_only=True)
class Cell(Recipe, Answering):
    """A recipe, how its adapter answers, and what only comparisons need."""

    train_csv: Any = setting(None, optional(texts, "all files of the grid"), "rows")
    # pandas, such as "rewrite_prompt.str.len() < 80"
    row_filter: str | None = setting(None, optional(text), "rows")
    # that many, drawn by seed
    train_rows: int | None = setting(None, optional(whole(1, 10**9), "all"), "rows")
    # rows that stand as examples before each row
    few_shot: int = setting(0, whole(0, 64), "answers")
    # 0: the base
    max_steps: int = setting(-1, whole(0, 10**7, "for as many as the epochs take"), "adapter")
    # answer | text: all tokens, as the usual recipes do
    supervise: str = setting("answer", choice("answer", "text"), "adapter")

    def conflicts(self) -> Iterator[str]:
        yield from super().conflicts()
        if self.max_new_tokens >= self.max_tokens:
            yield (
                f"max_new_tokens={self.max_new_tokens}: prompt and answer have "
                f"max_tokens={self.max_tokens} together; give fewer, or raise max_tokens."
            )


@dataclass(frozen=True, kw_only=True)
class Joined(Settings):
    """Cells of a grid whose adapters answer each row together; nothing is run for it."""

    adapters: tuple[int, ...] = setting((), cell_numbers)  # by their places in the grid, from 0
    combine: str = setting("join", choice("join", "agree"))


@dataclass(frozen=True, kw_only=True)
class Grid(Settings):
    """The parameters of notebooks/compare."""

    model_dir: str = setting("demo/tiny-mixtral", path)
    train_csv: tuple[str, ...] = setting(("demo/rows.csv",), texts)
    output_dir: str = setting("outputs/compare", path)
    encoder_dir: str | None = setting(None, optional(path, "MiniLM"))
    grid: Any = setting(
        (), lambda value: value
    )  # `comparison_grid.make_cells` checks it and shared
    shared: Any = setting(None, mapping)
    mean_prompt: str | None = setting(None, optional(text, "no such column"))
    eval_fraction: float = setting(0.1, number(0, 1, above=True, below=True))
    four_bit: bool | None = setting(None, optional(flag))
    seed: int = setting(0, whole(0, 2**32 - 1))


@dataclass(frozen=True, kw_only=True)
class SubmissionSettings(Answering):
    """The parameters of notebooks/submission."""

    model_dir: Any = setting(None, optional(path, "the one under input_dir"))
    # a tuple of paths; each adapter answers every row
    adapter_dir: Any = setting(None, optional(texts, "those under input_dir"))
    test_csv: Any = setting(None, optional(path, "the one under input_dir"))
    input_dir: str = setting("/kaggle/input", path)
    submission_csv: str = setting("/kaggle/working/submission.csv", path)
    time_budget_hours: float = setting(8.5, number(0, 168, above=True))
    fallback_prompt: str = setting(FALLBACK, text)
    style: Any = setting(None, optional(choice(*STYLES), "the adapter's"), "answers")
    system_placement: Any = setting(
        None, optional(choice(*SYSTEM_PLACEMENTS), "the adapter's"), "answers"
    )
    four_bit: bool | None = setting(None, optional(flag))
    mean_prompt: str | None = setting(None, optional(text, "no mean prompt"))
    threshold: float | None = setting(None, optional(number(-1, 2), "no threshold"))
    encoder_dir: str | None = setting(None, optional(path, "no encoder"))
    allow_base: bool = setting(False, flag)
    answer_public_test: bool = setting(False, flag)

    def conflicts(self) -> Iterator[str]:
        yield from super().conflicts()
        others = []
        if self.encoder_dir is None and (self.combine == "agree" or self.threshold is not None):
            others.append(
                "encoder_dir=None: agree and threshold need an encoder: give its folder, or"
                " combine='first' or 'join'."
            )
        if self.threshold is not None and self.mean_prompt is None:
            others.append(
                f"threshold={self.threshold}: there is no mean_prompt to fall back to: give one, "
                "or no threshold."
            )
        # alone it is left to `submission.prepare` while adapters are still to be found
        if self.adapter_dir is not None or self.answers_per_row > 1 or others:
            yield from self.uncombined()
        yield from others

    def uncombined(self) -> Iterator[str]:
        """A line where a row gets several answers and one is wanted, or one and several are
        wanted."""
        answers = len(self.adapter_dir or ("the base",)) * self.answers_per_row
        if (answers > 1) != (self.combine != "first" or self.threshold is not None):
            yield (
                f"answers_per_row={self.answers_per_row}, adapter_dir={self.adapter_dir}, "
                f"combine={self.combine!r}, threshold={self.threshold}: several answers are for "
                "join, agree or a threshold, which do nothing with one. Set answers_per_row to 2 "
                "or more, or adapter_dir to several, with them; or both to one with first."
            )
