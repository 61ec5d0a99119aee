# SPDX-License-Identifier: Apache-2.0
"""The jobs of a PPO run on one machine, from one command line: whose word is whose, and what they must agree on."""

import re
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from nemo_aligner.errors import UserError
from nemo_aligner.launch.job_group import LOCAL, Program, free_ports
from nemo_aligner.launch.typed import is_quoted
from nemo_aligner.launch.words import full_words
from nemo_aligner.paths import expand_home
from nemo_aligner.run.experiment import ExperimentConfig

SCRIPTS = {
    "actor": "train_gpt_ppo_actor.py",
    "critic": "serve_ppo_critic.py",
    "reward": "serve_reward_model.py",
}
OUTPUT = "output.log"
_WORD = re.compile(
    r"(?P<sign>\+\+|\+|~)?(?P<job>actor|critic|reward)\.(?P<key>[^=]+)(?P<value>=.*)?", re.DOTALL
)
_VARIABLE = re.compile(r"[A-Z][A-Z0-9_]*")


@dataclass(kw_only=True)
class _Words:
    """The words of the command line for one job."""

    settings: list[str]
    given: dict[str, str]  # the settings' last values, without quotes
    environ: dict[str, str]

    def add(self, key: str, value: object) -> None:
        self.settings.append(f"{key}={value}")
        self.given[key] = str(value)


def plan_jobs(words: Sequence[str], scripts: Path) -> tuple[Program, list[Program]]:
    """The actor, and the servers beside it.

    Args:
        words: such as ``critic.KEY=VALUE``, each for the job that it names; a key in capitals, without dots, is an
            environment variable of that job.
        scripts: the folder of the jobs' scripts.

    Raises:
        UserError: a word names no job, or two words contradict each other.
    """
    jobs = {name: _Words(settings=[], given={}, environ={}) for name in SCRIPTS}
    for word in words:
        _sort(word, jobs)
    reward = bool(jobs["reward"].given)
    if reward and "rm_model_file" not in jobs["reward"].given:
        raise UserError(
            "there are words for the reward model's job, but not which model it serves",
            fix="add reward.rm_model_file=FILE, or leave the reward model to the critic's job",
        )
    if not reward:
        del jobs["reward"]
    _agree(jobs)
    folders = _folders(jobs)
    addresses = {"critic": _address(jobs["actor"], "critic")}
    if reward:
        addresses["reward"] = _address(jobs["actor"], "reward_model")
    programs = {
        name: Program(
            name=name,
            command=[sys.executable, "-u", str(scripts / SCRIPTS[name]), *job.settings],
            log=folders[name] / OUTPUT,
            environ=job.environ,
            address=addresses.get(name),
        )
        for name, job in jobs.items()
    }
    return programs.pop("actor"), list(programs.values())


def words_of_jobs(words: Sequence[str], kind_of: Callable[[str], type[object]]) -> list[str]:
    """Words of full keys, each with its job, of short names and files; what names no job is the actor's.

    Args:
        words: ``reward_model=FILE`` is the reward model that the critic starts from, and serves.
        kind_of: the settings of a script in the folder.

    Raises:
        UserError: a short name is mistyped.
    """
    given: dict[str, list[str]] = {name: [] for name in SCRIPTS}
    for word in words:
        found = _WORD.fullmatch(word)
        if word.startswith("reward_model="):
            given["critic"].append(word.removeprefix("reward_"))
        elif found:
            given[found["job"]].append(f"{found['sign'] or ''}{found['key']}{found['value'] or ''}")
        else:
            given["actor"].append(word)
    return [
        re.sub(r"^(\+{0,2}|~)", rf"\g<1>{name}.", word)
        for name, own in given.items()
        for word in full_words(own, kind_of(SCRIPTS[name]))
    ]


def _sort(word: str, jobs: Mapping[str, _Words]) -> None:
    found = _WORD.fullmatch(word)
    if found is None:
        raise UserError(
            f"{word} does not name a job",
            fix="begin each word with its job's name, as in actor.trainer.devices=2 or critic.trainer.devices=2",
        )
    job, key, value = jobs[found["job"]], found["key"], (found["value"] or "").removeprefix("=")
    if _VARIABLE.fullmatch(key):
        job.environ[key] = value
        return
    job.settings.append(f"{found['sign'] or ''}{key}{found['value'] or ''}")
    job.given[key] = value[1:-1] if is_quoted(value) else value


def _agree(jobs: Mapping[str, _Words]) -> None:
    """Give both sides of each pair of settings the same value: the one that either has, else one that works."""
    actor = jobs["actor"]
    servers = {"critic": ("trainer.ppo", "critic"), "reward": ("inference", "reward_model")}
    for name, port in zip(servers, free_ports(len(servers)), strict=True):
        if name in jobs:
            block, remote = servers[name]
            _pair(jobs[name], f"{block}.ip", actor, f"remote_critic_rm.{remote}.ip", LOCAL)
            _pair(jobs[name], f"{block}.port", actor, f"remote_critic_rm.{remote}.port", str(port), same=name)
    combine = "combine_rm_and_critic_server"
    apart = "False" if "reward" in jobs else None
    _pair(
        jobs["critic"], f"trainer.ppo.{combine}", actor, f"remote_critic_rm.{combine}", apart, same="critic"
    )
    if "reward" in jobs:
        if actor.given[f"remote_critic_rm.{combine}"].lower() == "true":
            raise UserError(
                f"{combine}=True, but reward.rm_model_file asks for a job for the reward model alone",
                fix=f"leave out {combine} or the words that begin with reward.",
            )
        actor.add("remote_critic_rm.reward_model.stop_at_end", True)


def _pair(
    server: _Words, key: str, actor: _Words, actors_key: str, default: str | None, *, same: str | None = None
) -> None:
    """Args: same: the server's name, where two different values are a mistake."""
    left, right = server.given.get(key), actor.given.get(actors_key)
    if left is not None and right is not None:
        if same is not None and left.lower() != right.lower():
            raise UserError(
                f"{same}.{key}={left} and actor.{actors_key}={right} are to be one value",
                fix=f"leave one of them out, or set both to {left}",
            )
        return
    value = left or right or default
    if value is not None and left is None:
        server.add(key, value)
    if value is not None and right is None:
        actor.add(actors_key, value)


def _address(actor: _Words, remote: str) -> tuple[str, int]:
    block, port = f"remote_critic_rm.{remote}", actor.given[f"remote_critic_rm.{remote}.port"]
    if not port.isdecimal():
        raise UserError(f"actor.{block}.port={port} is no port", fix=f"leave out actor.{block}.port")
    return actor.given[f"{block}.ip"], int(port)


def _folders(jobs: Mapping[str, _Words]) -> dict[str, Path]:
    """Each job's folder: the one that is set, the actor's else one of its own, the servers' else within the actor's."""
    key, folders = "exp_manager.explicit_log_dir", dict[str, Path]()
    for name, job in jobs.items():
        if name != "reward" and key not in job.given:
            base = job.given.get("exp_manager.exp_dir")
            own = folders["actor"] / name if folders else ExperimentConfig(exp_dir=base, name="ppo").folder()
            job.add(key, own)
        folders[name] = Path(expand_home(job.given[key])) if name != "reward" else folders["actor"] / name
    return folders
