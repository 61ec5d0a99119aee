# SPDX-License-Identifier: Apache-2.0
"""Tokenizers behind one small face: Hugging Face folders and SentencePiece files.

``encode`` never adds special tokens: whoever lays out a sample decides where BOS and EOS go.
"""

import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from nemo_aligner.errors import UserError, damage_told

if TYPE_CHECKING:
    from sentencepiece import SentencePieceProcessor
    from transformers import PreTrainedTokenizerFast

__all__ = ["Message", "Tokenizer", "check_fits", "encode_after", "load_tokenizer"]

Message = dict[str, str]  # {"role": ..., "content": ...}, as chat templates read it

# Stands before a continuation while that is encoded; where it would merge with the text, it is done without.
_ANCHOR = "|"


class Tokenizer(Protocol):
    """What data, generation and checkpoints need of a tokenizer."""

    @property
    def vocab_size(self) -> int:
        """One more than the highest id, added tokens included."""
        ...

    @property
    def bos_id(self) -> int | None:
        """The token that starts a text, None where the model has none."""
        ...

    @property
    def eos_id(self) -> int:
        """The token that ends a text."""
        ...

    @property
    def pad_id(self) -> int:
        """Fills rows; may equal ``eos_id``, since masks go by position and never by id."""
        ...

    @property
    def sep_id(self) -> int | None:
        """The token that ``add_sep`` puts between prompt and answer, None where there is none."""
        ...

    @property
    def adds_bos(self) -> bool:
        """Whether the tokenizer, left to itself, starts a text with BOS."""
        ...

    @property
    def prefixes_space(self) -> bool:
        """Whether ``encode`` puts a space of its own before the text."""
        ...

    @property
    def chat_template(self) -> str | None:
        """The Jinja chat template, None where there is none."""
        ...

    @property
    def added_ids(self) -> frozenset[int]:
        """The ids that stand for whole pieces of text, such as a turn's end, whatever stands around them."""
        ...

    def encode(self, text: str) -> list[int]:
        """The ids of ``text`` alone, no special tokens added."""
        ...

    def decode(self, ids: Sequence[int]) -> str:
        """The text of ``ids``, special tokens written out where the library can."""
        ...

    def token_id(self, token: str) -> int | None:
        """The id of one vocabulary entry, None if there is no such entry."""
        ...

    def render_chat(self, messages: Sequence[Message], *, add_generation_prompt: bool = False) -> str:
        """The conversation as the chat template writes it: text to be encoded with ``encode``.

        Raises:
            UserError: there is no chat template, or it refuses these messages.
        """
        ...

    def save(self, folder: Path) -> None:
        """Write the files from which ``load_tokenizer`` makes this tokenizer again."""
        ...


def encode_after(tokenizer: Tokenizer, text: str) -> list[int]:
    """The ids of a text that continues another: without the space that some tokenizers put before a text."""
    if not tokenizer.prefixes_space:
        return tokenizer.encode(text)
    head = tokenizer.encode(_ANCHOR)
    ids = tokenizer.encode(_ANCHOR + text)
    return ids[len(head) :] if ids[: len(head)] == head else tokenizer.encode(text)


def check_fits(tokenizer: Tokenizer, vocab_size: int) -> None:
    """Refuse a tokenizer whose ids may lie outside the model's vocabulary of ``vocab_size`` entries."""
    if tokenizer.vocab_size > vocab_size:
        raise UserError(
            f"wrong tokenizer: its ids go up to {tokenizer.vocab_size - 1}, "
            f"the model's vocabulary has {vocab_size} entries (0 to {vocab_size - 1})",
            cure="give the tokenizer that belongs to this model: import model and tokenizer from one folder",
        )


def load_tokenizer(library: str, path: str | Path) -> Tokenizer:
    """Load a tokenizer from local files; the network is never asked.

    Args:
        library: ``huggingface`` (``path`` is a folder) or ``sentencepiece`` (``path`` is a .model file).
        path: where it lies.

    Raises:
        UserError: unknown library, nothing there, or files that do not load.
    """
    path = Path(path)
    match library:
        case "huggingface":
            # Beyond its files, what they say of each other may be damaged.
            with damage_told(
                f"the tokenizer in {path} does not work", cure="put the model's own files there"
            ):
                return HuggingFaceTokenizer(path)
        case "sentencepiece":
            return SentencePieceTokenizer(path)
        case _:
            raise UserError(
                f"model.tokenizer.library={library!r} is not known", cure="use huggingface or sentencepiece"
            )


