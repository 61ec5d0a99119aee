# SPDX-License-Identifier: Apache-2.0
"""Models that NeMo wrote: one model_weights.ckpt, with Megatron's older names or mcore's, or a distributed checkpoint
whose config leaves the vocabulary to the tokenizer.

Only the names and a few config keys differ from ours; query, key and value rows are interleaved by head in all.
"""

import re
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from nemo_aligner.checkpoint.huggingface import ImportedModel
from nemo_aligner.checkpoint.nemo_archive import NemoArchive
from nemo_aligner.checkpoint.tensor_files import load_pickled
from nemo_aligner.checkpoint.tokenizer_files import (
    TOKENIZER_FOLDER,
    archived_tokenizer_files,
    describe_tokenizer,
    load_archived_tokenizer,
)
from nemo_aligner.checkpoint.weights import WeightReader, precision_of
from nemo_aligner.errors import UserError

_Tensors = dict[str, Callable[[], Tensor]]  # canonical name to what reads the tensor

_OUTER_NAMES = {
    "language_model.embedding.word_embeddings.weight": "embedding.word_embeddings.weight",
    "language_model.embedding.position_embeddings.weight": "embedding.position_embeddings.weight",
    "language_model.encoder.final_layernorm.weight": "decoder.final_layernorm.weight",
    "language_model.encoder.final_layernorm.bias": "decoder.final_layernorm.bias",
    "language_model.output_layer.weight": "output_layer.weight",
}
_LAYER_NAMES = {
    "input_layernorm.weight": "self_attention.linear_qkv.layer_norm_weight",
    "input_layernorm.bias": "self_attention.linear_qkv.layer_norm_bias",
    "self_attention.query_key_value.weight": "self_attention.linear_qkv.weight",
    "self_attention.query_key_value.bias": "self_attention.linear_qkv.bias",
    "self_attention.dense.weight": "self_attention.linear_proj.weight",
    "self_attention.dense.bias": "self_attention.linear_proj.bias",
    "post_attention_layernorm.weight": "mlp.linear_fc1.layer_norm_weight",
    "post_attention_layernorm.bias": "mlp.linear_fc1.layer_norm_bias",
    "mlp.dense_h_to_4h.weight": "mlp.linear_fc1.weight",
    "mlp.dense_h_to_4h.bias": "mlp.linear_fc1.bias",
    "mlp.dense_4h_to_h.weight": "mlp.linear_fc2.weight",
    "mlp.dense_4h_to_h.bias": "mlp.linear_fc2.bias",
}
_OPTIONAL = ("embedding.position_embeddings.weight", "output_layer.weight")
_LAYER_TENSOR = re.compile(r"language_model\.encoder\.layers\.(\d+)\.(.+)")
_CANONICAL = re.compile(r"(embedding|decoder|output_layer)\..+")
_SECOND_GATE = ".dense_h_to_4h_2."  # the up projection of an unfused gated MLP
_ONE_RANK = (
    "merge the ranks first: NeMo's megatron_change_num_partitions.py to tensor and pipeline parallel size 1"
)


def import_legacy(archive: NemoArchive) -> ImportedModel:
    """The model of an extracted .nemo that NeMo wrote.

    Raises:
        UserError: the weights are split over ranks, can be used as they are, hold more than tensors, or have
            names that no GPT of NeMo has.
    """
    tensors = _distributed_tensors(archive) if _is_distributed(archive) else _pickled_tensors(archive)
    _check_complete(tensors, archive)
    config = _upgrade_config(archive, tensors)
    in_hugging_face_form: dict[str, Path | bytes] = {}
    if (config.get("tokenizer") or {}).get("library") == "megatron":
        found = archived_tokenizer_files(archive)
        in_hugging_face_form = {f"{TOKENIZER_FOLDER}/{name}": content for name, content in found.items()}
        config["tokenizer"] = describe_tokenizer(found, str(archive.source))
    files: dict[str, Path | bytes] = {
        path.relative_to(archive.folder).as_posix(): path
        for path in sorted(archive.folder.rglob("*"))
        if path.is_file()
        and path.name not in ("model_config.yaml", "model_weights.ckpt")
        and archive.weights not in path.parents
    }
    weights = _read_all(tensors, config["vocab_size"])
    return ImportedModel(config=config, weights=weights, files=files | in_hugging_face_form)


def _is_distributed(archive: NemoArchive) -> bool:
    if not (archive.weights / "metadata.json").is_file():
        return False
    if archive.config.get("vocab_size"):
        raise UserError(
            f"{archive.source} is a distributed checkpoint already",
            fix="use it as it is; no conversion is needed",
        )
    return True


def _distributed_tensors(archive: NemoArchive) -> _Tensors:
    reader = WeightReader(archive.weights)
    names = [name for name in reader.shapes if not name.endswith("_extra_state")]
    return {_canonical_name(name, str(archive.source)): partial(reader.read, name) for name in names}


