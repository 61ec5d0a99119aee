# SPDX-License-Identifier: Apache-2.0
"""Data settings: escapes and refusals."""

import pytest

from nemo_aligner.data.config import (
    ChatPromptTokens,
    PairDataConfig,
    PromptDataConfig,
    SFTDataConfig,
    SFTSplitConfig,
    unescape,
)
from nemo_aligner.data.data_spec import Split
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


FILES = {"train": ["t"], "validation": ["v"]}


@pytest.mark.parametrize("kind", [PairDataConfig, PromptDataConfig])
def test_files_are_named_by_split(kind):
    data = kind(data_prefix=FILES)
    assert (data.splits.train, data.splits.validation) == (Split(paths=("t",)), Split(paths=("v",)))
    assert kind(data_prefix="f", splits_string="1,1", data_impl="json").splits.train.stop == 0.5


@pytest.mark.parametrize("kind", [PairDataConfig, PromptDataConfig])
@pytest.mark.parametrize(
    ("settings", "problem"),
    [
        ({"data_prefix": None}, "data_prefix is not set"),
        ({"data_impl": "mmap"}, "model.data.data_impl='mmap' cannot be read"),
        ({"data_impl": "packed_jsonl"}, "model.data.data_impl='packed_jsonl' cannot be read"),
        ({"splits_string": "98,1,1"}, "splits_string='98,1,1'"),
        ({"seq_length": 1}, "model.data.seq_length=1 is too short"),
        ({"num_workers": -1}, "model.data.num_workers=-1"),
        ({"reset_position_ids": True}, "model.data.reset_position_ids=True is not supported"),
        ({"reset_attention_mask": True}, "model.data.reset_attention_mask=True is not supported"),
        ({"dataloader_type": "cyclic"}, "model.data.dataloader_type=cyclic is not supported"),
    ],
)
def test_bad_settings_of_named_files(kind, settings, problem):
    with pytest.raises(UserError, match=problem):
        kind(**{"data_prefix": FILES, **settings})
