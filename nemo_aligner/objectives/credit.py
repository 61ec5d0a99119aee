# SPDX-License-Identifier: Apache-2.0
"""From rewards of responses to advantages of tokens: KL penalty, clipping, scaling, estimators, whitening, masks.

Pure; every rank has the whole rollout, and credits all of it.
"""

import torch
from torch import Tensor

from nemo_aligner.batch import TokenBatch
from nemo_aligner.objectives.adaptive import KLController, RewardScaling
from nemo_aligner.objectives.config import CreditConfig
from nemo_aligner.objectives.reduce import Moments, estimate_kl, kl_k1, likelihood_ratio, masked_mean, whiten
from nemo_aligner.rollout_batch import Experience, ScoredRollout, ValueBatch

_GROUP_EPS = 1e-6  # as verl has it


def kl_controller(config: CreditConfig) -> KLController:
    """Where the penalty's coefficient comes from: fixed, or steered where there is a target."""
    return KLController(
        coefficient=config.initial_policy_kl_penalty,
        target=config.adaptive_kl_target,
        horizon=config.adaptive_kl_horizon,
    )


def _penalised_kl(scored: ScoredRollout, config: CreditConfig) -> Tensor:
    """[B, S]: the estimate of each response token's KL to the initial policy that the penalty is of, else 0."""
    responses = scored.loss_tokens()
    # Where no response is anything may stand; k3's exponent of it must not overflow.
    logprobs = torch.where(responses, scored.logprobs, 0)
    reference = torch.where(responses, scored.reference_logprobs, 0)
    return estimate_kl(logprobs, reference, config.estimator_of_kl)


def shape_rewards(scored: ScoredRollout, config: CreditConfig, *, kl_coefficient: float) -> Tensor:
    """The reward of each token: the response's at its last one, less the KL penalty, ``1[t = T] R - beta kl_t``.

    The KL to the initial policy is a part of the reward (Ziegler 2019, arXiv 1909.08593, eq. 2), not of the loss.
    ``config.kl_placement`` "last" moves all of the response's penalty to its last token, "loss" to the policy's loss.

    Args:
        kl_coefficient: beta; 0 leaves ``reference_logprobs`` unread.

    Returns:
        [B, S] float, 0 outside the responses; nothing for rows without one.
    """
    assert scored.cu_seqlens is None, "responses are credited row by row"
    responses = scored.loss_tokens()
    last = responses & (responses.cumsum(1) == responses.sum(1, keepdim=True))
    rewards, limit = scored.rewards, config.reward_clip
    if limit is not None:
        rewards = rewards.clamp(-limit, limit)
    shaped = torch.where(last, rewards[:, None], 0)
    if not kl_coefficient or config.kl_placement == "loss":
        return shaped
    kl = _penalised_kl(scored, config)
    match config.kl_placement:
        case "token":
            return shaped - kl_coefficient * kl
        case "last":
            return shaped - kl_coefficient * torch.where(last, kl.sum(1, keepdim=True), 0)


def overlong_rewards(lengths: Tensor, *, longest: int, buffer: int) -> Tensor:
    """Return ``clip((longest - buffer - |y|) / buffer, -1, 0)`` of each response: DAPO's soft overlong punishment.

    Yu 2025, arXiv 2503.14476, eq. 13. lengths: [B] int64, tokens of the responses. Returns [B] float.

    >>> overlong_rewards(torch.tensor([6, 9, 10]), longest=10, buffer=4)
    tensor([ 0.0000, -0.7500, -1.0000])
    """
    return ((longest - buffer - lengths) / buffer).clamp(-1, 0)


def gae(values: Tensor, rewards: Tensor, mask: Tensor, *, gamma: float, lam: float) -> tuple[Tensor, Tensor]:
    """Generalised advantage estimation (Schulman 2016, arXiv 1506.02438, eq. 16).

    Backwards over a response's tokens, with V and A beyond its end 0::

        delta_t = r_t + gamma V_{t+1} - V_t
        A_t     = delta_t + gamma lam A_{t+1}
        returns = A + V

    The token that follows t is the next one within the mask, wherever it stands in the row.

    Args:
        values: [B, S] float, of the state before each token.
        rewards: [B, S] float, for writing each token.
        mask: [B, S] bool, the responses' tokens.

    Returns:
        (advantages, returns), [B, S] float, 0 outside the mask.

    >>> advantages, returns = gae(
    ...     torch.tensor([[9.0, 0.5, 0.25]]), torch.tensor([[9.0, 0.0, 1.0]]),
    ...     torch.tensor([[False, True, True]]), gamma=1.0, lam=0.5)
    >>> advantages, returns
    (tensor([[0.0000, 0.1250, 0.7500]]), tensor([[0.0000, 0.6250, 1.0000]]))
    """
    assert values.shape == rewards.shape == mask.shape, (values.shape, rewards.shape, mask.shape)
    # By column: [S, B], so that a step of the loop reads what lies together.
    kept = mask.t().contiguous()
    value = torch.where(kept, values.t(), 0)
    reward = torch.where(kept, rewards.t(), 0)
    advantages = torch.zeros_like(value + reward)
    next_value = next_advantage = advantages.new_zeros(mask.shape[0])
    for t in range(mask.shape[1] - 1, -1, -1):
        advantage = reward[t] + gamma * (next_value + lam * next_advantage) - value[t]
        next_advantage = torch.where(kept[t], advantage, next_advantage)
        next_value = torch.where(kept[t], value[t], next_value)
        advantages[t] = torch.where(kept[t], advantage, 0)
    return advantages.t().contiguous(), (advantages + value).t().contiguous()


