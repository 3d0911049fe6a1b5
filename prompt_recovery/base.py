"""A base: its folder's config, its fingerprint and digest, and weights read by name without loading
the model."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from transformers import AutoConfig, PreTrainedModel

from prompt_recovery.engine import default_dtype, loads_in_four_bit, read_config

# bf16 keeps 8 bits, fp16 11: the same base loaded in another dtype moves a value by up to 2**-8
FINGERPRINT_TOLERANCE = 2.0**-7
# bytes at either end of a stored tensor: 62 MiB of Mixtral's 87 GiB, in 995 places
SAMPLE = 2**15
# entries of a config that say where a base is from, how it is stored, or what a run sets
UNRELATED = (
    "_name_or_path", "architectures", "dtype", "torch_dtype", "transformers_version",
    "quantization_config", "use_cache", "output_router_logits",
)  # fmt: skip


def load_config(model_dir: str | Path) -> Any:
    read_config(model_dir)
    return AutoConfig.from_pretrained(model_dir, local_files_only=True)


def longest(model_dir: str | Path, most: int = 4096) -> int:
    """Tokens of a prompt with its answer that the base can be asked: at most `most`, its positions,
    and its sliding window, which answering does not build."""
    config = load_config(model_dir)
    return min(
        most, config.max_position_embeddings, getattr(config, "sliding_window", None) or most
    )


def stored_weight(model_dir: str | Path, name: str) -> Any:
    """A tensor of the folder's safetensors as safetensors' slice, of which a part can be read; None
    if no file has it under this name."""
    folder = Path(model_dir)
    file, index = "model.safetensors", folder / "model.safetensors.index.json"
    if not (folder / file).is_file():  # transformers' order
        file = json.loads(index.read_text(encoding="utf-8"))["weight_map"].get(name)
    opened = safe_open(folder / file, "pt") if file else None
    return opened.get_slice(name) if opened and name in opened.keys() else None  # noqa: SIM118


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


def base_digest(base: PreTrainedModel | str | Path, four_bit: bool | None = None) -> str:
    """What a base is made of as it computes, wherever it lies: its precision, its architecture, and
    samples of each of its weights.

    base: a loaded one (a LoRA on it does not count), or a folder, with four_bit as `load_base`
    takes it; nothing is loaded. The two give other texts for the same base.
    """
    if isinstance(base, PreTrainedModel):
        config, samples = base.config, list(_loaded(base))
        kinds = {str(p.dtype) for name, p in base.named_parameters() if "lora_" not in name}
    else:
        config, samples = load_config(base), sorted(_stored(Path(base)))
        kinds = {str(default_dtype())} | ({"nf4"} if loads_in_four_bit(base, four_bit) else set())
    precision = " ".join(sorted(kinds)).replace("torch.", "")
    shape = {name: each for name, each in config.to_dict().items() if name not in UNRELATED}
    architecture = hashlib.sha256(json.dumps(shape, sort_keys=True, default=str).encode())
    content = hashlib.sha256()
    for name, about, sample in samples:
        content.update(f"{name} {about} {len(sample)} ".encode() + sample)
    return f"{precision}, config {architecture.hexdigest()[:8]}, weights {content.hexdigest()[:16]}"


def _loaded(model: PreTrainedModel) -> Iterator[tuple[str, str, bytes]]:
    for name, parameter in model.named_parameters():
        if "lora_" not in name:
            flat = parameter.detach().flatten()
            sample = flat[:: max(1, len(flat) // 64)].cpu().contiguous()
            yield name, str(list(parameter.shape)), sample.view(torch.uint8).numpy().tobytes()


def _stored(folder: Path) -> Iterator[tuple[str, str, bytes]]:
    for path in folder.glob("*.safetensors"):
        with path.open("rb") as file:
            start = 8 + int.from_bytes(file.read(8), "little")
            header = json.loads(file.read(start - 8))
            header.pop("__metadata__", None)
            for name, about in header.items():
                begin, end = (start + place for place in about.pop("data_offsets"))
                file.seek(begin)
                sample = file.read(min(SAMPLE, end - begin))
                last = max(begin + len(sample), end - SAMPLE)
                file.seek(last)
                yield name, json.dumps(about, sort_keys=True), sample + file.read(end - last)
