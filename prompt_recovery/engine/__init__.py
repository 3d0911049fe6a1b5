"""4-bit mixtures of experts for transformers: load, train on, answer with, save. Knows no prompts,
CSV or Kaggle.

Outside code uses what is named here, and nothing below. The engine imports nothing of
prompt_recovery outside itself.
"""

from prompt_recovery.engine.batching import spread_order
from prompt_recovery.engine.checkpointing import TrainingPlan, apply_plan, training_plan
from prompt_recovery.engine.folder import (
    ModelError,
    base_id,
    check_model_dir,
    loads_in_four_bit,
    read_config,
)
from prompt_recovery.engine.generation import GREEDY, Answer, Finished, Sampling, generate, ready
from prompt_recovery.engine.group import (
    ProcessLost,
    everywhere,
    gathered,
    launched,
    members,
    named_if_lost,
    processes,
    time_limit,
)
from prompt_recovery.engine.loading import check_base, default_dtype, load_base, save_quantised
from prompt_recovery.engine.memory import TooLittleMemory
from prompt_recovery.engine.merging import MergeError, merged
from prompt_recovery.engine.meter import Meter
from prompt_recovery.engine.planning import Planned, plan
from prompt_recovery.engine.quantiser import Nf4Error, check_folder
from prompt_recovery.engine.reckoning import on_h100s, on_t4s, train_on_t4s
from prompt_recovery.engine.storage import release_buffers

__all__ = [
    "GREEDY",
    "Answer",
    "Finished",
    "MergeError",
    "Meter",
    "ModelError",
    "Nf4Error",
    "Planned",
    "ProcessLost",
    "Sampling",
    "TooLittleMemory",
    "TrainingPlan",
    "apply_plan",
    "base_id",
    "check_base",
    "check_folder",
    "check_model_dir",
    "default_dtype",
    "everywhere",
    "gathered",
    "generate",
    "launched",
    "load_base",
    "loads_in_four_bit",
    "members",
    "merged",
    "named_if_lost",
    "on_h100s",
    "on_t4s",
    "plan",
    "processes",
    "read_config",
    "ready",
    "release_buffers",
    "save_quantised",
    "spread_order",
    "time_limit",
    "train_on_t4s",
    "training_plan",
]
