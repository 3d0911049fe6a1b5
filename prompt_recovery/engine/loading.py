"""Load a base model from a local folder, in 4 bits or 16, and save a 4-bit one."""

from __future__ import annotations

import shutil
import types
from pathlib import Path
from typing import NamedTuple

import torch
from torch import nn
from transformers import AutoModelForCausalLM, GenerationConfig, PreTrainedModel

from prompt_recovery.engine import memory, quantiser
from prompt_recovery.engine.check import check_kernels
from prompt_recovery.engine.folder import ModelError, base_id, check_model_dir, loads_in_four_bit
from prompt_recovery.engine.kernels import dispatch
from prompt_recovery.engine.summary import summary_text

CPU = torch.device("cpu")


def default_dtype() -> torch.dtype:
    """bf16 on GPUs that have it, fp16 on older ones (a T4), fp32 on the CPU."""
    if not torch.cuda.is_available():
        return torch.float32
    return (
        torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float16
    )


class Loading(NamedTuple):
    """How a base will be loaded. quantised: it is in 4 bits already. device_map: transformers',
    None without a GPU. on_cpu: a layer's experts are put together in the host's memory."""

    four_bit: bool
    quantised: bool
    device_map: dict[str, int] | None
    on_cpu: bool


def check_base(
    model_dir: str | Path, dtype: torch.dtype | None = None, four_bit: bool | None = None
) -> Loading:
    """All of `load_base`'s checks that load nothing: the folder's files (`check_model_dir`) and
    whether the model fits on the GPUs that are there, if any. Raises what `load_base` raises."""
    folder = check_model_dir(model_dir)
    quantised = quantiser.check_folder(folder)
    four_bit = loads_in_four_bit(folder, four_bit)
    if quantised and not four_bit:
        raise ModelError(
            f"model_dir {folder} holds a 4-bit model; set four_bit=True, or give the 16-bit folder."
        )
    if not torch.cuda.is_available():
        return Loading(four_bit, quantised, None, False)
    memory.processes()  # makes the GPU of this process's rank the current one
    memory.let_segments_grow()
    free = memory.free_memory()
    sizes = memory.sizes(folder, dtype or default_dtype(), four_bit)
    split = memory.place(sizes, list(free.values()))
    on_cpu = four_bit and not quantised and memory.merges_on_cpu(sizes, split, list(free.values()))
    return Loading(four_bit, quantised, memory.device_map(sizes, split, list(free)), on_cpu)


