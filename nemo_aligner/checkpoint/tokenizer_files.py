# SPDX-License-Identifier: Apache-2.0
"""A model's tokenizer as files: which files of a Hugging Face folder or of a .nemo belong to it, and loading them."""

import contextlib
import json
import logging
import tempfile
from collections.abc import Iterator, Mapping
from datetime import date
from pathlib import Path, PurePosixPath
from typing import Any

from nemo_aligner.checkpoint.nemo_archive import ModelArchive, write_files
from nemo_aligner.data.sentencepiece_tokenizer import TEMPLATE_FILE
from nemo_aligner.data.tokenizer import Tokenizer, load_tokenizer
from nemo_aligner.errors import UserError

TOKENIZER_FOLDER = "tokenizer"
# in the tokenizer's section: the day on which a chat template that reads the clock is read
CHAT_DATE = "chat_date"

_TOKENIZER_FILES = (
    "added_tokens.json",
    "chat_template.jinja",
    "chat_template.json",
    "merges.txt",
    "special_tokens_map.json",
    "spiece.model",
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "vocab.json",
    "vocab.txt",
)

# GPT-2's byte-level BPE, in NeMo's ``library: megatron``.
_GPT2_NAMES = ("GPT2BPETokenizer", "megatron-gpt-345m")

_log = logging.getLogger(__name__)


def find_tokenizer_files(folder: Path) -> dict[str, Path]:
    """The tokenizer's files in a Hugging Face folder: name to path."""
    files = [folder / name for name in _TOKENIZER_FILES]
    files += sorted((folder / "additional_chat_templates").glob("*.jinja"))
    return {path.relative_to(folder).as_posix(): path for path in files if path.is_file()}


def archived_tokenizer_files(archive: ModelArchive) -> dict[str, Path | bytes]:
    """The tokenizer's files in a .nemo, by the names that they have in a Hugging Face folder.

    Raises:
        UserError: a file that the config names is missing, or tokens beyond the files are asked for.
    """
    section = _section(archive)
    match section.get("library"):
        case "sentencepiece" if section.get("model"):
            model = archive.file(section["model"])
            if model.parent != archive.folder:
                return {**find_tokenizer_files(model.parent), "tokenizer.model": model}
            return {**_chat_template(archive), "tokenizer.model": model}
        case "huggingface" if section.get("type") and archive.has_folder(section["type"]):
            return {**find_tokenizer_files(archive.file(section["type"]))}
        case "megatron" if (
            section.get("type") in _GPT2_NAMES and section.get("vocab_file") and section.get("merge_file")
        ):
            files = _gpt2_files(archive.file(section["vocab_file"]), archive.file(section["merge_file"]))
            return {**files, **_chat_template(archive)}
    _log.warning("%s holds no tokenizer files", archive.source)
    return {}


def chat_template_file(section: Mapping[str, Any]) -> str:
    """Where in a .nemo the chat template of its tokenizer lies, which the ``tokenizer`` section describes."""
    if section.get("library") == "huggingface":
        return f"{section['type']}/{TEMPLATE_FILE}"
    named = section.get("model") or section.get("vocab_file") or ""
    return (PurePosixPath(named.removeprefix("nemo:")).parent / TEMPLATE_FILE).as_posix()


def _chat_template(archive: ModelArchive) -> dict[str, Path]:
    path = archive.folder / chat_template_file(_section(archive))
    return {TEMPLATE_FILE: path} if path.is_file() else {}


def load_archived_tokenizer(archive: ModelArchive) -> Tokenizer | None:
    """The tokenizer of a .nemo, its chat template on the day that the config names; None where it names no tokenizer.

    Raises:
        UserError: its files are not in the .nemo, do not load, or mean something that is not supported.
    """
    section = _section(archive)
    if not section:
        return None
    tokenizer = _load(archive, section)
    if section.get(CHAT_DATE):
        tokenizer.pin_clock(date.fromisoformat(str(section[CHAT_DATE])))
    return tokenizer


