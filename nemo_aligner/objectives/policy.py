# SPDX-License-Identifier: Apache-2.0
"""Losses of a policy by the advantages of its tokens: PPO's clipped surrogate, GSPO's and CISPO's; entropy and KL."""

from dataclasses import dataclass, field

import torch
from torch import Tensor

from nemo_aligner.batch import TokenBatch, Unit
from nemo_aligner.objectives.config import PolicyConfig
from nemo_aligner.objectives.protocol import Metrics, ModelOutput, Wants
from nemo_aligner.objectives.reduce import KLEstimator, estimate_kl, kl_k3, likelihood_ratio
from nemo_aligner.rollout_batch import Experience


def _clamp(ratio: Tensor, config: PolicyConfig) -> Tensor:
    low = None if config.policy_loss == "cispo" else 1 - config.ratio_eps
    high = config.ratio_eps if config.ratio_eps_high is None else config.ratio_eps_high
    return ratio.clamp(low, 1 + high)


def clipped_surrogate(ratio: Tensor, advantages: Tensor, config: PolicyConfig) -> Tensor:
    """The loss of each token, ``max(-A r, -A clip(r, 1 - eps, 1 + eps))`` (Schulman 2017, arXiv 1707.06347, eq. 7).

    With ``config.dual_clip`` = c, a token of negative advantage costs at most ``-c A`` (dual-clip PPO, Ye 2020,
    arXiv 1912.09729); with ``config.ratio_eps_high``, the range has two widths (clip-higher, Yu 2025, arXiv
    2503.14476).

    ratio: new to old probability of the token, advantages: both [B, S] float, finite. Returns [B, S].

    >>> ratio, advantages = torch.tensor([1.5, 0.5, 1.5]), torch.tensor([2.0, 2.0, -2.0])
    >>> clipped_surrogate(ratio, advantages, PolicyConfig(ratio_eps=0.2))
    tensor([-2.4000, -1.0000,  3.0000])
    """
    losses = torch.maximum(-advantages * ratio, -advantages * _clamp(ratio, config))
    if config.dual_clip is None:
        return losses
    return torch.where(advantages < 0, torch.minimum(losses, -config.dual_clip * advantages), losses)


def clipped_weight(ratio: Tensor, logprobs: Tensor, advantages: Tensor, config: PolicyConfig) -> Tensor:
    """The loss of each token, ``-sg(min(r, 1 + eps)) A log p``: CISPO's (MiniMax 2025, arXiv 2506.13585, eq. 4).

    ``sg`` stops the gradient, so that every token has one, that of a clipped ratio too; as in the paper's runs, nothing
    bounds the ratio from below. Shapes as of :func:`clipped_surrogate`; logprobs: [B, S] float, those of the ratio's
    numerator.

    >>> ratio, logprobs, advantages = torch.tensor([1.5, 0.5]), torch.tensor([-1.0, -1.0]), torch.tensor([2.0, 2.0])
    >>> clipped_weight(ratio, logprobs, advantages, PolicyConfig(policy_loss="cispo", ratio_eps_high=0.2))
    tensor([2.4000, 1.0000])
    """
    return -_clamp(ratio, config).detach() * advantages * logprobs


def sequence_means(x: Tensor, batch: TokenBatch) -> Tensor:
    """Return [B, S], at every position the mean of ``x`` [B, S] over the loss tokens of the sequence that it is of.

    Of log-ratios the exponent is GSPO's ratio of a response (Zheng 2025, arXiv 2507.18071, eq. 7).
    """
    means = batch.per_sequence(x) / batch.loss_lengths().clamp(min=1)
    return means[batch.sequence_ids()]


