# SPDX-License-Identifier: Apache-2.0
"""One copy in memory of weights that several jobs of a machine have frozen: a file for each, named by its content.

Knows no model and no job. On CPUs; what lies on another device stays there.
"""

import hashlib
import logging
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor, nn

logger = logging.getLogger(__name__)

LEAST_BYTES = 4096  # of a weight that is shared: a page


def share_frozen(model: nn.Module, folder: Path) -> tuple[int, int]:
    """Have the frozen weights of ``model`` lie in files of ``folder``, once for all jobs that have the same.

    A job that writes to one gets a copy of its own. Half of what is free in the folder is left to others; where that
    does not do, weights stay where they are.

    Returns:
        (bytes that lie in files, those of them that another job had put there).
    """
    weights = [(weight, folder / _digest(weight.detach().contiguous())) for weight in _frozen(model)]
    needed = sum(_size(weight) for weight, path in weights if not path.exists())
    if needed > (free := shutil.disk_usage(folder).free) / 2:
        logger.warning(
            "frozen weights are not shared: they need %.0f MiB in %s, and half of its free %.0f MiB is for others\n"
            "Fix: a larger /dev/shm, as with docker run --shm-size",
            *(needed / 2**20, folder, free / 2**20),
        )
        return 0, 0
    total = found = 0
    for weight, path in weights:
        data = weight.detach().contiguous()
        there = path.exists() or not _put(data, path)
        weight.data = torch.from_file(str(path), size=data.numel(), dtype=data.dtype).view_as(data)
        total, found = total + _size(weight), found + there * _size(weight)
    return total, found


def _size(weight: Tensor) -> int:
    return weight.numel() * weight.element_size()


def _frozen(model: nn.Module) -> Iterator[Tensor]:
    weights = [*(one for one in model.parameters() if not one.requires_grad), *model.buffers()]
    for weight in weights:
        if weight.device.type == "cpu" and _size(weight) >= LEAST_BYTES:
            yield weight


def _digest(data: Tensor) -> str:
    return f"{data.dtype}-{hashlib.sha256(_bytes(data)).hexdigest()}"


def _bytes(data: Tensor) -> memoryview:
    return data.flatten().view(torch.uint8).numpy().data


def _put(data: Tensor, path: Path) -> bool:
    """Write the file, whole or not at all; False if another job was faster."""
    descriptor, unfinished = tempfile.mkstemp(dir=path.parent)
    try:
        with open(descriptor, "wb") as file:
            file.write(_bytes(data))
        os.link(unfinished, path)
    except FileExistsError:
        return False
    finally:
        os.unlink(unfinished)
    return True
