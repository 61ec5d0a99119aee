# SPDX-License-Identifier: Apache-2.0
"""Tokenizers behind one small face: Hugging Face folders and SentencePiece files.

``encode`` never adds special tokens: whoever lays out a sample decides where BOS and EOS go.
"""

import hashlib
from collections.abc import Sequence
from datetime import date
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Protocol

from nemo_aligner.data.chat_template import Message, Tools, marks_generations, pinned, reads_clock, render
from nemo_aligner.data.sentencepiece_tokenizer import (
    ANCHORS,
    SentencePieceTokenizer,
    optional_id,
    prefixes_space,
    required_eos,
)
from nemo_aligner.errors import UserError, report_damage

_PROBE = "The quick brown fox; naïve 12345 你好\n\tdef f(x): return x**2"  # of many kinds of text

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast


class Tokenizer(Protocol):
    """The interface of a tokenizer for data, generation and checkpoints."""

    vocab_size: int  # one more than the highest id, added tokens included
    bos_id: int | None  # the token that starts a text, None where the model has none
    bos_token: str | None  # its text, as chat templates write it
    eos_id: int  # the token that ends a text
    pad_id: int  # fills rows; may equal ``eos_id``, since masks go by position and never by id
    # the token that ``add_sep`` puts between prompt and response, None where there is none
    sep_id: int | None
    adds_bos: bool  # whether the tokenizer, left to itself, starts a text with BOS
    adds_eos: bool  # and ends it with EOS
    prefixes_space: bool  # whether ``encode`` puts a space of its own before the text
    # the ids that stand for whole pieces of text, such as a turn's end, whatever stands around them
    added_ids: frozenset[int]

    @property
    def chat_template(self) -> str | None:
        """The Jinja chat template, None where there is none."""
        ...

    def encode(self, text: str) -> list[int]:
        """The ids of ``text`` alone, no special tokens added."""
        ...

    def encode_anchored(self, text: str) -> tuple[list[int], list[tuple[int, int]]]:
        """As ``encode``, and the characters and tokens at which the text can be cut without changing any token."""
        ...

    def decode(self, ids: Sequence[int]) -> str:
        """The text of ``ids``, special tokens written out where the library can."""
        ...

    def token_id(self, token: str) -> int | None:
        """The id of one vocabulary entry, None if there is no such entry."""
        ...

    def render_chat(
        self, messages: Sequence[Message], *, add_generation_prompt: bool = False, tools: Tools = None
    ) -> str:
        """The conversation as the chat template writes it: text to be encoded with ``encode``.

        Raises:
            UserError: there is no chat template, or it refuses these messages.
        """
        ...

    def marked_chat(
        self, messages: Sequence[Message], *, tools: Tools = None
    ) -> tuple[list[int], list[bool]] | None:
        """The conversation's tokens and which of them its template marks as generated; None where it marks none."""
        ...

    def use_chat_template(self, template: str) -> None:
        """Render chats with another template from now on."""
        ...

    def pin_clock(self, day: date) -> None:
        """Render chats from now on as on ``day``, if the template reads the clock."""
        ...

    @property
    def reads_clock(self) -> bool:
        """True if what the chat template writes depends on the day, unless that is pinned."""
        ...

    def save(self, folder: Path) -> None:
        """Write the files from which ``load_tokenizer`` makes this tokenizer again."""
        ...


def encode_after(tokenizer: Tokenizer, text: str) -> list[int]:
    """The ids of a text that continues another: without the space that some tokenizers put before a text."""
    if not tokenizer.prefixes_space or not text:
        return tokenizer.encode(text)
    for anchor in ANCHORS:
        head, ids = tokenizer.encode(anchor), tokenizer.encode(anchor + text)
        if ids[: len(head)] == head:
            return ids[len(head) :]
    return tokenizer.encode(text)


def tokenizer_probe(tokenizer: Tokenizer | None) -> str:
    """Equal for tokenizers that cut a text of many kinds alike; "" where there is none."""
    if tokenizer is None:
        return ""
    return hashlib.blake2b(repr(list(tokenizer.encode(_PROBE))).encode(), digest_size=8).hexdigest()


def check_fits(tokenizer: Tokenizer, vocab_size: int) -> None:
    """Raise UserError if an id of the tokenizer may lie outside the vocabulary of ``vocab_size`` entries."""
    if tokenizer.vocab_size > vocab_size:
        raise UserError(
            f"wrong tokenizer: its ids go up to {tokenizer.vocab_size - 1}, "
            f"the model's vocabulary has {vocab_size} entries (0 to {vocab_size - 1})",
            fix="give the tokenizer that belongs to this model: import model and tokenizer from one folder",
        )


def load_tokenizer(library: Literal["huggingface", "sentencepiece"], path: str | Path) -> Tokenizer:
    """Load a tokenizer from local files; the network is never asked.

    Args:
        library: ``huggingface`` (``path`` is a folder) or ``sentencepiece`` (``path`` is a .model file).
        path: where it lies.

    Raises:
        UserError: nothing there, or files that do not load.
    """
    path = Path(path)
    match library:
        case "huggingface":
            # Beyond its files, what they say of each other may be damaged.
            with report_damage(
                f"the tokenizer in {path} does not work", fix="put the model's own files there"
            ):
                return HuggingFaceTokenizer(path)
        case "sentencepiece":
            return SentencePieceTokenizer(path)


