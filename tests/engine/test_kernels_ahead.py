"""Every Triton kernel compiled ahead of time for each card, without a GPU.

The project's own launchers run at Mixtral's shape on tensors without data, with a stand-in for
Triton's driver that names the card. So what is compiled is what they would launch there: the same
configuration, options and specialisation. An architecture takes 4 to 6 s on one core.
"""

from __future__ import annotations

import os
import re
import subprocess
import tempfile
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import pytest
import torch

triton = pytest.importorskip("triton", reason="pip install triton==3.6.0 to run these without CUDA")
if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("Triton's interpreter compiles nothing", allow_module_level=True)

from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.compiler import CompiledKernel
from triton.runtime.errors import PTXASError
from triton.runtime.jit import JITFunction

from prompt_recovery.engine import storage
from prompt_recovery.engine.kernels import (
    decode_step,
    dispatch,
    experts_decode,
    experts_training,
    launching,
    sm75,
)

TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
META = torch.device("meta")
EXPERTS, TOP_K, HIDDEN, INNER = 8, 2, 4096, 14336  # Mixtral 8x7B
HEADS, KEY_HEADS, HEAD_SIZE = 32, 8, 128
# Bytes of shared memory that a program may have, by compute capability (CUDA C++ Programming Guide)
KIB = 1024
SHARED = {75: 64 * KIB, 80: 163 * KIB, 86: 99 * KIB, 89: 99 * KIB, 90: 227 * KIB, 120: 99 * KIB}
# A program gets this much unasked. Triton 3.6 asks the driver for more only where its own, dynamic
# part alone is larger.
UNASKED = 48 * KIB
# Static shared memory of the experts' decode kernel: a table of 256 pairs for each lane, and 256
# absmax levels
TABLES = 33 * KIB
# Functions that kernels call; every other one of these modules is a kernel.
HELPERS = {
    *("_multiply", "_values", "_weights", "_columns", "_look_up", "_scale"),
    *("_load_16_bytes", "_load_8_bytes", "_load_levels", "_load_nested"),
}
KERNELS = {
    (module.__name__.rsplit(".", 1)[-1], name)
    for module in (decode_step, experts_decode, experts_training)
    for name, function in vars(module).items()
    if isinstance(function, JITFunction) and name not in HELPERS
}


class Compiled(NamedTuple):
    """One kernel as launched, and what its machine code takes.

    static, dynamic: bytes of shared memory; spilled: bytes of a thread's stack, which these kernels
    need for nothing but spilled registers."""

    module: str
    name: str
    arguments: dict
    kernel: triton.compiler.CompiledKernel
    registers: int
    spilled: int
    static: int

    @property
    def dynamic(self) -> int:
        return self.kernel.metadata.shared

    @property
    def exchanges(self) -> int:
        """Values that change their thread, which takes shared memory and a barrier."""
        return self.kernel.asm["ttgir"].count("ttg.convert_layout")

    @property
    def branches(self) -> int:
        return 1 + (self.arguments["SHORT"] < self.arguments["M"])

    @property
    def ptx(self) -> str:
        return self.kernel.asm["ptx"]

    def __str__(self) -> str:
        chosen = {name: value for name, value in self.arguments.items() if isinstance(value, int)}
        return (
            f"{self.module}.{self.name} {chosen}: {self.registers} registers, "
            f"{self.spilled} bytes spilled, {self.static} + {self.dynamic} bytes of shared memory"
        )


def resources(cubin: bytes) -> tuple[int, int, int]:
    """Registers, stack and static shared memory. LOCAL of -res-usage stays 0 even with spills.

    On sm_90 and sm_120 cuobjdump adds the KiB a program that CUDA keeps for itself: these checks
    are a KiB too strict there."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [TOOLS / "cuobjdump", "-res-usage", file.name]
        usage = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    found = re.search(r"REG:(\d+) STACK:(\d+) SHARED:(\d+)", usage)
    assert found, usage
    return int(found[1]), int(found[2]), int(found[3])


class Driver:
    """What Triton asks of a driver in order to compile: a card that isn't there."""

    def __init__(self, capability: int):
        self.capability = capability

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", self.capability, 32)

    def get_current_device(self) -> str:  # Triton keeps compiled kernels by this
        return f"no sm_{self.capability}"

    def get_current_stream(self, device: str) -> int:
        return 0


