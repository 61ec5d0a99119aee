# SPDX-License-Identifier: Apache-2.0
"""From the settings of both servers to a reward model, a critic and the settings that clients see."""

import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch

from nemo_aligner.algorithms.critic_server_trainer import CriticServerConfig, newest_halves
from nemo_aligner.builders.loaders import longest_sequence
from nemo_aligner.builders.models import Pretrained, build_model, merged_config, open_checkpoint
from nemo_aligner.builders.runs import training_checkpoints
from nemo_aligner.checkpoint.digests import refuse_damage
from nemo_aligner.checkpoint.model_nemo import damage_over_ranks
from nemo_aligner.checkpoint.nemo_archive import WEIGHTS_NAME
from nemo_aligner.checkpoint.sharded import load_model
from nemo_aligner.checkpoint.trainer_state import Checkpoint
from nemo_aligner.checkpoint.training import TrainingCheckpoints
from nemo_aligner.config.base import ModelJob
from nemo_aligner.config.serve import CriticJob, RewardServerJob, ServedModelConfig, ServingConfig
from nemo_aligner.data.reading import Reading
from nemo_aligner.data.row import TextEncoder
from nemo_aligner.data.tokenizer import tokenizer_probe
from nemo_aligner.errors import UserError
from nemo_aligner.models.gpt.critic import GPTCritic, RewardScale, RewardWeights
from nemo_aligner.models.gpt.heads import HEAD_NAME, draw_head, fold_head, head_config
from nemo_aligner.models.gpt.lora import is_adapted
from nemo_aligner.models.gpt.weight_swap import SwappedWeights
from nemo_aligner.parallel import world
from nemo_aligner.run.experiment import Experiment
from nemo_aligner.serving.protocol import Limits, Scalar
from nemo_aligner.serving.server import Server, ServerConfig

logger = logging.getLogger(__name__)


def reward_scale(config: Mapping[str, Any]) -> RewardScale:
    """From a reward model's numbers to its reward, as its model_config.yaml says."""
    regression, standard = config.get("regression") or {}, config.get("reward_standardization") or {}
    weights, outputs = None, int(regression.get("num_attributes") or 1)
    if config["reward_model_type"] == "regression" and regression.get("merge_attributes"):
        given = regression.get("attribute_weights")
        weights = tuple(given) if given else (1 / outputs,) * outputs
        if len(weights) != outputs:
            raise UserError(
                f"model.regression.attribute_weights has {len(weights)} numbers, and the reward model gives {outputs}",
                fix="give one weight for each attribute",
            )
    if not standard.get("enable"):
        return RewardScale(weights=weights)
    if standard.get("mean") is None or not standard.get("std"):
        raise UserError(
            f"model.reward_standardization.enable=True, with mean={standard.get('mean')} and std={standard.get('std')}",
            fix="set model.reward_standardization.mean and .std (above 0) to those of the reward model's rewards",
        )
    return RewardScale(weights=weights, mean=float(standard["mean"]), std=float(standard["std"]))


@world.phase("loading the model")
def load_served_reward_model(job: RewardServerJob) -> Pretrained[GPTCritic]:
    """The reward model of rm_model_file.

    Raises:
        UserError: it is none, damaged, or does not fit the layout or the overrides.
    """
    with open_checkpoint(job, None) as archive:
        config = job.model.override(merged_config(job.model, archive))
        head = head_config(config)
        if head is None or "reward_model_type" not in archive.config:
            raise _no_reward_model(job)
        _log_reading(archive.config, config)
        built, tokenizer, files = build_model(job, archive, config, head=head)
    model = GPTCritic(built, head=head, scale=reward_scale(config), seed=job.model.seed)
    return Pretrained(learner=model, tokenizer=tokenizer, config=config, files=files)


def _log_reading(saved: Mapping[str, Any], config: Mapping[str, Any]) -> None:
    """Say how sentences become tokens, and where that is not as in the reward model's training."""
    trained, asked = Reading.of(saved), Reading.of(config)
    if not world.is_logging_rank():
        return
    if asked is None:
        logger.info(
            "the reward model does not say how its texts were read: sentences end as they are, and begin as the "
            "tokenizer has it; set model.data.append_eod and model.data.add_bos as they were in its training"
        )
    elif trained is not None and asked != trained:
        logger.warning(
            "model.data has sentences read with %s, and the reward model was trained with %s: its rewards differ",
            *(asked, trained),
        )
    else:
        logger.info("sentences are read with %s", asked)


