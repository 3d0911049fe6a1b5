"""4-bit experts by their effects: what a folder becomes, what is refused, and that outputs and
gradients are right."""

import copy
import gc
import json
import re
import shutil

import bitsandbytes as bnb
import bitsandbytes.functional as bnb_functional
import pytest
import torch
from conftest import TINY
from peft import PeftModel
from safetensors.torch import load_file, save_file
from tiny_bases import COMMON, MIXTRAL, OTHERS, write
from transformers import (
    AutoModelForCausalLM,
    BitsAndBytesConfig,
    GptOssConfig,
    LlamaConfig,
    MixtralConfig,
)
from transformers.models.mixtral.modeling_mixtral import MixtralExperts

from prompt_recovery import adapter
from prompt_recovery.engine import (
    ModelError,
    Nf4Error,
    checkpointing,
    forward,
    loading,
    quantiser,
    storage,
)
from prompt_recovery.engine.summary import summary
from prompt_recovery.recipe import Recipe

IDS = torch.randint(3, 320, (2, 24), generator=torch.Generator().manual_seed(0))
BOUND = {torch.bfloat16: 1e-2, torch.float16: 2e-3, torch.float32: 1e-5}


def checkpoint(folder):
    return {
        name: tensor
        for path in folder.glob("*.safetensors")
        for name, tensor in load_file(path).items()
    }


def rewrite(folder, tensors):
    """Put these tensors into a folder in place of its own."""
    for path in folder.glob("model*.safetensors*"):
        path.unlink()
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


@pytest.fixture(scope="module")
def hub(tmp_path_factory):
    return write(tmp_path_factory.mktemp("hub") / "mixtral", MixtralConfig(**MIXTRAL))


@pytest.fixture(scope="module")
def saved(hub, tmp_path_factory):
    base = loading.load_base(hub, torch.bfloat16, four_bit=True)
    return loading.save_quantised(base, hub, tmp_path_factory.mktemp("saved") / "mixtral-nf4")


def logits(base, ids=IDS):
    with torch.inference_mode():
        return base(ids).logits.float()


def distance(found, expected):
    return ((found.float() - expected.float()).norm() / expected.float().norm()).item()


# the 16 values of QLoRA's appendix E
NF4 = torch.tensor(
    [
        -1.0,
        -0.6961928009986877,
        -0.5250730514526367,
        -0.39491748809814453,
        -0.28444138169288635,
        -0.18477343022823334,
        -0.09105003625154495,
        0.0,
        0.07958029955625534,
        0.16093020141124725,
        0.24611230194568634,
        0.33791524171829224,
        0.44070982933044434,
        0.5626170039176941,
        0.7229568362236023,
        1.0,
    ]
)


def by_bitsandbytes(matrix):
    """There and back again: bitsandbytes' 4-bit bytes and 8-bit scales, and the values by the
    formula."""
    packed, state = bnb_functional.quantize_4bit(
        matrix.contiguous(), blocksize=64, compress_statistics=True, quant_type="nf4"
    )
    absmax = (
        state.state2.code[state.absmax.long()]
        * state.state2.absmax.repeat_interleave(256)[: len(state.absmax)]
    )
    nibbles = torch.stack((packed.flatten() >> 4, packed.flatten() & 15), -1).long()
    values = NF4[nibbles].view(-1, 64) * (absmax + state.offset)[:, None]
    return packed, state.absmax, values.view(matrix.shape).to(matrix.dtype)


def dequantised(folder):
    """The model in fp32, computed by transformers, with every matrix that becomes 4-bit put through
    bitsandbytes."""
    whole = AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, experts_implementation="eager"
    )
    with torch.no_grad():
        for key, parameter in whole.named_parameters():
            if ".experts." in key:
                parameter.copy_(torch.stack([by_bitsandbytes(matrix)[2] for matrix in parameter]))
            elif key.endswith("_proj.weight"):
                parameter.copy_(by_bitsandbytes(parameter)[2])
    return whole


