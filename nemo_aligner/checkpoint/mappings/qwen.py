# SPDX-License-Identifier: Apache-2.0
"""Qwen2 and Qwen2.5: Llama's weights with biases on query, key and value alone. Qwen3: without them, with a
norm on each query and key head.
"""

from dataclasses import replace

from nemo_aligner.checkpoint.mappings.llama import LLAMA
from nemo_aligner.checkpoint.mappings.table import Key, copy, with_own

QWEN2 = replace(
    LLAMA,
    architecture="Qwen2ForCausalLM",
    model_type="qwen2",
    keys=with_own(
        LLAMA.keys,
        Key("num_key_value_heads", "num_query_groups", 32),
        Key("max_position_embeddings", "max_position_embeddings", 32768),
    ),
    bias_keys=(),
    window_by_layer=True,
    nemo=LLAMA.nemo | {"qkv_bias": True},
)

QWEN3 = replace(
    QWEN2,
    architecture="Qwen3ForCausalLM",
    model_type="qwen3",
    keys=with_own(QWEN2.keys, Key("head_dim", "kv_channels", 128)),
    bias_keys=("attention_bias",),
    nemo=LLAMA.nemo | {"qk_layernorm": True},
    layer=(
        *LLAMA.layer,
        copy("self_attention.q_layernorm.weight", "self_attn.q_norm.weight", ("head_dim",)),
        copy("self_attention.k_layernorm.weight", "self_attn.k_norm.weight", ("head_dim",)),
    ),
)
