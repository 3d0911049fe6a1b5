import json
import shutil

import pytest
import torch
from conftest import TINY
from safetensors.torch import load_file, save_file
from tiny_models import with_lora

from prompt_recovery import adapter
from prompt_recovery.adapter_files import CONFIG, WEIGHTS, AdapterError, digests
from prompt_recovery.base import base_fingerprint
from prompt_recovery.engine import loading
from prompt_recovery.recipe import Format


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """An adapter with random weights, saved from a model whose vocabulary was resized."""
    base = loading.load_base(TINY)
    adapter.resize_input_embeddings(base, 2401)
    lora = adapter.add_lora(base, base="tiny-mixtral", r=4)
    torch.manual_seed(1)
    for name, parameter in lora.named_parameters():
        if "lora_B" in name:
            parameter.data.normal_(0, 0.05)
    folder = tmp_path_factory.mktemp("adapter") / "adapter"
    adapter.save_adapter(lora, folder, Format(style="json", system_placement="turn"))
    ids = torch.tensor([[1, 300, 400, 500]])
    with torch.inference_mode():
        return folder, ids, lora.eval()(ids).logits


def test_the_same_weights_give_the_same_bytes(tmp_path):
    """Else a run that was killed and went on has another sha256 than its evaluation."""
    lora = with_lora(loading.load_base(TINY))
    found = set()
    for n in range(4):
        folder = adapter.save_adapter(lora, tmp_path / str(n), Format(style="json"))
        found.add(digests(folder))
    assert len(found) == 1
    targets = json.loads((folder / CONFIG).read_text())["target_modules"]
    assert targets == ["k_proj", "o_proj", "q_proj", "v_proj"]
    assert adapter.check_adapter(folder, TINY)["style"] == "json"
    assert lora.peft_config["default"].inference_mode is False


@pytest.fixture
def copy(saved, tmp_path):
    return shutil.copytree(saved[0], tmp_path / "adapter")


def test_two_files_that_give_the_same_logits_on_the_unmodified_base(saved):
    folder, ids, logits = saved
    assert {path.name for path in folder.iterdir()} == {CONFIG, WEIGHTS}
    tensors = load_file(folder / WEIGHTS)
    assert all("lora_" in name for name in tensors) and len(tensors) == 5 * 4 * 2
    assert json.loads((folder / CONFIG).read_text())["base_model_name_or_path"] == "tiny-mixtral"
    assert str(TINY.parent) not in (folder / CONFIG).read_text()
    base = loading.load_base(TINY)
    loaded = adapter.load_adapter(base, folder, TINY)
    assert base.get_input_embeddings().num_embeddings == 2400
    assert {p.dtype for n, p in loaded.named_parameters() if "lora_" in n} == {torch.float32}
    assert not loaded.training and not any(p.requires_grad for p in loaded.parameters())
    with torch.inference_mode():
        assert torch.equal(loaded(ids).logits, logits)
        with loaded.disable_adapter():
            assert not torch.allclose(loaded(ids).logits, logits, atol=1e-3)
    assert adapter.check_adapter(folder, TINY) == {
        "base": "tiny-mixtral",
        "rank": 4,
        "alpha": 64,
        "target_modules": ["k_proj", "o_proj", "q_proj", "v_proj"],
        "parameters": sum(t.numel() for t in tensors.values()),
        "bytes": (folder / WEIGHTS).stat().st_size,
        "style": "json",
        "system_placement": "turn",
    }


def edit_config(folder, **changes):
    config = json.loads((folder / CONFIG).read_text())
    (folder / CONFIG).write_text(json.dumps(config | changes))


def edit_tensors(folder, change):
    tensors = load_file(folder / WEIGHTS)
    change(tensors)
    save_file(tensors, folder / WEIGHTS)


def drop(tensors):
    del tensors[sorted(tensors)[0]]


def add_head(tensors):
    tensors["base_model.model.lm_head.weight"] = torch.ones(2400, 192)


def poison(tensors):
    tensors[sorted(tensors)[0]][0, 0] = torch.nan


def silence(tensors):
    for name in tensors:
        if "lora_B" in name:
            tensors[name].zero_()