def group_advantages(rewards: Tensor, group: Tensor, *, divide_by_std: bool) -> Tensor:
    """Return each response's reward less the mean of its group's, over their standard deviation: GRPO's advantage.

    Shao 2024, arXiv 2402.03300, section 4.1.2, with the unbiased standard deviation that TRL, verl and OpenRLHF take.
    Without the division it is Dr. GRPO's (Liu 2025, arXiv 2503.20783). Equal rewards give 0.

    rewards: [B] float; group: [B] int64, alike for responses to one prompt. Returns [B] float.

    >>> group_advantages(torch.tensor([1.0, 0.0, 3.0, 3.0]), torch.tensor([7, 7, 9, 9]), divide_by_std=True)
    tensor([ 0.7071, -0.7071,  0.0000,  0.0000])
    """
    count, mean = _group_means(rewards, group)
    centred = rewards.double() - mean[group]
    if divide_by_std:
        squares = torch.zeros_like(mean).index_add(0, group, centred.square())
        std = (squares / (count - 1).clamp(min=1)).sqrt()
        centred = centred / (std + _GROUP_EPS)[group]
    return centred.to(rewards.dtype)


def leave_one_out(rewards: Tensor, group: Tensor) -> Tensor:
    """Return each response's reward less the mean of the others' to its prompt: RLOO (Ahmadian 2024, arXiv 2402.14740).

    rewards: [B] float; group: [B] int64, each at least twice. Returns [B] float.

    >>> leave_one_out(torch.tensor([1.0, 2.0, 6.0]), torch.tensor([0, 0, 0]))
    tensor([-3.0000, -1.5000,  4.5000])
    """
    count, mean = _group_means(rewards, group)
    return ((rewards.double() - mean[group]) * (count / (count - 1).clamp(min=1))[group]).to(rewards.dtype)


def best_of_n(rewards: Tensor, group: Tensor, *, keep: int = 1) -> Tensor:
    """Return True for the ``keep`` highest rewards of each group, of equal ones the first: [B], [B] -> [B] bool.

    What is learned from them alone is reward-ranked fine-tuning (Dong 2023, arXiv 2304.06767).

    >>> best_of_n(torch.tensor([1.0, 2.0, 2.0, 0.0]), torch.tensor([3, 3, 3, 4]))
    tensor([False,  True, False,  True])
    """
    order = torch.argsort(rewards, descending=True, stable=True)
    order = order[torch.argsort(group[order], stable=True)]  # by group, within it from the highest reward on
    count = torch.bincount(group)
    place = torch.arange(rewards.numel(), device=rewards.device) - (count.cumsum(0) - count)[group[order]]
    return torch.zeros_like(group, dtype=torch.bool).index_copy(0, order, place < keep)


def differing(rewards: Tensor, group: Tensor) -> Tensor:
    """Return True for responses in whose group not all rewards are equal, exactly: [B], [B] -> [B] bool.

    What is learned of others is 0: dynamic sampling replaces them (DAPO, Yu 2025, arXiv 2503.14476, eq. 11).

    >>> differing(torch.tensor([0.1, 0.1, 0.0, 1.0]), torch.tensor([3, 3, 4, 4]))
    tensor([False, False,  True,  True])
    """
    least, most = (
        torch.zeros(int(group.max()) + 1, dtype=rewards.dtype).scatter_reduce(
            0, group, rewards, reduce=kind, include_self=False
        )
        for kind in ("amin", "amax")
    )
    return (least < most)[group]


def teacher_advantages(logprobs: Tensor, teacher: Tensor) -> Tensor:
    """Return ``A_t = log q(y_t) - log p(y_t)``: on-policy distillation, for p that learns from responses of its own.

    A step along ``sum_t A_t grad log p(y_t)`` goes down the reverse KL of each token's distribution to the teacher's q
    (Agarwal 2023, arXiv 2306.13649, with the reverse KL; as a policy gradient: Gu 2023, arXiv 2306.08543). The
    advantage is minus k1, Schulman's estimate of that KL; what follows a token does not count.

    logprobs: p, teacher: q, both [B, S] float, of the responses' tokens. Returns [B, S], 0 in the mean where q is p.

    >>> teacher_advantages(torch.tensor([[-1.0, -0.5]]), torch.tensor([[-0.5, -2.0]]))
    tensor([[ 0.5000, -1.5000]])
    """
    return -kl_k1(logprobs, teacher)


