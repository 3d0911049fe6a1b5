"""The Triton kernels without a GPU: in Triton's interpreter beside plain torch, and their PTX in a
small emulator.

Run as a program (TRITON_INTERPRET=1) this file prints the differences as JSON; the tests read them.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
from conftest import ROOT

from prompt_recovery.engine import storage

pytest.importorskip(
    "triton",
    reason="triton comes with CUDA builds of torch; pip install triton==3.6.0 to run these",
)
# experts, hidden, inner, tokens, choices a token, dtype, how the router chooses
FEW_ROWS = {
    "one token": (4, 128, 192, 1, 2, "float16", "random"),
    "bf16": (4, 128, 192, 5, 2, "bfloat16", "random"),
    "every expert": (4, 128, 256, 16, 4, "float16", "random"),
    "one expert, others empty": (4, 128, 192, 40, 1, "float16", "all 2"),
    "two tiles an expert": (4, 64, 256, 33, 2, "float16", "all 0 3"),
    "expert size no multiple of a program's": (3, 128, 320, 17, 2, "float16", "random"),
    "16-bit routing weights": (4, 128, 192, 3, 2, "bfloat16", "random"),
    "larger tiles": (4, 64, 128, 130, 2, "float16", "random"),
    "more experts than half a warp": (20, 64, 64, 3, 2, "float16", "random"),
}
ATTENTION = {  # rows, column, columns that all rows share, rows of the batch
    "attention of one row": (1, 300, 0, 1),
    "attention of three rows behind a prefix": (3, 255, 70, 3),
    "attention of many rows": (40, 64, 9, 40),
    "attention with rows beyond the batch's": (8, 200, 3, 5),
    "attention to the first column": (2, 0, 0, 2),
}
LINEAR = {"one matrix, one row": 1, "one matrix, two tiles": 9, "one matrix, rows of a prompt": 70}
EXACT = (
    "a row beyond the batch's",
    "dequantise float32",
    "dequantise float16",
    "gather",
    "few rows twice",
    "router that is not finite",
)
PLAIN = (
    "combine",
    "swiglu",
    "swiglu in place",
    "swiglu of the last",
    "swiglu in place of the last",
    "swiglu backward",
    "swiglu backward of the weights",
)
# target modules of the adapter, and lengths of the prompts: more than 64 tokens together are read
# by dequantised matrices
DECODERS = {
    "a decoder": ((), (12, 3, 7)),
    "a decoder with an adapter": (("q_proj", "k_proj", "v_proj", "o_proj"), (22, 3, 7)),
    "a decoder with an adapter of two matrices": (("q_proj", "v_proj"), (12, 3, 7)),
}
DECODER = [f"step {number} of {name}" for name in DECODERS for number in range(4)]
STEP = (
    "rotated query",
    "keys in the cache",
    "values in the cache",
    "keys of a prompt",
    "values of a prompt",
    "router",
    "a whole model",
    "a whole model by torch",
)


def random_experts(experts: int, hidden: int, inner: int) -> SimpleNamespace:
    made = {}
    for name, shape in (
        ("gate_up_proj", (experts, 2 * inner, hidden)),
        ("down_proj", (experts, hidden, inner)),
    ):
        pieces = storage.quantise(torch.randn(shape) * 0.05)
        made |= {f"{name}_{piece}": tensor for piece, tensor in pieces.items()}
    return SimpleNamespace(**made)


def plain_experts(x, index, weights, experts) -> torch.Tensor:
    """The experts' output in fp32, from the dequantised weights."""
    gate_up, down = (
        storage.dequantise(
            {piece: getattr(experts, f"{name}_{piece}") for piece in storage.PIECES}, torch.float32
        )
        for name in storage.PROJECTIONS
    )
    out = torch.zeros(x.shape)
    for token in range(x.shape[0]):
        for choice, expert in enumerate(index[token].tolist()):
            gate, up = (gate_up[expert] @ x[token].float()).chunk(2)
            value = down[expert] @ (torch.nn.functional.silu(gate) * up)
            out[token] += weights[token, choice].float() * value
    return out


def relative(got: torch.Tensor, want: torch.Tensor) -> float:
    return ((got.float() - want.float()).norm() / want.float().norm()).item()


