"""A base's folder: its config, and weights read by name without loading the model."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

from safetensors import safe_open
from transformers import AutoConfig

from prompt_recovery.engine import check_model_dir


def config_hash(model_dir: str | Path) -> str:
    """12 hexadecimal digits of the folder's config.json."""
    return hashlib.sha256((check_model_dir(model_dir) / "config.json").read_bytes()).hexdigest()[:12]


def load_config(model_dir: str | Path) -> Any:
    return AutoConfig.from_pretrained(check_model_dir(model_dir), local_files_only=True)


def stored_weight(model_dir: str | Path, name: str) -> Any:
    """A tensor of the folder's safetensors as safetensors' slice, of which a part can be read; None if
    no file has it under this name."""
    folder = Path(model_dir)
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        files = [json.loads(index.read_text(encoding="utf-8"))["weight_map"].get(name)]
    else:
        files = ["model.safetensors"]
    for file in filter(None, files):
        opened = safe_open(folder / file, "pt")
        if name in opened.keys():  # noqa: SIM118
            return opened.get_slice(name)
    return None
