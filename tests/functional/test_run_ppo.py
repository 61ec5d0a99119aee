# SPDX-License-Identifier: Apache-2.0
"""run_ppo.py: all jobs of a PPO run from one command, and what stays of them when it ends: nothing."""

import json
import re
import signal
import socket
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest

SCRIPT = [Path(__file__).parents[2] / "examples/nlp/gpt/run_ppo.py"]
SECONDS_TO_END = 10
START_SECONDS = 120


@pytest.fixture
def words(nemo: Path, reward_nemo: Path, prompts: Path, tmp_path: Path) -> list[str]:
    """A toy run that ends well."""
    both = {
        "trainer.precision": 32,
        "exp_manager.create_tensorboard_logger": False,
        "model.global_batch_size": 8,
        "model.micro_batch_size": 4,
        "model.optim.lr": 1e-4,
    }
    actor = {
        "pretrained_checkpoint.restore_from_path": nemo,
        "exp_manager.explicit_log_dir": tmp_path / "run",
        "model.data.data_prefix": f"{{train: [{prompts}], validation: [{prompts}], test: [{prompts}]}}",
        "model.optim.sched.constant_steps": 0,
        "model.ppo.num_rollout_samples": 16,
        "model.ppo.num_val_samples": 8,
        "model.ppo.length_params.max_length": 8,
        "trainer.ppo.max_steps": 3,
        "trainer.ppo.val_check_interval": 2,
    }
    critic = {"pretrained_checkpoint.restore_from_path": reward_nemo}
    return [
        *(f"critic.{key}={value}" for key, value in (both | critic).items()),
        *(f"actor.{key}={value}" for key, value in (both | actor).items()),
    ]


ENDLESS = ["actor.trainer.ppo.max_steps=-1", "actor.trainer.ppo.max_epochs=1000000"]


class Running:
    """The jobs of a run, and what is to be gone afterwards."""

    def __init__(self, job, tmp: Path) -> None:
        self.job, self._tmp = job, tmp

    def wait_for(self, text: str) -> list[psutil.Process]:
        """Until ``text`` stands in the output; then all processes below the one that was started."""
        deadline = time.monotonic() + START_SECONDS
        while text not in self.job.out:
            assert self.job.process.poll() is None, self.told
            assert time.monotonic() < deadline, self.told
            time.sleep(0.1)
        return psutil.Process(self.job.process.pid).children(recursive=True)

    @property
    def told(self) -> str:
        return self.job.err[-2000:] + self.job.out[-6000:]

    def port_is_free(self) -> bool:
        (word,) = (w for w in self.job.err.split() if w.startswith("remote_critic_rm.critic.port="))
        with socket.socket() as probe:
            return probe.connect_ex(("127.0.0.1", int(word.partition("=")[2]))) != 0

    def temporary_files(self) -> list[str]:
        # torch keeps a folder of its own for compiled code.
        return sorted(path.name for path in self._tmp.iterdir() if not path.name.startswith("torchinductor"))


@pytest.fixture
def begin(start: Callable, words: list[str], short_tmp: Path) -> Callable[..., Running]:
    """Starts a run, with words that come after the toy run's own."""

    def begin(*more: str) -> Running:
        job = start([*words, *more], command=SCRIPT, env={"TMPDIR": str(short_tmp)})
        return Running(job, short_tmp)

    return begin


def alive(processes: list[psutil.Process]) -> list[psutil.Process]:
    return [p for p in processes if p.is_running() and p.status() != psutil.STATUS_ZOMBIE]


def shared_memory(processes: list[psutil.Process]) -> set[str]:
    """Files of shared memory that any of them has in use."""
    maps = [
        line.split()[-1] for p in processes for line in Path(f"/proc/{p.pid}/maps").read_text().splitlines()
    ]
    return {path for path in maps if path.startswith("/dev/shm/")}


def test_a_whole_run_with_the_reward_model_in_a_job_of_its_own(
    begin: Callable[..., Running], reward_nemo: Path, tmp_path: Path
):
    run = begin(f"reward.rm_model_file={reward_nemo}", "reward.trainer.precision=32")
    assert run.job.wait(timeout=200) == 0, run.told
    steps = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    assert [s["step"] for s in steps if "train_rollouts/rewards" in s] == [1, 2, 3]
    assert (tmp_path / "run/checkpoints/megatron_gpt_ppo_actor.nemo").is_file()
    assert (tmp_path / "run/critic/checkpoints/megatron_gpt_critic.nemo").is_file()
    for name in ("actor ", "critic", "reward"):
        assert f"{name} | " in run.job.out
    assert "serving at 127.0.0.1" in (tmp_path / "run/reward/output.log").read_text()
    assert "step 3/3" in (tmp_path / "run/output.log").read_text()
    assert "Traceback" not in run.job.out
    assert run.port_is_free()
    assert run.temporary_files() == []