# --- loading --------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_hub_folder_becomes_what_bitsandbytes_makes_of_every_matrix(dtype, tmp_path):
    folder = write(tmp_path / "m", MixtralConfig(**MIXTRAL), dtype)
    tensors = checkpoint(folder)
    assert len(list(folder.glob("*.safetensors"))) > 3
    assert tensors["model.layers.2.block_sparse_moe.experts.3.w2.weight"].dtype == dtype
    base = loading.load_base(folder, dtype, four_bit=True)
    for number, layer in enumerate(base.model.layers):
        for expert in range(4):
            w1, w2, w3 = (
                tensors.pop(f"model.layers.{number}.block_sparse_moe.experts.{expert}.w{n}.weight")
                for n in (1, 2, 3)
            )
            for projection, matrix in (("gate_up_proj", torch.cat((w1, w3))), ("down_proj", w2)):
                packed, absmax, values = by_bitsandbytes(matrix)
                pieces = {
                    piece: getattr(layer.mlp.experts, f"{projection}_{piece}")
                    for piece in storage.PIECES
                }
                assert torch.equal(pieces["packed"][expert].flatten(), packed.flatten())
                assert torch.equal(pieces["absmax"][expert], absmax)
                assert torch.equal(storage.dequantise(pieces, dtype)[expert], values)
                assert torch.equal(
                    storage.expert_weights(layer.mlp.experts, dtype)(projection, expert), values
                )
        for name in Recipe.target_modules:
            weight = getattr(layer.self_attn, name).weight
            values = bnb_functional.dequantize_4bit(weight.data, weight.quant_state)
            assert weight.quant_state.nested and weight.quant_state.blocksize == 64
            assert torch.equal(
                values,
                by_bitsandbytes(tensors.pop(f"model.layers.{number}.self_attn.{name}.weight"))[2],
            )
    state = base.state_dict()
    assert {name.rsplit(".", 2)[-2] for name in tensors} == {
        "gate", "input_layernorm", "post_attention_layernorm", "norm", "embed_tokens", "lm_head",
    }  # fmt: skip
    for name, tensor in tensors.items():  # what is left stays as it was
        kept = state[name.replace("block_sparse_moe", "mlp")]
        assert kept.dtype == dtype and torch.equal(kept, tensor)
    assert not any(parameter.requires_grad for parameter in base.parameters()) and not base.training


def test_the_dtype_asked_for_does_not_change_the_4_bit_values(hub):
    states = [
        loading.load_base(hub, dtype, four_bit=True).state_dict()
        for dtype in (torch.bfloat16, torch.float32)
    ]
    assert states[0].keys() == states[1].keys()
    packed = [name for name in states[0] if "experts." in name]
    assert len(packed) == 3 * 2 * 4
    assert all(torch.equal(states[0][name], states[1][name]) for name in packed)
    assert states[1]["lm_head.weight"].dtype == torch.float32


def test_casting_the_model_leaves_the_4_bit_values(hub):
    base = loading.load_base(hub, torch.bfloat16, four_bit=True)
    before = {
        name: value.clone() for name, value in base.model.layers[0].mlp.experts.state_dict().items()
    }
    base.to(torch.float16)
    assert all(
        torch.equal(value, before[k])
        for k, value in base.model.layers[0].mlp.experts.state_dict().items()
    )
    assert base.lm_head.weight.dtype == torch.float16


def test_one_layer_at_a_time_is_held_in_16_bit_while_loading(tmp_path, monkeypatch):
    """What is alive whenever a projection is quantised, whatever the number of layers."""
    peaks = {}
    for layers in (1, 3):
        folder = write(
            tmp_path / str(layers), MixtralConfig(**MIXTRAL | dict(num_hidden_layers=layers))
        )
        seen = []

        def watched(weight, device, seen=seen):
            pieces = storage.quantise(weight, device)
            alive = [
                t
                for t in gc.get_objects()
                if type(t) in (torch.Tensor, torch.nn.Parameter) and not t.is_meta
            ]
            # experts' matrices: [rows, columns] as read, [experts, rows, columns] merged
            matrices = {
                t.untyped_storage().data_ptr(): t
                for t in alive
                if t.dtype == torch.bfloat16 and t.dim() > 1
            }
            shapes = {(96, 128), (128, 96), (192, 128)}
            seen.append(
                sum(
                    t.untyped_storage().nbytes()
                    for t in matrices.values()
                    if tuple(t.shape[-2:]) in shapes
                )
            )
            return pieces

        monkeypatch.setattr(quantiser, "quantise", watched)
        loading.load_base(folder, torch.bfloat16, four_bit=True)
        assert len(seen) == 2 * layers
        peaks[layers] = max(seen)
    gate_up = 4 * 192 * 128 * 2
    # a layer's experts are gate_up and half as much for down
    assert peaks[1] == peaks[3] == gate_up


def test_experts_put_together_by_the_cpu_are_the_same(hub, monkeypatch):
    """As on small GPUs: from the host's memory, a matrix at a time to the device that the map
    names."""
    config = quantiser.Nf4Config(merge_on_cpu=True)
    quantiser.register()
    places = []
    quantise = quantiser.quantise
    monkeypatch.setattr(
        quantiser,
        "quantise",
        lambda weight, device: places.append((weight.device, device)) or quantise(weight, device),
    )
    forced = []
    update = quantiser.Nf4Quantizer.update_weight_conversions

    def noted(self, *args):
        found = update(self, *args)
        forced.extend(getattr(conversion, "force_cpu", None) for conversion in found)
        return found

    monkeypatch.setattr(quantiser.Nf4Quantizer, "update_weight_conversions", noted)
    model = AutoModelForCausalLM.from_pretrained(
        hub, dtype=torch.bfloat16, device_map={"": "cpu"}, quantization_config=config
    )
    assert forced.count(True) == 2 and False not in forced  # gate and up; down
    assert set(places) == {(torch.device("cpu"), torch.device("cpu"))}
    expected = loading.load_base(hub, torch.bfloat16, four_bit=True).state_dict()
    found = model.state_dict()
    assert set(found) == set(expected) and all(
        torch.equal(found[name], expected[name]) for name in expected
    )
    assert "merge_on_cpu" not in model.config.quantization_config.to_dict()


