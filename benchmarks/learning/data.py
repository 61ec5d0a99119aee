# SPDX-License-Identifier: Apache-2.0
"""The rows of each experiment, made of the real data in NEMO_ALIGNER_TEST_DATA, or of sums."""

import gzip
import json
import os
import random
import statistics
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from benchmarks.reward_accuracy import DATA
from benchmarks.reward_accuracy import MODEL as SMOLLM2
from examples.quickstart.arithmetic import write_rows
from examples.quickstart.base_model import write_base_model
from nemo_aligner.environments.word_game import Guess

WORDS = ["ant", "cat", "dog", "fox", "hen", "owl", "pig"]
REPLIES = ("<", ">", "!")
TURNS = 3  # so many guesses find any of the words
GAMES = 20_000
MOST_CHARACTERS = 600  # of prompt and response together: about 150 tokens
VALIDATION_ROWS = 128


def sums(folder: Path, seed: int) -> None:
    """Sums, three in four of them wrong; questions with and without the right sums; a model of random weights."""
    write_rows(folder, seed=seed)
    asked = [json.loads(line) for line in (folder / "asked.jsonl").read_text().splitlines()]
    _write(folder / "right.jsonl", ({"input": row["prompt"], "output": row["sum"]} for row in asked))
    write_base_model([], folder / "base")


def word_game(folder: Path, seed: int) -> None:
    """Games of guesses at random, with their replies; a row for each word to be found; a model of random weights."""
    draw, games = random.Random(seed), []
    for _ in range(GAMES):
        game, word = Guess(REPLIES), draw.choice(WORDS)
        game.reset({"words": WORDS, "word": word}, seed)
        reply, text = "", ""
        for _ in range(TURNS):
            if reply is not None:
                guess = draw.choice(WORDS)
                reply, _ = game.step(guess)
                text += f"{guess}.{reply or ''}"
        games.append({"input": "?", "output": text})
    _write(folder / "games.jsonl", games)
    asked = [{"prompt": "?", "words": WORDS, "word": word} for word in WORDS]
    _write(folder / "asked.jsonl", asked)
    _write(folder / "validation.jsonl", asked * 32)
    write_base_model([], folder / "base")


def dolly(folder: Path, seed: int) -> None:
    """Questions of Databricks' Dolly with the responses of people."""
    del seed  # orders the rows in training
    rows = [
        {"input": row["instruction"], "output": row["response"]}
        for row in _lines("dolly_open_qa.jsonl.gz")
        if len(row["instruction"]) + len(row["response"]) <= MOST_CHARACTERS
    ]
    _split(folder, rows)


def harmless(folder: Path, seed: int) -> None:
    """Pairs of Anthropic's HH-RLHF, harmless: the last turn of the assistant, chosen and rejected."""
    del seed
    _split(folder, list(harmless_pairs()))


def rated_singly(folder: Path, seed: int) -> None:
    """Single responses of HH-RLHF, each good or bad: one of each pair, drawn."""
    del seed
    draw, rows = random.Random(0), []
    for row in harmless_pairs():
        good = draw.random() < 0.5
        response = row["chosen" if good else "rejected"]
        rows.append({"prompt": row["prompt"], "response": response, "label": good})
    _split(folder, rows)


def rated(folder: Path, seed: int) -> None:
    """Responses with a number each: the mean of GPT-4's scores, 1 to 5."""
    del seed
    rows = []
    for row in json.loads("".join(_open("attribute_scores.json.gz"))):
        text = row["instruction"].partition("###Response to evaluate:")[2].partition("###Reference Answer")[0]
        if text.strip():
            rows.append(
                {"text": text.strip()[:MOST_CHARACTERS], "label": [statistics.mean(row["gpt4_score"])]}
            )
    _split(folder, rows)


def stories(folder: Path, seed: int) -> None:
    """Stories of TinyStories as plain text."""
    del seed
    paragraphs = "".join(_open("tinystories.txt")).split("\n\n")
    for name, part in (
        ("train", paragraphs[:-VALIDATION_ROWS]),
        ("validation", paragraphs[-VALIDATION_ROWS:]),
    ):
        (folder / f"{name}.txt").write_text("\n\n".join(part), encoding="utf-8")


def dolly_and_student(folder: Path, seed: int) -> None:
    """As :func:`dolly`, its questions alone, and a small Llama of random weights with SmolLM2's tokenizer."""
    from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM, set_seed

    dolly(folder, seed)
    for part in ("train", "validation"):
        rows = map(json.loads, (folder / f"{part}.jsonl").read_text(encoding="utf-8").splitlines())
        _write(folder / f"asked_{part}.jsonl", ({"prompt": row["input"]} for row in rows))
    tokenizer = AutoTokenizer.from_pretrained(SMOLLM2.parent, gguf_file=SMOLLM2.name)
    tokenizer.save_pretrained(folder / "student")
    set_seed(seed)
    LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=128,
            intermediate_size=384,
            num_hidden_layers=4,
            num_attention_heads=4,
            max_position_embeddings=256,
            tie_word_embeddings=True,
        )
    ).save_pretrained(folder / "student")


def _open(name: str) -> Iterator[str]:
    """The lines of a file of real data."""
    path = Path(os.environ.get(DATA, "")) / name
    if DATA not in os.environ or not path.is_file():
        sys.exit(
            f"{DATA}={os.environ.get(DATA)} names no folder with {name}\nFix: {DATA}=FOLDER make results"
        )
    with (gzip.open if path.suffix == ".gz" else open)(path, "rt", encoding="utf-8") as file:
        yield from file


def _lines(name: str) -> Iterator[dict[str, Any]]:
    return map(json.loads, _open(name))


def harmless_pairs() -> Iterator[dict[str, str]]:
    """Pairs of HH-RLHF, harmless, that are short: the dialogue, and the assistant's last turn, chosen and rejected."""
    for row in _lines("hh_harmless.jsonl.gz"):
        prompt, _, chosen = row["chosen"].rpartition("\n\nAssistant:")
        same, _, rejected = row["rejected"].rpartition("\n\nAssistant:")
        if prompt == same and max(len(row["chosen"]), len(row["rejected"])) <= MOST_CHARACTERS:
            yield {"prompt": f"{prompt}\n\nAssistant:".lstrip(), "chosen": chosen, "rejected": rejected}


def _split(folder: Path, rows: list[dict[str, Any]]) -> None:
    """The last rows are for validation."""
    _write(folder / "train.jsonl", rows[:-VALIDATION_ROWS])
    _write(folder / "validation.jsonl", rows[-VALIDATION_ROWS:])


def _write(path: Path, rows: Iterable[dict[str, Any]]) -> None:
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
