# SPDX-License-Identifier: Apache-2.0
"""A user's mistake: the setting, its value and the fix, told once and without a traceback, nothing overwritten.

Most cases run the script's own steps in this process; the last ones look at what a person sees of the script.
"""

import dataclasses
import io
import json
import shutil
import tarfile
from collections.abc import Callable, Iterator
from pathlib import Path

import hydra
import pytest
from omegaconf import DictConfig
from transformers import AutoTokenizer

from nemo_aligner.builders import load_policy, sft_loaders
from nemo_aligner.checkpoint.convert import import_from_huggingface
from nemo_aligner.checkpoint.nemo_archive import open_nemo, write_nemo
from nemo_aligner.config.sft import SFTJob
from nemo_aligner.errors import UserError
from nemo_aligner.parallel import world
from nemo_aligner.settings import parse

CONF = Path(__file__).parents[2] / "examples/nlp/gpt/conf"


def compose(settings: dict[str, object]) -> DictConfig:
    with hydra.initialize_config_dir(str(CONF), version_base="1.3"):
        return hydra.compose("gpt_sft", [f"++{key}={value}" for key, value in settings.items()])


def checked(settings: dict[str, object], *, world_size: int | None = None) -> SFTJob:
    """What the starter does before any rank."""
    job = parse(compose(settings), SFTJob)
    job.check(world_size)
    job.check_paths()
    return job


@pytest.fixture(scope="module", autouse=True)
def _one_rank() -> Iterator[None]:
    with world.ensure_single_process():
        yield


def loaded(settings: dict[str, object]) -> None:
    """What a rank does before its first step."""
    job = checked(settings)
    pretrained = load_policy(job)
    sft_loaders(job, pretrained)


def refused(work: Callable[[], object], *words: str) -> None:
    """``work`` raises a UserError whose problem or fix has all ``words``, and whose fix is one line."""
    with pytest.raises(UserError) as error:
        work()
    text = str(error.value)
    missing = [word for word in words if word not in text]
    assert not missing, f"{missing} not in: {text}"
    assert text.splitlines()[-1].startswith("Fix: ")


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        (
            {"model.data.train_ds.file_path": "no.jsonl"},
            ["model.data.train_ds.file_path=no.jsonl", "does not exist"],
        ),
        ({"model.restore_from_path": "no.nemo"}, ["model.restore_from_path=no.nemo", "does not exist"]),
        (
            {"trainer.devices": 3, "model.tensor_model_parallel_size": 2},
            ["trainer.devices=3", "=2", "devices=4"],
        ),
        ({"trainer.devices": 0}, ["trainer.devices=0", "1 or more"]),
        ({"trainer.devices": "two"}, ["trainer.devices='two'", "int"]),
        ({"trainer.precision": "fp8"}, ["precision='fp8'", "trainer.precision", "bf16"]),
        ({"trainer.sft.max_steps": 0}, ["trainer.sft.max_steps=0", "-1"]),
        (
            {"trainer.sft.max_step": 5},
            ["unknown key trainer.sft.max_step", "did you mean trainer.sft.max_steps?"],
        ),
        ({"model.data.tran_ds.micro_batch_size": 1}, ["model.data.tran_ds", "model.data.train_ds?"]),
        (
            {"model.optim.sched.min_learning_rate": 0},
            ["model.optim.sched.min_learning_rate", "did you mean model.optim.sched.min_lr?"],
        ),
        ({"trainer.sft.zzz": 5}, ["unknown key trainer.sft.zzz", "known keys", "trainer.sft.max_steps"]),
        ({"model.hiden_dropout": 0.1}, ["model.hiden_dropout", "did you mean model.hidden_dropout?"]),
        ({"model.optim": 3}, ["model.optim=3", "block of keys"]),
        (
            {"model.answer_only_loss": False, "trainer.sft.val_responses": 2},
            ["trainer.sft.val_responses=2", "model.answer_only_loss=False"],
        ),
        ({"model.optim.lr": "fast"}, ["model.optim.lr='fast'", "number"]),
        (
            {"model.optim.lr": 1e-8, "model.optim.sched.min_lr": 9e-7},
            ["model.optim.sched.min_lr=9e-07", "model.optim.lr=1e-08"],
        ),
        ({"model.data.train_ds.global_batch_size": 6}, ["global_batch_size=6", "micro_batch_size=4", "=8"]),
        ({"model.data.train_ds.micro_batch_size": 0}, ["micro_batch_size=0", "1 or more"]),
        ({"model.sequence_parallel": True}, ["model.sequence_parallel=True", "tensor_model_parallel_size=1"]),
        ({"model.peft.peft_scheme": "ptuning"}, ["model.peft.peft_scheme", "ptuning", "lora"]),
        ({"model.peft.restore_from_path": "x"}, ["model.peft.restore_from_path=x", "peft_scheme=lora"]),
        (
            {"model.peft.peft_scheme": "lora", "model.peft.lora_tuning.target_modules": "mlp"},
            ["target_modules=mlp is one value and no list", "target_modules=[mlp]"],
        ),
        (
            {"model.peft.lora_tuning.adapter_dim": 4},
            [
                "model.peft.lora_tuning.adapter_dim=4 is of adapters",
                "all weights are trained",
                "peft_scheme=lora",
            ],
        ),
        (
            {"model.peft.peft_scheme": "lora", "model.peft.lora_tuning.target_modules": "[attn]"},
            ["target_modules: attn is not known", "attention_qkv, attention_dense"],
        ),
        (
            {
                "model.peft.peft_scheme": "lora",
                "exp_manager.checkpoint_callback_params.always_save_nemo": True,
            },
            ["always_save_nemo=True", "adapters alone", "always_save_nemo=False"],
        ),
        ({"model.restore_from_path": "???"}, ["model.restore_from_path is not set"]),
        ({"model.seed": "${model.sead}"}, ["model.sead"]),
        ({"exp_manager.explicit_log_dir": __file__}, [f"exp_manager.explicit_log_dir={__file__}", "folder"]),
    ],
    ids=lambda x: ",".join(x) if isinstance(x, dict) else "",
)
def test_the_configuration(settings: dict[str, object], changed: dict[str, object], words: list[str]):
    refused(lambda: checked(settings | changed), *words)


