# SPDX-License-Identifier: Apache-2.0
"""A step of supervised fine-tuning of adapters: ours beside TRL's trainer with peft.

Both sides train the model and the shape of peers/trl_common.py from random weights. `python -m benchmarks.lora` is our
side alone, in this process; `python -m benchmarks.run lora` alternates both.
"""

import importlib.metadata

from benchmarks.figures import Figure, Part
from benchmarks.processes import ALLOCATORS, PEERS, Side, conditions
from benchmarks.sft import OPTIM, SHAPE, Shape, random_model, rows
from benchmarks.training_step import REPEATS, Found, alternated, limited, print_result, sides_figures, timed
from nemo_aligner.models.gpt.lora import add_adapters
from nemo_aligner.models.gpt.peft_config import LoRAConfig
from nemo_aligner.models.gpt.policy import GPTPolicy
from nemo_aligner.objectives.nll import NLL
from nemo_aligner.parallel import world

__all__ = ["ADAPTERS", "FLOOR", "OURS", "TRL", "figures_of", "part", "random_adapters", "train"]

FLOOR = 1.5  # of our tokens/s, in TRL's
OURS, TRL = "NeMo-Aligner", "TRL with peft"
SIDES = (
    Side(name=OURS, command=("-m", "benchmarks.lora"), peer=False),
    Side(name=TRL, command=(str(PEERS / "trl_sft.py"), "lora"), peer=True),
)
# peft's of the peer: rank 8, alpha 16, on the projections of queries, keys, values and of what attention gives.
ADAPTERS = LoRAConfig(target_modules=("attention_qkv", "attention_dense"), adapter_dim=8, alpha=16)
_LEARNED = SHAPE.length - 1


def random_adapters(shape: Shape) -> GPTPolicy:
    """A model with random weights whose adapters are ready to train; the world must stand."""
    model = random_model(shape.model)
    add_adapters(model, ADAPTERS, seed=0)
    policy = GPTPolicy(model)
    policy.prepare_training(OPTIM, clip_grad=1.0, max_steps=shape.warm_up + shape.measured)
    return policy


def train(shape: Shape) -> str:
    """Our side's RESULT line."""
    with world.ensure_single_process():
        return timed(
            random_adapters(shape),
            rows(shape, learned=shape.length - 1),
            NLL(),
            tokens=shape.tokens,
            warm_up=shape.warm_up,
            measured=shape.measured,
        )


def part() -> Part:
    """Both sides in turn."""
    found, peaks = alternated("lora", SIDES, tokens=SHAPE.tokens)
    return Part(
        title="Fine-tuning of adapters",
        about=ABOUT,
        conditions=conditions() | {"torch": importlib.metadata.version("torch"), "repeats": str(REPEATS)},
        figures=figures_of(found, peaks),
    )


ABOUT = f"""\
The model and the rows of fine-tuning above, of which adapters of rank {ADAPTERS.adapter_dim} on the attention's
projections (queries, keys, values and output) learn, and nothing else. TRL 1.16.0's SFTTrainer runs
[trl_sft.py](/benchmarks/peers/trl_sft.py) with `lora`, ours [lora.py](/benchmarks/lora.py), in turns.
Tokens and allocators are counted as above; the share of the matmul peak is of two thirds of a full step's operations,
as no weight of the base has a gradient. "At least" is the ratio that ours is to reach.
"""


def figures_of(found: Found, peaks: list[float]) -> tuple[Figure, ...]:
    """Both sides', and their ratios."""
    flops = SHAPE.flops(_LEARNED) * 2 // 3
    by_name = sides_figures(found, peaks, tokens=SHAPE.tokens, flops={side.name: flops for side in SIDES})
    return (*by_name.values(), *limited(by_name, OURS, TRL, dict.fromkeys(ALLOCATORS, FLOOR)))


if __name__ == "__main__":
    print_result(__doc__, lambda: train(SHAPE))
