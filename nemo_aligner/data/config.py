# SPDX-License-Identifier: Apache-2.0
"""The settings under ``model.data`` of each script. Defaults stand here and nowhere else."""

import re
from dataclasses import asdict, dataclass, field
from datetime import date

from nemo_aligner.data.prefix import DataPrefix, parse_data_prefix
from nemo_aligner.errors import UserError
from nemo_aligner.paths import PathText

__all__ = [
    "ChatPromptTokens",
    "PairDataConfig",
    "PrefixDataConfig",
    "PromptDataConfig",
    "SFTDataConfig",
    "SFTSplitConfig",
    "unescape",
]

_ESCAPE = re.compile(r"\\(n|t|r|\\|x[0-9a-fA-F]{2})")
_ESCAPED = {"n": "\n", "t": "\t", "r": "\r", "\\": "\\"}


def unescape(text: str) -> str:
    r"""Turn ``\n``, ``\t``, ``\r``, ``\\`` and ``\xNN``, as typed on a command line, into their characters.

    >>> unescape(r"Q: {input}\nA: {output}")
    'Q: {input}\nA: {output}'
    """
    return _ESCAPE.sub(lambda match: _ESCAPED.get(match[1]) or chr(int(match[1][1:], 16)), text)


@dataclass(frozen=True, kw_only=True)
class ChatPromptTokens:
    """The text that marks turns in a conversation; escapes such as ``\\n`` are understood."""

    system_turn_start: str = "\x00"  # before "System"
    turn_start: str = "\x11"  # before a speaker's name; after the last learned turn it is the stop token
    label_start: str = "\x12"  # before a turn's label
    end_of_turn: str = "\n"  # after a turn's text
    end_of_name: str = "\n"  # after a speaker's name and after a label

    def unescaped(self) -> "ChatPromptTokens":
        """The same tokens as the characters that they stand for."""
        return ChatPromptTokens(**{name: unescape(text) for name, text in asdict(self).items()})


@dataclass(frozen=True, kw_only=True)
class SFTSplitConfig:
    """One data file and how its rows become samples: ``model.data.train_ds`` or ``validation_ds``."""

    file_path: PathText  # JSONL, one JSON object per line
    global_batch_size: int = 128  # rows per optimizer step over all data-parallel ranks
    micro_batch_size: int = 1  # rows per forward pass on one rank
    shuffle: bool = True  # a new order each epoch, a function of model.seed and the epoch alone
    max_seq_length: int = 4096  # tokens; a longer sample is truncated and counted
    drop_last: bool = True  # leave out an incomplete last batch, unless it would be the only one
    label_key: str = "output"  # the answer's field; the template ends with it
    add_eos: bool = True  # end each sample with EOS, learned
    add_sep: bool = False  # put the tokenizer's separator token before the answer
    add_bos: bool | None = (
        None  # start each sample with BOS; null: as the tokenizer or its chat template does
    )
    truncation_field: str | None = "input"  # fields cut first when a sample is too long, separated by commas
    prompt_template: str = (
        "{input} {output}"  # prompt and answer; each {name} is a field; escapes are understood
    )
    truncation_method: str = "right"  # the end at which truncation_field loses tokens: right or left

    def __post_init__(self) -> None:
        for name in ("global_batch_size", "micro_batch_size"):
            if getattr(self, name) < 1:
                raise UserError(
                    f"{name}={getattr(self, name)} in model.data for {self.file_path} is not positive",
                    cure=f"set {name} to 1 or more",
                )
        if self.max_seq_length < 2:
            raise UserError(
                f"max_seq_length={self.max_seq_length} in model.data for {self.file_path} is too short",
                cure="set max_seq_length to 2 or more, usually model.encoder_seq_length",
            )
        if self.truncation_method not in ("left", "right"):
            raise UserError(
                f"truncation_method={self.truncation_method!r} in model.data for {self.file_path} is unknown",
                cure="use left or right",
            )


@dataclass(frozen=True, kw_only=True)
class ValidationSplitConfig(SFTSplitConfig):
    """``validation_ds``, which may be left out."""

    file_path: PathText = ""  # as above; empty or null: there is no validation


