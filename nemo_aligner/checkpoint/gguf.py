# SPDX-License-Identifier: Apache-2.0
"""GGUF files of the llama architecture, read as if they were a Hugging Face folder; quantised weights are
dequantised.
"""

import re
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from nemo_aligner.checkpoint.gguf_file import USE_FOLDER, GgufFile, damaged_gguf, read_gguf
from nemo_aligner.checkpoint.gguf_tokenizer import build_tokenizer_files
from nemo_aligner.checkpoint.huggingface import ImportedModel, import_model
from nemo_aligner.errors import UserError, report_damage

if TYPE_CHECKING:
    from gguf import ReaderTensor

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
    """A .gguf file with its tokenizer, see :func:`read_gguf`.

    Weights that are all stored in bfloat16 or all in float16 (norms aside) keep that dtype where nothing is
    lost; dequantised ones are float32, because no shorter dtype holds them exactly.
    """
    file = read_gguf(path)
    with report_damage(f"{path}: its tokenizer is damaged", fix="download it again"):
        tokenizer_files = build_tokenizer_files(file.metadata, where=str(path))
    return import_model(
        GgufTensors(file, path),
        hf_config=file.hf_config,
        generation_config=file.generation_config,
        tokenizer_files=tokenizer_files,
        where=str(path),
    )


class GgufTensors:
    """A TensorSource that dequantises as it reads and puts the rows of q and k into Hugging Face's order."""

    def __init__(self, file: GgufFile, path: Path) -> None:
        self._path = path
        heads = {"q": "num_attention_heads", "k": "num_key_value_heads"}
        self._heads: dict[str, int] = {part: file.hf_config[key] for part, key in heads.items()}
        self._tensors = {_hf_name(tensor.name, path): tensor for tensor in file.reader.tensors}
        self.shapes: dict[str, tuple[int, ...]] = {
            name: tuple(int(n) for n in reversed(t.shape)) for name, t in self._tensors.items()
        }
        with damaged_gguf(path):
            self._dtype = self._common_dtype()

    def dtype_of(self, name: str) -> torch.dtype:  # noqa: ARG002
        """See TensorSource."""
        return self._dtype

    def read(self, name: str, block: tuple[slice, ...] = ()) -> Tensor:
        """See TensorSource."""
        with damaged_gguf(self._path):
            tensor = _dequantise(self._tensors[name]).reshape(self.shapes[name])
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
        raise UserError(f"{path}: tensor {name} is not supported", fix=USE_FOLDER)
    return f"model.layers.{match[1]}.{_LAYER_NAMES[match[2]]}.{match[3]}"
