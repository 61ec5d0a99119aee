# SPDX-License-Identifier: Apache-2.0
"""The patches that Megatron-core needs to run without CUDA: a table, applied only then.

Inside megatron-core's own modules the name ``torch`` is bound to a view of torch whose ``cuda`` is the CPU; torch
itself is left alone but for the three methods in ``METHODS``, which without CUDA could only raise or mislead.
Written against megatron-core 0.16.1 and 0.19.2; each row that names a part of it says which series it is for.
"""

import contextlib
import functools
import importlib
import importlib.metadata
import importlib.util
import logging
import sys
import types
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch

from nemo_aligner.parallel import te
from nemo_aligner.parallel.cpu_stand_ins import (
    NoRngWarning,
    Stream,
    all_gather,
    coalescing_manager,
    get_rng_state,
    manual_seed,
    nothing,
    reduce_scatter,
    scale,
    set_rng_state,
    tensor_type,
)

SERIES = OLD, NEW = "0.16", "0.19"  # of megatron-core, that rows of the table are for
BOTH = SERIES
CPU = torch.device("cpu")

# What ``torch.cuda`` is inside megatron-core of both series: (name, replacement, reason).
CUDA: tuple[tuple[str, Any, str], ...] = (
    ("is_available", lambda: False, "asked before device choices"),
    ("current_device", lambda: CPU, "device= of buffers in layers, mappings, p2p, DDP"),
    ("device_count", lambda: 1, "parallel_state"),
    ("set_device", nothing, "start-up"),
    ("synchronize", nothing, "p2p, checkpoint save"),
    ("empty_cache", nothing, "optimizer and DDP offload"),
    ("memory_allocated", lambda *_: 0, "logging of memory"),
    ("max_memory_allocated", lambda *_: 0, "logging of memory"),
    ("reset_peak_memory_stats", nothing, "logging of memory"),
    ("Stream", Stream, "overlapped gradient reduction"),
    ("Event", Stream, "overlapped gradient reduction"),
    ("stream", lambda *_: contextlib.nullcontext(), "overlapped gradient reduction"),
    ("current_stream", lambda *_: Stream(), "overlapped gradient reduction"),
    ("default_stream", lambda *_: Stream(), "overlapped gradient reduction"),
    ("nvtx", types.SimpleNamespace(range_push=nothing, range_pop=nothing), "profiling ranges"),
    ("manual_seed", manual_seed, "tensor_parallel.random: the device's generator is the CPU's"),
    ("get_rng_state", get_rng_state, "tensor_parallel.random"),
    ("set_rng_state", set_rng_state, "tensor_parallel.random"),
    ("random", types.SimpleNamespace(get_rng_state=get_rng_state), "tensor_parallel.random"),
)

# Factories that megatron-core of both series calls with device="cuda", as in buffers of layers and gradients.
FACTORIES = ("empty", "zeros", "ones", "full", "tensor", "arange", "empty_like", "zeros_like", "ones_like")

# Modules of megatron-core that are empty where triton is missing: (module, names asked of it, series, reason).
_STASH = ("GLOBAL_BLOCK_SIZE", "paged_stash_copy_kernel", "paged_stash_pop_kernel")
_EXPERTS = "triton kernels for experts, which the pipeline's schedules import for every model"
MODULES: tuple[tuple[str, tuple[str, ...], tuple[str, ...], str], ...] = (
    ("megatron.core.transformer.moe.ops.paged_stash", _STASH, (NEW,), _EXPERTS),
)

# Functions of megatron-core that reach below torch.cuda's surface, or that waste a CPU's time at every step:
# (module, name, replacement, series, reason).
_RANDOM = "megatron.core.tensor_parallel.random"
_BUFFER = "megatron.core.distributed.param_and_grad_buffer"
_CLIP = "megatron.core.optimizer.clip_grads"
_GENERATOR = "calls into the CUDA generator"
_ALONE = "gloo copies what a group of one rank has onto itself; NCCL does not"
_WAITS = "torch's cannot be waited for when nothing was called within it"
_COPIES = "without Transformer Engine and apex, clipping makes a copy of every gradient"
SYMBOLS: tuple[tuple[str, str, Callable, tuple[str, ...], str], ...] = (
    (_RANDOM, "_get_cuda_rng_state", get_rng_state, BOTH, _GENERATOR),
    (_RANDOM, "_set_cuda_rng_state", set_rng_state, BOTH, _GENERATOR),
    (_BUFFER, "dist_all_gather_func", all_gather, BOTH, _ALONE),
    (_BUFFER, "dist_reduce_scatter_func", reduce_scatter, BOTH, _ALONE),
    (_BUFFER, "_coalescing_manager", coalescing_manager, BOTH, _WAITS),
    (_CLIP, "multi_tensor_scale_impl", scale, BOTH, _COPIES),
)

