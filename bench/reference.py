"""The model in fp32 from the dequantised weights, a layer at a time: what 16-bit ways to compute
are measured against."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch.nn import functional
from torch.nn.attention import SDPBackend, sdpa_kernel

from prompt_recovery.engine.merging import _merged_linear
from prompt_recovery.engine.storage import expert_weights
from prompt_recovery.recipe import Recipe


class Trace(NamedTuple):
    """Of some places of a text: logits [places, vocabulary], hidden states after each layer
    [layers, places, hidden]; fp32."""

    logits: torch.Tensor
    hidden: torch.Tensor


@torch.inference_mode()
def reference(lora: Any, texts: list[list[int]], places: list[slice]) -> list[Trace]:
    """The traces of texts (token ids), each at its places, by a Mixtral with an adapter on its
    attention."""
    torch.backends.cuda.matmul.allow_tf32 = False
    model = lora.get_base_model()
    config, decoder = model.config, model.model
    heads, size = config.num_attention_heads, decoder.layers[0].self_attn.head_dim
    ids = [torch.tensor([text], device=model.device) for text in texts]
    hidden = [decoder.embed_tokens(each).float()[0] for each in ids]
    kept: list[list[torch.Tensor]] = [[] for _ in texts]

    def norm(module: Any, x: torch.Tensor) -> torch.Tensor:
        return functional.rms_norm(
            x, (x.shape[-1],), module.weight.float(), module.variance_epsilon
        )

    def turn(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
        left, right = x.chunk(2, -1)
        return x * cos + torch.cat((-right, left), -1) * sin

    for layer in decoder.layers:
        q, k, v, o = (
            _merged_linear(getattr(layer.self_attn, name), torch.float32).weight.t()
            for name in Recipe.target_modules
        )
        for number, x in enumerate(hidden):
            cos, sin = decoder.rotary_emb(x[None], torch.arange(len(x), device=x.device)[None])
            inner = norm(layer.input_layernorm, x)
            query, key, value = (
                (inner @ weight).view(len(x), -1, size).transpose(0, 1) for weight in (q, k, v)
            )
            with sdpa_kernel(SDPBackend.MATH):
                found = functional.scaled_dot_product_attention(
                    turn(query, cos[0], sin[0])[None],
                    turn(key, cos[0], sin[0])[None],
                    value[None],
                    is_causal=True,
                    enable_gqa=True,
                )[0]
            hidden[number] = x + found.transpose(0, 1).reshape(len(x), heads * size) @ o
        x = norm(layer.post_attention_layernorm, torch.cat(hidden))
        odds = (x @ layer.mlp.gate.weight.float().t()).softmax(-1)
        top_k_weights, index = odds.topk(config.num_experts_per_tok)
        top_k_weights = top_k_weights / top_k_weights.sum(-1, keepdim=True)
        out = torch.zeros_like(x)
        for expert in range(config.num_local_experts):
            rows, choice = (index == expert).nonzero(as_tuple=True)
            gate_up, down = (
                expert_weights(layer.mlp.experts, torch.float32)(name, expert).clone()
                for name in ("gate_up_proj", "down_proj")
            )
            gate, up = (x[rows] @ gate_up.t()).chunk(2, -1)
            out.index_add_(
                0, rows, (functional.silu(gate) * up) @ down.t() * top_k_weights[rows, choice, None]
            )
        hidden = [a + b for a, b in zip(hidden, out.split([len(a) for a in hidden]), strict=True)]
        for each, x, where in zip(kept, hidden, places, strict=True):
            each.append(x[where])
    head = model.lm_head.weight.float().t()
    ends = [norm(decoder.norm, x[where]) @ head for x, where in zip(hidden, places, strict=True)]
    return [Trace(end, torch.stack(each)) for end, each in zip(ends, kept, strict=True)]