class HuggingFaceTokenizer:
    """A tokenizer of the transformers library, read from a local folder."""

    def __init__(self, folder: Path) -> None:
        if not folder.is_dir():
            raise UserError(
                f"there is no tokenizer folder {folder}",
                cure="name the folder that holds tokenizer.json and tokenizer_config.json",
            )
        self._tokenizer = _load_hugging_face(folder)
        vocabulary = self._tokenizer.get_vocab()
        if len(vocabulary) <= len(self._tokenizer.get_added_vocab()):
            raise UserError(
                f"the tokenizer in {folder} has no vocabulary",
                cure="copy tokenizer.json (or tokenizer.model) of the model into this folder",
            )
        self.vocab_size = max(vocabulary.values()) + 1
        self._vocabulary = vocabulary
        self.bos_id = _optional_id(self._tokenizer.bos_token_id)
        self.eos_id = _required_eos(_optional_id(self._tokenizer.eos_token_id), folder)
        pad_id = _optional_id(self._tokenizer.pad_token_id)
        self.pad_id = self.eos_id if pad_id is None else pad_id
        self.sep_id = _optional_id(self._tokenizer.sep_token_id)
        self.adds_bos = self.bos_id is not None and self._tokenizer.encode("a")[:1] == [self.bos_id]
        self.prefixes_space = _prefixes_space(self.encode)
        template = self._tokenizer.chat_template
        self.chat_template: str | None = template.get("default") if isinstance(template, dict) else template
        self.added_ids = frozenset(self._tokenizer.added_tokens_decoder)

    def encode(self, text: str) -> list[int]:
        """The ids of ``text`` alone, no special tokens added."""
        return self._tokenizer.encode(text, add_special_tokens=False, verbose=False)

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

    def render_chat(self, messages: Sequence[Message], *, add_generation_prompt: bool = False) -> str:
        """The conversation as the chat template writes it."""
        from jinja2 import TemplateError

        if self.chat_template is None:
            raise _no_chat_template()
        try:
            text = self._tokenizer.apply_chat_template(
                list(messages),
                chat_template=self.chat_template,
                tokenize=False,
                add_generation_prompt=add_generation_prompt,
            )
        except TemplateError as error:
            roles = [message["role"] for message in messages]
            raise UserError(
                f"the tokenizer's chat template refuses a conversation with the roles {roles}: {error}",
                cure="bring the turns into the order that the template wants, or set "
                "model.data.chat_template=prompt_tokens",
            ) from error
        assert isinstance(text, str)
        return text

    def save(self, folder: Path) -> None:
        """Write tokenizer.json, tokenizer_config.json and the chat template."""
        self._tokenizer.save_pretrained(folder)


class SentencePieceTokenizer:
    """A SentencePiece model, one .model file."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._model = _load_sentencepiece(path)
        self.vocab_size: int = self._model.get_piece_size()
        self.bos_id = _optional_id(self._model.bos_id())
        self.eos_id = _required_eos(_optional_id(self._model.eos_id()), path)
        pad_id = _optional_id(self._model.pad_id())
        self.pad_id = self.eos_id if pad_id is None else pad_id
        self.sep_id = self.token_id("<sep>")
        self.adds_bos = False
        self.prefixes_space = _prefixes_space(self.encode)
        self.added_ids = frozenset({self.eos_id})
        self.chat_template: str | None = None

    def encode(self, text: str) -> list[int]:
        """The ids of ``text`` alone, no special tokens added."""
        return self._model.encode(text, out_type=int, add_bos=False, add_eos=False)

    def decode(self, ids: Sequence[int]) -> str:
        """The text of ``ids``; control tokens such as BOS have no text here."""
        return self._model.decode(list(ids))

    def token_id(self, token: str) -> int | None:
        """The id of one piece, None if there is no such piece."""
        index = self._model.piece_to_id(token)
        return index if self._model.id_to_piece(index) == token else None

    def render_chat(self, messages: Sequence[Message], *, add_generation_prompt: bool = False) -> str:
        """A SentencePiece file holds no chat template, so this always raises."""
        del messages, add_generation_prompt
        raise _no_chat_template()

    def save(self, folder: Path) -> None:
        """Copy the file as ``tokenizer.model``."""
        folder.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(self._path, folder / "tokenizer.model")


def _load_hugging_face(folder: Path) -> "PreTrainedTokenizerFast":
    from transformers import AutoTokenizer

    # The Rust loader raises bare Exception, and panics, over a file that it cannot read.
    with damage_told(
        f"the tokenizer in {folder} does not load",
        cure="put the model's own tokenizer.json and tokenizer_config.json there",
    ):
        return AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)


def _load_sentencepiece(path: Path) -> "SentencePieceProcessor":
    from sentencepiece import SentencePieceProcessor

    if not path.is_file():
        raise UserError(f"there is no tokenizer file {path}", cure="name the SentencePiece .model file")
    try:
        return SentencePieceProcessor(model_file=str(path))
    except (RuntimeError, OSError, ValueError) as error:
        raise UserError(
            f"{path} is not a SentencePiece model: {error}",
            cure="name the .model file of the model's tokenizer (its folder, if it has a tokenizer.json)",
        ) from error


def _optional_id(index: Any) -> int | None:  # noqa: ANN401 -- libraries say int, None or -1
    return index if isinstance(index, int) and index >= 0 else None


def _required_eos(eos_id: int | None, path: Path) -> int:
    if eos_id is None:
        raise UserError(
            f"the tokenizer {path} names no end-of-sequence token, so a model could not learn where to stop",
            cure="set eos_token in its tokenizer_config.json",
        )
    return eos_id


def _prefixes_space(encode: Callable[[str], list[int]]) -> bool:
    head = encode(_ANCHOR)
    ids = encode(_ANCHOR + "a")
    return bool(head) and ids[: len(head)] == head and ids[len(head) :] != encode("a")


def _no_chat_template() -> UserError:
    return UserError(
        "the tokenizer has no chat template",
        cure="set model.data.chat_template=prompt_tokens, or add chat_template to its tokenizer_config.json",
    )
