# SPDX-License-Identifier: Apache-2.0
"""A process that has imported what all scripts import, and starts a script as a copy of itself.

A script and its ranks take their own time then, without the seconds of imports that are most of a toy run. Words,
environment, folder, output, session and signals are those that a fresh interpreter would have; what modules have
cached is not. test_slow_disk.py, test_seed_commands.py and test_command.py start fresh interpreters.
"""

import atexit
import faulthandler
import gc
import importlib
import inspect
import json
import logging.handlers
import os
import runpy
import select
import signal
import socket
import subprocess
import sys
import tempfile
import traceback
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from hydra.core.global_hydra import GlobalHydra

from nemo_aligner.launch.stacks import STACKS_SIGNAL

ROOT = Path(__file__).parents[2]
IMPORTED = (
    "nemo_aligner.api",
    "nemo_aligner.builders.actor",
    "nemo_aligner.builders.servers",
    "nemo_aligner.launch.script",
    "torch.utils.tensorboard",
    "transformers.models.auto.tokenization_auto",
)
MOST_BYTES = 1 << 18  # of what is sent to the zygote


class Copied:
    """A script that the zygote has started, as much of it as tests use of Popen."""

    def __init__(self, pid: int, end: socket.socket) -> None:
        self.pid = pid
        self.returncode: int | None = None
        self._end = end

    def poll(self) -> int | None:
        """The exit code, None while it runs."""
        return self._ended(within=0)

    def wait(self, timeout: float | None = None) -> int:
        """The exit code, once it has ended."""
        code = self._ended(within=timeout)
        if code is None:
            raise subprocess.TimeoutExpired(f"process {self.pid}", timeout or 0)
        return code

    def _ended(self, *, within: float | None) -> int | None:
        if self.returncode is None and select.select([self._end], [], [], within)[0]:
            self.returncode = _number(self._end)
            self._end.close()
        return self.returncode

    def send_signal(self, number: int) -> None:
        """Send a signal, if it runs."""
        if self.poll() is None:
            os.kill(self.pid, number)

    def kill(self) -> None:
        """Send SIGKILL."""
        self.send_signal(signal.SIGKILL)

    def terminate(self) -> None:
        """Send SIGTERM."""
        self.send_signal(signal.SIGTERM)


def _number(source: socket.socket) -> int:
    """A process id or an exit code, one message each."""
    if not (message := source.recv(16)):
        raise RuntimeError("the zygote has ended")
    return int(message)


@dataclass(frozen=True, kw_only=True)
class Command:
    """``python *words``, as it is to run."""

    words: list[str]
    cwd: str
    env: dict[str, str]
    output: list[str]  # files of stdout and stderr; []: those of the process that it is a copy of


class Zygote:
    """The process, until it is closed."""

    def __init__(self) -> None:
        self._socket, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._process = subprocess.Popen(
            [sys.executable, __file__, str(theirs.fileno())],
            pass_fds=[theirs.fileno()],
            env=os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"},
            stdin=subprocess.DEVNULL,
        )
        theirs.close()

    def start(
        self, words: Sequence[str], *, cwd: Path, env: Mapping[str, str], stdout: Path, stderr: Path
    ) -> Copied:
        """Start ``python *words``."""
        stdout.touch()
        stderr.touch()
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        command = Command(words=[*words], cwd=str(cwd), env={**env}, output=[str(stdout), str(stderr)])
        socket.send_fds(self._socket, [json.dumps(asdict(command)).encode()], [theirs.fileno()])
        theirs.close()
        return Copied(_number(ours), ours)

    def close(self) -> None:
        """End it."""
        self._socket.close()
        self._process.wait()


def serve(requests: socket.socket) -> Command:
    """Copy this process for each command until there are no more; returns in each copy, with its command."""
    running: dict[int, socket.socket] = {}
    while True:
        if select.select([requests], [], [], 0.02)[0]:
            message, descriptors, _, _ = socket.recv_fds(requests, MOST_BYTES, 1)
            if not message:
                sys.exit()
            end = socket.socket(fileno=descriptors[0])
            pid = os.fork()
            if pid == 0:
                for one in (requests, end, *running.values()):
                    one.close()
                return Command(**json.loads(message))
            end.send(str(pid).encode())
            running[pid] = end
        while running and (ended := os.waitpid(-1, os.WNOHANG))[0]:
            with running.pop(ended[0]) as end:
                end.send(str(os.waitstatus_to_exitcode(ended[1])).encode())


class OwnCommandCopied(subprocess.Popen):
    """A Popen that makes ranks, which run the command of the process that starts them, as copies of it."""

    # The one seam: launch/local.py has none, as a fresh interpreter is what users need.
    def _execute_child(self, *args: Any, **options: Any) -> None:
        asked = inspect.signature(super()._execute_child).bind(*args, **options).arguments
        if asked["args"] != sys.orig_argv:
            super()._execute_child(*args, **options)
            return
        assert asked["c2pwrite"] == asked["errwrite"] == -1, "ranks write where their starter does"
        command = Command(
            words=asked["args"][1:], cwd=asked["cwd"] or os.getcwd(), env=asked["env"], output=[]
        )
        sys.stdout.flush()
        sys.stderr.flush()
        self._child_created = True
        self.pid = os.fork()
        if self.pid:
            return
        code: object = 1
        try:
            _forget()
            become(command)
            code = 0
        except SystemExit as end:
            code = end.code
        except KeyboardInterrupt:
            signal.signal(signal.SIGINT, signal.SIG_DFL)
            os.kill(os.getpid(), signal.SIGINT)
        except BaseException:
            traceback.print_exc()
        finally:
            # Nothing of the starter may be unwound here, which still stands on the stack.
            atexit._run_exitfuncs()
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(code if isinstance(code, int) else int(code is not None))


def _forget() -> None:
    """Undo what the starter of this copy has set, as exec would."""
    GlobalHydra.instance().clear()
    for handler in (root := logging.getLogger()).handlers[:]:
        if isinstance(handler, logging.handlers.BufferingHandler):
            handler.buffer.clear()
        root.removeHandler(handler)
    root.setLevel(logging.WARNING)
    faulthandler.unregister(STACKS_SIGNAL)
    for number in signal.valid_signals():
        if callable(signal.getsignal(number)):
            signal.signal(number, signal.SIG_DFL)
    if signal.getsignal(signal.SIGINT) is signal.SIG_DFL:
        signal.signal(signal.SIGINT, signal.default_int_handler)


def become(command: Command) -> None:
    """Be the command, in a session of its own."""
    os.setsid()
    os.chdir(command.cwd)
    os.environ.clear()
    os.environ.update(command.env)
    tempfile.tempdir = None  # what some import has found
    for number, path in enumerate(command.output, start=1):
        file = os.open(path, os.O_WRONLY)
        os.dup2(file, number)
        os.close(file)
    words = command.words
    sys.orig_argv = [sys.executable, *words]
    if words[0] == "-m":
        sys.argv, sys.path[0] = words[1:], command.cwd
        runpy.run_module(words[1], run_name="__main__", alter_sys=True)
    else:
        sys.argv, sys.path[0] = words, str(Path(words[0]).resolve().parent)
        runpy.run_path(words[0], run_name="__main__")


if __name__ == "__main__":
    from nemo_aligner.parallel import cpu_shim

    cpu_shim.import_megatron()
    for module in IMPORTED:
        importlib.import_module(module)
    # A copy shares the pages of what is imported as long as no collector counts it.
    gc.disable()
    gc.freeze()
    subprocess.Popen = OwnCommandCopied
    become(serve(socket.socket(fileno=int(sys.argv[1]))))
