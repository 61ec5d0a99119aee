# SPDX-License-Identifier: Apache-2.0
"""One name for a thing, the field's: names and docstrings of the package hold no word that has a better one."""

import ast
import io
import re
import tokenize
from collections.abc import Iterator
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[2] / "nemo_aligner"
# Word of a name, or whole name: what to write instead.
WORDS = {
    "answer": "response",
    "cure": "fix",
    "desk": "batch",
    "filler": "padding row",
    "inbox": "request queue",
    "judged": "labeled, scored",
    "judgement": "label, score",
    "leftovers": "cleanup",
    "lesson": "train request",
    "milestone": "run lifecycle",
    "remains": "cleanup",
    "spare": "swapped",
    "speller": "detokenizer",
    "taught": "trained",
    "teach": "train",
    "tell": "report, log",
    "ticket": "version",
    "told": "report, message",
    "young": "below min_length",
}
NAMES = {
    "BEHIND": "STALE",
    "CriticLost": "CriticUnavailable",
    "DROPPED": "MASKED_LOGIT",
    "DataPrefix": "DataSpec",
    "Drawn": "SampledDistribution",
    "FittingDataset": "LengthFilteredDataset",
    "Grouped": "GroupedRecords",
    "JoinedDataset": "BlendedDataset",
    "Lane": "WorkerPool",
    "Line": "HttpClient",
    "Remote": "ServerAddress",
    "Scored": "ScoredRollout",
    "ScoredBatch": "AttributeBatch",
    "SharedCritic": "CriticProxy",
    "WaitEnded": "WaitCancelled",
    "from_last_stage": "broadcast_from_last_stage",
    "loss_factor": "loss_scale",
    "may_be_added": "added_to_main_grad",
    "maxima": "all_reduce_max",
    "needed_tokenizer": "require_tokenizer",
    "over_data_parallel": "all_gather_objects_dp",
    "own_keys": "saved_keys",
    "worth_picking": "select_positions",
}
# Names that others gave, or words that mean another thing there.
KEPT = {
    "answer_only_loss": "NeMo's setting",
    "_answer_only_loss": "NeMo's setting",
    "tell": "a file's position",
    "spare": "bytes of a disk, in checkpoint/sharded.py",
    "get_score_answer_fn": "of reasoning-gym",
}
OPENINGS = {
    "What": "a noun, or 'Return ...'",
    "Whether": "'True if ...'",
    "Refuse": "'Raise UserError if ...'",
}
IN_PROSE = re.compile(
    r"\b(answers?|told|judged|judgements?|teach(?:es)?|taught|lessons?|tickets?|cures?|learned tokens?)\b"
)
KEPT_IN_PROSE = re.compile(r"``?[^`]+`?`|answer_only_loss|prompt, answer, finished")  # code; a key of a file


def names(text: str) -> Iterator[tuple[int, str]]:
    for token in tokenize.generate_tokens(io.StringIO(text).readline):
        if token.type == tokenize.NAME:
            yield token.start[0], token.string


def words_of(name: str) -> list[str]:
    return [word.lower().removesuffix("s") for word in re.findall(r"[A-Z]?[a-z]+|[A-Z]+(?![a-z])", name)]


def docstrings(text: str) -> Iterator[tuple[int, str]]:
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            found = ast.get_docstring(node)
            if found:
                yield getattr(node, "lineno", 1), found


def sources() -> list[Path]:
    return sorted(PACKAGE.rglob("*.py"))


@pytest.fixture(scope="module")
def stems() -> dict[str, str]:
    return {word.removesuffix("s"): better for word, better in WORDS.items()}


def test_names_are_the_fields(stems: dict[str, str]):
    found = [
        f"{path.relative_to(PACKAGE)}:{line}: {name}: write {better}"
        for path in sources()
        for line, name in [*names(path.read_text()), (0, path.stem)]
        if name not in KEPT
        and (better := NAMES.get(name) or next((stems[w] for w in words_of(name) if w in stems), None))
    ]
    assert not found, "\n".join(found)


def test_docstrings_say_what_the_field_says():
    found = [
        f"{path.relative_to(PACKAGE)}:{line}: {match[0]}"
        for path in sources()
        for line, text in docstrings(path.read_text())
        if (match := IN_PROSE.search(KEPT_IN_PROSE.sub("", text)))
    ]
    assert not found, "\n".join(found)


def test_docstrings_begin_with_a_noun_or_an_imperative():
    found = [
        f"{path.relative_to(PACKAGE)}:{line}: {text.split()[0]}: write {OPENINGS[text.split()[0]]}"
        for path in sources()
        for line, text in docstrings(path.read_text())
        if text.split()[0] in OPENINGS
    ]
    assert not found, "\n".join(found)


def test_kept_names_exist():
    known = {name for path in sources() for _, name in names(path.read_text())}
    assert set(KEPT) <= known
