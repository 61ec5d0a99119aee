# SPDX-License-Identifier: Apache-2.0
"""PPO's two trainers in this process, with objectives that spoil their loss at some steps."""

import json
import math
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import hydra
import pytest
import torch
from torch import Tensor

from nemo_aligner import builders
from nemo_aligner.algorithms.critic_server_trainer import CriticServerTrainer
from nemo_aligner.algorithms.ppo import OnlineObjective, PPOTrainer
from nemo_aligner.algorithms.scoring import RewardSources
from nemo_aligner.algorithms.skips import Diverged
from nemo_aligner.batch import TokenBatch
from nemo_aligner.builders import actor, rollouts, servers
from nemo_aligner.config.ppo import ActorJob
from nemo_aligner.config.serve import CriticJob
from nemo_aligner.errors import UserError
from nemo_aligner.objectives.policy import PolicyGradient
from nemo_aligner.objectives.protocol import Metrics, ModelOutput
from nemo_aligner.objectives.value import ValueLoss
from nemo_aligner.parallel import world
from nemo_aligner.rollout_batch import ValueBatch
from nemo_aligner.run.experiment import Experiment
from nemo_aligner.serving.proxies import CriticProxy
from nemo_aligner.settings import parse
from tests.functional.ppo_pair import Pair
from tests.zero_critic import ZeroCritic

CONF = Path(__file__).parents[2] / "examples/nlp/gpt/conf"


@pytest.fixture(scope="module", autouse=True)
def _one_rank() -> Iterator[None]:
    with world.ensure_single_process():
        yield


@pytest.fixture
def pair(nemo: Path, reward_nemo: Path, tmp_path: Path) -> Pair:
    def nothing() -> None:
        raise AssertionError("no process is started")

    return Pair(folder=tmp_path, start=nothing, nemo=nemo, reward_nemo=reward_nemo, port=1)


def composed(name: str, settings: dict[str, object], kind: type) -> ActorJob | CriticJob:
    words = [f"++{key}={value}" for key, value in settings.items()]
    with hydra.initialize_config_dir(str(CONF), version_base="1.3"):
        job = parse(hydra.compose(name, words), kind)
    job.check()
    return job


def spoiled(objective: type, doomed: range) -> type:
    """The objective, whose loss is NaN in calls ``doomed``, counted from 1."""

    class Spoiled(objective):
        calls = 0

        def __call__(self, output: ModelOutput, batch: TokenBatch) -> tuple[Tensor, Metrics]:
            Spoiled.calls += 1
            loss, metrics = super().__call__(output, batch)
            if Spoiled.calls in doomed:
                loss = loss * math.nan
            return loss, metrics | {"loss": (loss.detach(), metrics["loss"][1])}

    return Spoiled


class _OneReward(ZeroCritic):
    """Critic and reward model: each response has the reward ``first``, the next one 1 more, and so on."""

    def __init__(self, first: float) -> None:
        self.first = first

    def infer_rm_critic(self, batch: TokenBatch):
        future = super().infer_rm_critic(batch)
        _, values = future.result()
        future = type(future)()
        future.set_result((self.first + torch.arange(float(batch.num_rows)), values))
        return future


def train_actor(
    pair: Pair, objective: type, *, reward: float = 0.0, **changed: object
) -> list[dict[str, float]]:
    settings = pair._actor() | {
        "model.micro_batch_size": 8,
        "trainer.ppo.max_steps": 3,
        "trainer.ppo.val_check_interval": 0,
        "trainer.ppo.scale_rewards": False,
        **changed,
    }
    job = composed("gpt_ppo_actor", settings, ActorJob)
    config = job.trainer.ppo
    with builders.open_experiment(job) as run:
        pretrained = actor.load_actor(job, None)
        trainer = PPOTrainer(
            config,
            rollouts.actor_rollouts(job, pretrained),
            pretrained.learner,
            OnlineObjective(loss=objective(job.model.ppo), with_reference=job.asks_initial_policy),
            rollouts.actor_prompts(job, pretrained),
            run,
            builders.training_checkpoints(job, run, pretrained),
        )
        pretrained.learner.prepare_training(
            job.model.optim, clip_grad=1.0, max_steps=3 * trainer.updates.per_rollout
        )
        trainer.fit(RewardSources(critic=CriticProxy(_OneReward(reward))))
    return [json.loads(line) for line in (pair.actor_folder / "metrics.jsonl").read_text().splitlines()]


