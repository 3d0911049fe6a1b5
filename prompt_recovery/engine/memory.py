"""How much memory a model takes: layers on GPUs, reckoned from the config before anything loads; the micro-batch and the
activation checkpointing with which training fits."""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from accelerate import PartialState
from transformers import AutoConfig, AutoModelForCausalLM

from prompt_recovery.engine.forward import keep_gate_up
from prompt_recovery.engine.kernels.dispatch import uses_triton
from prompt_recovery.engine.quantiser import becomes_four_bit, fused_experts
from prompt_recovery.engine.storage import BLOCK, NESTED_BLOCK, PROJECTIONS, four_bit_experts

GIB = 2**30
NF4_BYTES = 0.5 + 1 / BLOCK + 4 / (BLOCK * NESTED_BLOCK)  # a parameter, with double quantisation: 0.516
# A guess with a margin: the room of CUDA's context, cuBLAS and the allocator's fragments
RESERVE = GIB
# Room for the KV cache that a placement must leave, in tokens: some three rows of the longest texts
KV_TOKENS = 8192


class TooLittleMemory(RuntimeError):
    """Too little memory for what was asked; the message says how much is needed and how much there is."""


class Sizes(NamedTuple):
    """Bytes: of each decoder layer's weights; of what stands before the layers (embeddings) and behind (norm, lm_head);
    of the KV cache for one token in one layer; of the 16-bit weights that are needed at a time while the model quantises
    as it loads (one layer's gate and up projections, as read and merged) or computes (one expert). modules: where each
    part is, for a device_map."""

    layers: tuple[int, ...]
    before: int
    behind: int
    kv: int
    workspace: int
    modules: tuple[tuple[str, str], ...]  # (module name, "before" | "behind" | layer number)

    @property
    def weights(self) -> int:
        return self.before + sum(self.layers) + self.behind


def sizes(model_dir: str | Path, dtype: torch.dtype, four_bit: bool) -> Sizes:
    """Sizes of the model in model_dir when loaded in `dtype`, or with its linear layers and experts in 4 bits. The model
    is built on the meta device, which takes no memory."""
    config = AutoConfig.from_pretrained(model_dir, local_files_only=True)
    quantised = hasattr(config, "quantization_config")
    if quantised:
        del config.quantization_config
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    head, wide = model.get_output_embeddings(), torch.finfo(dtype).bits // 8
    bytes_of: dict[str, float] = {}
    seen: set[int] = set()  # a head that is tied to the embeddings takes no room of its own
    workspace = 0
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
            # as read, merged, and packed; or a matrix of each projection
            loading = 2.25 * module.gate_up_proj.numel() * wide
            computing = sum(getattr(module, key)[0].numel() * wide for key in PROJECTIONS)
            workspace = max(workspace, round(computing if quantised else loading))
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
    return Sizes(sized, round(before), round(behind), kv, workspace, tuple(modules.items()))


def kv_shape(config: Any) -> tuple[int, int]:
    """(key heads, size of a head) of a model's layers."""
    config = config.get_text_config()
    size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return config.num_key_value_heads, size


def processes() -> PartialState:
    """The processes of `accelerate launch` and this one's place among them. Makes the GPU of its rank the current one.

    Raises RuntimeError where something made accelerate's state before, as if this process were alone: on a CPU it then
    stays alone, and each process would train on all rows.
    """
    state = PartialState(cpu=not torch.cuda.is_available())
    launched = int(os.environ.get("WORLD_SIZE", 1)) if "LOCAL_RANK" in os.environ else 1
    if state.num_processes != launched:
        raise RuntimeError(
            f"accelerate launch started {launched} processes, accelerate's state knows of {state.num_processes}: it was"
            " made without cpu=True. Call memory.processes() before anything that uses accelerate."
        )
    return state


def free_memory() -> dict[int, int]:
    """Free bytes by GPU that this process may use. One of several processes on a host (accelerate launch) has the GPU of
    its rank for itself."""
    rank = os.environ.get("LOCAL_RANK")
    devices = range(torch.cuda.device_count()) if rank is None else [int(rank) % torch.cuda.device_count()]
    return {device: torch.cuda.mem_get_info(device)[0] for device in devices}


