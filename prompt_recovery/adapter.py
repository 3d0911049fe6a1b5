"""A LoRA adapter: put one on a base, save it as exactly two files that work on the unmodified base, check, load."""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model, get_peft_model_state_dict
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedModel

from prompt_recovery.base import load_config
from prompt_recovery.recipe import Format, Recipe

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
PICKLES = (".bin", ".pt", ".pth", ".pkl", ".ckpt")
FINGERPRINT = "base_fingerprint"
# bf16 keeps 8 bits, fp16 11: the same base loaded in another dtype moves a value by up to 2**-8
FINGERPRINT_TOLERANCE = 2.0**-7


class AdapterError(ValueError):
    """An adapter folder that must not be published or loaded; the message says which file or tensor is wrong."""


def resize_input_embeddings(model: PreTrainedModel, rows: int) -> None:
    """Give the input embeddings at least `rows` rows (the new ones zero), in place; `lm_head` stays as it is.

    A pad token is read but never predicted. `resize_token_embeddings` would give it a row of lm_head too, which takes
    a share of every softmax: losses with `<pad>` and with `unk` would differ.
    """
    old = model.get_input_embeddings()
    if rows <= old.num_embeddings:
        return
    new = nn.Embedding(rows, old.embedding_dim, device=old.weight.device, dtype=old.weight.dtype)
    with torch.no_grad():
        new.weight.zero_()
        new.weight[: old.num_embeddings] = old.weight
    if hasattr(old, "_hf_hook"):  # accelerate's hook moves inputs when the layers stand on several GPUs
        from accelerate.hooks import add_hook_to_module

        add_hook_to_module(new, old._hf_hook)
    model.set_input_embeddings(new.requires_grad_(False))


def add_lora(
    model: PreTrainedModel,
    *,
    base: str,
    r: int = Recipe.lora_r,
    alpha: int = Recipe.lora_alpha,
    dropout: float = Recipe.lora_dropout,
    target_modules: Sequence[str] = Recipe.target_modules,
    seed: int = Recipe.seed,
) -> PeftModel:
    """A fresh trainable LoRA on the model, its weights in fp32 whatever the base's dtype (fp16 GradScaler needs that).

    base: the base's public id, which goes into the adapter's config instead of a local path.
    """
    torch.manual_seed(seed)
    config = LoraConfig(
        r=r, lora_alpha=alpha, lora_dropout=dropout, target_modules=list(target_modules), task_type="CAUSAL_LM"
    )
    model.name_or_path = base  # peft writes this name into the adapter's config
    return get_peft_model(model, config)


def save_adapter(model: PeftModel, adapter_dir: str | Path, format: Format | None = None) -> Path:
    """Write adapter_config.json and adapter_model.safetensors, and nothing else, to adapter_dir (replaced whole).

    No embeddings or lm_head even if the vocabulary was resized (peft would add 1 GB that the base then refuses), fp32,
    no local path. The weights' header carries a fingerprint of the base, which `load_adapter` compares, and the format
    that the adapter was trained for, which `check_adapter` gives back.
    Raises AdapterError where a tensor is not finite; what stood in adapter_dir then stays.
    """
    state = get_peft_model_state_dict(model, save_embedding_layers=False)
    tensors = {name: tensor.detach().float().cpu().contiguous() for name, tensor in state.items()}
    _check_finite(tensors, "the model")
    folder = Path(adapter_dir)
    staging = folder.with_name(folder.name + ".partial")
    shutil.rmtree(staging, ignore_errors=True)
    staging.mkdir(parents=True)
    config = model.peft_config["default"]
    was_training, config.inference_mode = config.inference_mode, True
    config.save_pretrained(str(staging))
    config.inference_mode = was_training
    fingerprint = json.dumps(base_fingerprint(model.get_base_model()))
    header = {"format": "pt", FINGERPRINT: fingerprint} | (asdict(format) if format else {})
    save_file(tensors, staging / WEIGHTS, metadata=header)
    shutil.rmtree(folder, ignore_errors=True)
    staging.rename(folder)
    return folder


def check_adapter(adapter_dir: str | Path, model_dir: str | Path | None = None) -> dict[str, Any]:
    """Check the two files against each other and, if model_dir is given, against that base's config; nothing is loaded
    onto a GPU. Returns rank, alpha, target_modules, base, parameters, bytes and the format that its header names.

    Raises AdapterError: missing or extra files, pickle files, unreadable files, a local path as the base's name, tensors
    that are missing, extra, of a wrong shape or not finite, an adapter whose update is zero everywhere.
    """
    folder = Path(adapter_dir)
    if not folder.is_dir():
        raise AdapterError(f"adapter_dir {folder} is not a folder; train writes it as <output_dir>/adapter.")
    # `kaggle_upload adapter --with-library` puts the library's wheel beside the two files
    names = {path.name for path in folder.iterdir() if path.suffix != ".whl"}
    pickles = sorted(name for name in names if name.endswith(PICKLES))
    if pickles:
        raise AdapterError(
            f"{folder} holds pickle files {pickles}, which can run code when loaded; save as safetensors."
        )
    if names != {CONFIG, WEIGHTS}:
        raise AdapterError(f"{folder} must hold exactly {CONFIG} and {WEIGHTS}; it holds {sorted(names)}.")
    config = _read_config(folder)
    tensors = _read_tensors(folder)
    _check_finite(tensors, str(folder))
    if model_dir is not None:
        _check_names(tensors, config, model_dir, folder)
    ranks = {tensor.shape[0] for name, tensor in tensors.items() if "lora_A" in name}
    if ranks != {config.r}:
        raise AdapterError(
            f"{folder}: {CONFIG} says rank {config.r}, the tensors have {sorted(ranks)}; retrain or fix r."
        )
    pairs = [(tensors.get(name.replace("lora_B", "lora_A")), up) for name, up in tensors.items() if "lora_B" in name]
    if config.lora_alpha == 0 or not any(down is not None and down.any() and up.any() for down, up in pairs):
        raise AdapterError(
            f"{folder} changes no logits: alpha {config.lora_alpha}, lora_B or lora_A zero everywhere; it is untrained."
        )
    header = read_header(folder)
    return {
        "base": config.base_model_name_or_path,
        "rank": config.r,
        "alpha": config.lora_alpha,
        "target_modules": sorted(config.target_modules),
        "parameters": sum(tensor.numel() for tensor in tensors.values()),
        "bytes": (folder / WEIGHTS).stat().st_size,
        **{each.name: header[each.name] for each in fields(Format) if each.name in header},
    }


