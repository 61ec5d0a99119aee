# SPDX-License-Identifier: Apache-2.0
"""How good responses are: by the reward model, run by transformers, and by counts that no model was trained on."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from examples.quickstart.manners import Question, names_it, warmth

__all__ = ["Evaluation", "evaluate", "silence"]


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """Responses to held-out questions, and their means."""

    responses: list[str]
    rewards: list[float]  # of each response
    warmth: float  # warm words less harsh ones, per 100 words
    names_it: float  # share of responses that name what was asked about
    words: float  # per response

    @property
    def reward(self) -> float:
        """The mean reward."""
        return sum(self.rewards) / len(self.rewards)


def evaluate(questions: Sequence[Question], responses: Sequence[str], *, reward_model: Path) -> Evaluation:
    """Score ``responses``; ``reward_model`` is a Hugging Face folder of sequence classification."""
    import torch

    model, tokenizer = _load(reward_model)
    # The reward is read at the end token, which transformers would skip if it took that for padding.
    model.config.pad_token_id = None
    rewards = []
    with torch.inference_mode():
        for question, response in zip(questions, responses, strict=True):
            text = f"{question.prompt} {response.strip()}{tokenizer.eos_token}"
            rewards.append(float(model(**tokenizer(text, return_tensors="pt")).logits))
    num = len(responses)
    return Evaluation(
        responses=list(responses),
        rewards=rewards,
        warmth=sum(map(warmth, responses)) / num,
        names_it=sum(map(names_it, questions, responses)) / num,
        words=sum(len(response.split()) for response in responses) / num,
    )


def silence(reward_model: Path, folder: Path) -> None:
    """Write a copy of a Hugging Face reward model that gives every response the reward 0."""
    model, tokenizer = _load(reward_model)
    model.score.weight.data.zero_()
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def _load(folder: Path) -> tuple[Any, Any]:
    # transformers takes seconds to import, and the first stage should not wait for it.
    from transformers import AutoModelForSequenceClassification, AutoTokenizer
    from transformers.utils import logging

    logging.disable_progress_bar()
    return AutoModelForSequenceClassification.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
