# SPDX-License-Identifier: Apache-2.0
"""With several workers: a line for each file of tests as its worker ends it, in the place of the dots of all files."""

import signal
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field

import pytest

# Their assertions show exit codes and values, as those of tests do.
pytest.register_assert_rewrite("tests.functional.ppo_pair", "tests.functional.run_folder")


@dataclass
class _File:
    """What a worker has reported of the file that it runs."""

    name: str
    seconds: float = 0.0
    outcomes: Counter[str] = field(default_factory=Counter)

    def __str__(self) -> str:
        outcomes = ", ".join(f"{count} {outcome}" for outcome, count in sorted(self.outcomes.items()))
        return f"{self.name}: {outcomes} in {self.seconds:.1f} s"


class _FileLines:
    """Hears of every test; xdist's ``--dist loadfile`` gives a worker one file at a time."""

    def __init__(self, terminal: pytest.TerminalReporter) -> None:
        self._terminal = terminal
        self._files: dict[str, _File] = {}

    @pytest.hookimpl(wrapper=True)
    def pytest_report_teststatus(self) -> Iterator[None]:
        """Take the letter from what is reported as it was before."""
        status = yield
        return None if status is None else (status[0], "", status[2])

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        """Count a test; the first of another file ends the one before."""
        worker, name = report.worker_id, report.nodeid.split("::")[0]
        file = self._files.get(worker)
        if file is None or file.name != name:
            self._end(worker)
            file = self._files[worker] = _File(name)
        file.seconds += report.duration
        if report.when == "call" or report.outcome != "passed":
            file.outcomes[report.outcome] += 1
        if report.failed:
            self._terminal.write_line(f"FAILED {report.nodeid} ({report.when})", red=True)

    def pytest_sessionfinish(self) -> None:
        """End the files that are left."""
        for worker in list(self._files):
            self._end(worker)

    def _end(self, worker: str) -> None:
        if worker in self._files:
            self._terminal.write_line(str(self._files.pop(worker)))


@pytest.hookimpl(trylast=True)
def pytest_configure(config: pytest.Config) -> None:
    """Where tests go to workers, their starter hears of all of them; a worker has no terminal.

    Who runs tests imports Megatron as the scripts do.
    """
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        # As in a shell's background; the scripts that tests start hear Ctrl-C all the same.
        signal.signal(signal.SIGINT, signal.default_int_handler)
    terminal = config.pluginmanager.getplugin("terminalreporter")
    if config.getoption("numprocesses", None) and terminal is not None:
        config.pluginmanager.register(_FileLines(terminal))
    else:
        from nemo_aligner.parallel import cpu_shim

        cpu_shim.import_megatron()
