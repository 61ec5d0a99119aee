# SPDX-License-Identifier: Apache-2.0
"""Knowledge distillation, end to end: the teacher is approached, layouts, kills, teachers that do not fit."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from transformers import LlamaForCausalLM

from nemo_aligner.checkpoint.convert import import_from_huggingface
from tests.functional.conftest import LAYOUTS, MIXED, ROOT, toy_config, write_toy_tokenizer
from tests.functional.run_folder import metrics
from tests.functional.test_resume import assert_same_run

KD = ROOT / "examples/nlp/gpt/train_gpt_knowledge_distillation.py"
STEPS = 16


@pytest.fixture(scope="session")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model of another size than the toy, whose beliefs are strong."""
    folder = tmp_path_factory.mktemp("teacher")
    torch.manual_seed(5)
    config = toy_config(hidden_size=32, num_hidden_layers=4, initializer_range=0.3)
    LlamaForCausalLM(config).save_pretrained(folder / "hf")
    write_toy_tokenizer(folder / "hf")
    import_from_huggingface(folder / "hf", str(folder / "teacher.nemo"))
    return folder / "teacher.nemo"


@pytest.fixture
def distilled(settings: dict[str, object], teacher: Path, tmp_path: Path) -> Callable[..., dict[str, object]]:
    """Settings of a toy run in a folder of the name."""

    def make(name: str, **changed: object) -> dict[str, object]:
        return (
            settings
            | {
                "model.knowledge_distillation.teacher": teacher,
                "model.knowledge_distillation.top_k": 16,
                "model.optim.lr": 1e-2,
                "model.optim.sched.warmup_steps": 1,
                "trainer.sft.max_epochs": 20,
                "trainer.sft.max_steps": STEPS,
                "trainer.sft.save_interval": 4,
                "trainer.sft.val_check_interval": 4,
                "exp_manager.checkpoint_callback_params.save_top_k": 1,
                "exp_manager.explicit_log_dir": tmp_path / name,
            }
            | changed
        )

    return make


def steps(folder: Path) -> list[dict[str, float]]:
    return [line for line in metrics(folder) if "train/loss" in line]


def test_the_teacher_is_approached_and_a_killed_run_goes_on(
    distilled: Callable, kill_and_resume: Callable, tmp_path: Path
):
    asked = {"trainer.devices": 2, "model.hidden_dropout": 0.1}
    kill_and_resume(lambda name: distilled(name, **asked), command=[KD], step=8)
    assert_same_run(tmp_path / "killed", tmp_path / "whole", steps=STEPS)
    validations = [
        line["validation/kd_loss"] for line in metrics(tmp_path / "whole") if "validation/loss" in line
    ]
    assert validations[-1] < 0.95 * validations[0]
    assert 0 < steps(tmp_path / "whole")[0]["train/teacher_coverage"] < 1


def test_results_do_not_depend_on_the_layout(distilled: Callable, run: Callable, tmp_path: Path):
    few = {"trainer.sft.max_steps": 3, "model.knowledge_distillation.kd_loss": "bwd_kl"}
    for name, changed in (("one", {}), ("many", LAYOUTS[MIXED])):
        job = run(distilled(name, **few, **changed), command=[KD])
        assert job.process.returncode == 0, job.err[-3000:]
    for ours, theirs in zip(steps(tmp_path / "many"), steps(tmp_path / "one"), strict=True):
        assert ours == pytest.approx(theirs, rel=2e-4, abs=2e-5)


def test_a_stored_teacher_is_a_live_one(distilled: Callable, run: Callable, tmp_path: Path):
    """Asked once; a file that is missing is asked for again, and whole files need no teacher."""
    stored = {"model.knowledge_distillation.store_teacher": True}
    packing = {"model.data.packing": True}
    runs = {"live": {}, "stored": stored, "many": stored | LAYOUTS[MIXED], "packed": packing}
    runs["stored and packed"] = stored | packing
    for name, changed in runs.items():
        few = {"trainer.sft.max_steps": 6, "trainer.sft.save_interval": 0}
        job = run(distilled(name, **few, **changed), command=[KD])
        assert job.process.returncode == 0, job.err[-3000:]
    live = steps(tmp_path / "live")
    for name in runs:
        for ours, theirs in zip(steps(tmp_path / name), live, strict=True):
            assert ours == pytest.approx(theirs, rel=2e-4, abs=2e-5), name
    files = sorted((tmp_path / "stored/teacher/train").glob("*.pt"))
    assert len(files) == 4
    files[2].unlink()
    written = {path: path.stat().st_mtime_ns for path in files if path.exists()}
    smaller = {"model.data.train_ds.micro_batch_size": 2, "model.data.validation_ds.micro_batch_size": 1}
    for most, asks, changed in ((8, True, {}), (10, False, {}), (12, False, smaller)):
        job = run(distilled("stored", **stored, **{"trainer.sft.max_steps": most}, **changed), command=[KD])
        assert job.process.returncode == 0, job.err[-3000:]
        assert ("the teacher's most likely tokens of 32 rows are computed and kept in" in job.err) == asks
    assert files[2].exists()
    assert {path: path.stat().st_mtime_ns for path in written} == written


@pytest.mark.parametrize(
    ("changed", "problem"),
    [
        ({"logits_scale": 0.5}, "is of the top_k alone"),
        ({"kd_loss_weight": 0}, "there is no loss"),
        ({"top_k": 1, "tail": False}, "of one token alone there is nothing to learn"),
        ({"cross_tokenizer": True}, "another tokenizer is not supported"),
    ],
)
def test_what_makes_no_sense_is_refused(distilled: Callable, run: Callable, changed: dict, problem: str):
    job = run(
        distilled("run") | {f"model.knowledge_distillation.{k}": v for k, v in changed.items()}, command=[KD]
    )
    assert job.process.returncode == 2
    assert problem in job.err


def test_tokens_that_only_the_teacher_has_have_no_probability(
    distilled: Callable, run: Callable, teacher: Path, tmp_path: Path
):
    """As where a family pads the embeddings of its sizes to other lengths."""
    model = LlamaForCausalLM.from_pretrained(teacher.parent / "hf")
    known = model.config.vocab_size
    model.resize_token_embeddings(known + 13, mean_resizing=False)
    with torch.no_grad():
        model.lm_head.weight[known:] = 9 * model.lm_head.weight[:13]
    model.save_pretrained(tmp_path / "padded")
    write_toy_tokenizer(tmp_path / "padded")
    for name, path in (("own", teacher), ("padded", tmp_path / "padded")):
        changed = {"trainer.sft.max_steps": 2, "model.knowledge_distillation.teacher": path}
        job = run(distilled(f"by {name}", **changed), command=[KD])
        assert job.process.returncode == 0, job.err[-3000:]
    for ours, theirs in zip(steps(tmp_path / "by padded"), steps(tmp_path / "by own"), strict=True):
        assert ours == pytest.approx(theirs, rel=1e-5)


def test_a_teacher_without_a_tokenizer_is_refused(distilled: Callable, run: Callable, tmp_path: Path):
    LlamaForCausalLM(toy_config()).save_pretrained(tmp_path / "other")
    settings = distilled("run", **{"model.knowledge_distillation.teacher": tmp_path / "other"})
    job = run(settings, command=[KD])
    assert job.process.returncode == 2
    assert "has no tokenizer" in job.err
