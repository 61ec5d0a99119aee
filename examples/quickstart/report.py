# SPDX-License-Identifier: Apache-2.0
"""The report of `make quickstart`: a picture, samples, and a table of figures."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

from rich.table import Table

from examples.quickstart.evaluate import Evaluation
from examples.quickstart.manners import Question
from examples.quickstart.stages import metric, terminal

__all__ = ["write"]

NUM_SHOWN = 6
Lines = list[dict[str, float]]


def write(folder: Path, questions: Sequence[Question], evaluated: Mapping[str, Evaluation]) -> None:
    """Write learning.png, samples.md and summary.json into ``folder``, and print the figures and a few responses.

    Args:
        folder: of the run.
        questions: that were asked.
        evaluated: the responses "before" and "after" PPO, and those of the "control".
    """
    figures = {
        name: {
            "reward": found.reward,
            "warmth": found.warmth,
            "names_it": found.names_it,
            "words": found.words,
        }
        for name, found in evaluated.items()
    }
    (folder / "summary.json").write_text(json.dumps(figures, indent=1) + "\n", encoding="utf-8")
    _write_samples(folder / "samples.md", questions, evaluated)
    _plot(folder, folder / "learning.png")
    _show(questions, evaluated)
    for what, path in (
        ("models", "*/checkpoints/*.nemo"),
        ("picture", "learning.png"),
        ("samples", "samples.md"),
        ("figures", "summary.json"),
    ):
        print(f"{what + ':':9} {folder / path}")


def _show(questions: Sequence[Question], evaluated: Mapping[str, Evaluation]) -> None:
    console = terminal()
    table = Table("question", "before PPO", "after PPO", show_lines=True)
    for row in range(NUM_SHOWN):
        table.add_row(
            questions[row].prompt.splitlines()[0],
            *(evaluated[name].responses[row].strip() for name in ("before", "after")),
        )
    console.print(table)
    table = Table("held-out questions", "reward", "warm less harsh words per 100", "name the thing", "words")
    for name, found in evaluated.items():
        table.add_row(
            name, f"{found.reward:.2f}", f"{found.warmth:.1f}", f"{found.names_it:.0%}", f"{found.words:.1f}"
        )
    console.print(table)


def _write_samples(path: Path, questions: Sequence[Question], evaluated: Mapping[str, Evaluation]) -> None:
    parts = []
    for row, question in enumerate(questions):
        parts.append(f"## {question.prompt.splitlines()[0]}\n")
        parts += [
            f"- {name}, reward {found.rewards[row]:.2f}: {found.responses[row].strip()}"
            for name, found in evaluated.items()
        ]
        parts.append("")
    path.write_text("\n".join(parts), encoding="utf-8")


def _read(path: Path) -> Lines:
    return [json.loads(line) for line in path.read_bytes().split(b"\n") if line]


def _plot(folder: Path, image: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(2, 2, figsize=(10, 7), layout="constrained")
    actor, accuracy = _read(folder / "ppo/metrics.jsonl"), _read(folder / "reward_model/metrics.jsonl")
    panels = (
        ("reward", actor, {"train_rollouts/rewards": "training", "val_rollouts/rewards": "held out"}),
        ("KL to the initial policy", actor, {"train_rollouts/init_policy_kl": "training"}),
        ("tokens of a response", actor, {"train_rollouts/response_lengths": "training"}),
        ("accuracy on pairs", accuracy, {"train/acc": "training", "validation/acc": "held out"}),
    )
    for panel, (title, lines, names) in zip(axes.flat, panels, strict=True):
        for name, label in names.items():
            panel.plot(*metric(lines, name), "o--" if label == "held out" else "-", label=label)
        panel.set(title=title, xlabel="reward model step" if lines is accuracy else "PPO step")
        panel.legend()
        panel.grid(alpha=0.3)
    figure.savefig(image, dpi=120)
