# SPDX-License-Identifier: Apache-2.0
"""transformers' generate on the texts of benchmarks/generation.py, which calls this script; it imports nothing of ours.

python transformers_generate.py --save FOLDER SIZES.json    a Llama with random weights
python transformers_generate.py FOLDER CASES.json           seconds of each case, as JSON
"""

import argparse
import itertools
import json
import statistics
import time
from pathlib import Path
from typing import Any, TypeAlias

import torch
from transformers import (
    GenerationConfig,
    LlamaConfig,
    LlamaForCausalLM,
    StoppingCriteria,
    StoppingCriteriaList,
)

# a LlamaForCausalLM, whose generate transformers annotates with what none of its models meets
Model: TypeAlias = Any


class Lengths(StoppingCriteria):
    """Each row ends at a length of its own; notes when each token was there."""

    def __init__(self, lengths: torch.Tensor) -> None:
        self.lengths, self.marks = lengths, list[float]()

    def __call__(self, input_ids: torch.Tensor, scores: Any, **_: Any) -> torch.Tensor:  # noqa: ANN401, ARG002
        """[batch] bool: which rows have ended."""
        self.marks.append(time.perf_counter())
        return self.lengths <= input_ids.shape[1]


def save(folder: Path, sizes: dict[str, Any]) -> None:
    """Write a Llama with transformers' own random weights; no token ends its responses."""
    torch.manual_seed(0)
    LlamaForCausalLM(LlamaConfig(**sizes, eos_token_id=None)).save_pretrained(folder)


@torch.no_grad()
def generate(model: Model, case: dict[str, Any]) -> list[tuple[torch.Tensor, Lengths]]:
    """Answer all prompts in batches of ``case["batch"]``, each of which ends with its longest answer.

    Returns:
        Of each batch the prompts with their answers, and what ended them.
    """
    batch, found = case["batch"], []
    whole = {} if case["greedy"] else {"temperature": 1.0, "top_k": 0, "top_p": 1.0}
    for start in range(0, len(case["prompts"]), batch):
        prompts = torch.tensor(case["prompts"][start : start + batch])
        responses = torch.tensor(case["lengths"][start : start + batch])
        criteria = Lengths(prompts.shape[1] + responses)
        config = GenerationConfig(
            do_sample=not case["greedy"], **whole, max_new_tokens=int(responses.max()), pad_token_id=0
        )
        out = model.generate(
            prompts,
            generation_config=config,
            attention_mask=torch.ones_like(prompts),
            stopping_criteria=StoppingCriteriaList([criteria]),
        )
        assert out.shape[1] == int(criteria.lengths.max())
        found.append((out, criteria))
    return found


def measured(model: Model, case: dict[str, Any]) -> float:
    """Seconds of the whole case or, where it asks for them, the median over the steps after the first."""
    generate(model, case | {"prompts": case["prompts"][: case["batch"]], "lengths": [3] * case["batch"]})
    started = time.perf_counter()
    _, first = generate(model, case)[0]
    if not case["steps"]:
        return time.perf_counter() - started
    return statistics.median(b - a for a, b in itertools.pairwise(first.marks))


def main() -> None:
    """Save weights, or measure every case and print a line of JSON."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--save", action="store_true", help="write random weights of these sizes")
    parser.add_argument("folder", type=Path, help="of the weights")
    parser.add_argument("file", type=Path, help="JSON: sizes of LlamaConfig, or cases")
    options = parser.parse_args()
    asked = json.loads(options.file.read_text())
    if options.save:
        save(options.folder, asked)
        return
    torch.set_num_threads(asked["threads"])
    model = LlamaForCausalLM.from_pretrained(options.folder, dtype=torch.float32).eval()
    print(json.dumps({case["name"]: measured(model, case) for case in asked["cases"]}))


if __name__ == "__main__":
    main()
