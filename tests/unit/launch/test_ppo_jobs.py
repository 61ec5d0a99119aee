# SPDX-License-Identifier: Apache-2.0
"""From one command line to the jobs of a PPO run: whose word is whose, and ports and folders that nobody gave."""

from pathlib import Path

import pytest

from nemo_aligner.errors import UserError
from nemo_aligner.launch.job_group import Program
from nemo_aligner.launch.ppo_jobs import plan_jobs

SCRIPTS = Path("/scripts")


def plan(*words: str) -> dict[str, Program]:
    actor, servers = plan_jobs(words, SCRIPTS)
    return {program.name: program for program in (actor, *servers)}


def settings(program: Program) -> dict[str, str]:
    return dict(word.split("=", 1) for word in program.command[3:])


def test_each_word_goes_to_its_job():
    jobs = plan(
        "++critic.model.seed=1",
        "actor.model.seed=2",
        "actor.model.data.data_prefix={train: [a.jsonl], validation: [b=c.jsonl]}",
        "~actor.exp_manager.name",
        "critic.CUDA_VISIBLE_DEVICES=0,1",
    )
    assert list(jobs) == ["actor", "critic"]
    actor, critic = jobs["actor"].command, jobs["critic"].command
    assert critic[2:4] == ["/scripts/serve_ppo_critic.py", "++model.seed=1"]
    assert actor[2:4] == ["/scripts/train_gpt_ppo_actor.py", "model.seed=2"]
    assert "model.data.data_prefix={train: [a.jsonl], validation: [b=c.jsonl]}" in actor
    assert "~exp_manager.name" in actor
    assert jobs["critic"].environ == {"CUDA_VISIBLE_DEVICES": "0,1"}
    assert jobs["actor"].environ == {}


def test_a_port_that_is_not_given_is_free_and_known_to_both():
    jobs = plan("actor.model.seed=2", "reward.rm_model_file=rm.nemo")
    actor, critic, reward = (settings(jobs[name]) for name in ("actor", "critic", "reward"))
    assert actor["remote_critic_rm.critic.port"] == critic["trainer.ppo.port"]
    assert actor["remote_critic_rm.reward_model.port"] == reward["inference.port"]
    assert critic["trainer.ppo.port"] != reward["inference.port"]
    hosts = [actor["remote_critic_rm.critic.ip"], actor["remote_critic_rm.reward_model.ip"]]
    assert [*hosts, critic["trainer.ppo.ip"], reward["inference.ip"]] == ["127.0.0.1"] * 4
    assert jobs["critic"].address == ("127.0.0.1", int(critic["trainer.ppo.port"]))
    assert jobs["actor"].address is None


@pytest.mark.parametrize(
    "word", ["critic.trainer.ppo.port=4001", "++actor.remote_critic_rm.critic.port=4001"], ids=str
)
def test_a_port_that_one_job_is_given_goes_to_the_other(word: str):
    jobs = plan(word)
    assert sum(part.endswith("port=4001") for job in jobs.values() for part in job.command) == 2
    assert jobs["critic"].address == ("127.0.0.1", 4001)


def test_a_reward_model_of_its_own():
    jobs = plan("reward.rm_model_file=rm.nemo", "reward.trainer.devices=2")
    assert settings(jobs["critic"])["trainer.ppo.combine_rm_and_critic_server"] == "False"
    assert settings(jobs["actor"])["remote_critic_rm.combine_rm_and_critic_server"] == "False"
    assert settings(jobs["actor"])["remote_critic_rm.reward_model.stop_at_end"] == "True"
    assert settings(jobs["reward"])["trainer.devices"] == "2"
    assert "combine" not in str(plan("actor.model.seed=2"))


def test_folders():
    told = plan("actor.exp_manager.explicit_log_dir=/runs/a b", "reward.rm_model_file=rm.nemo")
    assert {name: str(job.log) for name, job in told.items()} == {
        "actor": "/runs/a b/output.log",
        "critic": "/runs/a b/critic/output.log",
        "reward": "/runs/a b/reward/output.log",
    }
    assert settings(told["critic"])["exp_manager.explicit_log_dir"] == "/runs/a b/critic"
    own = plan("critic.exp_manager.explicit_log_dir=c", "actor.exp_manager.exp_dir=d")
    assert str(own["critic"].log) == "c/output.log"
    assert own["actor"].log.parts[:2] == ("d", "ppo")
    assert settings(own["actor"])["exp_manager.explicit_log_dir"] == str(own["actor"].log.parent)


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["trainer.devices=2"], ("trainer.devices=2 does not name a job", "actor.trainer.devices=2")),
        (["reward.trainer.devices=2"], ("reward.rm_model_file=FILE",)),
        (
            ["critic.trainer.ppo.port=1", "actor.remote_critic_rm.critic.port=2"],
            ("critic.trainer.ppo.port=1", "actor.remote_critic_rm.critic.port=2", "set both to 1"),
        ),
        (
            ["reward.rm_model_file=a", "critic.trainer.ppo.combine_rm_and_critic_server=True"],
            ("combine_rm_and_critic_server=True", "reward."),
        ),
        (["critic.trainer.ppo.port=http"], ("port=http is no port",)),
    ],
)
def test_words_that_cannot_be_meant(words: list[str], told: tuple[str, ...]):
    with pytest.raises(UserError) as caught:
        plan(*words)
    assert [part for part in told if part not in str(caught.value)] == []