def place(sizes: Sizes, free: Sequence[int], kv_tokens: int = KV_TOKENS) -> list[int]:
    """How many layers, in order, go to each GPU so that the fullest one, weights and KV cache of kv_tokens together, is
    as empty as it can be. The fewest GPUs that have room are used; on one nothing is split. free: bytes of each.

    Raises TooLittleMemory with what is needed and what is there, if all of them together have too little room.
    """
    for used in range(1, len(free) + 1):
        split = _balance(sizes, free[:used], kv_tokens)
        if split is not None:
            return split + [0] * (len(free) - used)
    needed = sizes.weights + kv_tokens * sizes.kv * len(sizes.layers)
    each = sizes.workspace + RESERVE
    raise TooLittleMemory(
        f"The model needs {needed / GIB:.1f} GiB (weights {sizes.weights / GIB:.1f}, KV cache of {kv_tokens} tokens) and "
        f"{each / GIB:.1f} GiB of working room on each GPU; free are {[round(f / GIB, 1) for f in free]} GiB. Free the "
        "GPUs or add one; four_bit=True takes a quarter, and a folder of model.save_quantised needs less room to load."
    )


def _balance(sizes: Sizes, free: Sequence[int], kv_tokens: int) -> list[int] | None:
    """The split over exactly these GPUs with the smallest largest share of room used; None if it does not fit."""
    count, gpus = len(sizes.layers), len(free)
    if gpus > count:
        return None
    costs = [size + kv_tokens * sizes.kv for size in sizes.layers]
    sums = [0]
    for cost in costs:
        sums.append(sums[-1] + cost)

    def share(gpu: int, first: int, last: int) -> float:
        used = sums[last] - sums[first] + sizes.before * (gpu == 0) + sizes.behind * (gpu == gpus - 1)
        room = free[gpu] - sizes.workspace - RESERVE
        return used / room if room > 0 else float("inf")

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


def device_map(sizes: Sizes, split: Sequence[int], devices: Sequence[int]) -> dict[str, int]:
    """transformers' device_map of a split over these GPU numbers: the part before the layers stands on the first GPU,
    that behind on the last one that has layers."""
    used = [device for device, layers in zip(devices, split, strict=True) for _ in range(layers)]
    where = {"before": used[0], "behind": used[-1]}
    return {name: where[part] if part in where else used[int(part)] for name, part in sizes.modules}


# --- training -----------------------------------------------------------------------------------------------

# Work that is done again in the backward pass, as a share of forward and backward together, by arithmetic for Mixtral:
# attention is 11% of the forward's multiplications, gate and up projections 59%, and the forward is half of the whole.
# (Activation checkpointing stops before the down-projection, which nothing saved depends on.)
RECOMPUTED = 0.35
RECOMPUTED_KEPT = 0.06
# Each micro-batch dequantises all experts again, whatever its size. A guess at what that and its launches are worth in
# tokens of work: on an H200 dequantisation alone took 64 ms of a step, 550 tokens at 8,700 a second (LOG.md)
OVERHEAD_TOKENS = 1500
# The backward of a layer holds gradients beside what was saved for it; without the Triton kernels SwiGLU's fp32 copies
# too (tests/test_memory.py measures 4.1 to 5.3 at Mixtral's proportions)
WORKING_LAYERS = 1.5
WORKING_LAYERS_WITHOUT_TRITON = 5.5


class TrainingPlan(NamedTuple):
    """How a batch is trained on: rows at a time, how often that is repeated before a step, how many layers recompute
    their activations, and how many of those keep their gate and up rows; expected peak in bytes (0: not reckoned)."""

    rows: int
    accumulation: int
    checkpointed: int = 0
    kept: int = 0
    peak: int = 0

    def __str__(self) -> str:
        peak = f", about {self.peak / GIB:.1f} GiB at the peak" if self.peak else ""
        return (
            f"{self.rows} rows at a time x {self.accumulation}, activations recomputed in {self.checkpointed} layers"
            f" ({self.kept} of them without the gate and up projections){peak}"
        )


