# SPDX-License-Identifier: Apache-2.0
"""Commands with the settings of NeMo RL, NeMo-Reinforcer before: each is one of our scripts with its keys renamed.

A file of settings, examples/configs/*.yaml or what ``--config`` names, and KEY=VALUE behind it.
"""

import difflib
import shlex
import string
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from nemo_aligner.config.resume import flat
from nemo_aligner.errors import UserError
from nemo_aligner.launch.cli import USER_ERROR_CODE
from nemo_aligner.launch.words import in_hydras_grammar, read_settings, split_words
from nemo_aligner.parallel.ranks import discover, speaks

Ours = Mapping[str, object]
_PRECISIONS = {"bfloat16": "bf16", "float32": "32", "float16": "16"}
_METRICS = {"val_loss": "val_loss", "val_reward": "val_rewards"}
_DATA_SETS = {
    "squad": ("rajpurkar/squad", "rajpurkar/squad:validation"),
    "OpenMathInstruct-2": ("nvidia/OpenMathInstruct-2:train_1M", None),
}
_NO_EFFECT = (
    "logger.log_dir",
    "logger.monitor_gpus",
    "logger.gpu_monitoring",
    "logger.tensorboard",
    "cluster.use_ray",
)


@dataclass(frozen=True)
class Command:
    """One of NeMo RL's commands."""

    name: str  # of ours
    script: str  # in examples/nlp/gpt
    config: str  # in examples/configs
    keys: Mapping[str, str]  # of theirs: ours, of the same meaning
    # of theirs: from its value, and all of theirs, to settings of ours
    rules: Mapping[str, Callable[[Any, Mapping[str, Any]], Ours]]


def _shared(block: str) -> dict[str, str]:
    """Their keys that any command has, where ``block`` is our algorithm's."""
    return {
        "policy.max_total_sequence_length": "model.encoder_seq_length",
        "policy.max_grad_norm": f"trainer.{block}.gradient_clip_val",
        "policy.optimizer.kwargs.lr": "model.optim.lr",
        "policy.optimizer.kwargs.weight_decay": "model.optim.weight_decay",
        "policy.optimizer.kwargs.betas": "model.optim.betas",
        "policy.optimizer.kwargs.eps": "model.optim.eps",
        "policy.tensor_model_parallel_size": "model.tensor_model_parallel_size",
        "policy.pipeline_model_parallel_size": "model.pipeline_model_parallel_size",
        "cluster.gpus_per_node": "trainer.devices",
        "cluster.num_nodes": "trainer.num_nodes",
        "checkpointing.enabled": "exp_manager.create_checkpoint_callback",
        "checkpointing.checkpoint_dir": "exp_manager.explicit_log_dir",
        "checkpointing.keep_top_k": "exp_manager.checkpoint_callback_params.save_top_k",
        "checkpointing.save_period": f"trainer.{block}.save_interval",
        "logger.wandb_enabled": "exp_manager.create_wandb_logger",
        "logger.wandb.project": "exp_manager.wandb_logger_kwargs.project",
        "logger.wandb.name": "exp_manager.wandb_logger_kwargs.name",
        "logger.tensorboard_enabled": "exp_manager.create_tensorboard_logger",
        f"{'sft' if block == 'sft' else 'grpo'}.seed": "model.seed",
    }


def _choice(key: str, setting: str, choices: Mapping[str, str]) -> Callable[[Any, Mapping[str, Any]], Ours]:
    """A rule of a key whose values have other names here."""

    def rule(value: Any, _: Mapping[str, Any]) -> Ours:  # noqa: ANN401
        if value not in choices:
            raise UserError(f"{key}={value} is none of {', '.join(choices)}", fix=f"set {key} to one of them")
        return {setting: choices[value]}

    return rule


def _only(key: str, *values: object, because: str) -> Callable[[Any, Mapping[str, Any]], Ours]:
    """A rule of a key of one meaning alone."""

    def rule(value: Any, _: Mapping[str, Any]) -> Ours:  # noqa: ANN401
        if value not in values:
            raise UserError(f"{key}={value}: {because}", fix=f"set {key}={values[0]}")
        return {}

    return rule


def _recompute(value: Any, _: Mapping[str, Any]) -> Ours:  # noqa: ANN401
    granularity = {
        "model.activations_checkpoint_granularity": "full",
        "model.activations_checkpoint_method": "uniform",
        "model.activations_checkpoint_num_layers": 1,
    }
    return granularity if value else {}


