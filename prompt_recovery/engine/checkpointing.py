"""The micro-batch and the activation checkpointing with which training fits into a card's
memory."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch

from prompt_recovery.engine.forward import keep_gate_up, recomputation
from prompt_recovery.engine.group import gathered
from prompt_recovery.engine.kernels.dispatch import uses_triton
from prompt_recovery.engine.memory import GIB, RESERVED_BYTES, TooLittleMemory, free_on
from prompt_recovery.engine.parts import layer_devices
from prompt_recovery.engine.storage import PROJECTIONS, four_bit_experts, release_buffers

# Work that is done again in the backward pass, as a share of forward and backward together, by
# arithmetic for Mixtral: attention is 11% of the forward's multiplications, gate and up projections
# 59%, and the forward is half of the whole. (Activation checkpointing stops before the
# down-projection, which nothing saved depends on.)
RECOMPUTED = 0.35
RECOMPUTED_KEPT = 0.06
# Each micro-batch dequantises all experts again, whatever its size. A guess at what that and its
# launches are worth in tokens of work: on an H200 dequantisation alone took 64 ms of a step, 550
# tokens at 8,700 a second (LOG.md)
OVERHEAD_TOKENS = 1500
# forward, recomputation and backward each, where one expert's weights are there at a time
DEQUANTISATIONS = 3
# The backward of a layer holds gradients beside what was saved for it; without the Triton kernels
# SwiGLU's fp32 copies too (test_memory.py measures 4.1 to 5.3 at Mixtral's proportions)
WORKING_LAYERS = 1.5
WORKING_LAYERS_WITHOUT_TRITON = 5.5


class CardPlan(NamedTuple):
    """Layers of a model on one card: how many, how many of them recompute their activations (the
    first ones), and how many of those keep their gate and up rows (the last ones)."""

    layers: int
    checkpointed: int
    kept: int


class TrainingPlan(NamedTuple):
    """How a batch is trained on: rows at a time, how often that is repeated before a step, how many
    layers recompute their activations, and how many of those keep their gate and up rows; expected
    peak in bytes of the fullest card (0: not reckoned); whether the 16-bit weights of one expert
    stand in memory at a time instead of a layer's; the cards of a model whose layers are split over
    several."""

    rows: int
    accumulation: int
    checkpointed: int = 0
    kept: int = 0
    peak: int = 0
    one_expert: bool = False
    cards: tuple[CardPlan, ...] = ()

    def __str__(self) -> str:
        peak = f", about {self.peak / GIB:.1f} GiB at the peak" if self.peak else ""
        experts = ", experts dequantised one at a time" if self.one_expert else ""
        return (
            f"{self.rows} rows at a time x {self.accumulation}, activations recomputed in "
            f"{self.checkpointed} layers ({self.kept} of them without the gate and up "
            f"projections){experts}{peak}"
        )


def saved_bytes(model: Any, autocast: torch.dtype | None = None) -> float:
    """Bytes that all layers together keep for the backward pass, a token: the slope between two
    short forward passes. Tensors that autograd saves are counted once each, parameters and buffers
    not at all."""
    device = model.get_input_embeddings().weight.device
    fixed = {
        tensor.untyped_storage().data_ptr() for tensor in (*model.parameters(), *model.buffers())
    }

    def total(tokens: int) -> int:
        seen: dict[int, torch.Tensor] = {}

        def pack(tensor: torch.Tensor) -> None:
            # kept, so that no storage is freed and its address counted for another; detached and
            # not handed back, since a graph that holds its own output is never freed
            if tensor.untyped_storage().data_ptr() not in fixed:
                seen[tensor.untyped_storage().data_ptr()] = tensor.detach()

        ids = torch.full((1, tokens), 3, device=device)
        enabled = torch.autocast(device.type, dtype=autocast, enabled=autocast is not None)
        with (
            torch.autograd.graph.saved_tensors_hooks(pack, lambda nothing: nothing),
            enabled,
            torch.enable_grad(),
        ):
            model(
                input_ids=ids,
                attention_mask=torch.ones_like(ids),
                logits_to_keep=1,
                use_cache=False,
            )
        return sum(tensor.untyped_storage().nbytes() for tensor in seen.values())

    was_training = model.training
    model.train()
    slope = (total(192) - total(64)) / 128
    model.train(was_training)
    return slope


def training_plan(
    model: Any,
    longest: int,
    answer: int,
    rows: int,
    autocast: torch.dtype | None = None,
    free: int | Sequence[int] | None = None,
    layers: Sequence[int] | None = None,
) -> TrainingPlan:
    """The fastest way, by the constants above, to train on `rows` rows a step.

    Args:
        model: with an adapter.
        longest, answer: tokens of the longest example and of the longest answer, the worst case.
        rows: of a step, in this process.
        autocast: None where the computation is in fp32.
        free: bytes of each card with layers beyond what is allocated now; None: what there is, with
            what torch holds and does not use, where it is least of all processes.
        layers: of each card; None: as the model lies.

    Raises TooLittleMemory if not even one row with every layer checkpointed fits.
    """
    base = model.get_base_model()
    groups = [(device, len([*same])) for device, same in itertools.groupby(layer_devices(base))]
    if free is None:
        # the smallest of all processes: with plans of their own they would see unlike rows
        each_free = gathered([free_on(base, device) for device, _ in groups])
        free = [min(of_card) for of_card in zip(*each_free, strict=True)]
    elif isinstance(free, int):
        free, layers = [free], layers or [sum(number for _, number in groups)]
    layers = layers or [number for _, number in groups]
    needs = _needs(model, longest, answer, autocast)
    best: tuple[float, TrainingPlan] | None = None
    for one_expert, micro in itertools.product(
        needs.buffers, (n for n in range(rows, 0, -1) if rows % n == 0)
    ):
        found = _plan_of(needs, layers, free, micro, rows // micro, one_expert)
        if found is not None and (best is None or found[0] < best[0]):
            best = found
    if best is None:
        one_expert = max(needs.buffers)
        each = [
            (
                needs.fixed(1, one_expert, number == len(layers) - 1)
                + longest * held * needs.border,
                free_bytes,
            )
            for number, (held, free_bytes) in enumerate(zip(layers, free, strict=True))
        ]
        need, free_bytes = max(each, key=lambda pair: pair[0] - pair[1])
        raise TooLittleMemory(
            f"Training on one row of {longest} tokens needs {need / GIB:.1f} GiB beside the "
            f"model, {free_bytes / GIB:.1f} are free. Lower max_tokens, or free the GPU."
        )
    return best[1]


class _Needs(NamedTuple):
    """Bytes that training takes. longest, answer: tokens of a row. layer, border, gate_up: a
    token's in a layer that keeps everything, in one that recomputes, and of its gate and up rows.
    working: layers that a backward works in. logits: an answer token's. buffers: of dequantised
    weights, of a layer's experts (False) and of one expert (True)."""

    longest: int
    answer: int
    layer: float
    border: int
    gate_up: int
    working: float
    logits: int
    buffers: dict[bool, int]

    def fixed(self, micro: int, one_expert: bool, last: bool) -> float:
        """Of a card, beside what its layers keep. last: it has the head."""
        head = micro * self.answer * self.logits if last else 0
        return (
            RESERVED_BYTES
            + self.buffers[one_expert]
            + head
            + self.working * self.layer * micro * self.longest
        )


