"""Adapters that the installed peft and other tools write: answered as peft itself computes them,
merged and unmerged, or refused by name before anything loads."""

import json
import re
import shutil

import pytest
import torch
from conftest import TINY
from peft import LoraConfig, PeftModel, VeraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, MistralConfig

from kaggle_upload.contents import adapter_content
from prompt_recovery import adapter, inputs
from prompt_recovery.adapter import check_adapter, load_adapter
from prompt_recovery.adapter_files import CONFIG, WEIGHTS, AdapterError
from prompt_recovery.base import base_fingerprint, stored_fingerprint
from prompt_recovery.engine import generate, layers, loading, merging, ready
from prompt_recovery.engine.kernels import dispatch
from prompt_recovery.engine.planning import AnswerPlan

ATTENTION = ["q_proj", "k_proj", "v_proj", "o_proj"]
EXPERTS = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
KINDS = {
    "plain": {},
    "rank_pattern": dict(r=8, rank_pattern={"q_proj": 16}, alpha_pattern={"k_proj": 3}),
    "dora": dict(use_dora=True),
    "lora_bias": dict(lora_bias=True),
    "rslora": dict(use_rslora=True),
    "pissa": dict(init_lora_weights="pissa"),
    "olora": dict(init_lora_weights="olora"),
    "gaussian": dict(init_lora_weights="gaussian"),
    "embed_tokens": dict(target_modules=[*ATTENTION, "embed_tokens"]),
    "embed_tokens alone": dict(target_modules=["embed_tokens"]),
    "lm_head": dict(target_modules=[*ATTENTION, "lm_head"]),
    "modules_to_save": dict(modules_to_save=["lm_head", "embed_tokens"]),
    "tokens": dict(trainable_token_indices=[5, 6, 300]),
    "all-linear": dict(target_modules="all-linear"),
    "regular expression": dict(target_modules=r".*layers\.[02]\.self_attn\.(q|v)_proj"),
    "some layers": dict(layers_to_transform=[1, 3]),
    "experts": dict(target_parameters=EXPERTS),
}
OF_EXPERTS = ("all-linear", "experts")
IDS = torch.tensor([[1, 300, 400, 500, 7, 9, 33, 5, 6]])
PROMPTS = [[1, 300, 400, 500, 7], [1, 9, 33, 5, 6, 12, 300], [1, 77]]
NEW = 6


def logits(model):
    with torch.inference_mode():
        return model(IDS).logits.float()


def greedy(model, prompts=PROMPTS):
    """The answers of transformers' and peft's own generate, without any of ours."""
    found = []
    for prompt in prompts:
        ids = torch.tensor([prompt])
        with torch.inference_mode():
            out = model.generate(
                input_ids=ids, max_new_tokens=NEW, min_new_tokens=NEW, do_sample=False
            )
        found.append(out[0, len(prompt) :].tolist())
    return found


def ours(model, plan=None):
    with ready(model, plan) as prepared:
        found = dict(generate(prepared, PROMPTS, eos=-1, max_new_tokens=NEW))
    return [found[n][0].ids for n in range(len(PROMPTS))]


def train(folder, size=0.05, **config):
    """An adapter of peft's own making and saving, moved at random where training would move it.
    Returns the model it was saved from."""
    torch.manual_seed(0)
    options = dict(r=4, lora_alpha=16, target_modules=ATTENTION, task_type="CAUSAL_LM") | config
    lora = get_peft_model(loading.load_base(TINY), LoraConfig(**options)).eval()
    for parameter in lora.parameters():
        if parameter.requires_grad:
            parameter.data += size * torch.randn_like(parameter)
    lora.save_pretrained(folder)
    return lora


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """By kind: (folder, logits of the model it was saved from, its greedy answers); made once."""
    kept = {}

    def make(kind):
        if kind not in kept:
            folder = tmp_path_factory.mktemp("made") / "adapter"
            lora = train(folder, **KINDS[kind])
            kept[kind] = folder, logits(lora), greedy(lora)
        return kept[kind]

    return make


@pytest.fixture
def copy(made, tmp_path):
    return shutil.copytree(made("plain")[0], tmp_path / "adapter")


def edit(folder, **changes):
    config = json.loads((folder / CONFIG).read_text())
    (folder / CONFIG).write_text(json.dumps(config | changes))


