# SPDX-License-Identifier: Apache-2.0
"""The parts of examples/nlp/gpt/conf that no dataclass has: commands, groups, repeats, and keys without a field."""

import inspect
import re
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any

from nemo_aligner.config.base import ModelJob, TrainerConfig
from nemo_aligner.config.generate import EvaluateJob, GenerateJob
from nemo_aligner.config.ppo import ActorJob
from nemo_aligner.config.reward import RMJob
from nemo_aligner.config.serve import CriticJob, RewardServerJob
from nemo_aligner.config.sft import SFTJob, TextJob
from nemo_aligner.data.config import SFTSplitConfig
from nemo_aligner.launch.command import find_commands, load_script
from nemo_aligner.launch.script import Script
from nemo_aligner.models.gpt.learning_rate import OptimConfig
from nemo_aligner.run.experiment import ExperimentConfig

__all__ = ["FILES", "HEAD", "TAIL", "File"]

# Hydra's list of groups, around those of a file.
HEAD = ("defaults:  # blocks that all scripts share", "  - _base/hydra")
TAIL = ("  - _self_", "  - override hydra/job_logging: none", "  - override hydra/hydra_logging: none")


@dataclass(frozen=True, kw_only=True)
class File:
    """A file, by what its dataclass does not say."""

    kind: type[ModelJob | TrainerConfig | ExperimentConfig | OptimConfig]
    command: str  # one that runs
    block: str = ""  # where a group stands
    # {block: the group that has what is shared}
    groups: Mapping[str, str] = field(default_factory=dict[str, str])
    # Repeats of other keys, and the values of keys without a field: the architecture's, and those without effect.
    values: Mapping[str, Any] = field(default_factory=dict[str, Any])
    hidden: tuple[str, ...] = ()  # patterns of keys that are accepted and not shown


_SHOW = (
    "python examples/nlp/gpt/train_gpt_sft.py --cfg job    (shows this block inside a script's configuration)"
)
_PAIRS = '"model.data.data_prefix={train: [a.jsonl], validation: [b.jsonl], test: [b.jsonl]}"'
_TRAINER = {"trainer": "_base/trainer"}
_GROUPS = {**_TRAINER, "exp_manager": "_base/exp_manager", "model.optim": "_base/optim"}
_ARCHITECTURE = {
    "model.encoder_seq_length": None,
    "model.hidden_dropout": None,
    "model.attention_dropout": None,
    "model.mcore_gpt": True,
}
_PREFIX_DATA = {
    "model.data.seq_length": "${model.encoder_seq_length}",
    "model.data.skip_warmup": True,
    "model.data.eod_mask_loss": False,
    "model.data.index_mapping_dir": None,
    "model.overwrite_base_config": {"data": {"data_prefix": True}},
}
_SPLIT = {"memmap_workers": None, "min_seq_length": 1, "index_mapping_dir": None, "hf_dataset": False}
_SPLIT["output_original_text"] = True
_TRAIN = "model.data.train_ds"
_HIDDEN = ("model.architecture",)
# A head with one number has no logits.
_HEAD_HIDDEN = (*_HIDDEN, "model.kept_logits_mib")
# What a job that trains nothing shares with those that do. NeMo's reward server has two keys of recomputing.
_NO_TRAINING = (
    "optim",
    "peft",
    "virtual_*",
    "context_*",
    "expert_*",
    "use_flash_*",
    "resume_*",
    "ffn_dropout",
)
_IDLE_HIDDEN = (
    *_HEAD_HIDDEN,
    "model.activations_checkpoint_[!gm]*",
    *(f"model.{key}" for key in _NO_TRAINING),
)


def _length(algorithm: str) -> dict[str, Any]:
    return {f"trainer.{name}": f"${{.{algorithm}.{name}}}" for name in ("max_epochs", "max_steps")}