def test_jobs_with_adapters_share_what_they_have_frozen(
    begin: Callable[..., Running], nemo: Path, tmp_path: Path
):
    (tmp_path / "rules.py").write_text("def length(*, response, **_):\n    return float(len(response))\n")
    lora = ("model.peft.peft_scheme=lora", "model.peft.lora_tuning.adapter_dim=4")
    apart = "combine_rm_and_critic_server=False"
    run = begin(
        *(f"{job}.{word}" for job in ("actor", "critic") for word in lora),
        f"critic.pretrained_checkpoint.restore_from_path={nemo}",
        f"critic.trainer.ppo.{apart}",
        f"actor.remote_critic_rm.{apart}",
        "actor.trainer.ppo.rewards.length.function=rules.length",
    )
    in_memory = {path for path in shared_memory(run.wait_for("step 1/")) if "weights" in path}
    assert run.job.wait(timeout=200) == 0, run.told
    assert in_memory
    assert not any(Path(path).parent.exists() for path in in_memory)
    found = re.findall(r"frozen weights: ([\d.]+) MiB, ([\d.]+) of them", run.job.out)
    (of_first, _), (_, of_second) = sorted(found, key=lambda sizes: float(sizes[1]))
    assert float(of_first) >= float(of_second) > 0.5 * float(of_first) > 0


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGHUP])
def test_ctrl_c_in_the_middle_leaves_nothing(begin: Callable[..., Running], number: signal.Signals):
    run = begin(*ENDLESS)
    processes = run.wait_for("step 1/")
    assert any("tritonserver" in process.name() for process in processes)
    shared = shared_memory(processes)
    assert shared
    began = time.monotonic()
    run.job.process.send_signal(number)
    assert run.job.wait(timeout=SECONDS_TO_END) == 128 + number
    assert time.monotonic() - began < SECONDS_TO_END
    assert alive(processes) == []
    assert run.port_is_free()
    assert run.temporary_files() == []
    assert [path for path in shared if Path(path).exists()] == []
    assert "Traceback" not in run.job.out


def test_sigterm_has_both_save_and_the_same_command_goes_on(begin: Callable[..., Running], tmp_path: Path):
    run = begin(*ENDLESS, "critic.trainer.devices=2")
    processes = run.wait_for("step 1/")
    run.job.process.send_signal(signal.SIGTERM)
    assert run.job.wait(timeout=60) == 75, run.told
    assert run.job.out.index("actor  | stopped after step") < run.job.out.index("critic | stopped after step")
    assert alive(processes) == []
    assert run.temporary_files() == []
    done = json.loads((tmp_path / "run/checkpoints/last/trainer_state.json").read_text())["step"]
    assert (tmp_path / "run/critic/checkpoints/last/trainer_state.json").is_file()
    again = begin("actor.trainer.ppo.max_epochs=1000000", f"actor.trainer.ppo.max_steps={done + 1}")
    assert again.job.wait(timeout=120) == 0, again.told
    assert f"resumed after step {done} of {done + 1}" in again.job.out


def test_a_critic_that_is_killed_ends_the_actor_which_saves(begin: Callable[..., Running], tmp_path: Path):
    run = begin(*ENDLESS)
    processes = run.wait_for("step 1/")
    (critic,) = (p for p in processes if any("serve_ppo_critic.py" in word for word in p.cmdline()))
    critic.kill()
    assert run.job.wait(timeout=60) == 128 + signal.SIGKILL, run.told
    assert "critic has ended with exit code 137; asked to save and end: actor" in run.job.err
    assert json.loads((tmp_path / "run/checkpoints/last/trainer_state.json").read_text())["step"] > 0
    assert alive(processes) == []
    assert run.temporary_files() == []


def test_a_job_that_cannot_start_ends_the_other(begin: Callable[..., Running]):
    run = begin("critic.pretrained_checkpoint.restore_from_path=missing.nemo")
    assert run.job.wait(timeout=60) == 2
    assert "critic | Fix: set pretrained_checkpoint.restore_from_path to a path that does" in run.job.out
    assert "critic has ended with exit code 2" in run.job.err
    assert run.temporary_files() == []


def test_words_for_no_job(start: Callable):
    job = start(["trainer.devices=2"], command=SCRIPT)
    assert job.wait() == 2
    assert "trainer.devices=2 does not name a job" in job.err
