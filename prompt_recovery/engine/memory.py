"""How much memory a model takes, reckoned from its config before anything loads, and which layers
go to which GPU."""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from transformers import AutoConfig, AutoModelForCausalLM

from prompt_recovery.engine.group import processes as processes
from prompt_recovery.engine.quantiser import becomes_four_bit, fused_experts
from prompt_recovery.engine.storage import (
    BLOCK,
    NESTED_BLOCK,
    PROJECTIONS,
    four_bit_experts,
    workspace,
)

GIB = 2**30
# a parameter, with double quantisation: 0.516
NF4_BYTES = 0.5 + 1 / BLOCK + 4 / (BLOCK * NESTED_BLOCK)
# Left free on each card, a guess: for CUDA's context, cuBLAS and the allocator's fragments
RESERVED_BYTES = GIB
# Tokens of KV cache that a placement must leave free: some three rows of the longest texts
KV_TOKENS = 8192


class TooLittleMemory(RuntimeError):
    """Too little memory for what was asked; the message says how much is needed and how much there
    is."""


class Sizes(NamedTuple):
    """Bytes: of each decoder layer's weights; of what stands before the layers (embeddings) and
    behind (norm, lm_head); of the KV cache for one token in one layer; of the 16-bit weights that
    are needed at a time while the model computes (one expert's). modules: where each part is, for a
    device_map. merging: what putting a layer's experts together on the GPU takes while the model
    quantises as it loads (gate and up projections, as read, merged and packed)."""

    layers: tuple[int, ...]
    before: int
    behind: int
    kv: int
    workspace: int
    modules: tuple[tuple[str, str], ...]  # (module name, "before" | "behind" | layer number)
    merging: int = 0

    @property
    def weights(self) -> int:
        return self.before + sum(self.layers) + self.behind


def load_config(model_dir: str | Path) -> Any:
    return AutoConfig.from_pretrained(model_dir, local_files_only=True)


def sizes(model_dir: str | Path, dtype: torch.dtype, four_bit: bool) -> Sizes:
    """Sizes of the model in model_dir when loaded in `dtype`, or with its linear layers and experts
    in 4 bits. The model is built on the meta device, which takes no memory."""
    config = load_config(model_dir)
    quantised = hasattr(config, "quantization_config")
    if quantised:
        del config.quantization_config
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    head, wide = model.get_output_embeddings(), torch.finfo(dtype).bits // 8
    bytes_of: dict[str, float] = {}
    seen: set[int] = set()  # a head that is tied to the embeddings takes no bytes of its own
    workspace = merging = 0
    for name, module in model.named_modules():
        experts = fused_experts(module)
        small = experts or becomes_four_bit(name, module, head)
        for key, tensor in module.named_parameters(recurse=False):
            if id(tensor) in seen:
                continue
            seen.add(id(tensor))
            packed = four_bit and small and tensor.dim() > 1
            bytes_of[f"{name}.{key}"] = tensor.numel() * (NF4_BYTES if packed else wide)
        if experts and four_bit:
            workspace = max(
                workspace, sum(getattr(module, key)[0].numel() * wide for key in PROJECTIONS)
            )
            merging = max(
                merging, 0 if quantised else round(2.25 * module.gate_up_proj.numel() * wide)
            )
    layers: dict[int, float] = {}
    before = behind = 0.0
    modules: dict[str, str] = {}
    embeddings = model.get_input_embeddings()
    tied = head is not None and head.weight is embeddings.weight
    inputs = {name for name, module in model.named_modules() if module is embeddings}
    for name, size in bytes_of.items():
        found = re.match(r"(.*?\blayers)\.(\d+)\.", name)
        if found:
            modules[f"{found[1]}.{found[2]}"] = found[2]
            layers[int(found[2])] = layers.get(int(found[2]), 0) + size
        elif name.rsplit(".", 1)[0] in inputs:
            modules[name.rsplit(".", 1)[0]] = "before"
            before += size
        else:
            modules[name.rsplit(".", 1)[0]] = "behind"
            behind += size
    for name, module in model.named_modules():
        if name.endswith("rotary_emb") and not any(True for _ in module.parameters()):
            modules[name] = "before"
        if tied and module is head:
            modules[name] = "before"  # one tensor, one device
    heads, size = kv_shape(model.config)
    kv = 2 * heads * size * wide
    sized = tuple(round(layers[n]) for n in sorted(layers))
    return Sizes(
        sized, round(before), round(behind), kv, workspace, tuple(modules.items()), merging
    )


def kv_shape(config: Any) -> tuple[int, int]:
    """(key heads, size of a head) of a model's layers."""
    config = config.get_text_config()
    if not hasattr(config, "num_key_value_heads"):
        raise ValueError(
            f"models of type {config.model_type} are not known here: no num_key_value_heads in the "
            "config."
        )
    size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return config.num_key_value_heads, size


