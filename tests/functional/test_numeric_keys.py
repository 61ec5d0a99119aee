# SPDX-License-Identifier: Apache-2.0
"""Every setting that may change a number does so, or is refused; none of them is read and ignored."""

import json
from collections.abc import Callable, Iterator
from pathlib import Path

import hydra
import pytest

from nemo_aligner import builders
from nemo_aligner.algorithms.supervised import SupervisedTrainer
from nemo_aligner.compatibility import NO_EFFECT
from nemo_aligner.config.sft import SFTJob
from nemo_aligner.errors import UserError
from nemo_aligner.objectives.nll import NLL
from nemo_aligner.parallel import world
from nemo_aligner.settings import is_field, parse

CONF = Path(__file__).parents[2] / "examples/nlp/gpt/conf"
TRAIN, VALID = "model.data.train_ds", "model.data.validation_ds"

# (setting, its value, settings on both sides that let it show)
CHANGES: tuple[tuple[str, object, dict[str, object]], ...] = (
    ("trainer.precision", "bf16", {}),
    ("trainer.sft.max_epochs", 1, {"trainer.sft.max_steps": -1, "trainer.sft.max_epochs": 2}),
    ("trainer.sft.max_steps", 3, {}),
    ("trainer.sft.val_check_interval", 1, {}),
    ("trainer.sft.limit_train_batches", 1, {"trainer.sft.max_epochs": 4}),
    ("trainer.sft.limit_val_batches", 1, {}),
    ("trainer.sft.gradient_clip_val", 0.1, {}),
    ("model.seed", 7, {}),
    ("model.encoder_seq_length", 12, {}),
    ("model.answer_only_loss", False, {}),
    ("model.seq_len_interpolation_factor", 4, {}),
    ("model.hidden_dropout", 0.2, {}),
    ("model.attention_dropout", 0.2, {}),
    (f"{TRAIN}.global_batch_size", 4, {}),
    (f"{TRAIN}.shuffle", False, {}),
    (f"{TRAIN}.max_seq_length", 12, {}),
    (f"{TRAIN}.drop_last", False, {f"{TRAIN}.global_batch_size": 12}),
    (f"{TRAIN}.add_eos", False, {}),
    (f"{TRAIN}.add_bos", True, {}),
    (f"{TRAIN}.truncation_field", "output", {f"{TRAIN}.max_seq_length": 12}),
    (f"{TRAIN}.truncation_method", "left", {f"{TRAIN}.max_seq_length": 12}),
    (f"{TRAIN}.prompt_template", '"{input}: {output}"', {}),
    (f"{VALID}.global_batch_size", 4, {"trainer.sft.limit_val_batches": 1}),
    (f"{VALID}.shuffle", True, {"trainer.sft.limit_val_batches": 1}),
    (f"{VALID}.max_seq_length", 12, {}),
    (f"{VALID}.drop_last", True, {f"{VALID}.global_batch_size": 12}),
    (f"{VALID}.add_eos", False, {}),
    (f"{VALID}.add_bos", True, {}),
    (f"{VALID}.truncation_field", "output", {f"{VALID}.max_seq_length": 12}),
    (f"{VALID}.truncation_method", "left", {f"{VALID}.max_seq_length": 12}),
    (f"{VALID}.prompt_template", '"{input}: {output}"', {}),
    ("model.peft.peft_scheme", "lora", {}),
    ("model.peft.lora_tuning.target_modules", "[mlp]", {"model.peft.peft_scheme": "lora"}),
    ("model.peft.lora_tuning.adapter_dim", 8, {"model.peft.peft_scheme": "lora"}),
    ("model.peft.lora_tuning.alpha", 64, {"model.peft.peft_scheme": "lora"}),
    ("model.peft.lora_tuning.adapter_dropout", 0.5, {"model.peft.peft_scheme": "lora"}),
    ("model.peft.lora_tuning.column_init_method", "kaiming", {"model.peft.peft_scheme": "lora"}),
    ("model.optim.lr", 2e-3, {}),
    ("model.optim.weight_decay", 0.5, {}),
    ("model.optim.betas", "[0.5,0.98]", {}),
    ("model.optim.betas", "[0.9,0.5]", {}),
    ("model.optim.eps", 1e-2, {}),
    ("model.optim.sched.name", "constant", {}),
    ("model.optim.sched.warmup_steps", 0, {}),
    ("model.optim.sched.constant_steps", 2, {}),
    ("model.optim.sched.min_lr", 5e-3, {}),
)
REFUSED: tuple[tuple[str, object], ...] = (
    ("model.ffn_dropout", 0.1),
    ("model.context_parallel_size", 2),
    ("model.expert_model_parallel_size", 2),
    ("model.peft.peft_scheme", "ptuning"),
    ("model.peft.lora_tuning.layer_selection", "[1]"),
    ("model.data.sample", True),
    ("model.optim.name", "sgd"),
    ("model.megatron_legacy", True),
    (f"{TRAIN}.add_sep", True),  # the toy's tokenizer has no separator
    (f"{VALID}.add_sep", True),
    (f"{TRAIN}.label_key", "other"),  # the template does not end with it
    (f"{VALID}.label_key", "other"),
)


