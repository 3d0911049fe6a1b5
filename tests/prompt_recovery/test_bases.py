"""Folders of base models as other programs leave them: refused, with file, rule and remedy, by what
the public run does before anything loads; good ones of every tested family answer as
transformers."""

import json
import shutil

import pytest
import torch
from conftest import TINY
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModelForCausalLM,
    Gemma2Config,
    Gemma3TextConfig,
    GPT2Config,
    LlamaConfig,
    MistralConfig,
    MixtralConfig,
    PhiConfig,
    Qwen2Config,
    Qwen2MoeConfig,
    Qwen3Config,
    Qwen3MoeConfig,
)

from prompt_recovery import adapter, base, inputs
from prompt_recovery.engine import Nf4Error, check_base, folder, generate, loading
from prompt_recovery.engine.folder import FAMILIES, ModelError
from prompt_recovery.tokenizer import TokenizerError

WEIGHTS, INDEX = folder.WEIGHTS, folder.INDEX
LFS = b"version https://git-lfs.github.com/spec/v1\noid sha256:dadfd56d\nsize 4892809584\n"


@pytest.fixture(scope="module")
def sharded(tmp_path_factory):
    """The tiny Mixtral in several files with an index, as the hub has large models."""
    target = tmp_path_factory.mktemp("hub") / "mixtral"
    AutoModelForCausalLM.from_pretrained(TINY).save_pretrained(target, max_shard_size="3MB")
    shutil.copy(TINY / "tokenizer.json", target)
    assert (target / INDEX).is_file() and len(list(target.glob("*.safetensors"))) > 2
    return target


@pytest.fixture
def copy(sharded, tmp_path):
    return shutil.copytree(sharded, tmp_path / "m")


def shards(copy):
    return sorted(copy.glob("*.safetensors"))


def edit(path, change):
    found = json.loads(path.read_text())
    change(found)
    path.write_text(json.dumps(found))


def change_tensors(copy, change):
    """One file with what `change` makes of all tensors."""
    state = {name: tensor for path in shards(copy) for name, tensor in load_file(path).items()}
    for path in [*shards(copy), copy / INDEX]:
        path.unlink()
    save_file({n: t.clone() for n, t in change(state).items()}, copy / WEIGHTS, {"format": "pt"})


def quantise_as(copy, method, pieces):
    """What a tool leaves: its word in the config, and for a projection tensors of its own."""
    edit(copy / "config.json", lambda config: config.update(quantization_config=method))
    hide_as(copy, pieces)


def hide_as(copy, pieces):
    def change(state):
        for name in [name for name in state if name.endswith("_proj.weight")]:
            shape = state.pop(name).shape
            for piece, dtype in pieces.items():
                state[name.removesuffix("weight") + piece] = torch.zeros(
                    shape[0], shape[1] // 8, dtype=dtype
                )
        return state

    change_tensors(copy, change)


BNB = {
    "weight": torch.uint8,
    "weight.absmax": torch.uint8,
    "weight.quant_state.bitsandbytes__nf4": torch.uint8,
}
GPTQ = {
    "qweight": torch.int32,
    "qzeros": torch.int32,
    "scales": torch.float16,
    "g_idx": torch.int32,
}
AWQ = {"qweight": torch.int32, "qzeros": torch.int32, "scales": torch.float16}
FP8 = {"weight": torch.float8_e4m3fn, "weight_scale": torch.float32}


def drop_expert(state):
    return {
        name: tensor
        for name, tensor in state.items()
        if ".2.block_sparse_moe.experts.3." not in name
    }