def saved_bytes(model: Any, autocast: torch.dtype | None = None) -> float:
    """Bytes that all layers together keep for the backward pass, a token: the slope between two short forward passes.
    Tensors that autograd saves are counted once each, parameters and buffers not at all."""
    device = model.get_input_embeddings().weight.device
    fixed = {tensor.untyped_storage().data_ptr() for tensor in (*model.parameters(), *model.buffers())}

    def total(tokens: int) -> int:
        seen: dict[int, torch.Tensor] = {}

        def pack(tensor: torch.Tensor) -> None:
            # kept, so that no storage is freed and its address counted for another; detached and not handed back, since
            # a graph that holds its own output is never freed
            if tensor.untyped_storage().data_ptr() not in fixed:
                seen[tensor.untyped_storage().data_ptr()] = tensor.detach()

        ids = torch.full((1, tokens), 3, device=device)
        enabled = torch.autocast(device.type, dtype=autocast, enabled=autocast is not None)
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda nothing: nothing), enabled, torch.enable_grad():
            model(input_ids=ids, attention_mask=torch.ones_like(ids), logits_to_keep=1, use_cache=False)
        return sum(tensor.untyped_storage().nbytes() for tensor in seen.values())

    was_training = model.training
    model.train()
    slope = (total(192) - total(64)) / 128
    model.train(was_training)
    return slope


def training_plan(
    model: Any, longest: int, answer: int, rows: int, autocast: torch.dtype | None = None, free: int | None = None
) -> TrainingPlan:
    """The fastest way, by the constants above, to train on `rows` rows a step within `free` bytes beyond what is
    allocated now; None: what the emptiest GPU has, with what torch holds and does not use. longest, answer: tokens of
    the longest example and of the longest answer, the worst case.

    Raises TooLittleMemory if not even one row with every layer checkpointed fits.
    """
    if free is None:
        free = min(free_memory().values()) + torch.cuda.memory_reserved() - torch.cuda.memory_allocated()
    config = model.config.get_text_config()
    count = config.num_hidden_layers
    wide = 2 if autocast is not None else 4
    apply_plan(model, TrainingPlan(rows, 1))  # an earlier plan's checkpointing would hide what the layers save
    fast = uses_triton(model.get_input_embeddings().weight.device)
    working = WORKING_LAYERS if fast else WORKING_LAYERS_WITHOUT_TRITON
    layer = saved_bytes(model, autocast) / count
    border = config.hidden_size * next(model.parameters()).element_size()
    experts = four_bit_experts(model)
    gate_up = 0
    buffers = 0
    if experts:
        width = experts[0].gate_up_proj_packed.shape[1]
        gate_up = getattr(config, "num_experts_per_tok", 0) * width * wide
        buffers = sum(getattr(experts[0], f"{name}_packed").numel() * 2 * wide for name in PROJECTIONS)
    logits = config.vocab_size * (wide + 8)  # 16 bit, then fp32 and its gradient
    best: tuple[float, TrainingPlan] | None = None
    for micro in (n for n in range(rows, 0, -1) if rows % n == 0):
        tokens = micro * longest
        fixed = RESERVE + buffers + micro * answer * logits + working * layer * tokens
        for whole in range(count, -1, -1):
            room = free - fixed - tokens * (whole * layer + (count - whole) * border)
            if room < 0:
                continue
            recomputed = count - whole
            kept = min(recomputed, int(room // (tokens * gate_up))) if gate_up else 0
            again = ((recomputed - kept) * RECOMPUTED + kept * RECOMPUTED_KEPT) / count
            cost = (1 + again) * tokens * (rows // micro) + OVERHEAD_TOKENS * (rows // micro)
            if best is None or cost < best[0]:
                peak = fixed - RESERVE + tokens * (whole * layer + recomputed * border + kept * gate_up)
                best = cost, TrainingPlan(micro, rows // micro, recomputed, kept, round(peak))
    if best is None:
        need = RESERVE + buffers + answer * logits + longest * (working * layer + count * border)
        raise TooLittleMemory(
            f"Training on one row of {longest} tokens needs {need / GIB:.1f} GiB beside the model, {free / GIB:.1f} are"
            " free. Lower max_tokens, or free the GPU."
        )
    return best[1]


def apply_plan(model: Any, plan: TrainingPlan) -> None:
    """Switch activation checkpointing on in the first plan.checkpointed layers of a model with an adapter, off in the
    others, and let the last plan.kept of those keep their gate and up rows."""
    base = model.get_base_model()
    if plan.checkpointed:
        # transformers 5.23 renamed it; 5.17 has the old name only
        enable = getattr(base, "activation_checkpointing_enable", None) or base.gradient_checkpointing_enable
        enable({"use_reentrant": False})
    layers = [module for module in base.modules() if hasattr(module, "gradient_checkpointing") and module is not base]
    layers = [module for module in layers if not hasattr(module, "layers")]
    for number, layer in enumerate(layers):
        layer.gradient_checkpointing = number < plan.checkpointed
    keep_gate_up(base, plan.checkpointed, plan.kept)
