# SPDX-License-Identifier: Apache-2.0
"""The common part of every training script: Hydra, typed settings, ranks, and the report of errors."""

import functools
import gc
import inspect
import logging
import os
import signal
import sys
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any, Generic, TypeVar

import hydra
from hydra.errors import HydraException, OverrideParseException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from nemo_aligner.config.base import ModelJob
from nemo_aligner.errors import UserError
from nemo_aligner.launch import amx, local
from nemo_aligner.launch.cli import INTERRUPTED_CODE, OS_ERROR_FIX, USER_ERROR_CODE, quiet_libraries
from nemo_aligner.launch.stacks import show_stacks_on_signal
from nemo_aligner.launch.subprocesses import STARTER_VARIABLE, follow_parent
from nemo_aligner.launch.typed import as_hydra_reads
from nemo_aligner.parallel.ranks import Ranks, discover, speaks
from nemo_aligner.run.experiment import keep_early_records
from nemo_aligner.run.stop import STOP_SIGNALS, StoppedEarly, Terminated

logger = logging.getLogger(__name__)


J = TypeVar("J", bound=ModelJob)


@dataclass(frozen=True, kw_only=True)
class Script(Generic[J]):
    """A script's main; called, it runs the command line."""

    main: Callable[[J], None]
    config_name: str
    kind: type[J]  # the job's dataclass

    @property
    def file(self) -> Path:
        """The script."""
        return Path(inspect.getfile(self.main)).resolve()

    def __call__(self) -> None:
        """Run as ``sys.argv`` says."""
        # Imports make millions of objects that stay: looking for garbage among them takes a fifth of a start.
        gc.disable()
        ranks = discover()
        _prepare_process(ranks)

        def task(config: DictConfig) -> None:
            _run(config, self, ranks)

        # So set, Hydra raises what it finds wrong and does not print it its own way.
        os.environ["HYDRA_FULL_ERROR"] = "1"
        conf = str(self.file.parent / "conf")
        try:
            sys.argv[1:] = as_hydra_reads(sys.argv[1:], self.kind)
            hydra.main(version_base="1.3", config_path=conf, config_name=self.config_name)(task)()
        except (UserError, HydraException, OmegaConfBaseException) as error:
            if speaks(ranks):
                problem = error if isinstance(error, UserError) else _hydra_problem(error)
                sys.stderr.write(f"error: {problem}\n")
            sys.exit(USER_ERROR_CODE)


def script(config_name: str, kind: type[J]) -> Callable[[Callable[[J], None]], Script[J]]:
    """Make a script's main out of a function of its job.

    The function runs on every rank, in a world that stands and is cut as the settings say. A :class:`UserError`
    anywhere is printed once, by one rank, without a traceback; the exit code is then 2.

    Args:
        config_name: the YAML in the conf folder beside the script.
        kind: the job's dataclass.
    """
    return lambda main: Script(main=main, config_name=config_name, kind=kind)


def compose(script: Script[Any], words: Sequence[str]) -> dict[str, Any]:
    """The settings of a script as the words make them, interpolations as they are.

    Raises:
        UserError: they cannot be composed, or have unknown keys.
    """
    from nemo_aligner.settings import refuse_unknown

    try:
        with hydra.initialize_config_dir(str(script.file.parent / "conf"), version_base="1.3"):
            config = hydra.compose(script.config_name, as_hydra_reads(words, script.kind))
    except (HydraException, OmegaConfBaseException) as error:
        raise _hydra_problem(error) from error
    values: Any = OmegaConf.to_container(config)
    refuse_unknown(values, script.kind)
    return values


def _hydra_problem(error: Exception) -> UserError:
    """The error for a config that Hydra cannot compose, in one line, with its fix."""
    line = str(error).splitlines()[0]
    if isinstance(error, OverrideParseException):
        word = error.override.removeprefix("++")
        return UserError(
            f"{word} is no setting: {line}",
            fix="""write KEY=VALUE; where VALUE has spaces, quotes, [ ] or { }, as 'KEY="VALUE"'""",
        )
    return UserError(line, fix="correct what it names; --cfg job prints the configuration as it is composed")


def _prepare_process(ranks: Ranks | None) -> None:
    show_stacks_on_signal()
    if ranks is not None and ranks.starter == "local":
        follow_parent(signal.SIGKILL)
    elif ranks is None and STARTER_VARIABLE in os.environ:
        follow_parent(signal.SIGTERM)  # which has it save first
    talks = speaks(ranks)
    logging.basicConfig(
        level=logging.INFO if talks else logging.WARNING,
        format="[%(asctime)s] %(message)s",
        datefmt="%H:%M:%S",
    )
    if talks:
        keep_early_records()
    quiet_libraries(logging.WARNING if talks else logging.ERROR)


def _terminate(number: int, _: object) -> None:
    raise Terminated(number)


def _signals() -> tuple[signal.Signals, ...]:
    """Those that end this process: not SIGINT where a shell has put a job that ignores it into the background."""
    ignored = signal.getsignal(signal.SIGINT) is signal.SIG_IGN
    return STOP_SIGNALS if ignored else (signal.SIGINT, *STOP_SIGNALS)


