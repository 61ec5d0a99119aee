# SPDX-License-Identifier: Apache-2.0
"""A step of direct preference optimization, the reference's forward pass included: ours beside TRL's trainer.

Both sides train the model and the shape of peers/trl_common.py from random weights. `python -m benchmarks.dpo` is our
side alone, in this process; `python -m benchmarks.run dpo` alternates both.
"""

import importlib.metadata
from collections.abc import Iterator
from functools import partial

import torch

from benchmarks.figures import Figure, Part
from benchmarks.processes import PEERS, Side, conditions
from benchmarks.reward_model import PAIRS
from benchmarks.sft import OPTIM, Shape, random_policy
from benchmarks.training_step import REPEATS, Found, alternated, limited, print_result, sides_figures, timed
from nemo_aligner.algorithms.reference import annotate_by_swap
from nemo_aligner.batch import PreferenceBatch
from nemo_aligner.data.collate import collate
from nemo_aligner.data.row import Row, TokenSequence
from nemo_aligner.models.gpt.policy import GPTPolicy
from nemo_aligner.objectives.config import DPOConfig
from nemo_aligner.objectives.preference import DPO
from nemo_aligner.parallel import world

__all__ = ["PROMPT", "figures_of", "pairs", "part", "timed_pairs", "train"]

PROMPT = PAIRS.length // 2  # tokens of each sequence that are not learned
FLOORS = {"default allocator": 2.0, "keeping allocator": 1.5}  # of our tokens/s, in TRL's
OURS, TRL = "NeMo-Aligner", "TRL"
SIDES = (
    Side(name=OURS, command=("-m", "benchmarks.dpo"), peer=False),
    Side(name=TRL, command=(str(PEERS / "trl_dpo.py"),), peer=True),
)

# The reference's forward pass is a third of a step without it.
_LEARNED = PAIRS.length - PROMPT
FLOPS = {OURS: PAIRS.flops(_LEARNED, read=_LEARNED) * 4 // 3, TRL: PAIRS.flops(PAIRS.length - 1) * 4 // 3}


def pairs(shape: Shape) -> Iterator[PreferenceBatch]:
    """Micro-batches of ``shape.rows / 2`` pairs of random words after a prompt of random words."""
    draw = torch.Generator().manual_seed(0)
    mask = [position >= PROMPT for position in range(shape.length)]

    def words(count: int) -> list[int]:
        return torch.randint(shape.first_word, shape.model.vocab_size, (count,), generator=draw).tolist()

    def pair() -> Row:
        prompt = words(PROMPT)
        texts = ([*prompt, *words(shape.length - PROMPT)] for _ in range(2))
        return Row(sequences=tuple(TokenSequence(tokens=ids, loss_mask=mask) for ids in texts))

    while True:
        batch = collate([pair() for _ in range(shape.rows // 2)], pad_id=0, seq_length=shape.length)
        assert isinstance(batch, PreferenceBatch)
        yield batch


def train(shape: Shape) -> str:
    """Our side's RESULT line."""
    with world.ensure_single_process():
        return timed_pairs(random_policy(shape, OPTIM), shape)


def timed_pairs(policy: GPTPolicy, shape: Shape) -> str:
    """Train the policy on pairs, beside itself as it is now; the RESULT line."""
    policy.keep_reference()
    return timed(
        policy,
        pairs(shape),
        DPO(DPOConfig(ref_policy_kl_penalty=0.1)),
        tokens=shape.tokens,
        warm_up=shape.warm_up,
        measured=shape.measured,
        annotate=partial(annotate_by_swap, policy),
    )


def part() -> Part:
    """Both sides in turn."""
    found, peaks = alternated("dpo", SIDES, tokens=PAIRS.tokens)
    return Part(
        title="Direct preference optimization",
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
The model of fine-tuning above learns from pairs, in fp32 with AdamW and gradients clipped at 1, and is compared with
its reference at each step: {PAIRS.rows // 2} pairs a step in one micro-batch, two sequences of {PAIRS.length} tokens
each, of which {PROMPT} are the prompt's, none of them padding; {PAIRS.warm_up} steps of warm-up, {PAIRS.measured}
measured. TRL 1.16.0's DPOTrainer runs [trl_dpo.py](/benchmarks/peers/trl_dpo.py) with a model of its own for the
reference, ours [dpo.py](/benchmarks/dpo.py), which swaps the reference's weights in, in turns. Our head, and our last
layer's MLP, are computed for learned tokens only. Tokens are the policy's; allocators and the share of the matmul peak
are counted as above. "At least" is the ratio that ours is to reach.
"""


def figures_of(found: Found, peaks: list[float]) -> tuple[Figure, ...]:
    """Both sides', and their ratios."""
    by_name = sides_figures(found, peaks, tokens=PAIRS.tokens, flops=FLOPS)
    return (*by_name.values(), *limited(by_name, OURS, TRL, FLOORS))


if __name__ == "__main__":
    print_result(__doc__, lambda: train(PAIRS))
