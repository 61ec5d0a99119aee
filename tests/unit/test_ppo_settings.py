# SPDX-License-Identifier: Apache-2.0
"""Settings of both jobs of PPO and of the reward server: what is refused, and by which words."""

from pathlib import Path

import hydra
import pytest

from nemo_aligner.config.base import ModelJob
from nemo_aligner.config.ppo import ActorJob
from nemo_aligner.config.serve import CriticJob, RewardServerJob
from nemo_aligner.errors import UserError
from nemo_aligner.settings import parse

CONF = Path(__file__).parents[2] / "examples/nlp/gpt/conf"
START = "pretrained_checkpoint.restore_from_path=a"
SCRIPTS: dict[str, tuple[str, type[ModelJob], list[str]]] = {
    "actor": (
        "gpt_ppo_actor",
        ActorJob,
        [START, "model.data.data_prefix={train: [b], validation: [b], test: [b]}"],
    ),
    "critic": ("gpt_ppo_critic", CriticJob, [START]),
    "reward": ("inference_rm", RewardServerJob, ["rm_model_file=a"]),
}


def checked(script: str, *words: str) -> ModelJob:
    name, kind, given = SCRIPTS[script]
    with hydra.initialize_config_dir(str(CONF), version_base="1.3"):
        job = parse(hydra.compose(name, [*given, *(f"++{word}" for word in words)]), kind)
    job.check(1)
    return job


@pytest.mark.parametrize("script", SCRIPTS)
def test_the_files_own_values_go(script: str):
    checked(script, "trainer.devices=1")


@pytest.mark.parametrize(
    ("script", "word", "told"),
    [
        ("actor", "trainer.ppo.trt_llm.enable=True", "trainer.ppo.trt_llm.enable=True: TensorRT-LLM"),
        ("actor", "model.ppo.trt_llm.enable=True", "model.ppo.trt_llm.enable=True"),
        ("actor", "trainer.ppo.model_gbs=32", "trainer.ppo.model_gbs=32, but model.global_batch_size=64"),
        (
            "actor",
            "model.ppo.combine_rm_and_critic_server=False",
            "remote_critic_rm.combine_rm_and_critic_server",
        ),
        ("actor", "model.ppo.num_rollout_samples=100", "model.ppo.num_rollout_samples=128"),
        ("actor", "model.ppo.rollout_micro_batch_size=0", "model.ppo.rollout_micro_batch_size=0"),
        ("actor", "model.ppo.sampling_params.temperature=0", "model.ppo.sampling_params.temperature=0"),
        ("actor", "model.ppo.length_params.min_length=-1", "min_length=-1"),
        ("actor", "model.ppo.ratio_eps=1.5", "model.ppo.ratio_eps=1.5"),
        ("actor", "trainer.ppo.gae_lambda=1.2", "trainer.ppo.gae_lambda=1.2"),
        ("actor", "trainer.ppo.num_ppo_epochs=0", "trainer.ppo.num_ppo_epochs=0"),
        ("actor", "trainer.ppo.critic_warmup_steps=-1", "trainer.ppo.critic_warmup_steps=-1"),
        ("actor", "trainer.ppo.max_steps=0", "trainer.ppo.max_steps=0"),
        ("actor", "trainer.ppo.adaptive_kl_target=0", "trainer.ppo.adaptive_kl_target=0"),
        ("actor", "trainer.ppo.kl_estimator=k4", "use one of k1, k2, k3"),
        ("actor", "remote_critic_rm.return_timeout=0", "remote_critic_rm.return_timeout=0"),
        ("actor", "remote_critic_rm.critic.prot=1", "did you mean remote_critic_rm.critic.port?"),
        ("critic", "trainer.ppo.port=0", "trainer.ppo.port=0"),
        ("critic", "trainer.ppo.inference_micro_batch_size=0", "trainer.ppo.inference_micro_batch_size"),
        ("critic", "trainer.ppo.strip_sequence_length_to_multiple=0", "strip_sequence_length_to_multiple=0"),
        ("critic", "trainer.ppo.actor_timeout=0", "trainer.ppo.actor_timeout=0"),
        ("critic", "model.loss_clip_val=-1", "model.loss_clip_val=-1"),
        ("critic", "model.output_sequence=False", "model.output_sequence=True"),
        ("critic", "model.global_batch_size=3 model.micro_batch_size=2", "model.global_batch_size"),
        ("reward", "inference.port=70000", "inference.port=70000"),
        ("reward", "inference.max_queue_delay_microseconds=-1", "max_queue_delay_microseconds=-1"),
    ],
)
def test_what_cannot_go_well_is_refused_by_name(script: str, word: str, told: str):
    with pytest.raises(UserError) as error:
        checked(script, *word.split())
    assert told in str(error.value)
    assert error.value.fix


def test_two_servers_do_not_share_an_address():
    apart = "remote_critic_rm.combine_rm_and_critic_server=False"
    checked("actor", apart)
    with pytest.raises(UserError, match=r"remote_critic_rm\.reward_model\.port"):
        checked("actor", apart, "remote_critic_rm.reward_model.port=5556")


def test_several_preferred_sizes_mean_the_largest():
    job = checked("critic", "trainer.ppo.inference_micro_batch_size=[2,8,4]")
    assert isinstance(job, CriticJob)
    assert job.rows == 8


_APART = "remote_critic_rm.combine_rm_and_critic_server=False"
_NO_CRITIC = "trainer.ppo.advantage_estimator=leave_one_out model.ppo.num_responses_per_prompt=2"
_FUNCTION = "trainer.ppo.rewards.short.function=my_rewards.short"


@pytest.mark.parametrize(
    ("words", "served_by"),
    [
        ("", "critic"),
        (_APART, "reward_model"),
        (_NO_CRITIC, "reward_model"),
        (f"{_APART} {_NO_CRITIC}", "reward_model"),
        (_FUNCTION, None),
        (f"{_FUNCTION} trainer.ppo.rewards.read=" + "{}", "critic"),
        (f"{_FUNCTION} {_NO_CRITIC} remote_critic_rm=null", None),
    ],
)
def test_which_server_gives_rewards(words: str, served_by: str | None):
    job = checked("actor", *words.split())
    assert isinstance(job, ActorJob)
    assert job.rewards_served_by == served_by


def test_a_functions_arguments_are_any():
    words = (
        "trainer.ppo.rewards.short.arguments={key: [1, x], sure: True}",
        "trainer.ppo.rewards.short.arguments.n=2",
    )
    job = checked("actor", _FUNCTION, *words)
    assert isinstance(job, ActorJob)
    assert job.trainer.ppo.rewards["short"].arguments == {"key": [1, "x"], "sure": True, "n": 2}