def few_rows_differences() -> dict[str, float]:
    from prompt_recovery.engine.kernels import experts_decode as decode

    configs = decode.Config(16, 2, 2, short=8), decode.Config(16, 4, 4, split=2, short=16)
    found = {}
    for name, (count, hidden, inner, tokens, top_k, kind, routing) in FEW_ROWS.items():
        experts, dtype = random_experts(count, hidden, inner), getattr(torch, kind)
        x = torch.randn(tokens, hidden).to(dtype)
        index = torch.stack([torch.randperm(count)[:top_k] for _ in range(tokens)])
        if routing != "random":
            index[:] = torch.tensor([int(expert) for expert in routing.split()[1:]])
        weights = torch.rand(tokens, top_k).to(dtype if "16-bit" in name else torch.float32)
        got = decode.few_rows(x, index, weights, experts, configs)
        found[name] = relative(got, plain_experts(x, index, weights, experts))
        if name == "one token":
            found["few rows twice"] = float(
                not torch.equal(got, decode.few_rows(x, index, weights, experts, configs))
            )
    pieces = storage.quantise(torch.randn(1, 72, 320) * 0.05)
    for name, tokens in LINEAR.items():
        x = torch.randn(tokens, 320).half()
        want = x.float() @ storage.dequantise(pieces, torch.float32)[0].t()
        found[name] = relative(decode.linear(x, pieces), want)
    odd = SimpleNamespace(
        **{f"down_proj_{piece}": torch.zeros(2, 8, 80) for piece in storage.PIECES}
    )
    for piece in storage.PIECES:
        setattr(odd, f"gate_up_proj_{piece}", torch.zeros(2, 8, 16))
    found["no kernel for odd shapes"] = float(
        decode.few_rows(torch.zeros(1, 32), index, weights, odd) is not None
    )
    return found


