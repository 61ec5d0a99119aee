# SPDX-License-Identifier: Apache-2.0
"""The settings of objectives. Imports no torch, so that they are checked before it is loaded."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, Literal, get_args

from nemo_aligner.bounds import bounded, check_bounds
from nemo_aligner.errors import UserError

PairLoss = Literal["regression", "regular_bt", "margin_bt", "scaled_bt"]
PreferenceLoss = Literal["dpo", "ipo", "robust", "rpo_sq", "rpo_bwd_kl", "rpo_fwd_kl", "simpo", "orpo"]
REFERENCED: tuple[PreferenceLoss, ...] = ("dpo", "ipo", "robust", "rpo_sq", "rpo_bwd_kl", "rpo_fwd_kl")
RewardEstimator = Literal["gae", "group", "leave_one_out", "reinforce", "best_of_n"]
Estimator = Literal[RewardEstimator, "teacher"]
PolicyLoss = Literal["ppo", "gspo", "cispo"]
Divergence = Literal["fwd_kl", "bwd_kl", "js"]
BY_REWARDS: tuple[RewardEstimator, ...] = get_args(RewardEstimator)
# Estimators that compare the responses to one prompt.
GROUPED: tuple[RewardEstimator, ...] = ("group", "leave_one_out", "best_of_n")
_ABOVE_0_OR_NULL = "more than 0, or null"
_NOT_POSITIVE = ("{key}={value} is not positive", "set it to {range}")
_NEGATIVE = ("{key}={value} is negative", "set {key} to {range}")


@dataclass(frozen=True, kw_only=True)
class RegressionConfig:
    """The ``model.regression`` block."""

    # numbers that people gave to a response, and that the head gives to it
    num_attributes: int = bounded(1, at_least=1, message=_NOT_POSITIVE)
    merge_attributes: bool = False  # serve one reward: the attributes weighted by attribute_weights
    attribute_weights: tuple[float, ...] | None = None  # null: all alike, 1 / num_attributes
    loss_mask_val: float = -100.0  # the label of an attribute without one
    # regression, or of pairs by their first label: regular_bt, margin_bt, scaled_bt
    loss_func: PairLoss = "regression"
    # start from the head of a checkpoint that is a reward model with as many attributes
    load_rm_head_weights: bool = False

    def check(self) -> None:
        """Raise UserError for sizes that do not fit each other.

        Raises:
            UserError: with the setting.
        """
        check_bounds(self, "model.regression")
        if self.attribute_weights is not None and len(self.attribute_weights) != self.num_attributes:
            raise UserError(
                f"model.regression.attribute_weights has {len(self.attribute_weights)} numbers, and "
                f"model.regression.num_attributes={self.num_attributes}",
                fix="give one weight for each attribute",
            )

    @property
    def weights(self) -> list[float]:
        """The weights that merge the attributes into one reward, in their order."""
        return list(self.attribute_weights or [1 / self.num_attributes] * self.num_attributes)


@dataclass(frozen=True, kw_only=True)
class PolicyConfig:
    """The part of the ``model.ppo`` block that shapes the policy's loss."""

    # ppo: the surrogate of each token's ratio of new to old probability is clipped; gspo: that of the whole response's,
    # by the mean over its tokens; cispo: the ratio, clipped from above alone, is a weight of the token's log-prob
    policy_loss: PolicyLoss = "ppo"
    # the ratio of new to old probability gains nothing outside 1 -+ this
    ratio_eps: float = bounded(0.2, above=0, below=1, to="between 0 and 1")
    # the upper side of it; null: as ratio_eps
    ratio_eps_high: float | None = bounded(None, above=0, to=_ABOVE_0_OR_NULL)
    # a token of negative advantage A costs at most this times |A|; null: no bound
    dual_clip: float | None = bounded(None, above=1, to="more than 1, for instance 3, or null")
    # token: every token of a step weighs the same; sequence: every response does, by the mean over its tokens;
    # constant: the sum over a response's tokens is divided by the most that it may have
    loss_mean: Literal["token", "sequence", "constant"] = "token"
    # weight of the entropy over the whole vocabulary, per token in nats; 0: not computed
    entropy_bonus: float = bounded(0.0, at_least=0, to="0 (none) or more")

    def __post_init__(self) -> None:
        if self.dual_clip is not None and self.policy_loss == "cispo":
            raise UserError(
                f"model.ppo.dual_clip={self.dual_clip} has no effect with model.ppo.policy_loss=cispo, whose weights "
                "are bounded",
                fix="set model.ppo.dual_clip=null",
            )