@dataclass(frozen=True, kw_only=True)
class SFTDataConfig:
    """``model.data``: the two splits and what they share."""

    train_ds: SFTSplitConfig
    validation_ds: ValidationSplitConfig = field(default_factory=ValidationSplitConfig)
    chat: bool = False  # rows are conversations; otherwise prompt and answer
    # prompt_tokens: chat_prompt_tokens; tokenizer: the tokenizer's own template; null: that where there is one
    chat_template: str | None = None
    learn: str = "all"  # of a conversation: all turns that are to be learned, or the last of them
    chat_date: str | None = (
        None  # YYYY-MM-DD that a template which reads the clock sees; null: the model's, else the run's first day
    )
    chat_prompt_tokens: ChatPromptTokens = field(default_factory=ChatPromptTokens)
    sample: bool = False  # only False: rows are drawn by shuffle, never with replacement
    num_workers: int = 0  # threads that tokenise ahead of training; 0: in the training thread

    @property
    def validation(self) -> dict[str, SFTSplitConfig]:
        """The validation split by its name, if there is one."""
        return {"validation_ds": self.validation_ds} if self.validation_ds.file_path else {}

    def __post_init__(self) -> None:
        if self.chat_template not in (None, "prompt_tokens", "tokenizer"):
            raise UserError(
                f"model.data.chat_template={self.chat_template!r} is not known",
                cure="use prompt_tokens, tokenizer or null",
            )
        if self.learn not in ("all", "last"):
            raise UserError(f"model.data.learn={self.learn!r} is not known", cure="use all or last")
        if self.chat_date is not None:
            try:
                date.fromisoformat(self.chat_date)
            except ValueError as error:
                raise UserError(
                    f"model.data.chat_date={self.chat_date!r} is no date",
                    cure="write it as YYYY-MM-DD, or null",
                ) from error
        _check_num_workers(self.num_workers)


@dataclass(frozen=True, kw_only=True)
class PrefixDataConfig:
    """``model.data`` of the scripts whose files ``data_prefix`` names."""

    data_prefix: object  # files of each split: paths, weighted paths, or one list that splits_string cuts
    data_impl: str = "jsonl"  # how files are written: jsonl or json, one JSON object per line either way
    splits_string: str | None = None  # shares of train, validation and test, "98,1,1", of a plain data_prefix
    seq_length: int | None = None  # tokens; what is longer is left out; null: model.encoder_seq_length
    num_workers: int = 0  # threads that tokenise ahead; 0: in the training thread
    add_bos: bool | None = None  # start each text with BOS, never twice; null: as the tokenizer does
    reset_position_ids: bool = False  # only False: a text has one sequence of positions, EOS within it or not
    reset_attention_mask: bool = False  # only False: a token attends to all tokens before it
    dataloader_type: str = "single"  # only single: the order is that of the trainer's sampler settings

    def __post_init__(self) -> None:
        if self.data_impl not in ("json", "jsonl"):
            raise UserError(
                f"model.data.data_impl={self.data_impl!r} cannot be read: files hold text, not token ids",
                cure="set model.data.data_impl=jsonl and give JSONL files",
            )
        for name, value, only in (
            ("reset_position_ids", self.reset_position_ids, False),
            ("reset_attention_mask", self.reset_attention_mask, False),
            ("dataloader_type", self.dataloader_type, "single"),
        ):
            if value != only:
                raise UserError(
                    f"model.data.{name}={value} is not supported", cure=f"set model.data.{name}={only}"
                )
        if self.seq_length is not None and self.seq_length < 2:
            raise UserError(
                f"model.data.seq_length={self.seq_length} is too short",
                cure="set it to 2 or more, usually model.encoder_seq_length",
            )
        _check_num_workers(self.num_workers)
        parse_data_prefix(self.data_prefix, self.splits_string)

    @property
    def splits(self) -> DataPrefix:
        """The files of each split."""
        return parse_data_prefix(self.data_prefix, self.splits_string)


@dataclass(frozen=True, kw_only=True)
class PairDataConfig(PrefixDataConfig):
    """``model.data`` of a reward model: pairs of answers, or answers with labels."""

    append_eod: bool = False  # end each text with EOS, where its reward is then read


@dataclass(frozen=True, kw_only=True)
class PromptDataConfig(PrefixDataConfig):
    """``model.data`` of an actor: prompts to be answered."""


def _check_num_workers(num_workers: int) -> None:
    if num_workers < 0:
        raise UserError(f"model.data.num_workers={num_workers} is negative", cure="set it to 0 or more")
