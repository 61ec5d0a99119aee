# SPDX-License-Identifier: Apache-2.0
"""One copy in memory of weights that several jobs of a machine have frozen: a file for each, named by its content.

Knows no model and no job. On CPUs; what lies on another device stays there.
"""

import errno
import hashlib
import logging
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor, nn

logger = logging.getLogger(__name__)

LEAST_BYTES = 4096  # of a weight that is shared: a page


def share_frozen(model: nn.Module, folder: Path) -> tuple[int, int]:
    """Have the frozen weights of ``model`` lie in files of ``folder``, once for all jobs that have the same.

    A job that writes to one gets a copy of its own. Without room in the folder, weights stay where they are.

    Returns:
        (bytes that lie in files, those of them that another job had put there).
    """
    total = found = 0
    for weight in _frozen(model):
        data, size = weight.detach().contiguous(), weight.numel() * weight.element_size()
        path = folder / _digest(data)
        there = path.exists()
        if not there and not _write(data, path):
            logger.warning("frozen weights are not shared: %s is full", folder)
            break
        weight.data = torch.from_file(str(path), size=data.numel(), dtype=data.dtype).view_as(data)
        total, found = total + size, found + there * size
    return total, found


def _frozen(model: nn.Module) -> Iterator[Tensor]:
    weights = [*(one for one in model.parameters() if not one.requires_grad), *model.buffers()]
    for weight in weights:
        if weight.device.type == "cpu" and weight.numel() * weight.element_size() >= LEAST_BYTES:
            yield weight


def _digest(data: Tensor) -> str:
    return f"{data.dtype}-{hashlib.sha256(_bytes(data)).hexdigest()}"


def _bytes(data: Tensor) -> memoryview:
    return data.flatten().view(torch.uint8).numpy().data


def _write(data: Tensor, path: Path) -> bool:
    """Write the file, whole or not at all; False if there is no room for it."""
    descriptor, unfinished = tempfile.mkstemp(dir=path.parent)
    try:
        with open(descriptor, "wb") as file:
            file.write(_bytes(data))
        os.replace(unfinished, path)
    except OSError as error:
        Path(unfinished).unlink(missing_ok=True)
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        return False
    return True
