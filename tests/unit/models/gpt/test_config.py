# SPDX-License-Identifier: Apache-2.0
"""model_config.yaml, read: defaults, NeMo's own names, and what is refused with a fix."""

import pytest
import torch

from nemo_aligner.errors import UserError
from nemo_aligner.models.gpt.config import GPTConfig, RopeScaling, unread_keys
from nemo_aligner.models.gpt.transformer import dtype_of
from nemo_aligner.parallel.ranks import Layout

SMALL = {
    "num_layers": 6,
    "hidden_size": 48,
    "num_attention_heads": 12,
    "num_query_groups": 4,
    "vocab_size": 1000,
}


@pytest.mark.parametrize(
    ("precision", "dtype"),
    [
        (32, torch.float32),
        ("32-true", torch.float32),
        ("bf16", torch.bfloat16),
        ("bf16-mixed", torch.bfloat16),
        (16, torch.float16),
        ("fp16", torch.float16),
    ],
)
def test_precisions(precision: str | int, dtype: torch.dtype):
    assert dtype_of(precision) == dtype


def test_an_unknown_precision_is_refused():
    with pytest.raises(UserError, match=r"precision='fp8'[\s\S]*Fix: .*32, bf16, 16 or auto"):
        dtype_of("fp8")


def test_what_a_config_leaves_out():
    config = GPTConfig.from_dict(SMALL | {"ffn_hidden_size": None, "trainer": {}, "num_query_groups": None})
    assert (config.ffn_hidden_size, config.head_dim, config.query_groups) == (192, 4, 12)
    assert GPTConfig.from_dict(SMALL | {"kv_channels": 16}).head_dim == 16


@pytest.mark.parametrize(
    ("names", "scaling"),
    [
        ({"rope_scaling": None}, None),
        ({"seq_len_interpolation_factor": 4}, RopeScaling(rope_type="linear", factor=4)),
        ({"scale_positional_embedding": True}, RopeScaling(rope_type="llama3", factor=8.0)),
        (
            {"scale_positional_embedding": True, "scale_factor": 32.0},
            RopeScaling(rope_type="llama3", factor=32.0),
        ),
        (
            {"rope_scaling": {"rope_type": "linear", "factor": 2.0, "rope_theta": 1e4}},
            RopeScaling(rope_type="linear", factor=2.0),
        ),
    ],
)
def test_rope_scaling_by_either_name(names: dict, scaling: RopeScaling | None):
    assert GPTConfig.from_dict(SMALL | names).rope_scaling == scaling


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_attention_heads": 5}, r"hidden_size=48 .*num_attention_heads=5[\s\S]*kv_channels"),
        ({"num_query_groups": 5}, "num_attention_heads=12 .*num_query_groups=5"),
        ({"normalization": "batchnorm"}, r"normalization='batchnorm'[\s\S]*rmsnorm, layernorm, layernorm1p"),
        ({"activation": "relu"}, r"activation='relu'[\s\S]*fast-swiglu"),
        ({"position_embedding_type": "alibi"}, "position_embedding_type='alibi'"),
        (
            {"rope_scaling": {"rope_type": "linear", "factor": 2.0}, "seq_len_interpolation_factor": 4},
            r"scaled twice.*seq_len_interpolation_factor[\s\S]*keep one",
        ),
        ({"rope_scaling": {"rope_type": "su"}}, r"rope_type='su'[\s\S]*linear, llama3, yarn"),
        ({"rope_scaling": {"rope_type": "yarn"}}, r"rope_scaling.factor=None"),
        ({"transformer_block_type": "post_ln"}, r"transformer_block_type='post_ln'[\s\S]*pre_ln"),
        ({"attention_type": "multi_query"}, "attention_type='multi_query'"),
        ({"headscale": True}, "headscale=True"),
        ({"normalize_attention_scores": False}, "normalize_attention_scores=False"),
        ({"multi_query_attention": True}, "multi_query_attention=True"),
        ({"rotary_interleaved": True}, "rotary_interleaved=True"),
        ({"apply_embedding_scaling": True}, "apply_embedding_scaling=True"),
        ({"num_moe_experts": 8}, "num_moe_experts=8"),
        ({"fp8": True}, "model.fp8=True"),
        ({"window_size": [7, 7]}, r"window_size=\[7, 7\]"),
    ],
)
def test_what_cannot_be_built_is_refused(changes: dict, message: str):
    with pytest.raises(UserError, match=message):
        GPTConfig.from_dict(SMALL | changes)


@pytest.mark.parametrize(
    ("window", "tokens"), [(None, None), (7, 7), ([6, 0], 7), ([-1, 0], None), ([-1, -1], None)]
)
def test_windows_as_numbers_and_as_pairs(window: object, tokens: int | None):
    assert GPTConfig.from_dict(SMALL | {"window_size": window}).window_size == tokens


@pytest.mark.parametrize("key", ["num_layers", "hidden_size", "num_attention_heads", "vocab_size"])
def test_a_missing_size_is_named(key: str):
    with pytest.raises(UserError, match=f"model_config.yaml lacks {key}"):
        GPTConfig.from_dict({k: v for k, v in SMALL.items() if k != key})


@pytest.mark.parametrize(
    ("layout", "message"),
    [
        (Layout(tensor=5), r"tensor_model_parallel_size=5 .*num_attention_heads=12[\s\S]*one of \[1, 2, 4\]"),
        (Layout(tensor=3), r"num_query_groups=4[\s\S]*one of \[1, 2, 4\]"),
        (Layout(pipeline=4), r"pipeline_model_parallel_size=4 .*num_layers=6[\s\S]*one of \[1, 2, 3, 6\]"),
        (
            Layout(pipeline=2, virtual_pipeline=2),
            r"virtual_pipeline_model_parallel_size=2 does not divide the 3 layers[\s\S]*one of \[1, 3\]",
        ),
    ],
)
def test_a_layout_that_cannot_cut_the_model_is_refused(layout: Layout, message: str):
    with pytest.raises(UserError, match=message):
        GPTConfig.from_dict(SMALL).check_layout(layout)


@pytest.mark.parametrize(
    ("tensor", "rows"), [(1, 1024), (2, 1024), (4, 1024), (8, 1024), (16, 2048), (3, 1152)]
)
def test_the_vocabulary_is_padded_to_equal_slices(tensor: int, rows: int):
    assert GPTConfig.from_dict(SMALL).padded_vocab_size(tensor) == rows


def test_keys_that_nothing_reads_are_known():
    config = {"num_layers": 2, "scale_factor": 8, "tokenizer": {}, "target": "x.y", "nsys_profile": {}}
    assert unread_keys(config) == ["nsys_profile", "target"]


@pytest.mark.parametrize(
    ("groups", "fits"), [(1, [1, 2, 4]), (2, [1, 2, 4]), (3, [1, 3, 6, 12]), (4, [1, 2, 4])]
)
def test_keys_may_be_fewer_than_ranks(groups: int, fits: list[int]):
    config = GPTConfig.from_dict(SMALL | {"num_query_groups": groups})
    for ranks in range(1, 13):
        if ranks in fits:
            config.check_layout(Layout(tensor=ranks))
            continue
        with pytest.raises(UserError, match=f"tensor_model_parallel_size={ranks} ") as refused:
            config.check_layout(Layout(tensor=ranks))
        assert refused.value.fix.endswith(f"one of {fits}")