@dataclass(frozen=True)
class PolicyGradient:
    """The mean of :func:`clipped_surrogate` or :func:`clipped_weight`, less the entropy bonus, plus a KL penalty.

    With ``config.loss_mean`` "token", every token of the global batch weighs the same, whatever response it stands in
    (DAPO, Yu 2025, arXiv 2503.14476, eq. 8; verl's ``token-mean``). With "sequence", every response does: a mean of the
    responses' means (GRPO, Shao 2024, arXiv 2402.03300, eq. 3; verl's ``seq-mean-token-mean``). With "constant", the
    sum over a response's tokens is divided by ``max_length``, and by the number of responses (Dr. GRPO, Liu 2025,
    arXiv 2503.20783, section 3; verl's ``seq-mean-token-sum-norm``).
    """

    config: PolicyConfig = field(default_factory=PolicyConfig)
    kl_coefficient: float = 0.0  # of the KL to the initial policy in the loss; 0: none
    kl_estimator: KLEstimator = "k3"
    max_length: int = 1  # tokens of a response, at most; read with loss_mean "constant"

    @property
    def unit(self) -> Unit:
        """See Objective."""
        return Unit(self.config.loss_mean)

    @property
    def metrics(self) -> tuple[str, ...]:
        """See Objective."""
        names = ("loss", "ppo_ratio", "ppo_ratio_clamped", "clip_fraction", "approx_kl", "scaled_entropy")
        return (*names, "scaled_kl") if self.kl_coefficient else names

    @property
    def wants(self) -> frozenset[Wants]:
        """Log-probs; the entropy too where it has a weight."""
        return frozenset({Wants.LOGPROBS, Wants.ENTROPY} if self.config.entropy_bonus else {Wants.LOGPROBS})

    def __call__(self, output: ModelOutput, batch: TokenBatch) -> tuple[Tensor, Metrics]:
        """The summed loss; and per loss token, the terms of the loss per unit of it:

        - "ppo_ratio", "ppo_ratio_clamped": new to old probability, as it is and within its range; with "gspo" that of
          the token's response;
        - "clip_fraction": how often the clip binds: the clipped side of the surrogate is the larger loss, as TRL, verl,
          OpenRLHF and torchtune count it; a ratio that is out of range on the side that costs more is not clipped;
        - "approx_kl": k3 of KL(old || new), nats;
        - "scaled_entropy": the bonus;
        - "scaled_kl", where it has a coefficient: the penalty, ``beta KL(p || p0)`` of tokens as the policy is now
          (Shao 2024, arXiv 2402.03300, eq. 3).
        """
        assert isinstance(batch, Experience) and output.logprobs is not None
        loss_tokens, weights = batch.loss_tokens(), batch.token_weights(self.unit)
        if self.unit is Unit.CONSTANT:
            weights = weights / self.max_length
        tokens, units = loss_tokens.sum(), batch.count(self.unit)
        # Outside the mask any number may stand, NaN too, or one whose exponent overflows: mask before arithmetic.
        logprobs = torch.where(loss_tokens, output.logprobs, 0)
        old = torch.where(loss_tokens, batch.logprobs, 0)
        advantages = torch.where(loss_tokens, batch.advantages, 0)
        log_ratio = logprobs - old
        if self.config.policy_loss == "gspo":
            log_ratio = sequence_means(log_ratio, batch)
        ratio = likelihood_ratio(log_ratio)
        if self.config.policy_loss == "cispo":
            losses = clipped_weight(ratio, logprobs, advantages, self.config)
        else:
            losses = clipped_surrogate(ratio, advantages, self.config)
        loss = (weights * losses).sum()
        bonus = torch.zeros_like(loss)
        if self.config.entropy_bonus:
            assert output.entropy is not None
            bonus = self.config.entropy_bonus * (weights * torch.where(loss_tokens, output.entropy, 0)).sum()
            loss = loss - bonus
        penalty = torch.zeros_like(loss)
        if self.kl_coefficient:
            reference = torch.where(loss_tokens, batch.reference_logprobs, 0)
            kl = estimate_kl(logprobs, reference, self.kl_estimator)
            penalty = self.kl_coefficient * (weights * kl).sum()
            loss = loss + penalty
        with torch.no_grad():
            clamped = _clamp(ratio, self.config)
            sums = {
                "loss": loss.detach(),
                "ppo_ratio": torch.where(loss_tokens, ratio, 0).sum(),
                "ppo_ratio_clamped": torch.where(loss_tokens, clamped, 0).sum(),
                "clip_fraction": (-advantages * clamped > -advantages * ratio).sum(),
                "approx_kl": kl_k3(old, logprobs).sum(),
                "scaled_entropy": bonus.detach(),
                "scaled_kl": penalty.detach(),
            }
        shares = ("loss", "scaled_entropy", "scaled_kl")
        return loss, {name: (sums[name], units if name in shares else tokens) for name in self.metrics}
