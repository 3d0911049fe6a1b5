"""Fine-tune a LoRA on rows: memory plan, checkpoints, resume.

A run killed at any moment goes on from its last whole checkpoint, with the same batches and the
same random numbers as if it had not been killed.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import pandas as pd
import torch
from peft import PeftModel
from transformers import EarlyStoppingCallback, PreTrainedTokenizerFast, TrainingArguments

from prompt_recovery.adapter import training_key
from prompt_recovery.agreement import check_same, describe
from prompt_recovery.base import base_digest
from prompt_recovery.callbacks import EndInTime, KeepTwo, OrderOfEpoch, WatchGradients, WriteLog
from prompt_recovery.data import rows_hash
from prompt_recovery.engine import (
    TrainingPlan,
    apply_plan,
    everywhere,
    named_if_lost,
    processes,
    release_buffers,
    training_plan,
)
from prompt_recovery.examples import (
    IGNORED,
    Example,
    TrainingError,
    answer_length,
    check_supervised,
    collate,
)
from prompt_recovery.keys import key
from prompt_recovery.metric import encoder_hash
from prompt_recovery.recipe import Recipe
from prompt_recovery.resuming import finished, go_on_from
from prompt_recovery.run_lock import claimed
from prompt_recovery.time_budget import TrainingTime
from prompt_recovery.trainer import RowTrainer
from prompt_recovery.training_log import ending, training_log


def train(
    model: PeftModel,
    tokenizer: PreTrainedTokenizerFast,
    train_examples: Sequence[Example],
    eval_examples: Sequence[Example],
    recipe: Recipe,
    *,
    score: Callable[[], float] | None = None,
    scored_with: Mapping[str, Any] | None = None,
    allowed: TrainingTime | None = None,
) -> pd.DataFrame:
    """Train the adapter in place and leave it at its best checkpoint (the last one without eval
    rows).

    Best is the highest score() if that is given (mean SCS of the answers to held-out rows, say),
    and among equal ones the lowest eval loss; else the lowest eval loss. Which step is kept and why
    training ended is printed. Held-out prompts have wordings that were never trained on, so their
    loss can rise while the answers get better: on the demo it is lowest after 10% of the steps,
    where 30% of the answers are right, and 98% are at the end (LOG.md).

    Args:
        model: of `adapter.add_lora`.
        tokenizer: by which the examples were made.
        train_examples, eval_examples: of `examples.usable_examples`; the latter may be none.
        recipe: `evaluations` says how often eval loss is measured and a checkpoint kept; training
            stops after `patience` of them without gain, but not in a run of fewer than 20 steps
            whose evaluations are 10 or more, which stand at single steps. With `resume` it goes on
            from the last whole checkpoint under output_dir/checkpoints, if there is one; else
            these are moved aside. With activation_checkpointing None, a memory plan chooses on a
            GPU how many rows are computed at a time and which layers are checkpointed, and on a
            CPU none is; True and False take batch_size rows at a time with every layer or none.
        score: of the answers to held-out rows, by the model as it is when it is called.
        scored_with: what score() depends on, such as its encoder; a resumed run must share it.
        allowed: training ends in time for what comes behind it, with a checkpoint from which a run
            that resumes goes on as if it had not ended. The adapter is then the best one so far.

    Out of memory, the run goes on with fewer rows at a time. Under `accelerate launch` the rows of
    a step are shared out to the processes.

    On a GPU without bf16 the computation is autocast to fp16, the adapter stays in fp32, and a loss
    scaler leaves out steps whose gradients are not finite; they are counted in the log.

    Returns the log (see `training_log`), also written to output_dir/training_log.csv. Its
    attrs["ended"] says which step is kept and why training ended.
    Raises TrainingError where the rows of a step can't be shared out evenly, processes differ in
    what they must share, or a loss or gradient is not finite; ProcessLost where another process is;
    RunFolderError where another run has output_dir, or its checkpoints belong to other rows or
    settings; TooLittleMemory where one row does not fit.
    """
    with named_if_lost(), claimed(recipe.output_dir) as writes:
        sides = train_examples, eval_examples
        return _train(model, tokenizer, *sides, recipe, score, scored_with, allowed, writes)


def check_together(recipe: Recipe, rows: pd.DataFrame) -> None:
    """All that several processes of one training must share, as far as it shows before the base is
    loaded; each of them must call it.

    Raises TrainingError, in all of them, where settings, rows, encoder, base or libraries differ,
    or the rows of a step can't be shared out.
    """
    state = processes()
    # they all meet first: one that ended before would be lost to those that were on their way
    everywhere(lambda: _rows_a_process(recipe))
    if state.num_processes > 1:
        check_same(
            **recipe.values("adapter", "run", "answers"), pad=recipe.pad,
            resume=bool(recipe.resume), eval_fraction=recipe.eval_fraction,
            rows=rows_hash(rows), base=base_digest(recipe.model_dir, recipe.four_bit),
            encoder=encoder_hash(recipe.encoder_dir),
        )  # fmt: skip
        state.print(describe())


class _Course(NamedTuple):
    """Steps of a training: rows of each, how many there are, from one line of the log to the next,
    from one evaluation and checkpoint to the next; whether it may stop early."""

    rows: int
    steps: int
    log: int
    evaluate: int
    stops_early: bool


def _course(recipe: Recipe, examples: int) -> _Course:
    rows = recipe.batch_size * recipe.gradient_accumulation
    steps = math.ceil(recipe.epochs * math.ceil(examples / rows))
    steps = recipe.max_steps if recipe.max_steps > 0 else steps
    log = max(1, steps // (recipe.evaluations * 5))
    # a multiple: a resumed log has no gap
    every = log * max(1, steps // (recipe.evaluations * log))
    # each step would be an evaluation, and the run might end at the fourth with the first kept
    short = steps < 2 * Recipe.evaluations <= 2 * recipe.evaluations
    return _Course(rows, steps, log, every, stops_early=not short)


def _train(
    model: PeftModel,
    tokenizer: PreTrainedTokenizerFast,
    train_examples: Sequence[Example],
    eval_examples: Sequence[Example],
    recipe: Recipe,
    score: Callable[[], float] | None,
    scored_with: Mapping[str, Any] | None,
    allowed: TrainingTime | None,
    writes: bool,
) -> pd.DataFrame:
    state = processes()
    check_supervised(train_examples, tokenizer.eos_token_id)
    course = _course(recipe, len(train_examples))
    settings = recipe.values("adapter", "run") | dict(
        scored=score is not None, **training_key(model), train_rows=key(list(train_examples)),
        eval_rows=key(list(eval_examples)), rows_a_step=course.rows, **(scored_with or {}),
    )  # fmt: skip
    on_gpu = torch.cuda.is_available()
    bf16 = on_gpu and torch.cuda.is_bf16_supported(including_emulation=False)
    check_same(
        **settings, resume=bool(recipe.resume), bf16=bf16, gpu=on_gpu,
        activation_checkpointing=recipe.activation_checkpointing, in_time=allowed is not None,
    )  # fmt: skip
    # 2 x 4 and 4 x 2 rows are the same step
    for name in ("batch_size", "gradient_accumulation"):
        del settings[name]
    last = go_on_from(settings, recipe, course.evaluate, writes)
    if last and (log := finished(last, model, recipe, course.steps)) is not None:
        return log
    model.config.use_cache = False
    plan = plan_of(model, train_examples, recipe, bf16)
    apply_plan(model, plan)
    state.print(plan)
    arguments = _arguments(recipe, course, plan, len(eval_examples) > 0, score is not None, bf16)
    # on a disk of its own
    arguments.save_on_each_node = writes and not state.is_main_process
    trainer = _trainer(model, tokenizer, train_examples, eval_examples, recipe, course, arguments)
    trainer.score = score
    trainer.add_callback(WatchGradients(trainer))
    if allowed is not None:
        trainer.add_callback(EndInTime(trainer, allowed))
    try:
        trainer.train(resume_from_checkpoint=str(last) if last else None)
    finally:
        model.config.use_cache = True
        release_buffers(model)
        model.eval()
    log = training_log(trainer.state.log_history)
    log.attrs["ended"] = ending(
        vars(trainer.state), course.steps, recipe.patience, trainer.out_of_time
    )
    state.print(log.attrs["ended"])
    return log


def _trainer(
    model: PeftModel,
    tokenizer: PreTrainedTokenizerFast,
    train_examples: Sequence[Example],
    eval_examples: Sequence[Example],
    recipe: Recipe,
    course: _Course,
    arguments: TrainingArguments,
) -> RowTrainer:
    # rows without a label: accelerate would repeat the first rows where the last ones are too few
    # for all processes
    sharing = processes().num_processes
    filler = [{"input_ids": [tokenizer.eos_token_id], "labels": [IGNORED]}]
    fill, eval_fill = (
        -len(examples) % rows if sharing > 1 else 0
        for examples, rows in (
            (train_examples, course.rows),
            (eval_examples, recipe.batch_size * sharing),
        )
    )
    has_eval = len(eval_examples) > 0
    patience = EarlyStoppingCallback(early_stopping_patience=recipe.patience)
    trainer = RowTrainer(
        model=model,
        args=arguments,
        train_dataset=[*train_examples, *filler * fill],
        eval_dataset=[*eval_examples, *filler * eval_fill] if has_eval else None,
        data_collator=lambda batch: collate(batch, tokenizer.pad_token_id),
        callbacks=[WriteLog(Path(recipe.output_dir) / "training_log.csv"), KeepTwo()]
        + ([patience] if has_eval and course.stops_early else []),
    )
    trainer.add_callback(OrderOfEpoch(trainer))
    trainer.fill = fill
    trainer.rows_in_order = course.rows
    return trainer


def _arguments(
    recipe: Recipe,
    course: _Course,
    plan: TrainingPlan,
    has_eval: bool,
    scored: bool,
    bf16: bool,
) -> TrainingArguments:
    """Trainer's own settings."""
    on_gpu = torch.cuda.is_available()
    arguments = TrainingArguments(
        output_dir=str(Path(recipe.output_dir) / "checkpoints"),
        max_steps=course.steps,
        learning_rate=recipe.learning_rate,
        warmup_steps=min(recipe.warmup_steps, course.steps // 10),
        lr_scheduler_type="linear",
        optim="paged_adamw_8bit" if on_gpu else "adamw_torch",
        per_device_train_batch_size=plan.rows,
        gradient_accumulation_steps=plan.accumulation,
        per_device_eval_batch_size=recipe.batch_size,
        max_grad_norm=1.0,
        bf16=bf16,
        fp16=on_gpu and not bf16,
        use_cpu=not on_gpu,
        eval_strategy="steps" if has_eval else "no",
        eval_steps=course.evaluate,
        save_strategy="steps",
        save_steps=course.evaluate,
        logging_steps=course.log,
        report_to=recipe.report_to,
        seed=recipe.seed,
        load_best_model_at_end=has_eval,
        # else a loss that is not finite is logged as the mean of those before
        logging_nan_inf_filter=False,
        # else a resumed run forgets how long it has not improved
        restore_callback_states_from_checkpoint=True,
        metric_for_best_model=("eval_choice" if scored else "eval_loss") if has_eval else None,
        greater_is_better=scored if has_eval else None,
        remove_unused_columns=False,
        label_names=["labels"],
        dataloader_pin_memory=on_gpu,
        ddp_find_unused_parameters=False,
    )
    # one process computes on one card: of several that it sees, Trainer would give each a batch and
    # train on all rows of these, or copy the model to them
    arguments._n_gpu = min(arguments.n_gpu, 1)
    return arguments


def _rows_a_process(recipe: Recipe) -> int:
    """Rows of a step that each process computes. Raises TrainingError where they can't be shared
    out."""
    sharing = processes().num_processes
    batch, accumulation = recipe.batch_size, recipe.gradient_accumulation
    rows, left = divmod(batch * accumulation, sharing)
    if left:
        raise TrainingError(
            f"batch_size {batch} x gradient_accumulation {accumulation}: {batch * accumulation} "
            f"rows can't be shared by {sharing} processes. Make the product a multiple of their "
            "number."
        )
    return rows


def plan_of(
    model: PeftModel, examples: Sequence[Example], recipe: Recipe, bf16: bool
) -> TrainingPlan:
    """The plan of a run: on a GPU by its memory, the same in all processes; else, and where the
    recipe says what is checkpointed, batch_size rows at a time. Raises as `train` does."""
    rows = _rows_a_process(recipe)
    if torch.cuda.is_available() and recipe.activation_checkpointing is None:
        longest = max(len(example["input_ids"]) for example in examples)
        answer = max(answer_length(example) for example in examples)
        dtype = torch.bfloat16 if bf16 else torch.float16
        plan, *_ = everywhere(lambda: training_plan(model, longest, answer, rows, dtype))
        return plan
    micro = math.gcd(rows, recipe.batch_size)
    layers = (
        model.config.get_text_config().num_hidden_layers if recipe.activation_checkpointing else 0
    )
    return TrainingPlan(micro, rows // micro, checkpointed=layers)
