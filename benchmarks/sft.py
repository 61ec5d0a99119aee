# SPDX-License-Identifier: Apache-2.0
"""A step of supervised fine-tuning: ours beside TRL's trainer and a plain torch loop.

All sides train the model and the shape of peers/trl_common.py from random weights. `python -m benchmarks.sft` is our
side alone, in this process; `python -m benchmarks.run sft` alternates all of them.
"""

import argparse
import importlib.metadata
import os
import resource
import time
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import nn

from benchmarks import matmul
from benchmarks.figures import Figure, Part, ratio
from benchmarks.processes import ALLOCATORS, PEERS, THREADS, Measured, Side, conditions, run_side
from nemo_aligner.batch import TokenBatch
from nemo_aligner.data.collate import collate
from nemo_aligner.data.sample import Sample
from nemo_aligner.models.gpt.config import GPTConfig
from nemo_aligner.models.gpt.learning_rate import OptimConfig, SchedConfig
from nemo_aligner.models.gpt.model import build_gpt
from nemo_aligner.models.gpt.policy import GPTPolicy
from nemo_aligner.objectives.nll import NLL
from nemo_aligner.parallel import world
from nemo_aligner.parallel.ranks import Layout

__all__ = ["OPTIM", "SHAPE", "Shape", "part", "random_policy", "rows"]

REPEATS = 3
OURS, OURS_PART, PLAIN, TRL = "NeMo-Aligner", "NeMo-Aligner, a quarter learned", "plain torch loop", "TRL"
SIDES = (
    Side(name=PLAIN, command=(str(PEERS / "plain_torch_sft.py"),), peer=True),
    Side(name=OURS, command=("-m", "benchmarks.sft"), peer=False),
    Side(name=TRL, command=(str(PEERS / "trl_sft.py"),), peer=True),
    Side(name=OURS_PART, command=("-m", "benchmarks.sft", "--learned", "0.25"), peer=False),
)
SPEED = "tokens/s"


MODEL = GPTConfig(
    num_layers=4,
    hidden_size=256,
    ffn_hidden_size=688,
    num_attention_heads=4,
    num_query_groups=2,
    vocab_size=32000,
    encoder_seq_length=256,
    max_position_embeddings=1024,
    normalization="rmsnorm",
    layernorm_epsilon=1e-6,
    activation="fast-swiglu",
    bias=False,
    position_embedding_type="rope",
    share_embeddings_and_output_weights=False,
    precision="32",
)


@dataclass(frozen=True, kw_only=True)
class Shape:
    """The run that peers/trl_common.py describes."""

    rows: int = 8  # of one step, in one micro-batch
    length: int = 256  # tokens of a row, none of them padding
    warm_up: int = 3  # steps before the clock starts
    measured: int = 10
    first_word: int = 4  # ids below it are special
    model: GPTConfig = MODEL

    @property
    def tokens(self) -> int:
        """Tokens of a step: every position that is not padding, whether it is learned or not."""
        return self.rows * self.length

    def flops(self, learned: int) -> int:
        """Multiplications and additions of a step that learns ``learned`` tokens of each row, without recomputing.

        Two per weight in the forward and four in the backward, for each token that passes it; the head sees learned
        tokens only; attention's two products count the half of their squares that is visible.
        """
        gpt = self.model
        keys = gpt.query_groups * gpt.head_dim
        attention = 2 * gpt.hidden_size**2 + 2 * gpt.hidden_size * keys
        layer = attention + 3 * gpt.hidden_size * gpt.ffn_hidden_size
        pairs = self.length**2 // 2
        in_layers = 6 * gpt.num_layers * (self.length * layer + 2 * pairs * gpt.hidden_size)
        return self.rows * (in_layers + 6 * learned * gpt.hidden_size * gpt.vocab_size)


SHAPE = Shape()
# Both peers: AdamW with torch's defaults, gradients clipped at 1.
OPTIM = OptimConfig(
    lr=1e-4, weight_decay=0.01, betas=(0.9, 0.999), sched=SchedConfig(name="constant", warmup_steps=0)
)


def random_policy(shape: Shape, optim: OptimConfig) -> GPTPolicy:
    """The model with random weights, ready to train; the world must stand."""
    model = build_gpt(shape.model, Layout(), torch.float32)
    _draw(model, shape.model.init_method_std)
    policy = GPTPolicy(model)
    policy.prepare_training(optim, clip_grad=1.0, max_steps=shape.warm_up + shape.measured)
    return policy


@torch.no_grad()
def _draw(model: nn.Module, std: float) -> None:
    for weight in model.parameters():
        if weight.ndim > 1:
            weight.normal_(0, std)


def rows(shape: Shape, *, learned: int) -> Iterator[TokenBatch]:
    """Micro-batches of random words, of which each row's last ``learned`` are learned."""
    draw = torch.Generator().manual_seed(0)
    mask = [position >= shape.length - learned for position in range(shape.length)]
    while True:
        words = torch.randint(
            shape.first_word, shape.model.vocab_size, (shape.rows, shape.length), generator=draw
        )
        samples = [Sample(tokens=row, mask=mask, truncated=False) for row in words.tolist()]
        yield collate(samples, pad_id=0, seq_length=shape.length)