_SHARED_RULES = {
    "policy.precision": _choice("policy.precision", "trainer.precision", _PRECISIONS),
    "policy.optimizer.name": _only(
        "policy.optimizer.name", "torch.optim.AdamW", because="the optimizer is AdamW"
    ),
    "policy.activation_checkpointing_enabled": _recompute,
    "policy.fsdp_offload_enabled": _only("policy.fsdp_offload_enabled", False, because="there is no FSDP"),
    "checkpointing.metric_name": _choice(
        "checkpointing.metric_name", "exp_manager.checkpoint_callback_params.monitor", _METRICS
    ),
    "checkpointing.higher_is_better": lambda value, _: {
        "exp_manager.checkpoint_callback_params.mode": "max" if value else "min"
    },
}


def _sft_data(value: Any, given: Mapping[str, Any]) -> Ours:  # noqa: ANN401
    train, validation = _DATA_SETS.get(value, (value, None))
    validation = given.get("data.validation") or validation
    return {
        "model.data.train_ds.file_path": train,
        **({} if validation is None else {"model.data.validation_ds.file_path": validation}),
    }


def _grpo_data(value: Any, given: Mapping[str, Any]) -> Ours:  # noqa: ANN401
    train, validation = _DATA_SETS.get(value, (value, None))
    # Without validation prompts some of training's: NeMo RL holds a twentieth back.
    validation = given.get("data.validation") or validation or 0.05
    return {"model.data.data_prefix": {"train": [train], "validation": validation}}


def _prompt_file(value: Any, _: Mapping[str, Any]) -> Ours:  # noqa: ANN401
    if value is None:
        return {}
    path = Path(value)
    if not path.is_file():
        raise UserError(f"data.prompt_file={value}: there is no such file", fix="name a text with {} in it")
    text = path.read_text(encoding="utf-8")
    try:
        fields = [name for _, name, _, _ in string.Formatter().parse(text) if name is not None]
    except ValueError:
        fields = []
    if fields != [""]:
        raise UserError(
            f"{value} has not one {{}} for a problem",
            fix="write {} where it stands, and {{ or }} for a brace",
        )
    return {"model.data.prompt_template": text.format("{prompt}").rstrip("\n")}


def _group(value: Any, given: Mapping[str, Any]) -> Ours:  # noqa: ANN401
    each = given["grpo.num_generations_per_prompt"]
    if not (isinstance(value, int) and isinstance(each, int)):
        raise TypeError(
            "both grpo.num_prompts_per_step and grpo.num_generations_per_prompt are whole numbers"
        )
    return {"model.ppo.num_rollout_samples": value * each}


def _normalize(value: Any, given: Mapping[str, Any]) -> Ours:  # noqa: ANN401
    leaves_out = bool(given.get("grpo.use_leave_one_out_baseline")) and not value
    return {
        "trainer.ppo.advantage_estimator": "leave_one_out" if leaves_out else "group",
        "trainer.ppo.group_std": bool(value),
    }


COMMANDS = {
    "sft": Command(
        "sft",
        "train_gpt_sft.py",
        "sft.yaml",
        _shared("sft")
        | {
            "policy.model_name": "model.restore_from_path",
            "policy.train_global_batch_size": "model.data.train_ds.global_batch_size",
            "policy.train_micro_batch_size": "model.data.train_ds.micro_batch_size",
            "sft.max_num_epochs": "trainer.sft.max_epochs",
            "sft.max_num_steps": "trainer.sft.max_steps",
            "sft.val_period": "trainer.sft.val_check_interval",
            "sft.val_batches": "trainer.sft.limit_val_batches",
            "sft.val_global_batch_size": "model.data.validation_ds.global_batch_size",
            "sft.val_micro_batch_size": "model.data.validation_ds.micro_batch_size",
            "sft.val_at_start": "trainer.sft.val_before_train",
        },
        _SHARED_RULES | {"data.dataset_name": _sft_data, "data.validation": lambda *_: {}},
    ),
    "grpo": Command(
        "grpo",
        "train_gpt_grpo.py",
        "grpo_math_1B.yaml",
        _shared("ppo")
        | {
            "policy.model_name": "pretrained_checkpoint.restore_from_path",
            "policy.train_global_batch_size": "model.global_batch_size",
            "policy.train_micro_batch_size": "model.micro_batch_size",
            "policy.generation_batch_size": "model.ppo.rollout_micro_batch_size",
            "policy.logprob_batch_size": "model.ppo.forward_micro_batch_size",
            "policy.generation.max_new_tokens": "model.ppo.length_params.max_length",
            "policy.generation.temperature": "model.ppo.sampling_params.temperature",
            "policy.generation.top_p": "model.ppo.sampling_params.top_p",
            "grpo.num_generations_per_prompt": "model.ppo.num_responses_per_prompt",
            "grpo.max_num_steps": "trainer.ppo.max_steps",
            "grpo.max_num_epochs": "trainer.ppo.max_epochs",
            "grpo.val_period": "trainer.ppo.val_check_interval",
            "grpo.val_at_start": "trainer.ppo.val_before_train",
            "grpo.max_val_samples": "model.ppo.num_val_samples",
            "grpo.val_batch_size": "model.ppo.val_rollout_micro_batch_size",
            "loss_fn.reference_policy_kl_penalty": "trainer.ppo.initial_policy_kl_penalty",
            "loss_fn.ratio_eps_min": "model.ppo.ratio_eps",
            "loss_fn.ratio_eps_max": "model.ppo.ratio_eps_high",
            "env.math.num_workers": "trainer.ppo.rewards.math.workers",
            "logger.num_val_samples_to_print": "trainer.ppo.table_rows",
        },
        _SHARED_RULES
        | {
            "grpo.num_prompts_per_step": _group,
            "grpo.normalize_rewards": _normalize,
            "grpo.use_leave_one_out_baseline": lambda *_: {},
            "grpo.max_rollout_turns": _only(
                "grpo.max_rollout_turns", 1, because="a math problem has a response of one turn"
            ),
            "policy.generation.top_k": lambda value, _: {"model.ppo.sampling_params.top_k": value or 0},
            "policy.generation.backend": _only(
                "policy.generation.backend", "megatron", because="the model that learns writes its responses"
            ),
            "data.dataset_name": _grpo_data,
            "data.validation": lambda *_: {},
            "data.prompt_file": _prompt_file,
        },
    ),
}
# What the math environment is.
FIXED = {
    "sft": {},
    "grpo": {
        "model.data.chat": True,
        "trainer.ppo.rewards.math.function": "nemo_aligner.environments.mathematics.right",
        "trainer.ppo.rewards.math.arguments": {"ground_truth": "expected_answer"},
    },
}


