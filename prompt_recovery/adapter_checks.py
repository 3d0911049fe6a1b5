"""Whether an adapter belongs to a base and changes it, by all that files tell."""

from __future__ import annotations

import copy
import json
import re
import warnings
from pathlib import Path
from typing import NamedTuple

import torch
from peft import LoraConfig, PeftModel, get_peft_model, get_peft_model_state_dict
from peft.utils.transformers_weight_conversion import (
    convert_peft_adapter_state_dict_for_transformers,
)
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedModel

from prompt_recovery.adapter_files import (
    CONFIG,
    FINGERPRINT,
    MODEL_TYPE,
    WEIGHTS,
    AdapterError,
    peft_name,
    read_header,
    read_lora_config,
    read_tensors,
)
from prompt_recovery.base import (
    FINGERPRINT_TOLERANCE,
    load_config,
    stored_fingerprint,
    stored_weight,
)
from prompt_recovery.engine import loads_in_four_bit

# ways to begin that change the base's weights: such an adapter is a difference from these
# (loftq's are those in 4 bits: what they differ by from the 16-bit ones is what 4 bits cost anyway)
CHANGES_BASE = re.compile("pissa|olora|corda|lora_ga")
# families in the names of models, of those whose names say the model_type (Yi and DeepSeek may be
# llamas); what names the maker instead of the model says nothing
FAMILIES = re.compile("mixtral|mistral|llama|qwen|gemma|falcon|gpt2")
MAKERS = re.compile("mistral-?ai|mistral-community|meta-llama|llama-factory")


class Adapter(NamedTuple):
    """An adapter as it will be used: peft's config, tensors by peft's names, what the file's header
    says, and what lies there and is not used."""

    config: LoraConfig
    tensors: dict[str, torch.Tensor]
    header: dict[str, str]
    ignored: list[str]


def read_adapter(folder: Path, model_dir: str | Path | None, four_bit: bool | None) -> Adapter:
    """Raises AdapterError as `adapter.check_adapter` says."""
    if not folder.is_dir():
        raise AdapterError(
            f"adapter_dir {folder.absolute()} is not a folder; train writes it as "
            "<output_dir>/adapter."
        )
    names = {path.name for path in folder.iterdir()}
    if not {CONFIG, WEIGHTS} <= names:
        pickle = (
            " A pickle (.bin) can run code when loaded and is not opened: save it as safetensors."
        )
        raise AdapterError(
            f"{folder} must hold {CONFIG} and {WEIGHTS}; it holds {sorted(names)}."
            f"{pickle if 'adapter_model.bin' in names else ''}"
        )
    # `kaggle_upload adapter --with-library` puts the library's wheel beside the two files
    ignored = sorted(name for name in names - {CONFIG, WEIGHTS} if not name.endswith(".whl"))
    config, unknown = read_lora_config(folder)
    ignored += unknown
    tensors = read_tensors(folder)
    header = read_header(folder)
    check_finite(tensors, str(folder))
    if model_dir is not None:
        ignored += drop_copies(tensors, model_dir)
        check_base(folder, config, header, model_dir)
        tensors = check_names(
            tensors, config, model_dir, folder, loads_in_four_bit(model_dir, four_bit)
        )
    check_ranks(tensors, config, folder)
    check_update(tensors, config, folder)
    if not CHANGES_BASE.match(str(config.init_lora_weights)):
        # peft would begin anew at load, and needs data for some ways
        config.init_lora_weights = True
    elif model_dir is not None:
        check_beginning(tensors, config, model_dir, folder, loads_in_four_bit(model_dir, four_bit))
    return Adapter(config, tensors, header, ignored)


def check_finite(tensors: dict[str, torch.Tensor], where: str) -> None:
    bad = [name for name, tensor in tensors.items() if not torch.isfinite(tensor).all()]
    if bad:
        raise AdapterError(
            f"{where}: {len(bad)} tensors hold NaN or infinity, the first is {bad[0]}; lower the "
            "rate."
        )


def drop_copies(tensors: dict[str, torch.Tensor], model_dir: str | Path) -> list[str]:
    """Drop, in place, whole weights that are the base's own (peft saves those of adapted or resized
    embeddings); returns their names."""
    dropped = []
    for name in [name for name in tensors if name.endswith(".weight") and ".lora_" not in name]:
        stored = stored_weight(
            model_dir, name.removeprefix("base_model.model.").replace(".base_layer", "")
        )
        if stored is None or list(tensors[name].shape)[1:] != stored.get_shape()[1:]:
            continue
        own = stored[:].float()
        # those of added tokens are never asked or answered
        rows = tensors[name][: len(own)].float()
        if rows.shape == own.shape and torch.allclose(
            rows, own, rtol=FINGERPRINT_TOLERANCE, atol=1e-6
        ):
            dropped.append(f"{name} (the base's own)")
            del tensors[name]
    return dropped


