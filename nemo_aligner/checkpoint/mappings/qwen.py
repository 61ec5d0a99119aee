# SPDX-License-Identifier: Apache-2.0
"""Qwen2 and Qwen2.5: Llama's weights with biases on query, key and value alone. Qwen3: without them, with a
norm on each query and key head.
"""

from nemo_aligner.checkpoint.mappings.llama import KEYS, LAYER, NEMO, OUTER, OUTPUT
from nemo_aligner.checkpoint.mappings.table import Family, Key, copy, with_own

_KEYS = with_own(
    KEYS,
    Key("num_key_value_heads", "num_query_groups", 32),
    Key("max_position_embeddings", "max_position_embeddings", 32768),
)

QWEN2 = Family(
    architecture="Qwen2ForCausalLM",
    model_type="qwen2",
    keys=_KEYS,
    must_be={"hidden_act": "silu"},
    window_by_layer=True,
    nemo=NEMO | {"qkv_bias": True},
    outer=OUTER,
    layer=LAYER,
    head=OUTPUT,
)

QWEN3 = Family(
    architecture="Qwen3ForCausalLM",
    model_type="qwen3",
    keys=with_own(_KEYS, Key("head_dim", "kv_channels", 128)),
    must_be={"hidden_act": "silu"},
    bias_keys=("attention_bias",),
    window_by_layer=True,
    nemo=NEMO | {"qk_layernorm": True},
    outer=OUTER,
    layer=(
        *LAYER,
        copy(
            "decoder.layers.{i}.self_attention.q_layernorm.weight",
            "model.layers.{i}.self_attn.q_norm.weight",
            ("head_dim",),
        ),
        copy(
            "decoder.layers.{i}.self_attention.k_layernorm.weight",
            "model.layers.{i}.self_attn.k_norm.weight",
            ("head_dim",),
        ),
    ),
    head=OUTPUT,
)
