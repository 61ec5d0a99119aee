# SPDX-License-Identifier: Apache-2.0
"""The model config in a GGUF file of the llama architecture, as config.json has it. Needs no torch.

The only opener of such files; the ``gguf`` package is optional.
"""

from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from nemo_aligner.errors import UserError, report_damage

if TYPE_CHECKING:
    from gguf import GGUFReader

USE_FOLDER = "use the model's Hugging Face folder instead"


@dataclass(frozen=True, kw_only=True)
class GgufFile:
    """An open file."""

    reader: "GGUFReader"
    metadata: dict[str, Any]
    hf_config: dict[str, Any]
    generation_config: dict[str, Any]


def read_gguf(path: Path) -> GgufFile:
    """Open a .gguf file of the llama architecture (Llama, SmolLM2, ...).

    Raises:
        UserError: the package is missing, the file is damaged, or it holds something that is not supported.
    """
    reader = _open(path)
    with damaged_gguf(path):
        metadata = {
            name: field.contents() for name, field in reader.fields.items() if not name.startswith("GGUF.")
        }
    _check_supported(metadata, reader, path)
    with damaged_gguf(path):
        return GgufFile(
            reader=reader,
            metadata=metadata,
            hf_config=_hf_config(metadata, reader, path),
            generation_config=_generation_config(metadata),
        )


def _open(path: Path) -> "GGUFReader":
    try:
        from gguf import GGUFReader
    except ImportError as error:
        raise UserError(
            f"reading {path} needs the package gguf", fix="pip install 'nemo-aligner[quickstart]'"
        ) from error
    if not path.is_file():
        raise UserError(f"{path} does not exist", fix="give the path of a .gguf file")
    with damaged_gguf(path):
        return GGUFReader(path)


def damaged_gguf(path: Path) -> AbstractContextManager[None]:
    """Within it, what fails is the file's fault."""
    return report_damage(f"{path} is not a whole GGUF file", fix="download it again")


def _check_supported(metadata: dict[str, Any], reader: "GGUFReader", path: Path) -> None:
    if (architecture := metadata.get("general.architecture")) != "llama":
        raise UserError(f"{path}: GGUF architecture {architecture} is not supported", fix="use one of llama")
    for key in ("llama.expert_count", "llama.attention.sliding_window"):
        if metadata.get(key):
            raise UserError(f"{path}: {key}={metadata[key]} is not supported", fix=USE_FOLDER)
    scaling = metadata.get("llama.rope.scaling.type", "none")
    if scaling not in ("none", "linear") or any(
        tensor.name == "rope_freqs.weight" for tensor in reader.tensors
    ):
        raise UserError(f"{path}: its rope scaling cannot be taken over from a GGUF file", fix=USE_FOLDER)


def _hf_config(metadata: dict[str, Any], reader: "GGUFReader", path: Path) -> dict[str, Any]:
    """The config.json of the same model."""

    def value(key: str, default: Any = None) -> Any:  # noqa: ANN401
        found = metadata.get(f"llama.{key}", default)
        if found is None:
            raise UserError(f"{path}: its metadata has no llama.{key}", fix="download it again")
        # float32 in the file: 1e-5 is to stay 1e-5.
        return float(str(np.float32(found))) if isinstance(found, float) else found

    heads, hidden = value("attention.head_count"), value("embedding_length")
    shapes = {tensor.name: tensor.shape for tensor in reader.tensors}
    rope: dict[str, Any] = {"rope_theta": value("rope.freq_base", 10000.0), "rope_type": "default"}
    if metadata.get("llama.rope.scaling.type") == "linear":
        rope |= {"rope_type": "linear", "factor": value("rope.scaling.factor")}
    head_dim = value("attention.key_length", hidden // heads)
    if value("rope.dimension_count", head_dim) != head_dim:
        raise UserError(f"{path}: rotating a part of each head is not supported", fix=USE_FOLDER)
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": int(shapes["token_embd.weight"][1]),
        "hidden_size": hidden,
        "intermediate_size": value("feed_forward_length"),
        "num_hidden_layers": value("block_count"),
        "num_attention_heads": heads,
        "num_key_value_heads": value("attention.head_count_kv", heads),
        "head_dim": head_dim,
        "hidden_act": "silu",
        "max_position_embeddings": value("context_length"),
        "rms_norm_eps": value("attention.layer_norm_rms_epsilon"),
        "tie_word_embeddings": "output.weight" not in shapes,
        "attention_bias": "blk.0.attn_q.bias" in shapes,
        "mlp_bias": "blk.0.ffn_up.bias" in shapes,
        "rope_parameters": rope,
        **_token_ids(metadata),
    }


def _token_ids(metadata: dict[str, Any]) -> dict[str, int]:
    names = {"bos_token_id": "bos", "eos_token_id": "eos", "pad_token_id": "padding"}
    keys = {name: f"tokenizer.ggml.{key}_token_id" for name, key in names.items()}
    return {name: metadata[key] for name, key in keys.items() if key in metadata}


def _generation_config(metadata: dict[str, Any]) -> dict[str, Any]:
    """As generation_config.json: the ends of a turn and of a message end a text too."""
    ends = [metadata.get(f"tokenizer.ggml.{key}_token_id") for key in ("eos", "eot", "eom")]
    ids = list(dict.fromkeys(end for end in ends if end is not None))
    return _token_ids(metadata) | ({"eos_token_id": ids} if len(ids) > 1 else {})
