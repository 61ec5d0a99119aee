# SPDX-License-Identifier: Apache-2.0
"""Settings without an effect: the files that explain them, the table and the log agree."""

import logging
from dataclasses import dataclass
from pathlib import Path

import hydra
import pytest
from omegaconf import DictConfig, OmegaConf

from nemo_aligner.compatibility import NO_EFFECT, RENAMED
from nemo_aligner.config.ppo import ActorJob
from nemo_aligner.config.reward import RMJob
from nemo_aligner.config.serve import CriticJob
from nemo_aligner.config.sft import SFTJob
from nemo_aligner.data.config import PairDataConfig
from nemo_aligner.data.data_spec import Split
from nemo_aligner.errors import UserError
from nemo_aligner.launch.command import find_commands, load_script
from nemo_aligner.settings import is_field, log_no_effect, parse

CONF = Path(__file__).parents[2] / "examples/nlp/gpt/conf"
# Blocks of _base, by where gpt_sft.yaml puts them.
BLOCKS = {
    "_base/trainer.yaml": "trainer",
    "_base/exp_manager.yaml": "exp_manager",
    "_base/optim.yaml": "model.optim",
}


def compose(*words: str, name: str = "gpt_sft") -> DictConfig:
    with hydra.initialize_config_dir(str(CONF), version_base="1.3"):
        return hydra.compose(name, list(words))


def told(
    caplog: pytest.LogCaptureFixture, *words: str, name: str = "gpt_sft", kind: type = SFTJob
) -> list[str]:
    with caplog.at_level(logging.INFO, logger="nemo_aligner.settings"):
        log_no_effect(compose(*words, name=name), kind)
    return [record.getMessage() for record in caplog.records]


def commented(words: str) -> set[str]:
    """Dotted keys whose comment in the YAML starts with ``words``."""
    found = set()
    scripts = {path.name: "" for path in CONF.glob("*.yaml")}
    for file, block in {**BLOCKS, **scripts}.items():
        path: list[tuple[int, str]] = [(-1, block)] if block else []
        for line in (CONF / file).read_text().splitlines():
            setting, _, comment = line.partition("  # ")
            name = setting.split(":")[0]
            indent = len(name) - len(name.lstrip())
            while path and path[-1][0] >= indent:
                path.pop()
            path.append((indent, name.strip()))
            if comment.startswith(words):
                found.add(".".join(part for _, part in path))
    return found


@pytest.mark.parametrize("value", ["nan", "inf", "-inf", "1e999"])
def test_a_setting_that_is_not_finite_is_refused(value: str):
    files = [f"model.data.{split}_ds.file_path=x" for split in ("train", "validation")]
    config = compose("model.restore_from_path=x", *files, f"model.optim.lr={value}")
    with pytest.raises(UserError, match=r"model\.optim\.lr=\S+ is not finite"):
        parse(config, SFTJob)


def test_nothing_is_reported_of_a_run_that_asks_for_nothing(caplog: pytest.LogCaptureFixture):
    assert told(caplog) == []


@pytest.mark.parametrize(
    ("word", "line"),
    [
        (
            "++model.save_nemo_on_validation_end=True",
            "model.save_nemo_on_validation_end=True has no effect: ",
        ),
        ("trainer.max_steps=5", "trainer.max_steps=5 has no effect: max_steps of the algorithm's own block"),
        ("model.data.train_ds.hf_dataset=True", "model.data.train_ds.hf_dataset=True has no effect: "),
    ],
)
def test_what_is_asked_for_is_reported_once(caplog: pytest.LogCaptureFixture, word: str, line: str):
    (found,) = told(caplog, word)
    assert found.startswith(line)


@pytest.mark.parametrize("word", ["model.optim.name=adamw", "trainer.max_time=null", "model.seed=1"])
def test_what_asks_for_nothing_is_not_told(caplog: pytest.LogCaptureFixture, word: str):
    assert told(caplog, word) == []


def test_a_file_of_ones_own_may_lack_keys(caplog: pytest.LogCaptureFixture):
    config = OmegaConf.create({"trainer": {}, "model": {"data": {}}})
    OmegaConf.set_struct(config, True)
    with caplog.at_level(logging.INFO, logger="nemo_aligner.settings"):
        log_no_effect(config, SFTJob)
    assert caplog.records == []


def test_what_the_files_call_without_effect_stands_in_the_table():
    assert commented("no effect") <= {key for key, _, _ in NO_EFFECT}


@pytest.mark.parametrize("key", [key for key, _, _ in NO_EFFECT])
def test_every_key_of_the_table_is_accepted(caplog: pytest.LogCaptureFixture, key: str):
    word = f"++{key}=7"
    name, kind = ("gpt_sft", SFTJob)
    if is_field(kind, key) or ".ppo." in key:
        name, kind = ("gpt_ppo_actor", ActorJob)
    parse(compose(*GIVEN[name], word, name=name), kind)
    lines = told(caplog, word, name=name, kind=kind)
    assert f"{key}=7" in [line.split(" has no effect: ")[0] for line in lines]


