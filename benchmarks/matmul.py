# SPDX-License-Identifier: Apache-2.0
"""How many fp32 operations a second a large matrix product reaches here: the yardstick of the other parts."""

import time

import torch

from benchmarks.processes import THREADS, measure

__all__ = ["peak"]

SIZE = 2048
ROUNDS = 20


def peak() -> float:
    """GFLOP/s of the fastest of several products, in a process of its own."""
    return float(measure(["-m", "benchmarks.matmul"]).split()[-1])


def main() -> None:
    """Print GFLOP/s."""
    torch.set_num_threads(THREADS)
    left, right = torch.randn(SIZE, SIZE), torch.randn(SIZE, SIZE)
    out = left @ right
    seconds = []
    for _ in range(ROUNDS):
        started = time.perf_counter()
        torch.mm(left, right, out=out)
        seconds.append(time.perf_counter() - started)
    print(2 * SIZE**3 / min(seconds) / 1e9)


if __name__ == "__main__":
    main()
