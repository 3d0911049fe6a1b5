"""4-bit models with 4-bit experts: registered with transformers, loaded, checked, saved.

transformers 5 keeps a layer's experts in two 3-D parameters, which its own 4-bit loading leaves in
16 bit (97% of Mixtral). `register()` adds a quantiser that turns them into NF4 as the loading path
merges them, one projection of one layer at a time, and a forward that computes with them. The rest
is bitsandbytes' own 4-bit loading: linear layers become `Linear4bit`; routers, norms, embeddings
and the head stay in 16 bit. A dense model is loaded like bitsandbytes does it.
"""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import bitsandbytes as bnb
import bitsandbytes.functional as bnb_functional
import torch
from torch import nn
from transformers import BitsAndBytesConfig, PreTrainedModel
from transformers.core_model_loading import ConversionOps, WeightConverter
from transformers.integrations.accelerate import get_device
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS
from transformers.quantizers.auto import (
    AUTO_QUANTIZATION_CONFIG_MAPPING,
    AUTO_QUANTIZER_MAPPING,
    register_quantization_config,
    register_quantizer,
)
from transformers.quantizers.quantizer_bnb_4bit import Bnb4BitHfQuantizer
from transformers.quantizers.quantizers_utils import get_module_from_name

from prompt_recovery.engine.forward import experts_forward
from prompt_recovery.engine.storage import (
    BLOCK,
    PIECES,
    PROJECTIONS,
    by_formula,
    meta_pieces,
    quantise,
    share_workspace,
)

METHOD = "prompt_recovery_nf4"
GATE = "gate"  # how the names of routers and of shared experts' gates end
LAYOUT = "nf4-per-expert-1"  # of the saved tensors: another layout gets another name


class Nf4Error(ValueError):
    """A model or folder that is not, or can't become, 4-bit the way this module does it."""


def fused_experts(module: nn.Module) -> bool:
    """Whether a module has transformers' fused experts, in 16 bit or already in 4."""
    return hasattr(module, "is_transposed") and any(
        hasattr(module, name) or hasattr(module, f"{name}_packed")
        for name in (*PROJECTIONS, "up_proj")
    )


def becomes_four_bit(name: str, module: nn.Module, head: nn.Module | None) -> bool:
    """Whether a linear layer is one of those that 4-bit loading changes: not the head, a router or
    gate, or a LoRA's."""
    return (
        isinstance(module, nn.Linear)
        and module is not head
        and not name.endswith(GATE)
        and "lora_" not in name
    )


def check_supported(name: str, experts: nn.Module) -> None:
    """Raises Nf4Error for experts in another form than gate_up_proj [E, 2I, H] and down_proj [E, H,
    I]."""
    flags = ("is_transposed", "has_bias", "has_post_expert_norm", "_is_expert_parallel")
    odd = [flag for flag in flags if getattr(experts, flag, False)]
    odd += (
        []
        if experts.has_gate and experts.is_concatenated
        else ["no concatenated gate and up projections"]
    )
    for projection in PROJECTIONS:
        weight = getattr(experts, projection, None)
        if weight is not None and (weight.shape[1:].numel() % BLOCK or weight.shape[2] % 2):
            odd.append(
                f"{projection} {tuple(weight.shape)}: an expert must have a multiple of {BLOCK} "
                "weights"
            )
    if odd:
        raise Nf4Error(
            f"The experts {name} can't become 4-bit ({', '.join(odd)}); load this model with "
            "four_bit=False."
        )


class Nf4Config(BitsAndBytesConfig):
    """The `quantization_config` for `from_pretrained`: NF4 with double quantisation, blocks of 64,
    experts included.
    base: public name of the model that is quantised, kept in the saved folder. merge_on_cpu: a
    layer's experts, which the hub has one by one, are put together in the host's memory, and go to
    the GPU one at a time.

    Raises Nf4Error for the config of another layout (a folder saved by another version).
    """

    def __init__(self, layout: str = LAYOUT, base: str = "", merge_on_cpu: bool = False, **_: Any):
        if layout != LAYOUT:
            raise Nf4Error(
                f"The folder's 4-bit layout is {layout!r}, this version reads {LAYOUT!r}: quantise "
                "the 16-bit model again."
            )
        super().__init__(
            load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True
        )
        self.quant_method = METHOD
        self.layout = layout
        self.base = base
        self.merge_on_cpu = merge_on_cpu

    def to_dict(self) -> dict[str, Any]:
        # without load_in_4bit, by which transformers would take the folder for one of bitsandbytes'
        # own layout
        return {
            "quant_method": METHOD,
            "layout": self.layout,
            "base": self.base,
            "quant_type": "nf4",
            "block": BLOCK,
        }

    def to_diff_dict(self) -> dict[str, Any]:
        return self.to_dict()


