"""The micro-batch and the activation checkpointing with which training fits into a card's memory."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch

from prompt_recovery.engine.forward import keep_gate_up
from prompt_recovery.engine.kernels.dispatch import uses_triton
from prompt_recovery.engine.memory import GIB, RESERVE, TooLittleMemory, free_memory
from prompt_recovery.engine.storage import PROJECTIONS, four_bit_experts

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
