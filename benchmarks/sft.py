# SPDX-License-Identifier: Apache-2.0
"""A step of supervised fine-tuning: ours beside TRL's trainer and a plain torch loop.

All sides train the model and the shape of peers/trl_common.py from random weights. `python -m benchmarks.sft` is our
side alone, in this process; `python -m benchmarks.run sft` alternates all of them.
"""

import argparse
import importlib.metadata
from collections.abc import Iterator
from dataclasses import dataclass

import torch

from benchmarks.figures import Figure, Part
from benchmarks.processes import ALLOCATORS, PEERS, THREADS, Side, conditions
from benchmarks.training_step import REPEATS, Found, alternated, ratios, sides_figures, timed
from nemo_aligner.batch import TokenBatch
from nemo_aligner.data.collate import collate
from nemo_aligner.data.row import Row, TokenSequence
from nemo_aligner.models.gpt.config import GPTConfig
from nemo_aligner.models.gpt.heads import HeadConfig
from nemo_aligner.models.gpt.learning_rate import OptimConfig, SchedConfig
from nemo_aligner.models.gpt.model import GPT, build_gpt
from nemo_aligner.models.gpt.policy import GPTPolicy
from nemo_aligner.objectives.nll import NLL
from nemo_aligner.parallel import world
from nemo_aligner.parallel.ranks import Layout

__all__ = ["OPTIM", "SHAPE", "Shape", "part", "random_model", "random_policy", "rows"]

OURS, OURS_PART, PLAIN, TRL = "NeMo-Aligner", "NeMo-Aligner, a quarter learned", "plain torch loop", "TRL"
SIDES = (
    Side(name=PLAIN, command=(str(PEERS / "plain_torch_sft.py"),), peer=True),
    Side(name=OURS, command=("-m", "benchmarks.sft"), peer=False),
    Side(name=TRL, command=(str(PEERS / "trl_sft.py"),), peer=True),
    Side(name=OURS_PART, command=("-m", "benchmarks.sft", "--learned", "0.25"), peer=False),
)

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

    def flops(self, learned: int, *, read: int | None = None) -> int:
        """Multiplications and additions of a step that learns ``learned`` tokens of each row, without recomputing.

        Two per weight in the forward and four in the backward, for each token that passes it; the head sees learned
        tokens only; attention's two products count the half of their squares that is visible.

        Args:
            read: positions of each row that the last layer's MLP is computed for; all by default.
        """
        gpt = self.model
        keys = gpt.query_groups * gpt.head_dim
        attention = 2 * gpt.hidden_size**2 + 2 * gpt.hidden_size * keys
        mlp = 3 * gpt.hidden_size * gpt.ffn_hidden_size
        layer = attention + mlp
        pairs = self.length**2 // 2
        in_layers = 6 * gpt.num_layers * (self.length * layer + 2 * pairs * gpt.hidden_size)
        left_out = 0 if read is None else 6 * (self.length - read) * mlp
        return self.rows * (in_layers - left_out + 6 * learned * gpt.hidden_size * gpt.vocab_size)


SHAPE = Shape()
# Both peers: AdamW with torch's defaults, gradients clipped at 1.
OPTIM = OptimConfig(
    lr=1e-4, weight_decay=0.01, betas=(0.9, 0.999), sched=SchedConfig(name="constant", warmup_steps=0)
)


def random_policy(shape: Shape, optim: OptimConfig) -> GPTPolicy:
    """The model with random weights, ready to train; the world must stand."""
    policy = GPTPolicy(random_model(shape.model))
    policy.prepare_training(optim, clip_grad=1.0, max_steps=shape.warm_up + shape.measured)
    return policy


@torch.no_grad()
def random_model(gpt: GPTConfig, *, head: HeadConfig | None = None) -> GPT:
    """With random weights in fp32; the world must stand.

    Args:
        head: of a reward model; None: a language model.
    """
    model = build_gpt(gpt, Layout(), torch.float32, head=head)
    assert isinstance(model, GPT)
    for weight in model.parameters():
        if weight.ndim > 1:
            weight.normal_(0, gpt.init_method_std)
    return model


def rows(shape: Shape, *, learned: int) -> Iterator[TokenBatch]:
    """Micro-batches of random words, of which each row's last ``learned`` are learned."""
    draw = torch.Generator().manual_seed(0)
    mask = [position >= shape.length - learned for position in range(shape.length)]
    while True:
        words = torch.randint(
            shape.first_word, shape.model.vocab_size, (shape.rows, shape.length), generator=draw
        )
        samples = [Row(sequences=(TokenSequence(tokens=ids, loss_mask=mask),)) for ids in words.tolist()]
        yield collate(samples, pad_id=0, seq_length=shape.length)


def train(shape: Shape, *, learned: int) -> str:
    """Our side's RESULT line."""
    with world.ensure_single_process():
        return timed(
            random_policy(shape, OPTIM),
            rows(shape, learned=learned),
            NLL(),
            tokens=shape.tokens,
            warm_up=shape.warm_up,
            measured=shape.measured,
        )


def part() -> Part:
    """All sides in turn."""
    found, peaks = alternated("sft", SIDES, tokens=SHAPE.tokens)
    return Part(
        title="Supervised fine-tuning",
        about=ABOUT,
        conditions=conditions()
        | {
            "torch": importlib.metadata.version("torch"),
            "repeats": str(REPEATS),
            "GFLOP of a step": f"{SHAPE.flops(_learned(1)) / 1e9:.0f} fully learned, "
            f"{_flops_of_a_quarter() / 1e9:.0f} with a quarter learned",
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
process; where they are not set, NeMo-Aligner has glibc keep up to 512 MiB. Ratios are between sides with the same
allocator. The share of the matmul peak is the model's operations, counted by `Shape.flops` in sft.py, per second,
over those of a 2048 x 2048 x 2048 product measured in the same repeat. The head's work counts for learned tokens only,
and so does that of our last layer's MLP where at least a tenth of the positions is not learned: it leaves those out.
"""


def _learned(share: float) -> int:
    """Tokens of a row that are learned; nothing predicts the first one."""
    return min(round(SHAPE.length * share), SHAPE.length - 1)


def _flops_of_a_quarter() -> int:
    learned = _learned(0.25)
    return SHAPE.flops(learned, read=learned)


def _figures(found: Found, peaks: list[float]) -> tuple[Figure, ...]:
    whole = SHAPE.flops(_learned(1))
    flops = {side.name: _flops_of_a_quarter() if side.name == OURS_PART else whole for side in SIDES}
    by_name = sides_figures(found, peaks, tokens=SHAPE.tokens, flops=flops)
    figures = list(by_name.values())
    for allocator in ALLOCATORS:
        for ours, theirs in ((OURS, PLAIN), (OURS, TRL), (OURS_PART, PLAIN), (OURS_PART, TRL)):
            figures += ratios(by_name, ours, theirs, allocator)
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
