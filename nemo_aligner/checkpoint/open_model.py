# SPDX-License-Identifier: Apache-2.0
"""One way to open a model, whatever form it has: the others look like a .nemo, and their weights are read in place."""

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from nemo_aligner.checkpoint.gguf import GgufTensors, import_gguf
from nemo_aligner.checkpoint.gguf_file import read_gguf
from nemo_aligner.checkpoint.huggingface import ImportedModel, import_huggingface
from nemo_aligner.checkpoint.mapped import MappedWeights
from nemo_aligner.checkpoint.nemo_archive import ModelArchive, NemoArchive, open_nemo
from nemo_aligner.checkpoint.sources import find_model, is_gguf, is_huggingface
from nemo_aligner.checkpoint.tensor_files import HuggingFaceTensors
from nemo_aligner.checkpoint.tokenizer_files import as_folder


@dataclass(frozen=True, kw_only=True)
class HuggingFaceArchive(ModelArchive):
    """A Hugging Face folder or a GGUF file: its ``folder`` has the tokenizer alone."""

    @property
    def weights(self) -> MappedWeights:
        """The weights where they are, opened anew: an archive goes from rank to rank, open files do not."""
        path = self.source
        opened = GgufTensors(read_gguf(path), path) if is_gguf(path) else HuggingFaceTensors(path)
        return MappedWeights(self.config, opened, where=str(path))


OpenedModel = NemoArchive | HuggingFaceArchive


@contextlib.contextmanager
def open_model(named: Path | str, *, check: bool = True) -> Iterator[OpenedModel]:
    """The model at a path, or of that name on the hub.

    Args:
        named: a .nemo file or folder, a checkpoint, a Hugging Face folder, a GGUF file or a hub id.
        check: whether the files of a .nemo are compared with their digests here.

    Raises:
        UserError: it is not there, is damaged, or is of a kind that is not supported.
    """
    path = find_model(str(named))
    if not (is_gguf(path) or is_huggingface(path)):
        with open_nemo(path, check=check) as archive:
            yield archive
        return
    imported = read_model(path)
    with as_folder(imported.files) as folder:
        yield HuggingFaceArchive(source=path, folder=folder, config=imported.config)


def read_model(path: Path) -> ImportedModel:
    """The model of a Hugging Face folder or a GGUF file, as a .nemo has it."""
    return import_gguf(path) if is_gguf(path) else import_huggingface(path)
