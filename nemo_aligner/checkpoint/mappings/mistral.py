# SPDX-License-Identifier: Apache-2.0
"""Mistral: Llama's weights without biases, with a sliding attention window."""

from nemo_aligner.checkpoint.mappings.llama import KEYS, LAYER, NEMO, OUTER, OUTPUT
from nemo_aligner.checkpoint.mappings.table import Family, Key, with_own

MISTRAL = Family(
    architecture="MistralForCausalLM",
    model_type="mistral",
    keys=with_own(
        KEYS,
        Key("num_key_value_heads", "num_query_groups", 8),
        Key("max_position_embeddings", "max_position_embeddings", 4096 * 32),
        Key("sliding_window", "window_size", 4096),
    ),
    must_be={"hidden_act": "silu", "layer_types": None},
    nemo=NEMO,
    outer=OUTER,
    layer=LAYER,
    head=OUTPUT,
)
