"""A LoRA adapter: put one on a base, save it as exactly two files that work on the unmodified base,
check it for use or to publish, load it. Adapters that other tools wrote are used as peft reads
them."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from copy import copy
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

import torch
from peft import (
    LoraConfig,
    PeftModel,
    get_peft_model,
    get_peft_model_state_dict,
    set_peft_model_state_dict,
)
from safetensors.torch import save
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedModel

from prompt_recovery.adapter_checks import (
    CHANGES_BASE,
    Adapter,
    attach,
    check_fingerprint,
    check_finite,
    read_adapter,
)
from prompt_recovery.adapter_files import (
    CONFIG,
    FINGERPRINT,
    MODEL_TYPE,
    WEIGHTS,
    AdapterError,
    read_header,
)
from prompt_recovery.base import base_digest, base_fingerprint, load_config
from prompt_recovery.files import room_said
from prompt_recovery.recipe import Format, Recipe


def resize_input_embeddings(model: PreTrainedModel, rows: int) -> None:
    """Give the input embeddings at least `rows` rows (the new ones zero), in place; `lm_head` stays
    as it is.

    A pad token is read but never predicted. `resize_token_embeddings` would give it a row of
    lm_head too, which takes a share of every softmax: losses with `<pad>` and with `unk` would
    differ.
    """
    old = model.get_input_embeddings()
    if rows <= old.num_embeddings:
        return
    new = nn.Embedding(rows, old.embedding_dim, device=old.weight.device, dtype=old.weight.dtype)
    with torch.no_grad():
        new.weight.zero_()
        new.weight[: old.num_embeddings] = old.weight
    # accelerate's hook moves inputs when the layers stand on several GPUs
    if hasattr(old, "_hf_hook"):
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
    """A fresh trainable LoRA on the model, its weights in fp32 whatever the base's dtype (fp16
    GradScaler needs that).

    Args:
        base: the base's public id, which goes into the adapter's config instead of a local path.
        r, alpha, dropout: rank, scale times rank, and the share of inputs that training drops.
        target_modules: ends of the names of the layers that get one; see `check_target_modules`.
        seed: of the first weights. torch's own generator is set to it.
    """
    torch.manual_seed(seed)
    config = LoraConfig(
        r=r,
        lora_alpha=alpha,
        lora_dropout=dropout,
        target_modules=list(target_modules),
        task_type="CAUSAL_LM",
    )
    model.name_or_path = base  # peft writes this name into the adapter's config
    return get_peft_model(model, config)


def check_target_modules(target_modules: Sequence[str], model_dir: str | Path) -> None:
    """Raises AdapterError for names that no module of the base ends in; no weights are read."""
    with torch.device("meta"):
        names = [
            name
            for name, _ in AutoModelForCausalLM.from_config(load_config(model_dir)).named_modules()
        ]
    unknown = [
        each
        for each in target_modules
        if not any(f".{name}".endswith(f".{each}") for name in names)
    ]
    if unknown and list(target_modules) != ["all-linear"]:
        last = sorted({name.rpartition(".")[2] for name in names if name.endswith("proj")})
        raise AdapterError(
            f"target_modules: no module of the base is called {', '.join(unknown)}; there are "
            f"{', '.join(last)}."
        )


def training_key(model: PeftModel) -> dict[str, Any]:
    """What a training must share to be gone on with: the LoRA's settings as far as they differ from
    peft's defaults, and the base by its weights; neither peft's version nor where the base lies."""
    plain, config = LoraConfig().to_dict(), model.peft_config["default"].to_dict()
    skipped = ("base_model_name_or_path", "peft_version", "inference_mode")
    # an option left empty is one that peft set while it put the LoRA on
    lora = {
        name: value
        for name, value in config.items()
        if name not in skipped and value != plain.get(name)
    }
    lora = {name: value for name, value in lora.items() if value or plain.get(name)}
    return dict(lora=lora, base=base_digest(model.get_base_model()))


def save_adapter(model: PeftModel, adapter_dir: str | Path, format: Format | None = None) -> Path:
    """Write adapter_config.json and adapter_model.safetensors, and nothing else, to adapter_dir
    (replaced whole).

    No embeddings or lm_head even if the vocabulary was resized (peft would add 1 GB that the base
    then refuses), fp32, no local path. The weights' header carries a fingerprint of the base, which
    `load_adapter` compares, and the format that the adapter was trained for, which `check_adapter`
    gives back. The same weights give the same bytes.
    Raises AdapterError where a tensor is not finite; what stood in adapter_dir then stays.
    """
    state = get_peft_model_state_dict(model, save_embedding_layers=False)
    tensors = {name: tensor.detach().float().cpu().contiguous() for name, tensor in state.items()}
    check_finite(tensors, "the model")
    folder = Path(adapter_dir)
    staging = folder.with_name(folder.name + ".partial")
    shutil.rmtree(staging, ignore_errors=True)
    config = copy(model.peft_config["default"])
    config.inference_mode = True
    if not isinstance(config.target_modules, str):  # a set has another order in each process
        config.target_modules = sorted(config.target_modules or [])
    base = model.get_base_model()
    witnesses = {
        FINGERPRINT: json.dumps(base_fingerprint(base)),
        MODEL_TYPE: base.config.model_type,
    }
    metadata = {"format": "pt"} | witnesses | (asdict(format) if format else {})
    try:
        with room_said(folder):
            staging.mkdir(parents=True)
            config.save_pretrained(str(staging))
            (staging / WEIGHTS).write_bytes(_in_order(save(tensors, metadata)))
    except OSError:  # what is half-written takes room
        shutil.rmtree(staging, ignore_errors=True)
        raise
    shutil.rmtree(folder, ignore_errors=True)
    staging.rename(folder)
    return folder


def _in_order(weights: bytes) -> bytes:
    """A safetensors file with its metadata sorted. The library shuffles it, so that the sha256 of
    equal adapters would differ."""
    end = 8 + int.from_bytes(weights[:8], "little")
    header = json.loads(weights[8:end])
    header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # tensors begin at a multiple of 8
    return len(text).to_bytes(8, "little") + text + weights[end:]


def check_adapter(
    adapter_dir: str | Path, model_dir: str | Path | None = None, four_bit: bool | None = None
) -> dict[str, Any]:
    """Check that an adapter of this or another tool can be used and, if model_dir is given, that it
    belongs to that base, by all that files tell; nothing is loaded onto a GPU.

    four_bit: as the base will be loaded, see `load_base`.
    Returns rank, alpha, target_modules, base (its name as the file has it, or None), parameters,
    bytes, the format that its header names, and, where there are any, the names that are ignored:
    files beside the two, entries of the config that the installed peft does not know, copies of the
    base's own weights. No pickle is ever opened.
    Raises AdapterError: files that are missing or unreadable, an adapter that peft can't compute
    here, tensors that are missing, extra, of a wrong shape or not finite, another base by name,
    architecture or fingerprint, an update that is zero everywhere.
    """
    folder = Path(adapter_dir)
    config, tensors, header, ignored = read_adapter(folder, model_dir, four_bit)
    about = {
        "base": config.base_model_name_or_path,
        "rank": config.r,
        "alpha": config.lora_alpha,
        "target_modules": _targets(config),
        "parameters": sum(tensor.numel() for tensor in tensors.values()),
        "bytes": (folder / WEIGHTS).stat().st_size,
        **{each.name: header[each.name] for each in fields(Format) if each.name in header},
    }
    return about | ({"ignored": ignored} if ignored else {})


def check_to_publish(adapter_dir: str | Path) -> dict[str, Any]:
    """`check_adapter`, and that the base is named by a public id: a local path would be published.

    Raises AdapterError.
    """
    about = check_adapter(adapter_dir)
    base = str(about["base"] or "")
    if base.startswith(("/", ".", "~")) or "\\" in base or base.count("/") > 1:
        raise AdapterError(
            f"{Path(adapter_dir) / CONFIG} names the base by the local path {base!r}; write its "
            "public id instead."
        )
    return about


def load_adapter(
    model: PreTrainedModel, adapter_dir: str | Path, model_dir: str | Path
) -> PeftModel:
    """The base with the adapter on it, frozen and in eval mode (LoRA dropout would stay on
    otherwise).

    Raises AdapterError as `check_adapter` does, and where the adapter was trained on another base
    of the same shape.
    """
    return _load(model, _read_for(model, adapter_dir, model_dir), adapter_dir)


def check_loaded(model: PreTrainedModel, adapter_dir: str | Path, model_dir: str | Path) -> None:
    """Raises AdapterError where the adapter was trained on another base than this one, as loaded:
    of the same shape, and with a head that the files have under no usual name."""
    folder = Path(adapter_dir)
    check_fingerprint(folder, read_header(folder), base_fingerprint(model), model_dir)


def _read_for(model: PreTrainedModel, adapter_dir: str | Path, model_dir: str | Path) -> Adapter:
    four_bit = hasattr(model.config, "quantization_config")
    adapter = read_adapter(Path(adapter_dir), model_dir, four_bit)
    check_loaded(model, adapter_dir, model_dir)
    return adapter


def _load(model: PreTrainedModel, adapter: Adapter, adapter_dir: str | Path) -> PeftModel:
    lora = attach(model, adapter.config)
    left = set_peft_model_state_dict(lora, adapter.tensors).unexpected_keys
    if left:
        raise AdapterError(
            f"{adapter_dir}: peft finds no place for {len(left)} tensors, the first is {left[0]}."
        )
    return lora.requires_grad_(False).eval()


@contextmanager
def put_on(
    model: PreTrainedModel, adapter_dir: str | Path, model_dir: str | Path
) -> Iterator[PeftModel]:
    """Inside the with block, `load_adapter`'s model; afterwards the base is as it was, module for
    module and bit for bit, so that the next adapter answers as it does alone.

    One adapter at a time takes memory beside the base. peft's own `unload` leaves whole trained
    modules on the base, and what PiSSA and OLoRA took out of its weights.
    """
    adapter = _read_for(model, adapter_dir, model_dir)
    children = [(module, dict(module._modules)) for module in model.modules()]
    weights = _weights_that_change(model, adapter)
    try:
        yield _load(model, adapter, adapter_dir)
    finally:
        vars(model).pop("peft_config", None)
        for module, before in children:
            module._modules = before
        for weight, before in weights:
            weight.data = before


def _weights_that_change(
    model: PreTrainedModel, adapter: Adapter
) -> list[tuple[nn.Parameter, torch.Tensor]]:
    """Weights that peft changes while it puts the adapter on, with copies of them."""
    if not CHANGES_BASE.match(str(adapter.config.init_lora_weights)):
        return []
    names = {
        name.removeprefix("base_model.model.").partition(".lora_")[0].replace(".base_layer", "")
        for name in adapter.tensors
        if ".lora_" in name
    }
    weights = [own for name in sorted(names) for own in model.get_submodule(name).parameters(False)]
    return [(weight, weight.data.clone()) for weight in weights]


def _targets(config: LoraConfig) -> list[str]:
    targets = config.target_modules or []
    return [targets] if isinstance(targets, str) else sorted(targets)
