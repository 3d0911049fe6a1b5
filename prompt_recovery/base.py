"""A base's folder: its config, and weights read by name without loading the model."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

from safetensors import safe_open
from transformers import AutoConfig

from prompt_recovery.engine import read_config


def config_hash(model_dir: str | Path) -> str:
    """12 hexadecimal digits of the folder's config.json."""
    read_config(model_dir)
    return hashlib.sha256((Path(model_dir) / "config.json").read_bytes()).hexdigest()[:12]


def load_config(model_dir: str | Path) -> Any:
    read_config(model_dir)
    return AutoConfig.from_pretrained(model_dir, local_files_only=True)


def longest(model_dir: str | Path, most: int = 4096) -> int:
    """Tokens of a prompt with its answer that the base can be asked: at most `most`, its positions,
    and its sliding window, which answering does not build."""
    config = load_config(model_dir)
    return min(
        most, config.max_position_embeddings, getattr(config, "sliding_window", None) or most
    )


def stored_weight(model_dir: str | Path, name: str) -> Any:
    """A tensor of the folder's safetensors as safetensors' slice, of which a part can be read; None
    if no file has it under this name."""
    folder = Path(model_dir)
    file, index = "model.safetensors", folder / "model.safetensors.index.json"
    if not (folder / file).is_file():  # transformers' order
        file = json.loads(index.read_text(encoding="utf-8"))["weight_map"].get(name)
    opened = safe_open(folder / file, "pt") if file else None
    return opened.get_slice(name) if opened and name in opened.keys() else None  # noqa: SIM118