@dataclass(frozen=True, kw_only=True)
class DPOConfig:
    """The part of the ``model.dpo`` block that shapes the loss."""

    # beta: reward per nat of log-prob above the reference; of simpo: per nat of mean log-prob; of orpo: in metrics only
    ref_policy_kl_penalty: float = bounded(0.2, above=0)
    # dpo, ipo, robust; rpo_sq, rpo_bwd_kl, rpo_fwd_kl by given rewards; simpo, orpo without a reference
    preference_loss: PreferenceLoss = "dpo"
    # of dpo and robust: the probability that a pair is labeled the wrong way round
    label_smoothing: float = bounded(0.0, at_least=0, below=0.5, to="0 or more, and below 0.5")
    gt_reward_scale: float = 1.0  # of rpo_*: the implicit reward that one unit of a given reward asks for
    # of simpo: gamma, by how much the reward of the chosen response is to be ahead
    simpo_gamma: float = bounded(0.5, at_least=0)
    # a response counts by its tokens' mean log-prob, as IPO's authors compute it; False: by their sum, but with simpo
    # and orpo
    preference_average_log_probs: bool = False
    preference_loss_weight: float = bounded(1.0, at_least=0)  # of the loss of pairs; of orpo: lambda
    # of the chosen responses' negative log-likelihood; 0: none
    sft_loss_weight: float = bounded(0.0, at_least=0)
    # True: that of a response is its tokens' mean, not their sum; null: as preference_average_log_probs
    sft_average_log_probs: bool | None = None

    # {setting: the losses that read it}; with another loss it must keep its default
    of_losses: ClassVar[Mapping[str, tuple[PreferenceLoss, ...]]] = {
        "label_smoothing": ("dpo", "robust"),
        "gt_reward_scale": ("rpo_sq", "rpo_bwd_kl", "rpo_fwd_kl"),
        "simpo_gamma": ("simpo",),
    }

    @property
    def averages_sft(self) -> bool:
        """True if the negative log-likelihood of a response is its tokens' mean."""
        return (
            self.preference_average_log_probs
            if self.sft_average_log_probs is None
            else self.sft_average_log_probs
        )

    @property
    def has_reference(self) -> bool:
        """True if the loss compares with a reference."""
        return self.preference_loss in REFERENCED

    def __post_init__(self) -> None:
        for name, losses in self.of_losses.items():
            value, usual = getattr(self, name), self.__dataclass_fields__[name].default
            if value != usual and self.preference_loss not in losses:
                raise UserError(
                    f"model.dpo.{name}={value} has no effect with model.dpo.preference_loss={self.preference_loss}: "
                    f"only {', '.join(losses)} read it",
                    fix=f"set model.dpo.{name}={usual}, or one of these losses",
                )
        if not (self.preference_loss_weight or self.sft_loss_weight):
            raise UserError(
                "model.dpo.preference_loss_weight and model.dpo.sft_loss_weight are 0: there is no loss",
                fix="set one of them above 0",
            )


@dataclass(frozen=True, kw_only=True)
class ValueConfig:
    """The part of a critic's ``model`` block that shapes its loss."""

    # a value gains nothing by moving further than this from its old one; 0: it may
    loss_clip_val: float = bounded(
        0.2, at_least=0, to="0 (no clipping) or more, for instance 0.2", message=_NEGATIVE
    )


