# SPDX-License-Identifier: Apache-2.0
"""Values of a model_config.yaml that are of another type than the architecture's fields."""

import pytest

from nemo_aligner.errors import UserError
from nemo_aligner.models.gpt.config import GPTConfig
from nemo_aligner.models.gpt.config_types import check_types, is_number, is_size

CONFIG = {
    "num_layers": 2,
    "hidden_size": 32,
    "ffn_hidden_size": 64,
    "num_attention_heads": 4,
    "vocab_size": 101,
}


def test_the_config_is_valid():
    assert GPTConfig.from_dict(CONFIG | {"kv_channels": None, "num_query_groups": 0, "window_size": [6, 0]})


@pytest.mark.parametrize(
    ("key", "value"),
    [
        *(("num_layers", value) for value in (0, -1, 2.0, "2", None, True, [2], 10**6, 10**400)),
        *(("hidden_size", value) for value in ({}, 2**31, float("nan"))),
        ("layernorm_epsilon", "1e-5"),
        ("layernorm_epsilon", float("inf")),
        ("rotary_base", 10**400),
        ("bias", "true"),
        ("bias", 1),
        ("activation", ["gelu"]),
        ("precision", {"a": 1}),
        ("rope_scaling", "yarn"),
        ("rope_scaling", {"rope_type": "yarn", "factor": "4"}),
        ("window_size", "7"),
        ("seq_len_interpolation_factor", "x" * 10_000),
    ],
)
def test_another_type_is_refused_by_key(key, value):
    with pytest.raises(UserError, match=key) as caught:
        GPTConfig.from_dict(CONFIG | {key: value})
    assert len(str(caught.value)) < 4000


def test_the_file_and_its_own_name_of_the_key_are_reported():
    with pytest.raises(
        UserError, match=r"x/config\.json: num_hidden_layers='3' is not a whole number from 1"
    ):
        check_types(
            {"num_layers": "3"}, GPTConfig, where="x/config.json", names={"num_layers": "num_hidden_layers"}
        )


def test_numbers():
    assert is_number(-1.5)
    assert is_number(0)
    assert not any(map(is_number, (True, None, "1", float("nan"), float("-inf"), 10**400)))
    assert is_size(1)
    assert not any(map(is_size, (0, 1.0, True, 2**31, "1")))
