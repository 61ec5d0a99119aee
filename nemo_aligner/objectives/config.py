# SPDX-License-Identifier: Apache-2.0
"""The settings of objectives. Imports no torch, so that they are checked before it is loaded."""

from dataclasses import dataclass
from typing import Literal

from nemo_aligner.errors import UserError

__all__ = [
    "GROUPED",
    "CreditConfig",
    "Estimator",
    "PairLoss",
    "PolicyConfig",
    "RegressionConfig",
    "ValueConfig",
]

PairLoss = Literal["regression", "regular_bt", "margin_bt", "scaled_bt"]
Estimator = Literal["gae", "group", "leave_one_out", "reinforce", "best_of_n"]
# Estimators that compare the responses to one prompt.
GROUPED: tuple[Estimator, ...] = ("group", "leave_one_out", "best_of_n")


@dataclass(frozen=True, kw_only=True)
class RegressionConfig:
    """The ``model.regression`` block."""

    num_attributes: int = 1  # numbers that the head gives to a sequence
    merge_attributes: bool = False  # serve one reward: the attributes weighted by attribute_weights
    attribute_weights: tuple[float, ...] | None = None  # null: each 1 / num_attributes
    loss_mask_val: float = -100.0  # the label of an attribute that was not judged
    loss_func: PairLoss = "regression"
    load_rm_head_weights: bool = False  # start from the head of the checkpoint, where it is a reward model

    def check(self) -> None:
        """Refuse sizes that do not fit each other.

        Raises:
            UserError: with the setting.
        """
        if self.num_attributes < 1:
            raise UserError(
                f"model.regression.num_attributes={self.num_attributes} is not positive",
                cure="set it to 1 or more",
            )
        if self.attribute_weights is not None and len(self.attribute_weights) != self.num_attributes:
            raise UserError(
                f"model.regression.attribute_weights has {len(self.attribute_weights)} numbers, and "
                f"model.regression.num_attributes={self.num_attributes}",
                cure="give one weight for each attribute",
            )

    @property
    def weights(self) -> list[float]:
        """What merges the attributes into one reward, in their order."""
        return list(self.attribute_weights or [1 / self.num_attributes] * self.num_attributes)


@dataclass(frozen=True, kw_only=True)
class PolicyConfig:
    """The part of the ``model.ppo`` block that shapes the policy's loss."""

    ratio_eps: float = 0.2  # the ratio of new to old probability gains nothing outside 1 -+ this
    ratio_eps_high: float | None = None  # the upper side of it; null: as ratio_eps
    dual_clip: float | None = (
        None  # a token of negative advantage A costs at most this times |A|; null: no bound
    )
    entropy_bonus: float = (
        0.0  # weight of the entropy over the whole vocabulary, per token in nats; 0: not computed
    )

    def check(self, block: str) -> None:
        """Refuse values without a meaning. ``block`` is the block's name, as in ``model.ppo``."""
        for name, value, wrong, range_ in (
            ("ratio_eps", self.ratio_eps, not 0 < self.ratio_eps < 1, "between 0 and 1"),
            (
                "ratio_eps_high",
                self.ratio_eps_high,
                self.ratio_eps_high is not None and self.ratio_eps_high <= 0,
                "more than 0, or null",
            ),
            (
                "dual_clip",
                self.dual_clip,
                self.dual_clip is not None and self.dual_clip <= 1,
                "more than 1, for instance 3, or null",
            ),
            ("entropy_bonus", self.entropy_bonus, self.entropy_bonus < 0, "0 (none) or more"),
        ):
            if wrong:
                raise UserError(
                    f"{block}.{name}={value} is out of range", cure=f"set {block}.{name} to {range_}"
                )


@dataclass(frozen=True, kw_only=True)
class ValueConfig:
    """The part of a critic's ``model`` block that shapes its loss."""

    loss_clip_val: float = (
        0.2  # a value gains nothing by moving further than this from its old one; 0: it may
    )

    def check(self, block: str) -> None:
        """Refuse values without a meaning. ``block`` is the block's name, as in ``model``."""
        if self.loss_clip_val < 0:
            raise UserError(
                f"{block}.loss_clip_val={self.loss_clip_val} is negative",
                cure=f"set {block}.loss_clip_val to 0 (no clipping) or more, for instance 0.2",
            )