def _no_reward_model(job: ModelJob) -> UserError:
    key, path = job.pretrained
    return UserError(
        f"{key}={path} is a language model, and gives no rewards", fix="train_reward_model.py makes one of it"
    )


@dataclass(frozen=True, kw_only=True)
class LoadedCritic(Pretrained[GPTCritic]):
    """A critic, and how it begins anew."""

    start_again: Callable[[], None]  # puts the weights and the optimizer where they were at the beginning


@world.phase("loading the model")
def load_critic(job: CriticJob) -> LoadedCritic:
    """A critic that starts from a reward model's weights, with that reward model beside it where it serves both.

    Its head starts as what gives the reward, standardised and merged as that is, so values start on its scale.

    Raises:
        UserError: the checkpoint is not there, damaged, or does not fit the layout or the overrides.
    """
    combined = job.trainer.ppo.combine_rm_and_critic_server
    with open_checkpoint(job, None) as archive:
        is_reward_model = "reward_model_type" in archive.config
        if combined and not is_reward_model:
            raise _no_reward_model(job)
        config = {"reward_model_type": "binary_ranking", **merged_config(job.model, archive)}
        config = job.model.override(config)
        head = head_config(config)
        assert head is not None
        if is_reward_model:
            _log_reading(archive.config, config)
        config["share_embeddings_and_output_weights"] = False
        built, tokenizer, files = build_model(
            job, archive, config, head=head, but=None if is_reward_model else HEAD_NAME
        )
    scale = reward_scale(config)
    if not is_reward_model:
        draw_head(built, seed=job.model.seed)
    reward = RewardWeights(weights=SwappedWeights(built), outputs=head.outputs) if combined else None
    _give_one_value(job, built, scale, outputs=head.outputs)
    learner = GPTCritic(built, head=replace(head, outputs=1), scale=scale, reward=reward, seed=job.model.seed)
    learner.prepare_training(
        job.model.optim, clip_grad=job.trainer.ppo.gradient_clip_val, max_steps=job.trainer.ppo.max_steps
    )
    saved = {
        **config,
        "reward_model_type": "binary_ranking",
        "regression": {},
        "reward_standardization": {"enable": False, "mean": None, "std": None},
        "output_sequence": True,
    }
    return LoadedCritic(
        learner=learner, tokenizer=tokenizer, config=saved, files=files, start_again=_beginning(job, learner)
    )


def _give_one_value(job: CriticJob, built: torch.nn.Module, scale: RewardScale, *, outputs: int) -> None:
    if outputs > 1 and scale.weights is None:
        raise UserError(
            f"the reward model of {job.pretrained[0]}={job.pretrained[1]} gives {outputs} attributes, and PPO learns "
            "from one reward",
            fix="set model.regression.merge_attributes=True, and model.regression.attribute_weights to their weights",
        )
    if scale != RewardScale():
        fold_head(built, weights=scale.weights or (1.0,), mean=scale.mean, std=scale.std)


def _beginning(job: CriticJob, learner: GPTCritic) -> Callable[[], None]:
    adapted = is_adapted(learner.model)
    kept = {
        name: value.detach().clone()
        for name, value in learner.model.named_parameters()
        if HEAD_NAME in name.split(".") or (adapted and value.requires_grad)
    }

    def start_again() -> None:
        if not adapted:
            with open_checkpoint(job, None) as archive:
                load_model(learner.model, archive.weights, but=HEAD_NAME)
        with torch.no_grad():
            for name, value in learner.model.named_parameters():
                if name in kept:
                    value.copy_(kept[name])
        learner.restart_training()

    return start_again


def critic_checkpoints(
    job: CriticJob, run: Experiment, critic: LoadedCritic
) -> tuple[TrainingCheckpoints | None, Callable[[Checkpoint | None], None]]:
    """The critic's checkpoints, and a function that loads one (None: the initial weights)."""
    checkpoints = training_checkpoints(job, run, critic, keep=newest_halves)

    def load(checkpoint: Checkpoint | None) -> None:
        if checkpoint is None:
            critic.start_again()
        else:
            assert checkpoints is not None
            refuse_damage(checkpoint.path, damage_over_ranks(checkpoint.path))
            load_model(critic.learner.model, checkpoint.path / WEIGHTS_NAME)
            checkpoints.restore(checkpoint)

    return checkpoints, load


