"""What an adapter and a base consist of: the only place where publishing the two differs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from kaggle_upload.handles import UploadError
from kaggle_upload.stage import ADAPTER, BASE, Content, pick, read

SCORES = (
    "scs_before",
    "scs_after",
    "scs_after_ci",
    "gain_ci",
    "exact_match",
    "stopped_by_eos",
    "n",
    "encoder",
)


def adapter_content(folder: Path, wheel: Path | None = None) -> tuple[Content, dict[str, Any]]:
    """The adapter's two files (and the library's wheel), and what versions.csv says about them.

    The style comes from the weights' own header. Scores and rows hash come from the evaluation.json
    that the train notebook leaves beside the folder, where that names these weights' sha256: a run
    that was killed leaves a new adapter beside an earlier one's scores. Raises UploadError, or
    AdapterError for files that are not a working adapter.
    """
    paths = pick(folder, ADAPTER)
    # such as a notebook's whole output, downloaded
    inside = [path.parent for path in sorted(folder.rglob(ADAPTER[0])) if not paths]
    if inside := [each for each in inside if not each.name.startswith("checkpoint-")]:
        raise UploadError(
            f"{folder} is not the adapter's own folder: give {' or '.join(map(str, inside))}."
        )
    from prompt_recovery.adapter import check_to_publish  # imports torch

    about = check_to_publish(folder)
    left = sorted(path.name for path in folder.iterdir() if path not in paths)
    if left:
        print(f"not sent: {', '.join(left)}")
    content = read([*paths, *([wheel] if wheel else [])])
    path = folder.resolve().parent / "evaluation.json"
    evaluation = _json(path) or {}
    measured = evaluation.get("adapter_sha256")
    if evaluation and measured != content.hashes["adapter_model.safetensors"]:
        which = "other weights than these" if measured else "weights that it does not name"
        print(f"note: {path} is of {which} (adapter_sha256): versions.csv gets no scores.")
        evaluation = {}
    scores = {key: evaluation[key] for key in SCORES if evaluation.get(key) is not None}
    return content, {
        "base": about["base"],
        "rank": about["rank"],
        "style": about.get("style", ""),
        "rows_hash": evaluation.get("rows_hash") or "",
        "scores": json.dumps(scores) if scores else "",
    }


def base_content(folder: Path) -> tuple[Content, dict[str, Any]]:
    """The checkpoint's files, and what versions.csv says about them.

    Raises UploadError (or experts.Nf4Error) for a folder that is not a whole 4-bit checkpoint of
    this project: pieces missing or cut short, no tokenizer, another quantisation.
    """
    paths = {path.name: path for path in pick(folder, BASE)}
    if "config.json" not in paths:
        raise UploadError(
            f"{folder} holds no config.json: give the folder that save_pretrained wrote."
        )
    from prompt_recovery.engine import base_id, check_folder  # imports torch

    if not check_folder(folder):
        raise UploadError(
            f"{folder} is not in 4 bits and would not fit 2x T4: load it with four_bit and save it "
            "again."
        )
    if not {"tokenizer.json", "tokenizer.model"} & paths.keys():
        raise UploadError(
            f"{folder} holds neither tokenizer.json nor tokenizer.model: copy them from the 16-bit "
            "model."
        )
    shards = {name for name in paths if name.endswith(".safetensors")}
    index = _json(folder / "model.safetensors.index.json")
    wanted = set(index["weight_map"].values()) if index else {"model.safetensors"}
    if shards != wanted:
        raise UploadError(
            f"{folder} lacks {sorted(wanted - shards)} and has besides "
            f"{sorted(shards - wanted)}: save it again, whole."
        )
    for name in sorted(shards):
        try:
            # reads the header and compares the file's length with it
            safe_open(paths[name], "numpy")
        except SafetensorError as error:
            raise UploadError(
                f"{paths[name]} is not a whole safetensors file ({error}): save it again."
            ) from error
    left = sorted(path.name for path in folder.iterdir() if path.name not in paths)
    if left:
        print(f"not sent: {', '.join(left)}")
    return read(paths.values()), {"base": base_id(folder)}


def _json(path: Path) -> dict[str, Any] | None:
    if not path.exists():
        return None
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UploadError(f"{path} is not JSON: {error}; write it again.") from error
