# SPDX-License-Identifier: Apache-2.0
"""A .nemo shared by all ranks of a job: unpacked once per node, written by all ranks together."""

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from megatron.core.transformer.module import MegatronModule

from nemo_aligner.checkpoint.finite import refuse_non_finite
from nemo_aligner.checkpoint.nemo_archive import NemoArchive, open_nemo, write_nemo
from nemo_aligner.checkpoint.sharded import save_model
from nemo_aligner.errors import UserError
from nemo_aligner.parallel import collectives, world
from nemo_aligner.run.progress import heartbeat

__all__ = ["save_nemo", "shared_nemo"]


@contextlib.contextmanager
def shared_nemo(path: Path | str) -> Iterator[NemoArchive]:
    """The .nemo at ``path`` on every rank; one rank of each node unpacks it for its neighbours.

    Raises:
        UserError: on every rank, for whatever reason one node's rank could not open it.
    """
    with contextlib.ExitStack() as stack:
        opened: NemoArchive | UserError | None = None
        with world.phase(f"opening {path}"), world.at_own_pace():
            if world.is_node_leader():
                try:
                    with heartbeat(f"opening {path}", enabled=world.is_logging_rank()):
                        opened = stack.enter_context(open_nemo(path))
                except UserError as error:
                    opened = error
        opened = collectives.from_node_leader(opened)
        if isinstance(opened, UserError):
            raise opened
        assert opened is not None
        yield opened
        # The folder goes with its leader's context: nobody may still be reading.
        world.barrier()


def save_nemo(
    model: MegatronModule,
    path: Path,
    *,
    config: dict[str, Any],
    files: dict[str, Path | bytes],
    overwrite: bool = False,
) -> None:
    """Write ``model`` of all ranks as one .nemo. Called by every rank; ``path`` is on a disk that all nodes share.

    Args:
        config: becomes model_config.yaml.
        files: name within the archive to its content; rank 0's are used.
        overwrite: whether an existing file is replaced.

    Raises:
        UserError: a weight is not finite; nothing is written.
    """
    refuse_non_finite(
        model,
        problem=f"the weights are broken, and {path} is not made of them",
        cure="set model.optim.lr lower, and go on from a checkpoint: they hold finite weights only",
    )

    def weights(folder: Path) -> None:
        save_model(model, collectives.broadcast_object(folder))

    with (
        heartbeat(f"saving {path}", enabled=world.is_logging_rank()),
        world.phase(f"saving {path}"),
        world.at_own_pace(),
    ):
        if world.is_logging_rank():
            write_nemo(path, config=config, files=files, weights=weights, overwrite=overwrite)
        else:
            weights(path)
