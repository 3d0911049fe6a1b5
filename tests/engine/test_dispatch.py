"""Which kernels run where: what is asked for, what is refused and said, launch parameters at their
borders, sm_75."""

import os
import re
from types import SimpleNamespace

import pytest
import torch
from conftest import TINY

from prompt_recovery.engine import check, forward, loading, storage
from prompt_recovery.engine.kernels import dispatch, sm75
from prompt_recovery.engine.kernels.dispatch import Config, choose, tile_rows

CPU, GPU = torch.device("cpu"), torch.device("cuda", 0)
H100, T4 = 90, 75


@pytest.fixture(autouse=True)
def nothing_chosen(monkeypatch):
    """Nothing is chosen, failed or checked yet, and nothing is left for the tests behind."""
    monkeypatch.delenv(dispatch.VARIABLE, raising=False)
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    dispatch.forget()
    yield
    dispatch.forget()


@pytest.fixture
def gpu():
    """A card that is looked at and never used: no kernel is launched here."""
    pytest.importorskip("triton")
    dispatch.act_as(GPU, H100)
    return GPU


# --- the choice -----------------------------------------------------------------------------------


def nothing_is_chosen(monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    return dispatch.uses_triton(CPU)  # which a choice from before would not be


def test_an_unknown_word_is_refused_with_the_words_there_are(monkeypatch):
    with pytest.raises(ValueError, match="'cuda'.*triton, torch.*PROMPT_RECOVERY_KERNELS"):
        choose(CPU, "cuda")
    monkeypatch.setenv("PROMPT_RECOVERY_KERNELS", "Triton")
    with pytest.raises(ValueError, match="'Triton'.*triton, torch.*PROMPT_RECOVERY_KERNELS"):
        choose(CPU)
    monkeypatch.delenv("PROMPT_RECOVERY_KERNELS")
    assert nothing_is_chosen(monkeypatch)


def test_triton_is_refused_on_the_cpu_before_a_weight_is_read(monkeypatch):
    def read(*_, **__):
        pytest.fail("the weights were read")

    monkeypatch.setattr(loading.AutoModelForCausalLM, "from_pretrained", read)
    wrong = r"'triton' can't run on cpu: a CPU needs TRITON_INTERPRET=1.*'torch'"
    with pytest.raises(ValueError, match=wrong):
        loading.load_base(TINY, four_bit=True, kernels="triton")
    monkeypatch.setenv("PROMPT_RECOVERY_KERNELS", "triton")
    with pytest.raises(ValueError, match=wrong):
        loading.load_base(TINY, four_bit=True)
    with pytest.raises(ValueError, match="'torch' is for 4-bit experts.*None"):
        loading.load_base(TINY, four_bit=False, kernels="torch")
    assert nothing_is_chosen(monkeypatch)


def test_the_argument_beats_the_environment(monkeypatch, gpu):
    monkeypatch.setenv("PROMPT_RECOVERY_KERNELS", "triton")
    assert choose(CPU, "torch") == "torch" and not dispatch.uses_triton(CPU)
    assert choose(gpu) == "triton" and choose(gpu, "torch") == "torch"
    monkeypatch.setenv("PROMPT_RECOVERY_KERNELS", "torch")
    assert choose(gpu) == "torch" and choose(gpu, "triton") == "triton"
    assert dispatch.uses_triton(gpu)


def test_without_a_word_triton_runs_where_it_can(monkeypatch, gpu):
    assert choose(gpu) == "triton" and choose(CPU) == "torch"
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert choose(CPU) == "triton"
    monkeypatch.setattr(torch.version, "hip", "6.0")
    assert choose(gpu) == "torch"


def test_the_choice_is_said_once_and_again_when_it_changes(monkeypatch, capsys, gpu):
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    for device, how in ((CPU, " in its interpreter"), (gpu, " in its interpreter")):
        choose(device)
        assert capsys.readouterr().out == f"kernels on {device}: triton{how}\n"
        choose(device)
        choose(device, "triton")
        assert capsys.readouterr().out == ""
    choose(gpu, "torch")
    assert capsys.readouterr().out.endswith("torch, which is right and slow (as asked for)\n")
    choose(gpu, "torch")
    assert capsys.readouterr().out == ""
    choose(gpu)
    assert capsys.readouterr().out.count("\n") == 1


def test_an_old_card_computes_by_torch_and_says_why(capsys, gpu):
    dispatch.act_as(gpu, 70)
    with pytest.raises(ValueError, match="compute capability 7.0 is below 7.5"):
        choose(gpu, "triton")
    assert choose(gpu) == "torch"
    said = capsys.readouterr().out
    assert "slow (compute capability 7.0 is below 7.5)" in said and said.count("\n") == 1


def test_a_t4_needs_the_lowering(monkeypatch, capsys, gpu):
    dispatch.act_as(gpu, T4)
    monkeypatch.setattr(sm75, "install", lambda: "no hook")
    assert choose(gpu) == "torch" and "slow (no hook)" in capsys.readouterr().out
    monkeypatch.setattr(sm75, "install", lambda: "")
    assert choose(gpu) == "triton" and "lowered to sm_75" in capsys.readouterr().out
    assert dispatch.launch_options(gpu) == {"arch": "sm80", "num_stages": 1}
    dispatch.act_as(gpu, H100)
    assert dispatch.launch_options(gpu) == {}


def test_what_was_refused_stays_refused(capsys, gpu):
    choose(gpu)
    capsys.readouterr()
    dispatch.refuse(gpu, "off by 2.0e+00")
    said = capsys.readouterr().out
    assert f"on {gpu}: torch" in said and "off by 2.0e+00" in said and said.count("\n") == 1
    for asked in (None, "triton", "torch"):
        assert choose(gpu, asked) == "torch" and not dispatch.uses_triton(gpu)
    assert dispatch.training_kernels(gpu) is None and capsys.readouterr().out == ""
    with pytest.raises(ValueError, match="choose one of"):
        choose(gpu, "cuda")


def test_a_choice_for_a_while_leaves_the_one_before(gpu):
    choose(gpu)
    with pytest.raises(KeyError), dispatch.using(gpu, "torch"):
        assert not dispatch.uses_triton(gpu)
        raise KeyError
    assert dispatch.uses_triton(gpu)


# --- the check of the kernels ---------------------------------------------------------------------


@pytest.fixture
def seeming(monkeypatch):
    """A 4-bit model on the CPU, where Triton seems to run: few(out) makes of the right output for
    few rows that of its kernel, dequantised(out) of the weights those that its kernel writes,
    matrix(out) of the product with one matrix that of its kernel."""
    pytest.importorskip("triton")
    from prompt_recovery.engine.kernels import experts_decode

    model = loading.load_base(TINY, torch.float16, four_bit=True, kernels="torch")
    calls = []

    def install(few=None, dequantised=None, matrix=lambda out: out):
        def few_rows(x, index, chosen, experts):
            if few is None:
                return None
            calls.append(len(x))
            with dispatch.using(CPU, "torch"):
                return few(forward.experts_forward(experts, x, index, chosen))

        def kernels(device):
            if dequantised is None or not dispatch.uses_triton(device):
                return None
            return SimpleNamespace(dequantise=dequantise)

        def dequantise(packed, absmax, nested, offset, code, nf4, out, first):
            calls.append("dequantise")
            with dispatch.using(CPU, "torch"):
                pieces = dict(packed=packed, absmax=absmax, nested=nested.view(torch.int32))
                pieces["offset"] = offset.view(torch.int32)
                storage.dequantiser(pieces, out.dtype, out)(first)
            dequantised(out)

        def linear(x, pieces):
            with dispatch.using(CPU, "torch"):
                return matrix(torch.nn.functional.linear(x, storage.dequantise(pieces, x.dtype)[0]))

        monkeypatch.setattr(experts_decode, "linear", linear)
        monkeypatch.setattr(experts_decode, "few_rows", few_rows)
        monkeypatch.setattr(forward, "training_kernels", lambda device: None)
        monkeypatch.setattr(storage, "training_kernels", kernels)
        return model, calls

    with dispatch.using(CPU, "triton"):
        yield install


def test_right_kernels_pass_their_check_which_is_made_once(seeming, capsys):
    rounded = 1 + torch.finfo(torch.float16).eps
    model, calls = seeming(lambda out: out * rounded, lambda out: out)
    capsys.readouterr()
    check.check_kernels(model)
    assert 5 in calls and "dequantise" in calls
    assert dispatch.uses_triton(CPU)
    calls.clear()
    check.check_kernels(model)
    assert calls == [] and capsys.readouterr().out == ""


def fails(out):
    raise RuntimeError("ptxas fatal\n  a page of text")


@pytest.mark.parametrize(
    ("wrong", "why"),
    [
        (dict(few=lambda out: out * 1.01), r"off by 1\.0e-02, at most 3\.9e-03"),
        (dict(few=lambda out: out * float("nan")), "off by nan, at most"),
        (dict(few=fails), r"RuntimeError: ptxas fatal\)"),
        (
            dict(few=lambda out: out, matrix=lambda out: out * 1.01),
            r"off by 1\.0e-02, at most 3\.9e-03",
        ),
        (dict(few=lambda out: out, matrix=fails), r"RuntimeError: ptxas fatal\)"),
        (dict(dequantised=lambda out: out.mul_(1.01)), r"off by \S+, at most"),
        (dict(dequantised=lambda out: out[-1].zero_()), r"off by \S+, at most"),
        (dict(dequantised=fails), r"RuntimeError: ptxas fatal\)"),
    ],
)
def test_wrong_kernels_are_refused(seeming, capsys, monkeypatch, wrong, why):
    model, calls = seeming(**wrong)
    capsys.readouterr()
    check.check_kernels(model)
    said = capsys.readouterr().out
    assert calls and said.count("\n") == 1 and "triton's failed their check" in said
    assert re.search(why, said), said
    assert not dispatch.uses_triton(CPU)
    # the model computes, with nothing of what the wrong kernels wrote
    found = model(torch.tensor([[1, 300, 400]])).logits
    expected = loading.load_base(TINY, torch.float16, four_bit=True)(
        torch.tensor([[1, 300, 400]])
    ).logits
    assert torch.equal(found, expected)
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert choose(CPU, "triton") == "torch"


@pytest.mark.parametrize(
    ("attend", "why"),
    [
        (lambda query: query * 0, r"off by 1\.0e\+00"),
        (lambda query: query * float("nan"), "off by nan"),
        (fails, r"RuntimeError: ptxas fatal\)"),
    ],
)
def test_wrong_attention_is_refused_where_it_is_ours(seeming, capsys, monkeypatch, attend, why):
    model, _ = seeming(lambda out: out, lambda out: out)
    from prompt_recovery.engine.kernels import decode_step

    monkeypatch.setattr(decode_step, "attend", lambda query, *_: attend(query))
    check.check_kernels(model)  # on a card that is not lowered
    assert dispatch.uses_triton(CPU)
    dispatch.forget()
    dispatch.act_as(CPU, T4)
    with dispatch.using(CPU, "triton"):
        capsys.readouterr()
        check.check_kernels(model)
        assert not dispatch.uses_triton(CPU) and re.search(why, capsys.readouterr().out)


def test_of_an_fp32_base_no_kernel_of_a_decode_step_is_checked(seeming, monkeypatch):
    """It computes by none of them, and their products in fp32 failed."""
    model, calls = seeming(fails, lambda out: out, fails)
    from prompt_recovery.engine.kernels import decode_step

    monkeypatch.setattr(decode_step, "attend", fails)
    dispatch.act_as(CPU, T4)
    check.check_kernels(torch.nn.Module.float(model))
    assert set(calls) == {"dequantise"} and dispatch.uses_triton(CPU)


# --- launch parameters ----------------------------------------------------------------------------


def project(monkeypatch, blocks, warps=4, device="meta"):
    """A product with one matrix, of so many blocks an iteration, and the options of the launches
    that it makes, which compute nothing."""
    pytest.importorskip("triton")
    from triton import JITFunction

    from prompt_recovery.engine.kernels import experts_decode

    device, launches = torch.device(device), []
    dispatch.act_as(device, T4)
    monkeypatch.setattr(dispatch, "configs", lambda *_: [Config(16, warps, blocks)] * 2)
    monkeypatch.setattr(
        JITFunction, "run", lambda _, x, *__, **options: launches.append(options | {"x": x})
    )
    pieces = {piece: torch.empty(0, device=device) for piece in storage.PIECES}
    pieces["packed"] = torch.empty(1, 64, 256, device=device)
    x = torch.ones(513, device=device, dtype=torch.float16)[1:].view(1, 512)
    return launches, lambda: experts_decode.linear(x, pieces)


@pytest.mark.parametrize("blocks", [8, 3, 0])
def test_blocks_that_are_no_word_are_refused_by_name(monkeypatch, blocks):
    launches, multiply = project(monkeypatch, blocks)
    with pytest.raises(ValueError, match=rf"Config\.blocks is {blocks}; .*1, 2 or 4"):
        multiply()
    assert launches == []


def test_x_that_begins_between_sixteen_bytes_is_copied(monkeypatch):
    launches, multiply = project(monkeypatch, 4, device="cpu")
    multiply()
    x = launches[0]["x"]
    assert x.data_ptr() % 16 == 0 and x.shape == (1, 512) and x.eq(1).all()


def test_a_gate_s_sums_are_not_split(monkeypatch):
    pytest.importorskip("triton")
    from triton import JITFunction

    from prompt_recovery.engine.kernels import experts_decode

    monkeypatch.setattr(JITFunction, "run", lambda *_, **__: None)
    experts = SimpleNamespace(gate_up_proj_packed=torch.empty(2, 128, 32))
    for name in storage.PROJECTIONS:
        for piece in storage.PIECES:
            vars(experts).setdefault(f"{name}_{piece}", torch.empty(2, 64, 32))
    x, index, split = torch.ones(1, 64).half(), torch.zeros(1, 2).int(), Config(16, 4, 1, split=2)
    with pytest.raises(ValueError, match=r"Config\.split is 2; .*take 1"):
        experts_decode.few_rows(x, index, torch.ones(1, 2), experts, (split, split))


def test_more_warps_than_fill_the_tables_are_refused(monkeypatch):
    launches, multiply = project(monkeypatch, 4, warps=16)
    with pytest.raises(ValueError, match=r"Config\.warps is 16; .*at most 8"):
        multiply()
    assert launches == []


@pytest.mark.parametrize("blocks", [1, 2, 4])
def test_blocks_that_are_a_word_are_launched(monkeypatch, blocks):
    launches, multiply = project(monkeypatch, blocks)
    multiply()
    assert launches[0]["BLOCKS"] == blocks


def test_tiles_have_8_16_or_32_rows_and_on_a_lowered_card_never_32():
    counts = range(1, dispatch.FEW_TOKENS + 1)
    rows = [tile_rows(False, tokens) for tokens in counts]
    lowered = [tile_rows(True, tokens) for tokens in counts]
    assert set(rows) == {8, 16, 32} and set(lowered) == {8, 16}
    assert rows == sorted(rows) and lowered == sorted(lowered)
    for chosen in (dispatch.configs(lowered, m) for lowered in (True, False) for m in (8, 16, 32)):
        assert all(config.blocks in (1, 2, 4) for config in chosen)


# --- sm_75 ----------------------------------------------------------------------------------------

# PTX ISA: of m16n8k16, a0 and a1 hold columns 0 to 7 of the rows 0 to 7 and 8 to 15, a2 and a3
# columns 8 to 15 likewise; b0 holds rows 0 to 7, b1 rows 8 to 15. m16n8k8 takes two registers of a
# and one of b.
WHOLE = """\
\tld.shared.b32 %r5, [%r9];
\tmma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 { %f1, %f2, %f3, %f4 }, { %r1, %r2, %r3, %r4 }, \
{ %r5, %r6 }, { %f5, %f6, %f7, %f8 };
\tadd.f32 %f9, %f1, %f2;
"""
HALVES = """\
\tld.shared.b32 %r5, [%r9];
\tmma.sync.aligned.m16n8k8.row.col.f32.f16.f16.f32 {%f1, %f2, %f3, %f4}, {%r1, %r2}, {%r5}, {%f5, %f6, %f7, %f8};
\tmma.sync.aligned.m16n8k8.row.col.f32.f16.f16.f32 {%f1, %f2, %f3, %f4}, {%r3, %r4}, {%r6}, {%f1, %f2, %f3, %f4};
\tadd.f32 %f9, %f1, %f2;
"""


def test_the_instruction_that_sm75_lacks_becomes_two():
    assert sm75.lower(WHOLE) == HALVES
    assert sm75.lower(WHOLE * 3) == HALVES * 3
    half = WHOLE.replace(".f32.f16.f16.f32", ".f16.f16.f16.f16")  # sums in fp16
    assert sm75.lower(half) == HALVES.replace(".f32.f16.f16.f32", ".f16.f16.f16.f16")
    apart = WHOLE.replace("{ %r1, %r2, %r3, %r4 }, ", "\n\t\t{%r1,%r2,\n%r3,%r4},\n")
    assert sm75.lower(apart) == HALVES


def test_other_text_is_left_alone():
    for text in (
        "",
        HALVES,
        WHOLE.replace(".f16.f16", ".bf16.bf16"),
        WHOLE.replace("m16n8k16.row.col.f32.f16.f16.f32", "m16n8k32.row.col.s32.s8.s8.s32"),
        "// mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 of a comment\n",
    ):
        assert sm75.lower(text) == text


@pytest.fixture
def knobs():
    """Triton's settings, which are as before afterwards."""
    knobs = pytest.importorskip("triton.knobs")
    with knobs.runtime.scope(), knobs.cache.scope():
        knobs.runtime.add_stages_inspection_hook = None
        yield knobs


def test_a_triton_that_can_not_be_hooked_is_said_and_left_alone(knobs, monkeypatch):
    from triton.backends.nvidia.compiler import CUDABackend

    folder = knobs.cache.dir
    with monkeypatch.context() as patched:
        patched.setattr(knobs, "runtime", SimpleNamespace())
        assert "can't be hooked" in sm75.install() and not vars(knobs.runtime)
    with monkeypatch.context() as patched:
        patched.setattr(CUDABackend, "make_ptx", lambda self, src, metadata, opt: src)
        why = sm75.install()
    assert "can't be hooked" in why and "sm_75" in why
    assert knobs.runtime.add_stages_inspection_hook is None and knobs.cache.dir == folder


def test_hooking_twice_is_hooking_once(knobs):
    folder = knobs.cache.dir
    assert sm75.install() == ""
    hook, moved = knobs.runtime.add_stages_inspection_hook, knobs.cache.dir
    assert hook is not None and moved != folder
    assert os.path.dirname(moved) == str(folder).rstrip("/")
    assert sm75.install() == ""
    assert knobs.runtime.add_stages_inspection_hook is hook and knobs.cache.dir == moved


class Backend:
    """A backend of Triton's for a card, whose PTX is always WHOLE."""

    def __init__(self, capability):
        self.target, self.made = SimpleNamespace(arch=capability), []

    def make_ptx(self, src, metadata, options, capability):
        self.made.append((src, metadata, options, capability))
        return WHOLE


def test_only_kernels_for_one_card_on_another_are_lowered(knobs):
    assert sm75.install() == ""
    hook = knobs.runtime.add_stages_inspection_hook
    for arch, capability in (("sm80", 80), ("sm75", 75), ("sm90", 90), ("sm89", 89)):
        stages = {"ptx": "its own"}
        hook(Backend(capability), stages, SimpleNamespace(arch=arch), "triton", capability)
        assert stages == {"ptx": "its own"}
    backend, options = Backend(75), SimpleNamespace(arch="sm80")
    stages = {"ptx": "its own", "cubin": "left"}
    hook(backend, stages, options, "triton", 80)
    assert stages["cubin"] == "left" and stages["ptx"]("source", "metadata") == HALVES
    assert backend.made == [("source", "metadata", options, 75)]


def test_a_hook_that_was_there_before_is_called_first(knobs):
    calls = []

    def before(*arguments):
        calls.append(arguments)
        arguments[1]["ptx"] = "of the hook before"

    knobs.runtime.add_stages_inspection_hook = before
    assert sm75.install() == ""
    hook = knobs.runtime.add_stages_inspection_hook
    assert hook is not before
    for arch, capability in (("sm90", 90), ("sm80", 75)):
        backend, stages, options = Backend(capability), {}, SimpleNamespace(arch=arch)
        hook(backend, stages, options, "triton", capability)
        assert calls.pop() == (backend, stages, options, "triton", capability) and not calls
        lowered = stages["ptx"] != "of the hook before"
        assert lowered == (arch == "sm80")
