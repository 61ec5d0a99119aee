# SPDX-License-Identifier: Apache-2.0
"""A model shared by all ranks of a job: opened once per node, written as a .nemo by all ranks together."""

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from megatron.core.transformer.module import MegatronModule

from nemo_aligner.checkpoint.digests import Digests, find_damage
from nemo_aligner.checkpoint.finite import refuse_non_finite
from nemo_aligner.checkpoint.nemo_archive import NemoArchive, refuse_damaged, write_nemo
from nemo_aligner.checkpoint.open_model import OpenedModel, open_model
from nemo_aligner.checkpoint.sharded import check_room_for_all, save_state, stored_bytes, whole_state
from nemo_aligner.errors import UserError
from nemo_aligner.parallel import collectives, world
from nemo_aligner.run.disk import report_if_full
from nemo_aligner.run.progress import heartbeat


@contextlib.contextmanager
def shared_model(path: Path | str, *, check: bool = True) -> Iterator[OpenedModel]:
    """The model at ``path`` on every rank; one rank of each node opens it for its neighbours, see :func:`open_model`.

    Args:
        check: whether the files of a .nemo are compared with their digests, each rank a part of them.

    Raises:
        UserError: on every rank, for whatever reason one node's rank could not open it.
    """
    with contextlib.ExitStack() as stack:
        opened: OpenedModel | UserError | None = None
        with world.phase(f"opening {path}"), world.at_own_pace():
            if world.is_node_leader():
                try:
                    with heartbeat(f"opening {path}", enabled=world.is_logging_rank()):
                        opened = stack.enter_context(open_model(path, check=False))
                except UserError as error:
                    opened = error
        opened = collectives.from_node_leader(opened)
        if isinstance(opened, UserError):
            raise opened
        assert opened is not None
        if check and isinstance(opened, NemoArchive):
            # Each node has unpacked its own copy; a folder is one for all.
            place = (world.rank(), world.world_size()) if Path(path).is_dir() else world.place_on_node()
            refuse_damaged(Path(path), damage_over_ranks(opened.folder, place))
        yield opened
        # The folder goes with its leader's context: nobody may still be reading.
        world.barrier()


def damage_over_ranks(folder: Path, place: tuple[int, int] | None = None) -> list[str] | None:
    """The result of :func:`find_damage`, each rank checking its share of the files. Called by every rank.

    Args:
        place: (this rank's share, of how many); None: of all ranks.
    """
    share, of = place or (world.rank(), world.world_size())
    with world.phase(f"checking the files of {folder}"), world.at_own_pace():
        own = find_damage(folder, share=share, of=of)
    found = collectives.of_all_ranks(own)
    return None if found[0] is None else sorted({one for part in found for one in part or ()})


def save_nemo(
    model: MegatronModule,
    path: Path,
    *,
    config: dict[str, Any],
    files: dict[str, Path | bytes],
    overwrite: bool = False,
) -> None:
    """Write ``model`` of all ranks as one .nemo, adapters merged. Called by every rank.

    Args:
        path: on a disk that all nodes share.
        config: becomes model_config.yaml.
        files: name within the archive to its content; rank 0's are used.
        overwrite: whether an existing file is replaced.

    Raises:
        UserError: a weight is not finite; nothing is written.
    """
    refuse_non_finite(
        model,
        problem=f"the weights are broken, and {path} is not made of them",
        fix="set model.optim.lr lower, and go on from a checkpoint: they hold finite weights only",
    )

    state = whole_state(model)
    own_bytes = stored_bytes(state)
    # While it is packed, the largest of its files is there twice.
    twice = max(collectives.of_all_ranks(own_bytes))
    needed = check_room_for_all(path.parent, own_bytes, f"{path.name}", spare=twice)

    def weights(folder: Path) -> Digests:
        own = save_state(state, collectives.broadcast_object(folder)).result()
        return {name: digest for part in collectives.of_all_ranks(own) for name, digest in part.items()}

    with (
        heartbeat(f"saving {path}", enabled=world.is_logging_rank()),
        world.phase(f"saving {path}"),
        report_if_full(path.parent, path.name, needed=needed),
        world.at_own_pace(),
    ):
        if world.is_logging_rank():
            write_nemo(path, config=config, files=files, weights=weights, overwrite=overwrite)
        else:
            weights(path)