@pytest.fixture
def pretend(monkeypatch, tmp_path):
    """Call it with a compute capability: from then on launches compile for that card and run
    nothing. It returns a dict that receives what they compile."""
    functions, compiled = set(), {}
    plain = JITFunction.run

    def run(self, *args, grid, warmup, **options):
        kernel = plain(self, *args, grid=grid, warmup=True, **options)
        functions.add(self)
        if kernel.hash not in compiled:
            names = self.__module__.rsplit(".", 1)[-1], self.__name__
            arguments = dict(zip(self.arg_names, args, strict=False)) | options
            taken = resources(kernel.asm["cubin"])
            compiled[kernel.hash] = Compiled(*names, arguments, kernel, *taken)
        return kernel

    def become(capability: int, lower: bool = True) -> dict[str, Compiled]:
        monkeypatch.setattr(triton.runtime.driver, "_active", Driver(capability))
        dispatch.act_as(META, capability)
        if dispatch.lowered(META) and lower:
            assert sm75.install() == ""
        return compiled

    with knobs.runtime.scope(), knobs.cache.scope():
        knobs.runtime.add_stages_inspection_hook = None  # an earlier test's would lower, too
        knobs.cache.dir = str(tmp_path)
        monkeypatch.setattr(JITFunction, "run", run)
        # what is compiled is not launched the next time either
        monkeypatch.setattr(CompiledKernel, "__getitem__", lambda *_: lambda *_: None)
        monkeypatch.setattr(launching, "_compiled", {})
        yield become
        dispatch.forget()
    for function in functions:
        for capability in SHARED:
            function.device_caches.pop(f"no sm_{capability}", None)


def empty(*shape: int, dtype: torch.dtype) -> torch.Tensor:
    return torch.empty(shape, dtype=dtype, device=META)


