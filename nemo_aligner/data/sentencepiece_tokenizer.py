# SPDX-License-Identifier: Apache-2.0
"""A SentencePiece file behind the face that data.tokenizer describes, and what both kinds of tokenizers share."""

import shutil
from collections.abc import Callable, Sequence
from datetime import date
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nemo_aligner.data.chat_template import Message, Tools, pinned, reads_clock, render
from nemo_aligner.errors import UserError

if TYPE_CHECKING:
    from sentencepiece import SentencePieceProcessor

# One of them stands before a continuation while that is encoded: the first that does not merge with the text.
ANCHORS = ("|", "a", "\n", "0", ".", "\u3000")

TEMPLATE_FILE = "chat_template.jinja"  # lies beside the tokenizer's files; transformers reads it too


class SentencePieceTokenizer:
    """A SentencePiece model, one .model file."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._model = _load_sentencepiece(path)
        self.vocab_size: int = self._model.get_piece_size()
        self.bos_id = optional_id(self._model.bos_id())
        self.bos_token = None if self.bos_id is None else self._model.id_to_piece(self.bos_id)
        self.eos_id = required_eos(optional_id(self._model.eos_id()), path)
        pad_id = optional_id(self._model.pad_id())
        self.pad_id = self.eos_id if pad_id is None else pad_id
        self.sep_id = self.token_id("<sep>")
        self.adds_bos = self.adds_eos = False
        self.prefixes_space = prefixes_space(self.encode)
        self.added_ids = frozenset({self.eos_id})
        self.chat_template = self._unpinned = _template_beside(path)

    def encode(self, text: str) -> list[int]:
        """The ids of ``text`` alone, no special tokens added; a BOS that a chat template wrote first is read."""
        written = bool(self.bos_token) and text.startswith(self.bos_token or "")
        text = text.removeprefix(self.bos_token or "")
        return self._model.encode(text, out_type=int, add_bos=written, add_eos=False)

    def encode_anchored(self, text: str) -> tuple[list[int], list[tuple[int, int]]]:
        """As ``encode``; the library reports no place where a text can be split."""
        return self.encode(text), []

    def decode(self, ids: Sequence[int]) -> str:
        """The text of ``ids``; control tokens such as BOS have no text here."""
        return self._model.decode(list(ids))

    def token_id(self, token: str) -> int | None:
        """The id of one piece, None if there is no such piece."""
        index = self._model.piece_to_id(token)
        return index if self._model.id_to_piece(index) == token else None

    def render_chat(
        self, messages: Sequence[Message], *, add_generation_prompt: bool = False, tools: Tools = None
    ) -> str:
        """The conversation as the template beside the file writes it."""
        from transformers.utils.chat_template_utils import render_jinja_template

        rows = [[{key: value for key, value in entry.items() if value is not None} for entry in messages]]
        return render(
            self.chat_template,
            lambda: render_jinja_template(
                rows,
                tools=None if tools is None else [*tools],
                chat_template=self.chat_template,
                add_generation_prompt=add_generation_prompt,
                bos_token=self.bos_token or "",
                eos_token=self._model.id_to_piece(self.eos_id),
            )[0][0],
            messages,
        )

    def marked_chat(
        self, messages: Sequence[Message], *, tools: Tools = None
    ) -> tuple[list[int], list[bool]] | None:
        """None: the library reports no places of tokens within a text."""
        del messages, tools
        return None

    def use_chat_template(self, template: str) -> None:
        """Render chats with another template from now on."""
        self.chat_template = self._unpinned = template

    @property
    def reads_clock(self) -> bool:
        """True if the chat template reads the clock."""
        return self._unpinned is not None and reads_clock(self._unpinned)

    def pin_clock(self, day: date) -> None:
        """Render chats from now on as on ``day``."""
        if self._unpinned is not None:
            self.chat_template = pinned(self._unpinned, day)

    def save(self, folder: Path) -> None:
        """Copy the file as ``tokenizer.model``, and write its chat template beside it."""
        folder.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(self._path, folder / "tokenizer.model")
        if self.chat_template is not None:
            (folder / TEMPLATE_FILE).write_text(self.chat_template, encoding="utf-8")


def _load_sentencepiece(path: Path) -> "SentencePieceProcessor":
    from sentencepiece import SentencePieceProcessor

    if not path.is_file():
        raise UserError(f"there is no tokenizer file {path}", fix="name the SentencePiece .model file")
    try:
        return SentencePieceProcessor(model_file=str(path))
    except (RuntimeError, OSError, ValueError) as error:
        raise UserError(
            f"{path} is not a SentencePiece model: {error}",
            fix="name the .model file of the model's tokenizer (its folder, if it has a tokenizer.json)",
        ) from error


def optional_id(index: Any) -> int | None:  # noqa: ANN401 -- libraries say int, None or -1
    """An id, None where the library says that there is none."""
    return index if isinstance(index, int) and index >= 0 else None


def required_eos(eos_id: int | None, path: Path) -> int:
    """The id that ends a text; UserError where the tokenizer at ``path`` has none."""
    if eos_id is None:
        raise UserError(
            f"the tokenizer {path} names no end-of-sequence token, so a model could not learn where to stop",
            fix="set eos_token in its tokenizer_config.json",
        )
    return eos_id


def prefixes_space(encode: Callable[[str], list[int]]) -> bool:
    """True if ``encode`` puts a space of its own before a text."""
    head = encode(ANCHORS[0])
    ids = encode(ANCHORS[0] + "a")
    return bool(head) and ids[: len(head)] == head and ids[len(head) :] != encode("a")


def _template_beside(path: Path) -> str | None:
    template = path.with_name(TEMPLATE_FILE)
    return template.read_text(encoding="utf-8") if template.is_file() else None