def _run(config: DictConfig, script: Script[J], ranks: Ranks | None) -> None:
    def leave(number: int, _: object) -> None:
        if speaks(ranks):
            name = signal.Signals(number).name
            os.write(sys.stderr.fileno(), f"stopped by {name}, before anything was done\n".encode())
        os._exit(128 + number)

    # Nothing has to be unwound so far, and some imports swallow every exception.
    for number in _signals():
        signal.signal(number, leave)
    try:
        code = _start(config, script, ranks)
    except (KeyboardInterrupt, Terminated) as stop:
        code = INTERRUPTED_CODE if isinstance(stop, KeyboardInterrupt) else 128 + stop.signal
        if speaks(ranks):
            name = "Ctrl-C" if isinstance(stop, KeyboardInterrupt) else stop.signal.name
            sys.stderr.write(f"stopped by {name}; nothing was saved for it\n")
    if code:
        # Without the group's farewell, which would wait for ranks that may be gone.
        sys.stdout.flush()
        sys.stderr.flush()
        logging.shutdown()
        os._exit(code)


def _starts_on_its_node(job: ModelJob, ranks: Ranks | None) -> bool:
    """True for srun's only task on each of several nodes, which starts the node's ranks: --ntasks-per-node=1."""
    nodes, devices = job.trainer.num_nodes, job.trainer.devices
    if ranks is None or ranks.starter != "srun" or ranks.local_size != 1:
        return False
    return devices > 1 and nodes > 1 and ranks.world_size == nodes


def _start(config: DictConfig, script: Script[J], ranks: Ranks | None) -> int:
    """Settings first, before torch and Megatron are imported: a mistake there is reported at once."""
    from nemo_aligner.settings import parse

    try:
        job = parse(config, script.kind)
        starts = _starts_on_its_node(job, ranks)
        job.check(ranks.world_size if ranks and not starts else None)
        if ranks is None:
            job.check_paths()
            if job.trainer.num_nodes > 1:
                ranks_in_all = job.trainer.num_nodes * job.trainer.devices
                raise UserError(
                    f"trainer.num_nodes={job.trainer.num_nodes}, but this machine can start its own ranks only",
                    fix="start the script on every node with srun or torchrun, or have all ranks on this machine: "
                    f"trainer.num_nodes=1 trainer.devices={ranks_in_all}",
                )
    except UserError as error:
        if speaks(ranks):
            sys.stderr.write(f"error: {error}\n")
        return USER_ERROR_CODE
    if starts or (ranks is None and job.trainer.devices > 1):
        gc.enable()
        return local.start_ranks(job.trainer.devices, node=ranks)
    instructions = amx.decide()
    if speaks(ranks):
        # Torch takes seconds, and a person should not wait for a sign of life.
        logger.info("%s: the settings are read; torch is loaded next", script.file.name)
        if instructions:
            logger.info("%s", instructions)
    return _reported(functools.partial(_join, config, job, script.main, ranks))


def _join(config: DictConfig, job: J, main: Callable[[J], None], ranks: Ranks | None) -> int:
    from nemo_aligner.parallel import world
    from nemo_aligner.run.progress import heartbeat
    from nemo_aligner.settings import log_no_effect

    for number in _signals():
        signal.signal(number, signal.default_int_handler if number == signal.SIGINT else _terminate)
    timeout = timedelta(seconds=job.trainer.collective_timeout)
    with heartbeat("waiting for all ranks", enabled=ranks is not None and ranks.rank == 0):
        world.start(ranks, layout=job.model.layout, seed=job.model.seed, timeout=timeout)
    if world.is_logging_rank():
        log_no_effect(config, type(job))
    gc.freeze()
    gc.enable()
    main(job)
    world.stop()
    return 0


def _reported(work: Callable[[], int]) -> int:
    """The exit code of ``work``; errors are reported once."""
    from nemo_aligner.parallel import cpu_shim

    cpu_shim.import_megatron()
    from nemo_aligner.parallel import world

    try:
        return work()
    except StoppedEarly as stop:
        if world.is_logging_rank():
            sys.stderr.write(f"{stop}\n")
        return stop.exit_code
    except UserError as error:
        if world.report_once():
            sys.stderr.write(f"error: {error}\n")
        return USER_ERROR_CODE
    except Exception as error:  # the process edge: whatever it is, it is reported and ends this rank
        if isinstance(error, OSError) and error.filename is not None:
            if world.report_once():
                sys.stderr.write(f"error: {error}\nFix: {OS_ERROR_FIX}\n")
            return USER_ERROR_CODE
        if reason := world.describe_failure(error):
            # Silent where a rank has reported already why it left the others.
            if world.report_once(wait_seconds=0.0):
                sys.stderr.write(f"A collective failed on {reason}\n")
        else:
            sys.stderr.write(f"rank {world.rank()}:\n{traceback.format_exc()}")
        return 1
