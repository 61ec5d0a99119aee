# SPDX-License-Identifier: Apache-2.0
"""Numbers that are infinite or NaN: skipped, told and stopped, and no weights of such are left behind."""

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from tritonclient.http import InferenceServerClient, InferInput
from tritonclient.utils import InferenceServerException, np_to_triton_dtype

from nemo_aligner.launch.job_group import free_ports
from tests.functional.ppo_pair import LONG, Pair
from tests.functional.run_folder import tensors

TRAIN_RM = Path(__file__).parents[2] / "examples/nlp/gpt/train_reward_model.py"


def ask(port: int, endpoint: str, **arrays: np.ndarray) -> dict[str, np.ndarray]:
    inputs = []
    for name, array in arrays.items():
        inputs.append(InferInput(name, array.shape, np_to_triton_dtype(array.dtype)))
        inputs[-1].set_data_from_numpy(array)
    with InferenceServerClient(f"127.0.0.1:{port}", network_timeout=60.0) as client:
        result = client.infer(endpoint, inputs)
    return {output["name"]: result.as_numpy(output["name"]) for output in result.get_response()["outputs"]}


def losses(folder: Path) -> list[float]:
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [float(line["train/loss"]) for line in lines if "train/loss" in line]


def assert_ended_by_name(job, folder: Path, *, block: str) -> None:
    """Exit code 2, the first bad step in the message, the weights of the last checkpoint finite, and no .nemo."""
    assert job.wait() == 2, job.err
    problem, fix = job.err.splitlines()[-2:]
    assert problem.startswith("error: 4 optimizer steps in a row were skipped")
    assert f"{block}.max_skipped_steps=4" in problem
    found = losses(folder)
    first = next(step for step, loss in enumerate(found, 1) if loss != loss)
    assert f"in optimizer step {first} the loss is nan" in problem
    assert "model.optim.lr" in fix
    assert len(found) == first + 3
    left = tensors(folder)
    assert any("exp_avg_sq" in key for key in left)
    assert all(x.isfinite().all() for x in left.values() if x.is_floating_point())
    assert list((folder / "checkpoints").glob("*.nemo")) == []


@pytest.fixture
def hopeless() -> dict[str, object]:
    return {"model.optim.lr": 1e6, "model.optim.sched.name": "constant", "model.optim.sched.warmup_steps": 0}


def test_a_rate_that_is_far_too_high_ends_sft(
    run: Callable, settings: dict[str, object], hopeless: dict[str, object], tmp_path: Path
):
    few = {
        "trainer.devices": 2,
        "model.data.train_ds.micro_batch_size": 2,
        "trainer.sft.max_epochs": 9,
        "trainer.sft.max_steps": 30,
        "trainer.sft.save_interval": 1,
        "trainer.sft.val_check_interval": 2,
        "trainer.sft.max_skipped_steps": 4,
        "exp_manager.checkpoint_callback_params.save_top_k": 1,
    }
    job = run(settings | hopeless | few)
    assert_ended_by_name(job, tmp_path / "run", block="trainer.sft")
    states = [
        json.loads(path.read_text())
        for path in (tmp_path / "run/checkpoints").glob("[!.]*/trainer_state.json")
        if not path.parent.is_symlink()
    ]
    # The newest, and the newest before the first skipped step.
    assert sorted(state["skipped_steps"] for state in states) == [0, 4]
    again = run(settings | hopeless | few)
    assert again.wait() == 2
    assert "error: 5 optimizer steps in a row were skipped" in again.err


def test_a_rate_that_is_far_too_high_ends_a_reward_model(
    run: Callable, nemo: Path, hopeless: dict[str, object], tmp_path: Path
):
    rows = [{"text": f"User: thing {i // 2}? Assistant: {('yes', 'no')[i % 2]}"} for i in range(32)]
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    splits = ", ".join(f"{name}: [{tmp_path / 'pairs.jsonl'}]" for name in ("train", "validation", "test"))
    few = {
        "pretrained_checkpoint.restore_from_path": nemo,
        "model.data.data_prefix": f"{{{splits}}}",
        "model.micro_batch_size": 4,
        "model.global_batch_size": 8,
        "trainer.precision": 32,
        "trainer.rm.max_epochs": 20,
        "trainer.rm.max_skipped_steps": 4,
        "exp_manager.explicit_log_dir": tmp_path / "run",
        "exp_manager.create_tensorboard_logger": False,
    }
    job = run(few | hopeless, command=[TRAIN_RM])
    assert_ended_by_name(job, tmp_path / "run", block="trainer.rm")


def test_a_run_whose_last_step_was_skipped_is_no_success(
    run: Callable, settings: dict[str, object], hopeless: dict[str, object], tmp_path: Path
):
    few = {"trainer.sft.max_epochs": 9, "trainer.sft.max_steps": 6}
    for _ in range(2):
        job = run(settings | hopeless | few)
        assert job.wait() == 2
        assert "optimizer steps of the run were skipped: in optimizer step" in job.err
        assert list((tmp_path / "run/checkpoints").glob("*.nemo")) == []


def test_a_critic_refuses_what_it_cannot_learn_and_an_inf_reward_ends_the_actor(
    start: Callable, nemo: Path, reward_nemo: Path, tmp_path: Path
):
    """The reward model divides its rewards by a number so small that they are infinite."""
    port = free_ports(1)[0]
    pair = Pair(
        folder=tmp_path / "pair",
        start=start,
        nemo=nemo,
        reward_nemo=reward_nemo,
        critic_settings={"trainer.ppo.combine_rm_and_critic_server": False},
        actor_settings={
            "remote_critic_rm.combine_rm_and_critic_server": False,
            "remote_critic_rm.reward_model.port": port,
        },
    )
    tiny = {"enable": True, "mean": 0.0, "std": 1e-45}
    pair.serve_reward_model(port, **{f"model.reward_standardization.{k}": v for k, v in tiny.items()})
    critic, actor = pair.start_critic(), pair.start_actor()
    assert actor.wait(timeout=LONG) == 2, actor.err
    problem, fix = actor.err.splitlines()[-2:]
    assert "rewards of this request are infinite or NaN, and are not served" in problem + fix
    assert list((pair.actor_folder / "checkpoints").glob("*.nemo")) == []

    tokens = np.arange(1, 7, dtype=np.int64)[None]
    before = ask(pair.port, "critic_infer", tokens=tokens)["values"]
    train_batch = {name: np.zeros((1, 5), np.float32) for name in ("returns", "prev_values", "mask")}
    train_batch["mask"][0, 2:] = 1
    train_batch["returns"][0, 3] = 3e38
    with pytest.raises(InferenceServerException, match=r"critic_train: returns\[0, 3\] is 3e\+38"):
        ask(pair.port, "critic_train", tokens=tokens, **train_batch)
    assert np.array_equal(ask(pair.port, "critic_infer", tokens=tokens)["values"], before)
    train_batch["returns"][0, 3] = 9e14
    assert np.isfinite(ask(pair.port, "critic_train", tokens=tokens, **train_batch)["loss_mean"]).all()
    after = ask(pair.port, "critic_infer", tokens=tokens)["values"]
    assert np.isfinite(after).all()
    assert not np.array_equal(after, before)
    critic.process.terminate()
    assert critic.wait(timeout=60) == 75, critic.err
    left = tensors(pair.critic_folder)
    assert all(x.isfinite().all() for x in left.values() if x.is_floating_point())
