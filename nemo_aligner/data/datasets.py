# SPDX-License-Identifier: Apache-2.0
"""Map-style data sets: a file of records and the layout that turns one record into a sample."""

import logging
from collections.abc import Callable, Sequence
from typing import TypeVar

from nemo_aligner.data.chat import PromptTokensLayout, TemplateLayout
from nemo_aligner.data.config import (
    ChatPromptTokens,
    PairDataConfig,
    PromptDataConfig,
    SFTDataConfig,
    SFTSplitConfig,
)
from nemo_aligner.data.conversations import Chat
from nemo_aligner.data.fitting import FittingDataset, JoinedDataset, Texts
from nemo_aligner.data.judgements import Judged, JudgedPair, Pair, open_judged, open_judged_pairs, open_pairs
from nemo_aligner.data.markers import is_usual_template
from nemo_aligner.data.message_rows import open_prompt_texts
from nemo_aligner.data.prefix import Split
from nemo_aligner.data.prompt import PromptResponseLayout
from nemo_aligner.data.records import PromptResponse, PromptText, RecordFile, Records
from nemo_aligner.data.sample import (
    ComparisonSample,
    PromptSample,
    ScoredPairSample,
    ScoredSample,
    TextEncoder,
)
from nemo_aligner.data.supervised import SFTDataset
from nemo_aligner.data.tokenizer import Tokenizer
from nemo_aligner.errors import UserError


def open_sft(
    data: SFTDataConfig, split: SFTSplitConfig, tokenizer: Tokenizer, *, answer_only_loss: bool
) -> SFTDataset[PromptResponse] | SFTDataset[Chat]:
    """The data set of one split; every line of its file has been checked when this returns.

    Args:
        data: says whether rows are conversations, and how those are written.
        split: ``data.train_ds`` or ``data.validation_ds``.
        tokenizer: where ids come from.
        answer_only_loss: for prompt and answer, learn the answer only; in conversations the speakers decide.

    Raises:
        UserError: settings, tokenizer and file do not go together, or a line is bad.
    """
    longest = split.max_seq_length
    if not data.chat:
        _hint_at_template(split.file_path, tokenizer, "set model.data.chat=True")
        layout = PromptResponseLayout(tokenizer, split, answer_only_loss=answer_only_loss)
        return SFTDataset(RecordFile(split.file_path, layout.read), layout, max_seq_length=longest)
    if uses_prompt_tokens(data, tokenizer):
        chat_layout = PromptTokensLayout(tokenizer, data.chat_prompt_tokens, split, learn=data.learn)
    else:
        chat_layout = TemplateLayout(tokenizer, split, learn=data.learn)
    return SFTDataset(RecordFile(split.file_path, chat_layout.read), chat_layout, max_seq_length=longest)


def uses_prompt_tokens(data: SFTDataConfig, tokenizer: Tokenizer) -> bool:
    """Whether conversations are laid out by ``data.chat_prompt_tokens``, not by the tokenizer's chat template.

    Where the settings leave it open, they are if the tokenizer has no template, or one that was made of prompt tokens
    by an earlier run, or if other prompt tokens than the usual ones are given.
    """
    if data.chat_template is not None:
        return data.chat_template == "prompt_tokens"
    template = tokenizer.chat_template
    return template is None or data.chat_prompt_tokens != ChatPromptTokens() or is_usual_template(template)


_LOG = logging.getLogger(__name__)

T = TypeVar("T", bound=Texts)
S = TypeVar("S")

ComparisonDataset = JoinedDataset[Pair, ComparisonSample]
RegressionDataset = JoinedDataset[Judged, ScoredSample]
RegressionPairDataset = JoinedDataset[JudgedPair, ScoredPairSample]
PromptDataset = JoinedDataset[PromptText, PromptSample]


def open_comparisons(
    data: PairDataConfig, split: Split, tokenizer: Tokenizer, *, max_length: int
) -> ComparisonDataset:
    """Pairs of answers; a pair is left out where either text has more than ``max_length`` tokens.

    Raises:
        UserError: a file or a line cannot be used, or no pair is left.
    """
    return _open(
        split,
        lambda path: open_pairs(path, tokenizer),
        encode=_pair_encoder(data, tokenizer),
        build=lambda _, tokens: ComparisonSample(chosen=tokens[0], rejected=tokens[1]),
        lengths=range(2, max_length + 1),
        unit="pairs",
    )


