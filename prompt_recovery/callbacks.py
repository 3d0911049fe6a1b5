"""What a training does at its steps, evaluations and checkpoints."""

from __future__ import annotations

import math
import time
from pathlib import Path
from typing import Any

from accelerate.utils import broadcast_object_list
from transformers import TrainerCallback

from prompt_recovery.files import write_csv
from prompt_recovery.run_folder import note_processes, rotate
from prompt_recovery.time_budget import TrainingTime, must_end
from prompt_recovery.trainer import RowTrainer
from prompt_recovery.training_log import training_log


class OrderOfEpoch(TrainerCallback):
    """Tell the sampler its epoch. accelerate does not reach it where several processes go on in the
    middle of an epoch: they would see the first epoch's rows there."""

    def __init__(self, trainer: RowTrainer) -> None:
        self.trainer = trainer

    def on_epoch_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.trainer.order.set_epoch(math.floor(state.epoch + 1e-6))


class WriteLog(TrainerCallback):
    def __init__(self, path: Path) -> None:
        self.path = path

    def on_log(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.is_world_process_zero:
            write_csv(training_log(state.log_history), self.path)


class KeepTwo(TrainerCallback):
    """Rotate checkpoints by step, where transformers goes by the times of files."""

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        note_processes(state, args.world_size)

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if args.should_save:
            rotate(args.output_dir, state.best_global_step)


class WatchGradients(TrainerCallback):
    """Gradients before each step, and fp16's loss scaler behind it; the last step has a line of the
    log, for the scaler's count."""

    def __init__(self, trainer: RowTrainer) -> None:
        self.trainer = trainer

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.trainer.check_gradients()

    def on_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.trainer.check_scale()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.trainer.accelerator.scaler is not None and state.global_step >= state.max_steps:
            control.should_log = True


class EndInTime(TrainerCallback):
    """End the training while there is time for its evaluation and for what comes behind it, with a
    checkpoint from which a later run goes on as if there had been no end."""

    def __init__(self, trainer: RowTrainer, allowed: TrainingTime) -> None:
        self.trainer, self.allowed = trainer, allowed
        self.step = self.evaluation = 0.0  # the longest so far, in seconds
        self.began = self.ended = time.monotonic()

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.began = time.monotonic()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.ended = time.monotonic()
        self.step = max(self.step, self.ended - self.began)
        due = control.should_evaluate  # which this step pays for, too
        end = must_end(
            self.allowed, self.ended, self.step, self.evaluation, evaluations=2 if due else 1
        )
        if state.global_step < state.max_steps and broadcast_object_list([end])[0]:
            self.trainer.out_of_time = control.should_save = control.should_log = True

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.evaluation = max(self.evaluation, time.monotonic() - self.ended)
        if control.should_training_stop:
            self.trainer.out_of_time = False  # patience ended it in the same step
        # behind the checkpoint, which would say that the training is over
        control.should_training_stop |= self.trainer.out_of_time
