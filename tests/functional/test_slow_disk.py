# SPDX-License-Identifier: Apache-2.0
"""Packing and unpacking a .nemo, which one rank does while others wait, may take longer than a collective may."""

import os
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).parents[2]
TIMEOUT_SECONDS = 12
# A disk on which the weights of an archive take longer than that, to read and to write.
SLOW_TAR = f"""
import tarfile, time

def slow(method):
    def slowed(self, member, *args, **options):
        if member.name.endswith(".distcp"):
            time.sleep({TIMEOUT_SECONDS + 4})
        return method(self, member, *args, **options)
    return slowed

tarfile.TarFile.addfile = slow(tarfile.TarFile.addfile)
tarfile.TarFile.extractfile = slow(tarfile.TarFile.extractfile)
"""


def test_a_save_slower_than_the_collective_timeout_ends_well(
    start: Callable, settings: dict[str, object], tmp_path: Path
):
    (tmp_path / "slow").mkdir()
    (tmp_path / "slow/sitecustomize.py").write_text(SLOW_TAR)
    job = start(
        settings | {"trainer.devices": 2, "trainer.collective_timeout": TIMEOUT_SECONDS},
        env={"PYTHONPATH": os.pathsep.join([str(tmp_path / "slow"), str(ROOT)])},
    )
    assert job.wait(timeout=240) == 0, job.err
    assert f"collective time-out {TIMEOUT_SECONDS} s" in job.err
    assert (tmp_path / "run/checkpoints/megatron_gpt_sft.nemo").is_file()
