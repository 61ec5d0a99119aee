# SPDX-License-Identifier: Apache-2.0
"""A process shows the stacks of its threads when asked, and goes on."""

import signal
import subprocess
import sys

from nemo_aligner.launch.stacks import forward_stacks_request

WAITS = """
import sys, threading
from nemo_aligner.launch.stacks import show_stacks_on_signal
show_stacks_on_signal()
def a_thread_that_waits(): threading.Event().wait()
threading.Thread(target=a_thread_that_waits, daemon=True).start()
print("ready", flush=True)
sys.stdin.readline()
"""


def test_all_threads_of_all_children_are_shown_and_they_go_on(capfd):
    children = []
    for name in ("rank 0", "rank 1"):
        child = subprocess.Popen(
            [sys.executable, "-c", WAITS], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        assert child.stdout is not None
        assert child.stdout.readline() == "ready\n"
        children.append((name, child))
    forward_stacks_request(children)(signal.SIGUSR2, None)
    for _, child in children:
        child.communicate("end\n", timeout=60)
        assert child.returncode == 0
    err = capfd.readouterr().err
    assert err.count("a_thread_that_waits") == 2
    assert err.count("most recent call first") >= 4
    assert err.index("the stacks of rank 0") < err.index("the stacks of rank 1")