def rename(folder, change, **metadata):
    tensors = load_file(folder / WEIGHTS)
    save_file(
        {change(name): t for name, t in tensors.items()},
        folder / WEIGHTS,
        {"format": "pt"} | metadata,
    )


# --- used as peft computes them -----------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_each_kind_answers_as_peft_does_merged_and_unmerged(made, kind):
    folder, expected, answers = made(kind)
    check_adapter(folder, TINY)
    lora = load_adapter(loading.load_base(TINY), folder, TINY)
    assert torch.allclose(logits(lora), expected, rtol=1e-4, atol=1e-4)
    assert not torch.allclose(logits(loading.load_base(TINY)), expected, atol=1e-2)
    with merging.merged(lora) as fast:
        moved = (logits(fast) - expected).norm() / expected.norm()
    assert moved < 1e-5
    for plan in (
        AnswerPlan((5,), True, 8192, 4096),
        AnswerPlan((5,), False, 8192, 4096),
        AnswerPlan((3, 2), True, 8192, 4096),
    ):
        assert ours(lora, plan) == answers, plan
    assert torch.equal(logits(lora), logits(lora)) and ours(lora) == answers


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind not in OF_EXPERTS])
def test_each_kind_is_right_on_a_4_bit_base_or_refused(made, kind):
    """Right: as peft computes it on the same 4-bit base; to bf16's rounding when merged."""
    folder = made(kind)[0]
    if kind.startswith(("pissa", "olora")):
        with pytest.raises(
            AdapterError, match="init_lora_weights='(pissa|olora).*path_initial_model"
        ):
            check_adapter(folder, TINY, four_bit=True)
        return
    check_adapter(folder, TINY, four_bit=True)
    expected = logits(
        PeftModel.from_pretrained(loading.load_base(TINY, torch.bfloat16, True), folder).eval()
    )
    lora = load_adapter(loading.load_base(TINY, torch.bfloat16, True), folder, TINY)
    assert torch.equal(logits(lora), expected)
    with merging.merged(lora) as fast:  # a router may change its mind about a token
        assert ((logits(fast) - expected).norm(dim=-1) / expected.norm(dim=-1)).median() < 0.05


@pytest.mark.parametrize("four_bit", [False, True])
def test_each_kind_in_its_turn_on_one_base_answers_as_alone_and_leaves_no_trace(made, four_bit):
    """peft's unload left whole trained modules on the base, and what PiSSA and OLoRA changed."""
    dtype = torch.bfloat16 if four_bit else None
    kinds = [
        kind
        for kind in [*KINDS, "plain"]
        if not (four_bit and kind.startswith((*OF_EXPERTS, "pissa", "olora")))
    ]
    base = loading.load_base(TINY, dtype, four_bit)
    modules = dict(base.named_modules())
    before = {name: tensor.clone() for name, tensor in base.state_dict().items()}
    plans = [AnswerPlan((5,), merged, 8192, 4096) for merged in (True, False)]
    for kind in kinds:
        folder, _, answers = made(kind)
        alone = load_adapter(loading.load_base(TINY, dtype, four_bit), folder, TINY)
        expected = [ours(alone, plan) for plan in plans]
        assert four_bit or expected == [answers, answers]
        with adapter.put_on(base, folder, TINY) as lora:
            assert [ours(lora, plan) for plan in plans] == expected, kind
            assert torch.equal(logits(lora), logits(alone)), kind
        after = base.state_dict()
        assert after.keys() == before.keys() and dict(base.named_modules()) == modules, kind
        assert all(torch.equal(after[name], before[name]) for name in before), kind


def test_a_plan_leaves_room_for_the_16_bit_copies_of_an_adapter_of_any_rank(tmp_path):
    """A T4's plan knew of rank 16 alone."""
    train(tmp_path / "a", r=64)
    lora = load_adapter(loading.load_base(TINY, torch.bfloat16, True), tmp_path / "a", TINY)
    cpu = torch.device("cpu")
    with layers.fast_layers(lora.get_base_model()):
        copies = [vars(module).get("sixteen", ()) for module in lora.modules()]
        taken = sum(tensor.nbytes for pair in copies for tensor in pair)
    assert layers.bytes_of_copies(lora, cpu) == taken > 0
    assert layers.bytes_of_copies(loading.load_base(TINY), cpu) == 0


