# SPDX-License-Identifier: Apache-2.0
"""What is logged of a rollout."""

from nemo_aligner.batch import Scored
from nemo_aligner.objectives.reduce import Moments, kl_k3

__all__ = ["learning_metrics", "rollout_metrics", "summary"]


def rollout_metrics(group: str, scored: Scored) -> dict[str, float]:
    """What there is to say of answers, whoever wrote them."""
    answers = scored.learned()
    lengths = (scored.lengths - scored.prompt_lengths).double()
    # Of tokens that the sampler drew, what the trainer believes of them, and by how much the two differ.
    apart = (scored.logprobs - scored.sampler_logprobs)[answers].double()
    drawn = scored.sampler_logprobs[answers].double()
    metrics = {
        "rollout_size": float(scored.num_rows),
        "response_lengths": lengths.mean().item(),
        "prompt_lengths": scored.prompt_lengths.double().mean().item(),
        "generation_length": lengths.max().item(),
        "rewards": Moments.of(scored.rewards).mean.item(),
        "rewards_std": Moments.of(scored.rewards).std.item(),
        "fraction_of_samples_properly_ended": scored.finished.double().mean().item(),
        "logprob_difference_mean": apart.abs().mean().item(),
        "logprob_difference_max": apart.abs().max().item(),
        "sampler_kl": kl_k3(drawn, drawn + apart).mean().item(),
    }
    return {f"{group}/{name}": value for name, value in metrics.items()}


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