def teacher_rewards(logprobs: Tensor, teacher: Tensor, responses: Tensor) -> Tensor:
    """Return [B], of each response the mean of its tokens' :func:`teacher_advantages`; of an empty one 0.

    responses: [B, S] bool, the responses' tokens.
    """
    return masked_mean(teacher_advantages(logprobs, teacher), responses, dim=1)


def _group_means(rewards: Tensor, group: Tensor) -> tuple[Tensor, Tensor]:
    """Return ([G] float64 the size of each group, [G] float64 its mean), by the group's number."""
    count = torch.bincount(group).double()
    total = torch.zeros_like(count).index_add(0, group, rewards.double())
    return count, total / count.clamp(min=1)


def _estimated(scored: ScoredRollout, rewards: Tensor, config: CreditConfig) -> tuple[Tensor, Tensor, Tensor]:
    """Return (advantages, returns, the tokens that the policy learns from) by ``config.advantage_estimator``.

    rewards: [B, S] float, those of :func:`shape_rewards`. Estimators that compare responses weigh a response by the sum
    of its tokens' rewards and give each of its tokens the same advantage. All of [B, S].
    """
    responses, gamma = scored.loss_tokens(), config.discount_factor
    whole = rewards.sum(1)
    match config.advantage_estimator:
        case "gae":
            return *gae(scored.values, rewards, responses, gamma=gamma, lam=config.gae_lambda), responses
        case "reinforce":
            # The discounted sum of the rewards that follow (Williams 1992): GAE of no values, lambda 1.
            return *gae(torch.zeros_like(rewards), rewards, responses, gamma=gamma, lam=1.0), responses
        case "teacher":
            each_token = teacher_advantages(scored.logprobs, scored.reference_logprobs)
            each_token = torch.where(responses, each_token, 0)
            return each_token, each_token, responses
        case "group":
            each, kept = group_advantages(whole, scored.group, divide_by_std=config.group_std), responses
        case "leave_one_out":
            each, kept = leave_one_out(whole, scored.group), responses
        case "best_of_n":
            # A response that the length limit cut is not learned from, so it must not be one of the best.
            cut = ~scored.finished if config.mask_unfinished else torch.zeros_like(scored.finished)
            best = best_of_n(whole.masked_fill(cut, -torch.inf), scored.group, keep=config.top_n)
            each, kept = best.to(rewards.dtype), responses & best[:, None]
        case None:
            raise AssertionError("pairs of responses have no advantages")
    advantages = torch.where(responses, each[:, None], 0)
    return advantages, advantages, kept


def sampler_weights(logprobs: Tensor, sampler: Tensor, config: CreditConfig) -> Tensor:
    """Return [B, S] float, by how much tokens that q drew count in what p learns of them.

    ``p / q``, which is unbiased, within bounds: "truncate" gives ``min(p / q, high)`` (Yao 2025, fengyao.notion.site/
    off-policy-rl), "mask" 0 where ``p / q`` is not from ``low`` to ``high`` (IcePop, arXiv 2510.18855, section 3.3.1).

    logprobs: of p, sampler: of q, both [B, S] float.

    >>> p, q = torch.tensor([0.5, 0.5, 0.1]).log(), torch.tensor([0.5, 0.1, 0.5]).log()
    >>> sampler_weights(p, q, CreditConfig(sampler_correction="truncate"))
    tensor([1.0000, 2.0000, 0.2000])
    >>> sampler_weights(p, q, CreditConfig(sampler_correction="mask"))
    tensor([1., 0., 0.])
    """
    ratio, high = likelihood_ratio(logprobs - sampler), config.sampler_ratio_high
    if config.sampler_correction == "truncate":
        return ratio.clamp(max=high)
    return torch.where((ratio >= config.sampler_ratio_low) & (ratio <= high), ratio, 0)


def rolling_returns(rewards: Tensor, mask: Tensor, *, gamma: float) -> Tensor:
    """``R_t = gamma R_{t-1} + r_t`` along each response, from 0 (arXiv 2005.12729, algorithm 1).

    rewards: [B, S] float, mask: [B, S] bool. Returns [B, S], 0 outside the mask.

    >>> rolling_returns(torch.tensor([[1.0, 2.0, 4.0]]), torch.tensor([[True, True, True]]), gamma=0.5)
    tensor([[1.0000, 2.5000, 5.2500]])
    """
    rolling = torch.zeros_like(rewards)
    running = rewards.new_zeros(mask.shape[0])
    for t in range(mask.shape[1]):
        running = torch.where(mask[:, t], gamma * running + rewards[:, t], running)
        rolling[:, t] = torch.where(mask[:, t], running, 0)
    return rolling