@dataclass(frozen=True, kw_only=True)
class CreditConfig:
    """The part of the ``trainer.ppo`` block that turns rewards into advantages."""

    advantage_estimator: Estimator = (
        "gae"  # gae asks a critic; group, leave_one_out and best_of_n compare responses
    )
    group_std: bool = True  # with group: divide by the group's standard deviation, as GRPO; False: Dr. GRPO
    initial_policy_kl_penalty: float = (
        0.01  # reward lost per nat of KL to the initial policy; 0: not computed
    )
    use_absolute_kl: bool = True  # with kl_estimator k1: the penalty is of |log p - log q|
    kl_estimator: Literal["k1", "k2", "k3"] = "k1"  # Schulman's names; see objectives/reduce.py
    kl_placement: Literal["token", "last", "loss"] = (
        "token"  # in each token's reward, the last one's, or in the loss
    )
    adaptive_kl_target: float | None = (
        None  # nats per answer that the penalty is steered to; null: it is fixed
    )
    adaptive_kl_horizon: float = 10000.0  # answers; a smaller horizon steers faster
    discount_factor: float = 1.0  # gamma, per token
    gae_lambda: float = 0.95  # lambda of GAE
    normalize_advantages: bool | None = (
        None  # to mean 0 and variance 1 over the rollout's answer tokens on all ranks; null: with gae and reinforce
    )
    reward_clip: float | None = (
        None  # an answer's reward is held within -+ this, before the penalty; null: it is not
    )
    scale_rewards: bool = False  # divide rewards by the running std of their discounted sums
    scaled_reward_clip: float | None = None  # with scale_rewards: each token's is held within -+ this
    mask_unfinished: bool = True  # the policy learns nothing from answers that the length limit cut

    @property
    def estimator_of_kl(self) -> Literal["k1", "abs", "k2", "k3"]:
        """The estimate that the penalty is of."""
        return "abs" if self.kl_estimator == "k1" and self.use_absolute_kl else self.kl_estimator

    @property
    def whitens(self) -> bool:
        """Whether advantages get mean 0 and variance 1 over the rollout."""
        if self.normalize_advantages is None:
            return self.advantage_estimator not in GROUPED
        return self.normalize_advantages

    def check(self, block: str) -> None:
        """Refuse values without a meaning. ``block`` is the block's name, as in ``trainer.ppo``."""
        penalty, target = self.initial_policy_kl_penalty, self.adaptive_kl_target
        for name, value, wrong, range_ in (
            ("initial_policy_kl_penalty", penalty, penalty < 0, "0 (no penalty) or more"),
            ("adaptive_kl_target", target, target is not None and target <= 0, "more than 0, or null"),
            ("adaptive_kl_horizon", self.adaptive_kl_horizon, self.adaptive_kl_horizon <= 0, "more than 0"),
            ("discount_factor", self.discount_factor, not 0 <= self.discount_factor <= 1, "0 to 1"),
            ("gae_lambda", self.gae_lambda, not 0 <= self.gae_lambda <= 1, "0 to 1"),
            (
                "reward_clip",
                self.reward_clip,
                self.reward_clip is not None and self.reward_clip <= 0,
                "more than 0, or null",
            ),
            (
                "scaled_reward_clip",
                self.scaled_reward_clip,
                self.scaled_reward_clip is not None and self.scaled_reward_clip <= 0,
                "more than 0, or null",
            ),
        ):
            if wrong:
                raise UserError(
                    f"{block}.{name}={value} is out of range", cure=f"set {block}.{name} to {range_}"
                )
        if target is not None and self.kl_placement == "loss":
            raise UserError(
                f"{block}.adaptive_kl_target={target} steers a penalty in the reward, and {block}.kl_placement=loss",
                cure=f"set {block}.adaptive_kl_target=null, or {block}.kl_placement=token",
            )
        if target is not None and not penalty:
            raise UserError(
                f"{block}.adaptive_kl_target={target} steers {block}.initial_policy_kl_penalty, which is 0",
                cure=f"set {block}.initial_policy_kl_penalty above 0, or {block}.adaptive_kl_target=null",
            )
        if self.scaled_reward_clip is not None and not self.scale_rewards:
            raise UserError(
                f"{block}.scaled_reward_clip={self.scaled_reward_clip} needs {block}.scale_rewards=True",
                cure=f"set {block}.scale_rewards=True, or {block}.reward_clip to clip rewards that are not scaled",
            )
