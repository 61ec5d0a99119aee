# SPDX-License-Identifier: Apache-2.0
"""Asks a critic and a reward model in other jobs. Replies come as futures, so that an actor works on.

A critic that is started again is trained on fewer rollouts than its actor has sent. The client keeps those since
the last pair of checkpoints and sends them once more, so that each reply is that of the undisturbed run.
"""

import contextlib
import io
import logging
import os
import threading
from collections.abc import Callable, Mapping
from concurrent.futures import Future, wait
from dataclasses import dataclass
from typing import Any, Self, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from nemo_aligner.batch import TokenBatch
from nemo_aligner.errors import UserError
from nemo_aligner.rollout_batch import ValueBatch
from nemo_aligner.serving import wire
from nemo_aligner.serving.http_client import HttpClient, ServerAddress, WorkerPool
from nemo_aligner.serving.protocol import Health, Refusal, RequestVersion

logger = logging.getLogger(__name__)

T = TypeVar("T")

NUM_ASKING = 4  # requests to infer that are under way at once
PING_SECONDS = 30.0  # between two signs of life to a critic that has nothing to do


@dataclass(frozen=True, kw_only=True)
class CriticNames:
    """Endpoints of a critic, as its job names them."""

    infer: str = "critic_infer"
    train: str = "critic_train"
    save: str = "critic_save"
    gives_rewards: bool = True  # whether infer's reply must have rewards; else they count as 0


class _Client:
    """The common part of both clients: HTTP calls, threads that wait for replies, health and stop."""

    def __init__(
        self, remote: ServerAddress, *, pad_to_length: int | None, environ: Mapping[str, str]
    ) -> None:
        self._http = HttpClient(remote, environ=environ)
        self._asking = WorkerPool(f"ask-{remote.port}", workers=NUM_ASKING)
        self._pad_to_length = pad_to_length

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """End the threads and their waits."""
        self._http.close()
        self._asking.close()

    def health(self) -> Health:
        """Ask for the server's state; wait for a server that is not up yet.

        Raises:
            UserError: it did not come up in time, or speaks another version of the protocol.
        """
        return wire.read_health(self._http.call(wire.HEALTH, wire.save_arrays()))

    @property
    def name(self) -> str:
        """The server, for messages."""
        return self._http.name

    def submit(self, call: Callable[[], T]) -> Future[T]:
        """``call``'s result, from a thread of this client's."""
        return self._asking.submit(call)

    def stop(self) -> bool:
        """Ask the server to end; True if it replied."""
        return self._http.call_once(wire.STOP, wire.save_arrays())

    def _infer_arrays(self, batch: TokenBatch, version: RequestVersion | None) -> dict[str, NDArray[Any]]:
        if self._pad_to_length is not None and batch.seq_length > self._pad_to_length:
            section = self._http.remote.setting.rpartition(".")[0]
            raise UserError(
                f"{section}.pad_to_length={self._pad_to_length} is less than the {batch.seq_length} tokens of a batch",
                fix=f"set {section}.pad_to_length={batch.seq_length} or more, or null",
            )
        return wire.infer_arrays(batch, pad_to_length=self._pad_to_length, version=version)


class RemoteReward(_Client):
    """A reward model in another job.

    Args:
        name: of its endpoint.
        pad_to_length: columns that each request is padded to; None sends the batch's.
    """

    def __init__(
        self,
        remote: ServerAddress,
        *,
        name: str = "reward_model",
        pad_to_length: int | None = None,
        environ: Mapping[str, str] = os.environ,
    ) -> None:
        super().__init__(remote, pad_to_length=pad_to_length, environ=environ)
        self._name = name

    def infer(self, batch: TokenBatch, *, version: RequestVersion | None = None) -> Future[Tensor]:
        """Rewards [B], or [B, A] of a model with several attributes. With a version the rows are scored by themselves.

        Raises:
            UserError: in the future's result.
        """
        arrays = self._infer_arrays(batch, version)

        def ask() -> Tensor:
            rewards, _ = wire.read_infer_reply(self._http.call(self._name, arrays), batch)
            if rewards is None:
                raise UserError(f"{self._http.name} gives no rewards", fix="serve a reward model there")
            return rewards

        return self._asking.submit(ask)


@dataclass(kw_only=True)
class _TrainRequest:
    """A train request that a critic which comes back may have to be sent again."""

    arrays: dict[str, NDArray[Any]]
    loss: float | None = None


