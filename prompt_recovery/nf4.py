"""The storage of 4-bit experts: NF4 pieces of a 3-D projection, bit for bit bitsandbytes', and their way back to 16 bit.

Each expert's matrix is quantised on its own: blocks of 64, their absmax in 8 bit in blocks of 256 (double quantisation).
Dequantised weights go into one buffer a device and projection that remembers whose weights it holds, so that a layer's
recomputation (activation checkpointing) and its backward share one dequantisation.
"""

from __future__ import annotations

import functools
import os
import weakref
from typing import Any

import bitsandbytes.functional as bnb_functional
import torch
from torch import nn

BLOCK, NESTED_BLOCK = 64, 256
PROJECTIONS = ("gate_up_proj", "down_proj")
# what a projection [E, N, K] becomes; fp32 values are kept as int32 bits so that `model.to(dtype)` can't round them
PIECES = ("packed", "absmax", "nested", "offset")


def quantise(weight: torch.Tensor) -> dict[str, torch.Tensor]:
    """NF4 pieces of a projection [E, N, K] of 16 or 32 bit: packed uint8 [E, N, K / 2], absmax uint8 [E, B],
    nested int32 (bits of fp32) [E, ceil(B / 256)], offset int32 (bits of fp32) [E], with B = N * K / 64."""
    rows = []
    for matrix in weight:
        packed, state = bnb_functional.quantize_4bit(
            matrix.contiguous(), blocksize=BLOCK, compress_statistics=True, quant_type="nf4"
        )
        rows.append((packed.view(matrix.shape[0], -1), state.absmax, state.state2.absmax, state.offset))
    packed, absmax, nested, offset = (torch.stack(piece) for piece in zip(*rows, strict=True))
    return {"packed": packed, "absmax": absmax, "nested": nested.view(torch.int32), "offset": offset.view(torch.int32)}


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
def _tables(device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """bitsandbytes' tables on the device: [256] of the absmax levels, [16] of NF4; fp32."""
    with torch.inference_mode(False):
        code = bnb_functional.create_dynamic_map().to(device=device, dtype=torch.float32)
        nf4 = bnb_functional.get_4bit_type("nf4", device=device).float()
    return code, nf4


@functools.cache
def fast_kernels(device: torch.device) -> Any:
    """The Triton kernels, or None where there is no CUDA device of sm80 or newer. PROMPT_RECOVERY_TRITON=0 in the
    environment switches them off, which is how the path of older GPUs is tested on a new one."""
    if device.type != "cuda" or torch.cuda.get_device_capability(device) < (8, 0) or torch.version.hip:
        return None
    if os.environ.get("PROMPT_RECOVERY_TRITON") == "0":
        return None
    from prompt_recovery import kernels

    return kernels


def dequantise(pieces: dict[str, torch.Tensor], dtype: torch.dtype, out: torch.Tensor | None = None) -> torch.Tensor:
    """The weights [E, N, K] in `dtype`, bit for bit bitsandbytes' dequantisation of every expert; into `out` if given."""
    packed, absmax = pieces["packed"], pieces["absmax"]
    nested, offset = pieces["nested"].view(torch.float32), pieces["offset"].view(torch.float32)
    shape = (*packed.shape[:2], packed.shape[2] * 2)
    code, nf4 = _tables(packed.device)
    triton_kernels = fast_kernels(packed.device)
    if triton_kernels is not None:
        out = packed.new_empty(shape, dtype=dtype) if out is None else out
        triton_kernels.dequantise(packed, absmax, nested, offset, code, nf4, out)
        return out
    second = nested.repeat_interleave(NESTED_BLOCK, dim=1)[:, : absmax.shape[1]]
    scale = (code[absmax.int()] * second + offset[:, None]).reshape(-1)
    bits = packed.reshape(-1, 1)
    if out is None or packed.device.type == "cpu":
        result = torch.ops.bitsandbytes.dequantize_4bit(bits, scale, BLOCK, "nf4", list(shape), dtype)
        return result if out is None else out.copy_(result)
    torch.ops.bitsandbytes.dequantize_4bit.out(bits, scale, BLOCK, "nf4", list(shape), dtype, out=out)
    return out


class _Buffer:
    """Room for one projection's 16-bit weights, and a weak reference to the packed tensor that it holds now."""

    room: torch.Tensor | None = None
    owner: weakref.ref | None = None
    key: tuple = ()


_buffers: dict[tuple, _Buffer] = {}


def release_buffers() -> None:
    """Give back the memory of the dequantised weights (one layer's experts in 16 bit a device)."""
    _buffers.clear()


def weights(experts: nn.Module, projection: str, dtype: torch.dtype) -> torch.Tensor:
    """A projection's weights [E, N, K] in `dtype`, valid until the same projection of another layer is asked for."""
    pieces = {piece: getattr(experts, f"{projection}_{piece}").detach() for piece in PIECES}
    packed = getattr(experts, f"{projection}_packed")
    buffer = _buffers.setdefault((packed.device, projection, dtype), _Buffer())
    key = (packed.data_ptr(), None if packed.is_inference() else packed._version, packed.shape)
    room = buffer.room
    if room is None or room.numel() != packed.numel() * 2:
        buffer.owner = buffer.room = room = None  # freed before the new one is asked for
        with torch.inference_mode(False):
            buffer.room = room = torch.empty(packed.numel() * 2, dtype=dtype, device=packed.device)
    matrices = room.view(*packed.shape[:2], -1)
    if buffer.owner is None or buffer.owner() is not packed or buffer.key != key:
        buffer.owner = None  # a dequantisation that fails leaves nothing that looks valid
        dequantise(pieces, dtype, out=matrices)
        buffer.owner, buffer.key = weakref.ref(packed), key
    return matrices


def expert_weight(experts: nn.Module, projection: str, expert: int, dtype: torch.dtype) -> torch.Tensor:
    """One expert's weight [N, K] in `dtype`, in memory of its own."""
    pieces = {piece: getattr(experts, f"{projection}_{piece}").detach()[expert : expert + 1] for piece in PIECES}
    return dequantise(pieces, dtype)[0]


def gemm(x: torch.Tensor, experts: nn.Module, projection: str, expert: int) -> torch.Tensor:
    """x [T, K] times one expert's weight transposed -> [T, N], by bitsandbytes' fused 4-bit GEMM."""
    packed, absmax, nested, offset = (getattr(experts, f"{projection}_{piece}")[expert] for piece in PIECES)
    code, _ = _tables(x.device)
    return torch.ops.bitsandbytes.gemm_4bit(
        x, packed.view(-1, 1), [packed.shape[0], packed.shape[1] * 2], nested.view(torch.float32), BLOCK, "nf4",
        absmax_8bit=absmax, absmax_code=code, absmax_offset=offset.view(torch.float32),
    )  # fmt: skip
