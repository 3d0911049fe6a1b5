"""The storage of 4-bit experts: NF4 pieces of a 3-D projection, bit for bit bitsandbytes', and
their way back to 16 bit.

Each expert's matrix is quantised on its own: blocks of 64, their absmax in 8 bit in blocks of 256
(double quantisation). Dequantised weights go into a buffer of the model's workspace that remembers
whose weights it holds, so that a layer's recomputation (activation checkpointing) and its backward
share one dequantisation.
"""

from __future__ import annotations

import functools
import weakref
from collections.abc import Callable
from typing import Any

import bitsandbytes as bnb
import bitsandbytes.functional as bnb_functional
import torch
from torch import nn

from prompt_recovery.engine.kernels.dispatch import on, training_kernels

BLOCK, NESTED_BLOCK = 64, 256
PROJECTIONS = ("gate_up_proj", "down_proj")
# what a projection [E, N, K] becomes; fp32 values are kept as int32 bits so that `model.to(dtype)`
# can't round them
PIECES = ("packed", "absmax", "nested", "offset")


def quantise(weight: torch.Tensor, device: torch.device | None = None) -> dict[str, torch.Tensor]:
    """NF4 pieces of a projection [E, N, K] of 16 or 32 bit: packed uint8 [E, N, K / 2], absmax
    uint8 [E, B], nested int32 (bits of fp32) [E, ceil(B / 256)], offset int32 (bits of fp32) [E],
    with B = N * K / 64.

    device: of the pieces; a matrix at a time goes there to be quantised. None: the weight's.
    """
    device = device or weight.device
    pieces = {
        name: torch.empty_like(empty, device=device) for name, empty in meta_pieces(weight).items()
    }
    for expert, matrix in enumerate(weight):
        packed, state = bnb_functional.quantize_4bit(
            matrix.to(device).contiguous(),
            blocksize=BLOCK,
            compress_statistics=True,
            quant_type="nf4",
        )
        pieces["packed"][expert] = packed.view(matrix.shape[0], -1)
        pieces["absmax"][expert] = state.absmax
        pieces["nested"][expert] = state.state2.absmax.view(torch.int32)
        pieces["offset"][expert] = state.offset.view(torch.int32)
    return pieces