def test_summary_adds_up(hub, capsys):
    base = loading.load_base(hub, torch.bfloat16, four_bit=True)
    printed = capsys.readouterr().out
    whole = AutoModelForCausalLM.from_config(MixtralConfig(**MIXTRAL))
    parts = {(part.part, part.precision): part for part in summary(base)}
    assert {name: precision for name, precision in parts} == {
        "experts": "nf4",
        "attention": "nf4",
        "router": "bfloat16",
        "norms": "bfloat16",
        "embeddings": "bfloat16",
        "lm_head": "bfloat16",
    }
    assert sum(part.parameters for part in parts.values()) == whole.num_parameters()
    assert parts["experts", "nf4"].parameters == 3 * 4 * 3 * 96 * 128
    # 4 bits a weight, 8 a block of 64, 32 for each block of 256 blocks and each expert's offset
    blocks, nested = 3 * 4 * (384 + 192), 3 * 4 * (2 + 1)
    assert (
        parts["experts", "nf4"].gib * 2**30
        == 3 * 4 * 3 * 96 * 128 / 2 + blocks + 4 * nested + 4 * 3 * 4 * 2
    )
    assert parts["lm_head", "bfloat16"].gib * 2**30 == 320 * 128 * 2
    assert "experts" in printed and "together" in printed and "nf4" in printed
    lora = adapter.add_lora(base, base="m", r=4)
    added = {(part.part, part.precision): part for part in summary(lora)}
    assert added.pop(("adapter", "float32")).parameters == lora.get_nb_trainable_parameters()[0]
    assert added == parts


def test_what_bitsandbytes_alone_leaves_in_16_bit_is_a_hard_error(hub):
    """The trap: transformers' own 4-bit loading leaves experts in 16 bit without a word."""
    stock = AutoModelForCausalLM.from_pretrained(
        hub, dtype=torch.bfloat16,
        quantization_config=BitsAndBytesConfig(
            load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True
        ),
    )  # fmt: skip
    assert {part.precision for part in summary(stock) if part.part == "experts"} == {"bfloat16"}
    with pytest.raises(Nf4Error, match=r"layers\.0\.mlp\.experts\.gate_up_proj.*four_bit=False"):
        quantiser.check_quantised(stock)


def test_a_layer_left_in_16_bit_is_a_hard_error(hub, monkeypatch):
    """A later version of transformers might skip more than the head and the routers."""
    stock = quantiser.Nf4Quantizer.get_modules_to_not_convert
    monkeypatch.setattr(
        quantiser.Nf4Quantizer,
        "get_modules_to_not_convert",
        staticmethod(lambda *a, **k: [*stock(*a, **k), "o_proj"]),
    )
    with pytest.raises(
        Nf4Error, match=r"layers\.0\.self_attn\.o_proj\.weight, .*layers\.2\.self_attn\.o_proj"
    ):
        loading.load_base(hub, torch.bfloat16, four_bit=True)


@pytest.mark.parametrize(
    "missing",
    [
        "layers.1.block_sparse_moe.experts.3.w1",
        "layers.1.block_sparse_moe.experts.3.",
        "layers.1.block_sparse_moe.experts",
        "layers.1.self_attn.q_proj",
        "layers.2.input_layernorm",
    ],
)
def test_a_folder_that_lacks_tensors_is_refused(hub, tmp_path, missing):
    """transformers fills them with random numbers and goes on."""
    folder = shutil.copytree(hub, tmp_path / "m")
    rewrite(
        folder, {name: tensor for name, tensor in checkpoint(hub).items() if missing not in name}
    )
    for four_bit in (True, False):
        with pytest.raises(
            (ModelError, Nf4Error, RuntimeError), match="lacks|conversion|mismatched"
        ):
            loading.load_base(folder, torch.bfloat16, four_bit=four_bit)


# --- saving and loading again ---------------------------------------------------------------------


def test_a_saved_folder_gives_the_same_logits_and_is_not_quantised_again(hub, saved, monkeypatch):
    expected = logits(loading.load_base(hub, torch.bfloat16, four_bit=True))
    assert expected.std() > 0.1

    def refuse(*_, **__):
        raise AssertionError("quantised again")

    monkeypatch.setattr(quantiser, "quantise", refuse)
    monkeypatch.setattr(bnb_functional, "quantize_4bit", refuse)
    monkeypatch.setattr(bnb_functional, "quantize_blockwise", refuse)
    again = loading.load_base(saved, torch.bfloat16, four_bit=True)
    assert torch.equal(logits(again), expected)
    assert again.config._experts_implementation == quantiser.METHOD
    assert loading.base_id(saved) == "mixtral"  # of the model it was made from
    with pytest.raises(RuntimeError, match="conversion"):  # the check above can fail
        loading.load_base(hub, torch.bfloat16, four_bit=True)