def run(name: str, folder: Path) -> None:
    """Run ``sys.argv`` as the command ``name`` of NeMo RL; ``folder`` is that of its configuration files."""
    from nemo_aligner.launch.command import find_commands, load_script

    command = COMMANDS[name]
    try:
        words = ours(command, sys.argv[1:], folder)
    except UserError as error:
        if speaks(discover()):
            sys.stderr.write(f"error: {error}\n")
        sys.exit(USER_ERROR_CODE)
    script, ranks = find_commands()[command.name], discover()
    if speaks(ranks) and not (ranks and ranks.starter == "local"):
        sys.stderr.write(f"the same as: nemo-aligner {command.name} {shlex.join(words)}\n")
    sys.argv = [str(script), *words]
    load_script(script)()


def ours(command: Command, words: Sequence[str], folder: Path) -> list[str]:
    """The words of our script.

    Args:
        command: of theirs.
        words: of its command line.
        folder: of its configuration files.

    Raises:
        UserError: a file or a word cannot be read, or a key is not known or has no such value here.
    """
    given = _read(command, words, folder)
    found: dict[str, object] = dict(FIXED[command.name])
    known = [*command.keys, *command.rules, *_NO_EFFECT]
    for key, value in given.items():
        if key in command.keys:
            if value is not None:
                found[command.keys[key]] = value
        elif key in command.rules:
            try:
                found |= command.rules[key](value, given)
            except (TypeError, KeyError) as error:
                raise UserError(
                    f"{key}={value} cannot be used: {type(error).__name__}: {error}",
                    fix=f"write it as in {folder / command.config}",
                ) from error
        elif not any(key == name or key.startswith(f"{name}.") for name in _NO_EFFECT):
            near = difflib.get_close_matches(key, known, n=1)
            raise UserError(
                f"there is no setting {key}",
                fix=f"did you mean {near[0]}?" if near else "docs/nemo_rl.md lists them",
            )
    return [f"{key}={in_hydras_grammar(value)}" for key, value in found.items()]


def _read(command: Command, words: Sequence[str], folder: Path) -> dict[str, Any]:
    """All of their settings by dotted keys: those of the file, and the words' over them."""
    files, typed = split_words(words)
    for word in typed:
        if "=" not in word or word.startswith("-"):
            raise UserError(f"{word} is no setting", fix="write KEY=VALUE, as in cluster.gpus_per_node=8")
    path = files[-1] if files else folder / command.config
    config = read_settings(path, form=str(folder / command.config))
    given_words = OmegaConf.from_dotlist([word.removeprefix("++").removeprefix("+") for word in typed])
    try:
        whole: Any = OmegaConf.to_container(OmegaConf.merge(config, given_words), resolve=True)
    except OmegaConfBaseException as error:
        raise UserError(
            str(error).splitlines()[0], fix=f"correct it in {path} or on the command line"
        ) from error
    given = flat(whole)
    prompts = given.get("data.prompt_file")
    if isinstance(prompts, str) and not Path(prompts).exists() and (folder.parents[1] / prompts).is_file():
        # Of a file of settings that is read elsewhere.
        given["data.prompt_file"] = str(folder.parents[1] / prompts)
    return given
