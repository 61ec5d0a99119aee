# SPDX-License-Identifier: Apache-2.0
"""Mistral: Llama's weights without biases, with a sliding attention window."""

from dataclasses import replace

from nemo_aligner.checkpoint.mappings.llama import LLAMA
from nemo_aligner.checkpoint.mappings.table import Key, with_own

MISTRAL = replace(
    LLAMA,
    architecture="MistralForCausalLM",
    model_type="mistral",
    keys=with_own(
        LLAMA.keys,
        Key("num_key_value_heads", "num_query_groups", 8),
        Key("max_position_embeddings", "max_position_embeddings", 4096 * 32),
        Key("sliding_window", "window_size", 4096),
    ),
    must_be={"hidden_act": "silu", "layer_types": None},
    bias_keys=(),
)