def load_base(
    model_dir: str | Path,
    dtype: torch.dtype | None = None,
    four_bit: bool | None = None,
    kernels: str | None = None,
) -> PreTrainedModel:
    """The base model with frozen weights in eval mode, on the GPUs if there are any (see
    `memory.place`).

    dtype: of the weights that stay 16 bit and of the computation; None takes `default_dtype()`.
    four_bit: linear layers and experts become NF4 while they are read, a layer's experts at a time,
    or an expert's where GPUs are small; a folder that `save_quantised` wrote is in 4 bits already.
    None: on a GPU, or if the folder is in 4 bits. Prints what is kept in which precision.
    kernels: of 4-bit experts, "triton" or "torch"; see `kernels.dispatch.choose`.
    Raises, before anything loads: ModelError (see `check_model_dir`) or for a 4-bit folder with
    four_bit=False, Nf4Error for another 4-bit layout, TooLittleMemory, and ValueError for kernels
    that can't run here. Nf4Error afterwards where a part that should be 4-bit is not.
    """
    folder = Path(model_dir)
    dtype = dtype or default_dtype()
    loading = check_base(folder, dtype, four_bit)
    if kernels and not loading.four_bit:
        raise ValueError(
            f"kernels={kernels!r} is for 4-bit experts, and this model is loaded in 16 bits: leave "
            "it at None."
        )
    placed, four_bit = loading.device_map, loading.four_bit
    processes = memory.processes()
    if four_bit:
        quantiser.register()
        for device in (
            [torch.device("cuda", number) for number in sorted(set(placed.values()))]
            if placed
            else [CPU]
        ):
            dispatch.choose(device, kernels)
    options = {}
    if four_bit and not loading.quantised:
        options["quantization_config"] = quantiser.Nf4Config(
            base=base_id(folder), merge_on_cpu=loading.on_cpu
        )
    model, loaded = AutoModelForCausalLM.from_pretrained(
        folder,
        output_loading_info=True,
        dtype=dtype,
        device_map=placed,
        local_files_only=True,
        **options,
    )
    if loaded["missing_keys"]:  # transformers warns and takes random numbers instead
        names = sorted(loaded["missing_keys"])
        raise ModelError(
            f"model_dir {folder} lacks {len(names)} of the model's tensors, the first is "
            f"{names[0]}; fetch it again."
        )
    if four_bit:
        quantiser.check_quantised(model)
        processes.print(summary_text(model))
        check_kernels(model)
    elif not torch.cuda.is_available():
        # transformers takes batched_mm for decoding, which copies the experts' weights for every
        # token: 37 s a training step of the demo on 2 cores, where eager takes 0.5 s
        model.set_experts_implementation("eager")
    if torch.cuda.is_available():
        fuse_norms(model)
    # a loss of the routers' balance, which nobody asked for, over masks of a shape that no cache
    # gives
    if getattr(model.config, "output_router_logits", False):
        model.config.output_router_logits = False
    # no sampling settings from the hub
    model.generation_config = GenerationConfig(eos_token_id=2, bos_token_id=1)
    return model.eval().requires_grad_(False)


def fuse_norms(model: PreTrainedModel) -> int:
    """Let the model's RMS norms run as torch's one kernel; returns how many do.

    transformers computes them in eight, with fp32 copies of the activations kept for the backward
    pass: at Mixtral's shape 16 of 212 KiB a token and layer (LOG.md). Only norms that give the same
    on a random input, within the rounding of their dtype, are changed.
    """
    changed = 0
    for module in model.modules():
        weight, eps = getattr(module, "weight", None), getattr(module, "variance_epsilon", None)
        if not type(module).__name__.endswith("RMSNorm") or weight is None or eps is None:
            continue
        sample = torch.randn(4, weight.numel(), device=weight.device, dtype=weight.dtype)
        tolerance = 4 * torch.finfo(weight.dtype).eps
        if torch.allclose(
            _rms_norm(module, sample), module(sample), rtol=tolerance, atol=tolerance
        ):
            module.forward = types.MethodType(_rms_norm, module)
            changed += 1
    return changed


def _rms_norm(norm: nn.Module, hidden_states: torch.Tensor) -> torch.Tensor:
    with torch.autocast(hidden_states.device.type, enabled=False):
        weight = norm.weight.to(hidden_states.dtype)
        return nn.functional.rms_norm(hidden_states, weight.shape, weight, norm.variance_epsilon)


def save_quantised(
    model: PreTrainedModel, model_dir: str | Path, quantised_dir: str | Path
) -> Path:
    """Write a 4-bit model as a folder that loads without quantising again, with the tokenizer's
    files of model_dir.

    Written beside the target and moved there when whole. Raises Nf4Error if the model is not in 4
    bits, ModelError if quantised_dir is there already.
    """
    quantiser.check_quantised(model)
    if not hasattr(model.config, "quantization_config"):
        raise quantiser.Nf4Error("The model is not in 4 bits: load it with four_bit=True first.")
    target = Path(quantised_dir)
    if target.exists():
        raise ModelError(f"{target} is there already; give a new folder, or remove it.")
    staging = target.with_name(target.name + ".partial")
    shutil.rmtree(staging, ignore_errors=True)
    # the hub's names are for 16-bit experts
    model.save_pretrained(staging, save_original_format=False)
    for pattern in ("tokenizer*", "special_tokens_map.json"):
        for path in Path(model_dir).glob(pattern):
            shutil.copy2(path, staging / path.name)
    staging.rename(target)
    return target
