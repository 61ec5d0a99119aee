# SPDX-License-Identifier: Apache-2.0
"""Each job has the short names of its settings, each for one key."""

from dataclasses import dataclass, field

import pytest

from nemo_aligner.config.base import BatchedModelConfig, PretrainedJob, TrainerConfig
from nemo_aligner.config.generate import GenerateJob
from nemo_aligner.config.ppo import ActorJob
from nemo_aligner.config.reward import RMJob
from nemo_aligner.config.serve import CriticJob, RewardServerJob
from nemo_aligner.config.sft import SFTJob
from nemo_aligner.config.short_names import SHORT_NAMES, command_defaults, short_names
from nemo_aligner.data.config import PairDataConfig
from nemo_aligner.launch.command import find_commands, load_script
from nemo_aligner.run.schedule import SupervisedConfig

EVERYWHERE = {"model", "devices", "nodes", "tp", "pp", "precision", "seed", "seq_length"}


@dataclass(frozen=True, kw_only=True)
class _Trainer(TrainerConfig):
    new: SupervisedConfig = field(default_factory=SupervisedConfig)


@dataclass(frozen=True, kw_only=True)
class _Model(BatchedModelConfig):
    data: PairDataConfig


@dataclass(frozen=True, kw_only=True)
class NewJob(PretrainedJob):
    """An algorithm's that nobody has heard of."""

    model: _Model
    trainer: _Trainer = field(default_factory=_Trainer)


@pytest.mark.parametrize("kind", [SFTJob, RMJob, ActorJob, CriticJob, RewardServerJob, GenerateJob, NewJob])
def test_every_job_has_the_names_that_all_share(kind: type):
    assert set(short_names(kind)) >= EVERYWHERE


def test_every_name_is_some_jobs():
    distills = load_script(find_commands()["knowledge_distillation"]).kind
    kinds = (SFTJob, RMJob, ActorJob, RewardServerJob, GenerateJob, distills)
    assert {name for kind in kinds for name in short_names(kind)} == set(SHORT_NAMES)


@pytest.mark.parametrize(
    ("kind", "expected"),
    [
        (
            SFTJob,
            {
                "model": "model.restore_from_path",
                "data": "model.data.train_ds.file_path",
                "max_steps": "trainer.sft.max_steps",
                "batch_size": "model.data.train_ds.global_batch_size",
                "out": "exp_manager.explicit_log_dir",
            },
        ),
        (
            NewJob,
            {
                "model": "pretrained_checkpoint.restore_from_path",
                "data": "model.data.data_prefix.train",
                "validation": "model.data.data_prefix.validation",
                "max_steps": "trainer.new.max_steps",
                "batch_size": "model.global_batch_size",
            },
        ),
        (RewardServerJob, {"model": "rm_model_file", "port": "inference.port"}),
        (GenerateJob, {"data": "input_file", "out": "output_file", "batch_size": "batch_size"}),
    ],
)
def test_a_name_stands_for_the_jobs_own_key(kind: type, expected: dict[str, str]):
    names = short_names(kind)
    assert {name: names[name] for name in expected} == expected


def test_defaults_are_for_supervised_training():
    assert command_defaults(NewJob) == {
        "model.global_batch_size": "16",
        "model.optim.sched.warmup_steps": "0.1",
    }
    assert command_defaults(ActorJob) == command_defaults(CriticJob) == command_defaults(GenerateJob) == {}
