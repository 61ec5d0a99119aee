# SPDX-License-Identifier: Apache-2.0
"""Round trips of the real server: a client of ours asks a reward model in another process, beside the same in process.

`python -m benchmarks.serving NAME PORT` is the server; `python -m benchmarks.run server` starts it and asks.
"""

import argparse
import importlib.metadata
import json
import math
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch

from benchmarks import sft
from benchmarks.figures import Figure, Part
from benchmarks.processes import ALLOCATORS, THREADS, conditions, started, wait_for
from nemo_aligner.algorithms.reward_server import RewardModelServer
from nemo_aligner.batch import TokenBatch
from nemo_aligner.launch.job_group import free_ports
from nemo_aligner.models.gpt.config import GPTConfig
from nemo_aligner.models.gpt.critic import GPTCritic
from nemo_aligner.models.gpt.heads import HeadConfig
from nemo_aligner.parallel import world
from nemo_aligner.serving.client import RemoteReward, ServerAddress
from nemo_aligner.serving.protocol import Limits
from nemo_aligner.serving.request_queue import ServedScores
from nemo_aligner.serving.server import Server, ServerConfig

__all__ = ["MODELS", "Asked", "Measured", "Served", "batch", "figures_of", "part", "round_trips"]

REPEATS = 3
CLIENTS = 8
START_SECONDS, REPLY_SECONDS, END_SECONDS = 180, 120, 60
FAST_SHARE = 0.9  # of the requests, which the slowest of them bounds


@dataclass(frozen=True, kw_only=True)
class Asked:
    """A request of one size."""

    rows: int
    tokens: int  # of each row
    times: int  # asked by one client
    times_of_each: int = 0  # asked by each of CLIENTS at once; 0: that is not measured

    @property
    def name(self) -> str:
        """As on the page."""
        return f"{self.rows} x {self.tokens}"


@dataclass(frozen=True, kw_only=True)
class Served:
    """A reward model with random weights, and what it is asked."""

    model: GPTConfig
    asked: tuple[Asked, ...]


TINY, SMOLLM2 = "a tiny model", "SmolLM2 135M's shape"
MODELS: Mapping[str, Served] = {
    TINY: Served(
        model=replace(sft.MODEL, num_layers=1, hidden_size=32, ffn_hidden_size=64, encoder_seq_length=512),
        asked=(
            Asked(rows=1, tokens=16, times=50, times_of_each=20),
            Asked(rows=64, tokens=512, times=8, times_of_each=1),
        ),
    ),
    SMOLLM2: Served(
        model=replace(
            sft.MODEL,
            num_layers=30,
            hidden_size=576,
            ffn_hidden_size=1536,
            num_attention_heads=9,
            num_query_groups=3,
            vocab_size=49152,
        ),
        asked=(Asked(rows=4, tokens=128, times=4),),
    ),
}


def batch(model: GPTConfig, asked: Asked) -> TokenBatch:
    """Random words, none of them padding."""
    draw = torch.Generator().manual_seed(0)
    shape = (asked.rows, asked.tokens)
    return TokenBatch(
        tokens=torch.randint(model.vocab_size, shape, generator=draw),
        loss_mask=torch.ones(shape, dtype=torch.bool),
        lengths=torch.full((asked.rows,), asked.tokens),
    )


def times_in_ms(call: Callable[[], object], count: int) -> list[float]:
    """Of each call, after one that is not counted."""
    call()
    found = []
    for _ in range(count):
        started_at = time.perf_counter()
        call()
        found.append((time.perf_counter() - started_at) * 1e3)
    return found


@dataclass(frozen=True, kw_only=True)
class Watched(RewardModelServer):
    """A server that notes how long it computes."""

    computing: dict[str, list[float]] = field(default_factory=dict)  # ms of each request, by its size

    def infer(self, batch: TokenBatch) -> ServedScores:
        """See Handler."""
        began = time.perf_counter()
        scores = super().infer(batch)
        size = f"{batch.num_rows} x {batch.seq_length}"
        self.computing.setdefault(size, []).append((time.perf_counter() - began) * 1e3)
        return scores


