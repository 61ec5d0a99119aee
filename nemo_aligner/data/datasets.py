# SPDX-License-Identifier: Apache-2.0
"""Map-style data sets: a file of records and the layout that turns one record into a sample."""

import logging
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, Generic, TypeVar

from nemo_aligner.data.chat import PromptTokensLayout, TemplateLayout
from nemo_aligner.data.config import (
    ChatPromptTokens,
    PairDataConfig,
    PromptDataConfig,
    SFTDataConfig,
    SFTSplitConfig,
)
from nemo_aligner.data.conversations import Chat
from nemo_aligner.data.data_spec import Split
from nemo_aligner.data.loader import BlendedRows
from nemo_aligner.data.markers import is_usual_template
from nemo_aligner.data.plain_text import PlainTextDataset, open_text
from nemo_aligner.data.prompt import PromptResponseLayout
from nemo_aligner.data.records import PromptResponse, RecordFile, Records, TextRow
from nemo_aligner.data.row import Row, TextEncoder
from nemo_aligner.data.row_dataset import BlendedDataset, RowDataset
from nemo_aligner.data.text_layout import TextLayout
from nemo_aligner.data.text_rows import ResponseFiles, open_prompts
from nemo_aligner.data.tokenizer import Tokenizer
from nemo_aligner.errors import located

_LOG = logging.getLogger(__name__)

R = TypeVar("R", PromptResponse, Chat)


@dataclass(frozen=True, slots=True, kw_only=True)
class _CutLayout(Generic[R]):
    """The layout of supervised rows, which are cut where they are too long, as a data set asks for it."""

    lay_out: Callable[[R], list[Row]]
    max_seq_length: int
    surely_fits: Callable[[R], bool] = lambda _: False
    unit: str = "rows"

    @property
    def limit(self) -> str:
        return f"max_seq_length={self.max_seq_length}"

    @property
    def too_long(self) -> tuple[str, str]:
        return (
            f"leave no room for a response within {self.limit}",
            "raise max_seq_length, or give rows that are learned",
        )

    def left_out(self, record: R) -> str | None:
        return "say that they are not learned (weight or train)" if record.masked else None

    def __call__(self, record: R) -> list[Row]:
        return self.lay_out(record)


def open_sft(
    data: SFTDataConfig, split: SFTSplitConfig, tokenizer: Tokenizer, *, answer_only_loss: bool
) -> BlendedRows:
    """The data set of one split; every line of its files has been checked when this returns.

    Args:
        data: says whether rows are conversations, and how those are written.
        split: ``data.train_ds`` or ``data.validation_ds``.
        tokenizer: where ids come from.
        answer_only_loss: for prompt and response, learn the response only; in conversations the speakers decide.

    Raises:
        UserError: settings, tokenizer and files do not go together, or a line is bad.
    """
    part = data.part(split)
    sets = [
        _open_sft_file(
            data, replace(split, file_path=path), part, tokenizer, answer_only_loss=answer_only_loss
        )
        for path in part.paths
    ]
    return sets[0] if len(sets) == 1 else BlendedDataset(sets, part.weights)


def _open_sft_file(
    data: SFTDataConfig, split: SFTSplitConfig, part: Split, tokenizer: Tokenizer, *, answer_only_loss: bool
) -> RowDataset[Any] | PlainTextDataset:
    if data.plain_text:
        texts = open_text(split.path)
        encode = TextEncoder(tokenizer=tokenizer, add_bos=split.add_bos, append_eos=split.add_eos)
        within = part.rows_of(texts.path, len(texts), unit="documents")
        return PlainTextDataset(texts, encode, max_seq_length=split.max_seq_length, within=within)
    layout: _CutLayout[Any]
    if not data.chat:
        _hint_at_template(split.path, tokenizer, "set model.data.chat=True")
        pairs = PromptResponseLayout(tokenizer, split, answer_only_loss=answer_only_loss)
        read = pairs.read
        layout = _CutLayout(lay_out=pairs, surely_fits=pairs.surely_fits, max_seq_length=split.max_seq_length)
    else:
        chats = (
            PromptTokensLayout(tokenizer, data.chat_prompt_tokens, split, learn=data.learn)
            if uses_prompt_tokens(data, tokenizer)
            else TemplateLayout(tokenizer, split, learn=data.learn)
        )
        read, layout = chats.read, _CutLayout(lay_out=chats, max_seq_length=split.max_seq_length)
    records = RecordFile(split.path, read)
    within = part.rows_of(records.path, len(records), unit=layout.unit)
    return RowDataset(records, layout, within=within)


def uses_prompt_tokens(data: SFTDataConfig, tokenizer: Tokenizer) -> bool:
    """True if conversations are laid out by ``data.chat_prompt_tokens``, not by the tokenizer's chat template.

    Where the settings leave it open, they are if the tokenizer has no template, or one that was made of prompt tokens
    by an earlier run, or if other prompt tokens than the usual ones are given.
    """
    if data.chat_template is not None:
        return data.chat_template == "prompt_tokens"
    template = tokenizer.chat_template
    return template is None or data.chat_prompt_tokens != ChatPromptTokens() or is_usual_template(template)


def open_response_rows(
    data: PairDataConfig,
    split: Split,
    tokenizer: Tokenizer,
    *,
    files: ResponseFiles,
    max_length: int,
    generates: bool = False,
) -> BlendedDataset:
    """Rows of responses; one is left out where a text of it has more than ``max_length`` tokens.

    Args:
        data: how texts become tokens.
        split: the paths.
        tokenizer: where ids come from.
        files: how they are read.
        max_length: tokens.
        generates: the loss is of each response's tokens, not of the reward of the whole text.

    Raises:
        UserError: a file or a line cannot be used, or no row is left.
    """
    encode = TextEncoder(tokenizer=tokenizer, add_bos=data.add_bos, append_eos=data.append_eod)
    lengths = range(2, max_length + 1)
    layout = TextLayout(encode=encode, lengths=lengths, unit=files.unit, generates=generates)
    return _open(split, lambda path: files.open(path, tokenizer), layout)


def open_prompt_rows(
    data: PromptDataConfig, split: Split, tokenizer: Tokenizer, *, max_length: int
) -> BlendedDataset:
    """Prompts; one is left out where it has more than ``max_length`` tokens, so that a response has room after it.

    Raises:
        UserError: a file or a line cannot be used, or no prompt is left.
    """
    encode = TextEncoder(tokenizer=tokenizer, add_bos=data.add_bos, append_eos=False)
    layout = TextLayout(encode=encode, lengths=range(1, max_length + 1), unit="prompts")
    return _open(split, lambda path: open_prompts(path, tokenizer, data), layout)


def _hint_at_template(path: str, tokenizer: Tokenizer, how: str) -> None:
    if tokenizer.chat_template is not None:
        _LOG.info(
            "%s: the tokenizer has a chat template, and these rows are texts that do not pass through it; "
            "if the model is to be asked in chats, %s",
            *(path, how),
        )


def _first(records: Records[TextRow], rows: range) -> TextRow:
    with located(lambda: f"{records.where(rows[0])}: "):
        return records[rows[0]]


def _open(split: Split, read: Callable[[str], Records[TextRow]], layout: TextLayout) -> BlendedDataset:
    assert layout.lengths, layout.lengths
    parts = []
    for path in split.paths:
        records = read(path)
        rows = split.rows_of(path, len(records), unit=layout.unit)
        if rows and not _first(records, rows).rendered:
            _hint_at_template(path, layout.encode.tokenizer, "write them as messages")
        parts.append(RowDataset(records, layout, within=rows))
    return BlendedDataset(parts, split.weights)
