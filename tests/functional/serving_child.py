# SPDX-License-Identifier: Apache-2.0
"""A server job without a model: sums in the place of a critic's weights, files in the place of its checkpoints.

Usage: serving_child.py IP PORT FOLDER [LIMIT=VALUE ...]
"""

import json
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import torch

from nemo_aligner.batch import TokenBatch
from nemo_aligner.errors import UserError
from nemo_aligner.launch.cli import run_cli
from nemo_aligner.rollout_batch import ValueBatch
from nemo_aligner.run.stop import StopRequest
from nemo_aligner.serving.protocol import Health, Limits, RequestLimits, RequestVersion
from nemo_aligner.serving.request_queue import ServedScores
from nemo_aligner.serving.server import Server, ServerConfig

VOCAB_SIZE, SEQ_LENGTH = 100, 16
UNLUCKY = 13  # the first token of a row that the model fails at
REFUSED = 14
EOS = 99


@dataclass
class Critic:
    folder: Path
    weight: float = 1.0
    step: int = 0
    version: RequestVersion | None = None
    loss: float | None = None

    def __post_init__(self) -> None:
        if saved := sorted(self.folder.glob("*.json")):
            self.load(saved[-1])

    def load(self, path: Path) -> None:
        found = json.loads(path.read_text())
        self.weight, self.step, self.loss = found["weight"], found["step"], found["loss"]
        self.version = RequestVersion(**found["version"])

    def infer(self, batch: TokenBatch) -> ServedScores:
        if (batch.tokens[:, 0] == UNLUCKY).any():
            raise RuntimeError("the model broke")
        if (batch.tokens[:, 0] == REFUSED).any():
            raise UserError("nothing is known of token 14", fix="ask for another")
        time.sleep(0.05)  # so that requests gather behind this one
        rewards = (batch.tokens * batch.loss_mask).sum(1) + self.weight / 8
        return ServedScores(rewards=rewards, values=batch.tokens * self.weight)

    def train(self, batch: ValueBatch, version: RequestVersion | None) -> float:
        self.loss = float(((batch.values - batch.returns) ** 2 * batch.loss_mask).sum() + self.weight)
        self.weight = self.weight * 1.5 + float((batch.returns * batch.loss_mask).sum())
        self.step += 1
        self.version = version
        return self.loss

    def save(self, version: RequestVersion | None) -> None:
        assert version is None or version.sequence == self.health().sequence
        saved = {"weight": self.weight, "step": self.step, "loss": self.loss}
        if self.version:
            known = {
                "run_id": self.version.run_id,
                "step": self.version.step,
                "sequence": self.version.sequence,
            }
            path = self.folder / f"{self.version.sequence:04}.json"
            path.write_text(json.dumps(saved | {"version": known}))

    def roll_back(self, version: RequestVersion) -> None:
        path = self.folder / f"{version.sequence:04}.json"
        if not path.exists():
            raise UserError(
                f"no checkpoint after {version.sequence} train requests", fix="start both jobs again"
            )
        self.load(path)

    def health(self) -> Health:
        return Health(
            model="toy",
            step=self.step,
            vocab_size=VOCAB_SIZE,
            seq_length=SEQ_LENGTH,
            settings={"trainer.ppo.inference_micro_batch_size": 8},
            run_id=self.version.run_id if self.version else "",
            sequence=self.version.sequence if self.version else 0,
            last_loss=self.loss,
        )


def encode(text: str, *, append_eos: bool | None = None) -> list[int]:
    return [ord(letter) % VOCAB_SIZE for letter in text] + [EOS] * bool(append_eos)


def main() -> None:
    torch.set_num_threads(1)
    ip, port, folder, *given = sys.argv[1:]
    requests = {name: json.loads(value) for name, _, value in (word.partition("=") for word in given)}
    config = ServerConfig(
        setting="trainer.ppo",
        ip=ip,
        port=int(port),
        infer="critic_infer",
        train="critic_train",
        save="critic_save",
        num_rewards=1,
        has_values=True,
        max_rows=64,
        request_limits=RequestLimits(**requests),
    )
    limits = Limits(vocab_size=VOCAB_SIZE, seq_length=SEQ_LENGTH)
    with StopRequest() as stop, Server(config, limits, encode=encode) as server:
        server.serve(Critic(Path(folder)), should_stop=lambda: stop.number != 0)


if __name__ == "__main__":
    run_cli(main)