class HuggingFaceTokenizer:
    """A tokenizer of the transformers library, read from a local folder."""

    def __init__(self, folder: Path) -> None:
        if not folder.is_dir():
            raise UserError(
                f"there is no tokenizer folder {folder}",
                fix="name the folder that holds tokenizer.json and tokenizer_config.json",
            )
        self._tokenizer: Any = load_with_transformers(folder)
        vocabulary = self._tokenizer.get_vocab()
        if len(vocabulary) <= len(self._tokenizer.get_added_vocab()):
            raise UserError(
                f"the tokenizer in {folder} has no vocabulary",
                fix="copy tokenizer.json (or tokenizer.model) of the model into this folder",
            )
        self.vocab_size = max(vocabulary.values()) + 1
        self._vocabulary = vocabulary
        self.bos_id = optional_id(self._tokenizer.bos_token_id)
        self.bos_token: str | None = self._tokenizer.bos_token
        self.eos_id = required_eos(optional_id(self._tokenizer.eos_token_id), folder)
        pad_id = optional_id(self._tokenizer.pad_token_id)
        self.pad_id = self.eos_id if pad_id is None else pad_id
        self.sep_id = optional_id(self._tokenizer.sep_token_id)
        self.adds_bos = self.bos_id is not None and self._tokenizer.encode("a")[:1] == [self.bos_id]
        self.adds_eos = self._tokenizer.encode("a")[-1:] == [self.eos_id]
        self.prefixes_space = prefixes_space(self.encode)
        self.added_ids = frozenset(self._tokenizer.added_tokens_decoder)
        self._unpinned = self._tokenizer.chat_template
        # Not where what stands before decides whether the token is found, or loses its white space to it.
        self._cuts = frozenset(
            index
            for index, token in self._tokenizer.added_tokens_decoder.items()
            if not (token.normalized or token.single_word or token.lstrip)
        )

    def encode(self, text: str) -> list[int]:
        """The ids of ``text`` alone, no special tokens added."""
        return self._tokenizer.encode(text, add_special_tokens=False, verbose=False)

    def encode_anchored(self, text: str) -> tuple[list[int], list[tuple[int, int]]]:
        """As ``encode``, and where each special token begins: the library tokenises what lies between by itself."""
        found = self._tokenizer.backend_tokenizer.encode(text, add_special_tokens=False)
        offsets = found.offsets
        return found.ids, [(offsets[i][0], i) for i, token in enumerate(found.ids) if token in self._cuts]

    def decode(self, ids: Sequence[int]) -> str:
        """The text of ``ids``, special tokens written out."""
        text = self._tokenizer.decode(
            list(ids), skip_special_tokens=False, clean_up_tokenization_spaces=False
        )
        assert isinstance(text, str)
        return text

    def token_id(self, token: str) -> int | None:
        """The id of one vocabulary entry, None if there is no such entry."""
        return self._vocabulary.get(token)

    @property
    def chat_template(self) -> str | None:
        """The Jinja chat template, the default one if there are several; None where there is none."""
        template = self._tokenizer.chat_template
        return template.get("default") if isinstance(template, dict) else template

    def render_chat(
        self, messages: Sequence[Message], *, add_generation_prompt: bool = False, tools: Tools = None
    ) -> str:
        """The conversation as transformers' apply_chat_template writes it."""
        text = render(
            self.chat_template,
            lambda: self._tokenizer.apply_chat_template(
                list(messages), tools=tools, tokenize=False, add_generation_prompt=add_generation_prompt
            ),
            messages,
        )
        assert isinstance(text, str)
        return text

    def marked_chat(
        self, messages: Sequence[Message], *, tools: Tools = None
    ) -> tuple[list[int], list[bool]] | None:
        """The conversation's tokens and those that its template marks, as transformers finds them."""
        if self.chat_template is None or not marks_generations(self.chat_template):
            return None
        found: Any = self._tokenizer.apply_chat_template(
            list(messages), tools=tools, tokenize=True, return_dict=True, return_assistant_tokens_mask=True
        )
        return found["input_ids"], [bool(mask) for mask in found["assistant_masks"]]

    def use_chat_template(self, template: str) -> None:
        """Render chats with another template from now on."""
        self._unpinned = self._tokenizer.chat_template = template

    @property
    def reads_clock(self) -> bool:
        """True if one of the chat templates reads the clock."""
        template = self._unpinned or ""
        return any(map(reads_clock, template.values() if isinstance(template, dict) else (template,)))

    def pin_clock(self, day: date) -> None:
        """Render chats from now on as on ``day``."""
        template = self._unpinned
        if isinstance(template, dict):
            self._tokenizer.chat_template = {name: pinned(text, day) for name, text in template.items()}
        elif template is not None:
            self._tokenizer.chat_template = pinned(template, day)

    def save(self, folder: Path) -> None:
        """Write tokenizer.json, tokenizer_config.json and the chat template."""
        self._tokenizer.save_pretrained(folder)


def load_with_transformers(folder: Path) -> "PreTrainedTokenizerFast":
    """The tokenizer as transformers loads it; UserError where it cannot."""
    from transformers import AutoTokenizer

    # The Rust loader raises bare Exception, and panics, over a file that it cannot read.
    with report_damage(
        f"the tokenizer in {folder} does not load",
        fix="put the model's own tokenizer.json and tokenizer_config.json there",
    ):
        return AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
