# SPDX-License-Identifier: Apache-2.0
"""A step of direct preference optimization of adapters: ours beside TRL's trainer with peft.

Both sides train the model and the shape of peers/trl_common.py from random weights. `python -m benchmarks.lora_dpo` is
our side alone, in this process; `python -m benchmarks.run lora_dpo` alternates both.
"""

import importlib.metadata

from benchmarks.dpo import PROMPT, timed_pairs
from benchmarks.figures import Figure, Part
from benchmarks.lora import ADAPTERS, FLOOR, OURS, TRL, random_adapters
from benchmarks.processes import ALLOCATORS, ROOT, Side, conditions
from benchmarks.reward_model import PAIRS
from benchmarks.sft import Shape
from benchmarks.training_step import REPEATS, Found, alternated, limited, print_result, sides_figures
from nemo_aligner.parallel import world

__all__ = ["figures_of", "part", "train"]

SIDES = (
    Side(name=OURS, command=("-m", "benchmarks.lora_dpo"), peer=False),
    Side(name=TRL, command=(str(ROOT / "benchmarks/trl_lora_dpo.py"),), peer=True),
)

# No weight of the base has a gradient, a third of a full step; the reference's forward pass is as much.
_LEARNED = PAIRS.length - PROMPT
FLOPS = {OURS: PAIRS.flops(_LEARNED, read=_LEARNED), TRL: PAIRS.flops(PAIRS.length - 1)}


def train(shape: Shape) -> str:
    """Our side's RESULT line."""
    with world.ensure_single_process():
        return timed_pairs(random_adapters(shape), shape)


def part() -> Part:
    """Both sides in turn."""
    found, peaks = alternated("lora_dpo", SIDES, tokens=PAIRS.tokens)
    return Part(
        title="Direct preference optimization of adapters",
        about=ABOUT,
        conditions=conditions() | {"torch": importlib.metadata.version("torch"), "repeats": str(REPEATS)},
        figures=figures_of(found, peaks),
    )


ABOUT = f"""\
The pairs of direct preference optimization above, from which the adapters of fine-tuning above learn: rank
{ADAPTERS.adapter_dim} on the attention's projections. On both sides the model with its adapters off is the reference.
TRL 1.16.0's DPOTrainer runs [trl_lora_dpo.py](/benchmarks/trl_lora_dpo.py), ours
[lora_dpo.py](/benchmarks/lora_dpo.py), in turns. Tokens are the policy's; allocators and the share of the matmul peak
are counted as above. "At least" is the ratio that ours is to reach.
"""


def figures_of(found: Found, peaks: list[float]) -> tuple[Figure, ...]:
    """Both sides', and their ratios."""
    by_name = sides_figures(found, peaks, tokens=PAIRS.tokens, flops=FLOPS)
    return (*by_name.values(), *limited(by_name, OURS, TRL, dict.fromkeys(ALLOCATORS, FLOOR)))


if __name__ == "__main__":
    print_result(__doc__, lambda: train(PAIRS))
