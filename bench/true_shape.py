"""Mixtral-8x7B's true shape without its weights: a checkpoint folder of holes, and random weights
put into a 4-bit model.

python bench/true_shape.py DIR    makes DIR/nf4, a 24 GB folder with random weights in 4 bits

The folder has the hub's names and shapes and takes no room: its files are sparse and read as zeros.
Speed is never measured on zeros (a matrix product of zeros draws less power and runs faster), so
`fill` comes after loading.
"""

from __future__ import annotations

import itertools
import json
import struct
import sys
from pathlib import Path

import bitsandbytes as bnb
import torch
from torch import nn
from transformers import MixtralConfig

from prompt_recovery.engine.kernels import dispatch, sm75
from prompt_recovery.engine.storage import PROJECTIONS, quantise


def write_checkpoint(folder: Path, layers: int = 32, **shape: int) -> None:
    """A Mixtral folder as the hub has it, one file a layer, all weights zero and not stored."""
    config = MixtralConfig(
        num_hidden_layers=layers,
        architectures=["MixtralForCausalLM"],
        dtype="bfloat16",
        vocab_size=32000,
        **shape,
    )
    folder.mkdir(parents=True)
    config.save_pretrained(folder)
    hidden, inner, vocabulary = config.hidden_size, config.intermediate_size, config.vocab_size
    keys = config.num_key_value_heads * (hidden // config.num_attention_heads)
    index = {}
    for number in range(-1, layers):
        name = f"model-{number + 1:05d}.safetensors"
        prefix = f"model.layers.{number}."
        tensors: dict[str, tuple[int, ...]] = {
            "model.embed_tokens.weight": (vocabulary, hidden),
            "model.norm.weight": (hidden,),
            "lm_head.weight": (vocabulary, hidden),
        }
        if number >= 0:
            tensors = {
                f"{prefix}self_attn.q_proj.weight": (hidden, hidden),
                f"{prefix}self_attn.k_proj.weight": (keys, hidden),
                f"{prefix}self_attn.v_proj.weight": (keys, hidden),
                f"{prefix}self_attn.o_proj.weight": (hidden, hidden),
                f"{prefix}input_layernorm.weight": (hidden,),
                f"{prefix}post_attention_layernorm.weight": (hidden,),
                f"{prefix}block_sparse_moe.gate.weight": (config.num_local_experts, hidden),
            }
            for expert in range(config.num_local_experts):
                for key, size in (
                    ("w1", (inner, hidden)),
                    ("w2", (hidden, inner)),
                    ("w3", (inner, hidden)),
                ):
                    tensors[f"{prefix}block_sparse_moe.experts.{expert}.{key}.weight"] = size
        header, end = {}, 0
        for key, size in tensors.items():
            start, end = end, end + 2 * torch.Size(size).numel()
            header[key] = {"dtype": "BF16", "shape": list(size), "data_offsets": [start, end]}
            index[key] = name
        text = json.dumps(header).encode()
        with (folder / name).open("wb") as file:
            file.write(struct.pack("<Q", len(text)) + text)
            file.truncate(8 + len(text) + end)
    (folder / "model.safetensors.index.json").write_text(
        json.dumps({"metadata": {}, "weight_map": index})
    )


def imitate_t4() -> None:
    """Let the first card's kernels be those of a T4: lowered to sm_75, whose PTX every newer card
    runs, and attention without flash and cuDNN. Memory and speed stay the card's own. Before the
    first launch."""
    trouble = sm75.install()
    assert not trouble, trouble
    dispatch.act_as(torch.device("cuda", 0), 75)
    torch.backends.cuda.enable_flash_sdp(False)
    torch.backends.cuda.enable_cudnn_sdp(False)


@torch.no_grad()
def scale_like_real(model: nn.Module, seed: int = 1) -> None:
    """Normal weights, quantised, of a size at which a layer changes the residual stream a little,
    as in trained models: spread 0.02, embeddings 4, and what attention and experts add divided by
    twice the number of layers.

    A model of `fill` is chaotic: each layer's output is as large as the stream, and equally likely
    codes have a mean, so that one direction grows from layer to layer.
    """
    device = model.get_input_embeddings().weight.device
    generator = torch.Generator(device).manual_seed(seed)
    scale = 1 / (2 * model.config.num_hidden_layers)

    def normal(shape: torch.Size, spread: float) -> torch.Tensor:
        return torch.randn(shape, generator=generator, device=device, dtype=torch.bfloat16) * spread

    model.get_input_embeddings().weight.normal_(0, 4, generator=generator)
    for name, module in model.named_modules():
        if isinstance(module, bnb.nn.Linear4bit):
            state = module.weight.quant_state
            spread = 0.02 * (scale if "o_proj" in name else 1)
            packed, made = bnb.functional.quantize_4bit(
                normal(state.shape, spread),
                blocksize=64,
                compress_statistics=True,
                quant_type="nf4",
            )
            module.weight.data.copy_(packed.view_as(module.weight.data))
            state.absmax.copy_(made.absmax)
            state.state2.absmax.copy_(made.state2.absmax)
            state.offset.copy_(made.offset)
        elif hasattr(module, "down_proj_packed"):
            for projection in PROJECTIONS:
                packed = getattr(module, f"{projection}_packed")
                spread = 0.02 * (scale if projection == "down_proj" else 1)
                for expert in range(len(packed)):
                    made = quantise(
                        normal(torch.Size((1, packed.shape[1], packed.shape[2] * 2)), spread)
                    )
                    for piece, value in made.items():
                        getattr(module, f"{projection}_{piece}")[expert].copy_(value[0])
        elif "o_proj" in name and "lora_B" in name:
            for weight in module.parameters(recurse=False):
                weight.mul_(scale)


@torch.no_grad()
def fill(model: nn.Module, seed: int = 0) -> None:
    """Random weights in place: every 4-bit code equally likely, scales so that weights have about
    the spread 0.02."""
    numbers = itertools.count(seed * 1_000_003)

    def drawn(tensor: torch.Tensor) -> torch.Generator:
        # a tensor has the same numbers on whichever card it lies
        return torch.Generator(tensor.device).manual_seed(next(numbers))

    def scales(absmax: torch.Tensor, nested: torch.Tensor, offset: torch.Tensor) -> None:
        absmax.random_(0, 256, generator=drawn(absmax))
        nested.fill_(0.004)
        offset.fill_(0.04)

    for module in model.modules():
        if isinstance(module, bnb.nn.Linear4bit):
            state = module.weight.quant_state
            module.weight.data.random_(0, 256, generator=drawn(module.weight))
            scales(state.absmax, state.state2.absmax, state.offset)
        elif hasattr(module, "down_proj_packed"):
            for name in PROJECTIONS:
                packed = getattr(module, f"{name}_packed")
                packed.random_(0, 256, generator=drawn(packed))
                scales(
                    getattr(module, f"{name}_absmax"),
                    getattr(module, f"{name}_nested").view(torch.float32),
                    getattr(module, f"{name}_offset").view(torch.float32),
                )
        else:
            for name, weight in module.named_parameters(recurse=False):
                if weight.dim() > 1 and "lora" not in name:
                    weight.normal_(0, 0.02, generator=drawn(weight))
                elif weight.dim() == 1:
                    weight.fill_(1.0)


def device_rates() -> tuple[float, float]:
    """TFLOP/s of an 8192-cubed bf16 product of random matrices, and TB/s of a 2 GiB device copy,
    read and write."""
    a, b = (torch.randn(8192, 8192, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    data = torch.randint(0, 255, (2**31,), device="cuda", dtype=torch.uint8)
    target = torch.empty_like(data)
    return 2 * 8192**3 / seconds(lambda: a @ b) / 1e12, 2 * 2**31 / seconds(
        lambda: target.copy_(data)
    ) / 1e12


def seconds(call, repeats: int = 10, warm: int = 3) -> float:
    """Median seconds of a call on the GPU, by events."""
    for _ in range(warm):
        call()
    times = []
    for _ in range(repeats):
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        call()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end) / 1e3)
    return sorted(times)[len(times) // 2]


def write_quantised(folder: Path, layers: int = 32) -> None:
    """A folder as `save_quantised` writes it, whose layers are those of a model of one layer with
    other random numbers."""
    from safetensors.torch import load_file, save_file

    from prompt_recovery.engine import load_base, save_quantised

    one = folder.with_name(folder.name + "-one")
    write_checkpoint(one / "zeros", 1)
    base = load_base(one / "zeros", four_bit=True)
    fill(base)
    save_quantised(base, one / "zeros", folder)
    parts = {
        name: tensor
        for path in folder.glob("*.safetensors")
        for name, tensor in load_file(path).items()
    }
    for path in folder.glob("*.safetensors*"):
        path.unlink()
    config = json.loads((folder / "config.json").read_text()) | {"num_hidden_layers": layers}
    (folder / "config.json").write_text(json.dumps(config))
    first = "model.layers.0."
    outside = {name: tensor for name, tensor in parts.items() if not name.startswith(first)}
    index = dict.fromkeys(outside, "model-00000.safetensors")
    save_file(outside, folder / "model-00000.safetensors", metadata={"format": "pt"})
    for number in range(layers):
        layer = {}
        for name, tensor in parts.items():
            if name.startswith(first):
                # codes and scales; the json of a linear layer's quantisation is as it was
                if tensor.dtype == torch.uint8 and "quant_state" not in name:
                    tensor = torch.randint(
                        0, 256, tensor.shape, dtype=torch.uint8, device=base.device
                    ).cpu()
                layer[name.replace(first, f"model.layers.{number}.")] = tensor
        file = f"model-{number + 1:05d}.safetensors"
        save_file(layer, folder / file, metadata={"format": "pt"})
        index |= dict.fromkeys(layer, file)
    text = json.dumps({"metadata": {}, "weight_map": index})
    (folder / "model.safetensors.index.json").write_text(text)


def write_dense(folder: Path, layers: int = 32) -> None:
    """Mistral-7B's shape with random weights in bf16, 14.5 GB, as the hub has it."""
    from transformers import MistralConfig, MistralForCausalLM

    config = MistralConfig(num_hidden_layers=layers, vocab_size=32000, sliding_window=None)
    config.max_position_embeddings = 32768
    torch.set_default_dtype(torch.bfloat16)
    with torch.device("cuda" if torch.cuda.is_available() else "cpu"):
        model = MistralForCausalLM(config)
    torch.set_default_dtype(torch.float32)
    model.save_pretrained(folder)


if __name__ == "__main__":
    write_quantised(Path(sys.argv[1]) / "nf4")