def miss_each_other(tensors):
    """lora_B is zero in all layers but the first, lora_A in the first: every product is zero."""
    for name in tensors:
        if ("lora_B" in name) != (".layers.0." in name):
            tensors[name].zero_()


@pytest.mark.parametrize(
    "break_it, message",
    [
        (
            lambda f: (f / WEIGHTS).unlink(),
            "must hold adapter_config.json and adapter_model.safetensors",
        ),
        (
            lambda f: (f / CONFIG).unlink(),
            "must hold adapter_config.json and adapter_model.safetensors",
        ),
        (lambda f: (f / WEIGHTS).rename(f / "adapter_model.bin"), "pickle"),
        (lambda f: (f / WEIGHTS).write_bytes(b"not safetensors"), "not a safetensors file"),
        (lambda f: (f / CONFIG).write_text("{"), "not a LoRA config"),
        (lambda f: edit_config(f, r=8), "in another shape"),
        (lambda f: edit_tensors(f, drop), "misses 1 tensors"),
        (lambda f: edit_tensors(f, add_head), "has besides 1 tensors.*lm_head"),
        (lambda f: edit_tensors(f, poison), "NaN"),
        (lambda f: edit_tensors(f, silence), "changes no logits"),
        (lambda f: edit_tensors(f, miss_each_other), "changes no logits"),
        (lambda f: edit_config(f, lora_alpha=0), "changes no logits"),
        (lambda f: edit_config(f, peft_type="IA3"), "not a LoRA config"),
        (lambda f: edit_config(f, peft_type="NEW"), "not a LoRA config"),
        (lambda f: (f / CONFIG).write_text("[]"), "not a LoRA config"),
    ],
)
def test_broken_adapters_are_refused_by_name(copy, break_it, message):
    break_it(copy)
    with pytest.raises(AdapterError, match=message):
        adapter.check_adapter(copy, TINY)


@pytest.mark.parametrize(
    "name", ["/home/me/mixtral", "~/mixtral", "out/models/mixtral", "C:\\mixtral"]
)
def test_a_local_path_as_the_base_s_name_is_not_published(copy, name):
    edit_config(copy, base_model_name_or_path=name)
    adapter.check_adapter(copy, TINY)
    with pytest.raises(AdapterError, match="local path"):
        adapter.check_to_publish(copy)


def test_rank_is_checked_without_the_base(copy):
    edit_config(copy, r=8)
    with pytest.raises(AdapterError, match="says rank 8, the tensors have \\[4\\]"):
        adapter.check_adapter(copy)


def test_another_base_of_the_same_shape_is_refused(copy):
    base = loading.load_base(TINY)
    base.get_output_embeddings().weight.data += 0.1
    with pytest.raises(AdapterError, match="trained on another base"):
        adapter.load_adapter(base, copy, TINY)


def test_a_diverged_adapter_is_not_saved_over_a_good_one(copy):
    lora = adapter.add_lora(loading.load_base(TINY), base="tiny-mixtral", r=4)
    next(p for n, p in lora.named_parameters() if "lora_A" in n).data[0, 0] = torch.inf
    good = (copy / WEIGHTS).read_bytes()
    with pytest.raises(AdapterError, match="NaN or infinity"):
        adapter.save_adapter(lora, copy)
    assert (copy / WEIGHTS).read_bytes() == good


def test_model_folders_are_checked_first(tmp_path):
    with pytest.raises(loading.ModelError, match="no config.json"):
        loading.load_base(tmp_path)
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "pytorch_model.bin").write_bytes(b"")
    with pytest.raises(loading.ModelError, match="pickle"):
        loading.load_base(tmp_path)
    assert loading.base_id(TINY) == "tiny-mixtral"


def test_the_fingerprint_of_a_head_of_mixtrals_size_stays_inside():
    # 262 MB: float32 can't count its weights
    head = torch.nn.Linear(4096, 32_000, bias=False, dtype=torch.float16)
    head.weight.data.view(-1)[-1] = 7.0

    class Base:
        def get_output_embeddings(self):
            return head

    found = base_fingerprint(Base())
    assert len(found) == 64 and found[-1] == 7.0 and found[0] == head.weight[0, 0].float().item()