def train(shape: Shape, *, learned: int) -> str:
    """Train as SupervisedTrainer does, and tell of it in the peers' form."""
    batches = rows(shape, learned=learned)
    with world.ensure_single_process():
        policy = random_policy(shape, OPTIM)

        def steps(count: int) -> float:
            started = time.perf_counter()
            for _ in range(count):
                batch = next(batches)
                assert int(batch.lengths.sum()) == shape.tokens
                policy.get_loss_and_metrics([batch], NLL(), forward_only=False)
                policy.optimizer_step()
            return time.perf_counter() - started

        steps(shape.warm_up)
        before = resource.getrusage(resource.RUSAGE_SELF)
        seconds = steps(shape.measured)
        after = resource.getrusage(resource.RUSAGE_SELF)
    user, system, faults = (
        (getattr(after, name) - getattr(before, name)) / shape.measured
        for name in ("ru_utime", "ru_stime", "ru_minflt")
    )
    return (
        f"RESULT nemo_aligner: {shape.tokens * shape.measured / seconds:.1f} tok/s "
        f"| {seconds / shape.measured * 1e3:.1f} ms/step mean "
        f"| cpu/step user {user:.2f}s sys {system:.2f}s minflt {faults:.0f} | {shape.tokens} tok/step "
        f"| peakRSS {after.ru_maxrss / 2**20:.2f} GiB | load {os.getloadavg()[0]:.2f}"
    )


def part() -> Part:
    """All sides in turn, with either allocator, several times over."""
    peaks: list[float] = []
    found: dict[tuple[str, str], list[Measured]] = {}
    for repeat in range(REPEATS):
        peaks.append(matmul.peak())
        for allocator in ALLOCATORS:
            for side in SIDES:
                one = run_side(side, allocator)
                found.setdefault((side.name, allocator), []).append(one)
                print(
                    f"sft: repeat {repeat + 1} of {REPEATS}, {side.name}, {allocator}: "
                    f"{SHAPE.tokens / one.seconds_per_step:.0f} tokens/s, load {os.getloadavg()[0]:.2f}",
                    flush=True,
                )
    return Part(
        title="Supervised fine-tuning",
        about=ABOUT,
        conditions=conditions()
        | {
            "torch": importlib.metadata.version("torch"),
            "repeats": str(REPEATS),
            "GFLOP of a step": f"{SHAPE.flops(_learned(1)) / 1e9:.0f} fully learned, "
            f"{SHAPE.flops(_learned(0.25)) / 1e9:.0f} with a quarter learned",
        },
        figures=_figures(found, peaks),
    )


ABOUT = """\
A random Llama of 19.3 M parameters (hidden 256, 4 layers, 4 heads, 2 key/value heads, feed-forward 688, vocabulary
32000) learns rows of 256 tokens, 8 rows a step in one micro-batch, in fp32 with AdamW and gradients clipped at 1; 3
steps of warm-up, 10 measured. The sides take turns: a plain torch loop around transformers' model, ours, TRL
1.16.0's SFTTrainer, and ours with only the last quarter of each row learned, as where prompts are not. The scripts
of TRL and of the loop are in [benchmarks/peers](/benchmarks/peers), ours is [sft.py](/benchmarks/sft.py).

Tokens are positions that are not padding, learned or not, for every side. The keeping allocator is glibc's with
`MALLOC_MMAP_THRESHOLD_`, `MALLOC_TRIM_THRESHOLD_` and `MALLOC_TOP_PAD_` set so that freed memory stays with the
process. Ratios are between sides with the same allocator. The share of the matmul peak is the model's operations,
counted by `Shape.flops` in sft.py, per second, over those of a 2048 x 2048 x 2048 product measured in the same
repeat; the head's work counts for learned tokens only.
"""


def _learned(share: float) -> int:
    """Tokens of a row that are learned; nothing predicts the first one."""
    return min(round(SHAPE.length * share), SHAPE.length - 1)


def _figures(found: dict[tuple[str, str], list[Measured]], peaks: list[float]) -> tuple[Figure, ...]:
    figures = [
        Figure(table="The machine", subject="fp32 matmul", metric="GFLOP/s", values=tuple(peaks)),
    ]
    by_name: dict[tuple[str, str, str], Figure] = {}
    for (side, allocator), measured in found.items():
        work = SHAPE.flops(_learned(0.25 if side == OURS_PART else 1))
        values = {
            SPEED: [SHAPE.tokens / one.seconds_per_step for one in measured],
            "peak RSS in GiB": [one.peak_gib for one in measured],
            "CPU seconds per step": [one.cpu_seconds_per_step for one in measured],
            "page faults per step": [one.page_faults_per_step for one in measured],
            "share of the matmul peak": [
                work / one.seconds_per_step / peak / 1e9 for one, peak in zip(measured, peaks, strict=True)
            ],
        }
        for metric, each in values.items():
            figure = Figure(table=allocator.capitalize(), subject=side, metric=metric, values=tuple(each))
            by_name[side, allocator, metric] = figure
            figures.append(figure)
    for allocator in ALLOCATORS:
        for ours, theirs in ((OURS, PLAIN), (OURS, TRL), (OURS_PART, PLAIN), (OURS_PART, TRL)):
            for metric in (SPEED, "peak RSS in GiB", "CPU seconds per step"):
                top, bottom = by_name[ours, allocator, metric], by_name[theirs, allocator, metric]
                figures.append(ratio("Ratios", f"{ours} / {theirs}, {allocator}", top, bottom))
    return tuple(figures)


def main() -> None:
    """Our side alone: print its RESULT line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--learned", type=float, default=1.0, help="share of each row that is learned [1.0]")
    options = parser.parse_args()
    torch.set_num_threads(THREADS)
    print(train(SHAPE, learned=_learned(options.learned)))


if __name__ == "__main__":
    main()
