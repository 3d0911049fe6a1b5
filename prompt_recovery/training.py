"""Fine-tune a LoRA on rows: examples, collator, transformers.Trainer, its log and its picture.

A run killed at any moment goes on from its last whole checkpoint, with the same batches and the same random numbers
as if it had not been killed.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from accelerate.utils import broadcast_object_list
from peft import PeftModel, set_peft_model_state_dict
from safetensors.torch import load_file
from torch.utils.data import Sampler
from transformers import EarlyStoppingCallback, PreTrainedTokenizerFast, Trainer, TrainerCallback, TrainingArguments
from transformers.trainer_pt_utils import get_length_grouped_indices

from prompt_recovery.engine import (
    TooLittleMemory,
    TrainingPlan,
    apply_plan,
    processes,
    release_buffers,
    training_plan,
)
from prompt_recovery.templates import TemplateError, render_answer
from prompt_recovery.tokenizer import TokenizerError, encode_row

IGNORED = -100  # torch's cross_entropy leaves this label out
Example = dict[str, list[int]]


class TrainingError(ValueError):
    """Rows or settings that cannot be trained on."""


def make_examples(
    tokenizer: PreTrainedTokenizerFast, rows: pd.DataFrame, *, max_tokens: int, style: str, system_placement: str
) -> list[Example]:
    """Rows as `input_ids` and `labels` (lists of equal length, at most max_tokens): labels are the ids where the answer
    and its EOS stand and -100 elsewhere. Masked by position, so it does not matter which id pads.

    Raises TrainingError naming the rows that have no answer in this style, whose answer does not fit, or that have no
    supervised token.
    """
    examples = []
    refused: list[tuple[str, str]] = []
    for number, row in enumerate(rows.to_dict("records"), 1):
        try:
            answer = render_answer(row["rewrite_prompt"], style, row.get("response", ""))
            ids, supervised = encode_row(
                tokenizer, row, max_tokens=max_tokens, style=style, system_placement=system_placement, answer=answer
            )
        except (TemplateError, TokenizerError) as error:
            refused.append((str(row.get("source", f"row {number}")), str(error)))
            continue
        labels = [i if keep else IGNORED for i, keep in zip(ids, supervised, strict=True)]
        examples.append({"input_ids": ids, "labels": labels})
    if refused:
        places = ", ".join(place for place, _ in refused[:10]) + (" ..." if len(refused) > 10 else "")
        raise TrainingError(f"{len(refused)} of {len(rows)} rows are refused ({places}); the first: {refused[0][1]}")
    check_supervised(examples, tokenizer.eos_token_id)
    return examples


def check_supervised(examples: Sequence[Example], eos: int) -> None:
    """Raises TrainingError for examples without a supervised token (their loss is silently 0), or not ending in EOS."""
    if not examples:
        raise TrainingError("there are no rows to train on; check what was dropped and eval_fraction.")
    bad = [n for n, example in enumerate(examples) if example["labels"][-1] != eos]
    if bad:
        raise TrainingError(
            f"{len(bad)} of {len(examples)} rows do not end in a supervised EOS (positions {bad[:5]}): the model would "
            "never learn to stop. Do not truncate examples; encode_row shortens the texts instead."
        )


def collate(examples: Sequence[Example], pad_id: int) -> dict[str, torch.Tensor]:
    """int64 input_ids, attention_mask and labels of shape [batch, longest], padded on the right.

    Padding is pad_id / 0 / -100 by position; an id equal to pad_id inside an example keeps its label and attention.
    """
    width = max(len(example["input_ids"]) for example in examples)

    def pad(name: str, value: int) -> torch.Tensor:
        return torch.tensor([example[name] + [value] * (width - len(example[name])) for example in examples])

    mask = [[1] * len(e["input_ids"]) + [0] * (width - len(e["input_ids"])) for e in examples]
    return {
        "input_ids": pad("input_ids", pad_id),
        "attention_mask": torch.tensor(mask),
        "labels": pad("labels", IGNORED),
    }


def answer_length(example: Example) -> int:
    """Number of supervised tokens, EOS included."""
    return sum(label != IGNORED for label in example["labels"])


def show_example(tokenizer: PreTrainedTokenizerFast, example: Example) -> str:
    """The example decoded, with the supervised part between »»» and «««."""
    ids, labels = example["input_ids"], example["labels"]
    start = next(n for n, label in enumerate(labels) if label != IGNORED)
    return f"{tokenizer.decode(ids[:start])}»»»{tokenizer.decode(ids[start:])}«««"


class LengthGroupedBatches(Sampler[int]):
    """Shuffled indices in which neighbours have similar lengths; a function of (seed, epoch) alone, so that a resumed
    run sees the same order (transformers' own sampler draws from the global generator). The `fill` indices after those
    of `lengths` come last."""

    def __init__(self, lengths: Sequence[int], batch: int, seed: int, fill: int = 0) -> None:
        self.lengths, self.batch, self.seed, self.fill, self.epoch = list(lengths), batch, seed, fill, 0

    def __len__(self) -> int:
        return len(self.lengths) + self.fill

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __iter__(self) -> Iterator[int]:
        generator = torch.Generator().manual_seed(self.seed * 100_003 + self.epoch)
        order = get_length_grouped_indices(self.lengths, self.batch, generator=generator)
        return iter([*order, *range(len(self.lengths), len(self))])


class _Trainer(Trainer):
    score: Callable[[], float] | None = None
    rows_in_order = 1  # rows of one optimiser step, all processes together: they are sorted among themselves
    fill = 0  # rows without a label at the end of the training set
    rows_at_a_time: int | None = None  # set when a micro-batch ran out of memory
    all_recomputed = False  # the same: every layer checkpointed, nothing kept

    def compute_loss(
        self, model: Any, inputs: dict, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """Mean cross-entropy over the supervised tokens of the whole batch. lm_head runs on the columns in which some row
        has a label: all of B8 x S512 would be 1 GiB of fp32 logits and their gradient."""
        labels = inputs["labels"]
        # an array, which no hook moves: a tensor would go to the first card, and lm_head may be on the last
        columns = (labels[:, 1:] != IGNORED).any(0).nonzero()[:, 0].cpu().numpy()
        outputs = model(**{k: v for k, v in inputs.items() if k != "labels"}, logits_to_keep=columns)
        targets = labels[:, columns + 1].flatten()
        logits = outputs.logits.float().flatten(0, 1)
        loss = torch.nn.functional.cross_entropy(logits, targets, ignore_index=IGNORED, reduction="sum")
        tokens = targets.ne(IGNORED).sum()
        if not model.training:
            self.evaluated += torch.stack((loss.detach(), tokens))
        if num_items_in_batch is None:
            loss = loss / tokens
        else:
            # processes average their gradients, and each holds its part of a sum
            loss = loss * self.accelerator.num_processes / num_items_in_batch
        return (loss, outputs) if return_outputs else loss

    def training_step(self, model: Any, inputs: dict, num_items_in_batch: Any = None) -> torch.Tensor:
        """A forward and backward pass. Out of memory, the rows are halved and, at one row, every layer checkpointed; the
        gradients so far are kept, and the sum over the parts is the same."""
        rows = len(inputs["labels"])
        if self.rows_at_a_time is None or rows <= self.rows_at_a_time:
            grads = [(p, None if p.grad is None else p.grad.clone()) for p in model.parameters() if p.requires_grad]
            try:
                return super().training_step(model, inputs, num_items_in_batch)
            except torch.OutOfMemoryError as error:
                self._make_room(rows, error)
            # outside of the handler, whose traceback would hold the activations
            for parameter, grad in grads:
                parameter.grad = grad
            torch.cuda.empty_cache()
        parts = min(rows, self.rows_at_a_time or rows)
        losses = [
            self.training_step(model, {k: v[start : start + parts] for k, v in inputs.items()}, num_items_in_batch)
            for start in range(0, rows, parts)
        ]
        return torch.stack(losses).sum()

    def _make_room(self, rows: int, error: torch.OutOfMemoryError) -> None:
        base = self.accelerator.unwrap_model(self.model)
        count = base.config.get_text_config().num_hidden_layers
        if self.args.world_size > 1 or (rows == 1 and self.all_recomputed):
            raise TooLittleMemory(
                f"Out of memory with {rows} rows at a time and no way left to use less: {error}. Lower max_tokens or, with "
                "several processes, batch_size."
            ) from error
        if rows == 1:
            apply_plan(base, TrainingPlan(1, 1, checkpointed=count))
            self.all_recomputed = True
        self.rows_at_a_time = max(1, rows // 2)
        recomputed = " and activations recomputed in every layer" if self.all_recomputed else ""
        print(f"out of memory with {rows} rows at a time: going on with {self.rows_at_a_time}{recomputed}")

    def evaluation_loop(self, *args: Any, **kwargs: Any) -> Any:
        self.evaluated = torch.zeros(2, device=self.args.device)
        output = super().evaluation_loop(*args, **kwargs)
        # a token's mean: Trainer's depends on which rows share a batch, and so on the number of processes
        loss, tokens = self.accelerator.reduce(self.evaluated).tolist()
        output.metrics["eval_loss"] = loss / tokens
        if self.score is not None:
            # one score for all processes: if theirs differed in a last bit, one might stop and the others wait for it
            output.metrics["eval_scs"] = broadcast_object_list([self.score()])[0]
        return output

    def _save(self, output_dir: str | None = None, state_dict: Any = None) -> None:
        # the default would look the base up on the hub, to see whether embeddings must be saved: they must not
        self.model.save_pretrained(output_dir, save_embedding_layers=False)

    def _get_train_sampler(self, train_dataset: Any = None) -> Sampler[int]:
        lengths = [len(example["input_ids"]) for example in self.train_dataset]
        lengths = lengths[: len(lengths) - self.fill]
        return LengthGroupedBatches(lengths, self.rows_in_order, self.args.seed, self.fill)


class _WriteLog(TrainerCallback):
    def __init__(self, path: Path) -> None:
        self.path = path

    def on_log(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.is_world_process_zero:
            write_atomically(training_log(state.log_history), self.path)


def train(
    model: PeftModel,
    tokenizer: PreTrainedTokenizerFast,
    train_examples: Sequence[Example],
    eval_examples: Sequence[Example],
    output_dir: str | Path,
    *,
    epochs: float = 5,
    max_steps: int = -1,
    learning_rate: float = 2e-5,
    batch_size: int = 8,
    gradient_accumulation: int = 2,
    warmup_steps: int = 30,
    evaluations: int = 10,
    patience: int = 3,
    activation_checkpointing: bool | None = None,
    seed: int = 0,
    resume: bool = False,
    tensorboard: bool = False,
    score: Callable[[], float] | None = None,
) -> pd.DataFrame:
    """Train the adapter in place and leave it at its best checkpoint (the last one without eval rows).

    Best is the highest score() if that is given (mean SCS of the answers to held-out rows, say), else the lowest eval
    loss. Held-out prompts have wordings that were never trained on, so their loss can rise while the answers get better:
    on the demo it is lowest after 10% of the steps, where 30% of the answers are right, and 98% are at the end (LOG.md).

    Defaults are the figures of the system this design comes from: lr 2e-5 linear with 30 steps of warm-up, batch 8x2.
    evaluations: how often eval loss is measured and a checkpoint kept; patience: stop after that many without gain.
    activation_checkpointing: None lets a memory plan choose rows at a time and checkpointed layers on a GPU, with
    gradient accumulation up to batch_size * gradient_accumulation rows a step, and checkpoints nothing on the CPU; True
    and False take batch_size rows at a time with every layer or none. Out of memory, the run goes on with fewer rows.
    Under `accelerate launch` the rows of a step are shared out to the processes.
    resume: go on from the last whole checkpoint under output_dir/checkpoints, if there is one; else they are removed.
    Returns the log (step, epoch, loss, eval_loss, eval_scs, learning_rate), also written to output_dir/training_log.csv.
    Raises TrainingError where the checkpoints belong to other rows or settings, or the rows of a step can't be shared
    out evenly; TooLittleMemory where one row does not fit.
    """
    state = processes()
    check_supervised(train_examples, tokenizer.eos_token_id)
    steps_an_epoch = math.ceil(len(train_examples) / (batch_size * gradient_accumulation))
    total = max_steps if max_steps > 0 else math.ceil(epochs * steps_an_epoch)
    log_every = max(1, total // (evaluations * 5))
    eval_every = log_every * max(1, total // (evaluations * log_every))  # a multiple, so a resumed log has no gap
    output_dir = Path(output_dir)
    checkpoints = output_dir / "checkpoints"
    settings = dict(
        total=total, learning_rate=learning_rate, batch=batch_size, accumulation=gradient_accumulation, seed=seed,
        warmup=warmup_steps, evaluations=evaluations, patience=patience, scored=score is not None,
        lora=model.peft_config["default"].to_dict(), rows=[train_examples, eval_examples],
    )  # fmt: skip
    last = _prepare_checkpoints(checkpoints, settings, resume) if state.is_main_process else None
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
                write_atomically(log, output_dir / "training_log.csv")
            model.eval()
            return log
    on_gpu = torch.cuda.is_available()
    bf16 = on_gpu and torch.cuda.is_bf16_supported(including_emulation=False)
    model.config.use_cache = False
    plan = _plan(model, train_examples, batch_size, gradient_accumulation, activation_checkpointing, bf16)
    apply_plan(model, plan)
    state.print(plan)
    # rows without a label: accelerate would repeat the first rows where the last ones are too few for all processes
    filler = [{"input_ids": [tokenizer.eos_token_id], "labels": [IGNORED]}]
    fill, eval_fill = (
        -len(examples) % rows if state.num_processes > 1 else 0
        for examples, rows in (
            (train_examples, batch_size * gradient_accumulation),
            (eval_examples, batch_size * state.num_processes),
        )
    )
    has_eval = len(eval_examples) > 0
    best = "eval_scs" if score else "eval_loss"
    arguments = TrainingArguments(
        output_dir=str(checkpoints),
        max_steps=total,
        learning_rate=learning_rate,
        warmup_steps=min(warmup_steps, total // 10),
        lr_scheduler_type="linear",
        optim="paged_adamw_8bit" if on_gpu else "adamw_torch",
        per_device_train_batch_size=plan.rows,
        per_device_eval_batch_size=batch_size,
        gradient_accumulation_steps=plan.accumulation,
        max_grad_norm=1.0,
        bf16=bf16,
        fp16=on_gpu and not bf16,
        use_cpu=not on_gpu,
        logging_steps=log_every,
        eval_strategy="steps" if has_eval else "no",
        eval_steps=eval_every,
        save_strategy="steps",
        save_steps=eval_every,
        save_total_limit=2,
        load_best_model_at_end=has_eval,
        restore_callback_states_from_checkpoint=True,  # else a resumed run forgets how long it has not improved
        metric_for_best_model=best if has_eval else None,
        greater_is_better=best == "eval_scs" if has_eval else None,
        report_to=["tensorboard"] if tensorboard else [],
        remove_unused_columns=False,
        label_names=["labels"],
        seed=seed,
        dataloader_pin_memory=on_gpu,
        ddp_find_unused_parameters=False,
    )
    # one process computes on one card: of several that it sees, Trainer would give each a batch and train on all rows
    # of these, or copy the model to them
    arguments._n_gpu = min(arguments.n_gpu, 1)
    trainer = _Trainer(
        model=model,
        args=arguments,
        train_dataset=[*train_examples, *filler * fill],
        eval_dataset=[*eval_examples, *filler * eval_fill] if has_eval else None,
        data_collator=lambda batch: collate(batch, tokenizer.pad_token_id),
        callbacks=[_WriteLog(output_dir / "training_log.csv")]
        + ([EarlyStoppingCallback(early_stopping_patience=patience)] if has_eval else []),
    )
    trainer.score = score
    trainer.fill = fill
    trainer.rows_in_order = batch_size * gradient_accumulation
    trainer.train(resume_from_checkpoint=str(last) if last else None)
    model.config.use_cache = True
    release_buffers(model)
    model.eval()
    return training_log(trainer.state.log_history)


def _plan(
    model: PeftModel, examples: Sequence[Example], batch: int, accumulation: int, checkpointing: bool | None, bf16: bool
) -> TrainingPlan:
    sharing = processes().num_processes
    if batch * accumulation % sharing:
        raise TrainingError(
            f"batch_size {batch} x gradient_accumulation {accumulation} rows can't be shared out to {sharing} processes:"
            " make the product a multiple of their number."
        )
    rows = batch * accumulation // sharing
    if torch.cuda.is_available() and checkpointing is None:
        longest = max(len(example["input_ids"]) for example in examples)
        answer = max(answer_length(example) for example in examples)
        return training_plan(model, longest, answer, rows, torch.bfloat16 if bf16 else torch.float16)
    micro = math.gcd(rows, batch)
    layers = model.config.get_text_config().num_hidden_layers if checkpointing else 0
    return TrainingPlan(micro, rows // micro, checkpointed=layers)


def last_checkpoint(checkpoints: str | Path) -> Path | None:
    """The newest whole checkpoint; one that was being written when the run was killed is removed. trainer_state.json is
    written last, so a checkpoint without a readable one is not whole."""
    whole = []
    for folder in Path(checkpoints).glob("checkpoint-*"):
        try:
            json.loads((folder / "trainer_state.json").read_text())
            whole.append(folder)
        except (FileNotFoundError, json.JSONDecodeError):
            shutil.rmtree(folder)
    return max(whole, key=lambda folder: int(folder.name.split("-")[1]), default=None)


def _prepare_checkpoints(checkpoints: Path, settings: Mapping[str, Any], resume: bool) -> Path | None:
    key = hashlib.sha256(json.dumps(settings, sort_keys=True, default=sorted).encode()).hexdigest()
    note = checkpoints / "settings.sha256"
    if not resume:
        shutil.rmtree(checkpoints, ignore_errors=True)
    last = last_checkpoint(checkpoints)
    if last and (not note.is_file() or note.read_text() != key):
        raise TrainingError(
            f"resume=True, but {checkpoints} was made with other rows or settings. Give those back, "
            "or resume=False to start again, or another output_dir."
        )
    checkpoints.mkdir(parents=True, exist_ok=True)
    note.write_text(key)
    return last


def training_log(history: Sequence[Mapping[str, float]]) -> pd.DataFrame:
    """transformers' log history as one row a step:
    step, epoch, loss, eval_loss, eval_scs, learning_rate; NaN where not measured."""
    columns = ["step", "epoch", "loss", "eval_loss", "eval_scs", "learning_rate"]
    frame = pd.DataFrame([{k: entry[k] for k in columns if k in entry} for entry in history], columns=columns)
    frame = frame[frame["loss"].notna() | frame["eval_loss"].notna()]
    return frame.groupby("step", as_index=False).first().reindex(columns=columns)


def plot_log(log: pd.DataFrame, path: str | Path) -> None:
    """Train and eval loss, and the eval score if it was measured, against the step; the best step marked. A PNG."""
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(7, 3.5), layout="constrained")
    for column, label in (("loss", "train"), ("eval_loss", "eval")):
        part = log[log[column].notna()]
        axes.plot(part["step"], part[column], marker="o" if column == "eval_loss" else None, ms=3, label=label)
    scored = log["eval_scs"].notna().any()
    if scored:
        part = log[log["eval_scs"].notna()]
        right = axes.twinx()
        right.plot(
            part["step"], part["eval_scs"], color="tab:green", marker="s", ms=3, ls="--", label="eval SCS (right)"
        )
        right.set(ylim=(0, None), ylabel="SCS of held-out answers")
    if log["eval_loss"].notna().any():
        best = log.iloc[int(np.nanargmax(log["eval_scs"]) if scored else np.nanargmin(log["eval_loss"]))]
        value = f"SCS {best['eval_scs']:.3f}" if scored else f"eval loss {best['eval_loss']:.3f}"
        axes.axvline(best["step"], color="grey", lw=0.8, ls=":", label=f"best: {value} at step {best['step']:.0f}")
    axes.set(xlabel="step", ylabel="loss on answer and EOS (nats a token)", ylim=(0, None))
    figure.legend(frameon=False, loc="outside upper center", ncols=4)
    save_figure(figure, Path(path))


def plot_lengths(examples: Sequence[Example], max_tokens: int, path: str | Path) -> None:
    """Histogram of the examples' lengths in tokens, with the limit marked, as a PNG."""
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(7, 2.5), layout="constrained")
    axes.hist([len(example["input_ids"]) for example in examples], bins=40)
    axes.axvline(max_tokens, color="tab:red", lw=1, label=f"max_tokens = {max_tokens}")
    axes.set(xlabel="tokens in an example", ylabel="examples")
    axes.legend(frameon=False)
    save_figure(figure, Path(path))


def save_figure(figure: Any, path: Path) -> None:
    """Write a PNG and close the figure. Several processes may draw the same picture: each one's file is whole when it
    takes its place."""
    import matplotlib.pyplot as plt

    partial = path.with_name(f"{path.stem}.{os.getpid()}.partial.png")
    figure.savefig(partial, dpi=120)
    plt.close(figure)
    os.replace(partial, path)


def write_atomically(frame: pd.DataFrame, path: Path) -> None:
    """Write a CSV beside `path` and move it there, so that a reader never sees half a file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(path.name + ".partial")
    frame.to_csv(partial, index=False)
    os.replace(partial, path)
