# SPDX-License-Identifier: Apache-2.0
"""Hugging Face folders to canonical config and weights, and back, driven by the tables in ``mappings``.

Names, shapes and settings are checked before a tensor is read; tensors pass through one at a time in their
stored dtype.
"""

import json
import logging
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from nemo_aligner.checkpoint.finite import is_finite
from nemo_aligner.checkpoint.hf_config import (
    extras,
    family_for_export,
    family_of,
    to_hf_config,
    to_nemo_config,
)
from nemo_aligner.checkpoint.mapped import HEAD_BIAS, HEAD_WEIGHT, MappedTensor, MappedWeights, mapped_tensors
from nemo_aligner.checkpoint.mappings.table import Family
from nemo_aligner.checkpoint.nemo_archive import is_taken, replace_folder, staged, write_files
from nemo_aligner.checkpoint.sources import read_hf_config, read_json
from nemo_aligner.checkpoint.tensor_files import (
    HuggingFaceTensors,
    TensorSource,
    shortened,
    write_safetensors,
)
from nemo_aligner.checkpoint.tokenizer_files import (
    TOKENIZER_FOLDER,
    appends_eos,
    describe_tokenizer,
    find_tokenizer_files,
)
from nemo_aligner.checkpoint.weights import WeightReader, pad_rows, precision_of
from nemo_aligner.errors import UserError

_log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class ImportedModel:
    """The content of a .nemo: ``weights`` yields (canonical name, full tensor), reading as it goes."""

    config: dict[str, Any]
    weights: Iterable[tuple[str, Tensor]]
    files: dict[str, Path | bytes]


def import_huggingface(source: Path) -> ImportedModel:
    """A folder that transformers' save_pretrained wrote, or that was downloaded from the hub.

    Raises:
        UserError: the folder has no config.json or no weights, its architecture or one of its settings is not
            supported, or its tensors are not those that its config.json implies.
    """
    if not source.is_dir():
        raise UserError(f"{source} is not a folder", fix="give a Hugging Face folder, or a .gguf file")
    hf_config = read_hf_config(source)
    generation = source / "generation_config.json"
    return import_model(
        HuggingFaceTensors(source),
        hf_config=hf_config,
        generation_config=read_json(generation) if generation.is_file() else None,
        tokenizer_files=find_tokenizer_files(source),
        where=str(source),
    )


def import_model(
    tensors: TensorSource,
    *,
    hf_config: dict[str, Any],
    generation_config: dict[str, Any] | None,
    tokenizer_files: Mapping[str, Path | bytes],
    where: str,
) -> ImportedModel:
    """A model from any source of Hugging Face tensors.

    Args:
        tensors: the weights.
        hf_config: the content of config.json.
        generation_config: the content of generation_config.json, if there is one.
        tokenizer_files: file name to file or content; empty where there is no tokenizer.
        where: names the source in messages.
    """
    family = family_of(hf_config, where)
    config = to_nemo_config(family, hf_config, where)
    entries = mapped_tensors(family, config)
    _check_tensors(
        entries, tensors, tied=config["share_embeddings_and_output_weights"], family=family, where=where
    )
    config["precision"] = precision_of(tensors.dtype_of(next(iter(entries[0].sources))), where)
    config["tokenizer"] = tokenizer = describe_tokenizer(tokenizer_files, where)
    if family.rewards and tokenizer is not None and tokenizer["library"] == "huggingface":
        # Texts are read as transformers' tokenizer writes them.
        config["data"] = {"append_eod": appends_eos(tokenizer_files), "add_bos": None}
    config["huggingface"] = {
        "architecture": family.architecture,
        "config": extras(family, hf_config),
        "generation_config": generation_config,
    }
    files = {f"{TOKENIZER_FOLDER}/{name}": content for name, content in tokenizer_files.items()}
    return ImportedModel(config=config, weights=MappedWeights(config, tensors, where=where), files=files)


def export_huggingface(
    config: dict[str, Any],
    reader: WeightReader,
    tokenizer_files: Mapping[str, Path | bytes],
    out: Path,
    *,
    max_shard_bytes: int = 5 * 10**9,
    vocab_size: int | None = None,
    overwrite: bool = False,
) -> None:
    """Writes a folder that transformers loads: config, generation config, tokenizer and safetensors.

    Args:
        config: model_config.yaml.
        reader: the weights; padding of the vocabulary is not exported.
        tokenizer_files: file name to file or content; empty where the model has no tokenizer.
        out: the folder to write; it appears when it is complete.
        max_shard_bytes: weights beyond this are split into shards.
        vocab_size: rows of the exported embedding, zeros from the checkpoint's last one on; None: the model's.
        overwrite: whether an existing folder is replaced.

    Raises:
        UserError: ``out`` exists, or the model is none that a supported architecture can express.
    """
    check_export_folder(out, overwrite=overwrite)
    family, config = family_for_export(config)
    entries = mapped_tensors(family, config)
    _check_reader(entries, reader)
    if vocab_size is not None:
        config["vocab_size"] = vocab_size
        entries = mapped_tensors(family, config)
    with staged(out) as staging:
        _write_json(staging / "config.json", to_hf_config(family, config))
        generation_config = (config.get("huggingface") or {}).get("generation_config")
        if generation_config is not None:
            _write_json(staging / "generation_config.json", generation_config)
        write_files(staging, tokenizer_files)
        _write_weights(staging, entries, reader, max_shard_bytes)
        replace_folder(staging, out)
    _log.info("wrote %s", out)