def _load(archive: ModelArchive, section: Mapping[str, Any]) -> Tokenizer:
    match section.get("library"):
        case "sentencepiece" if section.get("model"):
            return load_tokenizer("sentencepiece", archive.file(section["model"]))
        case "huggingface" if section.get("type") and archive.has_folder(section["type"]):
            return load_tokenizer("huggingface", archive.file(section["type"]))
        case "megatron" if files := archived_tokenizer_files(archive):
            return _load_files(files)
    named = {name: value for name, value in section.items() if value is not None}
    raise UserError(
        f"{archive.source}: its tokenizer is not in it, or is of a kind that is not supported: {named}",
        fix="extract it (tar xf), put the tokenizer's files into a folder in it, and name that in its "
        f"model_config.yaml: library: huggingface, type: {TOKENIZER_FOLDER}",
    )


def _section(archive: ModelArchive) -> dict[str, Any]:
    section = archive.config.get("tokenizer") or {}
    if not isinstance(section, dict):
        raise UserError(
            f"{archive.source}: tokenizer={str(section)[:60]} in its model_config.yaml is not a block of keys",
            fix="write library, type and model below it, or get the file again",
        )
    for name in ("library", "type", "model", "vocab_file", "merge_file"):
        if not isinstance(section.get(name) or "", str):
            raise UserError(
                f"{archive.source}: tokenizer.{name}={str(section[name])[:60]} in its model_config.yaml is not text",
                fix=f"correct tokenizer.{name} there",
            )
    for name in ("special_tokens", "additional_special_tokens"):
        if section.get(name):
            raise UserError(
                f"{archive.source}: tokenizer.{name}={section[name]} in its model_config.yaml is not supported",
                fix="put a Hugging Face tokenizer that has these tokens into its folder, as library: huggingface "
                f"and type: {TOKENIZER_FOLDER}",
            )
    return section


def describe_tokenizer(files: Mapping[str, Path | bytes], where: str) -> dict[str, Any] | None:
    """The ``tokenizer`` section of model_config.yaml; None, with a warning, where nothing loads."""
    if _loads_as_huggingface(files):
        return {"library": "huggingface", "type": TOKENIZER_FOLDER, "model": None}
    if "tokenizer.model" in files:
        model = f"{TOKENIZER_FOLDER}/tokenizer.model"
        return {"library": "sentencepiece", "type": TOKENIZER_FOLDER, "model": model}
    _log.warning(
        "%s has no tokenizer that loads; the model can be converted, but not be trained from text", where
    )
    return None


def appends_eos(files: Mapping[str, Path | bytes]) -> bool:
    """True if the tokenizer of a Hugging Face folder, left to itself, ends a text with EOS."""
    return _load_files(files).adds_eos


def _loads_as_huggingface(files: Mapping[str, Path | bytes]) -> bool:
    """Tried on the tokenizer's files alone, as they will lie in the .nemo."""
    if not files:
        return False
    try:
        _load_files(files)
    except UserError as error:
        _log.info("the tokenizer does not load: %s", error.problem)
        return False
    return True


def _load_files(files: Mapping[str, Path | bytes]) -> Tokenizer:
    with as_folder(files) as folder:
        return load_tokenizer("huggingface", folder)


def _gpt2_files(vocab: Path, merges: Path) -> dict[str, bytes]:
    """The same tokenizer as tokenizer.json, which loads whatever the model beside it is."""
    config = json.dumps({"tokenizer_class": "GPT2Tokenizer"}).encode()
    files = {"vocab.json": vocab, "merges.txt": merges, "tokenizer_config.json": config}
    with as_folder(files) as folder:
        load_tokenizer("huggingface", folder).save(folder / "saved")
        return {name: path.read_bytes() for name, path in find_tokenizer_files(folder / "saved").items()}


@contextlib.contextmanager
def as_folder(files: Mapping[str, Path | bytes]) -> Iterator[Path]:
    """The files in a temporary folder."""
    with tempfile.TemporaryDirectory(prefix="nemo_aligner_") as folder:
        write_files(Path(folder), files)
        yield Path(folder)
