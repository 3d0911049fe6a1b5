"""A base model's folder, checked by its files alone: nothing is loaded, no GPU is needed."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from transformers import AutoConfig, AutoModelForCausalLM

from prompt_recovery.engine import quantiser
from prompt_recovery.engine.storage import PIECES, PROJECTIONS

# model types with which loading, 4 bits and answering are tested against transformers' own
FAMILIES = (
    "mixtral",
    "mistral",
    "llama",
    "qwen2",
    "qwen2_moe",
    "qwen3",
    "qwen3_moe",
    "gemma3_text",
)
WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
AGAIN = "fetch it again, such as with `hf download`"


class ModelError(ValueError):
    """A folder that does not hold a usable base model; the message names file, rule and remedy."""


def read_config(model_dir: str | Path) -> dict[str, Any]:
    """config.json. Raises ModelError where there is none, or no JSON object."""
    path = Path(model_dir) / "config.json"
    if not path.is_file():
        raise ModelError(
            f"model_dir {path.parent.absolute()} has no config.json; give the folder of a base "
            "model as the hub has it."
        )
    return _json(path)


def check_model_dir(model_dir: str | Path) -> Path:
    """The folder as a Path, if it holds a whole base model of a family that is tested.

    Config, index and the headers of all files are read, no weights.
    Raises ModelError (Nf4Error for a quantisation that is not this project's) before anything
    loads: files that are missing, cut short or no safetensors, tensors that are missing or of a
    wrong shape, weights that another tool quantised, another family.
    """
    folder = Path(model_dir)
    config = read_config(folder)
    if not list(folder.glob("*.safetensors")):
        raise ModelError(
            f"model_dir {folder.absolute()} has no *.safetensors; pickle weights (.bin) are not "
            "loaded, convert them."
        )
    quantised = quantiser.check_folder(folder)
    kind = config.get("model_type")
    if kind not in FAMILIES:
        raise ModelError(
            f"{folder / 'config.json'} says model_type {kind!r}, with which nothing here is tested:"
            f" take a model of {', '.join(FAMILIES)}."
        )
    _check_tensors(folder, _headers(folder), quantised)
    return folder


def loads_in_four_bit(model_dir: str | Path, four_bit: bool | None = None) -> bool:
    """What `load_base` makes of four_bit: None is on a GPU, or where the folder is in 4 bits
    already."""
    quantised = bool(read_config(model_dir)) and quantiser.check_folder(model_dir)
    return quantised or torch.cuda.is_available() if four_bit is None else four_bit


def base_id(model_dir: str | Path) -> str:
    """A public name for the base, which does not depend on where it is mounted: `_name_or_path` of
    its config if that is owner/name, the id in a path of the hub's cache, or the folder's name
    without a Kaggle model's version; for a folder of `save_quantised`, that of the model it was
    made from."""
    config = read_config(model_dir)
    name = config.get("quantization_config", {}).get("base") or config.get("_name_or_path", "")
    if "quantization_config" in config and name:
        return name
    if name.count("/") == 1 and not name.startswith((".", "/", "~")) and not Path(name).exists():
        return name
    for folder in (Path(model_dir).absolute(), Path(model_dir).resolve()):
        parents = [folder, *folder.parents]
        hub = next((each.name for each in parents if each.name.startswith("models--")), None)
        # a hub's cache: models--owner--name/snapshots/COMMIT
        if hub and "snapshots" in folder.parts:
            return hub.removeprefix("models--").replace("--", "/")
    while folder.name.isdigit() and folder.parent.name:  # a Kaggle model's version
        folder = folder.parent
    return folder.name


def _json(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ModelError(f"{path} is not JSON ({_cause(path, error)}): {AGAIN}.") from error
    if not isinstance(found, dict):
        raise ModelError(f"{path} holds {type(found).__name__}, it must hold an object: {AGAIN}.")
    return found


def _cause(path: Path, error: Exception) -> str:
    with path.open("rb") as file:
        start = file.read(40)
    if start.startswith(b"version https://git-lfs"):
        return "it is a Git LFS pointer, not the file itself"
    return f"{path.stat().st_size} bytes; {type(error).__name__}: {error}"


def _headers(folder: Path) -> dict[str, tuple[str, list[int]]]:
    """(dtype, shape) of every tensor by name, of the files that transformers would read."""
    weight_map: dict[str, str] = {}
    if (folder / WEIGHTS).is_file():  # before an index, as for transformers
        files = [WEIGHTS]
    elif (folder / INDEX).is_file():
        index = _json(folder / INDEX)
        weight_map = index.get("weight_map") or {}
        if (
            not isinstance(weight_map, dict)
            or not weight_map
            or not isinstance(index.get("metadata"), dict)
        ):
            raise ModelError(
                f"{folder / INDEX} needs the entries metadata and weight_map, as objects: {AGAIN}."
            )
        files = sorted({str(name) for name in weight_map.values()})
        missing = [name for name in files if not (folder / name).is_file()]
        if missing:
            raise ModelError(
                f"{folder} lacks {len(missing)} of the {len(files)} files of {INDEX}, the first is"
                f" {missing[0]}: fetch the rest."
            )
    else:
        found = sorted(path.name for path in folder.glob("*.safetensors"))
        raise ModelError(
            f"{folder} holds {', '.join(found[:3])}, neither {WEIGHTS} nor {INDEX}, of which one "
            f"must be there: {AGAIN}."
        )
    headers: dict[str, tuple[str, list[int]]] = {}
    for name in files:
        try:  # compares the header with the file's length
            with safe_open(folder / name, "pt") as file:
                kind = (file.metadata() or {}).get("format", "pt")
                own = {key: file.get_slice(key) for key in file.keys()}
                headers |= {key: (each.get_dtype(), each.get_shape()) for key, each in own.items()}
        except (SafetensorError, OSError) as error:
            raise ModelError(
                f"{folder / name} is not a whole safetensors file "
                f"({_cause(folder / name, error)}): {AGAIN}."
            ) from error
        if kind not in ("pt", "mlx"):
            raise ModelError(
                f"{folder / name} was saved for {kind!r}, it must be for PyTorch ('pt')."
            )
        lost = sorted(key for key, file in weight_map.items() if file == name and key not in own)
        if lost:
            raise ModelError(
                f"{folder / name} lacks {lost[0]}, which {INDEX} places there: fetch both again."
            )
    return headers


def _check_tensors(
    folder: Path, headers: dict[str, tuple[str, list[int]]], quantised: bool
) -> None:
    """Beside the model that the config describes, built without memory. Experts have other names in
    files than in the model: the sum of all numbers tells whether some are missing."""
    foreign = [name for name, (dtype, _) in headers.items() if dtype not in ("F16", "BF16", "F32")]
    if foreign and not quantised:
        raise ModelError(
            f"{folder} holds {foreign[0]} as {headers[foreign[0]][0]}: another tool quantised it. "
            "Give the model in 16 bits, as its makers published it, or one that `python -m "
            "prompt_recovery quantise` made."
        )
    config = AutoConfig.from_pretrained(folder, local_files_only=True)
    if quantised:
        del config.quantization_config
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    experts = {name for name, module in model.named_modules() if quantiser.fused_experts(module)}
    shapes = {name: list(parameter.shape) for name, parameter in model.named_parameters()}
    wanted = [name for name in shapes if quantised or not experts or ".mlp." not in name]
    if quantised:
        pieces = [
            f"{name}.{key}_{piece}" for name in experts for key in PROJECTIONS for piece in PIECES
        ]
        wanted = [name for name in wanted if name.rpartition(".")[0] not in experts] + sorted(
            pieces
        )
    missing = [name for name in wanted if name not in headers]
    if missing:
        raise ModelError(
            f"model_dir {folder} lacks {len(missing)} of the model's tensors, the first is "
            f"{missing[0]}; fetch it again."
        )
    linear = {name for name, dim in shapes.items() if quantised and len(dim) > 1}  # packed
    wrong = [
        name
        for name in headers
        if name in shapes.keys() - linear and headers[name][1] != shapes[name]
    ]
    if wrong:
        raise ModelError(
            f"{folder}: {wrong[0]} has the shape {headers[wrong[0]][1]}, config.json makes it"
            f" {shapes[wrong[0]]} (mismatched): config and weights are of two models, {AGAIN}."
        )
    have = sum(torch.Size(shape).numel() for _, shape in headers.values())
    need = sum(torch.Size(shape).numel() for shape in shapes.values())
    if not quantised and have < need:
        raise ModelError(
            f"{folder} holds {have:,} of the model's {need:,} numbers: it lacks some of its "
            f"experts, {AGAIN}."
        )