BROKEN = {
    "bitsandbytes": (
        lambda f: quantise_as(f, dict(quant_method="bitsandbytes", load_in_4bit=True), BNB),
        Nf4Error,
        "quantised already, as 'bitsandbytes'.*Give the folder of the 16-bit model",
    ),
    "GPTQ": (
        lambda f: quantise_as(f, dict(quant_method="gptq", bits=4), GPTQ),
        Nf4Error,
        "quantised already, as 'gptq'",
    ),
    "AWQ": (
        lambda f: quantise_as(f, dict(quant_method="awq", bits=4), AWQ),
        Nf4Error,
        "quantised already, as 'awq'",
    ),
    "an LFS pointer": (
        lambda f: shards(f)[1].write_bytes(LFS),
        ModelError,
        "00002-of.*Git LFS pointer, not the file itself.*fetch it again",
    ),
    "a shard is missing": (
        lambda f: shards(f)[1].unlink(),
        ModelError,
        "lacks 1 of the 4 files of model.safetensors.index.json.*00002-of",
    ),
    "cut short": (
        lambda f: shards(f)[2].write_bytes(shards(f)[2].read_bytes()[:-100]),
        ModelError,
        "00003-of.*not a whole safetensors file",
    ),
    "no tokenizer": (
        lambda f: (f / "tokenizer.json").unlink(),
        TokenizerError,
        "neither tokenizer.model nor",
    ),
    # the same by other ways
    "bitsandbytes, unsaid": (
        lambda f: hide_as(f, BNB),
        ModelError,
        "as U8: another tool quantised it.*16 bits",
    ),
    "GPTQ, unsaid": (lambda f: hide_as(f, GPTQ), ModelError, "as I32: another tool quantised it"),
    "FP8, unsaid": (lambda f: hide_as(f, FP8), ModelError, "as F8_E4M3: another tool quantised it"),
    "all are LFS pointers": (
        lambda f: [path.write_bytes(LFS) for path in shards(f)],
        ModelError,
        "Git LFS pointer",
    ),
    "a config that is an LFS pointer": (
        lambda f: (f / "config.json").write_bytes(LFS),
        ModelError,
        "config.json is not JSON.*Git LFS pointer",
    ),
    "a config that is a list": (
        lambda f: (f / "config.json").write_text("[1]"),
        ModelError,
        "must hold an object",
    ),
    "an empty file": (
        lambda f: shards(f)[0].write_bytes(b""),
        ModelError,
        "not a whole safetensors file .0 bytes",
    ),
    "an HTML page": (
        lambda f: shards(f)[0].write_bytes(b"<!DOCTYPE html>" * 99),
        ModelError,
        "not a whole safetensors",
    ),
    "cut in the header": (
        lambda f: shards(f)[0].write_bytes(shards(f)[0].read_bytes()[:50]),
        ModelError,
        "00001-of",
    ),
    "no index": (
        lambda f: (f / INDEX).unlink(),
        ModelError,
        "neither model.safetensors nor model.safetensors.index",
    ),
    "an index without metadata": (
        lambda f: edit(f / INDEX, lambda index: index.pop("metadata")),
        ModelError,
        "needs the entries metadata and weight_map",
    ),
    "an index without a map": (
        lambda f: edit(f / INDEX, lambda index: index.pop("weight_map")),
        ModelError,
        "needs the entries metadata and weight_map",
    ),
    "an index that is cut": (
        lambda f: (f / INDEX).write_text('{"metadata": {'),
        ModelError,
        "index.json is not JSON",
    ),
    "an index of another save": (
        lambda f: edit(f / INDEX, lambda index: index["weight_map"].update(x=shards(f)[0].name)),
        ModelError,
        "lacks x, which model.safetensors.index.json places there",
    ),
    "a layer is missing": (
        lambda f: change_tensors(
            f, lambda s: {n: s[n] for n in s if "layers.3.self_attn" not in n}
        ),
        ModelError,
        r"lacks 4 of the model's tensors, the first is model.layers.3.self_attn",
    ),
    "an expert is missing": (
        lambda f: change_tensors(f, drop_expert),
        ModelError,
        "numbers: it lacks some of its experts",
    ),
    "names of a wrapper": (
        lambda f: change_tensors(f, lambda s: {f"module.{n}": s[n] for n in s}),
        ModelError,
        "lacks .* of the model's tensors, the first is model.embed_tokens",
    ),
    "the config of a larger model": (
        lambda f: edit(f / "config.json", lambda c: c.update(num_hidden_layers=6)),
        ModelError,
        r"lacks .*model.layers.5",
    ),
    "another vocabulary": (
        lambda f: edit(f / "config.json", lambda c: c.update(vocab_size=32_000)),
        ModelError,
        r"shape \[2400, 192\], config.json makes it \[32000, 192\]",
    ),
    "Gemma 2": (
        lambda f: edit(f / "config.json", lambda c: c.update(model_type="gemma2")),
        ModelError,
        "model_type 'gemma2', with which nothing here is tested: take a model of mixtral",
    ),
    "no model_type": (
        lambda f: edit(f / "config.json", lambda c: c.pop("model_type")),
        ModelError,
        "model_type None",
    ),
    "a tokenizer that is an LFS pointer": (
        lambda f: (f / "tokenizer.json").write_bytes(LFS),
        TokenizerError,
        "tokenizer.json.*Git LFS pointer",
    ),
    "a tokenizer of another model": (
        lambda f: edit(
            f / "tokenizer.json",
            lambda t: t["model"]["vocab"].update({f"piece{n}": n for n in range(2400, 3000)}),
        ),
        TokenizerError,
        "3000 pieces, the model 2400 embeddings",
    ),
}


@pytest.mark.parametrize("kind", BROKEN)
def test_a_broken_base_is_refused_before_anything_loads(copy, kind, monkeypatch):
    break_it, error, message = BROKEN[kind]
    break_it(copy)
    monkeypatch.setattr(loading, "AutoModelForCausalLM", None)  # whoever loads fails otherwise
    with pytest.raises(error, match=message):
        inputs.usable_adapter(None, copy, allow_base=True)
    if error is not TokenizerError:
        with pytest.raises(error, match=message):
            loading.load_base(copy)