def kernels_differences() -> dict[str, float]:
    from prompt_recovery.engine.kernels import experts_training as kernels

    found = {}
    # 320 blocks an expert: the last nested one is not full
    pieces = storage.quantise(torch.randn(3, 64, 320) * 0.05)
    code, table = storage.lookup_tables(torch.device("cpu"))
    for kind in ("float32", "float16"):
        out = torch.full((3, 64, 320), torch.nan, dtype=getattr(torch, kind))
        nested, offset = pieces["nested"].view(torch.float32), pieces["offset"].view(torch.float32)
        kernels.dequantise(pieces["packed"], pieces["absmax"], nested, offset, code, table, out)
        found[f"dequantise {kind}"] = float(
            not torch.equal(out, storage.dequantise(pieces, getattr(torch, kind)))
        )
    tokens, top_k, width = 7, 2, 200
    order = torch.randperm(tokens * top_k)
    x = torch.randn(tokens, width)
    found["gather"] = float(not torch.equal(kernels.gather(x, order, top_k), x[order // top_k]))
    rows, inverse = torch.randn(tokens * top_k, width), torch.argsort(order)
    found["combine"] = relative(
        kernels.combine(rows, inverse, top_k), rows[inverse].view(tokens, top_k, -1).sum(1)
    )
    gate_up = torch.randn(tokens * top_k, 2 * width, requires_grad=True)
    weights = torch.rand(tokens, top_k, requires_grad=True)
    gate, up = gate_up.chunk(2, dim=1)
    want = torch.nn.functional.silu(gate) * up * weights.reshape(-1)[order, None]
    for name, in_place in (("swiglu", False), ("swiglu in place", True)):
        for of, first in (("", 0), (" of the last", 3)):
            rows = gate_up.detach()[first:].clone()
            got = kernels.swiglu(rows, weights.detach(), order, in_place, first)
            found[name + of] = relative(got, want[first:])
    grad = torch.randn_like(want)
    want.backward(grad)
    got = kernels.swiglu_backward(gate_up.detach(), weights.detach(), order, grad)
    found["swiglu backward"] = relative(got[0], gate_up.grad)
    found["swiglu backward of the weights"] = relative(got[1], weights.grad)
    return found


def step_differences() -> dict[str, float]:
    """The small work of a decode step: rotary embedding and cache, router."""
    from prompt_recovery.engine.kernels import decode_step

    rows, heads, key_heads, size, columns = 3, 6, 2, 32, 192
    qkv, angle = torch.randn(rows, (heads + 2 * key_heads) * size), torch.randn(rows, size // 2)
    cos, sin = torch.cat([angle.cos()] * 2, -1), torch.cat([angle.sin()] * 2, -1)
    keys, values = torch.randn(2, rows, key_heads, columns, size)
    before = keys.clone(), values.clone()
    now = torch.tensor([columns, rows])
    given = *qkv.split([heads * size, key_heads * size, key_heads * size], -1), cos, sin
    query = decode_step.rotate_and_store(
        *given, keys, values, now, key_heads, column=torch.tensor([7])
    )
    parts = qkv.view(rows, -1, size)
    turned = torch.cat([-parts[..., size // 2 :], parts[..., : size // 2]], -1)
    want = parts * cos[:, None] + turned * sin[:, None]
    found = {"rotated query": relative(query, want[:, :heads])}
    before[0][:, :, 7], before[1][:, :, 7] = (
        want[:, heads : heads + key_heads],
        parts[:, heads + key_heads :],
    )
    found["keys in the cache"] = relative(keys, before[0])
    found["values in the cache"] = relative(values, before[1])
    kept = keys.clone(), values.clone()
    decode_step.rotate_and_store(
        *given, keys, values, torch.tensor([columns, 2]), key_heads, column=torch.tensor([9])
    )
    changed = torch.stack([a != b for a, b in zip(kept, (keys, values), strict=True)])
    found["a row beyond the batch's"] = float(changed[:, 2].any() or not changed[:, :2, :, 9].all())
    # the three as tokens of the second row, from a column on
    kept = keys.clone()
    decode_step.rotate_and_store(
        *given, keys, values, now, key_heads, first_row=1, first_column=40, width=3
    )
    kept[1, :, 40:43] = want[:, heads : heads + key_heads].transpose(0, 1)
    found["keys of a prompt"] = relative(keys, kept)
    found["values of a prompt"] = relative(
        values[1, :, 40:43], parts[:, heads + key_heads :].transpose(0, 1)
    )

    for name, (rows, place, start, live) in ATTENTION.items():
        columns, size = 320, 32
        keys, values = torch.randn(2, rows, key_heads, columns, size).half()
        # what is not there yet may hold anything
        keys[:, :, place + 1 :] = values[:, :, place + 1 :] = torch.nan
        padding = torch.randint(0, max(1, place - start - 5), (rows, 1))
        query = torch.randn(rows, heads, size).half()
        now, column = torch.tensor([columns, live]), torch.tensor([place])
        got = decode_step.attend(query, keys, values, padding, column, now, start, key_heads, 0.2)[
            :live
        ]
        seen = torch.arange(columns)
        visible = ((seen < start) | (seen >= start + padding)) & (seen <= place)
        grouped = query.view(rows, key_heads, heads // key_heads, size).float()
        odds = (grouped @ keys.float().nan_to_num().transpose(2, 3) * 0.2).masked_fill(
            ~visible[:, None, None], -torch.inf
        )
        want = (odds.softmax(-1) @ values.float().nan_to_num()).view(rows, heads, size)[:live]
        found[name] = relative(got, want)

    x, gate = torch.randn(5, 192), torch.randn(6, 192) * 0.1
    weights, index = decode_step.choose_experts(x, gate, 2)
    odds, chosen = torch.softmax(x @ gate.T, -1).topk(2)
    found["router"] = relative(weights, odds / odds.sum(-1, keepdim=True)) + float(
        not torch.equal(index, chosen)
    )
    gate[4] = torch.nan
    weights, index = decode_step.choose_experts(x, gate, 2)
    found["router that is not finite"] = float(
        not weights.isnan().all() or not ((index >= 0) & (index < 6)).all()
    )
    return found


def whole_model_differences() -> dict[str, float]:
    """A 4-bit model whose experts, router and attention run through the interpreter, against plain
    torch."""
    from prompt_recovery.engine import load_base
    from prompt_recovery.engine.kernels import dispatch
    from prompt_recovery.engine.layers import fast_layers

    cpu, found = torch.device("cpu"), {}
    base = load_base(ROOT / "demo" / "tiny-mixtral", torch.float16, four_bit=True, kernels="triton")
    logits = {}
    for kernels in dispatch.KERNELS:
        with dispatch.using(cpu, kernels), fast_layers(base), torch.inference_mode():
            logits[kernels] = base(torch.tensor([[1, 300, 400, 500, 7]])).logits
    found["a whole model"] = relative(logits["triton"], logits["torch"])
    # rounding differs between the two ways, so a difference of nothing would mean that one ran
    # twice
    found["a whole model by torch"] = float(torch.equal(logits["triton"], logits["torch"]))
    return found


def decode_differences() -> dict[str, float]:
    """Steps of three prompts, told what to write: whose attention finds its rows by itself, in a
    step of four rows, against plain torch with a mask."""
    from prompt_recovery.engine.kernels import decode_step, dispatch

    cpu = torch.device("cpu")
    dispatch.act_as(cpu, 75)  # where attention is ours
    decode_step.PROGRAMS = 32  # each takes milliseconds in the interpreter
    found = {}
    for name, (targets, lengths) in DECODERS.items():
        logits = decoder_logits(targets, lengths)
        pairs = zip(logits["triton"], logits["torch"], strict=True)
        found |= {f"step {number} of {name}": relative(*pair) for number, pair in enumerate(pairs)}
        found["refused by the check"] = float(not dispatch.uses_triton(cpu))
    dispatch.forget()
    return found


def decoder_logits(targets: tuple[str, ...], lengths: tuple[int, ...]) -> dict[str, list]:
    """By kernels, the logits of each step."""
    from peft import LoraConfig, get_peft_model

    from prompt_recovery.engine import load_base
    from prompt_recovery.engine.decoding import Decoder
    from prompt_recovery.engine.generation import ready
    from prompt_recovery.engine.kernels import dispatch
    from prompt_recovery.engine.planning import AnswerPlan

    base = load_base(ROOT / "demo" / "tiny-mixtral", torch.float16, four_bit=True, kernels="triton")
    base.model.layers = base.model.layers[:2]  # a layer takes seconds
    base.config.num_hidden_layers = 2
    model = base
    if targets:
        model = get_peft_model(base, LoraConfig(r=4, target_modules=[*targets]))
        torch.manual_seed(0)  # of which no token lies between two experts
        for name, weight in model.named_parameters():
            if "lora_B" in name:
                torch.nn.init.normal_(weight, 0, 0.1)
    prompts = [[1, *range(300, 300 + length)] for length in lengths]
    logits: dict[str, list[torch.Tensor]] = {}
    shapes = []
    for kernels in dispatch.KERNELS:
        with (
            dispatch.using(torch.device("cpu"), kernels),
            ready(model, AnswerPlan((2,), False, 128, 4096)) as prepared,
        ):
            decoder = Decoder(
                prepared.parts, [1], rows=3, cache_tokens=4 * 128, max_new_tokens=4, eos=-1, pad=0
            )
            choose, kept = decoder.choose, logits.setdefault(kernels, [])

            def told(found, rows, choose=choose, kept=kept, decoder=decoder):
                kept.append(found[:3].clone())
                choose(found, rows)
                decoder.tokens[:3, 0] = torch.tensor([400, 500, 600]) + len(kept)
                shapes.append(rows)

            decoder.choose = told
            decoder.answer(prompts, [[None]] * 3)
    assert shapes == [3, 4, 4, 4, 3, 3, 3, 3], shapes
    return logits


@pytest.fixture(scope="module")
def differences() -> dict[str, float]:
    environment = os.environ | {
        "TRITON_INTERPRET": "1",
        "PYTHONPATH": os.pathsep.join([str(ROOT), *sys.path]),
    }
    run = subprocess.run(
        [sys.executable, __file__], env=environment, capture_output=True, text=True, timeout=600
    )
    assert run.returncode == 0, run.stderr[-3000:]
    return json.loads(run.stdout.splitlines()[-1])


@pytest.mark.parametrize("name", FEW_ROWS)
def test_few_rows_matches_dequantised_experts(differences, name):
    # the interpreter cuts bf16 off instead of rounding it
    assert differences[name] < (1e-2 if FEW_ROWS[name][5] == "bfloat16" else 1e-3)


@pytest.mark.parametrize("name", [*EXACT, "no kernel for odd shapes", "refused by the check"])
def test_same_bits(differences, name):
    assert differences[name] == 0


@pytest.mark.parametrize("name", [*LINEAR, *ATTENTION])
def test_one_matrix_and_attention_in_16_bit(differences, name):
    assert differences[name] < 1e-3


@pytest.mark.parametrize("name", DECODER)
def test_a_decoder_in_fp16(differences, name):
    assert 0 < differences[name] < 5e-3


@pytest.mark.parametrize("name", [*PLAIN, *STEP])
def test_matches_plain_torch(differences, name):
    assert differences[name] < (5e-3 if name == "a whole model" else 1e-6)  # that one in fp16


class Ptx:
    """A thread that runs the few PTX instructions that the kernels use; shared memory is given by
    its 4-byte words."""

    def __init__(
        self, lane: int, shared: dict[int, int], symbols: dict[str, int], memory: dict[int, int]
    ):
        self.registers, self.shared, self.memory = {"%laneid": lane} | symbols, shared, memory

    def value(self, operand: str) -> int:
        return self.registers[operand] if operand in self.registers else int(operand, 0)

    def step(self, text: str) -> None:
        name, _, rest = text.partition(" ")
        if name.startswith("st.shared"):
            address, source = rest.split(",", 1)
            for number, word in enumerate(source.strip(" {}").split(",")):
                self.shared[self.value(address.strip("[] ")) + 4 * number] = self.value(
                    word.strip()
                )
            return
        target, *operands = (part.strip() for part in rest.split(","))
        if name.startswith(("ld.shared", "ld.global")):
            self.registers[target] = (self.shared if "shared" in name else self.memory)[
                self.value(operands[0].strip("[]"))
            ]
            return
        a, *others = (self.value(operand) for operand in operands)
        match name.split(".")[0]:
            case "mov":
                result = a
            case "and":
                result = a & others[0]
            case "add":
                result = a + others[0]
            case "mul":
                result = a * others[0]
            case "mad":
                result = a * others[0] + others[1]
            case "shl":
                result = a << others[0]
            case "shr":
                result = a >> others[0]
            case "bfe":
                result = a >> others[0] & (1 << others[1]) - 1
            case "setp":
                result = int(a < others[0])
            # bit i of the last operand: the result where the three inputs' bits spell i
            case "lop3":
                b, c, truth = others
                result = sum(
                    (truth >> ((a >> i & 1) << 2 | (b >> i & 1) << 1 | (c >> i & 1)) & 1) << i
                    for i in range(32)
                )
            # each nibble of the last operand picks one of 8 bytes; its top bit would repeat the
            # sign
            case "prmt":
                data = (a | others[0] << 32).to_bytes(8, "little")
                assert not others[1] & 0x8888 or name != "prmt.b32"
                result = sum(data[others[1] >> 4 * i & 7] << 8 * i for i in range(4))
            case _:
                raise AssertionError(f"unknown instruction {text}")
        self.registers[target] = result if "wide" in name or ".u64" in name else result & 0xFFFFFFFF

    def run(self, text: str) -> None:
        labels, program = {}, []
        for part in re.sub(r"\.(shared|reg) [^;]*;", "", text).split(";"):
            part = part.strip(" {}") if "st.shared.v4" not in part else part.strip()
            if label := re.match(r"(\w+): ", part):
                labels[label[1]] = len(program)
                part = part[label.end() :]
            program += [part] if part else []
        at = 0
        while at < len(program):
            if jump := re.match(r"@(\w+) bra (\w+)", program[at]):
                at = labels[jump[2]] if self.registers[jump[1]] else at + 1
                continue
            if not program[at].startswith("bar"):
                self.step(program[at])
            at += 1


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_lookups_in_ptx_give_both_values_of_every_byte(dtype):
    from prompt_recovery.engine.kernels import experts_decode as decode

    pairs = [word & 0xFFFFFFFF for word in decode.pair_table(dtype).tolist()]
    values = storage.lookup_tables(torch.device("cpu"))[1].to(dtype)
    for byte, pair in enumerate(pairs):
        halves = (
            torch.tensor([pair & 0xFFFF, pair >> 16], dtype=torch.int32).to(torch.int16).view(dtype)
        )
        assert torch.equal(halves, values[[byte >> 4, byte & 15]])
    symbols, shared, threads = {"nf4_levels": 1024, "nf4_pairs": 2048}, {}, 64
    memory = {4 * i: word for i, word in enumerate(pairs)} | {
        1 << 20 | 4 * i: 7 * i for i in range(256)
    }
    for thread in range(threads):
        each = Ptx(
            thread % 32,
            shared,
            symbols | {"$1": thread, "$2": 0, "$3": 1 << 20, "$4": threads},
            memory,
        )
        each.run(decode._FILL.value)
    assert len(shared) == 256 + 256 * 32
    for first in range(0, 256, 4):
        word = int.from_bytes(bytes(range(first, first + 4)), "little")
        for lane in (0, 13, 31):
            looked_up = Ptx(lane, shared, symbols | {"$4": word}, {})
            looked_up.run(decode._PAIRS_OF_WORD.value)
            for number in range(4):
                assert looked_up.registers[f"${number}"] == pairs[first + number]
        for number in range(4):
            level = Ptx(0, shared, symbols | {"$1": word, "$2": 8 * number}, {})
            level.run(decode._SHARED_LEVEL.value)
            assert level.registers["$0"] == 7 * (first + number)


if __name__ == "__main__":
    torch.manual_seed(0)
    found = (
        few_rows_differences()
        | kernels_differences()
        | step_differences()
        | whole_model_differences()
    )
    print(json.dumps(found | decode_differences()))
