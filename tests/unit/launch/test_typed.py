# SPDX-License-Identifier: Apache-2.0
"""Text on a command line reaches the settings as it was typed; all else is Hydra's."""

from pathlib import Path

import hydra
import pytest

from nemo_aligner.config.reward import RMJob
from nemo_aligner.config.sft import SFTJob
from nemo_aligner.errors import UserError
from nemo_aligner.launch.typed import as_hydra_reads
from nemo_aligner.settings import parse

CONF = Path(__file__).parents[3] / "examples/nlp/gpt/conf"
NEEDED = (
    "model.restore_from_path=model.nemo",
    "model.data.train_ds.file_path=train.jsonl",
    "model.data.validation_ds.file_path=validation.jsonl",
)


def job(*words: str) -> SFTJob:
    with hydra.initialize_config_dir(str(CONF), version_base="1.3"):
        return parse(hydra.compose("gpt_sft", as_hydra_reads([*NEEDED, *words], SFTJob)), SFTJob)


@pytest.mark.parametrize(
    "text",
    [
        "2025_06_01",
        "1e3",
        "007",
        "megatron_gpt_sft--val_loss=5.580-step=2-consumed_samples=16-epoch=0",
        "a,b",
        "run (1)",
        "run #2",
        "è",
        "it's",
        'a "b" c',
        " two  spaces ",
        "back\\slash\\",
        r"\'",
        "[x",
        "{x}",
        "true",
        "None",
        "a:b",
        "a~b",
        "100%",
        "@x",
        "!&;|<>*?",
        "line\nbreak",
        "",
        "=",
        "'",
        "'open",
        "\\${HOME}"[1:].replace("$", ""),
    ],
)
def test_text_is_taken_as_typed(text: str):
    found = job(f"name={text}", f"exp_manager.explicit_log_dir={text}", f"++exp_manager.exp_dir={text}")
    assert found.name == text
    assert found.exp_manager.explicit_log_dir == text
    assert found.exp_manager.exp_dir == text


def test_a_path_begins_at_home(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("HOME", "/home/ada")
    found = job(
        "exp_manager.explicit_log_dir=~/runs/a=b", "name=~/x", "model.data.train_ds.file_path=~/t.jsonl"
    )
    assert found.exp_manager.explicit_log_dir == "/home/ada/runs/a=b"
    assert found.model.data.train_ds.file_path == "/home/ada/t.jsonl"
    assert found.name == "~/x", "a name is no path"
    prefix = "model.data.data_prefix={train: ['~/a.jsonl'], validation: [0.5, '~/b.jsonl'], test: [c.jsonl]}"
    with hydra.initialize_config_dir(str(CONF), version_base="1.3"):
        words = as_hydra_reads(["pretrained_checkpoint.restore_from_path=m", prefix], RMJob)
        splits = parse(hydra.compose("training_rm", words), RMJob).model.data.splits
    assert splits.train.paths == ("/home/ada/a.jsonl",)
    assert splits.validation.paths == ("/home/ada/b.jsonl",)


@pytest.mark.parametrize(
    ("word", "key", "value"),
    [
        ('name="a b"', "name", "a b"),  # the user's own quotes, as command lines before had them
        ("name='a=b'", "name", "a=b"),
        ("name=${model.optim.name}", "name", "distributed_fused_adam"),
    ],
)
def test_quotes_and_references_stay_hydras(word: str, key: str, value: str):
    assert getattr(job(word), key) == value


def test_what_is_no_text_is_hydras():
    found = job(
        "exp_manager.max_time_per_run=null",
        "exp_manager.explicit_log_dir=null",
        "model.optim.betas=[0.9,0.95]",
        "model.optim.lr=1e-3",
        "trainer.sft.val_check_interval=0.5",
        "trainer.precision=32",
        "model.data.chat_prompt_tokens={turn_start: X}",
    )
    assert found.exp_manager.max_time_per_run is None
    assert found.exp_manager.explicit_log_dir is None
    assert found.model.optim.betas == (0.9, 0.95)
    assert found.model.optim.lr == 1e-3
    assert found.trainer.sft.val_check_interval == 0.5
    assert found.trainer.precision == 32
    assert found.model.data.chat_prompt_tokens.turn_start == "X"


@pytest.mark.parametrize(
    ("word", "fix"),
    [
        ("model.optim.lr=1,5e-3", "model.optim.lr=1.5e-3"),
        ("model.optim.weight_decay=0,1", "model.optim.weight_decay=0.1"),
        ("trainer.devices=1,0", "trainer.devices=1"),
    ],
)
def test_a_decimal_comma_is_reported(word: str, fix: str):
    with pytest.raises(UserError, match=rf"Fix: .*{fix}$"):
        job(word)


def test_flags_and_deletions_are_left_alone():
    words = ["--cfg", "job", "~model.optim", "-m", "hydra.run.dir=."]
    assert as_hydra_reads(words, SFTJob) == [*words[:-1], "++hydra.run.dir=."]
