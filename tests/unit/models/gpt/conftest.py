# SPDX-License-Identifier: Apache-2.0
"""A world of one rank, rows of tokens, and models whose weights are given by canonical name."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

import pytest
import torch
from torch import Tensor

from nemo_aligner.batch import TokenBatch
from nemo_aligner.checkpoint.convert import import_from_huggingface
from nemo_aligner.checkpoint.nemo_archive import open_nemo
from nemo_aligner.checkpoint.sharded import load_model
from nemo_aligner.checkpoint.weights import save_weights
from nemo_aligner.models.gpt.config import GPTConfig
from nemo_aligner.models.gpt.model import GPT, build_gpt
from nemo_aligner.parallel import world
from nemo_aligner.parallel.ranks import Layout

VOCAB = 101


@pytest.fixture(scope="module", autouse=True)
def one_rank() -> Iterator[None]:
    with world.ensure_single_process():
        yield


@pytest.fixture(scope="session")
def random_rows() -> Callable[..., TokenBatch]:
    """Rows of random tokens of these lengths, right padded; all of them learned."""

    def make(lengths: Sequence[int], *, seed: int = 0, pad_id: int = 0) -> TokenBatch:
        draw = torch.Generator().manual_seed(seed)
        rows = [(torch.randint(0, VOCAB, (n,), generator=draw).tolist(), [True] * n) for n in lengths]
        return TokenBatch.from_rows(rows, pad_id=pad_id, seq_length=max(lengths))

    return make


@pytest.fixture(scope="session")
def packed() -> Callable[[TokenBatch], TokenBatch]:
    """The rows of a padded batch end to end in one row, with a tail of padding."""

    def make(batch: TokenBatch) -> TokenBatch:
        lengths = batch.lengths.tolist()
        rows = [slice(0, n) for n in lengths]
        tail = torch.zeros(3, dtype=torch.int64)
        tokens = torch.cat([*(batch.tokens[i, row] for i, row in enumerate(rows)), tail])
        mask = torch.cat([*(batch.loss_mask[i, row] for i, row in enumerate(rows)), tail.bool()])
        bounds = torch.tensor([0, *lengths]).cumsum(0).int()
        return TokenBatch(tokens=tokens[None], loss_mask=mask[None], lengths=batch.lengths, cu_seqlens=bounds)

    return make


@pytest.fixture(scope="session")
def random_model() -> Callable[..., GPT]:
    """A model with weights not at their initial scale, norms and biases not trivial."""

    def make(config: GPTConfig, *, dtype: torch.dtype = torch.float32) -> GPT:
        model = build_gpt(config, Layout(), dtype).eval()
        draw = torch.Generator().manual_seed(0)
        with torch.no_grad():
            for parameter in model.parameters():
                centre = 0.0 if parameter.ndim > 1 else 0.7
                parameter.copy_(torch.randn(parameter.shape, generator=draw) * 0.2 + centre)
        return model

    return make


@pytest.fixture
def model_of(tmp_path: Path) -> Callable[[GPTConfig, Mapping[str, Tensor]], GPT]:
    """A model loaded from full tensors by canonical name."""

    def make(config: GPTConfig, weights: Mapping[str, Tensor]) -> GPT:
        multiple = config.make_vocab_size_divisible_by
        save_weights(tmp_path / "weights", weights.items(), config.num_layers, vocab_multiple=multiple)
        model = build_gpt(config, Layout(), torch.float32).eval()
        load_model(model, tmp_path / "weights")
        return model

    return make


@pytest.fixture(scope="session")
def imported() -> Callable[[Path, Path], GPT]:
    """The model of a Hugging Face folder, by way of the .nemo that is written."""

    def make(folder: Path, nemo: Path) -> GPT:
        import_from_huggingface(folder, str(nemo))
        with open_nemo(nemo) as archive:
            model = build_gpt(GPTConfig.from_dict(archive.config), Layout(), torch.float32).eval()
            load_model(model, archive.weights)
        return model

    return make
