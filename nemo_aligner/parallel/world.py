# SPDX-License-Identifier: Apache-2.0
"""The world of ranks: NCCL and CUDA where there is a GPU, gloo and the CPU shim where there is none.

The only place, with its siblings in this package, that names torch.distributed, torch.cuda or Megatron's
``parallel_state``. Everyone else asks here who they are and where their tensors live.
"""

import contextlib
import ctypes
import hashlib
import logging
import os
import random
import time
import traceback
import warnings
from collections.abc import Iterator
from datetime import timedelta
from typing import Any

import numpy
import torch
import torch.distributed as dist
from megatron.core import parallel_state, tensor_parallel

from nemo_aligner.errors import UserError
from nemo_aligner.parallel import cpu_shim, meeting
from nemo_aligner.parallel.ranks import Layout, Ranks, discover

logger = logging.getLogger(__name__)

# glibc's M_MMAP_THRESHOLD, up to which blocks come from the heap, and M_TRIM_THRESHOLD, of which its end is kept.
KEPT_MEMORY = ((-3, 64 << 20), (-1, 512 << 20))

_phase = "start"
_timeout = timedelta(minutes=10)
_local_rank = 0
_local_size = 1
_device_index = 0
_writers: Any = None


def start(
    ranks: Ranks | None = None,
    *,
    layout: Layout = Layout(),  # noqa: B008 - frozen
    seed: int = 1234,
    timeout: timedelta = timedelta(minutes=10),
) -> None:
    """Join the other ranks and cut the world into tensor, pipeline and data parallel groups.

    Args:
        ranks: this process's place; None makes it a world of its own, which opens no port.
        layout: how the world is cut.
        seed: of random draws, which are alike over DP and apart over TP and PP where they must be.
        timeout: after which a collective that does not complete fails.
    """
    global _local_rank, _local_size, _device_index, _timeout
    _timeout = timeout
    cpu_shim.install()
    _know_megatron()
    if layout.tensor > 1:
        # Megatron counts on kernels starting in the order they were queued; read when CUDA starts.
        os.environ.setdefault("CUDA_DEVICE_MAX_CONNECTIONS", "1")
    cuda = torch.cuda.is_available()
    if ranks is not None:
        _local_rank, _local_size = ranks.local_rank, ranks.local_size
    if cuda:
        _device_index = device_index(ranks, torch.cuda.device_count())
        torch.cuda.set_device(_device_index)
    else:
        _keep_freed_memory()
    backend = "nccl" if cuda else "gloo"
    with phase("meeting of the ranks"):
        _join(ranks, backend)
    minutes: Any = timeout.total_seconds() / 60  # typed int by Megatron, which makes a timedelta of it
    chunks = layout.virtual_pipeline if layout.virtual_pipeline > 1 else None
    with phase("building process groups"):
        parallel_state.initialize_model_parallel(
            *(layout.tensor, layout.pipeline, chunks),
            context_parallel_size=layout.context,
            distributed_timeout_minutes=minutes,
            create_gloo_process_groups=False,
        )
    _seed(seed)
    if is_logging_rank():
        where = torch.cuda.get_device_name() if cuda else "CPU (no CUDA device found)"
        starter = ranks.starter if ranks else "this process alone"
        logger.info(
            "world: %d rank(s) started by %s, TP %d x PP %d x DP %d, backend %s on %s, collective time-out %.0f s",
            *(world_size(), starter, layout.tensor, layout.pipeline, dp_size(), backend, where),
            timeout.total_seconds(),
        )


def _join(ranks: Ranks | None, backend: str) -> None:
    if ranks is None:
        dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1, timeout=_timeout)
        return
    dist.init_process_group(
        backend,
        init_method=ranks.init_method,
        rank=ranks.rank,
        world_size=ranks.world_size,
        timeout=_timeout,
        device_id=device() if backend == "nccl" else None,
    )


def _keep_freed_memory() -> None:
    """Have glibc keep what a step frees: taken again, each 4 KiB of it would cost a page fault. MALLOC_* go first."""
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is None or any(name.startswith(("MALLOC_", "GLIBC_TUNABLES")) for name in os.environ):
        return
    for option, num_bytes in KEPT_MEMORY:
        mallopt(option, num_bytes)


