# SPDX-License-Identifier: Apache-2.0
"""Credit and both losses at work together: problems whose best policy is known in closed form are solved."""

import pytest
import torch
from torch import Tensor

from nemo_aligner.batch import Unit
from nemo_aligner.objectives.config import CreditConfig, PolicyConfig, ValueConfig
from nemo_aligner.objectives.credit import credit, value_batch
from nemo_aligner.objectives.policy import PolicyGradient
from nemo_aligner.objectives.protocol import ModelOutput
from nemo_aligner.objectives.value import ValueLoss
from nemo_aligner.rollout_batch import ScoredRollout

CONTEXTS, ARMS = 3, 4


class Tables:
    """A policy and a critic that are tables.

    A row is a context, then ``steps`` arms; what is known before an arm is the context and how many arms there were.
    """

    def __init__(self, steps: int) -> None:
        self.steps = steps
        self.logits = torch.zeros(CONTEXTS, steps, ARMS, requires_grad=True)
        self.values = torch.zeros(CONTEXTS, steps, requires_grad=True)

    def logprobs(self, tokens: Tensor) -> Tensor:
        """[B, S]; tokens: [B, S] int64, S = 1 + steps."""
        table = self.logits.log_softmax(-1)[tokens[:, 0]]
        return torch.nn.functional.pad(table.gather(2, tokens[:, 1:, None])[..., 0], (1, 0))

    def values_of(self, tokens: Tensor) -> Tensor:
        """[B, S]."""
        return torch.nn.functional.pad(self.values[tokens[:, 0]], (1, 0))

    @torch.no_grad()
    def rollout(self, rewards: Tensor, rows: int, reference: Tensor, draw: torch.Generator) -> ScoredRollout:
        """Sampled arms with what each is worth; rewards: [contexts, steps, arms], summed over a response."""
        context = torch.arange(rows) % CONTEXTS
        probabilities = self.logits.softmax(-1)[context].flatten(0, 1)
        arms = torch.multinomial(probabilities, 1, generator=draw).view(rows, self.steps)
        tokens = torch.cat([context[:, None], arms], 1)
        logprobs = self.logprobs(tokens)
        known = reference.log_softmax(-1)[context].gather(2, arms[..., None])[..., 0]
        mask = torch.ones_like(tokens, dtype=torch.bool)
        mask[:, 0] = False
        return ScoredRollout(
            tokens=tokens,
            loss_mask=mask,
            lengths=torch.full((rows,), 1 + self.steps),
            prompt_lengths=torch.ones(rows, dtype=torch.int64),
            finished=torch.ones(rows, dtype=torch.bool),
            group=context,
            sampler_logprobs=logprobs,
            logprobs=logprobs,
            reference_logprobs=torch.nn.functional.pad(known, (1, 0)),
            rewards=rewards[context].gather(2, arms[..., None])[..., 0].sum(1),
            values=self.values_of(tokens),
        )


def train(
    tables: Tables, rewards: Tensor, config: CreditConfig, *, rollouts: int, rows: int, reference: Tensor
) -> None:
    """PPO: as many rollouts, of each of which policy and critic learn four times."""
    draw = torch.Generator().manual_seed(0)
    optimizers = [torch.optim.Adam([tables.logits], lr=0.1), torch.optim.Adam([tables.values], lr=0.1)]
    decay = [torch.optim.lr_scheduler.LinearLR(o, 1.0, 0.02, rollouts) for o in optimizers]
    policy, critic = PolicyGradient(PolicyConfig()), ValueLoss(ValueConfig(loss_clip_val=0.5))
    for _ in range(rollouts):
        scored = tables.rollout(rewards, rows, reference, draw)
        experience = credit(scored, config, kl_coefficient=config.initial_policy_kl_penalty)
        train_batch = value_batch(scored, experience)
        for _ in range(4):
            loss, _ = policy(ModelOutput(logprobs=tables.logprobs(scored.tokens)), experience)
            error, _ = critic(ModelOutput(values=tables.values_of(scored.tokens)), train_batch)
            for optimizer, total in zip(optimizers, (loss, error), strict=True):
                optimizer.zero_grad()
                (total / experience.count(Unit.TOKEN)).backward()
                optimizer.step()
        for schedule in decay:
            schedule.step()


@pytest.mark.parametrize("steps", [1, 3])
def test_the_best_arm_is_found_and_its_worth_is_known(steps: int):
    draw = torch.Generator().manual_seed(4)
    rewards = torch.rand(CONTEXTS, steps, ARMS, generator=draw).argsort(-1) / (ARMS - 1)  # an order of 0 to 1
    tables = Tables(steps)
    config = CreditConfig(initial_policy_kl_penalty=0.0)
    train(tables, rewards, config, rollouts=60, rows=96, reference=torch.zeros_like(tables.logits))
    assert torch.equal(tables.logits.argmax(-1), rewards.argmax(-1))
    assert (tables.logits.detach().softmax(-1) * rewards).sum(-1).mean() > 0.95
    # The best arms are worth 1 each, and all of it is paid at the end.
    torch.testing.assert_close(
        tables.values.detach(), torch.full((CONTEXTS, steps), 1.0 * steps), rtol=0.1, atol=0
    )


def test_with_a_penalty_it_finds_the_tilted_reference():
    """The best policy under ``E[R] - beta KL(policy || reference)`` is ``reference * exp(R / beta)``, normalised."""
    draw = torch.Generator().manual_seed(1)
    rewards = torch.rand(CONTEXTS, 1, ARMS, generator=draw)
    reference = torch.randn(CONTEXTS, 1, ARMS, generator=draw)
    beta = 0.4
    config = CreditConfig(initial_policy_kl_penalty=beta, use_absolute_kl=False)
    tables = Tables(1)
    train(tables, rewards, config, rollouts=120, rows=1536, reference=reference)
    best = (reference.log_softmax(-1) + rewards / beta).softmax(-1)
    torch.testing.assert_close(tables.logits.detach().softmax(-1), best, rtol=0, atol=0.03)


def test_a_constant_reward_teaches_nothing():
    tables = Tables(2)
    before = tables.logits.detach().softmax(-1)
    flat = torch.ones(CONTEXTS, 2, ARMS)
    config = CreditConfig(initial_policy_kl_penalty=0.0, gae_lambda=1.0, normalize_advantages=False)
    tables.values.data[:] = 2.0
    train(tables, flat, config, rollouts=10, rows=48, reference=torch.zeros_like(tables.logits))
    assert torch.equal(tables.logits.detach().softmax(-1), before)
