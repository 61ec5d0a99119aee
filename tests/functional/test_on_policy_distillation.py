# SPDX-License-Identifier: Apache-2.0
"""On-policy distillation, end to end: the teacher is approached, kills, layouts, what is refused."""

from collections.abc import Callable
from pathlib import Path

import pytest

from tests.functional.conftest import LAYOUTS, MIXED, ROOT
from tests.functional.run_folder import assert_same_learning, metrics
from tests.functional.test_grpo import settings  # noqa: F401 - a fixture

OPD = ROOT / "examples/nlp/gpt/train_gpt_on_policy_distillation.py"


@pytest.fixture
def teacher(nemo: Path, data: Path, run: Callable, tmp_path: Path) -> Path:
    """The toy, fine-tuned to name a colour."""
    asked = {
        "model.restore_from_path": nemo,
        "model.data.train_ds.file_path": data,
        "model.data.train_ds.global_batch_size": 32,
        "model.data.train_ds.micro_batch_size": 32,
        "model.optim.lr": 1e-2,
        "model.optim.sched.warmup_steps": 0,
        "trainer.precision": 32,
        "trainer.sft.max_steps": 40,
        "exp_manager.explicit_log_dir": tmp_path / "teacher",
        "exp_manager.create_tensorboard_logger": False,
    }
    job = run(asked, command=[ROOT / "examples/nlp/gpt/train_gpt_sft.py"])
    assert job.process.returncode == 0, job.err[-3000:]
    return tmp_path / "teacher/checkpoints/megatron_gpt_sft.nemo"


@pytest.fixture
def asked(settings: Callable, teacher: Path) -> Callable[..., dict[str, object]]:  # noqa: F811
    """Settings of a toy run without rewards, in a folder of the name."""

    def make(name: str, **changed: object) -> dict[str, object]:
        usual = {
            "model.on_policy_distillation.teacher": teacher,
            "model.ppo.num_responses_per_prompt": 1,
            "trainer.ppo.num_ppo_epochs": 2,
        }
        rewarded = settings(name, **(usual | changed))
        return {key: value for key, value in rewarded.items() if "rewards" not in key}

    return make


def test_the_teacher_is_approached_and_a_killed_run_goes_on(
    asked: Callable, kill_and_resume: Callable, tmp_path: Path
):
    longer = {"trainer.devices": 2, "trainer.ppo.max_steps": 24}
    kill_and_resume(lambda name: asked(name, **longer), command=[OPD], step=4)
    assert_same_learning(tmp_path / "killed", tmp_path / "whole")
    lines = metrics(tmp_path / "whole")
    steps = [line for line in lines if "train_optim/loss" in line]
    # Minus the KL of the student to the teacher, in nats per token: of tokens, and of responses.
    apart = [line["train_rollouts/advantages_mean"] for line in steps]
    assert max(apart) < 0
    assert sum(apart[-4:]) > 0.7 * sum(apart[:4])
    assert steps[0]["train_rollouts/rewards"] == pytest.approx(apart[0], rel=0.2)
    validated = [line["val_rollouts/rewards"] for line in lines if "val_rollouts/rewards" in line]
    assert validated[-1] > validated[0]


def test_results_do_not_depend_on_the_layout(asked: Callable, run: Callable, tmp_path: Path):
    few = {"trainer.ppo.max_steps": 2, "trainer.ppo.save_interval": 0}
    for name, changed in (("one", {}), ("many", LAYOUTS[MIXED])):
        job = run(asked(name, **few, **changed), command=[OPD])
        assert job.process.returncode == 0, job.err[-3000:]
    for ours, theirs in zip(metrics(tmp_path / "many"), metrics(tmp_path / "one"), strict=True):
        assert ours.keys() == theirs.keys()
        for name in ours:
            bound = 2e-5 if "logprob_difference" in name or "kl" in name else 2e-6
            assert ours[name] == pytest.approx(theirs[name], rel=2e-4, abs=bound), name


def test_a_student_that_is_its_own_teacher_has_nothing_to_learn(
    asked: Callable, run: Callable, nemo: Path, tmp_path: Path
):
    few = {"trainer.ppo.max_steps": 1, "trainer.ppo.num_ppo_epochs": 1, "trainer.ppo.val_check_interval": 0}
    job = run(asked("run", **few, **{"model.on_policy_distillation.teacher": nemo}), command=[OPD])
    assert job.process.returncode == 0, job.err[-3000:]
    (step,) = (line for line in metrics(tmp_path / "run") if "train_optim/loss" in line)
    assert step["train_rollouts/advantages_mean"] == step["train_rollouts/advantages_std"] == 0
    assert step["train_rollouts/rewards"] == step["train_optim/grad_norm"] == 0


@pytest.mark.parametrize(
    ("changed", "fix"),
    [
        ({"trainer.ppo.initial_policy_kl_penalty": 0.1}, "set trainer.ppo.initial_policy_kl_penalty=0.0"),
        ({"model.on_policy_distillation.teacher": "nowhere.nemo"}, "model.on_policy_distillation.teacher"),
    ],
)
def test_what_cannot_be_is_refused(asked: Callable, run: Callable, changed: dict[str, object], fix: str):
    job = run(asked("run", **changed), command=[OPD])
    assert job.process.returncode == 2
    assert fix in job.err


def test_an_estimator_without_its_teacher_is_refused(settings: Callable, run: Callable):  # noqa: F811
    estimator = {"trainer.ppo.advantage_estimator": "teacher", "trainer.ppo.initial_policy_kl_penalty": 0}
    job = run(settings("run", **estimator), command=[ROOT / "examples/nlp/gpt/train_gpt_grpo.py"])
    assert job.process.returncode == 2
    assert "trainer.ppo.advantage_estimator='teacher' is not known" in job.err
    assert "use one of gae, group, leave_one_out, reinforce, best_of_n" in job.err