def test_a_world_that_torchrun_made_otherwise(settings: dict[str, object]):
    two = settings | {"trainer.devices": 2}
    refused(lambda: checked(two, world_size=4), "made 4 ranks", "trainer.devices=2", "trainer.devices=4")


def test_an_output_that_exists(settings: dict[str, object], tmp_path: Path):
    result = tmp_path / "run/checkpoints/megatron_gpt_sft.nemo"
    result.parent.mkdir(parents=True)
    result.write_bytes(b"precious")
    refused(lambda: checked(settings), str(result), "exists", "exp_manager.explicit_log_dir")
    assert result.read_bytes() == b"precious"


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (
            '{"input": "a", "output": "b"}\n{"input": "a", \n',
            ["rows.jsonl, line 2", "not JSON", "one whole JSON"],
        ),
        (
            '\n{"input": "a", "answer": "b"}\n',
            ["rows.jsonl, line 2", "key 'output' is missing", "add 'output'"],
        ),
        ('{"input": 3, "output": "b"}\n', ["rows.jsonl, line 1", "key 'input'", "3", "string"]),
        ("[1, 2]\n", ["rows.jsonl, line 1", "not a JSON object"]),
        ("", ["rows.jsonl", "no rows"]),
    ],
    ids=["bad JSON", "missing field", "wrong type", "no object", "empty"],
)
def test_the_data(settings: dict[str, object], tmp_path: Path, text: str, words: list[str]):
    path = tmp_path / "rows.jsonl"
    path.write_text(text)
    refused(lambda: loaded(settings | {"model.data.train_ds.file_path": path}), *words)


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        (
            {"model.tensor_model_parallel_size": 3, "trainer.devices": 3},
            ["=3", "num_attention_heads=4", "[1, 2, 4]"],
        ),
        ({"model.pipeline_model_parallel_size": 4, "trainer.devices": 4}, ["=4", "num_layers=2", "[1, 2]"]),
    ],
    ids=["heads", "layers"],
)
def test_a_model_that_cannot_be_cut(
    settings: dict[str, object], changed: dict[str, object], words: list[str]
):
    refused(lambda: loaded(settings | changed | {"model.data.train_ds.global_batch_size": 12}), *words)


def test_positions_that_the_model_has_not_learned(settings: dict[str, object]):
    learned = {"model.position_embedding_type": "learned_absolute", "model.encoder_seq_length": 512}
    job = checked(settings | learned)
    pretrained = load_policy(checked(settings | {"trainer.precision": 32}))
    gpt = pretrained.learner.model.gpt_config
    pretrained.learner.model.gpt_config = dataclasses.replace(gpt, **job.model.architecture)
    refused(
        lambda: sft_loaders(job, pretrained),
        *("512 tokens", "max_seq_length=4096", "256 learned positions", "model.encoder_seq_length=256"),
    )


