"""An adapter's two files as peft, this project and other tools write them, read without a model."""

from __future__ import annotations

import json
import re
from dataclasses import fields
from pathlib import Path

import torch
from peft import LoraConfig
from safetensors import SafetensorError, safe_open

from prompt_recovery.files import sha256

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
FINGERPRINT, MODEL_TYPE = "base_fingerprint", "base_model_type"
# in peft's config, and not computed by a model whose layers are called without peft's own forward
NOT_COMPUTED = (
    "alora_invocation_tokens",
    "arrow_config",
    "layer_replication",
    "megatron_config",
    "use_qalora",
)


class AdapterError(ValueError):
    """An adapter folder that must not be published or loaded; the message says which file or tensor
    is wrong."""


def digests(adapter_dir: str | Path) -> tuple[str, str]:
    """sha256 of the two files: what an adapter is, wherever it lies."""
    folder = Path(adapter_dir)
    return sha256(folder / CONFIG), sha256(folder / WEIGHTS)


def read_header(adapter_dir: str | Path) -> dict[str, str]:
    """What `save_adapter` wrote beside the tensors: the base's fingerprint and the format, as text;
    no tensor is read."""
    with safe_open(Path(adapter_dir) / WEIGHTS, "pt") as file:
        return file.metadata() or {}


def read_lora_config(folder: Path) -> tuple[LoraConfig, list[str]]:
    """The config, and what of it the installed peft does not know."""
    try:
        raw = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
        if raw["peft_type"] != "LORA":
            raise TypeError(f"peft_type is {raw['peft_type']!r}, it must be 'LORA'")
        known = {field.name for field in fields(LoraConfig)}
        given = {name: value for name, value in raw.items() if name in known}
        # else it asks for what only training needs
        config = LoraConfig(**given | {"init_lora_weights": True})
        config.init_lora_weights = given.get("init_lora_weights", True)
        config.task_type = "CAUSAL_LM"
        config.inference_mode = True
        base = config.base_model_name_or_path
        if (
            not (base is None or isinstance(base, str))
            or not isinstance(config.r, int)
            or config.r < 1
        ):
            raise TypeError(f"base_model_name_or_path is {base!r}, r is {config.r!r}")
    except (ValueError, TypeError, KeyError, AttributeError, ImportError) as error:
        raise AdapterError(
            f"{folder / CONFIG} is not a LoRA config: {error}; save it again."
        ) from error
    used = [name for name in NOT_COMPUTED if getattr(config, name)]
    if used:
        raise AdapterError(
            f"{folder / CONFIG} has {used[0]}={getattr(config, used[0])!r}, which nothing here "
            "computes; train without it."
        )
    entries = [name for name in raw.keys() - known - {"auto_mapping", "peft_version"} if raw[name]]
    return config, [f"{CONFIG}: {name}" for name in sorted(entries)]


_WRAPPERS = re.compile(
    r"(?<![^.])(?:module|_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)\."
)
_PART = re.compile(
    r"\.(lora_A|lora_B|lora_embedding_A|lora_embedding_B|lora_magnitude_vector)\.(.+)$"
)


def peft_name(name: str) -> str:
    """A tensor's name as peft saves it. Other tools leave the adapter's name in it (".default."),
    wrappers of DDP, FSDP and torch.compile, or leave peft's own prefix out."""
    name = _WRAPPERS.sub("", name)
    name = re.sub(r"\.modules_to_save\.[^.]+\.", ".", name)
    found = _PART.search(name)
    if found:
        kind, last = found[1], found[2].rpartition(".")[2]
        plain = kind in ("lora_A", "lora_B")
        name = f"{name[: found.start()]}.{kind}" + (f".{last}" if plain else "")
    return name if name.startswith("base_model.") else f"base_model.model.{name}"


def read_tensors(folder: Path) -> dict[str, torch.Tensor]:
    try:
        with safe_open(folder / WEIGHTS, "pt") as file:
            names = {name: peft_name(name) for name in file.keys()}
            twice = sorted({new for new in names.values() if [*names.values()].count(new) > 1})
            if twice:
                both = sorted(name for name in names if names[name] == twice[0])
                raise AdapterError(
                    f"{folder / WEIGHTS} holds several adapters ({', '.join(both)}); save one."
                )
            return {new: file.get_tensor(name) for name, new in names.items()}
    except SafetensorError as error:
        raise AdapterError(
            f"{folder / WEIGHTS} is not a safetensors file: {error}; copy or save it again."
        ) from error
