"""A base's folder: its config."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

from transformers import AutoConfig

from prompt_recovery.engine import check_model_dir


def config_hash(model_dir: str | Path) -> str:
    """12 hexadecimal digits of the folder's config.json."""
    return hashlib.sha256((check_model_dir(model_dir) / "config.json").read_bytes()).hexdigest()[:12]


def load_config(model_dir: str | Path) -> Any:
    return AutoConfig.from_pretrained(check_model_dir(model_dir), local_files_only=True)
