# SPDX-License-Identifier: Apache-2.0
"""The settings under ``model.data`` of each script. Defaults stand here and nowhere else."""

import re
from dataclasses import asdict, dataclass, field, replace
from datetime import date

from nemo_aligner.bounds import bounded, check_bounds, one_of, only
from nemo_aligner.data.data_spec import DataSpec, Split, parse_data_spec, parse_split, share_of
from nemo_aligner.errors import UserError
from nemo_aligner.paths import PathText

_SPLIT = "{key}={value} in model.data for {file_path} is"
_NOT_POSITIVE = (f"{_SPLIT} not positive", "set {key} to {range}")
_NEGATIVE = ("{key}={value} is negative", "set it to {range}")
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

    def system(self, text: str) -> str:
        """The system turn, which every conversation begins with."""
        return f"{self.system_turn_start}System{self.end_of_name}{text}{self.end_of_turn}"

    def speaker(self, name: str) -> str:
        """The start of a turn, before its text or label."""
        return f"{self.turn_start}{name}{self.end_of_name}"


@dataclass(frozen=True, kw_only=True)
class SFTSplitConfig:
    """Data files and how their rows become samples: ``model.data.train_ds`` or ``validation_ds``."""

    # JSONL, one object a line; several files may be weighted: [0.3, a, 0.7, b]
    file_path: PathText | tuple[str | float, ...]
    # rows of one optimizer step, and of one batch of a validation, over all ranks
    global_batch_size: int = bounded(128, at_least=1, message=_NOT_POSITIVE)
    # rows of one forward pass on one rank
    micro_batch_size: int = bounded(1, at_least=1, message=_NOT_POSITIVE)
    shuffle: bool = True  # a new order each epoch, a function of model.seed and the epoch alone
    # tokens; longer samples are cut and counted; never above model.encoder_seq_length
    max_seq_length: int = bounded(
        4096,
        at_least=2,
        to="2 or more, usually model.encoder_seq_length",
        message=(f"{_SPLIT} too short", "set {key} to {range}"),
    )
    drop_last: bool = True  # leave out an incomplete last batch, unless it would be the only one
    label_key: str = "output"  # the response's field; the template ends with it
    add_eos: bool = True  # end each sample with EOS, learned
    add_sep: bool = False  # put the tokenizer's separator token before the response
    # start each sample with BOS, never twice; null: as the tokenizer or its chat template does
    add_bos: bool | None = None
    truncation_field: str | None = "input"  # fields cut first when a sample is too long, separated by commas
    # prompt and response; each {name} is a field of the row; escapes are understood
    prompt_template: str = "{input} {output}"
    # the end at which truncation_field loses tokens: right or left
    truncation_method: str = one_of(
        "right",
        "left",
        message=("{key}={value!r} in model.data for {file_path} is unknown", "use left or right"),
    )

    def __post_init__(self) -> None:
        check_bounds(self)

    @property
    def path(self) -> str:
        """The file of a split that has one; :meth:`SFTDataConfig.part` names all."""
        assert isinstance(self.file_path, str), self.file_path
        return self.file_path


@dataclass(frozen=True, kw_only=True)
class ValidationSplitConfig(SFTSplitConfig):
    """``validation_ds``, which may be left out."""

    # JSONL, one object a line; a share below 1: the last rows of the training file; null: there is no validation
    file_path: PathText | tuple[str | float, ...] = ""
    shuffle: bool = False  # every validation sees the same batches
    drop_last: bool = False  # every sample is validated