def test_a_tokenizer_of_another_model(settings: dict[str, object], hf_folder: Path, tmp_path: Path):
    shutil.copytree(hf_folder, tmp_path / "hf")
    tokenizer = AutoTokenizer.from_pretrained(hf_folder)
    tokenizer.add_tokens([f"<extra{i}>" for i in range(40)])
    tokenizer.save_pretrained(tmp_path / "hf")
    refused(
        lambda: (
            import_from_huggingface(tmp_path / "hf", str(tmp_path / "other.nemo")),
            loaded(settings | {"model.restore_from_path": tmp_path / "other.nemo"}),
        ),
        *("wrong tokenizer", "298", "259 entries"),
    )


def test_no_tokenizer(settings: dict[str, object], nemo: Path, tmp_path: Path):
    with open_nemo(nemo) as archive:
        config = {k: v for k, v in archive.config.items() if k != "tokenizer"}
        write_nemo(
            tmp_path / "bare.nemo",
            config=config,
            files={},
            weights=lambda folder: shutil.copytree(archive.weights, folder) and None,
        )
    bare = {"model.restore_from_path": tmp_path / "bare.nemo"}
    refused(lambda: loaded(settings | bare), f"model.restore_from_path={tmp_path}/bare.nemo", "no tokenizer")


def test_a_truncated_nemo(settings: dict[str, object], nemo: Path, tmp_path: Path):
    (tmp_path / "cut.nemo").write_bytes(nemo.read_bytes()[: nemo.stat().st_size // 2])
    cut = {"model.restore_from_path": tmp_path / "cut.nemo"}
    refused(lambda: loaded(settings | cut), f"{tmp_path}/cut.nemo", "get the file again")


def test_a_hostile_nemo(settings: dict[str, object], tmp_path: Path):
    path = tmp_path / "hostile.nemo"
    with tarfile.open(path, "w") as tar:
        member = tarfile.TarInfo("../../escaped")
        member.size = 4
        tar.addfile(member, io.BytesIO(b"evil"))
    refused(
        lambda: loaded(settings | {"model.restore_from_path": path}), str(path), "../../escaped", "refused"
    )
    assert not list(tmp_path.parent.rglob("escaped"))


def seen(job) -> list[str]:
    """The lines of a refusal, after the checks that all of them share."""
    assert job.wait() == 2, job.err
    lines = job.err.splitlines()
    assert lines[-1].startswith("Fix: "), job.err
    assert sum(line.startswith("error: ") for line in lines) == 1, job.err
    assert "Traceback" not in job.err
    assert job.out == ""
    assert job.temporary_files == []
    return lines


@pytest.mark.parametrize(
    ("changed", "word"),
    [
        ({"trainer.devices": 2, "model.data.train_ds.file_pat": "x"}, "model.data.train_ds.file_path?"),
        ({"trainer.devices": 2, "model.data.train_ds.file_path": "none.jsonl"}, "none.jsonl does not exist"),
        ({"trainer.devices": "[2"}, "error: trainer.devices=[2 is no setting"),
    ],
    ids=["a typo", "a missing file", "a word that Hydra cannot read"],
)
def test_what_a_person_sees_of_the_configuration(
    run: Callable, settings: dict[str, object], tmp_path: Path, changed: dict[str, object], word: str
):
    assert word in "\n".join(seen(run(settings | changed))[-2:])
    assert not (tmp_path / "run").exists()


def test_what_a_person_sees_of_two_ranks(run: Callable, settings: dict[str, object], tmp_path: Path):
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps({"input": "a"}) + "\n")
    lines = seen(run(settings | {"trainer.devices": 2, "model.data.train_ds.file_path": path}))
    assert lines[-2].startswith(f"error: {path}, line 1: key 'output' is missing")


def test_what_a_person_sees_where_rank_0_alone_fails(
    run: Callable, settings: dict[str, object], tmp_path: Path
):
    (tmp_path / "run").mkdir()
    (tmp_path / "run/metrics.jsonl").mkdir()
    lines = seen(run(settings | {"trainer.devices": 2}))
    assert str(tmp_path / "run/metrics.jsonl") in lines[-2]