def serve(served: Served, port: int) -> dict[str, dict[str, list[float]]]:
    """Judge in this process, then serve until a client ends it.

    Returns:
        "alone" and "serving": ms of each request by its size, the first one of each size included.
    """
    limits = Limits(vocab_size=served.model.vocab_size, seq_length=served.model.encoder_seq_length)
    config = ServerConfig(
        setting="inference",
        ip="127.0.0.1",
        port=port,
        infer="reward_model",
        num_rewards=1,
        has_values=False,
        max_rows=max(asked.rows for asked in served.asked),
    )
    head = HeadConfig()
    with world.ensure_single_process():
        server = Watched(
            model=GPTCritic(sft.random_model(served.model, head=head), head=head),
            name="random",
            limits=limits,
            rows=config.max_rows,
            multiple=1,
            settings={},
        )
        for asked in served.asked:
            rows = batch(served.model, asked)
            for _ in range(1 + asked.times):
                server.infer(rows)
        alone = dict(server.computing)
        server.computing.clear()
        server.run_server(lambda: Server(config, limits))
    return {"alone": alone, "serving": server.computing}


def client(port: int) -> RemoteReward:
    """Of the server on this machine."""
    return RemoteReward(
        ServerAddress(
            setting="server",
            job="benchmarks.serving",
            ip="127.0.0.1",
            port=port,
            start_seconds=START_SECONDS,
            return_seconds=10,
            timeout_seconds=REPLY_SECONDS,
        )
    )


@dataclass(frozen=True, kw_only=True)
class Measured:
    """Of one size of request, with one server."""

    round_trips: Sequence[float]  # ms of each
    computing: Sequence[float]  # ms of them that the server's process computed
    alone: Sequence[float]  # ms of the same computation before it served
    per_second: float | None  # requests that CLIENTS get answered; None: not measured

    @property
    def overhead(self) -> list[float]:
        """Ms of each round trip in which its rewards were not computed."""
        return [trip - own for trip, own in zip(self.round_trips, self.computing, strict=True)]


def round_trips(name: str, folder: Path, *, allocator: str) -> dict[str, Measured]:
    """By the request's name, of a server that is started for it.

    Args:
        name: of :data:`MODELS`.
        folder: to be made, for what the server prints.
    """
    port, served = free_ports(1)[0], MODELS[name]
    command = ("-m", "benchmarks.serving", name, str(port))
    trips: dict[str, list[float]] = {}
    rates: dict[str, float | None] = {}
    with started(command, folder, allocator=allocator) as job:
        with client(port) as remote:
            _wait_until_up(remote, job.check)
            for asked in served.asked:
                rows = batch(served.model, asked)
                trips[asked.name] = times_in_ms(lambda rows=rows: remote.infer(rows).result(), asked.times)
                rates[asked.name] = _per_second(port, rows, asked) if asked.times_of_each else None
            remote.stop()
        wait_for([job], seconds=END_SECONDS)
        told = json.loads(job.out)
    return {
        asked.name: Measured(
            round_trips=trips[asked.name],
            # Of one client's, which came first.
            computing=told["serving"][asked.name][1 : 1 + asked.times],
            alone=told["alone"][asked.name][1:],
            per_second=rates[asked.name],
        )
        for asked in served.asked
    }


def _wait_until_up(remote: RemoteReward, check: Callable[[], None]) -> None:
    with ThreadPoolExecutor(1) as thread:
        health = thread.submit(remote.health)
        while not health.done():
            check()
            time.sleep(0.1)
        health.result()


def _per_second(port: int, rows: TokenBatch, asked: Asked) -> float:
    """Requests that several clients get answered in a second, each of which asks again when it has its reply."""
    remotes = [client(port) for _ in range(CLIENTS)]

    def ask(remote: RemoteReward) -> None:
        for _ in range(asked.times_of_each):
            remote.infer(rows).result()

    with ThreadPoolExecutor(CLIENTS) as threads:
        list(threads.map(RemoteReward.health, remotes))
        began = time.perf_counter()
        list(threads.map(ask, remotes))
        seconds = time.perf_counter() - began
    for remote in remotes:
        remote.close()
    return CLIENTS * asked.times_of_each / seconds


