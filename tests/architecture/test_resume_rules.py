# SPDX-License-Identifier: Apache-2.0
"""Every setting of every job that trains has a rule for resuming with another value, and every rule has a setting."""

import dataclasses
import types
import typing
from collections.abc import Iterator
from fnmatch import fnmatchcase

import pytest

from nemo_aligner.config.ppo import ActorJob
from nemo_aligner.config.resume import RULES, rule_for
from nemo_aligner.config.reward import RMJob
from nemo_aligner.config.serve import CriticJob
from nemo_aligner.config.sft import SFTJob
from nemo_aligner.launch.command import find_commands, load_script
from nemo_aligner.models.gpt.config import ARCHITECTURE_KEYS

# Those of algorithms stand in their scripts.
SCRIPTS = [load_script(path) for name, path in find_commands().items() if path.name == f"train_gpt_{name}.py"]
JOBS = tuple(dict.fromkeys((SFTJob, RMJob, ActorJob, CriticJob, *(script.kind for script in SCRIPTS))))


def keys(kind: type, prefix: str = "") -> Iterator[str]:
    hints = typing.get_type_hints(kind)
    for field in dataclasses.fields(kind):
        hint = hints[field.name]
        optional = isinstance(hint, types.UnionType) and dataclasses.is_dataclass(typing.get_args(hint)[0])
        if optional or dataclasses.is_dataclass(hint):
            yield from keys(typing.get_args(hint)[0] if optional else hint, f"{prefix}{field.name}.")
        elif prefix + field.name == "model.architecture":
            yield from (f"model.{name}" for name in ARCHITECTURE_KEYS)
        else:
            yield prefix + field.name


@pytest.mark.parametrize("job", JOBS, ids=lambda job: job.__name__)
def test_every_key_has_a_rule(job: type):
    unruled = sorted(key for key in keys(job) if rule_for(key, job.resume_rules) is None)
    assert unruled == [], (
        "add them to RULES in nemo_aligner/config/resume.py: may a run go on with another value?"
    )


def test_every_rule_has_a_key_and_a_reason():
    own = [rule for job in JOBS for rule in job.resume_rules]
    used = {rule_for(key, job.resume_rules) for job in JOBS for key in keys(job)}
    assert [rule for rule in (*RULES, *own) if rule not in used] == []
    assert all(reason for _, _, reason in (*RULES, *own))


@pytest.mark.parametrize(
    ("key", "effect"),
    [
        ("model.restore_from_path", "free"),
        ("trainer.sft.max_steps", "free"),
        ("trainer.devices", "free"),
        ("model.data.num_workers", "free"),
        ("model.data.train_ds.micro_batch_size", "free"),
        ("model.optim.lr", "asked"),
        ("model.hidden_dropout", "asked"),
        ("trainer.ppo.initial_policy_kl_penalty", "asked"),
        ("model.dpo.ref_policy_kl_penalty", "asked"),
        ("trainer.dpo.train_random_sampler", "fixed"),
        ("model.rope_scaling.factor", "fixed"),
        *(
            (key, "fixed")
            for key in (
                "model.seed",
                "trainer.precision",
                "model.answer_only_loss",
                "model.encoder_seq_length",
                "model.optim.sched.name",
                "model.optim.sched.warmup_steps",
                "model.optim.sched.constant_steps",
                "model.data.train_ds.global_batch_size",
                "model.data.train_ds.max_seq_length",
                "model.data.train_ds.prompt_template",
                "model.data.train_ds.add_eos",
                "model.data.chat_template",
                "model.global_batch_size",
                "model.ppo.num_rollout_samples",
            )
        ),
    ],
)
def test_what_changes_numbers_is_not_free(key: str, effect: str):
    rule = rule_for(key)
    assert rule is not None
    assert rule[1] == effect
    assert fnmatchcase(key, rule[0])