@pytest.mark.parametrize(
    "config",
    [
        LoraConfig(target_modules=ATTENTION),
        LoraConfig(target_modules=["q_proj", "v_proj"], **KINDS["rank_pattern"]),
        LoraConfig(target_modules=["k_proj"], **KINDS["dora"]),
        LoraConfig(target_modules=["o_proj"]),
        VeraConfig(target_modules=ATTENTION, r=8),
    ],
    ids=["all", "two of different ranks", "dora", "another matrix", "no LoRA"],
)
def test_queries_keys_and_values_are_one_product_or_those_of_their_layers(config):
    """VeRA's matrices had been left out without a word."""
    lora = get_peft_model(loading.load_base(TINY, torch.float16, True), config)
    torch.manual_seed(0)
    for name, weight in lora.named_parameters():
        if "lora_B" in name or "vera_lambda" in name:
            torch.nn.init.normal_(weight, 0, 0.1)
    attention, cpu = lora.get_base_model().model.layers[0].self_attn, torch.device("cpu")
    x = torch.randn(70, attention.q_proj.in_features).half()
    with torch.inference_mode():
        matrices = (attention.q_proj, attention.k_proj, attention.v_proj)
        expected = [layer(x).float() for layer in matrices]
        with dispatch.using(cpu, "triton"), layers.fast_layers(lora.get_base_model()):
            with dispatch.using(cpu, "torch"):
                found = vars(attention)["project"](x)
    for got, want in zip(found, expected, strict=True):
        assert (got.float() - want).norm() / want.norm() < 2e-3
    assert "project" not in vars(attention)


def test_an_adapter_that_can_not_be_put_on_leaves_the_base_as_it_was(made, monkeypatch):
    base = loading.load_base(TINY)
    modules = dict(base.named_modules())

    def full(*_):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(adapter, "set_peft_model_state_dict", full)
    with pytest.raises(torch.OutOfMemoryError), adapter.put_on(base, made("dora")[0], TINY):
        pass
    monkeypatch.undo()
    assert dict(base.named_modules()) == modules and not hasattr(base, "peft_config")
    with adapter.put_on(base, made("plain")[0], TINY) as lora:
        assert ours(lora) == made("plain")[2]


@pytest.mark.parametrize("kind", OF_EXPERTS)
def test_adapters_of_experts_are_refused_in_4_bits_with_the_true_cause(made, kind):
    folder = made(kind)[0]
    with pytest.raises(AdapterError, match="adapts the experts.*4 bits"):
        check_adapter(folder, TINY, four_bit=True)
    with pytest.raises(inputs.InputError, match="adapts the experts"):
        inputs.usable_adapter(folder, TINY, four_bit=True)


def old_experts(folder):
    """An adapter of transformers 4, whose experts had layers w1, w2 and w3 of their own."""
    train(folder)
    edit(folder, target_modules=[*ATTENTION, "w1", "w2", "w3"])
    tensors = load_file(folder / WEIGHTS)
    for layer in range(5):
        for expert in range(4):
            for name, (rows, columns) in dict(w1=(256, 192), w2=(192, 256), w3=(256, 192)).items():
                place = f"base_model.model.model.layers.{layer}.block_sparse_moe"
                place += f".experts.{expert}.{name}"
                tensors[f"{place}.lora_A.weight"] = 0.1 * torch.randn(4, columns)
                tensors[f"{place}.lora_B.weight"] = 0.1 * torch.randn(rows, 4)
    save_file(tensors, folder / WEIGHTS, {"format": "pt"})
    return folder


def test_experts_of_transformers_4_are_peft_s_in_16_bits_and_refused_in_4(tmp_path):
    folder = old_experts(tmp_path / "a")
    with pytest.raises(
        AdapterError, match=r"adapts the experts.*experts\.0\.w1.*w1, w2, w3 of transformers 4"
    ):
        check_adapter(folder, TINY, four_bit=True)
    check_adapter(folder, TINY)
    expected = logits(PeftModel.from_pretrained(loading.load_base(TINY), folder).eval())
    assert torch.allclose(
        logits(load_adapter(loading.load_base(TINY), folder, TINY)), expected, atol=1e-5
    )


