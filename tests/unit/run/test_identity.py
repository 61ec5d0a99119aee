# SPDX-License-Identifier: Apache-2.0
"""A run's settings and command are written so that they can be used again, and what changes is told."""

import shlex
from pathlib import Path

import hydra
import pytest
from omegaconf import OmegaConf

from nemo_aligner.config.resume import changes, plain
from nemo_aligner.config.reward import RMJob
from nemo_aligner.config.sft import SFTJob
from nemo_aligner.errors import UserError
from nemo_aligner.run.identity import RunIdentity, asked_keys, read_settings
from nemo_aligner.settings import parse

EOS = "model.data.train_ds.add_eos"
CONF = Path(__file__).parents[3] / "examples/nlp/gpt/conf"
SFT = [
    "trainer.precision=bf16",
    "model.restore_from_path=m.nemo",
    "model.data.train_ds.file_path=t",
    "model.data.validation_ds.file_path=v",
]
RM = [
    "pretrained_checkpoint.restore_from_path=m.nemo",
    "model.data.data_prefix={train: [t], validation: [v], test: [v]}",
]


def job(name: str, kind: type, words: list[str]) -> object:
    with hydra.initialize_config_dir(str(CONF), version_base="1.3"):
        return parse(hydra.compose(name, [f"++{word}" for word in words]), kind)


@pytest.mark.parametrize(
    ("name", "kind", "words"),
    [
        (
            "gpt_sft",
            SFTJob,
            [*SFT, "model.hidden_dropout=0.1", "model.data.train_ds.prompt_template='{input}\n{output}'"],
        ),
        ("training_rm", RMJob, RM),
    ],
)
def test_the_settings_that_are_written_make_the_same_job(
    tmp_path: Path, name: str, kind: type, words: list[str]
):
    whole = job(name, kind, words)
    RunIdentity(settings=plain(whole), base_model="").write(tmp_path)
    assert parse(OmegaConf.load(tmp_path / "config.yaml"), kind) == whole
    assert read_settings(tmp_path) == plain(whole)


def test_the_command_can_be_pasted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    words = ["python", "a b.py", "model.x='{a: \"b\"}'", "$HOME", "è", "line\nbreak"]
    monkeypatch.setattr("sys.orig_argv", words)
    RunIdentity(settings={}, base_model="").write(tmp_path)
    comment, command = (tmp_path / "command.txt").read_text().split("\n", 1)
    assert comment.startswith("# ")
    assert shlex.split(command) == words


def test_the_keys_of_a_command_line(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(
        "sys.argv", ["x.py", "++model.optim.lr=1", "+trainer.a=b=c", "--cfg", "model.data={a: 1}"]
    )
    assert asked_keys() == {"model.optim.lr", "trainer.a", "model.data"}


def test_a_config_that_cannot_be_read_is_refused(tmp_path: Path):
    assert read_settings(tmp_path) is None
    for content in (b"a: [", b"\xff", b"- 1"):
        (tmp_path / "config.yaml").write_bytes(content)
        with pytest.raises(UserError, match=r"config\.yaml"):
            read_settings(tmp_path)


@pytest.mark.parametrize(
    ("words", "asked", "told", "refused"),
    [
        (["model.optim.lr=5e-4"], ["model.optim.lr"], "model.optim.lr was 0.001, is 0.0005", False),
        (["model.optim.lr=5e-4"], ["model.optim"], "model.optim.lr was 0.001, is 0.0005", False),
        (["model.optim.lr=5e-4"], [], "model.optim.lr was 0.001, is 0.0005", True),
        (["model.hidden_dropout=0.1"], [], "model.hidden_dropout was null, is 0.1", True),
        (["trainer.precision=32"], ["trainer.precision"], "trainer.precision was bf16, is 32", True),
        (["trainer.devices=2"], [], "trainer.devices was 1, is 2", False),
        (["model.seed=5"], ["model.seed"], "model.seed was 1234, is 5", True),
        ([f"{EOS}=False"], [EOS], f"{EOS} was True, is False", True),
    ],
    ids=str,
)
def test_what_changes_is_reported_and_judged(words: list[str], asked: list[str], told: str, refused: bool):
    before, now = (
        plain(job("gpt_sft", SFTJob, [*SFT, "model.optim.lr=1e-3", *more])) for more in ([], words)
    )
    # What the validation's settings repeat is told of them, too.
    change = next(one for one in changes(before, now, asked=asked) if "validation_ds" not in one.key)
    assert str(change) == told
    assert change.is_refused == refused
    assert changes(before, before, asked=[]) == []


def test_keys_that_another_release_has_are_not_compared():
    assert changes({"model": {"seed": 1, "gone": 2}}, {"model": {"seed": 1, "new": 3}}, asked=[]) == []
