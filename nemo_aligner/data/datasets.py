# SPDX-License-Identifier: Apache-2.0
"""Map-style data sets: a file of records and the layout that turns one record into a sample."""

from typing import Generic, Protocol, TypeVar

from nemo_aligner.data.chat import PromptTokensLayout, TemplateLayout
from nemo_aligner.data.config import SFTDataConfig, SFTSplitConfig
from nemo_aligner.data.prompt import PromptResponseLayout
from nemo_aligner.data.records import Chat, PromptResponse, RecordFile
from nemo_aligner.data.sample import Sample, describe
from nemo_aligner.data.tokenizer import Tokenizer
from nemo_aligner.errors import UserError

__all__ = ["Layout", "SFTDataset", "Sample", "describe", "open_sft"]

R = TypeVar("R", contravariant=True)


class Layout(Protocol[R]):
    """Turns one record into tokens and mask."""

    def __call__(self, record: R, /) -> Sample:
        """The sample of one record; UserError if nothing in it is learned."""
        ...


class SFTDataset(Generic[R]):
    """Samples of a record file, tokenised when they are asked for."""

    def __init__(self, records: RecordFile[R], layout: Layout[R]) -> None:
        self.records = records
        self._layout = layout

    def __len__(self) -> int:
        return len(self.records)

    @property
    def fingerprint(self) -> dict[str, object]:
        """What the rows follow from."""
        return {"rows": self.records.fingerprint}

    def __getitem__(self, index: int) -> Sample:
        """The sample of one row; UserError naming file and line if nothing in it is learned."""
        try:
            return self._layout(self.records[index])
        except UserError as error:
            raise UserError(f"{self.records.where(index)}: {error.problem}", cure=error.cure) from error


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
    if not data.chat:
        layout = PromptResponseLayout(tokenizer, split, answer_only_loss=answer_only_loss)
        return SFTDataset(RecordFile(split.file_path, layout.read), layout)
    match data.chat_template:
        case "tokenizer":
            chat_layout = TemplateLayout(tokenizer, split)
        case _:
            chat_layout = PromptTokensLayout(tokenizer, data.chat_prompt_tokens, split)
    return SFTDataset(RecordFile(split.file_path, chat_layout.read), chat_layout)