def test_a_good_base_passes_in_one_file_several_and_4_bits(sharded, tmp_path):
    for each in (TINY, sharded):
        assert inputs.usable_adapter(None, each, allow_base=True) is None
    quantised = loading.save_quantised(
        loading.load_base(sharded, torch.bfloat16, True), sharded, tmp_path / "nf4"
    )
    assert inputs.usable_adapter(None, quantised, allow_base=True) is None
    assert check_base(quantised).four_bit and not check_base(TINY).four_bit
    state = load_file(quantised / WEIGHTS)
    for name in (
        "model.layers.1.mlp.experts.down_proj_absmax",
        "model.norm.weight",
        "model.layers.0.self_attn.q_proj.weight",
    ):
        save_file(
            {n: t for n, t in state.items() if n != name}, quantised / WEIGHTS, {"format": "pt"}
        )
        with pytest.raises(
            ModelError, match=f"lacks 1 of the model's tensors, the first is {name}"
        ):
            inputs.usable_adapter(None, quantised, allow_base=True)


def test_too_little_room_on_the_gpus_is_found_before_loading(monkeypatch):
    from prompt_recovery.engine import TooLittleMemory, memory

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda **_: False)
    monkeypatch.setattr(memory, "processes", lambda: None)
    monkeypatch.setattr(memory, "free_memory", lambda: {0: 2**29, 1: 2**29})
    with pytest.raises(TooLittleMemory, match="The model needs"):
        inputs.usable_adapter(None, TINY, allow_base=True)


# --- families -----------------------------------------------------------------------------------

SMALL = dict(
    vocab_size=99,
    hidden_size=64,
    num_hidden_layers=3,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=512,
    pad_token_id=None,
    bos_token_id=1,
    eos_token_id=2,
)
MOE = dict(moe_intermediate_size=96, num_experts=6, num_experts_per_tok=2)
CONFIGS = {
    "mixtral": MixtralConfig(
        **SMALL, intermediate_size=96, num_local_experts=4, output_router_logits=True
    ),
    "mistral": MistralConfig(**SMALL, intermediate_size=128, sliding_window=64),
    "llama": LlamaConfig(**SMALL, intermediate_size=128, tie_word_embeddings=True),
    "qwen2": Qwen2Config(**SMALL, intermediate_size=128),
    "qwen2_moe": Qwen2MoeConfig(
        **SMALL,
        **MOE,
        intermediate_size=64,
        shared_expert_intermediate_size=64,
        output_router_logits=True,
    ),
    "qwen3": Qwen3Config(**SMALL, intermediate_size=128, head_dim=32),
    "qwen3_moe": Qwen3MoeConfig(
        **SMALL, **MOE, intermediate_size=64, head_dim=32, output_router_logits=True
    ),
    "gemma3_text": Gemma3TextConfig(**SMALL, intermediate_size=128, head_dim=32, sliding_window=64),
}


def write(target, config):
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config).save_pretrained(target)
    return target


def test_every_family_has_a_config_here():
    assert set(CONFIGS) == set(FAMILIES)


@pytest.mark.parametrize("kind", CONFIGS)
@pytest.mark.parametrize("four_bit", [False, True])
def test_each_tested_family_answers_as_transformers_does_and_trains(kind, four_bit, tmp_path):
    model = loading.load_base(write(tmp_path / "m", CONFIGS[kind]), torch.float32, four_bit)
    prompts = [[1, *range(5, 5 + length)] for length in (3, 20, 11)]
    found = dict(generate(model, prompts, eos=-1, max_new_tokens=8))
    model.generation_config.eos_token_id = None
    for number, prompt in enumerate(prompts):
        with torch.inference_mode():
            out = model.generate(torch.tensor([prompt]), max_new_tokens=8, do_sample=False)
        assert found[number][0].ids == out[0, len(prompt) :].tolist(), number
    lora = adapter.add_lora(model, base="m", r=2, dropout=0.0)
    mask = torch.ones(2, 9, dtype=torch.long)
    mask[1, 6:] = 0
    ids = torch.randint(3, 99, (2, 9), generator=torch.Generator().manual_seed(0))
    lora(ids, attention_mask=mask, labels=ids).loss.backward()
    assert all(p.grad is not None for n, p in lora.named_parameters() if "lora_" in n)


@pytest.mark.parametrize("config", [GPT2Config, Gemma2Config, PhiConfig])
def test_other_families_are_refused_by_name(config, tmp_path):
    config(
        vocab_size=99, hidden_size=64, num_hidden_layers=2, num_attention_heads=4
    ).save_pretrained(tmp_path)
    save_file({"x": torch.ones(1)}, tmp_path / WEIGHTS, {"format": "pt"})
    with pytest.raises(
        ModelError, match=f"model_type '{config.model_type}', with which nothing here is tested"
    ):
        loading.load_base(tmp_path)


def test_texts_are_cut_to_the_sliding_window_that_answering_does_not_build(tmp_path):
    assert base.longest(TINY) == 4096 and base.longest(TINY, 100) == 100
    assert base.longest(write(tmp_path / "w", CONFIGS["mistral"])) == 64
    assert base.longest(write(tmp_path / "p", CONFIGS["llama"])) == 512