class RemoteCritic(_Client):
    """A critic in another job, and the reward model beside it or in a third.

    Args:
        reward: the reward model where it has a job of its own; None: the critic's job gives rewards too.
        run_id: of the actor's run. Its requests are computed as they are composed, by weights that are trained on
            exactly the rollouts sent before.
        sequence: train requests of that run that the actor's checkpoint knows of.
    """

    def __init__(
        self,
        remote: ServerAddress,
        *,
        run_id: str,
        names: CriticNames | None = None,
        reward: RemoteReward | None = None,
        pad_to_length: int | None = None,
        sequence: int = 0,
        environ: Mapping[str, str] = os.environ,
    ) -> None:
        super().__init__(remote, pad_to_length=pad_to_length, environ=environ)
        self._names = names or CriticNames()
        self.reward = reward
        self.run_id = run_id
        self._step = 0
        self._training = WorkerPool(f"train-{remote.port}")
        self._asked: list[Future[tuple[Tensor, Tensor]]] = []
        self._train_requests: dict[int, _TrainRequest] = {}
        # Train requests reach the critic in order, whether for the first time or again.
        self._train_lock = threading.RLock()
        self.sequence = sequence
        threading.Thread(target=self._ping, name=f"ping-{remote.port}", daemon=True).start()

    def _ping(self) -> None:
        """Show the critic that its actor lives, however long a rollout takes."""
        # The next call that matters reports a lost connection.
        while not self._http.wait(PING_SECONDS):
            with contextlib.suppress(UserError):
                self._http.call_once(wire.HEALTH, wire.save_arrays())

    def close(self) -> None:
        """End the threads and their waits, those of the reward model too."""
        super().close()
        self._training.close()
        if self.reward:
            self.reward.close()

    def infer_rm_critic(self, batch: TokenBatch) -> Future[tuple[Tensor, Tensor]]:
        """(rewards [B], values [B, S] of the state before each token).

        Raises:
            UserError: in the future's result.
        """
        version = self._version()
        rewards = self.reward.infer(batch, version=version) if self.reward else None
        arrays = self._infer_arrays(batch, version)

        def ask() -> tuple[Tensor, Tensor]:
            own, values = wire.read_infer_reply(
                self._call(self._names.infer, arrays, needed=version.sequence), batch
            )
            found = rewards.result() if rewards else own
            if not self._names.gives_rewards:
                found = torch.zeros(batch.num_rows)
            if found is None or values is None:
                missing = "rewards" if found is None else "values"
                raise UserError(
                    f"{self._http.name} gives no {missing}",
                    fix="set combine_rm_and_critic_server alike in both jobs",
                )
            return found, values

        asked = self._asking.submit(ask)
        self._asked = [*(future for future in self._asked if not future.done()), asked]
        return asked

    def train(self, batch: ValueBatch, *, step: int) -> Future[float]:
        """The critic's loss on a rollout of the actor's ``step``.

        The critic trains on it once, after the requests before it.

        Raises:
            UserError: in the future's result; what the critic failed at is in its message.
        """
        self.sequence += 1
        self._step = step
        self._train_requests[self.sequence] = _TrainRequest(arrays=wire.train_arrays(batch, self._version()))
        return self.last_loss()

    def last_loss(self) -> Future[float]:
        """The critic's loss on the last train request, which is sent if the critic has not learned from it.

        Raises:
            UserError: in the future's result; what the critic failed at is in its message.
        """
        number, asked_before = self.sequence, self._asked
        request = self._train_requests[number]

        def train_critic() -> float:
            wait(asked_before)
            with self._train_lock:
                if request.loss is None:
                    reply = self._call(self._names.train, request.arrays, needed=number - 1)
                    request.loss = wire.read_loss(reply)
                return request.loss

        return self._training.submit(train_critic)

    def save(self) -> Future[None]:
        """Have the critic saved, with all that it was sent before."""
        version = self._version()

        def ask() -> None:
            self._call(self._names.save, wire.save_arrays(version), needed=version.sequence)

        return self._training.submit(ask)

    def committed(self, sequence: int) -> None:
        """The pair of checkpoints with ``sequence`` train requests is complete: neither job starts from before it."""
        for number in [number for number in self._train_requests if number <= sequence]:
            del self._train_requests[number]

    def pending_train_requests(self) -> bytes:
        """The train requests that no pair of checkpoints holds, for a checkpoint that the critic has no part in."""
        arrays = {
            f"{number}/{name}": array
            for number, request in self._train_requests.items()
            for name, array in request.arrays.items()
            if name != "run_id"
        }
        file = io.BytesIO()
        np.savez(file, **arrays)
        return file.getvalue()

    def restore(self, requests: bytes) -> None:
        """Take over what :meth:`pending_train_requests` gave."""
        self._train_requests = _read_train_requests(requests, self.run_id)

    def _version(self) -> RequestVersion:
        return RequestVersion(run_id=self.run_id, step=self._step, sequence=self.sequence)

    def _call(self, endpoint: str, arrays: wire.Arrays, *, needed: int) -> dict[str, NDArray[np.generic]]:
        """A call whose reply is that of weights that are trained on ``needed`` train requests."""
        while True:
            try:
                return self._http.call(endpoint, arrays)
            except Refusal as stale:
                self._replay(needed, stale.message)

    def _replay(self, needed: int, reason: str) -> None:
        """Send a critic that came back what it misses.

        Raises:
            UserError: it misses more than is kept here.
        """
        with self._train_lock:
            known = self.health().sequence
            requests = [self._train_requests.get(number) for number in range(known + 1, needed + 1)]
            if None in requests:
                raise UserError(
                    f"{self.name} is behind this actor: {reason}",
                    fix="let both jobs go on from the same pair of checkpoints, or start both anew in new folders",
                )
            if requests:
                logger.info("%s has come back at train request %d of %d", self.name, known, needed)
            try:
                for request in filter(None, requests):
                    request.loss = wire.read_loss(self._http.call(self._names.train, request.arrays))
            except Refusal as stale:
                logger.info("%s has come back once more: %s", self.name, stale.message)


def _read_train_requests(content: bytes, run_id: str) -> dict[int, _TrainRequest]:
    requests: dict[int, _TrainRequest] = {}
    with np.load(io.BytesIO(content), allow_pickle=False) as arrays:
        for key in arrays.files:
            number, _, name = key.partition("/")
            request = requests.setdefault(int(number), _TrainRequest(arrays={}))
            request.arrays[name] = arrays[key]
    for request in requests.values():
        request.arrays["run_id"] = np.full((1,), run_id.encode(), dtype=np.object_)
    return requests