def open_regression(
    data: PairDataConfig,
    split: Split,
    tokenizer: Tokenizer,
    *,
    max_length: int,
    num_attributes: int,
    missing: float,
) -> RegressionDataset:
    """Answers with labels; one is left out where it has more than ``max_length`` tokens.

    Args:
        data: how texts become tokens.
        split: the files.
        tokenizer: where ids come from.
        max_length: tokens.
        num_attributes: numbers in each label.
        missing: stands in a label for an attribute that nobody judged.

    Raises:
        UserError: a file or a line cannot be used, or no row is left.
    """
    return _open(
        split,
        lambda path: open_judged(path, num_attributes=num_attributes, missing=missing, tokenizer=tokenizer),
        encode=_pair_encoder(data, tokenizer),
        build=lambda judged, tokens: ScoredSample(tokens=tokens[0], attributes=judged.attributes),
        lengths=range(2, max_length + 1),
        unit="rows",
    )


def open_regression_pairs(
    data: PairDataConfig,
    split: Split,
    tokenizer: Tokenizer,
    *,
    max_length: int,
    num_attributes: int,
    missing: float,
) -> RegressionPairDataset:
    """As ``open_regression``, two consecutive rows as one: the answers to one prompt."""
    return _open(
        split,
        lambda path: open_judged_pairs(
            path, num_attributes=num_attributes, missing=missing, tokenizer=tokenizer
        ),
        encode=_pair_encoder(data, tokenizer),
        build=_build_scored_pair,
        lengths=range(2, max_length + 1),
        unit="pairs",
    )


def open_prompts(
    data: PromptDataConfig, split: Split, tokenizer: Tokenizer, *, max_length: int
) -> PromptDataset:
    """Prompts; one is left out where it has more than ``max_length`` tokens, so that an answer has room after it.

    Raises:
        UserError: a file or a line cannot be used, or no prompt is left.
    """
    return _open(
        split,
        lambda path: open_prompt_texts(path, tokenizer),
        encode=TextEncoder(tokenizer=tokenizer, add_bos=data.add_bos, append_eos=False),
        build=lambda prompt, tokens: PromptSample(text=prompt.text, tokens=tokens[0], row=prompt.row),
        lengths=range(1, max_length + 1),
        unit="prompts",
    )


def _pair_encoder(data: PairDataConfig, tokenizer: Tokenizer) -> TextEncoder:
    return TextEncoder(tokenizer=tokenizer, add_bos=data.add_bos, append_eos=data.append_eod)


def _build_scored_pair(pair: JudgedPair, tokens: Sequence[list[int]]) -> ScoredPairSample:
    first, second = (
        ScoredSample(tokens=ids, attributes=judged.attributes)
        for judged, ids in zip((pair.first, pair.second), tokens, strict=True)
    )
    return ScoredPairSample(first=first, second=second)


def _hint_at_template(path: str, tokenizer: Tokenizer, how: str) -> None:
    if tokenizer.chat_template is not None:
        _LOG.info(
            "%s: the tokenizer has a chat template, and these rows are texts that do not pass through it; "
            "if the model is to be asked in chats, %s",
            *(path, how),
        )


def _open(
    split: Split,
    open_file: Callable[[str], Records[T]],
    *,
    encode: TextEncoder,
    build: Callable[[T, Sequence[list[int]]], S],
    lengths: range,
    unit: str,
) -> JoinedDataset[T, S]:
    assert lengths, lengths
    parts = []
    for path in split.paths:
        records = open_file(path)
        rows = split.rows(len(records))
        if not rows:
            raise UserError(
                f"model.data.splits_string leaves none of the {len(records)} {unit} of {path} for a split",
                cure="give the split a greater share, or name files for it under model.data.data_prefix",
            )
        if not records[rows[0]].rendered:
            _hint_at_template(path, encode.tokenizer, "write them as messages")
        parts.append(FittingDataset(records, rows, encode=encode, build=build, lengths=lengths, unit=unit))
    return JoinedDataset(parts, split.weights)