def check_base(
    folder: Path, config: LoraConfig, header: dict[str, str], model_dir: str | Path
) -> None:
    """Fingerprint, architecture and name, as far as the adapter has them, beside the base's
    files."""
    model = load_config(model_dir)
    here = stored_fingerprint(model_dir)
    if here is not None and check_fingerprint(folder, header, here, model_dir):
        return
    classes = model.architectures or []
    trained = (config.auto_mapping or {}).get("base_model_class") or ""
    for what, found, wanted in (
        ("model_type", header.get(MODEL_TYPE, model.model_type), [model.model_type]),
        ("class", trained if trained.endswith("ForCausalLM") else None, classes),
    ):
        if found and wanted and found not in wanted:
            raise AdapterError(
                f"{folder} was trained on a base of the {what} {found}, and {model_dir} holds"
                f" {wanted[0]}: load the base it was trained on."
            )
    name = config.base_model_name_or_path or ""
    families = set(FAMILIES.findall(MAKERS.sub("", name.lower())))
    if families and not any(family in model.model_type for family in families):
        raise AdapterError(
            f"{folder} names its base {name!r}, and {model_dir} holds a model of type"
            f" {model.model_type}: load the base it was trained on."
        )


def check_fingerprint(
    folder: Path, header: dict[str, str], here: list[float], model_dir: str | Path
) -> bool:
    """Whether the adapter has a fingerprint; raises AdapterError if it is not the base's."""
    trained_on = json.loads(header.get(FINGERPRINT, "null"))
    if trained_on is None:
        return False
    distance = (torch.tensor(trained_on) - torch.tensor(here)).norm() / torch.tensor(here).norm()
    if not distance <= FINGERPRINT_TOLERANCE:
        raise AdapterError(
            f"{folder} was trained on another base: its fingerprint is {distance:.3f} from that "
            f"of {model_dir} (at most {FINGERPRINT_TOLERANCE:.4f}). Load the base it was trained "
            "on, or train again."
        )
    return True


def check_names(
    tensors: dict[str, torch.Tensor],
    config: LoraConfig,
    model_dir: str | Path,
    folder: Path,
    four_bit: bool,
) -> dict[str, torch.Tensor]:
    """The tensors by the names of this transformers, if they are what peft would save for this
    config on this base.

    Args:
        tensors, config: the adapter's, as its files have them.
        model_dir: the base's folder; no weights are read.
        folder: the adapter's, for the message.
        four_bit: whether the base will be loaded in 4 bits.

    Raises AdapterError for names that are missing or extra, and for shapes of another base.
    """
    plain = copy.deepcopy(config)
    plain.init_lora_weights = True
    with torch.device("meta"):  # takes no memory
        base = AutoModelForCausalLM.from_config(load_config(model_dir))
        try:
            skeleton = attach(base, plain)
        # peft's, torch's or re's, for a config that is not for this base
        except Exception as error:
            raise AdapterError(
                f"{folder} does not fit the base in {model_dir}: {error} It belongs to another "
                "base."
            ) from error
        expected = get_peft_model_state_dict(skeleton, save_embedding_layers=False)
        experts = sorted(name for name in [*expected, *tensors] if ".experts." in name)
        if experts and four_bit:
            raise AdapterError(
                f"{folder} adapts the experts ({experts[0]}): they are kept in 4 bits, a layer's "
                "in one tensor, and no LoRA can be put on that (all-linear, or w1, w2, w3 of "
                "transformers 4). Load with four_bit=False, or train on the attention's layers "
                "alone."
            )
        if tensors.keys() - expected.keys():  # perhaps those of transformers 4
            moved = convert_peft_adapter_state_dict_for_transformers(
                skeleton, plain, tensors, "default"
            )
            tensors = {peft_name(name): tensor for name, tensor in moved.items()}
    shapes = {name: tuple(tensor.shape) for name, tensor in expected.items()}
    found = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    for kind, wrong in (
        ("misses", sorted(shapes.keys() - found.keys())),
        ("has besides", sorted(found.keys() - shapes.keys())),
        (
            "has in another shape",
            sorted(n for n in shapes.keys() & found.keys() if shapes[n] != found[n]),
        ),
    ):
        if wrong:
            here = f" {found.get(wrong[0], '')} where the base needs {shapes.get(wrong[0], 'none')}"
            raise AdapterError(
                f"{folder} does not fit the base in {model_dir}: it {kind} {len(wrong)} tensors, "
                f"the first is {wrong[0]}{here}. It belongs to another base, rank or config."
            )
    return tensors


