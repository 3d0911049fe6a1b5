"""transformers.Trainer for rows of unlike length: loss on label columns, fewer rows where memory
ends, the score."""

from __future__ import annotations

import math
import shutil
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from accelerate.utils import broadcast_object_list
from safetensors import SafetensorError
from torch.nn.utils import get_total_norm
from torch.utils.data import Sampler
from transformers import Trainer
from transformers.trainer_pt_utils import get_length_grouped_indices

from prompt_recovery.engine import TooLittleMemory, TrainingPlan, apply_plan, gathered
from prompt_recovery.examples import IGNORED, TrainingError
from prompt_recovery.run_folder import last_checkpoint, remove_broken

# A loss scale below 1 makes gradients smaller than they are: they are not too large for fp16, they
# are no numbers. It begins at 65,536, so that is 17 steps left out in a row.
LEAST_SCALE = 1.0


class LengthGroupedBatches(Sampler[int]):
    """Shuffled indices in which neighbours have similar lengths; a function of (seed, epoch) alone,
    so that a resumed run sees the same order (transformers' own sampler draws from the global
    generator). The `fill` indices after those of `lengths` come last."""

    def __init__(self, lengths: Sequence[int], batch: int, seed: int, fill: int = 0) -> None:
        self.lengths, self.batch, self.seed, self.fill, self.epoch = (
            list(lengths),
            batch,
            seed,
            fill,
            0,
        )

    def __len__(self) -> int:
        return len(self.lengths) + self.fill

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __iter__(self) -> Iterator[int]:
        generator = torch.Generator().manual_seed(self.seed * 100_003 + self.epoch)
        order = get_length_grouped_indices(self.lengths, self.batch, generator=generator)
        return iter([*order, *range(len(self.lengths), len(self))])