@dataclass(frozen=True, kw_only=True)
class CreditConfig:
    """The part of the ``trainer.ppo`` block that turns rewards into advantages."""

    advantage_estimator: Estimator | None = "gae"  # null: none, where pairs of responses are learned from
    # with group: divide by the standard deviation of the group's rewards (GRPO); False: Dr. GRPO
    group_std: bool = True
    # with best_of_n: responses to each prompt that the policy learns from
    top_n: int = bounded(1, at_least=1)
    # reward lost per nat of KL to the initial policy; 0: it is not asked
    initial_policy_kl_penalty: float = bounded(0.01, at_least=0, to="0 (no penalty) or more")
    use_absolute_kl: bool = True  # with kl_estimator k1: the penalty is of |log p - log p0|
    kl_estimator: Literal["k1", "k2", "k3"] = "k1"  # of a token's KL: k1, k2 or k3, Schulman's names
    # token: each token pays for itself; last: the last one pays for all; loss: a term of the loss
    kl_placement: Literal["token", "last", "loss"] = "token"
    # nats per response that the penalty is steered to; null: it is fixed
    adaptive_kl_target: float | None = bounded(None, above=0, to=_ABOVE_0_OR_NULL)
    # responses; a smaller horizon steers faster
    adaptive_kl_horizon: float = bounded(10000.0, above=0)
    discount_factor: float = bounded(1.0, at_least=0, at_most=1)  # gamma, per token
    # lambda of generalised advantage estimation
    gae_lambda: float = bounded(0.95, at_least=0, at_most=1)
    # to mean 0 and variance 1 over the rollout's response tokens on all ranks; null: with gae and reinforce
    normalize_advantages: bool | None = None
    # a response's reward is held within -+ this, before the penalty; null: it is not
    reward_clip: float | None = bounded(None, above=0, to=_ABOVE_0_OR_NULL)
    scale_rewards: bool = False  # divide rewards by the running std of their discounted sums
    # with scale_rewards: each token's is held within -+ this; null: it is not
    scaled_reward_clip: float | None = bounded(None, above=0, to=_ABOVE_0_OR_NULL)
    mask_unfinished: bool = True  # the policy learns nothing from responses that the length limit cut
    # where the sampler's probabilities q are not the trainer's p, an advantage counts p / q times: truncate: at most
    # sampler_ratio_high times; mask: not at all where that is not from sampler_ratio_low to _high; null: it counts once
    sampler_correction: Literal["truncate", "mask"] | None = None
    sampler_ratio_low: float = bounded(
        0.5, at_least=0, at_most=1
    )  # with sampler_correction mask: the least p / q
    sampler_ratio_high: float = bounded(2.0, at_least=1)  # with sampler_correction: the most p / q

    # what a penalty of KL reads, and nothing else does
    of_penalty: ClassVar[tuple[str, ...]] = (
        "use_absolute_kl",
        "kl_estimator",
        "kl_placement",
        "adaptive_kl_horizon",
    )
    # {setting: the estimators that read it}; with another one it must keep its default
    of_estimators: ClassVar[Mapping[str, tuple[Estimator, ...]]] = {
        "group_std": ("group",),
        "top_n": ("best_of_n",),
        "discount_factor": ("gae", "reinforce"),
        "gae_lambda": ("gae",),
        "reward_clip": BY_REWARDS,
        "scale_rewards": BY_REWARDS,
        "normalize_advantages": (*BY_REWARDS, "teacher"),
        "sampler_correction": (*BY_REWARDS, "teacher"),
    }

    @property
    def asks_critic(self) -> bool:
        """True if values are estimated, and by a critic."""
        return self.advantage_estimator == "gae"

    @property
    def needs_rewards(self) -> bool:
        """True if rewards say what is learned; else they are only reported."""
        return self.advantage_estimator != "teacher"

    @property
    def estimator_of_kl(self) -> Literal["k1", "abs", "k2", "k3"]:
        """The estimate that the penalty is of."""
        return "abs" if self.kl_estimator == "k1" and self.use_absolute_kl else self.kl_estimator

    @property
    def whitens(self) -> bool:
        """True if advantages get mean 0 and variance 1 over the rollout."""
        if self.normalize_advantages is None:
            return self.advantage_estimator in ("gae", "reinforce")
        return self.normalize_advantages

    @property
    def idle(self) -> list[str]:
        """The settings that are not as usual, and without effect as there is no penalty of KL."""
        usual = {name: self.__dataclass_fields__[name].default for name in self.of_penalty}
        given = {name: getattr(self, name) for name in self.of_penalty}
        return (
            [] if self.initial_policy_kl_penalty else [name for name in given if given[name] != usual[name]]
        )

    def check(self, block: str) -> None:
        """Raise UserError for values out of range. ``block`` is their section, as in ``trainer.ppo``."""
        penalty, target = self.initial_policy_kl_penalty, self.adaptive_kl_target
        check_bounds(self, block)
        self._check_read(block)
        if target is not None and self.kl_placement == "loss":
            raise UserError(
                f"{block}.adaptive_kl_target={target} steers a penalty in the reward, and {block}.kl_placement=loss",
                fix=f"set {block}.adaptive_kl_target=null, or {block}.kl_placement=token",
            )
        if penalty and self.kl_placement == "loss" and self.estimator_of_kl == "k1":
            raise UserError(
                f"{block}.kl_estimator=k1 has no gradient in the mean with {block}.kl_placement=loss",
                fix=f"set {block}.kl_estimator=k2, of the same divergence, or k3; or {block}.kl_placement=token",
            )
        if target is not None and not penalty:
            raise UserError(
                f"{block}.adaptive_kl_target={target} steers {block}.initial_policy_kl_penalty, which is 0",
                fix=f"set {block}.initial_policy_kl_penalty above 0, or {block}.adaptive_kl_target=null",
            )
        for name, readers in (("sampler_ratio_low", ("mask",)), ("sampler_ratio_high", ("mask", "truncate"))):
            value, correction = getattr(self, name), self.sampler_correction
            if value != self.__dataclass_fields__[name].default and correction not in readers:
                raise UserError(
                    f"{block}.{name}={value} has no effect with {block}.sampler_correction={correction or 'null'}",
                    fix=f"set {block}.sampler_correction to {' or '.join(readers)}, or leave it out",
                )
        if self.scaled_reward_clip is not None and not self.scale_rewards:
            raise UserError(
                f"{block}.scaled_reward_clip={self.scaled_reward_clip} needs {block}.scale_rewards=True",
                fix=f"set {block}.scale_rewards=True, or {block}.reward_clip to clip rewards that are not scaled",
            )

    def _check_read(self, block: str) -> None:
        """Raise UserError for a setting that the estimator does not read and that is not as usual."""
        penalty, estimator = self.initial_policy_kl_penalty, self.advantage_estimator or "null"
        if penalty and estimator not in BY_REWARDS:
            raise UserError(
                f"{block}.initial_policy_kl_penalty={penalty} has no effect with "
                f"{block}.advantage_estimator={estimator}",
                fix=f"set {block}.initial_policy_kl_penalty=0.0",
            )
        for name, estimators in self.of_estimators.items():
            value, usual = getattr(self, name), self.__dataclass_fields__[name].default
            if value != usual and estimator not in estimators:
                raise UserError(
                    f"{block}.{name}={value} has no effect with {block}.advantage_estimator={estimator}: only "
                    f"{', '.join(estimators)} read it",
                    fix=f"set {block}.{name}={usual}, or one of these estimators",
                )