def test_a_saved_folder_is_small_and_can_be_saved_once_more(saved, hub, tmp_path):
    again = loading.save_quantised(
        loading.load_base(saved, torch.bfloat16, four_bit=True), saved, tmp_path / "twice"
    )
    first, second = checkpoint(saved), checkpoint(again)
    assert first.keys() == second.keys() and all(
        torch.equal(first[name], second[name]) for name in first
    )
    found = summary(loading.load_base(saved, torch.bfloat16, four_bit=True))
    assert found == summary(loading.load_base(hub, torch.bfloat16, four_bit=True))
    assert (again / "config.json").is_file() and not list(tmp_path.glob("*.partial"))


def test_tokenizer_files_come_along(tmp_path):
    folder = loading.save_quantised(loading.load_base(TINY, four_bit=True), TINY, tmp_path / "q")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        assert (folder / name).read_bytes() == (TINY / name).read_bytes()


def edit_config(folder, **quantisation):
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] = quantisation
    (folder / "config.json").write_text(json.dumps(config))


@pytest.mark.parametrize(
    "quantisation",
    [
        # transformers 4.57's
        dict(quant_method="bitsandbytes", load_in_4bit=True, bnb_4bit_quant_type="nf4"),
        dict(_load_in_4bit=True, load_in_4bit=True),
        dict(quant_method="gptq", bits=4),
        dict(quant_method=quantiser.METHOD, layout="nf4-per-expert-0"),
        dict(quant_method=quantiser.METHOD),
    ],
)
@pytest.mark.parametrize("four_bit", [True, False, None])
def test_another_4_bit_layout_is_refused_with_the_remedy(hub, tmp_path, quantisation, four_bit):
    folder = shutil.copytree(hub, tmp_path / "m")
    edit_config(folder, **quantisation)
    with pytest.raises(
        Nf4Error, match=r"quantised already.*[Gg]ive the folder of the 16-bit model"
    ):
        loading.load_base(folder, four_bit=four_bit)


def test_4_bit_folders_and_16_bit_models_are_not_mixed_up(hub, saved, tmp_path):
    with pytest.raises(ModelError, match=r"holds a 4-bit model.*four_bit=True"):
        loading.load_base(saved, four_bit=False)
    assert quantiser.check_folder(saved) and not quantiser.check_folder(hub)
    quantised = loading.load_base(saved, torch.bfloat16, four_bit=True)
    (tmp_path / "there").mkdir()
    with pytest.raises(ModelError, match="there already"):
        loading.save_quantised(quantised, saved, tmp_path / "there")
    with pytest.raises(Nf4Error):
        loading.save_quantised(loading.load_base(hub, four_bit=False), hub, tmp_path / "new")
    assert [path.name for path in tmp_path.iterdir()] == ["there"]


def test_a_damaged_4_bit_folder_is_refused(saved, tmp_path):
    folder = shutil.copytree(saved, tmp_path / "q")
    rewrite(
        folder,
        {
            name: t
            for name, t in checkpoint(saved).items()
            if not name.endswith("1.mlp.experts.down_proj_packed")
        },
    )
    with pytest.raises((ModelError, Nf4Error), match=r"layers\.1\.mlp\.experts\.down_proj_packed"):
        loading.load_base(folder, torch.bfloat16, four_bit=True)


def test_answers_leave_the_attention_weights_as_they_are(hub, tmp_path, monkeypatch):
    """On a CPU with AVX-512 BF16 bitsandbytes repacks a linear layer's weights the first time it
    answers."""
    monkeypatch.setattr(bnb.nn.modules, "has_avx512bf16", lambda: True)
    base = loading.load_base(hub, torch.bfloat16, four_bit=True)
    before = {name: value.clone() for name, value in base.state_dict().items()}
    logits(base)
    assert all(torch.equal(value, before[name]) for name, value in base.state_dict().items())
    loading.save_quantised(base, hub, tmp_path / "q")


# --- other architectures --------------------------------------------------------------------------


@pytest.mark.parametrize("name", OTHERS)
def test_other_moe_and_dense_models(name, tmp_path):
    folder = write(tmp_path / name, OTHERS[name])
    base = loading.load_base(folder, torch.float32, four_bit=True)
    sixteen = dequantised(folder)
    parts = {(part.part, part.precision): part.parameters for part in summary(base)}
    dense = name in ("llama", "mistral")
    assert ("experts", "nf4") in parts or dense
    assert ("experts", "float32") not in parts and ("other layers", "float32") not in parts
    assert sum(parts.values()) == sixteen.num_parameters()
    assert distance(logits(base), logits(sixteen)) < 1e-4
    again = loading.load_base(
        loading.save_quantised(base, folder, tmp_path / "q"), torch.float32, four_bit=True
    )
    assert torch.equal(logits(again), logits(base))
    # gradients reach an adapter below the experts
    lora = adapter.add_lora(again, base="m", r=4, dropout=0.0)
    lora(IDS, labels=IDS).loss.backward()
    assert all(
        p.grad is not None and p.grad.isfinite().all() for p in lora.parameters() if p.requires_grad
    )