def _pickled_tensors(archive: NemoArchive) -> _Tensors:
    state = load_pickled(_weights_file(archive))
    return {name: tensor.detach for name, tensor in _canonical(state, str(archive.source))}


def _weights_file(archive: NemoArchive) -> Path:
    folder = archive.folder
    ranks = sorted(folder.glob("*_rank_*/model_weights.ckpt"))
    if len(ranks) > 1:
        names = [path.parent.name for path in ranks]
        raise UserError(
            f"{archive.source}: the weights are split over {len(ranks)} ranks: {names}", fix=_ONE_RANK
        )
    for path in (folder / "model_weights.ckpt", *ranks):
        if path.is_file():
            return path
    raise UserError(
        f"{archive.source} holds no model_weights.ckpt",
        fix="give the folder that an old .nemo was extracted to",
    )


def _canonical(state: dict[str, Tensor], where: str) -> Iterator[tuple[str, Tensor]]:
    """(canonical name, tensor) of every entry; buffers that hold no weights are left out."""
    for full_name, tensor in state.items():
        if full_name.endswith(("inv_freq", "_extra_state")) or _SECOND_GATE in full_name:
            continue
        name = full_name.removeprefix("model.").removeprefix("module.")
        second = (
            state.get(full_name.replace(".dense_h_to_4h.", _SECOND_GATE))
            if ".dense_h_to_4h." in name
            else None
        )
        if second is not None:
            tensor = torch.cat([tensor, second])
        yield _canonical_name(name, where), tensor


def _canonical_name(name: str, where: str) -> str:
    if _CANONICAL.fullmatch(name):
        return name
    if name in _OUTER_NAMES:
        return _OUTER_NAMES[name]
    match = _LAYER_TENSOR.fullmatch(name)
    if match is None or match[2] not in _LAYER_NAMES:
        raise UserError(
            f"{where}: {name} is no tensor of a GPT model of NeMo", fix="convert a plain GPT model"
        )
    return f"decoder.layers.{match[1]}.{_LAYER_NAMES[match[2]]}"


def _check_complete(tensors: _Tensors, archive: NemoArchive) -> None:
    """Raises UserError unless the layers are those that the config counts, each with all of its weights."""
    num_layers = archive.config.get("num_layers")
    if not isinstance(num_layers, int):
        raise UserError(f"{archive.source}: num_layers={num_layers} in its config", fix="convert a GPT model")
    needed = {name for name in _OUTER_NAMES.values() if name.endswith("weight")} - {*_OPTIONAL}
    for layer in range(num_layers):
        needed |= {
            f"decoder.layers.{layer}.{name}" for name in _LAYER_NAMES.values() if name.endswith("weight")
        }
    if missing := sorted(needed - tensors.keys()):
        raise UserError(
            f"{archive.source}: {len(missing)} tensors are missing, the first is {missing[0]}",
            fix="convert a complete GPT model",
        )
    if f"decoder.layers.{num_layers}.self_attention.linear_qkv.weight" in tensors:
        raise UserError(
            f"{archive.source}: there are more layers than num_layers={num_layers}",
            fix="correct num_layers in model_config.yaml",
        )


def _upgrade_config(archive: NemoArchive, tensors: _Tensors) -> dict[str, Any]:
    """The config with what today's has beyond it."""
    config = dict(archive.config)
    if config.get("megatron_legacy"):
        raise UserError(
            f"{archive.source}: megatron_legacy=true is not supported", fix="convert a newer checkpoint"
        )
    embedding = tensors["embedding.word_embeddings.weight"]()
    config["mcore_gpt"] = True
    config["precision"] = precision_of(embedding.dtype, str(archive.source))
    config.setdefault("share_embeddings_and_output_weights", "output_layer.weight" not in tensors)
    config.setdefault("make_vocab_size_divisible_by", 128)
    config["vocab_size"] = config.get("vocab_size") or _vocab_size(archive, embedding.shape[0])
    for split in ("tensor_model_parallel_size", "pipeline_model_parallel_size"):
        config[split] = 1
    return config


def _vocab_size(archive: NemoArchive, num_rows: int) -> int:
    """The tokenizer's, where it is in the archive; else all rows, padding included."""
    tokenizer = load_archived_tokenizer(archive) if archived_tokenizer_files(archive) else None
    return num_rows if tokenizer is None else min(num_rows, tokenizer.vocab_size)


def _read_all(tensors: _Tensors, vocab_size: int) -> Iterator[tuple[str, Tensor]]:
    for name, read in tensors.items():
        is_vocabulary = name in ("embedding.word_embeddings.weight", "output_layer.weight")
        yield name, read()[:vocab_size] if is_vocabulary else read()
