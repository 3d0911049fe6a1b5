"""Fine-tune a LoRA on rows: memory plan, checkpoints, resume.

A run killed at any moment goes on from its last whole checkpoint, with the same batches and the
same random numbers as if it had not been killed.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from peft import PeftModel, set_peft_model_state_dict
from safetensors.torch import load_file
from transformers import EarlyStoppingCallback, PreTrainedTokenizerFast, TrainingArguments

from prompt_recovery.adapter import training_key
from prompt_recovery.engine import (
    TrainingPlan,
    apply_plan,
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
from prompt_recovery.files import write_csv, write_text
from prompt_recovery.recipe import Recipe
from prompt_recovery.run_folder import (
    RunFolderError,
    claimed,
    last_checkpoint,
    remove_broken,
    set_aside,
)
from prompt_recovery.trainer import KeepTwo, RowTrainer, WriteLog, training_log


def train(
    model: PeftModel,
    tokenizer: PreTrainedTokenizerFast,
    train_examples: Sequence[Example],
    eval_examples: Sequence[Example],
    recipe: Recipe,
    *,
    score: Callable[[], float] | None = None,
    scored_with: Mapping[str, Any] | None = None,
) -> pd.DataFrame:
    """Train the adapter in place and leave it at its best checkpoint (the last one without eval
    rows).

    Best is the highest score() if that is given (mean SCS of the answers to held-out rows, say),
    and among equal ones the lowest eval loss; else the lowest eval loss. Which step is kept and why
    training ended is printed. Held-out prompts have wordings that were never trained on, so their
    loss can rise while the answers get better: on the demo it is lowest after 10% of the steps,
    where 30% of the answers are right, and 98% are at the end (LOG.md).

    recipe: `evaluations` says how often eval loss is measured and a checkpoint kept; training stops
    after `patience` of them without gain. activation_checkpointing None lets a memory plan choose
    rows at a time and checkpointed layers on a GPU, with gradient accumulation up to batch_size *
    gradient_accumulation rows a step, and checkpoints nothing on the CPU; True and False take
    batch_size rows at a time with every layer or none. Out of memory, the run goes on with fewer
    rows. Under `accelerate launch` the rows of a step are shared out to the processes. With
    `resume` it goes on from the last whole checkpoint under output_dir/checkpoints, if there is
    one; else these are moved aside.
    scored_with: what score() depends on, such as its encoder; a resumed run must share it.
    Returns the log (step, epoch, loss, eval_loss, eval_scs, learning_rate), also written to
    output_dir/training_log.csv.
    Raises TrainingError where the rows of a step can't be shared out evenly, or a loss is not
    finite; RunFolderError where another run has output_dir, or its checkpoints belong to other rows
    or settings; TooLittleMemory where one row does not fit.
    """
    with claimed(recipe.output_dir) if processes().is_main_process else nullcontext():
        return _train(model, tokenizer, train_examples, eval_examples, recipe, score, scored_with)


def _train(
    model: PeftModel,
    tokenizer: PreTrainedTokenizerFast,
    train_examples: Sequence[Example],
    eval_examples: Sequence[Example],
    recipe: Recipe,
    score: Callable[[], float] | None,
    scored_with: Mapping[str, Any] | None,
) -> pd.DataFrame:
    state = processes()
    check_supervised(train_examples, tokenizer.eos_token_id)
    rows_a_step = recipe.batch_size * recipe.gradient_accumulation
    steps_an_epoch = math.ceil(len(train_examples) / rows_a_step)
    total = recipe.max_steps if recipe.max_steps > 0 else math.ceil(recipe.epochs * steps_an_epoch)
    log_every = max(1, total // (recipe.evaluations * 5))
    # a multiple: a resumed log has no gap
    eval_every = log_every * max(1, total // (recipe.evaluations * log_every))
    output_dir = Path(recipe.output_dir)
    checkpoints = output_dir / "checkpoints"
    settings = recipe.values("adapter", "run") | dict(
        scored=score is not None, **training_key(model), train_rows=_digest(train_examples),
        eval_rows=_digest(eval_examples), rows_a_step=rows_a_step, **(scored_with or {}),
    )  # fmt: skip
    # 2 x 4 and 4 x 2 rows are the same step
    settings = {
        name: value
        for name, value in settings.items()
        if name not in ("batch_size", "gradient_accumulation")
    }
    last = (
        _prepare_checkpoints(output_dir, settings, recipe.resume) if state.is_main_process else None
    )
    state.wait_for_everyone()
    last = last or last_checkpoint(checkpoints)
    if last:
        saved = json.loads((last / "trainer_state.json").read_text())
        if saved["stateful_callbacks"]["TrainerControl"]["args"]["should_training_stop"]:
            # killed after its last step: Trainer would do one more all the same
            kept = checkpoints / Path(saved["best_model_checkpoint"] or last).name
            set_peft_model_state_dict(model, load_file(kept / "adapter_model.safetensors"))
            log = training_log(saved["log_history"])
            if state.is_main_process:
                write_csv(log, output_dir / "training_log.csv")
                print(_ending(saved, total, recipe.patience))
            model.eval()
            return log
    on_gpu = torch.cuda.is_available()
    bf16 = on_gpu and torch.cuda.is_bf16_supported(including_emulation=False)
    model.config.use_cache = False
    plan = _plan(model, train_examples, recipe, bf16)
    apply_plan(model, plan)
    state.print(plan)
    # rows without a label: accelerate would repeat the first rows where the last ones are too few
    # for all processes
    filler = [{"input_ids": [tokenizer.eos_token_id], "labels": [IGNORED]}]
    fill, eval_fill = (
        -len(examples) % rows if state.num_processes > 1 else 0
        for examples, rows in (
            (train_examples, rows_a_step),
            (eval_examples, recipe.batch_size * state.num_processes),
        )
    )
    has_eval = len(eval_examples) > 0
    arguments = _arguments(
        checkpoints,
        plan,
        eval_every,
        has_eval,
        score is not None,
        bf16,
        max_steps=total,
        learning_rate=recipe.learning_rate,
        warmup_steps=min(recipe.warmup_steps, total // 10),
        logging_steps=log_every,
        per_device_eval_batch_size=recipe.batch_size,
        report_to=recipe.report_to,
        seed=recipe.seed,
    )
    trainer = RowTrainer(
        model=model,
        args=arguments,
        train_dataset=[*train_examples, *filler * fill],
        eval_dataset=[*eval_examples, *filler * eval_fill] if has_eval else None,
        data_collator=lambda batch: collate(batch, tokenizer.pad_token_id),
        callbacks=[WriteLog(output_dir / "training_log.csv"), KeepTwo()]
        + ([EarlyStoppingCallback(early_stopping_patience=recipe.patience)] if has_eval else []),
    )
    trainer.score = score
    trainer.fill = fill
    trainer.rows_in_order = rows_a_step
    try:
        trainer.train(resume_from_checkpoint=str(last) if last else None)
    finally:
        model.config.use_cache = True
        release_buffers(model)
        model.eval()
    if has_eval:
        state.print(_ending(vars(trainer.state), total, recipe.patience))
    return training_log(trainer.state.log_history)


def _ending(state: Mapping[str, Any], total: int, patience: int) -> str:
    """Which step is kept, and why the training ended; state: that of Trainer."""
    log = training_log(state["log_history"])
    best = log[log["step"] == state["best_global_step"]].iloc[0]
    measures = ["eval_loss"] if log["eval_scs"].isna().all() else ["eval_scs", "eval_loss"]
    kept = f"kept: step {best['step']:.0f}, " + ", ".join(
        f"{name} {best[name]:.4g}" for name in measures
    )
    if state["global_step"] >= total:
        return f"{kept}; all {total} steps done"
    return (
        f"{kept}; STOPPED EARLY at step {state['global_step']} of {total}, since {patience} "
        f"evaluations in a row brought no better {' or, where equal, '.join(measures)}"
    )


def _arguments(
    checkpoints: Path,
    plan: TrainingPlan,
    every: int,
    has_eval: bool,
    scored: bool,
    bf16: bool,
    **settings: Any,
) -> TrainingArguments:
    """Trainer's own settings. every: steps from one evaluation and checkpoint to the next."""
    on_gpu = torch.cuda.is_available()
    arguments = TrainingArguments(
        output_dir=str(checkpoints),
        lr_scheduler_type="linear",
        optim="paged_adamw_8bit" if on_gpu else "adamw_torch",
        per_device_train_batch_size=plan.rows,
        gradient_accumulation_steps=plan.accumulation,
        max_grad_norm=1.0,
        bf16=bf16,
        fp16=on_gpu and not bf16,
        use_cpu=not on_gpu,
        eval_strategy="steps" if has_eval else "no",
        eval_steps=every,
        save_strategy="steps",
        save_steps=every,
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
        **settings,
    )
    # one process computes on one card: of several that it sees, Trainer would give each a batch and
    # train on all rows of these, or copy the model to them
    arguments._n_gpu = min(arguments.n_gpu, 1)
    return arguments