def _needs(model: Any, longest: int, answer: int, autocast: torch.dtype | None) -> _Needs:
    base = model.get_base_model()
    config = base.config.get_text_config()
    wide = 2 if autocast is not None else 4
    # an earlier plan's checkpointing would hide what the layers save; a layer's weights need not
    # fit
    apply_plan(model, TrainingPlan(1, 1, one_expert=True))
    layer = saved_bytes(model, autocast) / config.num_hidden_layers
    release_buffers(model)
    fast = uses_triton(base.get_input_embeddings().weight.device)
    gate_up, buffers = 0, {False: 0}
    experts = four_bit_experts(model)
    if experts:
        one = experts[0].gate_up_proj_packed[0]
        gate_up = getattr(config, "num_experts_per_tok", 0) * one.shape[0] * wide
        whole = sum(getattr(experts[0], f"{name}_packed").numel() for name in PROJECTIONS)
        buffers = {False: whole * 2 * wide, True: one.numel() * 2 * wide}
    return _Needs(
        longest,
        answer,
        layer,
        config.hidden_size * next(model.parameters()).element_size(),
        gate_up,
        WORKING_LAYERS if fast else WORKING_LAYERS_WITHOUT_TRITON,
        config.vocab_size * (wide + 8),  # 16 bit, then fp32 and its gradient
        buffers,
    )


