# SPDX-License-Identifier: Apache-2.0
"""Short names of the usual settings, and what the command sets where the scripts keep NeMo's defaults."""

from fnmatch import fnmatchcase

from nemo_aligner.settings import all_keys

# {short name: the keys that it may stand for}. The first that a job has counts; * is the algorithm's own block.
SHORT_NAMES: dict[str, tuple[str, ...]] = {
    "model": ("model.restore_from_path", "pretrained_checkpoint.restore_from_path", "rm_model_file"),
    "data": ("model.data.train_ds.file_path", "model.data.data_prefix.train", "input_file"),
    "validation": ("model.data.validation_ds.file_path", "model.data.data_prefix.validation"),
    "reward": ("trainer.ppo.rewards.rule.function", "reward_function"),
    "teacher": ("model.*.teacher",),
    "chat": ("model.data.chat",),
    "out": ("exp_manager.explicit_log_dir", "output_file"),
    "lr": ("model.optim.lr",),
    "epochs": ("trainer.*.max_epochs",),
    "max_steps": ("trainer.*.max_steps",),
    "batch_size": ("model.data.train_ds.global_batch_size", "model.global_batch_size", "batch_size"),
    "micro_batch_size": ("model.data.train_ds.micro_batch_size", "model.micro_batch_size"),
    "seq_length": ("model.encoder_seq_length",),
    "max_length": ("sampling.max_length", "model.ppo.length_params.max_length"),
    "temperature": ("sampling.temperature", "model.ppo.sampling_params.temperature"),
    "devices": ("trainer.devices",),
    "nodes": ("trainer.num_nodes",),
    "tp": ("model.tensor_model_parallel_size",),
    "pp": ("model.pipeline_model_parallel_size",),
    "precision": ("trainer.precision",),
    "seed": ("sampling.seed", "model.seed"),
    "port": ("inference.port", "trainer.ppo.port"),
}

# Of supervised training, which is to learn something of a hundred rows and of a million.
_SUPERVISED = "trainer.*.limit_train_batches"
COMMAND_DEFAULTS = {
    "model.data.train_ds.global_batch_size": "16",
    "model.data.train_ds.drop_last": "False",
    "model.global_batch_size": "16",
    "model.optim.sched.warmup_steps": "0.1",
}


def short_names(kind: type[object]) -> dict[str, str]:
    """{short name: its key}, of the settings of a script."""
    known = list(all_keys(kind))
    found = {name: _first(patterns, known) for name, patterns in SHORT_NAMES.items()}
    return {name: key for name, key in found.items() if key}


def command_defaults(kind: type[object]) -> dict[str, str]:
    """{key: what the command sets where nobody else does}, of the settings of a script."""
    known = list(all_keys(kind))
    supervised = _first((_SUPERVISED,), known)
    return {key: value for key, value in COMMAND_DEFAULTS.items() if supervised and key in known}


def _first(patterns: tuple[str, ...], known: list[str]) -> str | None:
    for pattern in patterns:
        for key in known:
            if fnmatchcase(key, pattern):
                return key
            # Below a setting that takes names of its own.
            if pattern.startswith(f"{key}.") or fnmatchcase(pattern, key):
                return pattern
    return None
