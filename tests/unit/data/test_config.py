# SPDX-License-Identifier: Apache-2.0
"""Data settings: escapes and refusals."""

import pytest

from nemo_aligner.data.config import ChatPromptTokens, SFTDataConfig, SFTSplitConfig, unescape
from nemo_aligner.errors import UserError


@pytest.mark.parametrize(
    ("typed", "meant"),
    [
        (r"a\nb", "a\nb"),
        (r"\t\r", "\t\r"),
        (r"\x11é", "\x11é"),
        (r"\\n", r"\n"),
        ("a\nb", "a\nb"),
        (r"\q", r"\q"),
    ],
)
def test_unescape(typed, meant):
    assert unescape(typed) == meant


def test_escapes_are_understood_in_prompt_tokens():
    assert ChatPromptTokens(end_of_turn=r"\n", turn_start=r"\x11").unescaped() == ChatPromptTokens()


@pytest.mark.parametrize(
    "bad",
    [
        {"global_batch_size": 0},
        {"micro_batch_size": -1},
        {"max_seq_length": 1},
        {"truncation_method": "middle"},
    ],
)
def test_bad_splits_name_key_and_value(bad):
    ((key, value),) = bad.items()
    with pytest.raises(UserError, match=f"{key}={value!r}"):
        SFTSplitConfig(file_path="f", **bad)


@pytest.mark.parametrize("bad", [{"chat_template": "chatml"}, {"num_workers": -1}])
def test_bad_data_names_key_and_value(bad):
    ((key, value),) = bad.items()
    split = SFTSplitConfig(file_path="f")
    with pytest.raises(UserError, match=f"{key}={value!r}"):
        SFTDataConfig(train_ds=split, validation_ds=split, **bad)
