"""`accelerate launch`: two CPU processes train as one does, on the train notebook's own script."""

import json
import os
import runpy
import subprocess
import sys
from types import SimpleNamespace

import jupytext
import pandas as pd
import papermill
import pytest
import torch
from conftest import ROOT, TINY
from safetensors.torch import load_file

from prompt_recovery import adapter, metric, trainer, training
from prompt_recovery.engine import memory
from prompt_recovery.recipe import Recipe

# without a GPU `--cpu` starts one process, whatever --num_processes says; `--multi_gpu` starts as
# many as it is told
LAUNCH = [
    "accelerate",
    "launch",
    "--multi_gpu",
    "--num_processes",
    "2",
    "--num_machines",
    "1",
    "--mixed_precision",
    "no",
    "--dynamo_backend",
    "no",
    "--main_process_port",
    "0",
]


def script(folder, **parameters):
    """The train notebook as ARCHITECTURE makes a script of it: papermill puts the parameters in,
    jupytext writes .py."""
    folder.mkdir()
    papermill.execute_notebook(
        ROOT / "notebooks" / "train.ipynb",
        folder / "train.ipynb",
        parameters=parameters,
        prepare_only=True,
    )
    path = folder / "train.py"
    jupytext.write(jupytext.read(folder / "train.ipynb"), path, fmt="py:percent")
    return path


def test_two_processes_train_as_one(tmp_path, monkeypatch):
    # neither the 15 rows to train on nor the 2 held out can be shared out evenly: the epoch's last
    # step has 3 rows, not 4
    rows = pd.read_csv(ROOT / "demo" / "rows.csv", dtype=str).sample(17, random_state=1)
    rows.to_csv(tmp_path / "rows.csv", index=False)
    shared = dict(
        model_dir=str(TINY),
        train_csv=str(tmp_path / "rows.csv"),
        encoder_dir=str(metric.minilm_dir()),
        max_steps=4,
        learning_rate=1e-4,
        lora_dropout=0.0,
        batch_size=2,
        gradient_accumulation=2,
        max_tokens=160,
        four_bit=True,
    )
    two = script(tmp_path / "a", output_dir=str(tmp_path / "two"), **shared)
    environment = os.environ | {
        "OMP_NUM_THREADS": "1",
        "HF_HUB_OFFLINE": "1",
        "TOKENIZERS_PARALLELISM": "false",
    }
    command = [sys.executable, "-m", "accelerate.commands.accelerate_cli", *LAUNCH[1:], str(two)]
    done = subprocess.run(
        command, env=environment, cwd=ROOT, capture_output=True, text=True, timeout=240
    )
    assert done.returncode == 0, done.stderr[-3000:]
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    monkeypatch.chdir(ROOT)
    runpy.run_path(str(script(tmp_path / "b", output_dir=str(tmp_path / "one"), **shared)))

    one, both = tmp_path / "one", tmp_path / "two"
    log, other = (pd.read_csv(folder / "training_log.csv") for folder in (one, both))
    assert log["loss"].nunique() == log["eval_loss"].nunique() == 4 and log["epoch"].iloc[-1] == 1
    pd.testing.assert_frame_equal(log, other, rtol=1e-4)
    last = "checkpoints/checkpoint-4"
    for name in ("adapter", last):  # the best and the last
        expected, found = (load_file(folder / name / adapter.WEIGHTS) for folder in (one, both))
        assert expected.keys() == found.keys()
        for key in expected:
            torch.testing.assert_close(found[key], expected[key], atol=1e-5, rtol=0)
    assert max(tensor.abs().max() for key, tensor in expected.items() if "lora_B" in key) > 2e-4

    # two processes have trained, the first one has written, and nothing half-written is left
    saved = sorted((both / "checkpoints").glob("checkpoint-*"))
    assert saved and all(
        {"rng_state_0.pth", "rng_state_1.pth"} <= {p.name for p in folder.iterdir()}
        for folder in saved
    )
    names = [
        "adapter",
        "checkpoints",
        "evaluation.json",
        "held_out.csv",
        "lengths.png",
        "loss.png",
        "predictions.csv",
        "split.csv",
        "training_log.csv",
    ]
    for folder in (one, both):
        assert sorted(path.name for path in folder.iterdir()) == names
        assert all(
            (folder / name).read_bytes().endswith(b"IEND\xaeB`\x82")
            for name in ("lengths.png", "loss.png")
        )
    adapter.check_adapter(both / "adapter", TINY)
    held_out, also = (
        json.loads((folder / "evaluation.json").read_text()) for folder in (one, both)
    )
    assert held_out["n"] == also["n"] == len(pd.read_csv(both / "predictions.csv")) > 0
    assert done.stdout.count("rows at a time") == 1 and "2 rows at a time x 1" in done.stdout
    assert done.stdout.count("together") == 1  # the summary of the 4-bit model


def test_a_process_that_was_launched_with_others_never_trains_alone(monkeypatch):
    assert memory.processes().num_processes == 1
    monkeypatch.setenv("LOCAL_RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(RuntimeError, match="started 2 processes, accelerate's state knows of 1"):
        memory.processes()


def test_rows_that_cannot_be_shared_out_are_refused(monkeypatch):
    monkeypatch.setattr(training, "processes", lambda: SimpleNamespace(num_processes=3))
    with pytest.raises(training.TrainingError, match="8 x gradient_accumulation 2.*3 processes"):
        training.plan_of(None, [], Recipe(), False)
    assert training.plan_of(None, [], Recipe(gradient_accumulation=3), False)[:2] == (8, 1)


def test_rows_without_labels_stand_last_and_once():
    sampler = trainer.LengthGroupedBatches([5, 9, 3, 7, 1], batch=2, seed=0, fill=3)
    for epoch in range(3):
        sampler.set_epoch(epoch)
        order = list(sampler)
        assert (
            len(sampler) == len(order) == 8
            and order[5:] == [5, 6, 7]
            and sorted(order[:5]) == list(range(5))
        )