GIVEN = {
    "gpt_sft": (
        "model.restore_from_path=a",
        "model.data.train_ds.file_path=b",
        "model.data.validation_ds.file_path=c",
    ),
    "gpt_ppo_actor": (
        "pretrained_checkpoint.restore_from_path=a",
        "model.data.data_prefix={train: [b], validation: [b], test: [b]}",
    ),
}


# What the functional tests of NeMo-Aligner 0.7 add to the keys of conf.
TESTED = {
    ("gpt_ppo_critic", CriticJob): (
        "pretrained_checkpoint.restore_from_path=a",
        "++model.reward_model_type=regression",
        "++model.forward_mbs=1",
        "++model.optim.contiguous_grad_buffer=True",
        "++trainer.ppo.pad_sequence_length_to_multiple=32",
        "++model.mcore_gpt=True",
    ),
    ("gpt_ppo_actor", ActorJob): (
        "pretrained_checkpoint.restore_from_path=a",
        "++model.data.data_prefix={train: [a], validation: [b], test: [c]}",
        "++model.offload_adam_states=False",
        "++trainer.ppo.flask_server.enable=True",
        "++model.optim.contiguous_grad_buffer=True",
        "++model.enable_nge=True",
        "+model.overwrite_base_config.optim=True",
        "++exp_manager=null",
    ),
    ("training_rm", RMJob): (
        "pretrained_checkpoint.restore_from_path=a",
        "++model.data.data_impl=jsonl",
        "++model.data.train_ds.shuffle=False",
        "++model.data.validation_ds.shuffle=False",
        "++model.data.shuffle_documents=False",
        "model.data.data_prefix={train: [a], validation: [b], test: [c]}",
        "++model.dist_ckpt_load_strictness=log_all",
    ),
    # And what its gpt_dpo.yaml has.
    ("gpt_dpo", load_script(find_commands()["dpo"]).kind): (
        "pretrained_checkpoint.restore_from_path=a",
        "++model.data.data_impl=jsonl",
        "model.data.data_prefix={train: [a], validation: [b], test: [c]}",
        "++model.dpo.log_prob_forward_micro_batch_size=1",
        "model.dpo.gt_reward_scale=1.0",
        "model.data.default_chosen_reward=1.0",
        "model.data.default_rejected_reward=0.0",
        "++model.data.pad_length_to_multiple_of=null",
        "++model.overwrite_base_config.data.data_prefix=True",
        "++model.peft.peft_scheme=none",
    ),
    # And its gpt_kto.yaml.
    ("gpt_kto", load_script(find_commands()["kto"]).kind): (
        "pretrained_checkpoint.restore_from_path=a",
        "++model.data.data_impl=jsonl",
        "model.data.data_prefix={train: [a], validation: [b], test: [c]}",
        "++model.kto.log_prob_forward_micro_batch_size=1",
        "model.kto.preference_average_log_probs=False",
        "model.kto.sft_average_log_probs=False",
        "model.kto.preference_loss_weight=1",
        "model.kto.sft_loss_weight=0",
    ),
}


@pytest.mark.parametrize(("script", "words"), TESTED.items(), ids=[name for name, _ in TESTED])
def test_the_keys_of_the_originals_tests_are_accepted(script: tuple[str, type], words: tuple[str, ...]):
    name, kind = script
    parse(compose(*words, name=name), kind)


def test_unknown_keys_are_reported_all_at_once():
    words = ("++model.optim.lrr=1", "++trainer.prescision=32", "++model.data.val_ds.shuffle=True", "++top=1")
    with pytest.raises(UserError) as caught:
        parse(compose(*GIVEN["gpt_sft"], *words), SFTJob)
    problem, fix = str(caught.value).split("\nFix: ")
    for key in ("model.optim.lrr", "trainer.prescision", "model.data.val_ds", "top"):
        assert key in problem
        assert f"{key}: " in fix
    assert "trainer.prescision: did you mean trainer.precision?" in fix


@pytest.mark.parametrize(
    ("command", "key", "told"),
    [
        ("dpo", "model.dpo.average_log_probs", "model.dpo.average_log_probs"),
        ("rs", "model.rs.top_n_rollouts", "model.rs"),
        ("rs", "model.ppo.top_n_rollouts", "model.ppo.top_n_rollouts"),
    ],
)
def test_a_key_by_its_old_name_is_told_its_new_one(command: str, key: str, told: str):
    kind = load_script(find_commands()[command]).kind
    with pytest.raises(UserError, match=f"unknown key {told}\n") as caught:
        parse(compose(f"++{key}=1", name=f"gpt_{command}"), kind)
    assert f"use {RENAMED[told]}" in caught.value.fix
    assert is_field(kind, RENAMED[told])


def test_what_a_block_knows_of_itself_is_no_key():
    for key in ("trainer.sft.block", "trainer.sft.blockk", "resume_rules"):
        with pytest.raises(UserError, match=f"unknown key {key}") as caught:
            parse(compose(*GIVEN["gpt_sft"], f"++{key}=1"), SFTJob)
        assert "trainer.sft.block" not in str(caught.value).split("Fix: ")[1]


