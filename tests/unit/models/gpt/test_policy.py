# SPDX-License-Identifier: Apache-2.0
"""A policy as its trainers see it: global means, modes, scoring."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import whole_logits

from nemo_aligner.batch import TokenBatch
from nemo_aligner.checkpoint.sharded import load_state, save_state
from nemo_aligner.models.gpt.config import GPTConfig
from nemo_aligner.models.gpt.learning_rate import OptimConfig, SchedConfig
from nemo_aligner.models.gpt.model import GPT
from nemo_aligner.models.gpt.optim import load_optimizer
from nemo_aligner.models.gpt.policy import GPTPolicy
from nemo_aligner.objectives.nll import NLL
from nemo_aligner.run.metrics import means

CONFIG = GPTConfig(
    num_layers=2,
    hidden_size=16,
    ffn_hidden_size=24,
    num_attention_heads=2,
    vocab_size=101,
    position_embedding_type="rope",
)
OPTIM = OptimConfig(lr=1e-2, sched=SchedConfig(name="constant", warmup_steps=0))


@pytest.fixture
def batch(random_rows: Callable[..., TokenBatch]) -> TokenBatch:
    """6 rows of uneven length, of which between none and all is learned."""
    batch = random_rows((9, 4, 12, 2, 7, 10))
    share = torch.tensor([0.1, 0.9, 0.5, 0.0, 1.0, 0.3])[:, None]
    learned = torch.rand(batch.loss_mask.shape, generator=torch.Generator().manual_seed(1)) < share
    return replace(batch, loss_mask=batch.loss_mask & learned)


def trained(model: GPT, batches: list[TokenBatch], *, steps: int = 3) -> list[tuple[float, float]]:
    policy = GPTPolicy(model)
    policy.prepare_training(OPTIM, clip_grad=1.0, max_steps=steps)
    curve = []
    for _ in range(steps):
        loss = means(policy.get_loss_and_metrics(batches, NLL(), forward_only=False))["loss"]
        curve.append((loss, policy.optimizer_step()["grad_norm"]))
    return curve


@pytest.mark.parametrize("rows", [1, 2, 3])
def test_micro_batches_do_not_change_losses_and_grad_norms(
    rows: int, batch: TokenBatch, random_model: Callable[..., GPT]
):
    whole = trained(random_model(CONFIG), [batch])
    assert whole[-1][0] < whole[0][0]
    parts = trained(random_model(CONFIG), batch.split(rows))
    assert [x for pair in parts for x in pair] == pytest.approx([x for pair in whole for x in pair], rel=1e-5)


def test_validation_changes_nothing(batch: TokenBatch, random_model: Callable[..., GPT]):
    policy = GPTPolicy(random_model(CONFIG))
    policy.prepare_training(OPTIM, clip_grad=1.0, max_steps=2)
    training = means(policy.get_loss_and_metrics([batch], NLL(), forward_only=False))
    gradients = [p.main_grad.clone() for p in policy.model.parameters()]
    validation = means(policy.get_loss_and_metrics(batch.split(2), NLL(), forward_only=True))
    assert validation == pytest.approx(training, rel=1e-6)
    assert policy.model.training
    for before, parameter in zip(gradients, policy.model.parameters(), strict=True):
        assert torch.equal(before, parameter.main_grad)


def test_scoring_takes_every_token_whatever_is_learned(batch: TokenBatch, random_model: Callable[..., GPT]):
    policy = GPTPolicy(random_model(CONFIG))
    everywhere = whole_logits.logits(policy.model, batch).log_softmax(-1)[:, :-1]
    found = policy.logprobs(batch)
    for row, length in enumerate(batch.lengths.tolist()):
        tokens = batch.tokens[row, 1:length]
        expected = everywhere[row, : length - 1].gather(1, tokens[:, None])[:, 0]
        torch.testing.assert_close(found[row, 1:length], expected, rtol=1e-5, atol=1e-5)
        assert not found[row, 0]
        assert not found[row, length:].any()


def test_packed_scoring_takes_every_token_too(
    batch: TokenBatch, random_model: Callable[..., GPT], packed: Callable[[TokenBatch], TokenBatch]
):
    policy = GPTPolicy(random_model(CONFIG))
    rows, found = policy.logprobs(batch), policy.logprobs(packed(batch))[0]
    real = torch.cat([row[:length] for row, length in zip(rows, batch.lengths.tolist(), strict=True)])
    torch.testing.assert_close(found[: real.numel()], real, rtol=1e-5, atol=1e-5)
    assert not found[real.numel() :].any()


def test_a_mode_comes_back_after_an_error(random_model: Callable[..., GPT]):
    policy = GPTPolicy(random_model(CONFIG).train())

    with pytest.raises(ZeroDivisionError), policy.inference():
        _ = 1 / int(policy.model.training or torch.is_grad_enabled())
    assert policy.model.training
    assert torch.is_grad_enabled()


def test_a_stopped_run_goes_on_with_the_same_draws(
    batch: TokenBatch, random_model: Callable[..., GPT], tmp_path: Path
):
    """Dropout in the resumed run is that of the undisturbed one, whatever was drawn in between."""
    config = replace(CONFIG, hidden_dropout=0.3, attention_dropout=0.2)
    batches = batch.split(2)

    def step(policy: GPTPolicy) -> tuple[float, float]:
        loss = means(policy.get_loss_and_metrics(batches, NLL(), forward_only=False))["loss"]
        return loss, policy.optimizer_step()["grad_norm"]

    def fresh(seed: int = 7) -> GPTPolicy:
        policy = GPTPolicy(random_model(config), seed=seed)
        policy.prepare_training(OPTIM, clip_grad=1.0, max_steps=4)
        return policy

    first = fresh()
    for _ in range(2):
        step(first)
    weights = {name: x.clone() for name, x in first.model.state_dict().items() if x is not None}
    save_state(first.training_state(), tmp_path / "state")
    undisturbed = [step(first), step(first)]

    second = fresh()
    second.model.load_state_dict(weights, strict=False)
    second.load_training_state(load_state(second.training_state(), tmp_path / "state", remedy=""))
    torch.rand(100)
    assert [step(second), step(second)] == undisturbed
    assert step(fresh())[0] == step(fresh())[0] != step(fresh(seed=8))[0]


def test_the_settings_count_and_not_those_that_were_saved(
    random_model: Callable[..., GPT], batch: TokenBatch
):
    policy = GPTPolicy(random_model(CONFIG))
    policy.prepare_training(replace(OPTIM, weight_decay=0.5), clip_grad=1.0, max_steps=4)
    policy.get_loss_and_metrics([batch], NLL(), forward_only=False)
    policy.optimizer_step()
    state = policy.training_state()
    groups = state["optimizer"]["optimizer"]["param_groups"]
    assert {group["weight_decay"] for group in groups} == {0.5, 0.0}
    assert {group["step"] for group in groups} == {1}
    other = GPTPolicy(random_model(CONFIG))
    changed = replace(OPTIM, weight_decay=0.25, lr=OPTIM.lr / 2)
    other.prepare_training(changed, clip_grad=1.0, max_steps=4)
    assert other._optimizer is not None
    load_optimizer(changed, other._optimizer, {"optimizer": state["optimizer"]["optimizer"]})
    assert {group["weight_decay"] for group in other._optimizer.param_groups} == {0.25, 0.0}