def let_segments_grow() -> None:
    """Let the allocator map memory as it is asked for, unless the environment says how it works:
    batches of many shapes left 0.7 of 13.8 GiB unused between blocks of fixed size."""
    if not {"PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF"} & os.environ.keys():
        torch._C._accelerator_setAllocatorSettings("expandable_segments:True")


def free_memory() -> dict[int, int]:
    """Free bytes by GPU that this process may use. One of several processes on a host (accelerate
    launch) has the GPU of its rank for itself."""
    rank = os.environ.get("LOCAL_RANK")
    devices = (
        range(torch.cuda.device_count())
        if rank is None
        else [int(rank) % torch.cuda.device_count()]
    )
    return {device: torch.cuda.mem_get_info(device)[0] for device in devices}


def free_on(model: Any, device: torch.device) -> int:
    """Bytes that are free on a card, with those that torch holds and does not use, and dequantised
    weights."""
    held = sum(workspace(experts).held(device) for experts in four_bit_experts(model)[:1])
    unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return torch.cuda.mem_get_info(device)[0] + unused + held


def place(sizes: Sizes, free: Sequence[int], kv_tokens: int = KV_TOKENS) -> list[int]:
    """How many layers, in order, go to each GPU so that the fullest one, weights and KV cache of
    kv_tokens together, is as empty as it can be. The fewest GPUs that hold it are used; on one
    nothing is split. free: bytes of each.

    Raises TooLittleMemory with what is needed and what is there, if all of them together have too
    little.
    """
    for used in range(1, len(free) + 1):
        split = _balance(sizes, free[:used], kv_tokens)
        if split is not None:
            return split + [0] * (len(free) - used)
    needed = sizes.weights + kv_tokens * sizes.kv * len(sizes.layers)
    each = sizes.workspace + RESERVED_BYTES
    raise TooLittleMemory(
        f"The model needs {needed / GIB:.1f} GiB (weights {sizes.weights / GIB:.1f}, KV cache of "
        f"{kv_tokens} tokens) and {each / GIB:.1f} GiB of working room on each GPU; free are "
        f"{[round(f / GIB, 1) for f in free]} GiB. Free the GPUs or add one; four_bit=True takes "
        "a quarter."
    )


def _balance(sizes: Sizes, free: Sequence[int], kv_tokens: int) -> list[int] | None:
    """The split over exactly these GPUs of which the fullest uses the least share of its memory;
    None if none fits."""
    count, gpus = len(sizes.layers), len(free)
    if gpus > count:
        return None
    costs = [size + kv_tokens * sizes.kv for size in sizes.layers]
    sums = [0]
    for cost in costs:
        sums.append(sums[-1] + cost)

    def share(gpu: int, first: int, last: int) -> float:
        used = (
            sums[last] - sums[first] + sizes.before * (gpu == 0) + sizes.behind * (gpu == gpus - 1)
        )
        usable = free[gpu] - sizes.workspace - RESERVED_BYTES
        return used / usable if usable > 0 else float("inf")

    # best[n]: (largest share, split) with the first n layers on the GPUs so far
    best: dict[int, tuple[float, list[int]]] = {0: (0.0, [])}
    for gpu in range(gpus):
        nxt: dict[int, tuple[float, list[int]]] = {}
        for first, (worst, split) in best.items():
            for last in range(first + 1, count + 1):
                candidate = max(worst, share(gpu, first, last))
                if last not in nxt or candidate < nxt[last][0]:
                    nxt[last] = (candidate, [*split, last - first])
        best = nxt
    worst, split = best[count]
    return split if worst <= 1 else None


def stage_weights(sizes: Sizes, split: Sequence[int]) -> list[int]:
    """Bytes of the weights on each GPU of a split that has layers."""
    found, first = [], 0
    for count in filter(None, split):
        found.append(sum(sizes.layers[first : first + count]))
        first += count
    found[0] += sizes.before
    found[-1] += sizes.behind
    return found


def merges_on_cpu(sizes: Sizes, split: Sequence[int], free: Sequence[int]) -> bool:
    """Whether some GPU has too little memory to put a layer's experts together beside the weights
    that it gets."""
    used = [free_bytes for free_bytes, count in zip(free, split, strict=True) if count]
    return any(
        free_bytes - taken < sizes.merging + RESERVED_BYTES
        for free_bytes, taken in zip(used, stage_weights(sizes, split), strict=True)
    )


def device_map(sizes: Sizes, split: Sequence[int], devices: Sequence[int]) -> dict[str, int]:
    """transformers' device_map of a split over these GPU numbers: the part before the layers stands
    on the first GPU, that behind on the last one that has layers."""
    used = [device for device, layers in zip(devices, split, strict=True) for _ in range(layers)]
    where = {"before": used[0], "behind": used[-1]}
    return {name: where[part] if part in where else used[int(part)] for name, part in sizes.modules}