def check_ranks(tensors: dict[str, torch.Tensor], config: LoraConfig, folder: Path) -> None:
    """Where no base is at hand; experts have their rank times their number."""
    ranks = {
        t.shape[0] for name, t in tensors.items() if ".lora_A" in name and ".experts" not in name
    }
    if not ranks <= {config.r, *config.rank_pattern.values()}:
        raise AdapterError(
            f"{folder}: {CONFIG} says rank {config.r}, the tensors have {sorted(ranks)}; retrain "
            "or fix r."
        )


def check_update(tensors: dict[str, torch.Tensor], config: LoraConfig, folder: Path) -> None:
    """Raises AdapterError where every product of a plain LoRA is zero, or there is none."""
    plain = re.compile(r"\.lora_(?:embedding_)?[AB](?:\.weight)?$")
    if tensors and not all(plain.search(name) for name in tensors):
        return  # a bias, a magnitude, whole weights: something was trained
    downs = {
        name: re.sub(r"_B(\.weight)?$", r"_A\1", name)
        for name in tensors
        if re.search(r"_B(\.weight)?$", name)
    }
    pairs = [(tensors.get(down), tensors[up]) for up, down in downs.items()]
    scaled = config.lora_alpha or any(config.alpha_pattern.values())
    if not scaled or not any(down is not None and down.any() and up.any() for down, up in pairs):
        raise AdapterError(
            f"{folder} changes no logits: alpha {config.lora_alpha}, lora_B or lora_A zero "
            "everywhere; it is untrained."
        )


def check_beginning(
    tensors: dict[str, torch.Tensor],
    config: LoraConfig,
    model_dir: str | Path,
    folder: Path,
    four_bit: bool,
) -> None:
    """Set, in place, how peft shall begin an adapter whose config names a way that changes the
    base.

    The tensors tell whether the adapter still is a difference from the changed weights: then it is
    near to what it began with (a base that was changed and saved, or a tool that took the
    difference out, leaves nothing of that). peft changes a 16-bit base in the same way again.
    tensors, config, model_dir, folder, four_bit: as `check_names` has them.
    Raises AdapterError for what can't be begun again.
    """
    way = str(config.init_lora_weights)
    remedy = (
        f"{folder / CONFIG} says init_lora_weights={way!r}: the adapter is a difference from "
        "weights that were changed when training began. Save it by peft's save_pretrained with "
        "path_initial_model_for_weight_conversion, as an ordinary LoRA."
    )
    name = next((name for name in sorted(tensors) if name.endswith(".lora_A.weight")), "")
    layer = name.removeprefix("base_model.model.").removesuffix(".lora_A.weight")
    weight = stored_weight(model_dir, f"{layer}.weight")
    if (
        way.startswith(("corda", "lora_ga"))
        or weight is None
        or weight.get_dtype() not in ("F16", "BF16", "F32")
    ):
        raise AdapterError(remedy)
    linear = nn.Linear(*reversed(weight.get_shape()), bias=False)
    linear.weight.data = weight[:].float()
    rank = tensors[name].shape[0]
    alone = LoraConfig(
        r=rank, lora_alpha=config.lora_alpha, use_rslora=config.use_rslora, target_modules=["0"],
        init_lora_weights=config.init_lora_weights,
    )  # fmt: skip
    began = get_peft_model(nn.Sequential(linear), alone).base_model.model[0]
    first = (began.lora_B["default"].weight @ began.lora_A["default"].weight).flatten()
    now = (tensors[name.replace("lora_A", "lora_B")].float() @ tensors[name].float()).flatten()
    if torch.cosine_similarity(first, now, dim=0) < 0.5:
        config.init_lora_weights = True
    elif way.startswith("pissa_niter"):  # drawn at random, and not to be had again
        raise AdapterError(remedy)
    elif four_bit:
        raise AdapterError(f"{remedy} (Or load a 16-bit base with four_bit=False.)")


def attach(model: PreTrainedModel, config: LoraConfig) -> PeftModel:
    model.name_or_path = config.base_model_name_or_path or ""  # else peft renames it in the config
    with warnings.catch_warnings():
        # of tied weights and the like, which the tensors' names decide
        warnings.simplefilter("ignore")
        return get_peft_model(model, config)