def test_an_update_that_is_not_finite_is_skipped_and_counted(pair: Pair):
    # Four updates of one micro-batch in each step.
    lines = train_actor(pair, spoiled(PolicyGradient, range(2, 4)))
    assert [line["train_optim/skipped_steps"] for line in lines] == [2, 0, 0]
    assert all(math.isfinite(line["train_optim/loss"]) for line in lines)


def test_updates_that_stay_so_end_the_actor_which_saves(pair: Pair):
    with pytest.raises(UserError, match="in optimizer step 3 the loss is nan") as ended:
        train_actor(pair, spoiled(PolicyGradient, range(3, 99)), **{"trainer.ppo.max_skipped_steps": 5})
    assert "6 optimizer steps in a row were skipped" in ended.value.problem
    state = json.loads((pair.actor_folder / "checkpoints/last/trainer_state.json").read_text())
    assert (state["step"], state["skipped_steps"]) == (2, 6)


@pytest.mark.parametrize("reward", [math.inf, math.nan, 3e38])
def test_a_reward_that_is_no_use_ends_the_actor_by_name(pair: Pair, reward: float):
    with pytest.raises(UserError, match="of this rollout are no use"):
        train_actor(pair, PolicyGradient, reward=reward)


def train_batch(value: float) -> ValueBatch:
    at = torch.arange(12).expand(16, 12)
    mask = (at >= 4) & (at < 10)
    return ValueBatch(
        tokens=torch.arange(12).expand(16, 12) + 5,
        loss_mask=mask,
        lengths=torch.full((16,), 10),
        values=torch.zeros(16, 12),
        returns=torch.full((16, 12), value),
    )


@pytest.fixture
def critic(pair: Pair) -> Iterator[Callable[[type], CriticServerTrainer]]:
    job = composed("gpt_ppo_critic", pair._critic() | {"trainer.ppo.max_skipped_steps": 3}, CriticJob)

    with builders.open_experiment(job) as run:

        def make(objective: type) -> CriticServerTrainer:
            return _critic(job, run, objective)

        yield make


def _critic(job: CriticJob, run: Experiment, objective: type) -> CriticServerTrainer:
    made = servers.load_critic(job)
    checkpoints, load = servers.critic_checkpoints(job, run, made)
    config = replace(servers.critic_config(job, made), micro_batch_size=8)
    run.begin(0)
    return CriticServerTrainer(
        config, made.learner, objective(job.model), run, checkpoints, load=load, start=None
    )


def test_a_critic_skips_and_serves_on_and_ends_after_too_many(critic: Callable):
    trainer = critic(spoiled(ValueLoss, range(2, 99)))
    # Two steps in each request: the loss is the mean of the one that was done.
    assert math.isfinite(trainer.train(train_batch(1.0), None))
    assert trainer.state.skipped_steps == 1
    assert trainer.infer(train_batch(1.0)).values.isfinite().all()
    with pytest.raises(Diverged, match="in optimizer step 2 the loss is nan"):
        trainer.train(train_batch(1.0), None)
    assert trainer.state.skipped_steps == 3


def test_a_critic_that_is_taught_far_too_much_stays_finite(critic: Callable):
    trainer = critic(ValueLoss)
    for value in (9e14, 3e38, -9e14):
        trainer.train(train_batch(value), None)
    assert trainer.state.skipped_steps == 0
    assert trainer.infer(train_batch(1.0)).values.isfinite().all()
    lines = [json.loads(line) for line in (trainer.run.folder / "metrics.jsonl").read_text().splitlines()]
    assert [line["train/skipped_steps"] for line in lines] == [0, 0, 1, 1, 0, 0]


def test_a_critic_whose_values_are_broken_serves_none(critic: Callable):
    trainer = critic(ValueLoss)
    with torch.no_grad():
        trainer.model.model.rm_head.weight.fill_(math.nan)
    with pytest.raises(UserError, match="values of this request are infinite or NaN, and are not served"):
        trainer.infer(train_batch(1.0))
    with pytest.raises(UserError, match="no checkpoint is made of them: rm_head"):
        trainer.save(None)
