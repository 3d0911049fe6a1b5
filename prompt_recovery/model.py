"""Load a base model from a local folder and put a LoRA adapter on it."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig, PreTrainedModel

ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")


class ModelError(ValueError):
    """A folder that does not hold a usable base model."""


def check_model_dir(model_dir: str | Path) -> Path:
    """The folder as a Path, if it holds config.json and safetensors weights. Raises ModelError before anything loads."""
    folder = Path(model_dir)
    if not (folder / "config.json").is_file():
        raise ModelError(f"model_dir {folder} has no config.json; give the folder of a base model as the hub has it.")
    if not list(folder.glob("*.safetensors")):
        raise ModelError(
            f"model_dir {folder} has no *.safetensors; pickle weights (.bin) are not loaded, convert them."
        )
    return folder


def base_id(model_dir: str | Path) -> str:
    """A public name for the base: `_name_or_path` of its config if that is owner/name, else the folder's name."""
    name = json.loads((check_model_dir(model_dir) / "config.json").read_text()).get("_name_or_path", "")
    public = name.count("/") == 1 and not name.startswith((".", "/", "~")) and not Path(name).exists()
    return name if public else Path(model_dir).resolve().name


def default_dtype() -> torch.dtype:
    """bf16 on GPUs that have it, fp16 on older ones (a T4), fp32 on the CPU."""
    if not torch.cuda.is_available():
        return torch.float32
    return torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float16


def load_base(model_dir: str | Path, dtype: torch.dtype | None = None, four_bit: bool = False) -> PreTrainedModel:
    """The base model with frozen weights in eval mode, on the GPU if there is one.

    dtype: of the weights; None takes `default_dtype()`.
    Raises ModelError for a folder without config or safetensors, and for four_bit.
    """
    folder = check_model_dir(model_dir)
    if four_bit:
        # refused rather than done halfway: transformers' load_in_4bit leaves Mixtral's experts (97% of it) in 16 bit
        raise ModelError("four_bit=True is not available: stock 4-bit loading leaves Mixtral's experts in 16 bit.")
    model = AutoModelForCausalLM.from_pretrained(
        folder,
        dtype=dtype or default_dtype(),
        device_map="auto" if torch.cuda.is_available() else None,
        local_files_only=True,
    )
    if not torch.cuda.is_available():
        # transformers takes batched_mm for decoding, which copies the experts' weights for every token: 37 s a training
        # step of the demo on 2 cores, where eager takes 0.5 s
        model.set_experts_implementation("eager")
    model.generation_config = GenerationConfig(eos_token_id=2, bos_token_id=1)  # no sampling settings from the hub
    return model.eval().requires_grad_(False)


def load_config(model_dir: str | Path) -> Any:
    return AutoConfig.from_pretrained(check_model_dir(model_dir), local_files_only=True)


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
    r: int = 16,
    alpha: int = 64,
    dropout: float = 0.1,
    target_modules: Sequence[str] = ATTENTION,
    seed: int = 0,
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
