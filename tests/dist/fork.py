# SPDX-License-Identifier: Apache-2.0
"""Several ranks for the price of one import: a script that forks itself, and how a test starts it."""

import gc
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

from nemo_aligner.parallel import cpu_shim

__all__ = ["fork_ranks", "run_script"]

# As the scripts do, before a worker's own imports.
cpu_shim.import_megatron()


def run_script(script: str, out: Path, *, ranks: int) -> None:
    """Run ``python script out ranks`` and fail with its last words if any rank failed."""
    log = out / "log.txt"
    with log.open("wb") as stream:
        done = subprocess.run(
            [sys.executable, script, str(out), str(ranks)],
            # Some virtual machines advertise AMX and die of it in the first bf16 matmul.
            env={"ONEDNN_MAX_CPU_ISA": "AVX512_CORE"}
            | os.environ
            | {"OMP_NUM_THREADS": "1", "MALLOC_TRIM_THRESHOLD_": str(1 << 34)},
            stdout=stream,
            stderr=stream,
            timeout=900,
            check=False,
        )
    assert done.returncode == 0, log.read_text()[-4000:]


def fork_ranks(run_rank: Callable[[int, int, Path], None]) -> None:
    """The main of such a script: ``run_rank(rank, number of ranks, out)`` in one child per rank."""
    out, size = Path(sys.argv[1]), int(sys.argv[2])
    children = []
    gc.collect()
    gc.freeze()  # collections in the children leave the shared pages alone
    for rank in range(size):
        if (pid := os.fork()) == 0:
            code = 1
            try:
                run_rank(rank, size, out)
                code = 0
            finally:
                if code:
                    sys.excepthook(*sys.exc_info())
                sys.stderr.flush()
                os._exit(code)
        children.append(pid)
    codes = [os.waitpid(pid, 0)[1] for pid in children]
    sys.exit(any(codes))
