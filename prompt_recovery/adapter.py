"""A LoRA adapter: put one on a base, save it as exactly two files that work on the unmodified base,
check it for use or to publish, load it. Adapters that other tools wrote are used as peft reads
them."""

from __future__ import annotations

import copy
import hashlib
import json
import re
import shutil
import warnings
from collections.abc import Sequence
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any, NamedTuple

import torch
from peft import (
    LoraConfig,
    PeftModel,
    get_peft_model,
    get_peft_model_state_dict,
    set_peft_model_state_dict,
)
from peft.utils.transformers_weight_conversion import (
    convert_peft_adapter_state_dict_for_transformers,
)
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedModel

from prompt_recovery.base import load_config, stored_weight
from prompt_recovery.engine import loads_in_four_bit
from prompt_recovery.recipe import Format, Recipe

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
FINGERPRINT, MODEL_TYPE = "base_fingerprint", "base_model_type"
# bf16 keeps 8 bits, fp16 11: the same base loaded in another dtype moves a value by up to 2**-8
FINGERPRINT_TOLERANCE = 2.0**-7
# in peft's config, and not computed by a model whose layers are called without peft's own forward
NOT_COMPUTED = (
    "alora_invocation_tokens",
    "arrow_config",
    "layer_replication",
    "megatron_config",
    "use_qalora",
)
# ways to begin that change the base's weights: such an adapter is a difference from these
# (loftq's are those in 4 bits: what they differ by from the 16-bit ones is what 4 bits cost anyway)
CHANGES_BASE = re.compile("pissa|olora|corda|lora_ga")
# families in the names of models, of those whose names say the model_type (Yi and DeepSeek may be
# llamas); what names the maker instead of the model says nothing
FAMILIES = re.compile("mixtral|mistral|llama|qwen|gemma|falcon|gpt2")
MAKERS = re.compile("mistral-?ai|mistral-community|meta-llama|llama-factory")


class AdapterError(ValueError):
    """An adapter folder that must not be published or loaded; the message says which file or tensor
    is wrong."""


def resize_input_embeddings(model: PreTrainedModel, rows: int) -> None:
    """Give the input embeddings at least `rows` rows (the new ones zero), in place; `lm_head` stays
    as it is.

    A pad token is read but never predicted. `resize_token_embeddings` would give it a row of
    lm_head too, which takes a share of every softmax: losses with `<pad>` and with `unk` would
    differ.
    """
    old = model.get_input_embeddings()
    if rows <= old.num_embeddings:
        return
    new = nn.Embedding(rows, old.embedding_dim, device=old.weight.device, dtype=old.weight.dtype)
    with torch.no_grad():
        new.weight.zero_()
        new.weight[: old.num_embeddings] = old.weight
    # accelerate's hook moves inputs when the layers stand on several GPUs
    if hasattr(old, "_hf_hook"):
        from accelerate.hooks import add_hook_to_module

        add_hook_to_module(new, old._hf_hook)
    model.set_input_embeddings(new.requires_grad_(False))


def add_lora(
    model: PreTrainedModel,
    *,
    base: str,
    r: int = Recipe.lora_r,
    alpha: int = Recipe.lora_alpha,
    dropout: float = Recipe.lora_dropout,
    target_modules: Sequence[str] = Recipe.target_modules,
    seed: int = Recipe.seed,
) -> PeftModel:
    """A fresh trainable LoRA on the model, its weights in fp32 whatever the base's dtype (fp16
    GradScaler needs that).

    base: the base's public id, which goes into the adapter's config instead of a local path.
    """
    torch.manual_seed(seed)
    config = LoraConfig(
        r=r,
        lora_alpha=alpha,
        lora_dropout=dropout,
        target_modules=list(target_modules),
        task_type="CAUSAL_LM",
    )
    model.name_or_path = base  # peft writes this name into the adapter's config
    return get_peft_model(model, config)


def check_target_modules(target_modules: Sequence[str], model_dir: str | Path) -> None:
    """Raises AdapterError for names that no module of the base ends in; no weights are read."""
    with torch.device("meta"):
        names = [
            name
            for name, _ in AutoModelForCausalLM.from_config(load_config(model_dir)).named_modules()
        ]
    unknown = [
        each
        for each in target_modules
        if not any(f".{name}".endswith(f".{each}") for name in names)
    ]
    if unknown and list(target_modules) != ["all-linear"]:
        last = sorted({name.rpartition(".")[2] for name in names if name.endswith("proj")})
        raise AdapterError(
            f"target_modules: no module of the base is called {', '.join(unknown)}; there are "
            f"{', '.join(last)}."
        )


