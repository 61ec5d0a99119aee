# SPDX-License-Identifier: Apache-2.0
"""Rules for settings that change on resume. The table has every key of every job that trains."""

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any, Literal

from nemo_aligner.models.gpt.config import ARCHITECTURE_KEYS

# free: the numbers stay, but for rounding, or the key says how long and where the run goes on; it is listed.
# asked: the numbers change; it is listed if the command line gives the key, and refused if not.
# fixed: another run; it is refused.
Effect = Literal["free", "asked", "fixed"]
Rule = tuple[str, Effect, str]  # (pattern, effect, reason); "*" takes dots, too

_LENGTH = "how long the run is and when it writes; what is done stays as it is"
_LAYOUT = "the same sums on other ranks or in other parts"
_KERNEL = "the same sums by other kernels"
_VALIDATION = "nothing is learned from validation"
_CONTENT = "what the files hold is compared, not where they lie"
_ADDRESS = "where the other job is found, and how long it is waited for"
_SERVING = "how requests are taken and put together"
_OPTIMIZER = "a knob that people turn in the middle of a run"
_PPO = "a coefficient of the objective that people turn in the middle of a run"
_SCHEDULE = "the learning rate of all steps follows from it"
_SAMPLES = "the tokens that are learned follow from it"
_DRAWS = "the rows and responses of a step follow from it"
_NETWORK = "the network and its arithmetic"
_INERT = "has one meaning only, or repeats another key"

# The first pattern that a key fits says it.
RULES: tuple[Rule, ...] = (
    ("name", "free", "a name"),
    ("exp_manager.*", "free", _LENGTH),
    ("trainer.num_nodes", "free", _LAYOUT),
    ("trainer.devices", "free", _LAYOUT),
    ("trainer.collective_timeout", "free", _ADDRESS),
    ("trainer.max_time", "free", _LENGTH),
    ("trainer.precision", "fixed", _NETWORK),
    ("trainer.*.max_epochs", "free", _LENGTH),
    ("trainer.*.max_steps", "free", _LENGTH),
    ("trainer.*.max_skipped_steps", "free", _LENGTH),
    ("trainer.*.save_interval", "free", _LENGTH),
    ("trainer.*.val_check_interval", "free", _LENGTH),
    ("trainer.*.limit_val_batches", "free", _VALIDATION),
    ("trainer.*.val_random_sampler", "free", _VALIDATION),
    ("trainer.*.val_response*", "free", _VALIDATION),
    ("trainer.*.val_before_train", "free", _VALIDATION),
    ("trainer.*.gradient_clip_val", "asked", _OPTIMIZER),
    ("trainer.*.limit_train_batches", "fixed", _DRAWS),
    ("trainer.*.train_random_sampler", "fixed", _DRAWS),
    ("trainer.ppo.trt_llm.*", "free", _INERT),
    ("trainer.ppo.model_?bs", "free", _INERT),
    ("trainer.ppo.ip", "free", _ADDRESS),
    ("trainer.ppo.port", "free", _ADDRESS),
    ("trainer.ppo.actor_timeout", "free", _ADDRESS),
    ("trainer.ppo.inference_micro_batch_size", "free", _SERVING),
    ("trainer.ppo.max_queue_delay_microseconds", "free", _SERVING),
    ("trainer.ppo.strip_sequence_length_to_multiple", "free", _SERVING),
    ("trainer.ppo.combine_rm_and_critic_server", "fixed", _DRAWS),
    ("trainer.ppo.num_ppo_epochs", "fixed", _SCHEDULE),
    ("trainer.ppo.critic_warmup_steps", "free", "the warm-up is over"),
    ("trainer.ppo.rollout_batch_seq_length", "fixed", _SAMPLES),
    ("trainer.ppo.advantage_estimator", "fixed", _DRAWS),
    ("trainer.ppo.*", "asked", _PPO),
    ("remote_critic_rm.pad_to_length", "fixed", _SAMPLES),
    ("remote_critic_rm.combine_rm_and_critic_server", "fixed", _DRAWS),
    ("remote_critic_rm.*", "free", _ADDRESS),
    ("pretrained_checkpoint.restore_from_path", "free", _CONTENT),
    ("model.restore_from_path", "free", _CONTENT),
    ("model.resume_from_checkpoint", "free", _CONTENT),
    ("model.*parallel_size", "free", _LAYOUT),
    ("model.sequence_parallel", "free", _LAYOUT),
    ("model.activations_checkpoint_*", "free", _LAYOUT),
    ("model.kept_logits_mib", "free", _LAYOUT),
    ("model.use_flash_attention", "free", _KERNEL),
    ("model.*micro_batch_size", "free", _LAYOUT),
    ("model.*offload_adam_states", "free", _LAYOUT),
    ("model.optim.overlap_*", "free", _LAYOUT),
    ("model.optim.bucket_cap_mb", "free", _LAYOUT),
    ("model.optim.name", "free", _INERT),
    ("model.optim.sched.min_lr", "asked", _OPTIMIZER),
    ("model.optim.sched.*", "fixed", _SCHEDULE),
    ("model.optim.*", "asked", _OPTIMIZER),
    ("model.hidden_dropout", "asked", _OPTIMIZER),
    ("model.attention_dropout", "asked", _OPTIMIZER),
    ("model.data.num_workers", "free", _LAYOUT),
    ("model.data.validation_ds.*", "free", _VALIDATION),
    ("model.data.train_ds.file_path", "free", _CONTENT),
    ("model.data.data_prefix*", "free", _CONTENT),
    ("model.data.data_impl", "free", _INERT),
    ("model.data.*", "fixed", _SAMPLES),
    ("model.seed", "fixed", _DRAWS),
    ("model.global_batch_size", "fixed", _DRAWS),
    ("model.answer_only_loss", "fixed", _SAMPLES),
    ("model.peft.restore_from_path", "free", _CONTENT),
    ("model.peft.*", "fixed", _NETWORK),
    ("model.loss_clip_val", "asked", _PPO),
    ("model.reward_standardization.*", "asked", "how rewards are scaled"),
    ("model.ppo.trt_llm.*", "free", _INERT),
    ("model.ppo.combine_rm_and_critic_server", "free", _INERT),
    ("model.ppo.num_val_samples", "free", _VALIDATION),
    ("model.ppo.num_rollout_samples", "fixed", _DRAWS),
    ("model.ppo.num_responses_per_prompt", "fixed", _DRAWS),
    ("model.ppo.*", "asked", _PPO),
    ("model.regression.*", "fixed", _NETWORK),
    ("model.rope_scaling*", "fixed", _NETWORK),
    # A block that no line above names is an algorithm's own.
    ("model.*.*", "asked", "the loss of the algorithm"),
    ("model.*", "fixed", _NETWORK),
)