@pytest.mark.parametrize("way", ["pissa", "olora", "loftq", "eva", "orthogonal"])
def test_an_ordinary_adapter_is_not_begun_anew_whatever_way_its_config_names(copy, made, way):
    """As a tool leaves it that took the difference out, or trained on a base changed and saved."""
    edit(copy, init_lora_weights=way, loftq_config={})
    check_adapter(copy, TINY)
    lora = load_adapter(loading.load_base(TINY), copy, TINY)
    assert torch.allclose(logits(lora), made("plain")[1], atol=1e-4)
    load_adapter(loading.load_base(TINY, torch.bfloat16, True), copy, TINY)


def test_what_began_at_random_from_the_base_is_refused_in_any_precision(tmp_path):
    train(tmp_path / "a", init_lora_weights="pissa_niter_16", size=0.001)
    with pytest.raises(
        AdapterError, match="init_lora_weights='pissa_niter_16'.*path_initial_model"
    ):
        check_adapter(tmp_path / "a", TINY)


@pytest.mark.parametrize("way", ["corda", "lora_ga"])
def test_a_way_to_begin_that_needs_its_data_is_refused_by_name(copy, way):
    edit(copy, init_lora_weights=way)
    with pytest.raises(AdapterError, match=f"init_lora_weights='{way}'.*path_initial_model"):
        check_adapter(copy, TINY)


@pytest.mark.parametrize(
    "change",
    [
        lambda n: n.replace("lora_A.", "lora_A.default.").replace("lora_B.", "lora_B.default."),
        lambda n: n.replace("lora_A.", "lora_A.rewrite.").replace("lora_B.", "lora_B.rewrite."),
        lambda n: "module." + n,
        lambda n: n.replace("model.layers", "model._orig_mod.layers"),
        lambda n: n.replace(".self_attn", "._fsdp_wrapped_module.self_attn"),
        lambda n: "_orig_mod.module." + n.replace("lora_A.", "lora_A.default."),
        lambda n: n.removeprefix("base_model.model."),
    ],
)
def test_names_that_wrappers_and_other_tools_leave_are_understood(copy, made, change):
    rename(copy, change)
    check_adapter(copy, TINY)
    assert torch.equal(logits(load_adapter(loading.load_base(TINY), copy, TINY)), made("plain")[1])


@pytest.mark.parametrize("kind", ["dora", "lora_bias", "embed_tokens", "modules_to_save"])
def test_a_raw_state_dict_of_any_kind_is_understood(made, tmp_path, kind):
    """Names as they are in the model, with the adapter's own in them."""
    lora = train(tmp_path / "adapter", **KINDS[kind])
    words = ("lora_", "modules_to_save")
    state = {
        f"module.{n}": t.clone()
        for n, t in lora.state_dict().items()
        if any(word in n for word in words)
    }
    save_file(state, tmp_path / "adapter" / WEIGHTS, {"format": "pt"})
    check_adapter(tmp_path / "adapter", TINY)
    found = load_adapter(loading.load_base(TINY), tmp_path / "adapter", TINY)
    assert torch.equal(logits(found), made(kind)[1])


def test_two_adapters_in_one_file_are_refused(copy):
    tensors = load_file(copy / WEIGHTS)
    both = {
        n.replace("lora_A.", f"lora_A.{a}."): t.clone() for n, t in tensors.items() for a in "ab"
    }
    save_file(both, copy / WEIGHTS)
    with pytest.raises(
        AdapterError, match=r"several adapters .*lora_A\.a\.weight.*lora_A\.b\.weight"
    ):
        check_adapter(copy, TINY)


def test_the_adapter_of_2024_that_this_design_comes_from_is_used_and_not_published(tmp_path):
    """peft 0.9's config, word for word but for the numbers of the tiny model."""
    folder = tmp_path / "adapter"
    lora = train(folder, r=16, lora_alpha=64, lora_dropout=0.1)
    path = "/kaggle/input/mixtral/pytorch/8x7b-instruct-v0.1-hf/1"
    (folder / CONFIG).write_text(
        json.dumps(
            {
                "alpha_pattern": {},
                "auto_mapping": None,
                "base_model_name_or_path": path,
                "bias": "none",
                "fan_in_fan_out": False,
                "inference_mode": True,
                "init_lora_weights": True,
                "layer_replication": None,
                "layers_pattern": None,
                "layers_to_transform": None,
                "loftq_config": {},
                "lora_alpha": 64,
                "lora_dropout": 0.1,
                "megatron_config": None,
                "megatron_core": "megatron.core",
                "modules_to_save": None,
                "peft_type": "LORA",
                "r": 16,
                "rank_pattern": {},
                "revision": None,
                "target_modules": ["q_proj", "v_proj", "o_proj", "k_proj"],
                "task_type": "CAUSAL_LM",
                "use_dora": False,
                "use_rslora": False,
            }
        )
    )
    assert inputs.usable_adapter(folder, TINY) == folder
    assert check_adapter(folder, TINY)["base"] == path
    assert torch.equal(logits(load_adapter(loading.load_base(TINY), folder, TINY)), logits(lora))
    with pytest.raises(AdapterError, match="local path.*mixtral/pytorch"):
        adapter.check_to_publish(folder)


