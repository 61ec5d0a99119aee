# SPDX-License-Identifier: Apache-2.0
"""Llama 2, 3 and 3.x, and the models that share their architecture (SmolLM2, ...)."""

from nemo_aligner.checkpoint.mappings.table import DERIVED, Family, Key, copy, gated_mlp, qkv

ATTENTION = (
    qkv("self_attention.linear_qkv", q="self_attn.q_proj", k="self_attn.k_proj", v="self_attn.v_proj"),
    copy(
        "self_attention.linear_proj",
        "self_attn.o_proj",
        ("hidden", "query"),
        biased_by=("bias", "attention_bias"),
    ),
)

MLP_OUTPUT = copy("mlp.linear_fc2", "mlp.down_proj", ("hidden", "ffn"), biased_by=("bias", "mlp_bias"))

LLAMA = Family(
    architecture="LlamaForCausalLM",
    model_type="llama",
    keys=(
        Key("vocab_size", "vocab_size"),
        Key("num_hidden_layers", "num_layers"),
        Key("hidden_size", "hidden_size"),
        Key("intermediate_size", "ffn_hidden_size"),
        Key("num_attention_heads", "num_attention_heads"),
        Key("num_key_value_heads", "num_query_groups", None),
        Key("head_dim", "kv_channels", DERIVED),
        Key("max_position_embeddings", "max_position_embeddings", 2048),
        Key("rms_norm_eps", "layernorm_epsilon", 1e-6),
        Key("initializer_range", "init_method_std", 0.02),
        Key("attention_dropout", "attention_dropout", 0.0),
        Key("tie_word_embeddings", "share_embeddings_and_output_weights", False),
    ),
    must_be={"hidden_act": "silu"},
    bias_keys=("attention_bias", "mlp_bias"),
    nemo={
        "mcore_gpt": True,
        "normalization": "rmsnorm",
        "activation": "fast-swiglu",
        "position_embedding_type": "rope",
        "rotary_percentage": 1.0,
        "hidden_dropout": 0.0,
        "make_vocab_size_divisible_by": 128,
    },
    outer=(
        copy("embedding.word_embeddings.weight", "model.embed_tokens.weight", ("vocab", "hidden")),
        copy("decoder.final_layernorm.weight", "model.norm.weight", ("hidden",)),
    ),
    layer=(
        copy("self_attention.linear_qkv.layer_norm_weight", "input_layernorm.weight", ("hidden",)),
        *ATTENTION,
        copy("mlp.linear_fc1.layer_norm_weight", "post_attention_layernorm.weight", ("hidden",)),
        gated_mlp("mlp.linear_fc1", gate="mlp.gate_proj", up="mlp.up_proj"),
        MLP_OUTPUT,
    ),
    head=copy("output_layer.weight", "lm_head.weight", ("vocab", "hidden")),
)
