# SPDX-License-Identifier: Apache-2.0
"""What fails for want of room is told as that, and nothing else is."""

import errno
import os
from pathlib import Path

import pytest

from nemo_aligner.errors import UserError
from nemo_aligner.run.disk import check_room, free_bytes, report_if_full


def test_room_is_compared_with_what_the_disk_has(tmp_path: Path):
    disk = os.statvfs(tmp_path)
    assert free_bytes(tmp_path / "not/there") == pytest.approx(disk.f_bavail * disk.f_frsize, rel=0.1)
    check_room(tmp_path, 1, "x")
    with pytest.raises(
        UserError, match=rf"the disk of {tmp_path} has no room: x needs {10**18} bytes .* are free"
    ):
        check_room(tmp_path, 10**18, "x")


@pytest.mark.parametrize(
    "error",
    [
        OSError(errno.ENOSPC, "No space left on device"),
        OSError(errno.EDQUOT, "Disk quota exceeded"),
        RuntimeError("[enforce fail at inline_container.cc:664] . unexpected pos 704 vs 598"),
        RuntimeError("PytorchStreamWriter failed writing file data/3: file write failed"),
    ],
    ids=str,
)
def test_a_write_that_found_no_room_is_reported(tmp_path: Path, error: Exception):
    with (
        pytest.raises(
            UserError, match=r"a checkpoint needs 2000000 bytes \(2\.0 MB\), and could not be written"
        ),
        report_if_full(tmp_path, "a checkpoint", needed=2_000_000),
    ):
        raise error


@pytest.mark.parametrize(
    "error", [OSError(errno.EACCES, "no"), RuntimeError("shape"), ValueError("x")], ids=str
)
def test_other_errors_stay_what_they_are(tmp_path: Path, error: Exception):
    with pytest.raises(type(error)) as caught, report_if_full(tmp_path, "x"):
        raise error
    assert caught.value is error
