# SPDX-License-Identifier: Apache-2.0
"""What a run of the trainer leaves behind, and that its numbers are those of transformers."""

import json
from collections.abc import Callable, Iterator
from pathlib import Path

import hydra
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from nemo_aligner.algorithms.supervised import SupervisedTrainer
from nemo_aligner.builders import Pretrained, load_policy, prepare_training, sft_loaders
from nemo_aligner.config.sft import SFTJob
from nemo_aligner.objectives.nll import NLL
from nemo_aligner.parallel import world
from nemo_aligner.run.experiment import Experiment
from nemo_aligner.settings import parse

CONF = Path(__file__).parents[2] / "examples/nlp/gpt/conf"


@pytest.fixture(scope="module", autouse=True)
def _one_rank() -> Iterator[None]:
    with world.ensure_single_process():
        yield


@pytest.fixture
def build(settings: dict[str, object]) -> Callable[..., tuple[SFTJob, Pretrained]]:
    """The job of some settings, and its model."""

    def make(**changed: object) -> tuple[SFTJob, Pretrained]:
        words = [f"++{key}={value}" for key, value in (settings | changed).items()]
        with hydra.initialize_config_dir(str(CONF), version_base="1.3"):
            job = parse(hydra.compose("gpt_sft", words), SFTJob)
        whole = [word for word in words if "parallel" not in word]
        with hydra.initialize_config_dir(str(CONF), version_base="1.3"):
            one_rank = parse(hydra.compose("gpt_sft", whole), SFTJob)
        return job, load_policy(one_rank)

    return make


def test_the_loss_falls_and_every_step_is_on_record(
    run: Callable, settings: dict[str, object], tmp_path: Path
):
    learning = {
        "trainer.sft.max_steps": 20,
        "trainer.sft.max_epochs": 5,
        "trainer.sft.val_check_interval": 10,
        "model.optim.lr": 5e-3,
        "model.optim.sched.warmup_steps": 2,
        "exp_manager.create_tensorboard_logger": True,
    }
    job = run(settings | learning)
    assert job.wait() == 0, job.err
    assert "WARNING" not in job.err
    lines = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    train = [line for line in lines if "train/loss" in line]
    validation = [line for line in lines if "validation/loss" in line]
    assert [line["step"] for line in train] == list(range(1, 21))
    assert [line["train/consumed_samples"] for line in train] == list(range(8, 161, 8))
    assert [line["train/epoch"] for line in train] == [1 + i // 4 for i in range(20)]
    assert [line["step"] for line in validation] == [10, 20]
    assert train[-1]["train/loss"] < train[0]["train/loss"] / 2
    assert validation[1]["validation/loss"] < validation[0]["validation/loss"]
    assert list((tmp_path / "run/tensorboard").iterdir())
    assert "step 20/20" in job.err
    log = (tmp_path / "run/log.txt").read_text()
    assert "world: 1 rank(s)" in log.split("results go to")[0], "it begins before the folder was there"
    assert "step 20/20" in log


@pytest.mark.parametrize(("global_batch", "micro_batch"), [(5, 1), (12, 3), (40, 40)])
def test_validation_is_the_mean_over_every_learned_token(
    build: Callable, hf_folder: Path, data: Path, global_batch: int, micro_batch: int
):
    job, pretrained = build(
        **{
            "model.data.validation_ds.global_batch_size": global_batch,
            "model.data.validation_ds.micro_batch_size": micro_batch,
        }
    )
    run = Experiment(job.exp_manager, Path("unused"), writes=False)
    batches = sft_loaders(job, pretrained)
    trainer = SupervisedTrainer(job.trainer.sft, pretrained.learner, NLL(), batches, run)
    assert trainer.validate()["validation/loss"] == pytest.approx(reference_loss(hf_folder, data), rel=1e-5)


def reference_loss(hf_folder: Path, data: Path) -> float:
    """transformers' mean loss of all responses with their EOS, in the default template "{input} {output}"."""
    model = AutoModelForCausalLM.from_pretrained(hf_folder).double()
    tokenizer = AutoTokenizer.from_pretrained(hf_folder)
    losses = []
    for line in data.read_text().splitlines():
        row = json.loads(line)
        prompt = tokenizer.encode(row["input"], add_special_tokens=False)
        response = tokenizer.encode(" " + row["output"], add_special_tokens=False)
        response.append(tokenizer.eos_token_id)
        with torch.no_grad():
            logits = model(torch.tensor([prompt + response])).logits[0, len(prompt) - 1 : -1]
        losses.append(torch.nn.functional.cross_entropy(logits, torch.tensor(response), reduction="none"))
    return torch.cat(losses).mean().item()


def test_with_sequence_parallelism_lengths_stay_multiples_where_they_are_capped(build: Callable):
    sliced = {
        "model.tensor_model_parallel_size": 2,
        "model.sequence_parallel": True,
        "model.data.train_ds.max_seq_length": 15,
    }
    job, pretrained = build(**sliced)
    train = sft_loaders(job, pretrained).train
    lengths = {micro.seq_length for step in train.iterate(0, 4) for micro in step}
    assert lengths == {14}
    assert train.num_truncated > 0


@pytest.mark.parametrize(
    ("changed", "warning"),
    [
        ({"trainer.sft.max_steps": 20}, None),
        ({"trainer.sft.max_steps": 20, "model.optim.sched.constant_steps": 10}, "constant_steps=0"),
        ({"trainer.sft.max_steps": 10}, "warmup_steps"),
        ({"trainer.sft.max_steps": 20, "model.optim.sched.name": "constant"}, None),
    ],
)
def test_a_schedule_without_room_is_reported(
    build: Callable, caplog: pytest.LogCaptureFixture, changed: dict[str, object], warning: str | None
):
    job, pretrained = build(**changed)
    caplog.clear()
    prepare_training(job, pretrained, max_steps=job.trainer.sft.max_steps)
    told = [record.getMessage() for record in caplog.records if "learning rate" in record.getMessage()]
    assert len(told) == (warning is not None)
    assert all(f"model.optim.sched.{warning}" in message for message in told)
