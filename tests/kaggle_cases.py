"""The kaggle program between folders and a stand-in."""

import csv
import json
import os
from pathlib import Path

import torch
from conftest import ROOT
from kaggle_stand_in import USER, StandIn
from safetensors.torch import save_file

from kaggle_upload import publish
from kaggle_upload.__main__ import main

SLUG = f"{USER}/recover-prompts"
PUBLIC = "mistral-ai/mixtral/pyTorch/8x7b-instruct-v0.1-hf/1"
OUTSIDE = dict(os.environ)  # as it was before any test turned it towards the stand-in
HANDLE = f"{USER}/recovery/transformers/r4"
WEIGHTS = "adapter_model.safetensors"


def write_adapter(folder: Path, seed: int) -> dict[str, bytes]:
    """A small adapter whose weights have the same size for every seed; its files' bytes by name."""
    folder.mkdir(parents=True, exist_ok=True)
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": "org/base",
        "r": 4,
    }
    (folder / "adapter_config.json").write_text(
        json.dumps(config | {"lora_alpha": 8, "target_modules": ["q_proj"]})
    )
    generator = torch.Generator().manual_seed(seed)
    a, b = torch.randn(4, 5000, generator=generator), torch.randn(5000, 4, generator=generator)
    names = [f"base_model.model.q_proj.lora_{x}.weight" for x in "AB"]
    tensors = dict(zip(names, (a, b), strict=True))
    save_file(tensors, folder / WEIGHTS, metadata={"style": "plain"})
    return {path.name: path.read_bytes() for path in folder.iterdir()}


class Case:
    """A stand-in server, an adapter folder, and the program between them."""

    def __init__(self, tmp_path: Path, capsys):
        self.server, self.tmp, self.capsys = StandIn(), tmp_path, capsys
        self.folder = tmp_path / "run" / "adapter"
        self.said = ""  # everything printed so far

    def write(self, seed: int) -> dict[str, bytes]:
        return write_adapter(self.folder, seed)

    def run(self, *argv: str) -> tuple[int, str, str]:
        code = main([str(word) for word in argv])
        out, err = self.capsys.readouterr()
        self.said += out + err
        return code, out, err

    def publish(self, *more: str, timeout: float = 30, to: str = HANDLE) -> tuple[int, str, str]:
        csv_path = self.tmp / "versions.csv"
        options = [
            "--to",
            to,
            "--notes",
            "some notes",
            "--versions",
            csv_path,
            "--timeout",
            timeout,
        ]
        return self.run("adapter", self.folder, *options, *more)

    def standing(self, seed: int) -> dict[str, bytes]:
        """Let an earlier version stand on the server, recorded with other content."""
        files = write_adapter(self.tmp / "earlier", seed)
        self.server.models[f"{USER}/recovery"] = {"r4": [files]}
        row = [HANDLE, "1", "0" * 64] + [""] * (len(publish.COLUMNS) - 3)
        (self.tmp / "versions.csv").write_text(f"{','.join(publish.COLUMNS)}\n{','.join(row)}\n")
        return files

    @property
    def versions(self) -> list[dict[str, bytes]]:
        return self.server.models.get(f"{USER}/recovery", {}).get("r4", [])

    def recorded(self) -> list[tuple[str, str]]:
        path = self.tmp / "versions.csv"
        if not path.exists():
            return []
        with path.open(newline="") as file:
            return [(row["handle"], row["version"]) for row in csv.DictReader(file)]


BASE = f"{USER}/recovery/transformers/base"
DATASET = f"{USER}/prompt-recovery-wheels"
NOTEBOOK = ROOT / "notebooks" / "submission.ipynb"


def publish_base(case, folder, *more):
    options = ["--to", BASE, "--versions", case.tmp / "versions.csv", "--timeout", "5"]
    return case.run("base", folder, *options, *more)


def push(case, *more, file=NOTEBOOK):
    sources = [
        "--adapter",
        f"{HANDLE}/3",
        "--base",
        f"{BASE}/1",
        "--wheels",
        DATASET,
        "--competition",
        "llm-prompts",
    ]
    return case.run(
        "notebook",
        "--to",
        f"{USER}/recover-prompts",
        *sources,
        "--file",
        file,
        "--timeout",
        "30",
        *more,
    )


def submit(case, *more):
    options = [
        "--notebook",
        f"{USER}/recover-prompts/2",
        "--competition",
        "llm-prompts",
        "--timeout",
        "30",
    ]
    return case.run("submit", *options, "--message", "adapter 3", *more)
