# SPDX-License-Identifier: Apache-2.0
"""A reward model that serves clients. Sees the model through its interface only."""

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass

from torch import Tensor

from nemo_aligner.algorithms.served import score, serve
from nemo_aligner.batch import TokenBatch
from nemo_aligner.models.alignable_interface import RewardModelInterface
from nemo_aligner.run.stop import StopRequest
from nemo_aligner.serving.protocol import Health, Limits, Scalar
from nemo_aligner.serving.request_queue import ServedScores
from nemo_aligner.serving.server import Server


@dataclass(frozen=True, kw_only=True)
class RewardModelServer:
    """Serves ``model``.

    Args:
        name: of the model, for clients.
        rows: of a forward pass on one data parallel rank.
        multiple: of positions that rows are padded to.
        settings: for clients to compare.
    """

    model: RewardModelInterface
    name: str
    limits: Limits
    rows: int
    multiple: int
    settings: Mapping[str, Scalar]

    def run_server(self, open_server: Callable[[], AbstractContextManager[Server]]) -> None:
        """Serve clients until one of them or a signal ends it. Called by every rank."""
        with StopRequest() as request:
            serve(self, open_server, should_stop=lambda _: request.number != 0)

    def infer(self, batch: TokenBatch) -> ServedScores:
        """See Handler."""

        def ask(mine: TokenBatch, micro: int) -> tuple[Tensor | None, Tensor | None]:
            return self.model.infer(mine, micro_batch_size=micro), None

        return score(batch, ask, rows=self.rows, multiple=self.multiple)

    def health(self) -> Health:
        """See Handler."""
        return Health(
            model=self.name,
            step=0,
            vocab_size=self.limits.vocab_size,
            seq_length=self.limits.seq_length,
            settings=self.settings,
        )
