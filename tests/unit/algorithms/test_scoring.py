# SPDX-License-Identifier: Apache-2.0
"""What the critic replies is looked at before anything is learned of it."""

from collections.abc import Iterator
from concurrent.futures import Future
from dataclasses import replace

import pytest
import torch

from nemo_aligner.algorithms.ppo_config import RolloutConfig
from nemo_aligner.algorithms.rollout import RolloutSettings
from nemo_aligner.algorithms.sampler import Sampled
from nemo_aligner.algorithms.scoring import Asked, RewardSources, Scorer
from nemo_aligner.algorithms.skips import NotFinite
from nemo_aligner.batch import TokenBatch
from nemo_aligner.models.sampling_config import SamplingConfig
from nemo_aligner.parallel import world
from nemo_aligner.rollout_batch import Rollout
from nemo_aligner.run.stopwatch import Stopwatch
from nemo_aligner.serving.proxies import CriticProxy, PendingReply
from tests.zero_critic import ZeroCritic


@pytest.fixture(scope="module", autouse=True)
def _one_rank() -> Iterator[None]:
    with world.ensure_single_process():
        yield


@pytest.fixture
def scorer() -> Scorer:
    rollouts = RolloutSettings(
        config=RolloutConfig(rollout_micro_batch_size=2),
        num_rows=512,
        sampling=SamplingConfig(),
        global_batch_size=2,
        micro_batch_size=1,
        length_multiple=1,
        seed=0,
        decode=str,
        end_ids=(),
    )
    return Scorer(policy=None, sources=RewardSources(critic=CriticProxy(ZeroCritic())), rollouts=rollouts)


def rollout(*, finished: bool = True) -> Rollout:
    """Two rows of at most four tokens, in six columns."""
    lengths = torch.tensor([3, 4])
    return Rollout(
        tokens=torch.ones(2, 6, dtype=torch.int64),
        loss_mask=torch.arange(6) < lengths[:, None],
        lengths=lengths,
        prompt_lengths=torch.ones(2, dtype=torch.int64),
        finished=torch.full((2,), finished),
        group=torch.arange(2),
        sampler_logprobs=torch.zeros(2, 6),
    )


class _Asked(ZeroCritic):
    """Notes how many rows each request has."""

    def __init__(self) -> None:
        self.rows: list[int] = []

    def infer_rm_critic(self, batch: TokenBatch) -> Future[tuple[torch.Tensor, torch.Tensor]]:
        self.rows.append(batch.num_rows)
        return super().infer_rm_critic(batch)


def test_a_rollout_is_one_request(scorer: Scorer):
    """So the critic changes to the reward model's weights once for it, however few responses are generated at once."""
    asked = _Asked()
    replace(scorer, sources=RewardSources(critic=CriticProxy(asked))).request_scores(
        rollout().pad_rows(8)
    ).critic.result()
    assert asked.rows == [8]


def test_a_rollout_that_nothing_ended_is_reported_with_what_would_end_it(
    scorer: Scorer, caplog: pytest.LogCaptureFixture
):
    rollouts = replace(
        scorer.rollouts, end_ids=(7,), sampling=SamplingConfig(max_length=9, end_strings=("User:",))
    )
    rollouts.warn_of_cut(rollout())
    assert not caplog.text
    rollouts.warn_of_cut(rollout(finished=False))
    assert "none of the 2 responses" in caplog.text
    assert "what ends a response: '[7]', 'User:'" in caplog.text
    assert "max_length, now 9" in caplog.text


def reply(rewards: list[float], values: torch.Tensor) -> Asked:
    future: Future[tuple[torch.Tensor, torch.Tensor]] = Future()
    future.set_result((torch.tensor(rewards), values))
    return Asked(critic=PendingReply(future))


def test_only_columns_with_tokens_are_sent_and_values_come_back_as_wide_as_the_rollout(scorer: Scorer):
    rewards, values = scorer.request_scores(rollout()).critic.result()
    assert rewards.shape == (2,)
    assert values.shape == (2, 4)
    scores = scorer.collect_scores(
        reply([1.0, 2.0], torch.ones(2, 4)), Sampled(rollout=rollout(), prompts={}), Stopwatch()
    )
    assert scores.values.tolist() == [[1, 1, 1, 1, 0, 0]] * 2
    assert scores.rewards.tolist() == [1.0, 2.0]


@pytest.mark.parametrize(
    ("rewards", "values", "words"),
    [
        ([1.0, float("nan")], torch.zeros(2, 4), "1 of 2 rewards"),
        ([1.0, 2.0], torch.tensor([[0.0, float("inf"), 0.0, 0.0]] * 2), "2 of 8 values"),
    ],
)
def test_a_reply_that_is_no_number_ends_the_step_before_it_spoils_the_weights(
    scorer: Scorer, rewards: list[float], values: torch.Tensor, words: str
):
    with pytest.raises(NotFinite) as found:
        scorer.collect_scores(reply(rewards, values), Sampled(rollout=rollout(), prompts={}), Stopwatch())
    assert words in found.value.error.problem