def training_key(model: PeftModel) -> dict[str, Any]:
    """What a training must share to be gone on with: the LoRA's settings as far as they differ from
    peft's defaults, and the base by its weights; neither peft's version nor where the base lies."""
    plain, config = LoraConfig().to_dict(), model.peft_config["default"].to_dict()
    skipped = ("base_model_name_or_path", "peft_version", "inference_mode")
    # an option left empty is one that peft set while it put the LoRA on
    lora = {
        name: value
        for name, value in config.items()
        if name not in skipped and value != plain.get(name)
    }
    lora = {name: value for name, value in lora.items() if value or plain.get(name)}
    base = json.dumps(base_fingerprint(model.get_base_model())).encode()
    return dict(lora=lora, base=hashlib.sha256(base).hexdigest()[:12])


def save_adapter(model: PeftModel, adapter_dir: str | Path, format: Format | None = None) -> Path:
    """Write adapter_config.json and adapter_model.safetensors, and nothing else, to adapter_dir
    (replaced whole).

    No embeddings or lm_head even if the vocabulary was resized (peft would add 1 GB that the base
    then refuses), fp32, no local path. The weights' header carries a fingerprint of the base, which
    `load_adapter` compares, and the format that the adapter was trained for, which `check_adapter`
    gives back.
    Raises AdapterError where a tensor is not finite; what stood in adapter_dir then stays.
    """
    state = get_peft_model_state_dict(model, save_embedding_layers=False)
    tensors = {name: tensor.detach().float().cpu().contiguous() for name, tensor in state.items()}
    _check_finite(tensors, "the model")
    folder = Path(adapter_dir)
    staging = folder.with_name(folder.name + ".partial")
    shutil.rmtree(staging, ignore_errors=True)
    staging.mkdir(parents=True)
    config = model.peft_config["default"]
    was_training, config.inference_mode = config.inference_mode, True
    config.save_pretrained(str(staging))
    config.inference_mode = was_training
    base = model.get_base_model()
    witnesses = {
        FINGERPRINT: json.dumps(base_fingerprint(base)),
        MODEL_TYPE: base.config.model_type,
    }
    save_file(
        tensors,
        staging / WEIGHTS,
        metadata={"format": "pt"} | witnesses | (asdict(format) if format else {}),
    )
    shutil.rmtree(folder, ignore_errors=True)
    staging.rename(folder)
    return folder


class _Adapter(NamedTuple):
    """An adapter as it will be used: peft's config, tensors by peft's names, what the file's header
    says, and what lies there and is not used."""

    config: LoraConfig
    tensors: dict[str, torch.Tensor]
    header: dict[str, str]
    ignored: list[str]


def check_adapter(
    adapter_dir: str | Path, model_dir: str | Path | None = None, four_bit: bool | None = None
) -> dict[str, Any]:
    """Check that an adapter of this or another tool can be used and, if model_dir is given, that it
    belongs to that base, by all that files tell; nothing is loaded onto a GPU.

    four_bit: as the base will be loaded, see `load_base`.
    Returns rank, alpha, target_modules, base (its name as the file has it, or None), parameters,
    bytes, the format that its header names, and, where there are any, the names that are ignored:
    files beside the two, entries of the config that the installed peft does not know, copies of the
    base's own weights. No pickle is ever opened.
    Raises AdapterError: files that are missing or unreadable, an adapter that peft can't compute
    here, tensors that are missing, extra, of a wrong shape or not finite, another base by name,
    architecture or fingerprint, an update that is zero everywhere.
    """
    folder = Path(adapter_dir)
    config, tensors, header, ignored = _read(folder, model_dir, four_bit)
    about = {
        "base": config.base_model_name_or_path,
        "rank": config.r,
        "alpha": config.lora_alpha,
        "target_modules": _targets(config),
        "parameters": sum(tensor.numel() for tensor in tensors.values()),
        "bytes": (folder / WEIGHTS).stat().st_size,
        **{each.name: header[each.name] for each in fields(Format) if each.name in header},
    }
    return about | ({"ignored": ignored} if ignored else {})


def check_to_publish(adapter_dir: str | Path) -> dict[str, Any]:
    """`check_adapter`, and that the base is named by a public id: a local path would be published.

    Raises AdapterError.
    """
    about = check_adapter(adapter_dir)
    base = str(about["base"] or "")
    if base.startswith(("/", ".", "~")) or "\\" in base or base.count("/") > 1:
        raise AdapterError(
            f"{Path(adapter_dir) / CONFIG} names the base by the local path {base!r}; write its "
            "public id instead."
        )
    return about


