# SPDX-License-Identifier: Apache-2.0
"""GGUF files of the llama architecture, read as if they were a Hugging Face folder; quantised weights are
dequantised.

The only importer of the ``gguf`` package, which is optional.
"""

import re
from contextlib import AbstractContextManager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from nemo_aligner.checkpoint.gguf_tokenizer import build_tokenizer_files
from nemo_aligner.checkpoint.huggingface import ImportedModel, import_model
from nemo_aligner.checkpoint.tensor_files import TensorSource
from nemo_aligner.errors import UserError, damage_told

if TYPE_CHECKING:
    from gguf import GGUFReader, ReaderTensor

__all__ = ["gguf_tensors", "import_gguf"]

_USE_FOLDER = "use the model's Hugging Face folder instead"
_OUTER_NAMES = {
    "token_embd.weight": "model.embed_tokens.weight",
    "output_norm.weight": "model.norm.weight",
    "output.weight": "lm_head.weight",
}
_LAYER_NAMES = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
_LAYER_TENSOR = re.compile(r"blk\.(\d+)\.(\w+)\.(weight|bias)")
_ROTATED = re.compile(r".*\.self_attn\.(q|k)_proj\.(weight|bias)")


def import_gguf(path: Path) -> ImportedModel:
    """A .gguf file of the llama architecture (Llama, SmolLM2, ...), with its tokenizer.

    Weights that are all stored in bfloat16 or all in float16 (norms aside) keep that dtype where nothing is
    lost; dequantised ones are float32, because no shorter dtype holds them exactly.

    Raises:
        UserError: the package is missing, the file is damaged, or it holds something that is not supported.
    """
    reader = _open(path)
    with _damage_told(path):
        metadata = {
            name: field.contents() for name, field in reader.fields.items() if not name.startswith("GGUF.")
        }
    _check_supported(metadata, reader, path)
    with _damage_told(path):
        hf_config = _hf_config(metadata, reader, path)
        generation_config = _generation_config(metadata)
    heads = hf_config["num_attention_heads"], hf_config["num_key_value_heads"]
    return import_model(
        _GgufTensors(reader, heads=heads, path=path),
        hf_config=hf_config,
        generation_config=generation_config,
        tokenizer_files=_tokenizer_files(metadata, path),
        where=str(path),
    )


def gguf_tensors(path: Path, config: dict[str, Any]) -> TensorSource:
    """The weights of a file that was imported as ``config``, a model_config.yaml."""
    heads = config["num_attention_heads"], config["num_query_groups"]
    return _GgufTensors(_open(path), heads=heads, path=path)


class _GgufTensors:
    """A TensorSource that dequantises as it reads and puts the rows of q and k into Hugging Face's order."""

    def __init__(self, reader: "GGUFReader", *, heads: tuple[int, int], path: Path) -> None:
        self._path = path
        self._heads: dict[str, int] = {"q": heads[0], "k": heads[1]}
        self._tensors = {_hf_name(tensor.name, path): tensor for tensor in reader.tensors}
        self._shapes = {name: tuple(int(n) for n in reversed(t.shape)) for name, t in self._tensors.items()}
        with _damage_told(path):
            self._dtype = self._common_dtype()

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """See TensorSource."""
        return self._shapes

    def dtype_of(self, name: str) -> torch.dtype:  # noqa: ARG002
        """See TensorSource."""
        return self._dtype

    def read(self, name: str, block: tuple[slice, ...] = ()) -> Tensor:
        """See TensorSource."""
        with _damage_told(self._path):
            tensor = _dequantise(self._tensors[name]).reshape(self._shapes[name])
            if rotated := _ROTATED.fullmatch(name):
                tensor = _unpermute(tensor, self._heads[rotated[1]])
            return tensor[block].to(self._dtype)

    def _common_dtype(self) -> torch.dtype:
        kinds = {tensor.tensor_type.name for tensor in self._tensors.values() if len(tensor.shape) > 1}
        wanted = {frozenset({"BF16"}): torch.bfloat16, frozenset({"F16"}): torch.float16}
        dtype = wanted.get(frozenset(kinds), torch.float32)
        vectors = [_dequantise(tensor) for tensor in self._tensors.values() if len(tensor.shape) == 1]
        exact = all(torch.equal(vector.to(dtype).float(), vector) for vector in vectors)
        return dtype if exact else torch.float32


