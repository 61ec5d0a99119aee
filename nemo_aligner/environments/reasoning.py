# SPDX-License-Identifier: Apache-2.0
"""Tasks of reasoning-gym, which makes as many rows of each as are wanted; needs ``nemo-aligner[reasoning]``.

    python -m nemo_aligner.environments.reasoning chain_sum size=1000 seed=1 min_terms=2 > rows.jsonl
    trainer.ppo.rewards.NAME.function=nemo_aligner.environments.reasoning.right

A row has the prompt, the result that is right, and the metadata by which the task is scored.
"""

import json
import re
import sys
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from nemo_aligner.errors import UserError

_MARKED = re.compile(r"<answer>\s*(.*?)\s*</answer>", re.DOTALL)


def rows(task: str, **settings: Any) -> Iterator[dict[str, Any]]:  # noqa: ANN401 - of the task
    """Yield the rows of a task, which its name, the settings and their seed decide.

    Raises:
        UserError: there is no such task, it refuses the settings, or the package is not installed.
    """
    gym = _gym("the rows of reasoning-gym")
    try:
        dataset = gym.create_dataset(task, **settings)
    except (ValueError, TypeError, AssertionError) as error:
        raise UserError(
            f"reasoning-gym makes no {task} of {settings}: {error}",
            fix="take a task and settings of its documentation",
        ) from error
    for entry in dataset:
        yield {"prompt": entry["question"], "answer": entry["answer"], "metadata": entry["metadata"]}


def right(*, response: str, row: Mapping[str, Any], **_: object) -> float:
    """Return the task's score of a response, 1 for right: of what stands in an ``<answer>`` element, else of the whole.

    Raises:
        KeyError: the row is no task's.
        UserError: the package is not installed.
    """
    if "source_dataset" not in (row.get("metadata") or {}):
        raise KeyError("the row has no metadata.source_dataset, as those of reasoning-gym have it")
    found = _MARKED.findall(response)
    score = _gym("the score").get_score_answer_fn(row["metadata"]["source_dataset"])
    return float(score(found[-1] if found else response.strip(), row))


def _gym(what: str) -> Any:  # noqa: ANN401 - a module
    try:
        import reasoning_gym  # pyright: ignore[reportMissingImports]
    except ImportError as error:
        raise UserError(
            f"{what} need reasoning-gym, which is not installed", fix="pip install 'nemo-aligner[reasoning]'"
        ) from error
    return reasoning_gym


def main(words: Sequence[str]) -> None:
    """Write the rows of a task to stdout."""
    if not words:
        sys.exit("which task?\nFix: python -m nemo_aligner.environments.reasoning TASK size=1000 seed=1")
    task, *given = words
    settings = {}
    for word in given:
        name, _, value = word.partition("=")
        try:
            settings[name] = json.loads(value)
        except ValueError:
            settings[name] = value
    try:
        for row in rows(task, **settings):
            sys.stdout.write(json.dumps(row, ensure_ascii=False, default=str) + "\n")
    except UserError as error:
        sys.exit(str(error))


if __name__ == "__main__":
    main(sys.argv[1:])
