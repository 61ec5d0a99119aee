# SPDX-License-Identifier: Apache-2.0
"""Every form of a model at every layout: ``python open_model_worker.py OUT_FOLDER NUM_RANKS``.

OUT_FOLDER has a .nemo of the same model beside each source; a rank whose weights differ fails.
"""

import gc
from datetime import timedelta
from pathlib import Path

import pytest
import torch
from fork import fork_ranks

from nemo_aligner.checkpoint.model_nemo import shared_model
from nemo_aligner.checkpoint.sharded import load_model
from nemo_aligner.errors import UserError
from nemo_aligner.models.gpt.config import GPTConfig
from nemo_aligner.models.gpt.heads import head_config
from nemo_aligner.models.gpt.model import build_gpt
from nemo_aligner.parallel import collectives, world
from nemo_aligner.parallel.ranks import Layout, Ranks

LAYOUTS = (
    Layout(),
    Layout(tensor=2, pipeline=2),
    Layout(tensor=4, sequence_parallel=True),
    Layout(pipeline=4),
    Layout(pipeline=2, virtual_pipeline=2),
)


def loaded(path: Path, layout: Layout, dtype: torch.dtype) -> torch.nn.Module:
    """The model at ``path``; what loading leaves out would show."""
    with shared_model(path) as archive:
        model = build_gpt(
            GPTConfig.from_dict(archive.config), layout, dtype, head=head_config(archive.config)
        )
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.fill_(float("nan"))
        load_model(model, archive.weights)
    return model


def compare(source: Path, nemo: Path, layout: Layout, dtype: torch.dtype) -> None:
    """The weights of both, bit for bit."""
    found, wanted = (dict(loaded(path, layout, dtype).named_parameters()) for path in (source, nemo))
    assert found.keys() == wanted.keys()
    for name, value in found.items():
        assert torch.equal(value, wanted[name]), f"{source.name}, {layout}: {name}"


def refused_alike(source: Path, layout: Layout) -> None:
    """Layers that are not stored are every rank's error, though one stage alone misses them."""
    with shared_model(source) as archive:
        config = GPTConfig.from_dict({**archive.config, "num_layers": 8})
        model = build_gpt(config, layout, torch.float32, head=head_config(archive.config))
        with pytest.raises(UserError, match="does not fit the model"):  # 4 layers for 8
            load_model(model, archive.weights)


def run_rank(rank: int, size: int, out: Path) -> None:
    torch.set_num_threads(1)
    sources = sorted(path for path in out.iterdir() if path.with_name(f"{path.name}.nemo").exists())
    assert sources
    for number, layout in enumerate(LAYOUTS):
        init = f"file://{out}/ranks-{number}"
        ranks = Ranks(rank=rank, world_size=size, local_rank=rank, init_method=init, starter="local")
        world.start(ranks, layout=layout, timeout=timedelta(seconds=60))
        for source in sources:
            for dtype in (torch.float32, torch.bfloat16):
                compare(source, source.with_name(f"{source.name}.nemo"), layout, dtype)
        refused_alike(sources[0], layout)
        if rank == 0:
            (out / f"done-{number}").touch()
        collectives.of_all_ranks(None)
        world.stop()
        gc.collect()


if __name__ == "__main__":
    fork_ranks(run_rank)
