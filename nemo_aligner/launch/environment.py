# SPDX-License-Identifier: Apache-2.0
"""Versions and hardware for a bug report, without paths, names or secrets. Imports no torch."""

import os
import platform
import re
import subprocess
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import psutil

import nemo_aligner

PACKAGES = (
    *("torch", "megatron-core", "transformer-engine", "triton", "nvidia-pytriton", "transformers"),
    *("tokenizers", "safetensors", "hydra-core", "omegaconf", "numpy"),
)
VARIABLES = ("CUDA_VISIBLE_DEVICES", "OMP_NUM_THREADS", "ONEDNN_MAX_CPU_ISA", "HF_HUB_OFFLINE")
# The widest of these that the CPU has is what its products run on.
INSTRUCTIONS = ("amx_bf16", "avx512_bf16", "avx512f", "avx2", "asimd")


def report() -> str:
    """Lines of NAME and VALUE."""
    return "".join(f"{name:<20} {value}\n" for name, value in _facts())


def _facts() -> Iterator[tuple[str, str]]:
    yield "nemo-aligner", nemo_aligner.__version__
    yield "python", platform.python_version()
    for package in PACKAGES:
        try:
            yield package, version(package)
        except PackageNotFoundError:
            yield package, "not installed"
    yield "system", f"{platform.system()} {platform.release()} {platform.machine()}"
    cpuinfo = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else ""
    name = re.search(r"^model name\s*:\s*(.*)$", cpuinfo, re.MULTILINE)
    widest = next(
        (one for one in INSTRUCTIONS if re.search(rf"\b{one}\b", cpuinfo)), "no vector instructions known"
    )
    yield "cpu", f"{name[1] if name else platform.processor()}, {widest}"
    yield "cores", f"{len(os.sched_getaffinity(0))} of {os.cpu_count()}"
    memory = psutil.virtual_memory()
    yield "memory", f"{memory.available / 2**30:.1f} of {memory.total / 2**30:.1f} GiB free"
    yield "gpus", _gpus()
    yield from ((name, os.environ[name]) for name in VARIABLES if name in os.environ)


def _gpus() -> str:
    query = ["nvidia-smi", "--query-gpu=name,memory.total,driver_version", "--format=csv,noheader"]
    try:
        done = subprocess.run(query, capture_output=True, text=True, timeout=20, check=True)
    except (OSError, subprocess.SubprocessError):
        return "none that nvidia-smi shows"
    return "; ".join(done.stdout.splitlines())
