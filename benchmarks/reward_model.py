# SPDX-License-Identifier: Apache-2.0
"""A step of a reward model on pairs: ours beside TRL's trainer.

Both sides train the model and the shape of peers/trl_common.py from random weights. `python -m benchmarks.reward_model`
is our side alone, in this process; `python -m benchmarks.run rm` alternates both.
"""

import importlib.metadata
from collections.abc import Iterator
from dataclasses import replace

import torch

from benchmarks.figures import Figure, Part
from benchmarks.processes import PEERS, Side, conditions
from benchmarks.sft import OPTIM, SHAPE, Shape, random_model
from benchmarks.training_step import REPEATS, Found, alternated, limited, print_result, sides_figures, timed
from nemo_aligner.batch import PreferenceBatch
from nemo_aligner.data.collate import collate
from nemo_aligner.data.row import Row, TokenSequence
from nemo_aligner.models.gpt.critic import GPTCritic
from nemo_aligner.models.gpt.heads import HeadConfig
from nemo_aligner.models.gpt.learning_rate import OptimConfig
from nemo_aligner.objectives.reward import BradleyTerry
from nemo_aligner.parallel import world

__all__ = ["PAIRS", "figures_of", "pairs", "part", "random_reward_model", "train"]

# A pair is two rows of the peers' shape.
PAIRS = replace(SHAPE, rows=2 * SHAPE.rows)
FLOOR = 1.2  # of our tokens/s, in TRL's
OURS, TRL = "NeMo-Aligner", "TRL"
SIDES = (
    Side(name=OURS, command=("-m", "benchmarks.reward_model"), peer=False),
    Side(name=TRL, command=(str(PEERS / "trl_rm.py"),), peer=True),
)

# A reward is read at a sequence's last token, so our last layer's MLP is computed for that one.
FLOPS = {OURS: PAIRS.flops(0, read=1), TRL: PAIRS.flops(0)}


def random_reward_model(shape: Shape, optim: OptimConfig) -> GPTCritic:
    """With random weights, ready to train; the world must stand."""
    head = HeadConfig()
    critic = GPTCritic(random_model(shape.model, head=head), head=head)
    critic.prepare_training(optim, clip_grad=1.0, max_steps=shape.warm_up + shape.measured)
    return critic


def pairs(shape: Shape) -> Iterator[PreferenceBatch]:
    """Micro-batches of ``shape.rows / 2`` pairs of random words."""
    draw = torch.Generator().manual_seed(0)
    while True:
        words = torch.randint(
            shape.first_word, shape.model.vocab_size, (shape.rows, shape.length), generator=draw
        ).tolist()
        mask = [False] * (shape.length - 1) + [True]
        texts = [TokenSequence(tokens=ids, loss_mask=mask) for ids in words]
        rows = [Row(sequences=pair) for pair in zip(texts[::2], texts[1::2], strict=True)]
        batch = collate(rows, pad_id=0, seq_length=shape.length)
        assert isinstance(batch, PreferenceBatch)
        yield batch


def train(shape: Shape) -> str:
    """Our side's RESULT line."""
    with world.ensure_single_process():
        return timed(
            random_reward_model(shape, OPTIM),
            pairs(shape),
            BradleyTerry(),
            tokens=shape.tokens,
            warm_up=shape.warm_up,
            measured=shape.measured,
        )


def part() -> Part:
    """Both sides in turn."""
    found, peaks = alternated("rm", SIDES, tokens=PAIRS.tokens)
    return Part(
        title="Reward model",
        about=ABOUT,
        conditions=conditions()
        | {
            "torch": importlib.metadata.version("torch"),
            "repeats": str(REPEATS),
            "GFLOP of a step": f"ours {FLOPS[OURS] / 1e9:.0f}, TRL's {FLOPS[TRL] / 1e9:.0f}",
        },
        figures=figures_of(found, peaks),
    )


ABOUT = f"""\
The model of fine-tuning above with a scalar head in the place of its vocabulary's learns from pairs, in fp32 with
AdamW and gradients clipped at 1: {PAIRS.rows // 2} pairs a step in one micro-batch, two sequences of {PAIRS.length}
tokens each, none of them padding; {PAIRS.warm_up} steps of warm-up, {PAIRS.measured} measured. TRL 1.16.0's
RewardTrainer runs [trl_rm.py](/benchmarks/peers/trl_rm.py), ours [reward_model.py](/benchmarks/reward_model.py), in
turns. Our last layer's MLP is computed for each sequence's last token only, at which the reward is read: of four layers
that spares a sixth of the step's operations, of thirty it would spare a fortieth. Tokens, allocators and the share of
the matmul peak are counted as above. "At least" is the ratio that ours is to reach.
"""


def figures_of(found: Found, peaks: list[float]) -> tuple[Figure, ...]:
    """Both sides', and their ratios."""
    by_name = sides_figures(found, peaks, tokens=PAIRS.tokens, flops=FLOPS)
    return (*by_name.values(), *limited(by_name, OURS, TRL, {"default allocator": FLOOR}))


if __name__ == "__main__":
    print_result(__doc__, lambda: train(PAIRS))
