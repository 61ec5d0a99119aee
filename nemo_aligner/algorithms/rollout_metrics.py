# SPDX-License-Identifier: Apache-2.0
"""What is logged of a rollout."""

from nemo_aligner.batch import Scored
from nemo_aligner.objectives.reduce import Moments, kl_k3

__all__ = ["learning_metrics", "rollout_metrics", "summary"]


def rollout_metrics(group: str, scored: Scored, *, trained: bool = True) -> dict[str, float]:
    """What there is to say of answers.

    Args:
        trained: whether the trainer's log-probs are known beside the sampler's.
    """
    lengths = (scored.lengths - scored.prompt_lengths).double()
    metrics = {
        "rollout_size": float(scored.num_rows),
        "response_lengths": lengths.mean().item(),
        "prompt_lengths": scored.prompt_lengths.double().mean().item(),
        "generation_length": lengths.max().item(),
        "rewards": Moments.of(scored.rewards).mean.item(),
        "rewards_std": Moments.of(scored.rewards).std.item(),
        "fraction_of_samples_properly_ended": scored.finished.double().mean().item(),
    }
    if trained:
        metrics |= _agreement(scored)
    return {f"{group}/{name}": value for name, value in metrics.items()}


def _agreement(scored: Scored) -> dict[str, float]:
    """What the trainer believes of the tokens that the sampler drew, beside what the sampler did."""
    answers = scored.learned()
    apart = (scored.logprobs - scored.sampler_logprobs)[answers].double()
    drawn = scored.sampler_logprobs[answers].double()
    return {
        "logprob_difference_mean": apart.abs().mean().item(),
        "logprob_difference_max": apart.abs().max().item(),
        "sampler_kl": kl_k3(drawn, drawn + apart).mean().item(),
    }


def learning_metrics(moments: dict[str, Moments], coefficient: float) -> dict[str, float]:
    """What there is to say of what is learned of them; ``moments`` are those of credit.statistics."""
    means = ("init_policy_kl", "rewards_with_kl", "answer_kl")
    spreads = ("advantages", "returns", "values")
    return {
        **{name: moments[name].mean.item() for name in means},
        **{f"{name}_mean": moments[name].mean.item() for name in spreads},
        **{f"{name}_std": moments[name].std.item() for name in spreads},
        "kl_coefficient": coefficient,
    }


def summary(metrics: dict[str, float]) -> str:
    """A step in a line."""
    return (
        f"reward {metrics['train_rollouts/rewards']:.3f}  kl {metrics['train_rollouts/init_policy_kl']:.4f}  "
        f"length {metrics['train_rollouts/response_lengths']:.0f}  loss {metrics['train_optim/loss']:.4f}  "
        f"{metrics['timers/step_time']:.1f} s"
    )