def _know_megatron() -> None:
    """Say so where its version is another one, and pass over what it makes torch warn of on every rank."""
    # It calls torch.distributed by names that torch is about to retire, and looks for .grad wherever it may be.
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"torch\.distributed")
    warnings.filterwarnings("ignore", "The .grad attribute of a Tensor", module=r"megatron\.core")
    # Advice for us, whichever model is built or loaded; see docs/adr/0011.
    for name in (
        "models.gpt.gpt_model",
        "distributed.distributed_data_parallel",
        "dist_checkpointing.strategies.common",
    ):
        logging.getLogger(f"megatron.core.{name}").setLevel(logging.ERROR)
    if (found := cpu_shim.series()) not in cpu_shim.SERIES and is_logging_rank():
        tested = " and ".join(cpu_shim.SERIES)
        logger.warning("megatron-core %s is installed; this release is tested with %s", found, tested)


def device_index(ranks: Ranks | None, visible: int) -> int:
    """Which of the ``visible`` GPUs is this rank's own.

    Raises:
        UserError: the node has fewer GPUs than ranks; on all of its ranks, so that one of them reports it.
    """
    if ranks is None:
        return 0
    if ranks.starter == "srun" and visible == 1:
        # srun --gpus-per-task=1 shows each rank its own GPU only, always under the number 0.
        return 0
    if (needed := max(ranks.local_size, ranks.local_rank + 1)) > visible:
        raise UserError(
            f"{needed} ranks on this node need a GPU each, and it shows {visible}",
            fix=f"set trainer.devices={visible}, or make more GPUs visible (CUDA_VISIBLE_DEVICES)",
        )
    return ranks.local_rank


def stop() -> None:
    """Leave the world; safe to call more than once."""
    global _writers
    if dist.is_initialized():
        _writers = None
        meeting.leave()
        if parallel_state.model_parallel_is_initialized():
            parallel_state.destroy_model_parallel()
        dist.destroy_process_group()


def writers_group() -> Any:  # noqa: ANN401 - torch's ProcessGroup, which only this package names
    """All ranks over gloo, for a thread that writes while training goes on; made at the first call, by every rank."""
    global _writers
    if _writers is None:
        # A rank that is gone is missed by the training beside it; a slow disk is no reason to fail.
        _writers = dist.new_group(backend="gloo", timeout=timedelta(days=7))
    return _writers


@contextlib.contextmanager
def ensure_single_process() -> Iterator[None]:
    """A one-rank world for who measures or tests a model in its own process; the existing one, if there is one."""
    if dist.is_initialized():
        yield
        return
    start()
    try:
        yield
    finally:
        stop()


def _seed(seed: int) -> None:
    random.seed(seed)
    numpy.random.seed(seed)
    torch.manual_seed(seed)
    tensor_parallel.model_parallel_cuda_manual_seed(
        seed + 100 * parallel_state.get_pipeline_model_parallel_rank()
    )


def seed_step(seed: int, step: int) -> None:
    """Make the random draws of a training step a function of ``seed``, ``step`` and this rank's place alone.

    Data parallel and pipeline ranks draw apart. Tensor parallel ranks draw alike for activations that all of them hold,
    and apart for those that they share out.
    """
    replica = parallel_state.get_data_parallel_rank(with_context_parallel=True)
    place = f"{seed} {step} {replica} {parallel_state.get_pipeline_model_parallel_rank()}"
    derived = int.from_bytes(hashlib.blake2b(place.encode(), digest_size=6).digest())
    torch.manual_seed(derived)
    tensor_parallel.model_parallel_cuda_manual_seed(derived)


def device() -> torch.device:
    """Where this rank's tensors live."""
    return torch.device("cuda", _device_index) if torch.cuda.is_available() else torch.device("cpu")


def free_memory() -> tuple[int, int] | None:
    """(free, total) bytes of the device's memory; what PyTorch keeps unused counts as free. None on a CPU."""
    if not torch.cuda.is_available():
        return None
    free, total = torch.cuda.mem_get_info(device())
    return free + torch.cuda.memory_reserved() - torch.cuda.memory_allocated(), total


