"""The private names of other libraries that we lean on (docs/ARCHITECTURE.md lists them): one test
a name, so that a pin that moves says which broke."""

import ast
import functools
import importlib
import inspect
import re

import pytest
import torch
from accelerate.hooks import AlignDevicesHook, add_hook_to_module
from conftest import ROOT
from torch import nn

from prompt_recovery.engine.quantiser import Nf4Quantizer
from prompt_recovery.trainer import RowTrainer

NAMES = [  # module, attribute path in it
    ("transformers.integrations.moe", "ALL_EXPERTS_FUNCTIONS"),
    ("transformers.integrations.moe", "_default_apply_gate"),
    ("transformers.core_model_loading", "ConversionOps"),
    ("transformers.core_model_loading", "WeightConverter.force_cpu"),
    ("transformers.integrations.accelerate", "get_device"),
    ("transformers.integrations.sdpa_attention", "sdpa_attention_forward"),
    ("transformers.quantizers.quantizer_bnb_4bit", "Bnb4BitHfQuantizer.update_weight_conversions"),
    ("transformers.quantizers.quantizer_bnb_4bit", "Bnb4BitHfQuantizer.param_element_size"),
    ("transformers.quantizers.quantizers_utils", "get_module_from_name"),
    ("transformers.trainer_pt_utils", "get_length_grouped_indices"),
    ("transformers", "Trainer._save_checkpoint"),
    ("transformers", "Trainer._load_best_model"),
    ("transformers", "Trainer._save"),
    ("transformers", "Trainer._save_rng_state"),
    ("transformers", "Trainer._get_train_sampler"),
    ("transformers", "PreTrainedModel._supports_sdpa"),
    ("transformers.models.mixtral.modeling_mixtral", "MixtralExperts._apply_gate"),
    (
        "transformers.quantizers.quantizer_bnb_4bit",
        "Bnb4BitHfQuantizer._process_model_before_weight_loading",
    ),
    (
        "transformers.quantizers.quantizer_bnb_4bit",
        "Bnb4BitHfQuantizer._process_model_after_weight_loading",
    ),
    ("peft.tuners.tuners_utils", "BaseTunerLayer"),
    ("bitsandbytes.functional", "create_dynamic_map"),
    ("bitsandbytes.functional", "get_4bit_type"),
    ("torch", "_C._accelerator_setAllocatorSettings"),
    (
        "peft.utils.transformers_weight_conversion",
        "convert_peft_adapter_state_dict_for_transformers",
    ),
    ("pandas._libs.parsers", "STR_NA_VALUES"),
]


@pytest.mark.parametrize("module, path", NAMES)
def test_is_there(module, path):
    found = functools.reduce(getattr, path.split("."), importlib.import_module(module))
    assert found is not None


def test_bitsandbytes_operator():
    import bitsandbytes  # noqa: F401  (registers it)

    arguments = [
        each.name for each in torch.ops.bitsandbytes.dequantize_4bit.default._schema.arguments
    ]
    assert arguments == ["A", "absmax", "blocksize", "quant_type", "shape", "dtype"]
    assert hasattr(torch.ops.bitsandbytes.dequantize_4bit, "out")


@pytest.mark.parametrize(
    "name",
    [
        "lora_A",
        "lora_B",
        "scaling",
        "lora_variant",
        "lora_bias",
        "active_adapters",
        "disable_adapters",
        "merged",
        "fan_in_fan_out",
    ],
)
def test_peft_layers_have(name):
    from peft import LoraConfig
    from peft.tuners.lora import Linear

    assert hasattr(Linear(nn.Linear(4, 4), "default", config=LoraConfig(r=2), r=2), name)


def test_accelerate_s_hooks_stand_as_a_partial_before_the_old_forward():
    module = nn.Linear(2, 2)
    own = module.forward
    add_hook_to_module(module, AlignDevicesHook())
    assert (
        isinstance(vars(module)["forward"], functools.partial)
        and vars(module)["_old_forward"] == own
        and isinstance(module._hf_hook, AlignDevicesHook)
    )


def test_arguments_have_a_number_of_cards():
    from transformers import TrainingArguments

    arguments = TrainingArguments(use_cpu=True)
    arguments._n_gpu = 7
    assert arguments.n_gpu == 7


def test_a_parameter_that_was_loaded_is_not_made_anew():
    from transformers import initialization

    module = nn.Linear(2, 2)
    module.weight._is_hf_initialized = True
    before = module.weight.clone()
    with initialization.guard_torch_init_functions():
        nn.init.zeros_(module.weight)
    assert module.weight.equal(before)


def test_modules_have_their_children_and_tensors_the_number_of_their_changes():
    module = nn.Sequential(nn.Linear(2, 2))
    assert [*module._modules] == ["0"]
    module._modules = {}
    assert not [*module.children()]
    tensor = torch.zeros(1)
    before = tensor._version
    tensor += 1
    assert tensor._version > before


def test_triton_s_stages_can_be_hooked_and_a_compiled_kernel_launched():
    pytest.importorskip("triton")
    from triton import knobs
    from triton.backends.nvidia.compiler import CUDABackend, CUDAOptions
    from triton.compiler import CompiledKernel

    assert hasattr(CompiledKernel, "__getitem__")  # launches it on a grid
    assert "add_stages_inspection_hook" in dir(knobs.runtime) and hasattr(CUDAOptions, "arch")
    assert [*inspect.signature(CUDABackend.make_ptx).parameters][1:] == [
        "src",
        "metadata",
        "opt",
        "capability",
    ]


def test_the_list_is_the_one_of_the_docs():
    missing = {path.split(".")[-1] for _, path in NAMES} - listed()
    assert not missing


def test_no_private_name_of_another_library_is_missing_from_the_list():
    trees = [ast.parse(path.read_text()) for path in (ROOT / "prompt_recovery").rglob("*.py")]
    nodes = [node for tree in trees for node in ast.walk(tree)]
    ours = {node.name for node in nodes if isinstance(node, ast.FunctionDef | ast.ClassDef)}
    ours |= {"_replace", "_fields"}  # of named tuples, and documented
    used = {node.attr for node in nodes if isinstance(node, ast.Attribute) if private(node.attr)}
    for own in (RowTrainer, Nf4Quantizer):  # methods that replace another library's
        above = {name for each in own.__mro__[1:] for name in vars(each)}
        ours -= above
        methods = {name for name, value in vars(own).items() if inspect.isfunction(value)}
        used |= {name for name in methods if private(name)} & above
    assert len(used) > 15 and used - ours - listed() == set()


def listed():
    text = (ROOT / "docs" / "ARCHITECTURE.md").read_text().split("## Private names")[1]
    return set(re.findall(r"\w+", text))


def private(name):
    return name.startswith("_") and not name.startswith("__")
