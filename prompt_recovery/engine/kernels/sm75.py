"""Triton's kernels on a T4: tensor-core code of sm_80, lowered to what sm_75 has.

Triton picks tensor cores for `tl.dot` by the launch option `arch`, and makes PTX for the card.
Launched with arch="sm80" and without pipelining (num_stages=1: sm_75 has no cp.async), a kernel
differs from what sm_75 takes in one instruction only, mma.m16n8k16, which is two mma.m16n8k8. A
hook on the PTX text splits it. It works on launches of that kind alone: no other kernel has the
`arch` of one card and the target of another.
"""

from __future__ import annotations

import hashlib
import inspect
import re
from pathlib import Path

_MMA = re.compile(
    r"mma\.sync\.aligned\.m16n8k16\.row\.col\.(\w+)\.f16\.f16\.(\w+)"
    r"\s*\{([^}]*)\},\s*\{([^}]*)\},\s*\{([^}]*)\},\s*\{([^}]*)\};"
)


def lower(ptx: str) -> str:
    """PTX in which each m16n8k16 stands as two m16n8k8: registers a0, a1 and b0 hold columns 0 to
    7, a2, a3 and b1 columns 8 to 15 (PTX ISA, fragments of mma.m16n8k16 and m16n8k8)."""

    def halves(match: re.Match[str]) -> str:
        kind = f"mma.sync.aligned.m16n8k8.row.col.{match[1]}.f16.f16.{match[2]}"
        d, a, b, c = (
            [register.strip() for register in match[group].split(",")] for group in (3, 4, 5, 6)
        )
        to, added = ", ".join(d), ", ".join(c)
        return (
            f"{kind} {{{to}}}, {{{a[0]}, {a[1]}}}, {{{b[0]}}}, {{{added}}};\n"
            f"\t{kind} {{{to}}}, {{{a[2]}, {a[3]}}}, {{{b[1]}}}, {{{to}}};"
        )

    return _MMA.sub(halves, ptx)


def install() -> str:
    """Hook the lowering into Triton; calling it again changes nothing. Returns why it can't be
    done, or "".

    Triton's cache of compiled kernels does not know of the hook, so it gets a folder named by this
    file's text.
    """
    import triton
    from triton import knobs
    from triton.backends.nvidia.compiler import CUDABackend, CUDAOptions

    parameters = [*inspect.signature(CUDABackend.make_ptx).parameters]
    hooked = "add_stages_inspection_hook" in dir(knobs.runtime)
    if (
        not hooked
        or parameters[1:] != ["src", "metadata", "opt", "capability"]
        or not hasattr(CUDAOptions, "arch")
    ):
        return (
            f"Triton {triton.__version__} can't be hooked as 3.6 can, by which its code is "
            "lowered to sm_75"
        )
    before = knobs.runtime.add_stages_inspection_hook
    if getattr(before, "lowers_to_sm75", False):
        return ""

    def hook(backend, stages, options, language, capability):
        if before is not None:
            before(backend, stages, options, language, capability)
        if options.arch == "sm80" and backend.target.arch != 80:
            stages["ptx"] = lambda src, metadata: lower(
                backend.make_ptx(src, metadata, options, 75)
            )

    hook.lowers_to_sm75 = True  # type: ignore[attr-defined]  # a mark, not a part of its type
    knobs.runtime.add_stages_inspection_hook = hook
    text = hashlib.sha256(Path(__file__).read_bytes()).hexdigest()[:12]
    knobs.cache.dir = str(Path(knobs.cache.dir) / f"prompt_recovery-sm75-{text}")
    return ""