def _plan(
    model: PeftModel, examples: Sequence[Example], recipe: Recipe, bf16: bool
) -> TrainingPlan:
    sharing = processes().num_processes
    batch, accumulation = recipe.batch_size, recipe.gradient_accumulation
    if batch * accumulation % sharing:
        raise TrainingError(
            f"batch_size {batch} x gradient_accumulation {accumulation} rows can't be shared out "
            f"to {sharing} processes: make the product a multiple of their number."
        )
    rows = batch * accumulation // sharing
    if torch.cuda.is_available() and recipe.activation_checkpointing is None:
        longest = max(len(example["input_ids"]) for example in examples)
        answer = max(answer_length(example) for example in examples)
        return training_plan(
            model, longest, answer, rows, torch.bfloat16 if bf16 else torch.float16
        )
    micro = math.gcd(rows, batch)
    layers = (
        model.config.get_text_config().num_hidden_layers if recipe.activation_checkpointing else 0
    )
    return TrainingPlan(micro, rows // micro, checkpointed=layers)


def _prepare_checkpoints(folder: Path, settings: Mapping[str, Any], resume: bool) -> Path | None:
    """The checkpoint to go on from, if there is one and it is of these settings, which are kept in
    settings.json."""
    checkpoints = folder / "checkpoints"
    if not resume:
        set_aside(folder, ("checkpoints", "training_log.csv"))
    now = json.loads(json.dumps(settings, sort_keys=True, default=sorted))
    note = checkpoints / "settings.json"
    remove_broken(checkpoints)
    last = last_checkpoint(checkpoints)
    if last:
        remedy = "Give that back, or take another output_dir, or resume=False to start again."
        if not note.is_file():
            raise RunFolderError(
                f"resume=True, but {checkpoints} does not say with which settings it was made. "
                f"{remedy}"
            )
        then = json.loads(note.read_text())
        differences = [
            f"{name} was {str(then.get(name))[:80]}, now {str(now.get(name))[:80]}"
            for name in sorted(then.keys() | now.keys())
            if then.get(name) != now.get(name)
        ]
        if differences:
            raise RunFolderError(
                f"resume=True, but {checkpoints} was made with other rows or settings: "
                f"{'; '.join(differences)}. {remedy}"
            )
        best = json.loads((last / "trainer_state.json").read_text())["best_global_step"]
        if best is not None and not (checkpoints / f"checkpoint-{best}").is_dir():
            raise RunFolderError(
                f"resume=True, but the best checkpoint so far, checkpoint-{best}, is no longer in "
                f"{checkpoints}: put it back, or resume=False to start again."
            )
    write_text(json.dumps(now, indent=1), note)
    return last


def _digest(examples: Sequence[Example]) -> str:
    return hashlib.sha256(json.dumps(list(examples)).encode()).hexdigest()[:12]
