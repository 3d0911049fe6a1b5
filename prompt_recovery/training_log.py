"""What a training logged: losses and scores by step, and how it ended."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import pandas as pd


def training_log(history: Sequence[Mapping[str, float]]) -> pd.DataFrame:
    """transformers' log history as one row a step:
    step, epoch, loss, eval_loss, eval_scs, learning_rate, and in fp16 skipped_steps (since the row
    before) and loss_scale; NaN where not measured."""
    columns = ["step", "epoch", "loss", "eval_loss", "eval_scs", "learning_rate"]
    if any("loss_scale" in entry for entry in history):
        columns += ["skipped_steps", "loss_scale"]
    frame = pd.DataFrame(
        [{k: entry[k] for k in columns if k in entry} for entry in history], columns=columns
    )
    frame = frame[frame["loss"].notna() | frame["eval_loss"].notna()]
    return frame.groupby("step", as_index=False).first().reindex(columns=columns)


def ending(state: Mapping[str, Any], total: int, patience: int, out_of_time: bool = False) -> str:
    """Which step is kept, why the training ended, and the steps that fp16's scaler left out; state:
    that of Trainer."""
    log = training_log(state["log_history"])
    measures = ["eval_loss"] if log["eval_scs"].isna().all() else ["eval_scs", "eval_loss"]
    kept = f"kept: step {state['best_global_step'] or state['global_step']}"
    for row in log[log["step"] == state["best_global_step"]].to_dict("records"):
        kept += "".join(f", {name} {row[name]:.4g}" for name in measures)
    if skipped := skipped_steps(log):
        kept += (
            f"; {skipped} of {state['global_step']} steps changed nothing, since their gradients "
            "were not finite in fp16"
        )
    if state["global_step"] >= total:
        return f"{kept}; all {total} steps done"
    if out_of_time:
        return (
            f"{kept}; ENDED IN TIME at step {state['global_step']} of {total}, since "
            "time_budget_hours is nearly over: resume=True goes on from there"
        )
    return (
        f"{kept}; STOPPED EARLY at step {state['global_step']} of {total}, since {patience} "
        f"evaluations in a row brought no better {' or, where equal, '.join(measures)}"
    )


def skipped_steps(log: pd.DataFrame) -> int:
    """Steps of a training's log that fp16's loss scaler left out; 0 in other precisions."""
    return int(log["skipped_steps"].sum()) if "skipped_steps" in log else 0