# --- what lies beside, and the base's name ------------------------------------------------------


@pytest.mark.parametrize(
    "name",
    [
        "/home/me/mixtral", "~/models/x", "C:\\models\\mixtral", "./out", None, "",
        "mistral-ai/mixtral/transformers/8x7b-instruct-v0.1/1",
        "https://huggingface.co/mistralai/Mixtral-8x7B-Instruct-v0.1",
        "mistralai/Mixtral-8x7B-v0.1", "8x7b", "/work/llama-factory/mixtral/out", "01-ai/Yi-6B",
        "deepseek-ai/deepseek-llm-7b-base",
        "nomic-ai/gpt4all-13b",
    ],
)  # fmt: skip
def test_any_name_of_the_base_is_used_and_said(copy, name, capsys):
    edit(copy, base_model_name_or_path=name)
    assert check_adapter(copy, TINY)["base"] == name
    assert inputs.usable_adapter(copy, TINY) == copy
    assert repr(name) in capsys.readouterr().out
    load_adapter(loading.load_base(TINY), copy, TINY)


def test_files_beside_the_two_are_ignored_and_named_and_not_sent(copy, capsys):
    for name in ("README.md", "tokenizer.json", "chat_template.jinja", "trainer_state.json"):
        (copy / name).write_text("x")
    for name in ("training_args.bin", "optimizer.pt", "adapter_model.bin"):
        (copy / name).write_bytes(b"cos\nsystem\n(S'exit 1'\ntR.")
    (copy / "checkpoint-10").mkdir()
    edit(copy, base_model_name_or_path="tiny-mixtral", unsloth_fixed=True)
    about = check_adapter(copy, TINY)
    assert about["ignored"] == [
        "README.md",
        "adapter_model.bin",
        "chat_template.jinja",
        "checkpoint-10",
        "optimizer.pt",
        "tokenizer.json",
        "trainer_state.json",
        "training_args.bin",
        "adapter_config.json: unsloth_fixed",
    ]
    load_adapter(loading.load_base(TINY), copy, TINY)
    capsys.readouterr()
    content, details = adapter_content(copy)
    assert sorted(content.files) == [CONFIG, WEIGHTS] and details["base"] == "tiny-mixtral"
    assert "not sent: README.md, adapter_model.bin" in capsys.readouterr().out


def test_a_pickle_alone_is_refused(copy):
    (copy / WEIGHTS).rename(copy / "adapter_model.bin")
    with pytest.raises(AdapterError, match="pickle.*not opened: save it as safetensors"):
        check_adapter(copy, TINY)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("layer_replication", [[0, 3], [1, 5]]),
        ("alora_invocation_tokens", [1, 2]),
        ("use_qalora", True),
        ("peft_type", "IA3"),
        ("peft_type", "PROMPT_TUNING"),
        ("r", 0),
        ("target_modules", []),
        ("target_modules", ["c_attn"]),
        ("target_modules", "("),
        ("base_model_name_or_path", 3),
    ],
)
def test_what_nothing_computes_is_refused_by_name_alike_in_use_and_publishing(copy, name, value):
    edit(copy, **{"base_model_name_or_path": "tiny-mixtral"} | {name: value})
    with pytest.raises(AdapterError, match=f"{name}|c_attn|another base"):
        check_adapter(copy, TINY)
    with pytest.raises(inputs.InputError, match="allow_base"):
        inputs.usable_adapter(copy, TINY)
    if name != "target_modules":  # which only a base can tell
        with pytest.raises(AdapterError, match=name):
            adapter_content(copy)