class _QuantiseOp(ConversionOps):
    """Called by the loading path with one merged parameter: an experts' projection or a linear
    layer's weight."""

    def __init__(self, stock: ConversionOps, places: dict[str, Any] | None):
        self.stock, self.places = stock, places

    def convert(self, input_dict, full_layer_name=None, model=None, missing_keys=None, **kwargs):
        result: dict[str, torch.Tensor] = {}
        for name, value in input_dict.items():
            module, attribute = get_module_from_name(model, name)
            if not fused_experts(module):
                result |= self.stock.convert(
                    {name: value}, full_layer_name=name, model=model, **kwargs
                )
                continue
            weight = value[0] if isinstance(value, list) else value
            expected = tuple(getattr(module, attribute).shape)
            if tuple(weight.shape) != expected:
                raise Nf4Error(
                    f"{name} has shape {tuple(weight.shape)} in the checkpoint, {expected} in the "
                    "model."
                )
            place = (
                get_device(self.places, name, valid_torch_device=True)
                if self.places
                else weight.device
            )
            pieces = {
                f"{name}_{piece}": tensor
                for piece, tensor in quantise(weight, torch.device(place)).items()
            }
            result |= {
                key: nn.Parameter(tensor, requires_grad=False) for key, tensor in pieces.items()
            }
            delattr(module, attribute)
            module._is_hf_initialized = True
            if missing_keys is not None:
                missing_keys.discard(name)
        return result


class Nf4Quantizer(Bnb4BitHfQuantizer):
    """bitsandbytes' quantiser of transformers, and the experts."""

    @staticmethod
    def get_modules_to_not_convert(
        model, skip_modules=None, keep_in_fp32_modules=None, add_default_skips=False
    ):
        return Bnb4BitHfQuantizer.get_modules_to_not_convert(
            model, [*(skip_modules or []), GATE], keep_in_fp32_modules, add_default_skips=True
        )

    def _process_model_before_weight_loading(self, model, device_map=None, **kwargs):
        self.quantization_config.bnb_4bit_compute_dtype = model.dtype
        self.places = device_map
        super()._process_model_before_weight_loading(model, device_map=device_map, **kwargs)
        for name, module in model.named_modules():
            if not fused_experts(module):
                continue
            check_supported(name, module)
            for projection in PROJECTIONS:
                for piece, tensor in meta_pieces(getattr(module, projection)).items():
                    module.register_parameter(
                        f"{projection}_{piece}", nn.Parameter(tensor, requires_grad=False)
                    )
                if self.pre_quantized:
                    delattr(module, projection)
                    module._is_hf_initialized = True

    def _process_model_after_weight_loading(self, model, **kwargs):
        model = super()._process_model_after_weight_loading(model, **kwargs)
        dtype = self.quantization_config.bnb_4bit_compute_dtype
        for module in model.modules():
            if isinstance(module, bnb.nn.Linear4bit):
                # else, on CPUs with AVX-512 BF16, the first answer repacks the weights and rounds
                # their scales
                module.support_avx512bf16_for_cpu = False
                module.compute_dtype = dtype
                # else check_quantised names it
                if getattr(module.weight, "quant_state", None) is not None:
                    module.weight.quant_state.dtype = dtype
                continue
            # a saved folder's 16-bit parts come as they were stored, whatever dtype is asked for
            for parameter in module.parameters(recurse=False):
                if parameter.is_floating_point():
                    parameter.data = parameter.data.to(dtype)
        if any(fused_experts(module) for module in model.modules()):
            model.set_experts_implementation(METHOD)
            share_workspace(model)
        return model

    def param_needs_quantization(self, model, param_name, **kwargs):
        module, name = get_module_from_name(model, param_name)
        if fused_experts(module):
            return name in PROJECTIONS
        return super().param_needs_quantization(model, param_name, **kwargs)

    def param_element_size(self, model, param_name, param):
        # the warm-up of the allocator counts the experts once: as their 3-D parameters, not as the
        # pieces to come
        if not self.pre_quantized and param_name.endswith(
            tuple(f"proj_{piece}" for piece in PIECES)
        ):
            return 0.0
        return super().param_element_size(model, param_name, param)

    def get_quantize_ops(self):
        return _QuantiseOp(super().get_quantize_ops(), self.places)

    # transformers 5.23 gives the model too
    def update_weight_conversions(self, weight_conversions, *args):
        conversions = copy.deepcopy(super().update_weight_conversions(weight_conversions, *args))
        for conversion in conversions:
            if isinstance(conversion, WeightConverter) and self.quantization_config.merge_on_cpu:
                conversion.force_cpu = True
        return conversions


