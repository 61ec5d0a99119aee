# SPDX-License-Identifier: Apache-2.0
"""Nemotron and Minitron: Llama's attention on a part of each head, LayerNorms stored as the deviation from 1,
and an MLP of squared ReLU without a gate.
"""

from dataclasses import replace

from nemo_aligner.checkpoint.mappings.llama import ATTENTION, LLAMA, MLP_OUTPUT
from nemo_aligner.checkpoint.mappings.table import Key, copy, with_own

_NORMS = {
    "self_attention.linear_qkv.layer_norm": "input_layernorm",
    "mlp.linear_fc1.layer_norm": "post_attention_layernorm",
}

NEMOTRON = replace(
    LLAMA,
    architecture="NemotronForCausalLM",
    model_type="nemotron",
    keys=with_own(
        (key for key in LLAMA.keys if key.hf != "rms_norm_eps"),
        Key("norm_eps", "layernorm_epsilon", 1e-5),
        Key("max_position_embeddings", "max_position_embeddings", 4096),
        Key("initializer_range", "init_method_std", 0.0134),
    ),
    must_be={"hidden_act": "relu2"},
    rotary_share=0.5,
    nemo=LLAMA.nemo | {"normalization": "layernorm1p", "activation": "squared-relu"},
    outer=(*LLAMA.outer, copy("decoder.final_layernorm.bias", "model.norm.bias", ("hidden",))),
    layer=(
        *(
            copy(f"{nemo}_{kind}", f"{hf}.{kind}", ("hidden",))
            for nemo, hf in _NORMS.items()
            for kind in ("weight", "bias")
        ),
        *ATTENTION,
        copy("mlp.linear_fc1", "mlp.up_proj", ("ffn", "hidden"), biased_by=("bias", "mlp_bias")),
        MLP_OUTPUT,
    ),
)