def update_reward_scaling(
    scaling: RewardScaling, scored: ScoredRollout, config: CreditConfig, *, kl_coefficient: float
) -> RewardScaling:
    """The rewards' scaling once this rollout has been seen; ``scaling`` itself where rewards are not scaled."""
    if not config.scale_rewards:
        return scaling
    rewards = shape_rewards(scored, config, kl_coefficient=kl_coefficient)
    responses = scored.loss_tokens()
    rolling = rolling_returns(rewards, responses, gamma=config.discount_factor)
    return scaling.update(Moments.of(rolling, responses))


def credit(
    scored: ScoredRollout,
    config: CreditConfig,
    *,
    kl_coefficient: float,
    scaling: RewardScaling | None = None,
) -> Experience:
    """The policy's train batch of scored responses: shaped rewards, scaling, the estimator, whitening, correction.

    Args:
        kl_coefficient: what a nat of KL to the initial policy costs; :func:`kl_controller` has it.
        scaling: what :func:`update_reward_scaling` gave for this rollout; read where ``config.scale_rewards``.

    Returns:
        Rows as they came. ``loss_mask`` is that of the responses, less those that are unfinished with
        ``config.mask_unfinished``; advantages are whitened over the responses, the unfinished included.
    """
    responses = scored.loss_tokens()
    rewards = shape_rewards(scored, config, kl_coefficient=kl_coefficient)
    if config.scale_rewards:
        assert scaling is not None, "update_reward_scaling() comes first"
        rewards, limit = rewards / scaling.divisor, config.scaled_reward_clip
        if limit is not None:
            rewards = rewards.clamp(-limit, limit)
    advantages, returns, kept = _estimated(scored, rewards, config)
    if config.whitens:
        advantages = whiten(advantages, responses, Moments.of(advantages, responses))
    if config.sampler_correction is not None:
        weights = sampler_weights(scored.logprobs, scored.sampler_logprobs, config)
        advantages = torch.where(responses, advantages * weights, 0)
    return Experience(
        tokens=scored.tokens,
        loss_mask=kept & scored.finished[:, None] if config.mask_unfinished else kept,
        lengths=scored.lengths,
        logprobs=scored.logprobs,
        reference_logprobs=scored.reference_logprobs,
        advantages=advantages,
        returns=returns,
        values=torch.where(responses, scored.values, 0),
    )


def value_batch(scored: ScoredRollout, experience: TokenBatch) -> ValueBatch:
    """The critic's train batch of the same responses, unfinished ones too: their values are asked for as well."""
    assert isinstance(experience, Experience), "only what is credited has returns"
    return ValueBatch(
        tokens=scored.tokens,
        loss_mask=scored.loss_tokens(),
        lengths=scored.lengths,
        values=experience.values,
        returns=experience.returns,
    )


def statistics(
    scored: ScoredRollout, learned: TokenBatch, config: CreditConfig, *, kl_coefficient: float
) -> dict[str, Moments]:
    """Return what is logged of a rollout.

    - "rewards": of responses, as the reward model gave them;
    - "init_policy_kl": of responses, the mean over tokens of the KL estimate that the penalty is of;
    - "rewards_with_kl": of responses, the mean over tokens of :func:`shape_rewards`;
    - "answer_kl": of responses, the sum over tokens of ``log p - log q``, which a KL controller is updated with;
    - where an Experience is learned from, "advantages" before whitening, "returns", "values": of response tokens.

    The KLs are 0 where ``kl_coefficient`` is: nothing then says what the initial policy believes.
    """
    responses = scored.loss_tokens()
    rows = responses.any(1)
    rewards = shape_rewards(scored, config, kl_coefficient=kl_coefficient)
    penalised = signed = torch.zeros_like(rewards)
    if kl_coefficient:
        penalised = _penalised_kl(scored, config)
        signed = kl_k1(scored.logprobs, scored.reference_logprobs)
    found = {
        "rewards": Moments.of(scored.rewards, rows),
        "init_policy_kl": Moments.of(masked_mean(penalised, responses, dim=1), rows),
        "rewards_with_kl": Moments.of(masked_mean(rewards, responses, dim=1), rows),
        "answer_kl": Moments.of(torch.where(responses, signed, 0).sum(1), rows),
    }
    if isinstance(learned, Experience):
        found["advantages"] = Moments.of(learned.returns - learned.values, responses)
        found["returns"] = Moments.of(learned.returns, responses)
        found["values"] = Moments.of(learned.values, responses)
    return found
