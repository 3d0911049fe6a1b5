"""The checkpoint from which a training goes on, if its settings are those of now."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pandas as pd
from peft import PeftModel, set_peft_model_state_dict
from safetensors.torch import load_file

from prompt_recovery.adapter_files import WEIGHTS
from prompt_recovery.agreement import same_checkpoint
from prompt_recovery.engine import everywhere, processes
from prompt_recovery.files import write_csv, write_text
from prompt_recovery.recipe import Recipe
from prompt_recovery.run_folder import last_checkpoint, made_by, remove_broken, set_aside, whole
from prompt_recovery.run_lock import RunFolderError
from prompt_recovery.training_log import ending, training_log


def go_on_from(
    settings: Mapping[str, Any], recipe: Recipe, every: int, writes: bool
) -> Path | None:
    """The checkpoint from which all processes go on, if there is one and it is of these settings,
    which are kept in settings.json. every: steps from one checkpoint to the next; writes: see
    `run_lock.claim_together`."""
    first, folder = processes().is_main_process, Path(recipe.output_dir)
    checkpoints = folder / "checkpoints"
    if writes:
        if not recipe.resume:
            set_aside(folder, ("checkpoints", "training_log.csv"))
        remove_broken(checkpoints, whole)
    now = json.loads(json.dumps(settings, sort_keys=True, default=sorted))
    everywhere(lambda: _check_checkpoints(checkpoints, now) if first else None)
    last = same_checkpoint(folder, writes, every)
    if writes:
        write_text(json.dumps(now, indent=1), checkpoints / "settings.json")
    if last and first:
        print(f"going on from {last}")
    return last


def _check_checkpoints(checkpoints: Path, now: Mapping[str, Any]) -> None:
    last, note = last_checkpoint(checkpoints), checkpoints / "settings.json"
    if last is None:
        return
    remedy = "Give that back, or take another output_dir, or resume=False to start again."
    try:
        then = json.loads(note.read_text(encoding="utf-8"))
    except (FileNotFoundError, ValueError):
        then = None
    if not isinstance(then, dict):
        raise RunFolderError(
            f"resume=True, but {note} does not say with which settings the checkpoints were made. "
            f"{remedy}"
        )
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
    saved = json.loads((last / "trainer_state.json").read_text())
    best, made, sharing = saved["best_global_step"], made_by(saved), processes().num_processes
    if best is not None and not (checkpoints / f"checkpoint-{best}").is_dir():
        raise RunFolderError(
            f"resume=True, but the best checkpoint so far, checkpoint-{best}, is no longer in "
            f"{checkpoints}: put it back, or resume=False to start again."
        )
    if made not in (None, sharing):
        print(
            f"{last} was made by {made} processes, and there are {sharing}: the same rows a step, "
            "but other random numbers for dropout"
        )


def finished(last: Path, model: PeftModel, recipe: Recipe, steps: int) -> pd.DataFrame | None:
    """The log of a run that was killed after its last step, with its adapter put into the model;
    None if it had not ended. Trainer would do one more step all the same."""
    saved = json.loads((last / "trainer_state.json").read_text())
    if not saved["stateful_callbacks"]["TrainerControl"]["args"]["should_training_stop"]:
        return None
    kept = last.parent / Path(saved["best_model_checkpoint"] or last).name
    set_peft_model_state_dict(model, load_file(kept / WEIGHTS))
    log = training_log(saved["log_history"])
    if processes().is_main_process:
        write_csv(log, Path(recipe.output_dir) / "training_log.csv")
    log.attrs["ended"] = ending(saved, steps, recipe.patience)
    processes().print(log.attrs["ended"])
    model.eval()
    return log