def load_adapter(
    model: PreTrainedModel, adapter_dir: str | Path, model_dir: str | Path
) -> PeftModel:
    """The base with the adapter on it, frozen and in eval mode (LoRA dropout would stay on
    otherwise).

    Raises AdapterError as `check_adapter` does, and where the adapter was trained on another base
    of the same shape.
    """
    folder = Path(adapter_dir)
    four_bit = hasattr(model.config, "quantization_config")
    config, tensors, header, _ = _read(folder, model_dir, four_bit)
    _check_fingerprint(folder, header, base_fingerprint(model), model_dir)
    lora = _put_on(model, config)
    left = set_peft_model_state_dict(lora, tensors).unexpected_keys
    if left:
        raise AdapterError(
            f"{folder}: peft finds no place for {len(left)} tensors, the first is {left[0]}."
        )
    return lora.requires_grad_(False).eval()


def _put_on(model: PreTrainedModel, config: LoraConfig) -> PeftModel:
    model.name_or_path = config.base_model_name_or_path or ""  # else peft renames it in the config
    with warnings.catch_warnings():
        # of tied weights and the like, which the tensors' names decide
        warnings.simplefilter("ignore")
        return get_peft_model(model, config)


def base_fingerprint(model: PreTrainedModel) -> list[float]:
    """64 weights of lm_head, spread over it: it is 16 bit in every way of loading, and differs
    between bases of one shape."""
    head = model.get_output_embeddings()
    weight = getattr(head, "original_module", head).weight.detach()
    flat = weight.flatten()
    return flat[_spread(flat.numel()).to(flat.device)].float().cpu().tolist()


def stored_fingerprint(model_dir: str | Path) -> list[float] | None:
    """`base_fingerprint` of the files; None where the head is not stored under its usual name."""
    for name in ("lm_head.weight", "model.embed_tokens.weight"):  # of a tied head there is one
        weight = stored_weight(model_dir, name)
        if weight is not None:
            rows, columns = weight.get_shape()
            places = [divmod(place, columns) for place in _spread(rows * columns).tolist()]
            return [float(weight[r : r + 1, c : c + 1]) for r, c in places]
    return None


def _spread(count: int) -> torch.Tensor:
    # integers: the last of a float32 linspace over Mixtral's 131,072,000 weights is one beyond them
    return torch.arange(64) * (count - 1) // 63


def read_header(adapter_dir: str | Path) -> dict[str, str]:
    """What `save_adapter` wrote beside the tensors: the base's fingerprint and the format, as text;
    no tensor is read."""
    with safe_open(Path(adapter_dir) / WEIGHTS, "pt") as file:
        return file.metadata() or {}


# --- reading ------------------------------------------------------------------------------------


def _read(folder: Path, model_dir: str | Path | None, four_bit: bool | None) -> _Adapter:
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
    config, unknown = _read_config(folder)
    ignored += unknown
    tensors = _read_tensors(folder)
    header = read_header(folder)
    _check_finite(tensors, str(folder))
    if model_dir is not None:
        ignored += _drop_copies(tensors, model_dir)
        _check_base(folder, config, header, model_dir)
        tensors = _check_names(
            tensors, config, model_dir, folder, loads_in_four_bit(model_dir, four_bit)
        )
    _check_ranks(tensors, config, folder)
    _check_update(tensors, config, folder)
    if not CHANGES_BASE.match(str(config.init_lora_weights)):
        # peft would begin anew at load, and needs data for some ways
        config.init_lora_weights = True
    elif model_dir is not None:
        _check_beginning(tensors, config, model_dir, folder, loads_in_four_bit(model_dir, four_bit))
    return _Adapter(config, tensors, header, ignored)


def _read_config(folder: Path) -> tuple[LoraConfig, list[str]]:
    """The config, and what of it the installed peft does not know."""
    try:
        raw = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
        if raw["peft_type"] != "LORA":
            raise TypeError(f"peft_type is {raw['peft_type']!r}, it must be 'LORA'")
        known = {field.name for field in fields(LoraConfig)}
        given = {name: value for name, value in raw.items() if name in known}
        # else it asks for what only training needs
        config = LoraConfig(**given | {"init_lora_weights": True})
        config.init_lora_weights = given.get("init_lora_weights", True)
        config.task_type = "CAUSAL_LM"
        config.inference_mode = True
        base = config.base_model_name_or_path
        if (
            not (base is None or isinstance(base, str))
            or not isinstance(config.r, int)
            or config.r < 1
        ):
            raise TypeError(f"base_model_name_or_path is {base!r}, r is {config.r!r}")
    except (ValueError, TypeError, KeyError, AttributeError, ImportError) as error:
        raise AdapterError(
            f"{folder / CONFIG} is not a LoRA config: {error}; save it again."
        ) from error
    used = [name for name in NOT_COMPUTED if getattr(config, name)]
    if used:
        raise AdapterError(
            f"{folder / CONFIG} has {used[0]}={getattr(config, used[0])!r}, which nothing here "
            "computes; train without it."
        )
    entries = [name for name in raw.keys() - known - {"auto_mapping", "peft_version"} if raw[name]]
    return config, [f"{CONFIG}: {name}" for name in sorted(entries)]