def served_limits(model: ServedModelConfig, pretrained: Pretrained[GPTCritic]) -> Limits:
    """The limits of the model."""
    gpt = pretrained.learner.model.gpt_config
    longest = longest_sequence("model.encoder_seq_length", gpt.encoder_seq_length, gpt, model.length_multiple)
    return Limits(vocab_size=gpt.vocab_size, seq_length=longest)


def critic_config(job: CriticJob, critic: LoadedCritic) -> CriticServerConfig:
    """The settings of the critic's trainer."""
    model, config = job.model, job.trainer.ppo
    settings: dict[str, Scalar] = {
        "trainer.ppo.inference_micro_batch_size": job.rows,
        "trainer.ppo.max_request_rows": config.max_request_rows,
        "data_parallel_size": world.dp_size(),
        "combine_rm_and_critic_server": config.combine_rm_and_critic_server,
        "tokenizer": tokenizer_probe(critic.tokenizer),
        "saves": job.exp_manager.create_checkpoint_callback,
    }
    return CriticServerConfig(
        name=job.exp_manager.name,
        limits=served_limits(model, critic),
        global_batch_size=model.global_batch_size,
        micro_batch_size=model.micro_batch_size,
        inference_rows=job.rows,
        length_multiple=model.length_multiple,
        gives_rewards=config.combine_rm_and_critic_server,
        offload_optimizer=model.offload_adam_states,
        max_skipped_steps=config.max_skipped_steps,
        actor_timeout=config.actor_timeout,
        settings=settings,
    )


def reward_settings(job: RewardServerJob, pretrained: Pretrained[GPTCritic]) -> dict[str, Scalar]:
    """The settings that an actor compares with its own."""
    return {
        "inference.inference_micro_batch_size": job.rows,
        "inference.max_request_rows": job.inference.max_request_rows,
        "num_rewards": num_rewards(pretrained.learner),
        "data_parallel_size": world.dp_size(),
        "tokenizer": tokenizer_probe(pretrained.tokenizer),
    }


def critic_server(job: CriticJob, critic: LoadedCritic) -> Callable[[], Server]:
    """A function that opens the critic's server, on rank 0."""
    config = job.trainer.ppo
    return _opener(
        *(job, config, "trainer.ppo", critic),
        infer="critic_infer",
        train="critic_train",
        save="critic_save",
        num_rewards=1 if config.combine_rm_and_critic_server else 0,
        has_values=True,
    )


def reward_server(job: RewardServerJob, pretrained: Pretrained[GPTCritic]) -> Callable[[], Server]:
    """A function that opens the reward model's server, on rank 0."""
    return _opener(
        *(job, job.inference, "inference", pretrained),
        infer=job.inference.model_name,
        num_rewards=num_rewards(pretrained.learner),
        has_values=False,
    )


def num_rewards(learner: GPTCritic) -> int:
    """Numbers of a sequence that are served."""
    return 1 if learner.scale.weights else learner.head.outputs


def _opener(
    job: CriticJob | RewardServerJob,
    config: ServingConfig,
    setting: str,
    served: Pretrained[GPTCritic],
    **endpoints: Any,  # noqa: ANN401 - ServerConfig's
) -> Callable[[], Server]:
    encode, reading = None, Reading.of(served.config) or Reading()
    if served.tokenizer is not None:
        encode = TextEncoder(
            tokenizer=served.tokenizer, add_bos=reading.add_bos, append_eos=reading.append_eod
        )
    server = ServerConfig(
        setting=setting,
        port=config.port,
        ip=config.ip,
        max_rows=job.rows * world.dp_size(),
        length_multiple=config.strip_sequence_length_to_multiple,
        linger_seconds=config.max_queue_delay_microseconds / 1e6,
        request_limits=config.request_limits,
        **endpoints,
    )
    limits = served_limits(job.model, served)
    return lambda: Server(server, limits, encode=encode)