_GENERATE_HIDDEN = (*_IDLE_HIDDEN, "model.seed", "model.sequence_parallel", "model.activations_*")
FILES = {
    "_base/trainer": File(
        kind=TrainerConfig,
        command=_SHOW,
        block="trainer",
        values={
            "trainer.accelerator": "gpu",
            "trainer.logger": False,
            "trainer.enable_checkpointing": False,
            "trainer.use_distributed_sampler": False,
        },
    ),
    "_base/exp_manager": File(
        kind=ExperimentConfig,
        command=_SHOW,
        block="exp_manager",
        values={
            "exp_manager.name": "${name}",
            "exp_manager.max_time_per_run": "${trainer.max_time}",
            "exp_manager.checkpoint_callback_params.filename": (
                "${name}--{${.monitor}:.3f}-{step}-{consumed_samples}-{epoch}"
            ),
            "exp_manager.checkpoint_callback_params.model_parallel_size": None,
        },
    ),
    "_base/optim": File(kind=OptimConfig, command=_SHOW, block="model.optim"),
    "gpt_sft": File(
        kind=SFTJob,
        command=f"python examples/nlp/gpt/train_gpt_sft.py model.restore_from_path=model.nemo {_TRAIN}.file_path="
        "train.jsonl model.data.validation_ds.file_path=validation.jsonl",
        groups=_GROUPS,
        values={
            **_length("sft"),
            "trainer.sft.save_interval": "${.val_check_interval}",
            **_ARCHITECTURE,
            "model.megatron_amp_O2": False,
            "model.seq_len_interpolation_factor": None,
            "model.save_nemo_on_validation_end": False,
            "model.sync_batch_comm": False,
            "model.gradient_as_bucket_view": False,
            "model.global_batch_size": "${.data.train_ds.global_batch_size}",
            "model.micro_batch_size": "${.data.train_ds.micro_batch_size}",
            "model.steerlm2": {},
            **{f"{_TRAIN}.{name}": value for name, value in _SPLIT.items()},
            **{
                f"model.data.validation_ds.{spec.name}": f"${{{_TRAIN}.{spec.name}}}"
                for spec in fields(SFTSplitConfig)
                if spec.name not in ("file_path", "shuffle", "drop_last", "truncation_method")
            },
            **{f"model.data.validation_ds.{name}": value for name, value in _SPLIT.items()},
            "model.data.validation_ds.memmap_workers": f"${{{_TRAIN}.memmap_workers}}",
            "model.data.validation_ds.file_path": None,
        },
        hidden=_HIDDEN,
    ),
    "training_rm": File(
        kind=RMJob,
        command="python examples/nlp/gpt/train_reward_model.py pretrained_checkpoint.restore_from_path=sft.nemo "
        f"{_PAIRS}",
        groups=_GROUPS,
        values={**_length("rm"), **_ARCHITECTURE, "model.megatron_amp_O2": False, **_PREFIX_DATA},
        hidden=(*_HEAD_HIDDEN, "model.forward_micro_batch_size"),
    ),
    "gpt_ppo_critic": File(
        kind=CriticJob,
        command="python examples/nlp/gpt/serve_ppo_critic.py pretrained_checkpoint.restore_from_path=megatron_gpt.nemo",
        groups=_GROUPS,
        values={
            "trainer.ppo.inference_micro_batch_size": "${model.forward_micro_batch_size}",
            "trainer.max_epochs": None,
            "trainer.max_steps": "${.ppo.max_steps}",
            "model.forward_micro_batch_size": "${.micro_batch_size}",
            **_ARCHITECTURE,
            "model.megatron_amp_O2": True,
        },
        hidden=_HEAD_HIDDEN,
    ),
    "gpt_ppo_actor": File(
        kind=ActorJob,
        command="python examples/nlp/gpt/train_gpt_ppo_actor.py pretrained_checkpoint.restore_from_path=sft.nemo "
        f"{_PAIRS}",
        groups=_GROUPS,
        values={
            **_length("ppo"),
            "trainer.ppo.save_interval": "${.val_check_interval}",
            "trainer.ppo.model_gbs": "${model.global_batch_size}",
            "trainer.ppo.model_mbs": "${model.micro_batch_size}",
            "trainer.ppo.batch_iterator": {"use_flask": False, "port": 5557},
            "trainer.ppo.trt_model_dir": "/tmp/trt_llm_model",
            "model.ppo.forward_micro_batch_size": "${.rollout_micro_batch_size}",
            "model.ppo.val_rollout_micro_batch_size": "${.rollout_micro_batch_size}",
            "model.ppo.num_val_samples": "${.num_rollout_samples}",
            "model.ppo.sampling_params.all_probs": False,
            "model.ppo.sampling_params.compute_logprob": False,
            **_ARCHITECTURE,
            "model.megatron_amp_O2": True,
            **_PREFIX_DATA,
        },
        hidden=(*_HIDDEN, "*.trt_llm.[!e]*"),
    ),
    "inference_rm": File(
        kind=RewardServerJob,
        command="python examples/nlp/gpt/serve_reward_model.py rm_model_file=megatron_gpt.nemo",
        groups=_TRAINER,
        values={
            "inference.inference_micro_batch_size": "${model.forward_micro_batch_size}",
            "model.encoder_seq_length": None,
        },
        hidden=_IDLE_HIDDEN,
    ),
    "generate": File(
        kind=GenerateJob,
        command="python examples/nlp/gpt/generate.py model.restore_from_path=model.nemo input_file=prompts.jsonl "
        "output_file=responses.jsonl",
        groups=_TRAINER,
        hidden=_GENERATE_HIDDEN,
    ),
    "evaluate": File(
        kind=EvaluateJob,
        command="python examples/nlp/gpt/evaluate.py model.restore_from_path=model.nemo input_file=gsm8k_test.jsonl "
        "output_file=responses.jsonl reward_function=nemo_aligner.environments.rules.gsm8k",
        groups=_TRAINER,
        hidden=_GENERATE_HIDDEN,
    ),
}


def _of_script(entry: Script[Any]) -> File:
    """The file of a script that repeats nothing of NeMo's: its docstring has the command."""
    supervised = FILES["gpt_sft"]
    told = (inspect.getdoc(inspect.getmodule(entry.main)) or "").replace("\\\n", "").splitlines()
    return File(
        kind=entry.kind,
        command=re.sub(" +", " ", next(line for line in told if line.startswith("python "))),
        groups=_GROUPS,
        values=supervised.values
        if issubclass(entry.kind, supervised.kind)
        else {key: value for key, value in supervised.values.items() if not key.startswith("trainer.")}
        if issubclass(entry.kind, TextJob)
        else {
            "model.encoder_seq_length": None,
            "model.hidden_dropout": None,
            "model.attention_dropout": None,
            "model.data.seq_length": "${model.encoder_seq_length}",
        },
        hidden=(*_HIDDEN, "*.trt_llm", "*.model_[gm]bs", "model.ppo.combine_rm_and_critic_server"),
    )


_SCRIPTS = (
    load_script(path) for name, path in find_commands().items() if path.name == f"train_gpt_{name}.py"
)
FILES |= {entry.config_name: _of_script(entry) for entry in _SCRIPTS if entry.config_name not in FILES}
