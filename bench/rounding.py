"""A LoRA's first steps in fp32, in fp16 with a loss scaler and in bf16, on a small Mixtral whose
weights have the proportions of `true_shape.scale_like_real`.

python bench/rounding.py [--layers 32] [--rate 3e-4]     on a CPU, 5 minutes with 32 layers

Prints each loss, and how far the two 16-bit ways are from fp32.
"""

from __future__ import annotations

import argparse
import math

import torch
from torch.nn import functional
from transformers import MixtralConfig, MixtralForCausalLM

from prompt_recovery.adapter import add_lora
from prompt_recovery.examples import IGNORED

STEPS, VOCABULARY, HIDDEN = 20, 2_000, 256


def losses(dtype: torch.dtype, layers: int, rate: float) -> list[float]:
    """Of the steps on the same four rows of 64 tokens, of which the last 24 are supervised."""
    model = add_lora(small_model(layers).to(dtype), base="rounding", dropout=0.0)
    model.train()
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimiser = torch.optim.AdamW(trained, lr=rate, weight_decay=0)
    scaler = torch.amp.GradScaler("cpu", enabled=dtype == torch.float16)
    torch.manual_seed(3)
    ids = torch.randint(5, VOCABULARY, (4, 64))
    labels = ids.clone()
    labels[:, :-24] = IGNORED
    found = []
    for _ in range(STEPS):
        with torch.autocast("cpu", dtype=dtype, enabled=dtype != torch.float32):
            logits = model(input_ids=ids, use_cache=False).logits[:, :-1].float()
        loss = functional.cross_entropy(logits.flatten(0, 1), labels[:, 1:].flatten())
        scaler.scale(loss).backward()
        scaler.unscale_(optimiser)
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        scaler.step(optimiser)
        scaler.update()
        optimiser.zero_grad()
        found.append(loss.item())
    return found


@torch.no_grad()
def small_model(layers: int) -> MixtralForCausalLM:
    """Weights that both 16-bit types hold; a matrix enlarges its input as one of 4,096 columns of
    spread 0.02 does."""
    config = MixtralConfig(
        hidden_size=HIDDEN, intermediate_size=2 * HIDDEN, num_hidden_layers=layers,
        num_attention_heads=8, num_key_value_heads=2, vocab_size=VOCABULARY, num_local_experts=4,
    )  # fmt: skip
    model = MixtralForCausalLM(config)
    torch.manual_seed(1)
    for name, weight in model.named_parameters():
        if "embed" in name:
            weight.normal_(0, 4)
        elif weight.dim() > 1:
            spread = 0.02 * math.sqrt(4_096 / HIDDEN)
            weight.normal_(
                0, spread / (2 * layers) if "o_proj" in name or "down" in name else spread
            )
        weight.copy_(weight.to(torch.bfloat16))
    return model


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--layers", type=int, default=32)
    parser.add_argument("--rate", type=float, default=3e-4)
    args = parser.parse_args()
    exact = losses(torch.float32, args.layers, args.rate)
    print("fp32", *(f"{loss:.4f}" for loss in exact), flush=True)
    for dtype in (torch.float16, torch.bfloat16):
        found = losses(dtype, args.layers, args.rate)
        apart = [abs(a - b) / b for a, b in zip(found, exact, strict=True)]
        print(dtype, *(f"{loss:.4f}" for loss in found))
        print(f"off fp32 by {max(apart):.2%} at most, {apart[-1]:.2%} at the end", flush=True)


if __name__ == "__main__":
    main()