# Methods replaced on torch's own classes: (class, name, replacement, series, reason).
_MOVES = "layers, optimizer and checkpoint move with it"
_COMPARED = "the optimizers compare it with 'torch.cuda.FloatTensor'"
METHODS: tuple[tuple[type, str, Callable, tuple[str, ...], str], ...] = (
    (torch.Tensor, "cuda", lambda self, *_, **__: self, BOTH, _MOVES),
    (torch.nn.Module, "cuda", lambda self, *_, **__: self, BOTH, "model builders"),
    (torch.Tensor, "type", tensor_type, BOTH, _COMPARED),
)

# Filters of megatron-core's warnings: (logger, filter, series, reason).
_ONE_GENERATOR = "it warns of CPU draws in its device's RNG context, and here the two are one generator"
FILTERS: tuple[tuple[str, logging.Filter, tuple[str, ...], str], ...] = (
    (_RANDOM, NoRngWarning(), BOTH, _ONE_GENERATOR),
)


def _on_cpu(factory: Callable) -> Callable:
    def call(*args: object, **kwargs: object) -> torch.Tensor:
        if kwargs.get("device") is not None and not isinstance(kwargs["device"], torch.device):
            kwargs["device"] = CPU
        return factory(*args, **kwargs)

    return call


class _View(types.ModuleType):
    """A module seen with some of its names replaced; all others are the module's own."""

    def __init__(self, module: types.ModuleType, replaced: Mapping[str, object]) -> None:
        super().__init__(module.__name__)
        self.__dict__.update(replaced)
        self.__dict__["_module"] = module

    def __getattr__(self, name: str) -> object:
        return getattr(self.__dict__["_module"], name)


def _megatron_modules() -> Iterator[types.ModuleType]:
    for name, module in list(sys.modules.items()):
        if name.startswith("megatron.core") and module is not None and module.__dict__.get("torch") is torch:
            yield module


def import_megatron() -> None:
    """Import megatron-core without what it only might need; called before anything else does.

    Transformer Engine that cannot be used is kept from it. Where there is no CUDA, it also goes without having
    torch.compile wrap functions that nothing here calls, and without wandb, which its inference engine imports:
    together they cost every rank 1.5 seconds and 90 MB.
    """
    if "megatron.core" in sys.modules:
        return
    te.usable()
    if torch.cuda.is_available():
        return
    if importlib.util.find_spec("triton") is None:
        for module_name, names, versions, _ in MODULES:
            if _is_for(versions):
                sys.modules[module_name] = _emptied(module_name, names)
    compiler, torch.compile = torch.compile, lambda function: function
    hides_wandb = sys.modules.setdefault("wandb", None) is None  # type: ignore[arg-type]
    try:
        importlib.import_module("megatron.core.jit").disable_jit_fuser()
    finally:
        torch.compile = compiler
        if hides_wandb:
            del sys.modules["wandb"]


@functools.cache
def series() -> str:
    """Of the megatron-core that is installed: its first two numbers."""
    return ".".join(importlib.metadata.version("megatron-core").split(".")[:2])


def _is_for(versions: Sequence[str]) -> bool:
    # Of a series that the table was not written for, the newest rows come nearest.
    return (series() if series() in SERIES else SERIES[-1]) in versions


def _emptied(name: str, contents: Sequence[str]) -> types.ModuleType:
    module = types.ModuleType(name)
    module.__dict__.update(dict.fromkeys(contents))
    return module


_views: dict[str, _View] = {}


def install() -> None:
    """Apply the table to every megatron-core module loaded so far; call again after loading more."""
    if torch.cuda.is_available():
        return
    if not _views:
        cuda = _View(torch.cuda, {name: replacement for name, replacement, _ in CUDA})
        _views["torch"] = _View(
            torch, {"cuda": cuda} | {name: _on_cpu(getattr(torch, name)) for name in FACTORIES}
        )
        for owner, name, replacement, versions, _ in METHODS:
            if _is_for(versions):
                setattr(owner, name, replacement)
        for logger_name, quiet, versions, _ in FILTERS:
            if _is_for(versions):
                logging.getLogger(logger_name).addFilter(quiet)
    for module in _megatron_modules():
        module.__dict__["torch"] = _views["torch"]
    for module_name, name, replacement, versions, _ in SYMBOLS:
        if _is_for(versions) and module_name in sys.modules:
            setattr(sys.modules[module_name], name, replacement)