def load_adapter(model: PreTrainedModel, adapter_dir: str | Path, model_dir: str | Path) -> PeftModel:
    """The base with the adapter on it, frozen and in eval mode (LoRA dropout would stay on otherwise).

    Raises AdapterError as `check_adapter` does, and where the adapter was trained on another base of the same shape.
    """
    check_adapter(adapter_dir, model_dir)
    trained_on = json.loads(read_header(adapter_dir).get(FINGERPRINT, "null"))
    here = base_fingerprint(model)
    if trained_on is not None:
        distance = (torch.tensor(trained_on) - torch.tensor(here)).norm() / torch.tensor(here).norm()
        if not distance <= FINGERPRINT_TOLERANCE:
            raise AdapterError(
                f"{adapter_dir} was trained on another base: its fingerprint is {distance:.3f} from that of {model_dir} "
                f"(at most {FINGERPRINT_TOLERANCE:.4f}). Load the base it was trained on, or train again."
            )
    model.name_or_path = LoraConfig.from_pretrained(str(adapter_dir)).base_model_name_or_path
    return PeftModel.from_pretrained(model, str(adapter_dir), is_trainable=False).eval()


def base_fingerprint(model: PreTrainedModel) -> list[float]:
    """64 weights of lm_head, spread over it: it is 16 bit in every way of loading, and differs between bases of one shape."""
    flat = model.get_output_embeddings().weight.detach().flatten()
    # integers: the last of a float32 linspace over Mixtral's 131,072,000 weights is one beyond them
    places = torch.arange(64) * (flat.numel() - 1) // 63
    return flat[places.to(flat.device)].float().cpu().tolist()


def _read_config(folder: Path) -> LoraConfig:
    try:
        raw = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
        if raw["peft_type"] != "LORA":
            raise TypeError(f"peft_type is {raw['peft_type']!r}, it must be 'LORA'")
        config = LoraConfig.from_pretrained(str(folder))
    except (json.JSONDecodeError, UnicodeDecodeError, TypeError, KeyError) as error:
        raise AdapterError(f"{folder / CONFIG} is not a LoRA config: {error}; save it again.") from error
    base = str(raw.get("base_model_name_or_path") or "")
    if base.startswith(("/", ".", "~")) or "\\" in base or base.count("/") > 1:
        raise AdapterError(f"{folder / CONFIG} names the base by the local path {base!r}; write its public id instead.")
    return config


def read_header(adapter_dir: str | Path) -> dict[str, str]:
    """What `save_adapter` wrote beside the tensors: the base's fingerprint and the format, as text; no tensor is read."""
    with safe_open(Path(adapter_dir) / WEIGHTS, "pt") as file:
        return file.metadata() or {}


def _read_tensors(folder: Path) -> dict[str, torch.Tensor]:
    try:
        with safe_open(folder / WEIGHTS, "pt") as file:
            return {name: file.get_tensor(name) for name in file.keys()}
    except SafetensorError as error:
        raise AdapterError(f"{folder / WEIGHTS} is not a safetensors file: {error}; copy or save it again.") from error


def _check_finite(tensors: dict[str, torch.Tensor], where: str) -> None:
    bad = [name for name, tensor in tensors.items() if not torch.isfinite(tensor).all()]
    if bad:
        raise AdapterError(f"{where}: {len(bad)} tensors hold NaN or infinity, the first is {bad[0]}; lower the rate.")


def _check_names(tensors: dict[str, torch.Tensor], config: LoraConfig, model_dir: str | Path, folder: Path) -> None:
    # what peft itself would save for this config on this base, built without memory
    with torch.device("meta"):
        base = AutoModelForCausalLM.from_config(load_config(model_dir))
        base.name_or_path = config.base_model_name_or_path  # else peft renames it in the config
        skeleton = get_peft_model(base, config)
    expected = {n: tuple(t.shape) for n, t in get_peft_model_state_dict(skeleton, save_embedding_layers=False).items()}
    found = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    for kind, wrong in (
        ("misses", sorted(expected.keys() - found.keys())),
        ("has besides", sorted(found.keys() - expected.keys())),
        ("has in another shape", sorted(n for n in expected.keys() & found.keys() if expected[n] != found[n])),
    ):
        if wrong:
            shapes = f" {found.get(wrong[0], '')} where the base needs {expected.get(wrong[0], 'none')}"
            raise AdapterError(
                f"{folder} does not fit the base in {model_dir}: it {kind} {len(wrong)} tensors, the first is "
                f"{wrong[0]}{shapes}. It belongs to another base, rank or config."
            )
