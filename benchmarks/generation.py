# SPDX-License-Identifier: Apache-2.0
"""Writing answers: ours beside transformers' generate, on the same weights and prompts.

`python -m benchmarks.generation MODEL.nemo CASES.json` is our side alone, in this process;
`python -m benchmarks.run generate` alternates both sides.
"""

import argparse
import importlib.metadata
import itertools
import json
import statistics
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from benchmarks import sft
from benchmarks.figures import Figure, Part, checked, ratio
from benchmarks.processes import ALLOCATORS, THREADS, conditions, measure
from nemo_aligner.checkpoint.convert import import_from_huggingface
from nemo_aligner.checkpoint.nemo_archive import open_nemo
from nemo_aligner.checkpoint.sharded import load_model
from nemo_aligner.models.gpt.config import GPTConfig
from nemo_aligner.models.gpt.model import build_gpt
from nemo_aligner.models.gpt.policy import GPTPolicy
from nemo_aligner.models.sampling_config import SamplingConfig
from nemo_aligner.parallel import world
from nemo_aligner.parallel.ranks import Layout
from nemo_aligner.rollout_batch import Prompt

__all__ = ["Case", "cases", "figures_of", "load", "part", "sizes", "uneven", "written"]

REPEATS = 3
PROMPT, RESPONSE = 64, 64  # tokens
ROUNDS = 4  # batches of uneven responses
NEAR, FAR, STEPS = 64, 512, 32  # the step's time: tokens of the text in the middle of so many steps
FLOORS = {"greedy, even": 1.3, "sampled, even": 2.0, "greedy, uneven": 2.5, "sampled, uneven": 2.5}
CEILING = 1.5  # of the time of a step at FAR, in steps at NEAR
OURS, THEIRS = "NeMo-Aligner", "transformers"
SPEED, STEP = "tokens/s", "ms per step"
THEIR_SCRIPT = Path(__file__).parent / "transformers_generate.py"


@dataclass(frozen=True, kw_only=True)
class Case:
    """Prompts to answer, with the tokens of each answer."""

    batch: int  # rows at once
    manner: str
    greedy: bool
    steps: bool  # measure single steps, not the whole
    prompts: Sequence[Sequence[int]]
    lengths: Sequence[int]

    @property
    def name(self) -> str:
        """As on the page."""
        return f"batch {self.batch}, {self.manner}"


def uneven(count: int) -> list[int]:
    """Lengths of answers that end with the same chance at every token, and at ANSWER at the latest.

    Their mean is near a third of ANSWER. They are quantiles in a random order, so that no repeat is luckier.
    """
    quantiles = (torch.arange(count) + 0.5) / count
    lengths = (-torch.log1p(-quantiles) * (RESPONSE * 0.345)).ceil().clamp_(max=RESPONSE).int()
    return lengths[torch.randperm(count, generator=torch.Generator().manual_seed(1))].tolist()


