# SPDX-License-Identifier: Apache-2.0
"""The heterogeneous job of PPO under Slurm: as NeMo-Aligner's tutorial prints it, and our own script.

Where no Slurm runs, NEMO_ALIGNER_SLURM_LOCAL names a script that starts one on this machine. Each job's script, output
and log files are gathered in results/slurm.
"""

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil
import pytest

ROOT = Path(__file__).parents[2]
PRINTED = Path(__file__).with_name("tutorial_hetjob.sub")  # the tutorial's, as it stands there
OWN = ROOT / "examples/nlp/gpt/slurm/ppo_hetjob.sub"
HOSTS = Path("/etc/hosts")
DAEMONS = ("slurmctld", "slurmd", "munged")
JOB_SECONDS = 400

pytestmark = [pytest.mark.slurm, pytest.mark.timeout(JOB_SECONDS + 100)]


def idle_nodes() -> list[str]:
    if shutil.which("sinfo") is None:
        return []
    found = subprocess.run(["sinfo", "-hN", "-t", "idle", "-o", "%N"], capture_output=True, text=True)
    return found.stdout.split()


def daemons() -> set[psutil.Process]:
    return {process for process in psutil.process_iter(["name"]) if process.info["name"] in DAEMONS}


@pytest.fixture(scope="module")
def cluster() -> Iterator[list[str]]:
    """Names of idle nodes; a Slurm that was started for it is ended."""
    if nodes := idle_nodes():
        yield nodes
        return
    starter = os.environ.get("NEMO_ALIGNER_SLURM_LOCAL")
    if not starter:
        pytest.skip(
            "no Slurm with idle nodes is here, and NEMO_ALIGNER_SLURM_LOCAL names no script that starts one"
        )
    missing = [
        name for name in ("sbatch", *DAEMONS) if shutil.which(name, path="/usr/sbin:/usr/bin:/sbin") is None
    ]
    if missing or os.getuid() != 0:
        pytest.skip(f"Slurm cannot be started: not root, or not installed: {', '.join(missing) or 'all is'}")
    before = daemons()
    try:
        subprocess.run(["bash", starter], check=True, stdin=subprocess.DEVNULL, timeout=60)
        nodes = idle_nodes()
        assert len(nodes) > 1, "Slurm was started and has too few idle nodes"
        yield nodes
    finally:
        started = daemons() - before
        for process in started:
            process.send_signal(signal.SIGTERM)
        psutil.wait_procs(started, timeout=15)


def resolves(name: str) -> bool:
    try:
        socket.gethostbyname(name)
    except OSError:
        return False
    return True


@contextmanager
def named(nodes: list[str], address: str) -> Iterator[None]:
    """Nodes of a Slurm on one machine have names that only Slurm knows; those of a real one are left as they are."""
    if all(map(resolves, nodes)):
        yield
        return
    known = HOSTS.read_text()
    HOSTS.write_text(known.rstrip("\n") + "\n" + "".join(f"{address} {node}\n" for node in nodes))
    try:
        assert {socket.gethostbyname(node) for node in nodes} == {address}
        yield
    finally:
        HOSTS.write_text(known)


def replaced(script: Path, changes: dict[str, str]) -> str:
    text = script.read_text()
    for old, new in changes.items():
        assert old in text, old
        text = text.replace(old, new)
    return text


def submit(text: str, folder: Path, name: str, **environ: str) -> int:
    """The job's exit code, once it has ended."""
    script, out = folder / f"{name}.sub", folder / f"{name}.out"
    script.write_text(text)
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    command = ["sbatch", "--wait", "-o", str(out), str(script)]
    began = time.monotonic()
    with subprocess.Popen(
        command,
        env=os.environ | {"PATH": path, "OMP_NUM_THREADS": "1", **environ},
        cwd=ROOT,
        stdout=subprocess.PIPE,
        text=True,
        stdin=subprocess.DEVNULL,
    ) as job:
        assert job.stdout is not None
        told = job.stdout.readline()
        try:
            code = job.wait(JOB_SECONDS)
        except subprocess.TimeoutExpired:
            subprocess.run(["scancel", told.split()[-1]], check=True)
            code = job.wait(60)
    log = [
        f"$ {' '.join(command)}\n{told}",
        text,
        f"\nexit code {code} after {time.monotonic() - began:.0f} s\n",
    ]
    for path in (out, *sorted(folder.rglob("*.err")), *sorted(folder.rglob("*_*.log"))):
        if path.stat().st_size:
            log.append(f"\n==> {path.relative_to(folder)}\n{path.read_text(errors='replace')}")
    (ROOT / "results/slurm").mkdir(parents=True, exist_ok=True)
    (ROOT / f"results/slurm/{name}.log").write_text("".join(log))
    return code