class RowTrainer(Trainer):
    score: Callable[[], float] | None = None
    # rows of one optimiser step, all processes together: they are sorted among themselves
    rows_in_order = 1
    fill = 0  # rows without a label at the end of the training set
    rows_at_a_time: int | None = None  # set when a micro-batch ran out of memory
    all_recomputed = False  # the same: every layer checkpointed, nothing kept
    step_loss: torch.Tensor | float = 0.0  # sum over the micro-batches of this step so far
    skipped = 0  # steps since the last line of the log that fp16's loss scaler left out
    out_of_time = False  # training ends before its last step

    def compute_loss(
        self, model: Any, inputs: dict, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """Mean cross-entropy over the supervised tokens of the whole batch. lm_head runs on the
        columns in which some row has a label: all of B8 x S512 would be 1 GiB of fp32 logits and
        their gradient."""
        labels = inputs["labels"]
        # an array, which no hook moves: a tensor would go to the first card, and lm_head may be on
        # the last
        columns = (labels[:, 1:] != IGNORED).any(0).nonzero()[:, 0].cpu().numpy()
        outputs = model(
            **{k: v for k, v in inputs.items() if k != "labels"}, logits_to_keep=columns
        )
        targets = labels[:, columns + 1].flatten()
        logits = outputs.logits.float().flatten(0, 1)
        loss = torch.nn.functional.cross_entropy(
            logits, targets, ignore_index=IGNORED, reduction="sum"
        )
        tokens = targets.ne(IGNORED).sum()
        if not model.training:
            self.evaluated += torch.stack((loss.detach(), tokens))
        if num_items_in_batch is None:
            loss = loss / tokens
        else:
            # processes average their gradients, and each holds its part of a sum
            loss = loss * self.accelerator.num_processes / num_items_in_batch
        return (loss, outputs) if return_outputs else loss

    def training_step(
        self, model: Any, inputs: dict, num_items_in_batch: Any = None
    ) -> torch.Tensor:
        """A forward and backward pass. Out of memory, the rows are halved and, at one row, every
        layer checkpointed; the gradients so far are kept, and the sum over the parts is the
        same."""
        rows = len(inputs["labels"])
        if self.rows_at_a_time is None or rows <= self.rows_at_a_time:
            grads = [
                (p, None if p.grad is None else p.grad.clone())
                for p in model.parameters()
                if p.requires_grad
            ]
            try:
                loss = super().training_step(model, inputs, num_items_in_batch)
                self.step_loss = self.step_loss + loss
                if self.accelerator.sync_gradients:
                    self._check_step()
                return loss
            except torch.OutOfMemoryError as error:
                self._make_room(rows, error)
            # outside of the handler, whose traceback would hold the activations
            for parameter, grad in grads:
                parameter.grad = grad
            torch.cuda.empty_cache()
        parts = min(rows, self.rows_at_a_time or rows)
        losses = [
            self.training_step(
                model, {k: v[start : start + parts] for k, v in inputs.items()}, num_items_in_batch
            )
            for start in range(0, rows, parts)
        ]
        return torch.stack(losses).sum()

    def _check_step(self) -> None:
        """Raises TrainingError, in all processes, where the loss of the optimiser step is not
        finite: before the weights are changed by it. Once a step, since the host waits for the
        device here."""
        loss, self.step_loss = torch.as_tensor(self.step_loss), 0.0
        if self.args.world_size > 1:
            loss = self.accelerator.reduce(loss)
        if not torch.isfinite(loss):
            self._stop(f"The loss of step {self.state.global_step + 1} is {loss.item()}")

    def check_gradients(self) -> None:
        """Raises TrainingError where a gradient of the step is not finite though its loss is:
        before the weights are changed by it. In fp16 the loss scaler leaves such a step out."""
        grads = [p.grad for p in self.model.parameters() if p.grad is not None]
        if self.accelerator.scaler is None and not get_total_norm(grads).isfinite():
            self._stop(f"The gradients of step {self.state.global_step + 1} are not finite")

    def check_scale(self) -> None:
        """Count a step that fp16's loss scaler left out, since a gradient was not finite; it halves
        its scale then.

        Raises TrainingError where the scale has come below LEAST_SCALE.
        """
        if self.accelerator.scaler is None or not self.accelerator.optimizer_step_was_skipped:
            return
        self.skipped += 1
        scale = self.accelerator.scaler.get_scale()
        if scale < LEAST_SCALE:
            self._stop(
                f"The gradients of step {self.state.global_step + 1} and of those before it are "
                f"not finite, whatever fp16's loss scale, which is {scale:g} now"
            )

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        if self.accelerator.scaler is not None and "loss" in logs:
            logs |= dict(skipped_steps=self.skipped, loss_scale=self.accelerator.scaler.get_scale())
            self.skipped = 0
        super().log(logs, start_time)

    def _load_best_model(self) -> None:
        # out of time between two evaluations, the last step may be the best. It is evaluated here,
        # when its checkpoint is written: that is the one of a run that goes on
        state, name = self.state, self.args.metric_for_best_model
        if self.out_of_time and all(
            name not in entry or entry["step"] != state.global_step for entry in state.log_history
        ):
            value, best = self.evaluate()[name], state.best_metric
            if value > best if self.args.greater_is_better else value < best:
                state.best_metric, state.best_global_step = value, state.global_step
                return
        super()._load_best_model()

    def _stop(self, what: str) -> None:
        last = last_checkpoint(self.args.output_dir)
        kept = f"{last} is kept" if last else "no checkpoint was written yet"
        raise TrainingError(
            f"{what}: training stops here. {kept}. Likely reasons: learning_rate "
            f"{self.args.learning_rate:g} too high for this base, numbers too large for fp16 (a "
            "card with bf16 has room for them), or damaged weights: does the base answer "
            "sensibly? Lower learning_rate and train again in another output_dir."
        )

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        try:
            super()._save_checkpoint(model, trial)
        # torch says "unexpected pos" where the disk is full
        except (OSError, RuntimeError, SafetensorError) as error:
            if isinstance(error, torch.OutOfMemoryError):
                raise
            folder = Path(self.args.output_dir)
            remove_broken(folder)
            last = last_checkpoint(folder)
            going_on = (
                f"resume=True goes on from {last.name}"
                if last
                else "then start again: no checkpoint is there yet"
            )
            raise TrainingError(
                f"The checkpoint of step {self.state.global_step} could not be written to "
                f"{folder} ({shutil.disk_usage(folder).free / 2**20:,.0f} MiB free there): "
                f"{error}. Make room or give another output_dir; {going_on}."
            ) from error

    def _make_room(self, rows: int, error: torch.OutOfMemoryError) -> None:
        base = self.accelerator.unwrap_model(self.model)
        count = base.config.get_text_config().num_hidden_layers
        if self.args.world_size > 1 or (rows == 1 and self.all_recomputed):
            raise TooLittleMemory(
                f"Out of memory with {rows} rows at a time and no way left to use less: {error}. "
                "Lower max_tokens or, with several processes, batch_size."
            ) from error
        if rows == 1:
            apply_plan(base, TrainingPlan(1, 1, checkpointed=count, one_expert=True))
            self.all_recomputed = True
        self.rows_at_a_time = max(1, rows // 2)
        recomputed = " and activations recomputed in every layer" if self.all_recomputed else ""
        print(
            f"out of memory with {rows} rows at a time: going on with "
            f"{self.rows_at_a_time}{recomputed}"
        )

    def evaluation_loop(self, *args: Any, **kwargs: Any) -> Any:
        self.evaluated = torch.zeros(2, device=self.args.device)
        output = super().evaluation_loop(*args, **kwargs)
        # a token's mean: Trainer's depends on which rows share a batch, and so on the number of
        # processes
        loss, tokens = self.accelerator.reduce(self.evaluated).tolist()
        output.metrics["eval_loss"] = loss / tokens
        if not math.isfinite(loss):
            self._stop(f"The held-out loss at step {self.state.global_step} is {loss / tokens}")
        if self.score is not None:
            # one score for all processes: if theirs differed in a last bit, one might stop and the
            # others wait for it
            score = float(broadcast_object_list([self.score()])[0])
            output.metrics["eval_scs"] = score
            output.metrics["eval_choice"] = choice(score, output.metrics["eval_loss"])
        return output

    def _save(self, output_dir: str | None = None, state_dict: Any = None) -> None:
        # the default would look the base up on the hub, to see whether embeddings must be saved:
        # they must not
        if self.args.should_save:
            self.model.save_pretrained(output_dir, save_embedding_layers=False)

    def _save_rng_state(self, output_dir: str) -> None:
        """Every process's random state, on each disk, before the file that makes a checkpoint
        whole."""
        with TemporaryDirectory() as folder:
            super()._save_rng_state(folder)
            (own,) = Path(folder).iterdir()
            states = gathered((own.name, own.read_bytes()))
        if self.args.should_save:
            for name, state in states:
                (Path(output_dir) / name).write_bytes(state)

    def _get_train_sampler(self, train_dataset: Any = None) -> Sampler[int]:
        lengths = [len(example["input_ids"]) for example in self.train_dataset]
        lengths = lengths[: len(lengths) - self.fill]
        self.order = LengthGroupedBatches(lengths, self.rows_in_order, self.args.seed, self.fill)
        return self.order


def choice(score: float, loss: float) -> float:
    """The value by which checkpoints are chosen, the higher the better: the score to six places,
    then the loss, which weighs less than the last of these."""
    return round(score, 6) - 1e-7 * loss / (1 + loss)