def meta_pieces(weight: torch.Tensor) -> dict[str, torch.Tensor]:
    """Empty pieces on the meta device for a projection of the same shape."""
    count, rows, columns = weight.shape
    blocks = rows * columns // BLOCK
    empty = functools.partial(torch.empty, device="meta")
    return {
        "packed": empty((count, rows, columns // 2), dtype=torch.uint8),
        "absmax": empty((count, blocks), dtype=torch.uint8),
        "nested": empty((count, -(-blocks // NESTED_BLOCK)), dtype=torch.int32),
        "offset": empty((count,), dtype=torch.int32),
    }


@functools.cache
def lookup_tables(device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """bitsandbytes' tables on the device: [256] of the absmax levels, [16] of NF4; fp32."""
    with torch.inference_mode(False):
        code = bnb_functional.create_dynamic_map().to(device=device, dtype=torch.float32)
        nf4 = bnb_functional.get_4bit_type("nf4", device=device).float()
    return code, nf4


def by_formula(packed: torch.Tensor, scale: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """NF4 values [N] of packed bytes [N / 2] in any shape, scale fp32 [N / 64]. For CPUs, where
    bitsandbytes 0.50.2 takes wrong scales if there is AVX512 and a row is no multiple of the block:
    off by 0.12 where weights are up to 1."""
    nf4 = lookup_tables(packed.device)[1]
    nibbles = torch.stack((packed.flatten() >> 4, packed.flatten() & 15), -1)
    return (nf4[nibbles.long()].view(-1, BLOCK) * scale[:, None]).flatten().to(dtype)


def dequantise(
    pieces: dict[str, torch.Tensor], dtype: torch.dtype, out: torch.Tensor | None = None
) -> torch.Tensor:
    """The weights [E, N, K] in `dtype`, bit for bit bitsandbytes' dequantisation of every expert,
    or of as many as `out` has room for, into that."""
    with on(pieces["packed"].device):
        return dequantiser(pieces, dtype, out)(0)


def dequantiser(
    pieces: dict[str, torch.Tensor], dtype: torch.dtype, out: torch.Tensor | None = None
) -> Callable[[int], torch.Tensor]:
    """`dequantise` of the experts from a number on, again and again into the same memory, where the
    pieces' device is the current one."""
    packed, absmax = pieces["packed"], pieces["absmax"]
    nested, offset = pieces["nested"].view(torch.float32), pieces["offset"].view(torch.float32)
    if out is None:
        out = packed.new_empty((*packed.shape[:2], packed.shape[2] * 2), dtype=dtype)
    kernels = training_kernels(packed.device)
    if kernels is None:
        return functools.partial(_by_torch, packed, absmax, nested, offset, out)
    given = packed, absmax, nested, offset, *lookup_tables(packed.device), out

    def weights(first: int) -> torch.Tensor:
        kernels.dequantise(*given, first)
        return out

    return weights


def _by_torch(
    packed: torch.Tensor,
    absmax: torch.Tensor,
    nested: torch.Tensor,
    offset: torch.Tensor,
    out: torch.Tensor,
    first: int,
) -> torch.Tensor:
    some, code = slice(first, first + len(out)), lookup_tables(packed.device)[0]
    packed, absmax, nested, offset = packed[some], absmax[some], nested[some], offset[some]
    second = nested.repeat_interleave(NESTED_BLOCK, dim=1)[:, : absmax.shape[1]]
    scale = (code[absmax.int()] * second + offset[:, None]).reshape(-1)
    if packed.device.type == "cpu" and out.shape[-1] % BLOCK:
        return out.copy_(by_formula(packed, scale, out.dtype).view(out.shape))
    operator = torch.ops.bitsandbytes.dequantize_4bit
    arguments = (packed.reshape(-1, 1), scale, BLOCK, "nf4", list(out.shape), out.dtype)
    if packed.device.type == "cpu":
        return out.copy_(operator(*arguments))
    operator.out(*arguments, out=out)
    return out


class _Buffer:
    """A tensor for one projection's 16-bit weights, and a weak reference to the packed tensor whose
    weights it holds now."""

    tensor: torch.Tensor | None = None
    owner: weakref.ref | None = None
    key: tuple = ()


class Workspace:
    """The 16-bit weights of one layer's experts, a buffer for each device, projection and dtype.
    All experts of a model share one, which is freed with the model or by `release_buffers`."""

    def __init__(self) -> None:
        self.buffers: dict[tuple, _Buffer] = {}

    def __deepcopy__(self, memo: dict[int, Any]) -> Workspace:
        return memo.setdefault(id(self), Workspace())

    def held(self, device: torch.device) -> int:
        """Bytes that the buffers on a device take now."""
        tensors = [buffer.tensor for (where, *_), buffer in self.buffers.items() if where == device]
        return sum(tensor.nbytes for tensor in tensors if tensor is not None)


def workspace(experts: nn.Module) -> Workspace:
    """The workspace of an experts module; one without gets one of its own."""
    return experts.__dict__.setdefault("workspace", Workspace())


def four_bit_experts(model: nn.Module) -> list[nn.Module]:
    """The model's 4-bit experts modules, in the order of its layers."""
    return [module for module in model.modules() if hasattr(module, "down_proj_packed")]


def share_workspace(model: nn.Module) -> None:
    """Let all 4-bit experts of a model use one workspace."""
    shared = Workspace()
    for experts in four_bit_experts(model):
        experts.__dict__["workspace"] = shared


def release_buffers(model: nn.Module) -> None:
    """Give back the memory of a model's dequantised weights (one layer's experts in 16 bit a
    device)."""
    for experts in four_bit_experts(model):
        workspace(experts).buffers.clear()


def projection_weights(experts: nn.Module, projection: str, dtype: torch.dtype) -> torch.Tensor:
    """A projection's weights [E, N, K] in `dtype`, valid until the same projection of another layer
    is asked for."""
    pieces = {piece: getattr(experts, f"{projection}_{piece}").detach() for piece in PIECES}
    packed = getattr(experts, f"{projection}_packed")
    buffer = workspace(experts).buffers.setdefault((packed.device, projection, dtype), _Buffer())
    key = (packed.data_ptr(), None if packed.is_inference() else packed._version, packed.shape)
    tensor = buffer.tensor
    if tensor is None or tensor.numel() != packed.numel() * 2:
        buffer.owner = buffer.tensor = tensor = None  # freed before the new one is asked for
        with torch.inference_mode(False):
            tensor = torch.empty(packed.numel() * 2, dtype=dtype, device=packed.device)
        buffer.tensor = tensor
    matrices = tensor.view(*packed.shape[:2], -1)
    if buffer.owner is None or buffer.owner() is not packed or buffer.key != key:
        buffer.owner = None  # a dequantisation that fails leaves nothing that looks valid
        dequantise(pieces, dtype, out=matrices)
        buffer.owner, buffer.key = weakref.ref(packed), key
    return matrices


def expert_weights(experts: nn.Module, dtype: torch.dtype) -> Callable[[str, int], torch.Tensor]:
    """A function (projection, expert) -> that expert's weight [N, K] in `dtype`, valid until
    another one is asked for; to be called where the experts' device is the current one."""
    pieces = {
        name: {piece: getattr(experts, f"{name}_{piece}") for piece in PIECES}
        for name in PROJECTIONS
    }
    device = pieces["down_proj"]["packed"].device
    shapes = {
        name: (1, each["packed"].shape[1], 2 * each["packed"].shape[2])
        for name, each in pieces.items()
    }
    sizes = {name: rows * columns for name, (_, rows, columns) in shapes.items()}
    buffer = workspace(experts).buffers.setdefault((device, "expert", dtype), _Buffer())
    if buffer.tensor is None or buffer.tensor.numel() < max(sizes.values()):
        buffer.tensor = None  # freed before the new one is asked for
        with torch.inference_mode(False):
            buffer.tensor = torch.empty(max(sizes.values()), dtype=dtype, device=device)
    out = {name: buffer.tensor[: sizes[name]].view(shapes[name]) for name in PROJECTIONS}
    fill = {name: dequantiser(each, dtype, out[name]) for name, each in pieces.items()}
    matrices = {name: each[0] for name, each in out.items()}

    def weight(projection: str, expert: int) -> torch.Tensor:
        fill[projection](expert)
        return matrices[projection]

    return weight


def linear_pieces(layer: bnb.nn.Linear4bit) -> dict[str, torch.Tensor] | None:
    """bitsandbytes' own 4-bit matrix as pieces [1, N, K], which share its memory; None for another
    layout than ours."""
    state = layer.weight.quant_state
    size, columns = state.shape
    ours = state.quant_type == "nf4" and state.blocksize == BLOCK and state.nested
    if (
        not ours
        or state.state2.blocksize != NESTED_BLOCK
        or columns % BLOCK
        or layer.bias is not None
    ):
        return None
    return {
        "packed": layer.weight.data.view(1, size, columns // 2),
        "absmax": state.absmax.view(1, -1),
        "nested": state.state2.absmax.view(1, -1).view(torch.int32),
        "offset": state.offset.view(1).view(torch.int32),
    }