def steps(actor: Path) -> list[int]:
    lines = [json.loads(line) for line in (actor / "metrics.jsonl").read_text().splitlines()]
    return [line["step"] for line in lines if "train_rollouts/rewards" in line]


def test_the_tutorials_job(cluster: list[str], nemo: Path, reward_nemo: Path, prompts: Path, tmp_path: Path):
    toy = {
        "--ntasks-per-node 8 -A <<ACCOUNT>> -p <<PARTITION>> --job-name <<JOBNAME>>": "--ntasks-per-node 2",
        "/path/to/trained_rm.nemo": str(reward_nemo),
        "/path/to/sft_model.nemo": str(nemo),
        "/path/to/train_prompts.jsonl": str(prompts),
        "/path/to/test_prompts.jsonl": str(prompts),
        "/path/to/results_dir": str(tmp_path / "results"),
        "/path/to/nemo-aligner-repo": str(ROOT),
        'MOUNTS="--container-mounts=MOUNTS" # mounts\n': "",
        "CONTAINER=<<<CONTAINER>>> # use the latest NeMo Training container, Aligner will work there\n": "",
        "--container-image=${CONTAINER} $MOUNTS ": "",
        "create_wandb_logger=True": "create_wandb_logger=False",
        "trainer.devices=8": "trainer.devices=2",
        "sleep 30": "sleep 5",
        "max_steps=15": "max_steps=4",
        "num_rollout_samples=512": "num_rollout_samples=64",
        "max_length=1024": "max_length=16",
    }
    with named(cluster, "127.0.0.1"):
        assert submit(replaced(PRINTED, toy), tmp_path, "tutorial") == 0
    critic, actor = tmp_path / "results/critic_results", tmp_path / "results/actor_results"
    assert steps(actor) == [1, 2, 3, 4]
    assert (actor / "checkpoints/megatron_gpt_ppo_actor.nemo").is_file()
    assert (critic / "checkpoints/megatron_gpt_critic.nemo").is_file()
    for log in (next(critic.glob("*_0.err")), next(actor.glob("*_0.err"))):
        assert "2 rank(s) started by srun" in log.read_text()
    assert "serving at 127.0.0.1:5567" in (critic / "log.txt").read_text()


@pytest.fixture
def settings_of_own(nemo: Path, reward_nemo: Path, prompts: Path, tmp_path: Path) -> dict[str, str]:
    sizes = "trainer.precision=32 model.global_batch_size=8 model.micro_batch_size=4"
    rollouts = (
        "model.ppo.num_rollout_samples=16 model.ppo.num_val_samples=8 model.ppo.length_params.max_length=8"
    )
    return {
        "RM_NEMO_FILE": str(reward_nemo),
        "ACTOR_NEMO_FILE": str(nemo),
        "TRAIN_DATA": str(prompts),
        "VALID_DATA": str(prompts),
        "RESULTS_DIR": str(tmp_path / "results"),
        "REPO": str(ROOT),
        "HOME": str(tmp_path),
        "CRITIC_ARGS": sizes,
        "ACTOR_ARGS": f"{sizes} {rollouts} trainer.ppo.max_steps=3 trainer.ppo.val_check_interval=2",
    }


OWN_SIZE = {"--ntasks-per-node 8 -A ACCOUNT -p PARTITION": "--ntasks-per-node 2"}


def test_our_own_job(cluster: list[str], settings_of_own: dict[str, str], tmp_path: Path):
    # Not at 127.0.0.1, where no token is asked.
    with named(cluster, "127.0.0.2"):
        assert submit(replaced(OWN, OWN_SIZE), tmp_path, "own", **settings_of_own) == 0
    critic, actor = tmp_path / "results/critic_results", tmp_path / "results/actor_results"
    assert steps(actor) == [1, 2, 3]
    assert (critic / "checkpoints/megatron_gpt_critic.nemo").is_file()
    assert f"callers show the token of {tmp_path}/.nemo_aligner/" in (critic / "log.txt").read_text()
    assert list((tmp_path / ".nemo_aligner").iterdir()) == []
    assert "exit codes: actor 0, critic 0" in (tmp_path / "own.out").read_text()


def test_one_jobs_bad_end_is_the_others_end(
    cluster: list[str], settings_of_own: dict[str, str], tmp_path: Path
):
    missing = settings_of_own | {"ACTOR_NEMO_FILE": str(tmp_path / "missing.nemo")}
    with named(cluster, "127.0.0.1"):
        assert submit(replaced(OWN, OWN_SIZE), tmp_path, "bad_end", **missing) not in (0, -signal.SIGTERM)
    told = (tmp_path / "bad_end.out").read_text()
    assert "the actor has ended with exit code" in told
    assert "the critic is asked to save and end" in told
    (log,) = (tmp_path / "results/actor_results").glob("error_*_0.log")
    assert "missing.nemo does not exist" in log.read_text()
