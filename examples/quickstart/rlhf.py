# SPDX-License-Identifier: Apache-2.0
"""The whole pipeline on a laptop CPU, from random weights to PPO: `make quickstart`.

A small model learns to write about a village, then to answer questions as Wren, keeper of its lighthouse, who is as
often rude as kind. A reward model learns from pairs which responses people prefer, and PPO makes Wren kind. Each step
is a command that anyone could type, printed before it runs; PPO's two jobs talk over a real PyTriton server. The
questions that are asked before and after are in no training data. `make quickstart MODEL=smollm2` starts from a
pretrained instruct model instead.
"""

import argparse
import json
import random
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from examples.quickstart import report
from examples.quickstart.base_model import write_base_model
from examples.quickstart.evaluate import Evaluation, evaluate, silence
from examples.quickstart.manners import Question, held_out_questions, pair, response, training_questions
from examples.quickstart.recipes import RECIPES, Recipe
from examples.quickstart.stages import ROOT, Stages, new_folder, run
from examples.quickstart.village import paragraph

SEED = 1234


class Pipeline:
    """One run: its recipe, its folder, and the files that stages hand to each other."""

    def __init__(self, recipe: Recipe, folder: Path) -> None:
        self.recipe, self.folder, self.data = recipe, folder, folder / "data"
        self.questions = held_out_questions()[: recipe.num_held_out]

    def write_data(self) -> list[str]:
        """Write what every stage learns from; returns the prose."""
        recipe, draw, training = self.recipe, random.Random(SEED), training_questions()
        prose = [(paragraph(draw), paragraph(draw)) for _ in range(recipe.num_prose + recipe.num_held_out)]
        rows = {
            "prose": map(_continued, prose[recipe.num_held_out :]),
            "prose_held_out": map(_continued, prose[: recipe.num_held_out]),
            "answers": (_answered(draw, q) for q in training[: recipe.num_responses]),
            "answers_held_out": (_answered(draw, q) for q in self.questions),
            "pairs": (_preference(draw, q) for q in training[-recipe.num_pairs :]),
            "pairs_held_out": (_preference(draw, q) for q in self.questions),
            "prompts": ({"text": q.prompt} for q in training),
            "prompts_held_out": ({"text": q.prompt} for q in self.questions),
        }
        for name, lines in rows.items():
            _write(self.data / f"{name}.jsonl", lines)
        return [" ".join(both) for both in prose]

    def make_base(self, prose: Sequence[str]) -> Path:
        """A model with random weights, and the tokenizer of this village."""
        training = training_questions()
        draw = random.Random(SEED)
        texts = [*prose, *(f"{q.prompt} {response(draw, q)}" for q in training)]
        num_weights = write_base_model(texts, self.folder / "random")
        print(f"{num_weights / 1e6:.2f} M weights")
        return self.folder / "random"

    def fine_tune(self, start: Path, name: str, data: str, settings: Sequence[str]) -> Path:
        """train_gpt_sft.py on ``data``; returns its .nemo."""
        run(
            "train_gpt_sft.py",
            f"model.restore_from_path={start}",
            f"model.data.train_ds.file_path={self.data / data}.jsonl",
            f"model.data.validation_ds.file_path={self.data / data}_held_out.jsonl",
            *settings,
            f"exp_manager.explicit_log_dir={self.folder / name}",
            threads=1,
        )
        return self.folder / name / "checkpoints/megatron_gpt_sft.nemo"

    def train_reward_model(self, start: Path) -> Path:
        """train_reward_model.py; returns its .nemo."""
        run(
            "train_reward_model.py",
            f"pretrained_checkpoint.restore_from_path={start}",
            self._prefix("pairs"),
            *self.recipe.reward_model,
            f"exp_manager.explicit_log_dir={self.folder / 'reward_model'}",
            threads=1,
        )
        return self.folder / "reward_model/checkpoints/megatron_gpt.nemo"

    def ppo(self, policy: Path, reward_model: Path, name: str) -> Path:
        """The critic's server and the actor side by side; returns the actor's .nemo."""
        folder = self.folder / name
        run(
            "run_ppo.py",
            f"critic.pretrained_checkpoint.restore_from_path={reward_model}",
            *(f"critic.{setting}" for setting in self.recipe.critic),
            f"actor.pretrained_checkpoint.restore_from_path={policy}",
            f"actor.{self._prefix('prompts')}",
            *(f"actor.{setting}" for setting in self.recipe.actor),
            f"actor.exp_manager.explicit_log_dir={folder}",
            threads=1,
            folder=folder,
        )
        return folder / "checkpoints/megatron_gpt_ppo_actor.nemo"

    def ask(self, model: Path, name: str) -> list[str]:
        """The responses of ``model`` to the held-out questions, by generate.py."""
        output = self.folder / f"answers_{name}.jsonl"
        run(
            "generate.py",
            f"model.restore_from_path={model}",
            f"input_file={self.data / 'prompts_held_out.jsonl'}",
            f"output_file={output}",
            "overwrite=True",
            *self.recipe.sampling,
        )
        return [json.loads(line)["answer"] for line in output.read_bytes().split(b"\n") if line]

    def evaluated(self, responses: Sequence[str]) -> Evaluation:
        """By the reward model, exported to ``reward_model_hf``, and by counts."""
        return evaluate(self.questions, responses, reward_model=self.folder / "reward_model_hf")

    def export(self, reward_model: Path) -> None:
        """The reward model as a Hugging Face folder."""
        run("export_hf.py", "--in-file", reward_model, "--out-file", self.folder / "reward_model_hf")

    def constant_reward_model(self) -> Path:
        """A reward model that finds all responses alike."""
        silence(self.folder / "reward_model_hf", self.folder / "constant_hf")
        return self.folder / "constant_hf"

    def _prefix(self, name: str) -> str:
        train, held_out = self.data / f"{name}.jsonl", self.data / f"{name}_held_out.jsonl"
        return f"model.data.data_prefix={{train: [{train}], validation: [{held_out}], test: [{held_out}]}}"


