"""Folders of tiny base models of several families."""

import torch
from transformers import (
    AutoModelForCausalLM,
    LlamaConfig,
    MistralConfig,
    Qwen2MoeConfig,
    Qwen3MoeConfig,
)

COMMON = dict(
    vocab_size=320,
    hidden_size=128,
    num_hidden_layers=3,
    num_attention_heads=4,
    num_key_value_heads=2,
    initializer_range=0.1,
    bos_token_id=1,
    eos_token_id=2,
)
# an expert's gate_up has 384 blocks of 64: the second block of the double quantisation is not full
MIXTRAL = COMMON | dict(
    intermediate_size=96, head_dim=32, num_local_experts=4, num_experts_per_tok=2
)


def write(folder, config, dtype=torch.bfloat16):
    """A model with random weights as the hub has it: shards, and for Mixtral the hub's names of the
    experts."""
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config).to(dtype).save_pretrained(
        folder, max_shard_size="200KB"
    )
    return folder


OTHERS = {
    "qwen2_moe": Qwen2MoeConfig(  # a shared expert with a gate, biases
        **COMMON,
        intermediate_size=64,
        moe_intermediate_size=96,
        shared_expert_intermediate_size=64,
        num_experts=6,
        num_experts_per_tok=2,
        mlp_only_layers=[1],
    ),
    "qwen3_moe": Qwen3MoeConfig(  # norms of q and k, tied embeddings
        **COMMON,
        intermediate_size=64,
        moe_intermediate_size=96,
        head_dim=32,
        num_experts=6,
        num_experts_per_tok=3,
        tie_word_embeddings=True,
    ),
    "llama": LlamaConfig(**COMMON, intermediate_size=192, tie_word_embeddings=True),
    "mistral": MistralConfig(**COMMON, intermediate_size=192),
}