def register() -> None:
    """Make transformers know the quantiser, its config and the experts' forward; calling it again
    changes nothing."""
    if METHOD not in AUTO_QUANTIZATION_CONFIG_MAPPING:
        register_quantization_config(METHOD)(Nf4Config)
    if METHOD not in AUTO_QUANTIZER_MAPPING:
        register_quantizer(METHOD)(Nf4Quantizer)
    ALL_EXPERTS_FUNCTIONS.register(METHOD, experts_forward)


def check_folder(model_dir: str | Path) -> bool:
    """Whether the folder holds a model in this module's 4-bit layout, not an unquantised one.
    Raises Nf4Error for every other quantisation, before anything loads."""
    found = json.loads((Path(model_dir) / "config.json").read_text()).get("quantization_config")
    if not found:
        return False
    if found.get("quant_method") != METHOD or found.get("layout") != LAYOUT:
        raise Nf4Error(
            f"{model_dir} is quantised already, as {found.get('quant_method')!r} with layout "
            f"{found.get('layout')!r}; only {METHOD!r} with {LAYOUT!r} can be read. Give the "
            "folder of the 16-bit model (a checkpoint that transformers 4 saved in 4 bits does "
            "not load in transformers 5 either) or save it again with this version."
        )
    return True


def _computes_right(weight: bnb.nn.Params4bit) -> bool:
    """Whether bitsandbytes gives the values of a linear layer's 4-bit weight: see `by_formula`."""
    state = weight.quant_state
    if weight.device.type != "cpu" or state.shape[-1] % BLOCK == 0:
        return True
    scale = bnb_functional.dequantize_blockwise(state.absmax, state.state2) + state.offset
    values = bnb_functional.dequantize_4bit(weight.data, state)
    return torch.equal(values.flatten(), by_formula(weight.data, scale, values.dtype))


def check_quantised(model: PreTrainedModel) -> None:
    """Raises Nf4Error, naming them, if any experts or linear layers that should be 4-bit are
    not."""
    wrong = []
    for name, module in model.named_modules():
        if fused_experts(module):
            for projection in PROJECTIONS:
                packed = getattr(module, f"{projection}_packed", None)
                if (
                    hasattr(module, projection)
                    or packed is None
                    or packed.dtype != torch.uint8
                    or packed.is_meta
                ):
                    wrong.append(f"{name}.{projection}")
        elif isinstance(module, bnb.nn.Linear4bit):
            state = getattr(module.weight, "quant_state", None)
            if (
                state is None
                or state.quant_type != "nf4"
                or not state.nested
                or module.weight.dtype != torch.uint8
            ):
                wrong.append(f"{name}.weight")
            elif not _computes_right(module.weight):
                raise Nf4Error(
                    f"{name} has rows of {module.in_features} weights, no multiple of {BLOCK}, "
                    f"which bitsandbytes {bnb.__version__} computes wrongly on this CPU. Load "
                    "with four_bit=False, or on a GPU."
                )
        elif becomes_four_bit(name, module, model.get_output_embeddings()):
            wrong.append(f"{name}.weight")
    if wrong:
        shown = ", ".join(wrong[:8]) + (f" and {len(wrong) - 8} more" if len(wrong) > 8 else "")
        raise Nf4Error(
            f"These parts should be in 4 bits and are not: {shown}. Load with "
            "quantization_config=Nf4Config() after register(); if it persists, this model's "
            "layers are of a kind that is not supported: four_bit=False."
        )