def test_experts_of_another_form_are_refused_before_they_load(tmp_path):
    config = GptOssConfig(
        **COMMON, intermediate_size=64, num_local_experts=4, num_experts_per_tok=2, head_dim=32
    )
    with pytest.raises(ModelError, match="model_type 'gpt_oss', with which nothing here is tested"):
        loading.load_base(write(tmp_path / "oss", config), four_bit=True)
    with torch.device("meta"):
        experts = AutoModelForCausalLM.from_config(config).model.layers[0].mlp.experts
    with pytest.raises(Nf4Error, match=r"is_transposed, has_bias.*four_bit=False"):
        quantiser.check_supported("experts", experts)
    odd = MixtralConfig(**MIXTRAL | dict(hidden_size=40, head_dim=16, intermediate_size=6))
    with pytest.raises(Nf4Error, match=r"multiple of 64 weights.*four_bit=False"):
        loading.load_base(write(tmp_path / "odd", odd), four_bit=True)


# --- computing ------------------------------------------------------------------------------------


def make_experts(hidden=64, width=96, count=8, seed=0, act="silu"):
    """A layer's experts in 4 bits, and their dequantised weights in fp32."""
    torch.manual_seed(seed)
    config = MixtralConfig(
        hidden_size=hidden, intermediate_size=width, num_local_experts=count, hidden_act=act
    )
    config._experts_implementation = quantiser.METHOD
    quantiser.register()
    layer = MixtralExperts(config)
    weights = {}
    for projection in storage.PROJECTIONS:
        shape = getattr(layer, projection).shape
        matrices = torch.randn(shape) / shape[-1] ** 0.5
        delattr(layer, projection)
        for piece, tensor in storage.quantise(matrices).items():
            layer.register_parameter(
                f"{projection}_{piece}", torch.nn.Parameter(tensor, requires_grad=False)
            )
        weights[projection] = torch.stack([by_bitsandbytes(matrix)[2] for matrix in matrices])
    return layer, weights


def reference(weights, x, index, chosen, act=torch.nn.functional.silu):
    """Token by token in fp32, as the paper has it, grouped only by (token's choice, expert)."""
    out = torch.zeros_like(x)
    for expert, (gate_up, down) in enumerate(
        zip(weights["gate_up_proj"], weights["down_proj"], strict=True)
    ):
        token, choice = (index == expert).nonzero(as_tuple=True)
        gate, up = (x[token] @ gate_up.t()).chunk(2, dim=-1)
        out = out.index_add(0, token, chosen[token, choice, None] * ((act(gate) * up) @ down.t()))
    return out


def random_routing(tokens, count, top_k, allowed=None, seed=0):
    generator = torch.Generator().manual_seed(seed)
    scores = torch.rand(tokens, count, generator=generator)
    if allowed is not None:
        scores[:, [n for n in range(count) if n not in allowed]] = -1
    chosen, index = scores.topk(top_k, dim=-1)
    return index, torch.softmax(chosen * 3, dim=-1)


ROUTINGS = {
    "random": (300, None, 2),
    "empty experts": (200, (1, 6), 2),
    "one expert": (65, (7,), 1),
    "one token": (1, None, 2),
    "no token": (0, None, 2),
    "all experts": (40, None, 8),
    "8,192 tokens": (8192, None, 2),
}


def test_one_expert_at_a_time_trains_as_all_at_once():
    """Outputs and gradients, with one expert's 16-bit weights in memory instead of a layer's."""
    results = []
    for one_at_a_time in (False, True):
        layer, _ = make_experts()
        layer.one_at_a_time = one_at_a_time
        index, chosen = random_routing(40, 8, 2)
        x = torch.randn(40, 64, generator=torch.Generator().manual_seed(1)).requires_grad_()
        chosen.requires_grad_()
        out = forward.experts_forward(layer, x, index, chosen)
        out.square().sum().backward()
        results.append((out, x.grad, chosen.grad))
        (held,) = {
            buffer.tensor.numel() for buffer in storage.workspace(layer).buffers.values()
        } - {8 * 96 * 64}
        assert held == (1 if one_at_a_time else 8) * 2 * 96 * 64
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_an_expert_s_rows_in_slices_give_what_they_give_at_once(monkeypatch):
    assert [forward.rows_at_once(tokens) for tokens in (1, 2_048, 4_096, 4_097, 16_384)] == [
        1, 2_048, 2_048, 2_049, 8_192,
    ]  # fmt: skip
    layer, _ = make_experts()
    index, chosen = random_routing(301, 8, 2)
    x = torch.randn(301, 64)
    with torch.no_grad():
        whole = forward.experts_forward(layer, x, index, chosen)
        monkeypatch.setattr(forward, "rows_at_once", lambda tokens: 7)
        assert torch.allclose(forward.experts_forward(layer, x, index, chosen), whole, atol=1e-5)


