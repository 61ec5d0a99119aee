# SPDX-License-Identifier: Apache-2.0
"""Nemotron and Minitron: Llama's attention on a part of each head, LayerNorms stored as the deviation from 1,
and an MLP of squared ReLU without a gate.
"""

from nemo_aligner.checkpoint.mappings.llama import ATTENTION, KEYS, MLP_OUTPUT, NEMO, OUTER, OUTPUT
from nemo_aligner.checkpoint.mappings.table import Family, Key, copy, with_own

_NORMS = {
    "decoder.layers.{i}.self_attention.linear_qkv.layer_norm": "model.layers.{i}.input_layernorm",
    "decoder.layers.{i}.mlp.linear_fc1.layer_norm": "model.layers.{i}.post_attention_layernorm",
}

NEMOTRON = Family(
    architecture="NemotronForCausalLM",
    model_type="nemotron",
    keys=with_own(
        (key for key in KEYS if key.hf != "rms_norm_eps"),
        Key("norm_eps", "layernorm_epsilon", 1e-5),
        Key("max_position_embeddings", "max_position_embeddings", 4096),
        Key("initializer_range", "init_method_std", 0.0134),
    ),
    must_be={"hidden_act": "relu2"},
    bias_keys=("attention_bias", "mlp_bias"),
    rotary_share=0.5,
    nemo=NEMO | {"normalization": "layernorm1p", "activation": "squared-relu"},
    outer=(*OUTER, copy("decoder.final_layernorm.bias", "model.norm.bias", ("hidden",))),
    layer=(
        *(
            copy(f"{nemo}_{kind}", f"{hf}.{kind}", ("hidden",))
            for nemo, hf in _NORMS.items()
            for kind in ("weight", "bias")
        ),
        *ATTENTION,
        copy(
            "decoder.layers.{i}.mlp.linear_fc1",
            "model.layers.{i}.mlp.up_proj",
            ("ffn", "hidden"),
            biased_by=("bias", "mlp_bias"),
        ),
        MLP_OUTPUT,
    ),
    head=OUTPUT,
)
