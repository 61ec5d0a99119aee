# SPDX-License-Identifier: Apache-2.0
"""A model's tokenizer as files: which files of a Hugging Face folder belong to it, and whether they load."""

import logging
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from nemo_aligner.checkpoint.nemo_archive import NemoArchive
from nemo_aligner.data.tokenizer import load_tokenizer
from nemo_aligner.errors import UserError

__all__ = ["TOKENIZER_FOLDER", "archived_tokenizer_files", "describe_tokenizer", "find_tokenizer_files"]

TOKENIZER_FOLDER = "tokenizer"

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

_log = logging.getLogger(__name__)


def find_tokenizer_files(folder: Path) -> dict[str, Path]:
    """The tokenizer's files in a Hugging Face folder: name to path."""
    files = [folder / name for name in _TOKENIZER_FILES]
    files += sorted((folder / "additional_chat_templates").glob("*.jinja"))
    return {path.relative_to(folder).as_posix(): path for path in files if path.is_file()}


def archived_tokenizer_files(archive: NemoArchive) -> dict[str, Path]:
    """The tokenizer's files in a .nemo, by the names that they have in a Hugging Face folder."""
    section = archive.config.get("tokenizer") or {}
    if section.get("library") == "sentencepiece" and section.get("model"):
        model = archive.file(section["model"])
        beside = find_tokenizer_files(model.parent) if model.parent != archive.folder else {}
        return beside | {"tokenizer.model": model}
    if section.get("library") == "huggingface" and (archive.folder / TOKENIZER_FOLDER).is_dir():
        return find_tokenizer_files(archive.file(section["type"]))
    _log.warning("%s holds no tokenizer files; the Hugging Face folder will have none", archive.source)
    return {}


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


def _loads_as_huggingface(files: Mapping[str, Path | bytes]) -> bool:
    """Tried on the tokenizer's files alone, as they will lie in the .nemo."""
    if not files:
        return False
    with tempfile.TemporaryDirectory(prefix="nemo_aligner_") as folder:
        for name, content in files.items():
            target = Path(folder) / name
            target.parent.mkdir(exist_ok=True)
            target.write_bytes(content if isinstance(content, bytes) else content.read_bytes())
        try:
            load_tokenizer("huggingface", folder)
        except UserError as error:
            _log.info("the tokenizer does not load: %s", error.problem)
            return False
    return True