def cases() -> list[Case]:
    """All that both sides are to do."""
    draw = torch.Generator().manual_seed(0)

    def case(batch: int, manner: str, lengths: Sequence[int], *, prompt: int = PROMPT) -> Case:
        words = torch.randint(4, sft.MODEL.vocab_size, (len(lengths), prompt), generator=draw)
        return Case(
            batch=batch,
            manner=manner,
            greedy=not manner.startswith("sampled"),
            steps=manner.startswith("at"),
            prompts=words.tolist(),
            lengths=lengths,
        )

    found = []
    for batch in (16, 64):
        for how in ("greedy", "sampled"):
            found.append(case(batch, f"{how}, even", [RESPONSE] * batch))
            found.append(case(batch, f"{how}, uneven", uneven(ROUNDS * batch)))
        for length in (NEAR, FAR):
            found.append(case(batch, f"at {length}", [STEPS + 1] * batch, prompt=length - STEPS // 2))
    return found


def sizes(gpt: GPTConfig) -> dict[str, float | bool | str]:
    """The same model as a LlamaConfig."""
    return {
        "vocab_size": gpt.vocab_size,
        "hidden_size": gpt.hidden_size,
        "intermediate_size": gpt.ffn_hidden_size,
        "num_hidden_layers": gpt.num_layers,
        "num_attention_heads": gpt.num_attention_heads,
        "num_key_value_heads": gpt.query_groups,
        "max_position_embeddings": gpt.max_position_embeddings,
        "rms_norm_eps": gpt.layernorm_epsilon,
        "tie_word_embeddings": gpt.share_embeddings_and_output_weights,
    }


def load(model: Path) -> GPTPolicy:
    """A .nemo, in fp32; the world must stand."""
    with open_nemo(model) as archive:
        gpt = build_gpt(GPTConfig.from_dict(archive.config), Layout(), torch.float32).eval()
        load_model(gpt, archive.weights)
    return GPTPolicy(gpt)


def written(policy: GPTPolicy, case: Case) -> tuple[list[list[int]], list[float]]:
    """The answers, and when each of their steps was done."""
    prompts = [
        Prompt(tokens=tokens, number=number, max_length=length)
        for number, (tokens, length) in enumerate(zip(case.prompts, case.lengths, strict=True))
    ]
    sampling = SamplingConfig(use_greedy=case.greedy, max_length=max(case.lengths), min_length=0)
    marks: list[float] = []
    rollout = policy.generate(
        prompts, sampling, slots=case.batch, watch=lambda *_: marks.append(time.perf_counter())
    )
    assert int(rollout.loss_mask.sum()) == sum(case.lengths)
    return [rollout.response(row) for row in range(rollout.num_rows)], marks


def seconds(policy: GPTPolicy, case: Case) -> float:
    """Of the whole case or, where it asks for them, the median over the steps after the first."""
    warm_up = asdict(case) | {"prompts": case.prompts[: case.batch], "lengths": [3] * case.batch}
    written(policy, Case(**warm_up))
    started = time.perf_counter()
    _, marks = written(policy, case)
    if not case.steps:
        return time.perf_counter() - started
    return statistics.median(b - a for a, b in itertools.pairwise(marks))


def part() -> Part:
    """Both sides in turn, with either allocator, several times over."""
    every = cases()
    found: dict[tuple[str, str], list[dict[str, float]]] = {}
    with tempfile.TemporaryDirectory() as folder:
        weights, model, asked = (Path(folder) / name for name in ("hf", "model.nemo", "cases.json"))
        asked.write_text(json.dumps(sizes(sft.MODEL)))
        measure([str(THEIR_SCRIPT), "--save", str(weights), str(asked)])
        import_from_huggingface(weights, str(model))
        described = [asdict(case) | {"name": case.name} for case in every]
        asked.write_text(json.dumps({"threads": THREADS, "cases": described}))
        sides = {
            OURS: ["-m", "benchmarks.generation", str(model), str(asked)],
            THEIRS: [str(THEIR_SCRIPT), str(weights), str(asked)],
        }
        for repeat in range(REPEATS):
            for allocator in ALLOCATORS:
                for side, command in sides.items():
                    started = time.perf_counter()
                    one = json.loads(measure(command, allocator=allocator).splitlines()[-1])
                    found.setdefault((side, allocator), []).append(one)
                    print(
                        f"generate: repeat {repeat + 1} of {REPEATS}, {side}, {allocator}: "
                        f"{time.perf_counter() - started:.0f} s",
                        flush=True,
                    )
    return Part(
        title="Generation", about=ABOUT, conditions=_conditions(every), figures=figures_of(every, found)
    )


ABOUT = f"""\
The model of fine-tuning above, with the same random weights on both sides, answers prompts of {PROMPT} random tokens in
fp32: ours with as many slots as transformers' static batches have rows, greedily or by sampling over the whole
vocabulary (temperature 1). Even answers have {RESPONSE} tokens each, one batch of them. Uneven ones end with the same
chance at every token, at {RESPONSE} at the latest, {ROUNDS} batches of them: a static batch goes on until its longest
answer has ended, a slot takes the next prompt. Each prompt has the same length of answer on both sides, and tokens/s
counts the tokens of answers and nothing else, in the time of the whole call. Ours returns the tokens' log-probs
beside them. Our script is [generation.py](/benchmarks/generation.py), transformers' is
[transformers_generate.py](/benchmarks/transformers_generate.py).

A step gives every row of a greedy batch one token; its time is the median of the {STEPS} steps around a text of so many
tokens, prompt and answer.
"""


def _conditions(every: Sequence[Case]) -> dict[str, str]:
    uneven = {case.batch: case.lengths for case in every if case.manner.endswith("uneven")}
    return conditions() | {
        "torch": importlib.metadata.version("torch"),
        "transformers": importlib.metadata.version("transformers"),
        "repeats": str(REPEATS),
        "mean length of uneven answers": ", ".join(
            f"{sum(lengths) / len(lengths):.1f} at batch {batch}" for batch, lengths in uneven.items()
        ),
    }


def figures_of(
    every: Sequence[Case], found: dict[tuple[str, str], list[dict[str, float]]]
) -> tuple[Figure, ...]:
    """Of the seconds of each case's name, by side and allocator, one dictionary per repeat."""
    by: dict[tuple[str, str, str], Figure] = {}
    for allocator in ALLOCATORS:
        for case in every:
            for side in (OURS, THEIRS):
                taken = [one[case.name] for one in found[side, allocator]]
                work = sum(case.lengths)
                values = [s * 1e3 for s in taken] if case.steps else [work / s for s in taken]
                by[side, case.name, allocator] = Figure(
                    table=f"{allocator}, {STEP if case.steps else SPEED}".capitalize(),
                    subject=f"{side}, {case.name}",
                    metric=STEP if case.steps else SPEED,
                    values=tuple(values),
                )
    ratios: list[Figure] = []
    for allocator in ALLOCATORS:
        for case in every:
            if not case.steps:
                name = f"{OURS} / {THEIRS}, {case.name}, {allocator}"
                sides = (by[side, case.name, allocator] for side in (OURS, THEIRS))
                ratios += checked(ratio("Ratios", name, *sides), "at least", FLOORS[case.manner], allocator)
        for batch in sorted({case.batch for case in every}):
            name = f"{OURS}, batch {batch}, a step at {FAR} / at {NEAR}, {allocator}"
            ends = (by[OURS, f"batch {batch}, at {length}", allocator] for length in (FAR, NEAR))
            ratios += checked(ratio("Ratios", name, *ends), "at most", CEILING, allocator)
    return (*by.values(), *ratios)


def main() -> None:
    """Our side alone: print the seconds of each case as a line of JSON."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model", type=Path, help=".nemo")
    parser.add_argument("file", type=Path, help="JSON of the cases")
    options = parser.parse_args()
    asked = json.loads(options.file.read_text())
    torch.set_num_threads(asked["threads"])
    with world.ensure_single_process():
        policy = load(options.model)
        found = {}
        for described in asked["cases"]:
            name = described.pop("name")
            found[name] = seconds(policy, Case(**described))
    print(json.dumps(found))


if __name__ == "__main__":
    main()