def part() -> Part:
    """Each model's server in turn, with either allocator, several times over."""
    found: dict[tuple[str, str], list[dict[str, Measured]]] = {}
    with tempfile.TemporaryDirectory() as folder:
        for repeat in range(REPEATS):
            for allocator in ALLOCATORS:
                for name in MODELS:
                    began = time.perf_counter()
                    one = round_trips(
                        name, Path(folder) / f"server{len(os.listdir(folder))}", allocator=allocator
                    )
                    found.setdefault((name, allocator), []).append(one)
                    print(
                        f"server: repeat {repeat + 1} of {REPEATS}, {name}, {allocator}: "
                        f"{time.perf_counter() - began:.0f} s, load {os.getloadavg()[0]:.2f}",
                        flush=True,
                    )
    return Part(
        title="The server",
        about=ABOUT,
        conditions=conditions()
        | {name: importlib.metadata.version(name) for name in ("torch", "nvidia-pytriton")}
        | {
            "repeats": str(REPEATS),
            "requests of a repeat": ", ".join(
                f"{asked.times} of {asked.name}" for served in MODELS.values() for asked in served.asked
            ),
        },
        figures=figures_of(found),
    )


_TINY, _LARGE = MODELS[TINY].model, MODELS[SMOLLM2].model
ABOUT = f"""\
A reward model with random weights in a process of its own, behind the server that serve_reward_model.py starts, asked
over HTTP on the same machine for the rewards of rows x tokens random tokens, none of them padding. The tiny model has
{_TINY.num_layers} layer of hidden size {_TINY.hidden_size}; SmolLM2's shape has {_LARGE.num_layers} layers of
{_LARGE.hidden_size}, {_LARGE.num_attention_heads} heads, {_LARGE.num_query_groups} key/value heads, feed-forward
{_LARGE.ffn_hidden_size} and vocabulary {_LARGE.vocab_size}. A repeat starts the server anew, and its figure is the
median over the requests of one client, which waits for each reply.

Computing is what the server's process does for those requests between having their tokens and having the rewards; the
overhead is the rest of each round trip. Its first {ServerConfig.linger_seconds * 1e3:g} ms are the time that a
request waits for others to be computed with. Alone is the same computation in the same process before it serves. With
{CLIENTS} clients, each asks again as soon as it is answered. The script is [serving.py](/benchmarks/serving.py).
"""


def figures_of(found: Mapping[tuple[str, str], Sequence[Mapping[str, Measured]]]) -> tuple[Figure, ...]:
    """Of each model's name and each allocator's: one per repeat."""
    figures: list[Figure] = []
    for (name, allocator), repeats in found.items():
        for size in repeats[0]:
            of = [repeat[size] for repeat in repeats]
            values = {
                "ms per request": [statistics.median(one.round_trips) for one in of],
                f"ms within which {FAST_SHARE:.0%} are answered": [_slowest(one.round_trips) for one in of],
                "ms computing": [statistics.median(one.computing) for one in of],
                "ms computing alone": [statistics.median(one.alone) for one in of],
                "overhead in ms": [statistics.median(one.overhead) for one in of],
                "overhead as a share of the round trip": [
                    statistics.median(one.overhead) / statistics.median(one.round_trips) for one in of
                ],
                f"requests/s with {CLIENTS} clients": [
                    one.per_second for one in of if one.per_second is not None
                ],
            }
            figures += [
                Figure(
                    table=allocator.capitalize(), subject=f"{size}, {name}", metric=metric, values=tuple(each)
                )
                for metric, each in values.items()
                if each
            ]
    return tuple(figures)


def _slowest(values: Sequence[float]) -> float:
    """Of the fastest FAST_SHARE."""
    return sorted(values)[math.ceil(FAST_SHARE * len(values)) - 1]


def main() -> None:
    """The server."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("name", choices=MODELS, help="of the model")
    parser.add_argument("port", type=int, help="to listen at, on 127.0.0.1")
    options = parser.parse_args()
    torch.set_num_threads(THREADS)
    print(json.dumps(serve(MODELS[options.name], options.port)))


if __name__ == "__main__":
    main()