def pieces(rows: int, columns: int, count: int = EXPERTS) -> dict[str, torch.Tensor]:
    """The pieces of `storage` of one matrix [rows, columns] an expert."""
    blocks = rows * columns // storage.BLOCK
    return {
        "packed": empty(count, rows, columns // 2, dtype=torch.uint8),
        "absmax": empty(count, blocks, dtype=torch.uint8),
        "nested": empty(count, -(-blocks // storage.NESTED_BLOCK), dtype=torch.int32),
        "offset": empty(count, dtype=torch.int32),
    }


def few_rows(tokens: int, dtype: torch.dtype, count: int = EXPERTS, **others) -> Any:
    """The experts' launches for so many tokens of a decode step, and what that gives."""
    gate_up, down = pieces(2 * INNER, HIDDEN, count), pieces(HIDDEN, INNER, count)
    experts = SimpleNamespace(
        **{f"gate_up_proj_{piece}": tensor for piece, tensor in gate_up.items()},
        **{f"down_proj_{piece}": tensor for piece, tensor in down.items()},
    )
    x, index = empty(tokens, HIDDEN, dtype=dtype), empty(tokens, TOP_K, dtype=torch.int64)
    weights = empty(tokens, TOP_K, dtype=torch.float32)
    return experts_decode.few_rows(x, index, weights, experts, **others)


def attention_matrices(tokens: int, dtype: torch.dtype) -> None:
    """The launches for queries (as wide as the output) and for keys (as wide as values), in 4
    bits."""
    for size in (HEADS * HEAD_SIZE, KEY_HEADS * HEAD_SIZE):
        matrix = {piece: tensor[:1] for piece, tensor in pieces(size, HIDDEN).items()}
        out = experts_decode.linear(empty(tokens, HIDDEN, dtype=dtype), matrix)
        assert out.shape == (tokens, size)


def many_rows(dtype: torch.dtype, tokens: int = 512) -> None:
    """The launches of experts_training: prefill and training."""
    rows = tokens * TOP_K
    code, table = empty(256, dtype=torch.float32), empty(16, dtype=torch.float32)
    for size, columns in ((2 * INNER, HIDDEN), (HIDDEN, INNER)):
        packed, absmax, nested, offset = pieces(size, columns).values()
        out = empty(EXPERTS, size, columns, dtype=dtype)
        nested, offset = nested.view(torch.float32), offset.view(torch.float32)
        experts_training.dequantise(packed, absmax, nested, offset, code, table, out)
    order, weights = empty(rows, dtype=torch.int64), empty(tokens, TOP_K, dtype=torch.float32)
    gate_up = empty(rows, 2 * INNER, dtype=dtype)
    experts_training.gather(empty(tokens, HIDDEN, dtype=dtype), order, TOP_K)
    experts_training.combine(empty(rows, HIDDEN, dtype=dtype), order, TOP_K)
    for in_place in (False, True):
        experts_training.swiglu(gate_up, weights, order, in_place)
    experts_training.swiglu_backward(gate_up, weights, order, empty(rows, INNER, dtype=dtype))


def decode_attention(dtype: torch.dtype, rows: int, columns: int = 1024) -> None:
    """The launches of decode_step: rotary embedding with the cache, attention, and the router."""
    qkv = empty(rows, (HEADS + 2 * KEY_HEADS) * HEAD_SIZE, dtype=dtype)
    parts = qkv.split([each * HEAD_SIZE for each in (HEADS, KEY_HEADS, KEY_HEADS)], -1)
    angle, column = empty(rows, HEAD_SIZE, dtype=dtype), empty(1, dtype=torch.int64)
    cache = empty(rows * KEY_HEADS * columns * HEAD_SIZE, dtype=dtype)
    now, padding = empty(2, dtype=torch.int64), empty(rows, 1, dtype=torch.int64)
    prompt = dict(first_row=3, first_column=17, width=5)
    for where in (prompt, dict(column=column)):
        query = decode_step.rotate_and_store(
            *parts, angle, angle, cache, cache, now, KEY_HEADS, **where
        )
    decode_step.attend(query, cache, cache, padding, column, now, 17, KEY_HEADS, HEAD_SIZE**-0.5)
    x, gate = empty(rows, HIDDEN, dtype=dtype), empty(EXPERTS, HIDDEN, dtype=dtype)
    decode_step.choose_experts(x, gate, TOP_K)


def as_dispatched(lowered: bool) -> set[tuple]:
    """Rows of a tile, gate and Config of every projection that dispatch can choose on a card."""
    tiles = {dispatch.tile_rows(lowered, tokens) for tokens in range(1, dispatch.FEW_TOKENS + 1)}
    both = {m: dispatch.configs(lowered, m) for m in tiles}
    chosen = {(m, gate): both[m][0 if gate else 1] for m in tiles for gate in (True, False)}
    return {(*key, *each._replace(short=each.short or key[0])) for key, each in chosen.items()}


def none(compiled, wrong) -> None:
    """Fails with a line for each kernel of which something is wrong."""
    found = [str(each) for each in compiled if wrong(each)]
    assert not found, f"{len(found)} of {len(compiled)}:\n" + "\n".join(found)


@pytest.mark.parametrize("capability", SHARED)
def test_every_kernel_compiles_and_fits(pretend, capability):
    launches = pretend(capability)
    lowered = dispatch.lowered(META)
    dtype, letters = (torch.float16, "f16") if lowered else (torch.bfloat16, "bf16")
    for tokens in range(1, dispatch.FEW_TOKENS + 1):
        assert few_rows(tokens, dtype).shape == (tokens, HIDDEN)
    for tokens in (1, 9, 64):
        attention_matrices(tokens, dtype)
    many_rows(dtype)
    # attention is ours only where kernels are lowered (engine/layers.py)
    for rows in (1, 2, 8, 16, 24, 32, 64) if lowered else (1, 64):
        decode_attention(dtype, rows)
    compiled = [*launches.values()]
    projections = [each for each in compiled if each.name == "_project"]

    assert {(each.module, each.name) for each in compiled} == KERNELS
    names = ("M", "GATE", "ROWS", "WARPS", "BLOCKS", "SPLIT", "maxnreg", "SHORT")
    launched = {tuple(each.arguments[name] for name in names) for each in projections}
    assert launched == as_dispatched(lowered)

    # A T4 has 64 KiB, but Triton asks for none beyond 48
    most = UNASKED if lowered else SHARED[capability]
    none(compiled, lambda each: each.static + each.dynamic > most)
    none(projections, lambda each: each.static < TABLES)
    none(projections, lambda each: TABLES + each.dynamic > UNASKED)
    none(projections, lambda each: each.spilled > 0)

    target = re.compile(rf"^\.target sm_{capability}a?$", re.MULTILINE)
    none(compiled, lambda each: not target.search(each.ptx))
    # Tensor cores, with operands straight from memory: a branch exchanges nothing but its sums
    none(projections, lambda each: each.exchanges > each.branches)
    shape = "m16n8k8" if lowered else "m16n8k16"
    mma = f"mma.sync.aligned.{shape}.row.col.f32.{letters}.{letters}.f32"
    none(projections, lambda each: mma not in each.ptx)
    none(compiled, lambda each: re.search(r"wgmma|tcgen05", each.ptx))
    if lowered:
        none(compiled, lambda each: re.search(r"m16n8k16|cp\.async|bf16", each.ptx))


@pytest.mark.parametrize("capability", [75, 80])
def test_more_experts_than_a_t4_can_route_are_left_to_the_way_of_many_rows(pretend, capability):
    """Compiled for it, their routing would end the process."""
    launches = pretend(capability)
    assert few_rows(1, torch.float16, 16) is not None and launches
    before = len(launches)
    assert (few_rows(1, torch.float16, 17) is None) == (capability == 75)
    assert (len(launches) == before) == (capability == 75)


def test_without_the_lowering_sm75_refuses(pretend, capfd):
    pretend(75, lower=False)
    with pytest.raises(PTXASError, match=r"m16n8k16.*requires.*sm_80"):
        few_rows(1, torch.float16)
    capfd.readouterr()  # Triton prints the whole PTX


def test_spilled_registers_are_seen(pretend):
    launches = pretend(86)
    tight = tuple(each._replace(registers=40) for each in dispatch.configs(False, 8))
    few_rows(1, torch.bfloat16, configs=tight)
    projections = [each for each in launches.values() if each.name == "_project"]
    assert {each.arguments["GATE"] for each in projections} == {True, False}
    none(projections, lambda each: each.spilled == 0)


def test_a_launch_finds_the_kernel_that_triton_would(pretend, monkeypatch):
    """Compiled for the same alignments, dtypes and whole numbers: by one compiled for others a
    launch would read and write wrongly."""
    pretend(90)
    again = []
    monkeypatch.setattr(
        CompiledKernel, "__getitem__", lambda kernel, _: lambda *_: again.append(kernel)
    )
    kernel, constants = experts_training._gather, {"K": 2, "BLOCK": 64}
    half, order = torch.zeros(1025, dtype=torch.float16), torch.zeros(9, dtype=torch.int64)
    others = [  # of which each is compiled otherwise
        (half[:1024], order[:8], 64),
        (half[1:], order[:8], 64),
        (half[:1024], order[1:], 64),
        (half[:1024].bfloat16(), order[:8], 64),
        (half[:1024].float(), order[:8], 64),
        (half[:1024], order[:8], 63),
        (half[:1024], order[:8], 1),
    ]
    kernels = []
    for x, where, columns in others:
        arguments = x, where, torch.empty_like(half), columns
        for _ in range(2):
            launching.launch(kernel, (8, 1, 1), arguments, constants, num_warps=4)
        kernels.append(kernel.run(*arguments, **constants, grid=(8,), warmup=True, num_warps=4))
    assert again == kernels and len({each.hash for each in kernels}) == len(others)