def _plan_of(
    needs: _Needs,
    layers: Sequence[int],
    free: Sequence[int],
    micro: int,
    accumulation: int,
    one_expert: bool,
) -> tuple[float, TrainingPlan] | None:
    """What a step costs, in tokens of work, and how its cards recompute; None where some card has
    too little memory."""
    tokens = micro * needs.longest
    cards: list[CardPlan] = []
    peak = 0.0
    for number, (held, free_bytes) in enumerate(zip(layers, free, strict=True)):
        fixed = needs.fixed(micro, one_expert, number == len(layers) - 1)
        card = _least_recomputation(
            held, (free_bytes - fixed) / tokens, needs.layer, needs.border, needs.gate_up
        )
        if card is None:
            return None
        cards.append(card)
        keeping = (
            (held - card.checkpointed) * needs.layer
            + card.checkpointed * needs.border
            + card.kept * needs.gate_up
        )
        peak = max(peak, fixed - RESERVED_BYTES + tokens * keeping)
    again = sum(map(_again, cards)) / sum(layers)
    overhead = OVERHEAD_TOKENS * (DEQUANTISATIONS if one_expert else 1)
    checkpointed, kept = sum(card.checkpointed for card in cards), sum(card.kept for card in cards)
    split = tuple(cards) if len(cards) > 1 else ()
    plan = TrainingPlan(micro, accumulation, checkpointed, kept, round(peak), one_expert, split)
    return accumulation * ((1 + again) * tokens + overhead), plan


def _again(card: CardPlan) -> float:
    """What the card does again, in layers' work."""
    return (card.checkpointed - card.kept) * RECOMPUTED + card.kept * RECOMPUTED_KEPT


def _least_recomputation(
    layers: int, available: float, layer: float, border: int, gate_up: int
) -> CardPlan | None:
    """The card's fastest way within `available` bytes a token; None where not even checkpointing
    every layer fits. layer, border, gate_up: bytes a token of a layer that keeps everything, of one
    that recomputes, and of its gate and up rows."""
    ways = []
    for checkpointed in range(layers + 1):
        left = available - (layers - checkpointed) * layer - checkpointed * border
        if left >= 0:
            kept = min(checkpointed, int(left // gate_up)) if gate_up else 0
            ways.append(CardPlan(layers, checkpointed, kept))
    return min(ways, key=_again, default=None)


def apply_plan(model: Any, plan: TrainingPlan) -> None:
    """Switch activation checkpointing on in the first layers of each card of a model with an
    adapter, off in the others, let the last ones of those keep their gate and up rows, and
    dequantise experts as the plan says."""
    base = model.get_base_model()
    if plan.checkpointed:
        # transformers 5.23 renamed it; 5.17 has the old name only
        enable = (
            getattr(base, "activation_checkpointing_enable", None)
            or base.gradient_checkpointing_enable
        )
        enable({"use_reentrant": False, "context_fn": recomputation})
    layers = [
        module
        for module in base.modules()
        if hasattr(module, "gradient_checkpointing") and module is not base
    ]
    layers = [module for module in layers if not hasattr(module, "layers")]
    recomputed: set[int] = set()
    kept: set[int] = set()
    start = 0
    for count, checkpointed, keeping in plan.cards or [
        CardPlan(len(layers), plan.checkpointed, plan.kept)
    ]:
        recomputed |= {*range(start, start + checkpointed)}
        kept |= {*range(start + checkpointed - keeping, start + checkpointed)}
        start += count
    for number, layer in enumerate(layers):
        layer.gradient_checkpointing = number in recomputed
    keep_gate_up(base, kept)
    for experts in four_bit_experts(base):
        experts.one_at_a_time = plan.one_expert