@pytest.mark.parametrize("dtype", BOUND)
@pytest.mark.parametrize("case", ROUTINGS)
def test_output_and_gradients_are_those_of_the_dequantised_weights(case, dtype):
    tokens, allowed, top_k = ROUTINGS[case]
    layer, weights = make_experts()
    index, chosen = random_routing(tokens, 8, top_k, allowed)
    x, grad = (
        torch.randn(tokens, 64, generator=torch.Generator().manual_seed(n)).to(dtype)
        for n in (1, 2)
    )
    results = []
    for ours in (True, False):
        inputs = x.clone() if ours else x.float()
        gates = chosen.to(dtype) if ours else chosen.to(dtype).float()
        inputs.requires_grad_(), gates.requires_grad_()
        out = layer(inputs, index, gates) if ours else reference(weights, inputs, index, gates)
        out.backward(grad.to(out.dtype))
        results.append((out.detach(), inputs.grad, gates.grad))
    for name, found, expected in zip(("output", "input", "routing weights"), *results, strict=True):
        assert found.shape == expected.shape
        assert found.dtype == dtype
        assert found.isfinite().all()
        if tokens:
            assert distance(found, expected) < BOUND[dtype], name
    # an expert's weights at a time; the CPU's GEMM rounds by the strides of what it is given
    with torch.no_grad():
        answer = layer(x, index, chosen.to(dtype))
    assert answer.shape == x.shape and (
        not tokens or distance(answer, results[0][0]) < torch.finfo(dtype).eps
    )


def test_other_activations(monkeypatch):
    layer, weights = make_experts(act="gelu")
    index, chosen = random_routing(50, 8, 2)
    x = torch.randn(50, 64, requires_grad=True)
    y = x.detach().clone().requires_grad_()
    layer(x, index, chosen).square().sum().backward()
    reference(weights, y, index, chosen, act=torch.nn.functional.gelu).square().sum().backward()
    assert distance(x.grad, y.grad) < 1e-5


def test_autocast_computes_in_its_dtype_and_returns_the_input_s():
    layer, weights = make_experts()
    index, chosen = random_routing(100, 8, 2)
    x = torch.randn(100, 64)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = layer(x, index, chosen)
    assert out.dtype == torch.float32
    assert 1e-4 < distance(out, reference(weights, x, index, chosen)) < 1e-2


def test_the_same_bits_every_time():
    layer, _ = make_experts()
    index, chosen = random_routing(500, 8, 2)
    x = torch.randn(500, 64, dtype=torch.bfloat16)
    results = []
    for _ in range(3):
        inputs, gates = x.clone().requires_grad_(), chosen.bfloat16().requires_grad_()
        out = layer(inputs, index, gates)
        out.float().square().sum().backward()
        results.append((out, inputs.grad, gates.grad))
        storage.release_buffers(layer)
    for other in results[1:]:
        assert all(torch.equal(*pair) for pair in zip(results[0], other, strict=True))


@pytest.mark.parametrize("dtype", BOUND)
def test_the_way_for_little_memory_gives_the_same(dtype):
    """One expert's weights at a time, against the whole layer's."""
    layer, weights = make_experts()
    index, chosen = random_routing(20, 8, 2)
    x = torch.randn(20, 64).to(dtype)
    whole = layer(x, index, chosen.to(dtype)).detach()
    storage.release_buffers(layer)
    with torch.no_grad():
        single = layer(x, index, chosen.to(dtype))
    (held,) = [buffer.tensor for buffer in storage.workspace(layer).buffers.values()]
    # of one projection of one expert
    assert held.numel() == 2 * layer.gate_up_proj_packed[0].numel()
    assert torch.equal(single, whole)
    expected = reference(weights, x.float(), index, chosen.to(dtype).float())
    assert distance(whole, expected) < BOUND[dtype]


def test_buffers_never_hold_another_layer_s_weights():
    (first, one), (second, two) = make_experts(seed=1), make_experts(seed=2)
    index, chosen = random_routing(30, 8, 2)
    x = torch.randn(30, 64)

    def check(layer, weights):
        with torch.no_grad():
            assert distance(layer(x, index, chosen), reference(weights, x, index, chosen)) < 1e-5

    for _ in range(2):  # two layers in turn
        check(first, one)
        check(second, two)
    check(second, two)
    with torch.no_grad():  # changed in place, as load_state_dict does
        for name, value in second.state_dict().items():
            first.get_parameter(name).copy_(value)
    check(first, two)
    first.load_state_dict(make_experts(seed=1)[0].state_dict())
    check(first, one)
    for seed in range(3, 9):  # deleted, and another one loaded where it stood
        layer, weights = make_experts(seed=seed)
        check(layer, weights)
        del layer
    with torch.inference_mode():  # made where tensors have no version
        layer, weights = make_experts(seed=10)
        check(layer, weights)
    check(first, one)
    copied = copy.deepcopy(first)
    for parameter in copied.parameters():
        parameter.data = parameter.data.clone()
    check(copied, one)