def test_embeddings_of_a_resized_vocabulary_are_ignored_where_they_are_the_base_s_own(copy, made):
    tensors = load_file(copy / WEIGHTS)
    state = load_file(TINY / "model.safetensors")
    more = torch.randn(1, 192)
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        tensors[f"base_model.model.{name}"] = torch.cat([state[name].float(), more])
    save_file(tensors, copy / WEIGHTS)
    assert len(check_adapter(copy, TINY)["ignored"]) == 3
    assert torch.equal(logits(load_adapter(loading.load_base(TINY), copy, TINY)), made("plain")[1])
    tensors["base_model.model.lm_head.weight"][7] += 1
    save_file(tensors, copy / WEIGHTS)
    with pytest.raises(AdapterError, match="has besides 1 tensors.*lm_head.weight"):
        check_adapter(copy, TINY)


# --- witnesses of the base ----------------------------------------------------------------------


@pytest.fixture(scope="module")
def mistral(tmp_path_factory):
    """A dense model whose attention has the tiny Mixtral's shapes, as Mistral-7B has Mixtral's."""
    config = json.loads((TINY / "config.json").read_text())
    kept = {
        name: config[name]
        for name in config
        if name not in ("architectures", "model_type", "dtype")
    }
    folder = tmp_path_factory.mktemp("mistral")
    AutoModelForCausalLM.from_config(MistralConfig(**kept)).save_pretrained(folder)
    return folder


@pytest.mark.parametrize(
    "name",
    [
        "mistralai/Mixtral-8x7B-Instruct-v0.1",
        "/kaggle/input/mixtral/pytorch/8x7b-instruct-v0.1-hf/1",
        "https://huggingface.co/mistralai/Mixtral-8x7B-Instruct-v0.1",
        "cognitivecomputations/dolphin-2.5-mixtral-8x7b",
        "/home/mistral-ai/models/MIXTRAL",
    ],
)
def test_an_adapter_that_names_mixtral_is_refused_on_a_mistral(copy, mistral, name):
    edit(copy, base_model_name_or_path=name)
    with pytest.raises(
        AdapterError, match="names its base .*ixtral.*type mistral|MIXTRAL.*type mistral"
    ):
        check_adapter(copy, mistral)
    edit(copy, base_model_name_or_path="mistralai/Mistral-7B-Instruct-v0.2")
    check_adapter(copy, mistral)
    with pytest.raises(AdapterError, match="names its base .*Mistral-7B.*type mixtral"):
        check_adapter(copy, TINY)


def test_the_class_and_the_type_of_the_base_are_compared_where_the_adapter_has_them(copy, mistral):
    edit(copy, base_model_name_or_path=None)
    check_adapter(copy, mistral)  # nothing tells
    edit(copy, auto_mapping={"base_model_class": "MixtralForCausalLM", "parent_library": "x"})
    with pytest.raises(AdapterError, match="class MixtralForCausalLM.*MistralForCausalLM"):
        check_adapter(copy, mistral)
    check_adapter(copy, TINY)
    edit(copy, auto_mapping=None)
    rename(copy, lambda name: name, base_model_type="mixtral")
    with pytest.raises(AdapterError, match="model_type mixtral.*mistral"):
        check_adapter(copy, mistral)


def test_the_fingerprint_is_compared_before_anything_loads(tmp_path, copy):
    lora = load_adapter(loading.load_base(TINY), copy, TINY)
    folder = adapter.save_adapter(lora, tmp_path / "saved")
    assert stored_fingerprint(TINY) == base_fingerprint(loading.load_base(TINY))
    check_adapter(folder, TINY)
    other = shutil.copytree(TINY, tmp_path / "other")
    state = load_file(other / "model.safetensors")
    state["lm_head.weight"] += 0.1
    save_file(state, other / "model.safetensors", {"format": "pt"})
    with pytest.raises(AdapterError, match="trained on another base: its fingerprint"):
        check_adapter(folder, other)


@pytest.mark.parametrize(
    ("path", "name"),
    [
        ("mixtral/pytorch/8x7b-instruct-v0.1-hf/1", "8x7b-instruct-v0.1-hf"),
        ("models/mistral-ai/mixtral/pytorch/8x7b-instruct-v0.1-hf/12", "8x7b-instruct-v0.1-hf"),
        ("hub/models--mistralai--Mixtral-8x7B-v0.1/snapshots/985a", "mistralai/Mixtral-8x7B-v0.1"),
        ("data/mixtral", "mixtral"),
    ],
)  # fmt: skip
def test_the_base_s_name_does_not_depend_on_where_it_is_mounted(tmp_path, path, name):
    folder = shutil.copytree(TINY, tmp_path / path)
    assert loading.base_id(folder) == name
    (tmp_path / "link").symlink_to(folder)
    assert loading.base_id(tmp_path / "link") in (name, "link")


