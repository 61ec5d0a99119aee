# SPDX-License-Identifier: Apache-2.0
"""The choice of Transformer Engine; where it is not usable, Megatron finds none.

Megatron imports it in many places that expect it to be whole or absent. Its empty meta package, a build for another
CUDA and a machine without a GPU are neither.
"""

import functools
import importlib
import importlib.util
import logging
import sys

import torch

NAME = "transformer_engine"

logger = logging.getLogger(__name__)


@functools.cache
def usable() -> bool:
    """Try Transformer Engine once; first asked before Megatron is imported, which then finds what is said here."""
    if importlib.util.find_spec(NAME) is None:
        return False
    problem = _import_problem() if torch.cuda.is_available() else "there is no CUDA device"
    if problem is None:
        return True
    logger.info("Transformer Engine is installed and not used: %s; torch's kernels are used", problem)
    for name in list(sys.modules):
        if name.partition(".")[0] == NAME:
            del sys.modules[name]
    sys.modules[NAME] = None  # type: ignore[assignment] - as if it were not installed
    return False


def has_flash_attn() -> bool:
    """True if the flash-attn package, of any generation, is installed."""
    return any(importlib.util.find_spec(name) for name in ("flash_attn", "flash_attn_interface"))


def _import_problem() -> str | None:
    try:
        importlib.import_module(f"{NAME}.pytorch")
    # RuntimeError of the meta package, OSError of another CUDA, and what else is broken.
    except Exception as error:
        first_line = (str(error).splitlines() or [""])[0]
        return f"its import fails with {type(error).__name__}: {first_line}"
    return None