def _open(path: Path) -> "GGUFReader":
    try:
        from gguf import GGUFReader
    except ImportError as error:
        raise UserError(
            f"reading {path} needs the package gguf", cure="pip install 'nemo-aligner[quickstart]'"
        ) from error
    if not path.is_file():
        raise UserError(f"{path} does not exist", cure="give the path of a .gguf file")
    with _damage_told(path):
        return GGUFReader(path)


def _tokenizer_files(metadata: dict[str, Any], path: Path) -> dict[str, Path | bytes]:
    with damage_told(f"{path}: its tokenizer is damaged", cure="download it again"):
        return build_tokenizer_files(metadata, where=str(path))


def _damage_told(path: Path) -> AbstractContextManager[None]:
    return damage_told(f"{path} is not a whole GGUF file", cure="download it again")


def _dequantise(tensor: "ReaderTensor") -> Tensor:
    from gguf.quants import dequantize

    values = dequantize(tensor.data, tensor.tensor_type)
    return torch.from_numpy(np.array(values, dtype=np.float32))


def _unpermute(tensor: Tensor, heads: int) -> Tensor:
    """GGUF rotates neighbouring rows of a head, Hugging Face rotates row i with row i + head_dim / 2."""
    pairs = tensor.reshape(heads, -1, 2, *tensor.shape[1:])
    return pairs.transpose(1, 2).reshape(tensor.shape).contiguous()


def _hf_name(name: str, path: Path) -> str:
    if name in _OUTER_NAMES:
        return _OUTER_NAMES[name]
    match = _LAYER_TENSOR.fullmatch(name)
    if match is None or match[2] not in _LAYER_NAMES:
        raise UserError(f"{path}: tensor {name} is not supported", cure=_USE_FOLDER)
    return f"model.layers.{match[1]}.{_LAYER_NAMES[match[2]]}.{match[3]}"


def _check_supported(metadata: dict[str, Any], reader: "GGUFReader", path: Path) -> None:
    if (architecture := metadata.get("general.architecture")) != "llama":
        raise UserError(f"{path}: GGUF architecture {architecture} is not supported", cure="use one of llama")
    for key in ("llama.expert_count", "llama.attention.sliding_window"):
        if metadata.get(key):
            raise UserError(f"{path}: {key}={metadata[key]} is not supported", cure=_USE_FOLDER)
    scaling = metadata.get("llama.rope.scaling.type", "none")
    if scaling not in ("none", "linear") or any(
        tensor.name == "rope_freqs.weight" for tensor in reader.tensors
    ):
        raise UserError(f"{path}: its rope scaling cannot be taken over from a GGUF file", cure=_USE_FOLDER)


def _hf_config(metadata: dict[str, Any], reader: "GGUFReader", path: Path) -> dict[str, Any]:
    """What config.json of the same model says."""

    def value(key: str, default: Any = None) -> Any:  # noqa: ANN401
        found = metadata.get(f"llama.{key}", default)
        if found is None:
            raise UserError(f"{path}: its metadata has no llama.{key}", cure="download it again")
        # float32 in the file: 1e-5 is to stay 1e-5.
        return float(str(np.float32(found))) if isinstance(found, float) else found

    heads, hidden = value("attention.head_count"), value("embedding_length")
    shapes = {tensor.name: tensor.shape for tensor in reader.tensors}
    rope: dict[str, Any] = {"rope_theta": value("rope.freq_base", 10000.0), "rope_type": "default"}
    if metadata.get("llama.rope.scaling.type") == "linear":
        rope |= {"rope_type": "linear", "factor": value("rope.scaling.factor")}
    head_dim = value("attention.key_length", hidden // heads)
    if value("rope.dimension_count", head_dim) != head_dim:
        raise UserError(f"{path}: rotating a part of each head is not supported", cure=_USE_FOLDER)
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