@dataclass(frozen=True, kw_only=True)
class SFTDataConfig:
    """``model.data``: the two splits and what they share."""

    train_ds: SFTSplitConfig  # training data
    # validation data; keys as in train_ds
    validation_ds: ValidationSplitConfig = field(default_factory=ValidationSplitConfig)
    chat: bool = False  # True: rows are conversations; False: prompt and response
    # True: continued pre-training on files of text (.txt), or on rows of {"text"}; every token is learned
    plain_text: bool = False
    # of conversations: tokenizer (its own template), prompt_tokens (the block below); null: the first there is
    chat_template: str | None = one_of(None, "prompt_tokens", "tokenizer")
    # of conversations: all turns that are to be learned, or the last of them
    learn: str = one_of("all", "last")
    # YYYY-MM-DD that a template which reads the clock sees; null: the model's, else the run's first day
    chat_date: str | None = None
    # text that marks turns; escapes such as \n are understood
    chat_prompt_tokens: ChatPromptTokens = field(default_factory=ChatPromptTokens)
    # only False: rows are drawn by shuffle, never with replacement
    sample: bool = only(False, what="drawing rows with replacement")
    # put the rows of a micro-batch end to end, each seen by itself, in place of padding them to the longest
    packing: bool = False
    # threads that tokenise ahead of training; 0: in the training thread
    num_workers: int = bounded(0, at_least=0, message=_NEGATIVE)

    @property
    def validation(self) -> dict[str, SFTSplitConfig]:
        """The validation split by its name, if there is one."""
        split = self.validation_ds
        if share_of(split.file_path):
            split = replace(split, file_path=self.train_ds.file_path)
        return {"validation_ds": split} if split.file_path else {}

    def part(self, split: SFTSplitConfig) -> Split:
        """The files of a split, and the rows of each that it has."""
        validates, share = isinstance(split, ValidationSplitConfig), share_of(self.validation_ds.file_path)
        name = "validation_ds" if validates and not share else "train_ds"
        files = split.file_path
        whole = (
            Split(paths=(files,))
            if isinstance(files, str)
            else parse_split(files, f"model.data.{name}.file_path")
        )
        if not share:
            return whole
        train, validation = whole.cut(share, "model.data.validation_ds.file_path")
        return validation if validates else train

    def __post_init__(self) -> None:
        if self.chat_date is not None:
            try:
                date.fromisoformat(self.chat_date)
            except ValueError as error:
                raise UserError(
                    f"model.data.chat_date={self.chat_date!r} is no date",
                    fix="write it as YYYY-MM-DD, or null",
                ) from error
        if self.chat and self.plain_text:
            raise UserError(
                "model.data.chat=True and model.data.plain_text=True: rows are conversations or texts, not both",
                fix="set one of them to False",
            )
        check_bounds(self, "model.data")


@dataclass(frozen=True, kw_only=True)
class DataSpecConfig:
    """``model.data`` of the scripts whose files ``data_prefix`` names."""

    # {train: [...], validation: [...], test: [...]}; several files may be weighted: [0.3, a, 0.7, b]
    data_prefix: object
    # jsonl or json: one JSON object a line; docs/training.md has the forms of rows
    data_impl: str = one_of(
        "jsonl",
        "json",
        message=("{key}={value!r} cannot be read: files hold text, not token ids", "set {key}=jsonl"),
    )
    # of a plain list of files: shares of training, validation and test, as in 98,1,1
    splits_string: str | None = None
    # tokens; a longer pair, or a prompt without room for a response, is left out; null: what the model takes
    seq_length: int | None = bounded(
        None,
        at_least=2,
        to="2 or more, usually model.encoder_seq_length",
        message=("{key}={value} is too short", "set it to {range}"),
    )
    # threads that tokenise ahead of training; 0: in the training thread
    num_workers: int = bounded(0, at_least=0, message=_NEGATIVE)
    add_bos: bool | None = None  # start each text with BOS, never twice; null: as the tokenizer does
    reset_position_ids: bool = only(False)  # only False: positions count from each text's start
    reset_attention_mask: bool = only(False)  # only False: a text sees all of itself
    dataloader_type: str = only("single")  # only single: the trainer's sampler orders rows

    def __post_init__(self) -> None:
        check_bounds(self, "model.data")
        parse_data_spec(self.data_prefix, self.splits_string)

    @property
    def splits(self) -> DataSpec:
        """The files of each split."""
        return parse_data_spec(self.data_prefix, self.splits_string)


@dataclass(frozen=True, kw_only=True)
class PromptDataConfig(DataSpecConfig):
    """``model.data`` of a policy that writes."""

    # True: a row's text is a user's turn of the tokenizer's chat template, as rows of messages always are turns
    chat: bool = False
    # a text around each row's own, which stands for {prompt} in it; null: none. Rows of messages are left as they are
    prompt_template: str | None = None

    def __post_init__(self) -> None:
        DataSpecConfig.__post_init__(self)
        if self.prompt_template is not None and "{prompt}" not in self.prompt_template:
            raise UserError(
                f"model.data.prompt_template={self.prompt_template!r} has no {{prompt}}",
                fix="write {prompt} where the row's text stands",
            )

    def wrapped(self, text: str) -> str:
        """The text of a row in the template."""
        template = self.prompt_template
        return text if template is None else unescape(template).replace("{prompt}", text)


@dataclass(frozen=True, kw_only=True)
class PairDataConfig(DataSpecConfig):
    """``model.data`` of a reward model: pairs of responses, or responses with labels."""

    append_eod: bool = False  # end each response with EOS, where its reward is then read
