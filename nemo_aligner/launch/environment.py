# SPDX-License-Identifier: Apache-2.0
"""Versions and hardware for a bug report, without paths, names or secrets. Imports no torch."""

import os
import platform
import re
import subprocess
import sys
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import psutil

import nemo_aligner

__all__ = ["report"]

PACKAGES = (
    *("torch", "megatron-core", "transformer-engine", "triton", "nvidia-pytriton", "transformers"),
    *("tokenizers", "safetensors", "hydra-core", "omegaconf", "numpy"),
)
VARIABLES = ("CUDA_VISIBLE_DEVICES", "OMP_NUM_THREADS", "ONEDNN_MAX_CPU_ISA", "HF_HUB_OFFLINE")
# The widest of these that the CPU has is what its products run on.
INSTRUCTIONS = ("amx_bf16", "avx512_bf16", "avx512f", "avx2", "asimd")


def report() -> str:
    """Lines of NAME: VALUE."""
    return "".join(f"{name:<20} {value}\n" for name, value in _facts())


def _facts() -> Iterator[tuple[str, str]]:
    yield "nemo-aligner", nemo_aligner.__version__
    yield "python", sys.version.split()[0]
    for package in PACKAGES:
        try:
            yield package, version(package)
        except PackageNotFoundError:
            yield package, "not installed"
    yield "system", f"{platform.system()} {platform.release()} {platform.machine()}"
    yield "cpu", _cpu()
    memory = psutil.virtual_memory()
    yield "cores", f"{len(os.sched_getaffinity(0))} of {os.cpu_count()}"
    yield "memory", f"{memory.available / 2**30:.1f} of {memory.total / 2**30:.1f} GiB free"
    for number, gpu in enumerate(_gpus()):
        yield f"gpu {number}", gpu
    for name in VARIABLES:
        if name in os.environ:
            yield name, os.environ[name]


def _cpu() -> str:
    try:
        text = Path("/proc/cpuinfo").read_text()
    except OSError:
        return platform.processor() or "unknown"
    name = re.search(r"^model name\s*:\s*(.*)$", text, re.MULTILINE)
    flags = re.search(r"^(?:flags|Features)\s*:(.*)$", text, re.MULTILINE)
    has = set(flags[1].split()) if flags else set()
    widest = next((one for one in INSTRUCTIONS if one in has), "no known vector instructions")
    return f"{name[1] if name else platform.processor()}, {widest}"


def _gpus() -> list[str]:
    query = ["nvidia-smi", "--query-gpu=name,memory.total,driver_version", "--format=csv,noheader"]
    try:
        done = subprocess.run(query, capture_output=True, text=True, timeout=20, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return ["none that nvidia-smi shows"]
    return done.stdout.splitlines() if done.returncode == 0 else ["none that nvidia-smi shows"]