def synchronize() -> None:
    """Wait for the device, so that a clock read next is right."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def stands() -> bool:
    """True if :func:`start` has been called, and :func:`stop` has not."""
    return dist.is_initialized()


def rank() -> int:
    """This process's number in the world; before the world stands, what its starter says."""
    return dist.get_rank() if dist.is_initialized() else (r.rank if (r := discover()) else 0)


def world_size() -> int:
    """Ranks in the world."""
    return dist.get_world_size() if dist.is_initialized() else 1


def is_logging_rank() -> bool:
    """The one rank that talks to people and writes the files all ranks share."""
    return rank() == 0


def is_node_leader() -> bool:
    """One rank per node: the one that unpacks archives for its neighbours."""
    return _local_rank == 0


def place_on_node() -> tuple[int, int]:
    """(this rank's number on its node, how many ranks the node has)."""
    return _local_rank, _local_size


def tp_rank() -> int:
    """This rank's slice of each layer."""
    return parallel_state.get_tensor_model_parallel_rank()


def tp_size() -> int:
    """Ranks that share each layer."""
    return parallel_state.get_tensor_model_parallel_world_size()


def pp_size() -> int:
    """Pipeline stages."""
    return parallel_state.get_pipeline_model_parallel_world_size()


def dp_rank() -> int:
    """Which copy of the model this rank is part of."""
    return parallel_state.get_data_parallel_rank()


def dp_size() -> int:
    """Copies of the model."""
    return parallel_state.get_data_parallel_world_size()


def is_first_stage() -> bool:
    """True if this rank holds the embedding."""
    return parallel_state.is_pipeline_first_stage()


def is_last_stage() -> bool:
    """True if this rank holds the head."""
    return parallel_state.is_pipeline_last_stage()


def is_first_of_model() -> bool:
    """One rank of each of the model's copies: the one that calls what is not the model's."""
    return tp_rank() == 0 and is_first_stage()


def barrier() -> None:
    """Wait for all ranks."""
    if world_size() > 1:
        dist.barrier()


def at_own_pace(*, name: str = "main") -> contextlib.AbstractContextManager[None]:
    """Around work that some ranks have more of than others; see :func:`meeting.at_own_pace`."""
    return meeting.at_own_pace(name=name, timeout=_timeout)


@contextlib.contextmanager
def phase(name: str) -> Iterator[None]:
    """Name what this rank is doing, for the message of a collective that fails meanwhile."""
    global _phase
    before, _phase = _phase, name
    yield
    # Not in a finally: after a failure the name must still say where it happened.
    _phase = before


def describe_failure(error: BaseException) -> str | None:
    """'rank 3, phase ..., operation all_reduce: ...' where a collective failed; None for other errors."""
    if isinstance(error, meeting.RankLost):
        return f"rank {rank()}, phase '{_phase}', operation meeting: {error}"
    called = [
        frame.name
        for frame in traceback.extract_tb(error.__traceback__)
        if frame.filename.endswith("distributed_c10d.py") and frame.name != "wrapper"
    ]
    text = str(error)
    if not called and not any(word in text for word in ("gloo", "NCCL", "ProcessGroup", "Connection closed")):
        return None
    # Megatron's DDP reduces a bucket of gradients inside torch's coalescing context, which is what raises.
    operation = (
        {"_coalescing_manager": "all_reduce of gradients"}.get(called[0], called[0])
        if called
        else "of Megatron"
    )
    return f"rank {rank()}, phase '{_phase}', operation {operation}: {text.splitlines()[0]}"


def report_once(*, wait_seconds: float = 1.0) -> bool:
    """True in exactly one of the ranks that call it: the one that reports an error that all of them met.

    Rank 0 is given ``wait_seconds`` to be the one.
    """
    if not dist.is_initialized():
        return rank() == 0
    if rank() != 0:
        time.sleep(wait_seconds)
    try:
        return dist.distributed_c10d._get_default_store().add("nemo_aligner/reported", 1) == 1
    except (RuntimeError, dist.DistError):
        # The store lives in a rank that has already gone: it has reported its error.
        return False
