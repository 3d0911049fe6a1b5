"""Which kernels run on a device, and with which launch parameters.

Triton's run on NVIDIA cards of compute capability 7.5 and newer (on 7.5 by the lowering of `sm75`),
plain torch everywhere else: right, and slow. There is no third path.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from types import ModuleType
from typing import Any, NamedTuple

import torch

KERNELS = ("triton", "torch")
VARIABLE = "PROMPT_RECOVERY_KERNELS"
OLDEST = 75
# Up to this many tokens the decode kernel beats dequantising a whole layer. Experts of 32 layers on
# an H100 at 384 tokens, by it and by the way of many rows: 57 and 96 ms in bf16, 97 and 97 to 138
# lowered to sm_75 (docs/MEASURED.md).
FEW_TOKENS = 384


class Config(NamedTuple):
    """Launch parameters of the decode kernel's `_project`. A program works on warps * rows_per_warp
    rows of the weights (twice that with a gate), blocks * 64 columns an iteration. split: parts of
    the columns, each summed by a program of its own; 1 with a gate. registers: the most that a
    thread may have; None leaves it to the compiler. short: tiles with at most so many rows are
    computed as ones of so many; None: as full ones."""

    rows_per_warp: int
    warps: int
    blocks: int
    split: int = 1
    registers: int | None = None
    short: int | None = None


_chosen: dict[torch.device, str] = {}
_checked: set[torch.device] = set()
_failed: set[torch.device] = set()  # whose check failed
_capabilities: dict[torch.device, int] = {}  # 75 for 7.5


def forget() -> None:
    """Forget choices, checks and capabilities of all devices, as a new process knows none."""
    for known in (_chosen, _checked, _failed, _capabilities):
        known.clear()


def act_as(device: torch.device, capability: int) -> None:
    """Choose kernels and launch parameters on a device as on a card of this compute capability, 75
    for 7.5: an H100 can run what a T4 would, and a device that isn't there can be compiled for."""
    _capabilities[device] = capability


def interpreted() -> bool:
    """Whether Triton's interpreter runs the kernels, on the CPU."""
    return os.environ.get("TRITON_INTERPRET") == "1"


def choose(device: torch.device, kernels: str | None = None) -> str:
    """Decide which kernels run on a device from now on, for all models there, and print it.
    "triton" or "torch".

    kernels: the choice; None takes that of PROMPT_RECOVERY_KERNELS in the environment, and without
    one Triton's wherever they run.
    Raises ValueError for another word, and for "triton" on a device that can't run it.
    """
    wanted = kernels or os.environ.get(VARIABLE) or None
    if wanted not in (None, *KERNELS):
        raise ValueError(
            f"kernels={wanted!r}: choose one of {', '.join(KERNELS)} (also {VARIABLE} in the "
            "environment)."
        )
    why = _unable(device)
    if wanted == "triton" and why:
        raise ValueError(
            f"kernels='triton' can't run on {device}: {why}. Leave it at None, or take 'torch'."
        )
    if device in _failed:
        return "torch"  # which was said then
    before = _chosen.get(device)
    _chosen[device] = "torch" if why else wanted or "triton"
    if _chosen[device] == before:
        return before
    if _chosen[device] == "triton":
        variant = (
            " in its interpreter"
            if interpreted()
            else ", lowered to sm_75"
            if lowered(device)
            else ""
        )
        print(f"kernels on {device}: triton{variant}")
    elif device.type == "cuda":
        print(f"kernels on {device}: torch, which is right and slow ({why or 'as asked for'})")
    return _chosen[device]


def to_check(device: torch.device) -> bool:
    """Whether Triton's kernels run on a device and nobody has asked this before."""
    if device in _checked or not uses_triton(device):
        return False
    _checked.add(device)
    return True


def refuse(device: torch.device, why: str) -> None:
    """Let plain torch compute on a device whose Triton kernels failed, and say so in one line."""
    _failed.add(device)
    _chosen[device] = "torch"
    print(
        f"kernels on {device}: torch, which is right and slow: triton's failed their check ({why})"
    )


@contextmanager
def using(device: torch.device, kernels: str) -> Iterator[None]:
    """Let these kernels run on a device inside the block, and what was chosen before it
    afterwards."""
    before = uses_triton(device)
    _chosen[device] = kernels
    try:
        yield
    finally:
        _chosen[device] = "triton" if before else "torch"


def _unable(device: torch.device) -> str:
    """Why Triton's kernels can't run on a device; "" where they can."""
    if device.type == "cpu":
        return "" if interpreted() else "a CPU needs TRITON_INTERPRET=1"
    if device.type != "cuda" or torch.version.hip:
        return "it is no NVIDIA card"
    if capability(device) < OLDEST:
        return f"compute capability {capability(device) / 10} is below 7.5"
    try:
        import triton  # noqa: F401
    except ImportError:
        return "triton is not installed"
    if lowered(device):
        from prompt_recovery.engine.kernels import sm75

        return sm75.install()
    return ""


def uses_triton(device: torch.device) -> bool:
    """Whether Triton's kernels run on a device; the first question for a device decides it."""
    return (_chosen.get(device) or choose(device)) == "triton"


def training_kernels(device: torch.device) -> ModuleType | None:
    """The module `experts_training` where Triton runs, else None."""
    if not uses_triton(device):
        return None
    from prompt_recovery.engine.kernels import experts_training

    return experts_training


def on(device: torch.device) -> AbstractContextManager[Any]:
    """Make a GPU the current one for the while: Triton launches on that, whichever card its tensors
    lie on."""
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()


def capability(device: torch.device) -> int:
    """Compute capability, 75 for 7.5; on the CPU, where kernels are interpreted, an H100's."""
    if device not in _capabilities:
        major, minor = torch.cuda.get_device_capability(device) if device.type == "cuda" else (9, 0)
        _capabilities[device] = 10 * major + minor
    return _capabilities[device]


def lowered(device: torch.device) -> bool:
    """Whether kernels of sm_80 are lowered to sm_75 for a device."""
    return capability(device) < 80


def launch_options(device: torch.device) -> dict[str, Any]:
    """Options of every launch on a device: on sm_75 the code of sm_80 without pipelining, which
    `sm75` lowers."""
    return {"arch": "sm80", "num_stages": 1} if lowered(device) else {}


# --- the experts' decode kernel -------------------------------------------------------------------


def tile_rows(lowered: bool, tokens: int) -> int:
    """Most rows of a tile for so many tokens, by what experts take on an H100 (docs/MEASURED.md):
    each tile of an expert reads its weights again, and a larger one takes more of everything
    else."""
    if tokens <= 8:
        return 8
    return 16 if tokens <= 24 or lowered else 32


def configs(lowered: bool, rows: int) -> tuple[Config, Config]:
    """Launch parameters of the gate and up, and of the down projection, by rows of a tile: the
    fastest on an H100 of those that do not spill.

    A T4 has room for one program a multiprocessor, hence 8 warps in each.
    """
    warps, short = 8 if lowered else 4, rows // 2 if rows > 8 else None
    down = Config(16, warps, 4, split=4, registers=128, short=short)
    if rows > 16:
        down = Config(32, warps, 4, split=4, short=short)
    return Config(16, warps, 4, short=short), down