@dataclass(frozen=True, kw_only=True)
class Change:
    """A setting that was another one before."""

    key: str
    before: Any
    now: Any
    effect: Effect
    is_refused: bool

    def __str__(self) -> str:
        return f"{self.key} was {_shown(self.before)}, is {_shown(self.now)}"


def plain(job: object) -> dict[str, Any]:
    """A job's settings as they can be given again, without tuples and dataclasses."""
    assert dataclasses.is_dataclass(job) and not isinstance(job, type)
    settings = _plain(dataclasses.asdict(job))
    settings["model"] |= settings["model"].pop("architecture")
    return settings


def _plain(value: Any) -> Any:  # noqa: ANN401
    if isinstance(value, dict):
        return {str(key): _plain(one) for key, one in value.items()}
    return [_plain(one) for one in value] if isinstance(value, list | tuple) else value


def rule_for(key: str, own: Sequence[Rule] = ()) -> Rule | None:
    """The rule that a key falls under, one of the job's ``own`` before those of all jobs."""
    return next((rule for rule in (*own, *RULES) if fnmatchcase(key, rule[0])), None)


def flat(settings: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Values by dotted key.

    >>> flat({"model": {"seed": 1, "optim": {"lr": 0.1}}})
    {'model.seed': 1, 'model.optim.lr': 0.1}
    """
    found: dict[str, Any] = {}
    for name, value in settings.items():
        if isinstance(value, Mapping) and value:
            found |= flat(value, f"{prefix}{name}.")
        else:
            found[f"{prefix}{name}"] = value
    return found


def changes(
    before: Mapping[str, Any], now: Mapping[str, Any], *, asked: Iterable[str], own: Sequence[Rule] = ()
) -> list[Change]:
    """The settings that have changed.

    A key that only one side has is one that the other side's release does not know. Keys of the architecture stand only
    where they are set.

    Args:
        asked: keys that the command line gives; a key of a block stands for all below it.
        own: the job's own rules.
    """
    old, new = flat(before), flat(now)
    both = [key for key in {**old, **new} if (key in old and key in new) or _is_architecture(key)]
    prefixes = tuple(asked)
    found = []
    for key in both:
        if old.get(key) != new.get(key):
            rule = rule_for(key, own)
            effect = rule[1] if rule else "fixed"
            is_asked = any(key == one or key.startswith(f"{one}.") for one in prefixes)
            refused = effect == "fixed" or (effect == "asked" and not is_asked)
            found.append(
                Change(key=key, before=old.get(key), now=new.get(key), effect=effect, is_refused=refused)
            )
    return found


def _is_architecture(key: str) -> bool:
    block, _, rest = key.partition(".")
    return block == "model" and rest.partition(".")[0] in ARCHITECTURE_KEYS


def _shown(value: object) -> str:
    return "null" if value is None else str(value)