_WRAPPERS = re.compile(
    r"(?<![^.])(?:module|_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)\."
)
_PART = re.compile(
    r"\.(lora_A|lora_B|lora_embedding_A|lora_embedding_B|lora_magnitude_vector)\.(.+)$"
)


def _peft_name(name: str) -> str:
    """A tensor's name as peft saves it. Other tools leave the adapter's name in it (".default."),
    wrappers of DDP, FSDP and torch.compile, or leave peft's own prefix out."""
    name = _WRAPPERS.sub("", name)
    name = re.sub(r"\.modules_to_save\.[^.]+\.", ".", name)
    found = _PART.search(name)
    if found:
        kind, last = found[1], found[2].rpartition(".")[2]
        plain = kind in ("lora_A", "lora_B")
        name = f"{name[: found.start()]}.{kind}" + (f".{last}" if plain else "")
    return name if name.startswith("base_model.") else f"base_model.model.{name}"


def _read_tensors(folder: Path) -> dict[str, torch.Tensor]:
    try:
        with safe_open(folder / WEIGHTS, "pt") as file:
            names = {name: _peft_name(name) for name in file.keys()}
            twice = sorted({new for new in names.values() if [*names.values()].count(new) > 1})
            if twice:
                both = sorted(name for name in names if names[name] == twice[0])
                raise AdapterError(
                    f"{folder / WEIGHTS} holds several adapters ({', '.join(both)}); save one."
                )
            return {new: file.get_tensor(name) for name, new in names.items()}
    except SafetensorError as error:
        raise AdapterError(
            f"{folder / WEIGHTS} is not a safetensors file: {error}; copy or save it again."
        ) from error


def _drop_copies(tensors: dict[str, torch.Tensor], model_dir: str | Path) -> list[str]:
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


# --- checks -------------------------------------------------------------------------------------


def _check_finite(tensors: dict[str, torch.Tensor], where: str) -> None:
    bad = [name for name, tensor in tensors.items() if not torch.isfinite(tensor).all()]
    if bad:
        raise AdapterError(
            f"{where}: {len(bad)} tensors hold NaN or infinity, the first is {bad[0]}; lower the "
            "rate."
        )


def _check_base(
    folder: Path, config: LoraConfig, header: dict[str, str], model_dir: str | Path
) -> None:
    """Fingerprint, architecture and name, as far as the adapter has them, beside the base's
    files."""
    model = load_config(model_dir)
    here = stored_fingerprint(model_dir)
    if here is not None and _check_fingerprint(folder, header, here, model_dir):
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


def _check_fingerprint(
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


def _check_names(
    tensors: dict[str, torch.Tensor],
    config: LoraConfig,
    model_dir: str | Path,
    folder: Path,
    four_bit: bool,
) -> dict[str, torch.Tensor]:
    """The tensors by the names of this transformers, if they are what peft would save for this
    config on this base. Raises AdapterError."""
    plain = copy.deepcopy(config)
    plain.init_lora_weights = True
    with torch.device("meta"):  # takes no memory
        base = AutoModelForCausalLM.from_config(load_config(model_dir))
        try:
            skeleton = _put_on(base, plain)
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
            tensors = {_peft_name(name): tensor for name, tensor in moved.items()}
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


def _check_ranks(tensors: dict[str, torch.Tensor], config: LoraConfig, folder: Path) -> None:
    """Where no base is at hand; experts have their rank times their number."""
    ranks = {
        t.shape[0] for name, t in tensors.items() if ".lora_A" in name and ".experts" not in name
    }
    if not ranks <= {config.r, *config.rank_pattern.values()}:
        raise AdapterError(
            f"{folder}: {CONFIG} says rank {config.r}, the tensors have {sorted(ranks)}; retrain "
            "or fix r."
        )


def _check_update(tensors: dict[str, torch.Tensor], config: LoraConfig, folder: Path) -> None:
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


def _check_beginning(
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


def _targets(config: LoraConfig) -> list[str]:
    targets = config.target_modules or []
    return [targets] if isinstance(targets, str) else sorted(targets)