def _continued(paragraphs: tuple[str, str]) -> Mapping[str, str]:
    return dict(zip(("input", "output"), paragraphs, strict=True))


def _answered(draw: random.Random, question: Question) -> Mapping[str, str]:
    return {"input": question.prompt, "output": response(draw, question)}


def _preference(draw: random.Random, question: Question) -> Mapping[str, str]:
    chosen, rejected = pair(draw, question)
    return {"prompt": question.prompt, "chosen": f" {chosen}", "rejected": f" {rejected}"}


def _write(path: Path, rows: Iterable[Mapping[str, str]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def main() -> None:
    """Pretrain, fine-tune, train a reward model, ask, PPO, ask again, report."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--recipe", choices=sorted(RECIPES), default="village")
    parser.add_argument("--results", type=Path, default=ROOT / "results/quickstart")
    parser.add_argument("--no-control", action="store_true", help="leave out PPO with a constant reward")
    options = parser.parse_args()
    recipe = RECIPES[options.recipe]
    stages = Stages(9 - (recipe.pretrained is not None) - options.no_control)
    pipeline = Pipeline(recipe, new_folder(options.results.resolve()))
    if recipe.pretrained is None:
        stages.next("Write the data, make a tokenizer and a model with random weights")
        start = pipeline.make_base(pipeline.write_data())
        stages.next("Pretrain: the model learns to write")
        base = pipeline.fine_tune(start, "pretrained", "prose", recipe.pretrain)
    else:
        stages.next("Write the data")
        pipeline.write_data()
        base = recipe.pretrained
    stages.next("Fine-tune: it learns to answer, in good moods and bad ones")
    policy = pipeline.fine_tune(base, "sft", "answers", recipe.sft)
    stages.next("Train a reward model: which responses do people prefer?")
    reward_model = pipeline.train_reward_model(policy)
    pipeline.export(reward_model)
    stages.next("Ask questions that are in no training data")
    evaluated = {"before": pipeline.evaluated(pipeline.ask(policy, "before"))}
    stages.next("PPO: critic server and actor, side by side")
    actor = pipeline.ppo(policy, reward_model, "ppo")
    if not options.no_control:
        stages.next("PPO again with a constant reward: nothing should be learned")
        control = pipeline.ppo(policy, pipeline.constant_reward_model(), "control")
        evaluated["control"] = pipeline.evaluated(pipeline.ask(control, "control"))
    stages.next("Ask again")
    evaluated["after"] = pipeline.evaluated(pipeline.ask(actor, "after"))
    stages.next("Report")
    report.write(pipeline.folder, pipeline.questions, evaluated)
    print(f"done in {stages.seconds:.0f} s")


if __name__ == "__main__":
    main()
