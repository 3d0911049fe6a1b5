"""A base: its folder's config, its fingerprint, and weights read by name without loading the
model."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from transformers import AutoConfig, PreTrainedModel

from prompt_recovery.engine import read_config

# bf16 keeps 8 bits, fp16 11: the same base loaded in another dtype moves a value by up to 2**-8
FINGERPRINT_TOLERANCE = 2.0**-7


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


def base_fingerprint(model: PreTrainedModel) -> list[float]:
    """64 weights of lm_head, spread over it: it is 16 bit in every way of loading, and differs
    between bases of one shape."""
    head = model.get_output_embeddings()
    weight = getattr(head, "original_module", head).weight.detach()
    flat = weight.flatten()
    return flat[_spread(flat.numel()).to(flat.device)].float().cpu().tolist()


def stored_fingerprint(model_dir: str | Path) -> list[float] | None:
    """`base_fingerprint` of the files; None where the head is not stored under its usual name."""
    for name in ("lm_head.weight", "model.embed_tokens.weight"):  # of a tied head there is one
        weight = stored_weight(model_dir, name)
        if weight is not None:
            rows, columns = weight.get_shape()
            places = [divmod(place, columns) for place in _spread(rows * columns).tolist()]
            return [float(weight[r : r + 1, c : c + 1]) for r, c in places]
    return None


def _spread(count: int) -> torch.Tensor:
    # integers: the last of a float32 linspace over Mixtral's 131,072,000 weights is one beyond them
    return torch.arange(64) * (count - 1) // 63