def test_a_dequantisation_that_fails_leaves_nothing_that_looks_valid(monkeypatch):
    (first, one), (second, two) = make_experts(seed=1), make_experts(seed=2)
    index, chosen = random_routing(30, 8, 2)
    x = torch.randn(30, 64)
    with torch.enable_grad():  # the way of training, which keeps a layer's weights
        first(x, index, chosen)

        def half(pieces, dtype, out=None, first=0):
            out[0].zero_()
            raise torch.OutOfMemoryError("injected")

        monkeypatch.setattr(storage, "dequantise", half)
        with pytest.raises(torch.OutOfMemoryError):
            second(x, index, chosen)
        monkeypatch.undo()
        assert distance(first(x, index, chosen).detach(), reference(one, x, index, chosen)) < 1e-5
        assert distance(second(x, index, chosen), reference(two, x, index, chosen)) < 1e-5


@pytest.mark.parametrize("columns", [32, 64, 96, 128, 160, 320])
@pytest.mark.parametrize("dtype", BOUND)
def test_dequantising_is_the_formula_for_rows_of_any_length(columns, dtype):
    """bitsandbytes' own is wrong on CPUs with AVX512 where a row is no multiple of 64."""
    weight = torch.randn(3, 64, columns, generator=torch.Generator().manual_seed(columns))
    found = storage.dequantise(storage.quantise(weight), dtype)
    expected = torch.stack([by_bitsandbytes(matrix)[2] for matrix in weight]).to(dtype)
    assert torch.equal(found, expected)
    assert 0.01 < distance(found, weight) < 0.2
    out = torch.full_like(expected, torch.nan)
    assert storage.dequantise(storage.quantise(weight), dtype, out) is out and torch.equal(
        out, expected
    )


def test_a_linear_layer_that_bitsandbytes_computes_wrongly_is_refused_by_name(
    tmp_path, monkeypatch
):
    """On a CPU without AVX512 it is right; either way nothing wrong is computed."""
    folder = write(tmp_path / "m", LlamaConfig(**COMMON, intermediate_size=96))
    try:
        base = loading.load_base(folder, torch.float32, four_bit=True)
    except Nf4Error as error:
        assert re.search(
            r"down_proj has rows of 96 weights, no multiple of 64.*four_bit=False", str(error)
        )
    else:
        assert distance(logits(base), logits(dequantised(folder))) < 1e-4
    wrong = bnb_functional.dequantize_4bit
    monkeypatch.setattr(bnb_functional, "dequantize_4bit", lambda *a, **k: wrong(*a, **k) + 0.1)
    with pytest.raises(Nf4Error, match="rows of 96 weights"):
        loading.load_base(folder, torch.float32, four_bit=True)


# --- adapters and checkpointing on the whole model ------------------------------------------------


def trainable(hub, dtype=torch.float32, seed=0):
    lora = adapter.add_lora(
        loading.load_base(hub, dtype, four_bit=True), base="m", r=4, dropout=0.0, seed=seed
    )
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in lora.named_parameters():
        if "lora_B" in name:
            parameter.data.normal_(0, 0.1, generator=generator)
    return lora.train()


def gradients(lora):
    lora.zero_grad()
    loss = lora(IDS, labels=IDS).loss
    loss.backward()
    return loss.item(), {
        name: p.grad.clone() for name, p in lora.named_parameters() if p.requires_grad
    }


@pytest.mark.parametrize("autocast", [False, True])
def test_checkpointing_changes_no_gradient_and_shares_a_dequantisation(hub, monkeypatch, autocast):
    lora = trainable(hub)
    calls = {"dequantise": 0, "gate_up": 0, "down": 0}
    dequantise, matmul = storage.dequantise, forward._matmul

    def counted(*args, **kwargs):
        calls["dequantise"] += 1
        return dequantise(*args, **kwargs)

    def multiplied(rows, layer, projection, routing, transpose):
        calls[projection.removesuffix("_proj")] += transpose
        return matmul(rows, layer, projection, routing, transpose)

    monkeypatch.setattr(storage, "dequantise", counted)
    monkeypatch.setattr(forward, "_matmul", multiplied)
    losses, plain = set(), {}
    for checkpointed, kept in ((0, 0), (3, 0), (3, 3), (3, 1), (2, 1), (1, 0), (0, 0)):
        checkpointing.apply_plan(lora, checkpointing.TrainingPlan(1, 1, checkpointed, kept))
        storage.release_buffers(lora)
        calls.update(dict.fromkeys(calls, 0))
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
            loss, grads = gradients(lora)
        losses.add(loss)
        # gate and up once in the forward pass and once more where they are recomputed; down never
        # again
        assert calls["gate_up"] == 3 + checkpointed - kept and calls["down"] == 3
        # two projections a layer forward; backward starts with the last layer's still there and
        # shares with recomputation
        assert calls["dequantise"] == 6 + 4
        plain = plain or grads
        assert all(torch.equal(grads[name], plain[name]) for name in plain), (checkpointed, kept)
    assert len(losses) == 1
    assert all(grad.abs().max() > 0 for grad in plain.values())