def check_export_folder(out: Path, *, overwrite: bool) -> None:
    """Raises UserError where ``export_huggingface`` would refuse to write."""
    if is_taken(out, overwrite=overwrite) and not (out / "config.json").is_file():
        raise UserError(
            f"{out} is not a Hugging Face folder (it has no config.json), so it is not overwritten",
            fix="give another output folder",
        )


def _check_tensors(
    entries: list[MappedTensor], tensors: TensorSource, *, tied: bool, family: Family, where: str
) -> None:
    expected = {name: shape for entry in entries for name, shape in entry.sources.items()}
    if missing := expected.keys() - tensors.shapes.keys():
        raise UserError(
            f"{where}: tensors are missing: {shortened(missing)}", fix="download the folder again, whole"
        )
    ignored = {name for name in tensors.shapes if name.endswith("rotary_emb.inv_freq")}
    (head,), embedding = family.head.sources, next(iter(expected))
    if tied and head in tensors.shapes:
        if not torch.equal(tensors.read(head), tensors.read(embedding)):
            raise UserError(
                f"{where}: tie_word_embeddings is true, but {head} differs from {embedding}",
                fix='set "tie_word_embeddings": false in its config.json',
            )
        ignored.add(head)
    if extra := tensors.shapes.keys() - expected.keys() - ignored:
        raise UserError(
            f"{where}: tensors that a {family.architecture} does not have: {shortened(extra)}",
            fix="correct config.json (biases, number of layers), or use the plain model without adapters",
        )
    for name, shape in expected.items():
        if tensors.shapes[name] != shape:
            raise UserError(
                f"{where}: {name} has shape {tensors.shapes[name]}, config.json implies {shape}",
                fix="correct config.json, or download the folder again",
            )


def _check_reader(entries: list[MappedTensor], reader: WeightReader) -> None:
    expected = {entry.name: entry.shape for entry in entries}
    names = set(reader.shapes)
    fix = "export a checkpoint that matches its model_config.yaml"
    if missing := expected.keys() - names:
        raise UserError(f"the checkpoint lacks tensors: {shortened(missing)}", fix=fix)
    if HEAD_BIAS in names and HEAD_WEIGHT in expected:
        names.remove(HEAD_BIAS)
        if reader.read(HEAD_BIAS).any():
            raise UserError(
                f"the reward head has a bias, {reader.read(HEAD_BIAS).tolist()}, and Hugging Face's has none",
                fix="train with pairs, which leave the bias at 0, or serve the .nemo",
            )
    if extra := names - expected.keys():
        raise UserError(f"the checkpoint has tensors that cannot be exported: {shortened(extra)}", fix=fix)
    for entry in entries:
        found, shape = reader.shapes[entry.name], entry.shape
        if found[1:] != shape[1:] or (found[0] < shape[0] if entry.is_vocabulary else found[0] != shape[0]):
            raise UserError(f"{entry.name} has shape {found}, model_config.yaml implies {shape}", fix=fix)


def _write_weights(
    folder: Path, entries: list[MappedTensor], reader: WeightReader, max_shard_bytes: int
) -> None:
    entry_of = {name: entry for entry in entries for name in entry.sources}
    plan = {
        name: torch.Size(shape).numel() * reader.dtype_of(entry.name).itemsize
        for entry in entries
        for name, shape in entry.sources.items()
    }
    parts: dict[str, Tensor] = {}

    def read(name: str) -> Tensor:
        if name not in parts:
            entry = entry_of[name]
            # The first rows: what follows pads the vocabulary.
            tensor = pad_rows(reader.read(entry.name)[: entry.shape[0]], entry.shape[0])
            if not is_finite([tensor]):
                raise UserError(
                    f"{entry.name} holds numbers that are infinite or NaN, and is not exported",
                    fix="export an earlier checkpoint of the run",
                )
            parts.update(zip(entry.sources, entry.split(tensor), strict=True))
        # Shards must not share memory, and the other parts' rows are not to be kept alive.
        return parts.pop(name).clone()

    write_safetensors(folder, plan, read, max_shard_bytes=max_shard_bytes)


def _write_json(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2, sort_keys=True, ensure_ascii=False) + "\n")