@pytest.fixture(scope="module", autouse=True)
def _one_rank() -> Iterator[None]:
    with world.ensure_single_process():
        yield


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("numeric") / "rows.jsonl"
    words = ("red", "green", "blue and white", "yellow")
    lines = [{"input": f"thing {i * i}:", "output": words[i % 4], "other": ""} for i in range(20)]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


@pytest.fixture
def numbers(
    settings: dict[str, object], rows: Path, tmp_path: Path
) -> Callable[..., list[dict[str, object]]]:
    """The metrics of 5 steps of a toy run with some settings."""

    def train(name: str, changed: dict[str, object]) -> list[dict[str, object]]:
        toy = {
            f"{TRAIN}.file_path": rows,
            f"{VALID}.file_path": rows,
            "trainer.sft.max_epochs": 9,
            "trainer.sft.max_steps": 5,
            "model.optim.lr": 1e-2,
            "model.optim.sched.warmup_steps": 1,
            "exp_manager.explicit_log_dir": tmp_path / name,
            "exp_manager.create_checkpoint_callback": False,
        }
        words = [f"++{key}={value}" for key, value in (settings | toy | changed).items()]
        with hydra.initialize_config_dir(str(CONF), version_base="1.3"):
            job = parse(hydra.compose("gpt_sft", words), SFTJob)
        job.check()
        config = job.trainer.sft
        with builders.open_experiment(job) as run:
            pretrained = builders.load_policy(job)
            data = builders.sft_loaders(job, pretrained)
            trainer = SupervisedTrainer(config, pretrained.learner, NLL(), data, run)
            pretrained.learner.prepare_training(
                job.model.optim, clip_grad=config.gradient_clip_val, max_steps=trainer.plan.max_steps
            )
            trainer.fit()
        lines = [json.loads(line) for line in (tmp_path / name / "metrics.jsonl").read_text().splitlines()]
        return [{key: line[key] for key in line if key.endswith(("loss", "grad_norm"))} for line in lines]

    return train


def test_a_run_is_a_function_of_its_settings(numbers: Callable):
    assert numbers("a", {}) == numbers("b", {})


@pytest.mark.parametrize(
    ("key", "value", "base"), CHANGES, ids=[f"{key}={value}" for key, value, _ in CHANGES]
)
def test_a_setting_that_may_change_numbers_does(
    numbers: Callable, key: str, value: object, base: dict[str, object]
):
    assert numbers("changed", base | {key: value}) != numbers("base", base)


@pytest.mark.parametrize(("key", "value"), REFUSED)
def test_a_feature_that_is_not_there_is_refused_by_name(numbers: Callable, key: str, value: object):
    with pytest.raises(UserError) as caught:
        numbers("refused", {key: value})
    assert key.rpartition(".")[2] in str(caught.value)


def test_no_setting_that_changes_numbers_is_passed_over():
    assert len(NO_EFFECT) <= 67
    passed_over = {key for key, _, _ in NO_EFFECT if not is_field(SFTJob, key)}
    assert passed_over & {key for key, *_ in (*CHANGES, *REFUSED)} == set()