def test_what_is_unknown_below_a_block_that_nobody_reads_is_reported():
    with pytest.raises(UserError, match=r"unknown key model.data.train_ds.shuffles"):
        parse(
            compose(
                *TESTED["training_rm", RMJob], "++model.data.train_ds.shuffles=False", name="training_rm"
            ),
            RMJob,
        )


@pytest.mark.parametrize(
    ("word", "problem"),
    [
        ("++model.hidden_dropout=often", r"model.hidden_dropout='often' is not a number"),
        ("++model.encoder_seq_length=12.5", r"model.encoder_seq_length=12.5 is not of type int"),
        ("++model.activation=relu", r"model.activation='relu'[\s\S]*Fix: use one of .*gelu"),
        ("++model.rope_scaling={rope_type:linear}", r"model.rope_scaling.factor is not set"),
    ],
)
def test_overrides_of_the_architecture_are_checked(word: str, problem: str):
    with pytest.raises(UserError, match=problem):
        parse(compose(*GIVEN["gpt_sft"], word), SFTJob)


def test_overrides_of_the_architecture_keep_their_form():
    words = ("++model.hidden_dropout=0", "++model.rope_scaling={rope_type:linear,factor:2.0}")
    given = parse(compose(*GIVEN["gpt_sft"], *words), SFTJob).model.architecture
    assert given == {"hidden_dropout": 0.0, "rope_scaling": {"rope_type": "linear", "factor": 2.0}}


@pytest.mark.parametrize(
    ("word", "problem"),
    [
        ("model.activations_checkpoint_granularity=none", "use one of selective, full"),
        ("model.activations_checkpoint_granularity=full", "needs model.activations_checkpoint_method"),
        (
            "model.activations_checkpoint_layers_per_pipeline=1",
            "=1: recomputing fewer layers on later stages",
        ),
        ("model.virtual_pipeline_model_parallel_size=2", "interleaves a pipeline"),
        ("model.optim.overlap_param_sync=True", "needs model.optim.overlap_grad_sync=True"),
        (
            "model.optim.sched.name=NoamAnnealing",
            "use one of CosineAnnealing, WarmupAnnealing, WSD, constant",
        ),
        ("model.optim.sched.name=WSD", "needs model.optim.sched.decay_steps"),
    ],
)
def test_settings_of_the_engine_are_checked(word: str, problem: str):
    with pytest.raises(UserError, match=problem):
        parse(compose(*GIVEN["gpt_sft"], word), SFTJob).check()


def test_the_tutorials_recompute_is_accepted():
    words = ("selective", "uniform")
    keys = ("model.activations_checkpoint_granularity", "model.activations_checkpoint_method")
    job = parse(compose(*GIVEN["gpt_sft"], *(f"{k}={w}" for k, w in zip(keys, words, strict=True))), SFTJob)
    job.check()
    assert (job.model.recompute.granularity, job.model.recompute.method) == words


@dataclass(frozen=True, kw_only=True)
class Data:
    """As much of a job as names its files by split."""

    data: PairDataConfig


@pytest.mark.parametrize(
    ("word", "train"),
    [
        (
            "data.data_prefix={train: [t.jsonl], validation: [v.jsonl], test: [v.jsonl]}",
            Split(paths=("t.jsonl",)),
        ),
        (
            "data.data_prefix={train: [3, a, 1, b], validation: v}",
            Split(paths=("a", "b"), weights=(0.75, 0.25)),
        ),
        ("data={data_prefix: [a, b], splits_string: '3,1'}", Split(paths=("a", "b"), stop=0.75)),
        ("data={data_prefix: a, splits_string: '1,1'}", Split(paths=("a",), stop=0.5)),
    ],
)
def test_files_are_named_on_a_command_line(word: str, train: Split):
    with hydra.initialize_config_dir(str(CONF), version_base="1.3"):
        words = [*GIVEN["gpt_sft"], "++model.data.skip_warmup=True", f"++{word}"]
        config = OmegaConf.create({"data": hydra.compose("gpt_sft", words).data})
    assert parse(config, Data).data.splits.train == train


@pytest.mark.parametrize("optim", [None, {}, {"eps": 1e-6}, {"sched": {"warmup_steps": 3}}])
def test_what_a_file_of_ones_own_leaves_out_is_as_the_script_has_it(optim: dict[str, object] | None):
    config = compose(*GIVEN["gpt_ppo_actor"], name="gpt_ppo_actor")
    OmegaConf.set_struct(config, False)
    config.model.pop("optim")
    if optim is not None:
        config.model.optim = optim
    config.pop("exp_manager")
    job = parse(config, ActorJob)
    assert (job.model.optim.lr, job.model.optim.sched.min_lr) == (9e-7, 9e-8)
    assert job.exp_manager.checkpoint_callback_params.monitor == "val_rewards"
