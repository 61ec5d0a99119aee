# SPDX-License-Identifier: Apache-2.0
"""The folder in memory in which the jobs that one process starts share what they have frozen. Imports no torch."""

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from nemo_aligner.models.gpt.peft_config import SHARED_FOLDER_VARIABLE
from nemo_aligner.serving.cleanup import OWNER, mark_owner, owner_lives

PREFIX = "nemo_aligner_weights_"
MEMORY = Path("/dev/shm")


@contextmanager
def shared_folder() -> Iterator[None]:
    """Within it, the jobs that this process starts share what they have frozen, until all of them have ended."""
    parent = MEMORY if MEMORY.is_dir() else Path(tempfile.gettempdir())
    for path in parent.glob(f"{PREFIX}*"):
        with suppress(FileNotFoundError):  # another run may end just now
            # A starter that was killed has left it.
            if path.stat().st_uid == os.getuid() and (path / OWNER).exists() and not owner_lives(path):
                shutil.rmtree(path, ignore_errors=True)
    with tempfile.TemporaryDirectory(prefix=PREFIX, dir=parent, ignore_cleanup_errors=True) as folder:
        mark_owner(Path(folder))
        os.environ[SHARED_FOLDER_VARIABLE] = folder
        try:
            yield
        finally:
            os.environ.pop(SHARED_FOLDER_VARIABLE, None)
