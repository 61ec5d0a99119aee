# SPDX-License-Identifier: Apache-2.0
"""The first rows of data files, read before torch is loaded, so that a wrong field is reported at once. Needs no
tokenizer.

What is not refused here is read in full, and refused where it has to be, when the model is loaded.
"""

from pathlib import Path

from nemo_aligner.data.common_rows import Recognised, messages_row, prompt_of
from nemo_aligner.data.config import SFTDataConfig, SFTSplitConfig
from nemo_aligner.data.conversations import read_chat
from nemo_aligner.data.plain_text import open_text
from nemo_aligner.data.prompt import read_row, template_keys
from nemo_aligner.data.rated_rows import check_first_rated
from nemo_aligner.data.records import RecordFile
from nemo_aligner.data.text_rows import check_first_pairs

FIRST_ROWS = 20


def check_sft_rows(data: SFTDataConfig, split: SFTSplitConfig) -> None:
    """Of a file of prompts and responses, or of conversations.

    Raises:
        UserError: one of them cannot be read, or the prompt template does not end with the response.
    """
    if _is_packed(split.path):
        return
    if data.plain_text:
        open_text(split.path, most=FIRST_ROWS)
        return
    recognised = Recognised(split.path, quiet=True)
    if data.chat:
        RecordFile(split.path, lambda row: read_chat(messages_row(row, recognised)), most=FIRST_ROWS)
        return
    keys = template_keys(split)
    RecordFile(split.path, lambda row: read_row(row, keys, recognised), most=FIRST_ROWS)


def check_pair_rows(path: str) -> None:
    """Of a file of pairs of responses; UserError if one of them cannot be read."""
    if not _is_packed(path):
        check_first_pairs(path, most=FIRST_ROWS)


def check_rated_rows(path: str) -> None:
    """Of a file of responses that are good or bad; UserError if one of them cannot be read."""
    if not _is_packed(path):
        check_first_rated(path, most=FIRST_ROWS)


def check_prompt_rows(path: str) -> None:
    """Of a file of prompts; UserError if one of them cannot be read."""
    recognised = Recognised(path, quiet=True)
    if not _is_packed(path):
        RecordFile(path, lambda row: prompt_of(row, recognised), most=FIRST_ROWS)


def _is_packed(path: str) -> bool:
    """True if the whole file must be unpacked to read its first rows."""
    return Path(path).suffix == ".gz"