def test_kept_rows_are_those_of_their_own_forward(hub):
    """Two forward passes before the first backward, and one without: each call of a layer keeps its
    rows for itself."""
    lora = trainable(hub)
    batches = [
        torch.randint(3, 320, (2, 24), generator=torch.Generator().manual_seed(n)) for n in (1, 2)
    ]

    def loss(ids):
        return lora(input_ids=ids, labels=ids).loss

    def gradient_of(value):
        lora.zero_grad()
        value.backward()
        return {name: p.grad.clone() for name, p in lora.named_parameters() if p.requires_grad}

    expected = [gradient_of(loss(ids)) for ids in batches]
    checkpointing.apply_plan(lora, checkpointing.TrainingPlan(1, 1, 3, 3))
    first, second, _ = loss(batches[0]), loss(batches[1]), loss(batches[1])
    found = [gradient_of(first), gradient_of(second)]
    assert all(
        torch.equal(a[name], b[name]) for a, b in zip(found, expected, strict=True) for name in a
    )


def test_nothing_the_size_of_the_weights_is_kept_for_the_backward_pass(hub):
    lora = trainable(hub, torch.bfloat16)
    frozen = {p.untyped_storage().data_ptr() for p in lora.parameters()}
    saved = []

    def pack(tensor):
        if tensor.untyped_storage().data_ptr() not in frozen:
            saved.append(tensor.numel())
        return tensor

    ids = IDS[:1, :2]
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        lora(ids).logits.float().square().sum().backward()
    assert saved and max(saved) < 96 * 128  # an expert's smallest matrix


def test_compiling_a_layer_does_not_break_it(hub):
    lora = trainable(hub)
    loss, grads = gradients(lora)
    lora.get_base_model().model.layers[1].compile(backend="aot_eager")
    for _ in range(2):
        compiled_loss, compiled = gradients(lora)
        assert compiled_loss == pytest.approx(loss, rel=1e-5)
        assert all(distance(compiled[name], grads[name]) < 1e-3 for name in grads)


def test_several_adapters_and_peft_s_own_files(hub, tmp_path):
    lora = trainable(hub)
    lora.eval()
    config = copy.deepcopy(lora.peft_config["default"])
    lora.add_adapter("second", config)
    for name, parameter in lora.named_parameters():
        if "lora_B.second" in name:
            parameter.data.normal_(0, 0.1)
    first = logits(lora)
    lora.set_adapter("second")
    second = logits(lora)
    with lora.disable_adapter():
        none = logits(lora)
    assert min(distance(a, b) for a, b in ((first, second), (first, none), (second, none))) > 0.01
    lora.set_adapter("default")
    assert torch.equal(logits(lora), first)
    lora.save_pretrained(tmp_path, save_embedding_layers=False)
    ours = adapter.save_adapter(lora, tmp_path / "ours")
    for folder, expected in ((tmp_path, first), (tmp_path / "second", second), (ours, first)):
        fresh = loading.load_base(hub, torch.float32, four_bit=True)
        assert torch.equal(logits(fresh), none)
        assert all("lora_" in name for name in load_file(folder / "adapter_model.safetensors"))
        assert torch.equal(logits(PeftModel.from_pretrained(fresh, str(folder)).eval()), expected)
    fresh = loading.load_base(hub, torch.float32, four_bit=True)
    assert torch.equal(logits(adapter.load_adapter(fresh, ours, hub)), first)


def test_an_adapter_trained_on_4_bits_fits_the_16_bit_base(hub, tmp_path):
    lora = trainable(hub)
    optimizer = torch.optim.AdamW([p for p in lora.parameters() if p.requires_grad], lr=5e-3)
    for _ in range(10):
        gradients(lora)
        optimizer.step()
    lora.eval()
    folder = adapter.save_adapter(lora, tmp_path / "adapter")
    four = logits(lora)
    with lora.disable_adapter():
        four_alone = logits(lora)
    sixteen_alone = logits(loading.load_base(hub, torch.float32, four_bit=False))
    sixteen = PeftModel.from_pretrained(
        loading.load_base(hub, torch.float32, four_bit=False), str(folder)
    ).eval()
    assert distance(four, four_alone) > 0.2  # the adapter does something
    quantisation = distance(four_alone, sixteen_alone)
    assert 0 < quantisation < 0.5
    assert distance(four, logits(sixteen)) < 1.5 * quantisation


def test_generation_gives_what_the_dequantised_model_gives(hub):
    """Prefill and decode steps with a cache, through transformers' own generate."""
    base = loading.load_base(hub, torch.float32, four_bit=True)
    sixteen = dequantised(hub)
    options = dict(
        max_new_tokens=12, do_sample=False, pad_token_id=0, attention_mask=torch.ones_like(IDS)
    )
    sixteen.generation_config = base.generation_config
    assert torch.equal(base.generate(IDS, **options), sixteen.generate(IDS, **options))