def test_a_resume_depends_on_the_base_s_weights_and_not_on_its_place_or_peft_s_version(copy):
    lora = load_adapter(loading.load_base(TINY), copy, TINY)
    config, key = lora.peft_config["default"], adapter.training_key(lora)
    assert set(key["lora"]) == {"task_type", "peft_type", "target_modules", "r", "lora_alpha"} - {
        "peft_type"
    }
    config.peft_version, config.base_model_name_or_path = "9.9.9", "/elsewhere/1"
    config.an_option_of_tomorrow = None
    assert adapter.training_key(lora) == key
    config.lora_dropout = 0.3
    assert adapter.training_key(lora)["lora"] != key["lora"]
    lora.get_base_model().lm_head.weight.data[0, 0] += 1
    assert adapter.training_key(lora)["base"] != key["base"]


# --- merging ------------------------------------------------------------------------------------


@pytest.fixture
def two(made):
    """A model with two adapters, one of them on the queries alone."""
    lora = load_adapter(loading.load_base(TINY), made("plain")[0], TINY)
    lora.add_adapter("other", LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False))
    return lora.eval()


def test_two_active_adapters_merge_as_they_compute(two):
    two.base_model.set_adapter(["default", "other"])
    expected = logits(two)
    with merging.merged(two) as fast:
        assert (logits(fast) - expected).norm() / expected.norm() < 1e-5
        assert type(fast.model.layers[0].self_attn.k_proj) is torch.nn.Linear
    two.set_adapter("other")
    expected = logits(two)
    with merging.merged(two) as fast:
        assert (logits(fast) - expected).norm() / expected.norm() < 1e-5


@pytest.mark.parametrize("size", [1.0, 1e-4])
def test_disabled_adapters_stay_disabled(made, size, capsys):
    lora = load_adapter(loading.load_base(TINY), made("plain")[0], TINY)
    for name, parameter in lora.named_parameters():
        if "lora_B" in name:
            parameter.data *= size  # a small one would pass the check of the logits
    lora.base_model.disable_adapter_layers()
    expected = logits(lora)
    with merging.merged(lora) as same:
        assert torch.equal(logits(same), expected)
    assert "20 of 20 adapted layers stay unmerged" in capsys.readouterr().out


def test_what_peft_merged_already_is_not_merged_again(made):
    lora = load_adapter(loading.load_base(TINY), made("plain")[0], TINY)
    lora.merge_adapter()
    expected = logits(lora)
    with merging.merged(lora) as same:
        assert torch.equal(logits(same), expected)


def test_a_merge_that_would_change_the_answers_leaves_them_to_the_adapter_and_says_so(
    made, monkeypatch, capsys
):
    folder, _, answers = made("plain")
    lora = load_adapter(loading.load_base(TINY), folder, TINY)
    delta = merging.Linear.get_delta_weight
    monkeypatch.setattr(merging.Linear, "get_delta_weight", lambda *args: delta(*args) + 0.5)
    assert ours(lora) == answers
    assert (
        "stays beside the weights, unmerged: merging the adapter moved the logits"
        in capsys.readouterr().out
    )


def test_merged_weights_that_overflow_leave_the_adapter_unmerged(made, capsys):
    lora = load_adapter(loading.load_base(TINY, torch.float16), made("plain")[0], TINY)
    attention = lora.get_base_model().model.layers[4].self_attn
    # what o_proj would multiply is 0, so that nothing but the merged weights overflows
    attention.v_proj.get_base_layer().weight.data[0] = 0
    attention.v_proj.lora_B["default"].weight.data[0] = 0
    layer = attention.o_proj
    layer.lora_A["default"].weight.data.zero_()
    layer.lora_A["default"].weight.data[0, 0] = 300.0
    layer.lora_B["default"].weight.data[:, 0] = 300.0  # 90,000 times 4 is beyond fp16
    with ready(lora) as prepared:
        assert not prepared.plan.merged
    said = capsys.readouterr().out
    assert re.search(r"unmerged.*layers\.4\.self_attn\.o_proj.*not finite in float16", said), said
