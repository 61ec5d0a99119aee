# SPDX-License-Identifier: Apache-2.0
"""Measure one part or all of them, print a line per figure, write results.json and docs/performance.md.

    python -m benchmarks.run [part ...]

`make bench` calls it after installing what the parts need; `make bench ONLY=sft` measures one part.
"""

import argparse
import time
from collections.abc import Callable
from pathlib import Path

from benchmarks import (
    chunked_head,
    dpo,
    figures,
    first_step,
    generation,
    lora,
    lora_dpo,
    ppo,
    preference_accuracy,
    reward_accuracy,
    reward_model,
    serving,
    sft,
)
from benchmarks.processes import wait_for_calm

RESULTS = Path(__file__).parent / "results.json"
PAGE = Path(__file__).parents[1] / "docs/performance.md"

# In the order of the page. A part measures in processes of its own and returns figures.
PARTS: dict[str, Callable[[], figures.Part]] = {
    "sft": sft.part,
    "lora": lora.part,
    "first_step": first_step.part,
    "rm": reward_model.part,
    "dpo": dpo.part,
    "lora_dpo": lora_dpo.part,
    "head": chunked_head.part,
    "generate": generation.part,
    "ppo": ppo.part,
    "server": serving.part,
    "hh": reward_accuracy.part,
    "hh_dpo": preference_accuracy.part,
}
BY_NAME_ONLY = {"hh", "hh_dpo"}  # take an hour each, and data of their own
UNTIMED = {"hh", "hh_dpo"}  # nothing that the machine's other work could change


def main() -> None:
    """Measure the parts that are named, or all."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "parts", nargs="*", metavar="part", help=f"{', '.join(PARTS)} [all but {', '.join(BY_NAME_ONLY)}]"
    )
    names = parser.parse_args().parts or [name for name in PARTS if name not in BY_NAME_ONLY]
    if unknown := [name for name in names if name not in PARTS]:
        parser.error(f"no part is named {', '.join(unknown)}; there are {', '.join(PARTS)}")
    for name in names:
        started, calm = time.perf_counter(), None if name in UNTIMED else wait_for_calm()
        part = PARTS[name]()
        if calm is not None:
            part.conditions["load average before the start"] = f"{calm:.2f}"
        for figure in part.figures:
            print(f"{name}: {figure.line()}")
        PAGE.write_text(figures.page(figures.store(RESULTS, name, part), PARTS))
        print(f"{name}: {time.perf_counter() - started:.0f} s, written to {RESULTS} and {PAGE}", flush=True)


if __name__ == "__main__":
    main()
