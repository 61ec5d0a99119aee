# SPDX-License-Identifier: Apache-2.0
"""GGUF files, laid out as llama.cpp's converter does, against the Hugging Face folder that they were made
of.
"""

import json
from collections.abc import Callable
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from gguf.quants import dequantize, quantize
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

from nemo_aligner.checkpoint.convert import export_to_huggingface, import_from_huggingface
from nemo_aligner.checkpoint.gguf import import_gguf
from nemo_aligner.errors import UserError

NAMES = {
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "lm_head": "output",
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}
TEXTS = ["the capital of France", "  one\n\ttwo 12345 don't", "日本 🙂", "<s>lamp</s>"]
F32, BF16, F16 = (gguf.GGMLQuantizationType[name] for name in ("F32", "BF16", "F16"))
CONTROL = 3


def gguf_name(name: str) -> str:
    stem, _, kind = name.rpartition(".")
    if not stem.startswith("model.layers."):
        return f"{NAMES[stem]}.{kind}"
    layer, _, rest = stem.removeprefix("model.layers.").partition(".")
    return f"blk.{layer}.{NAMES[rest]}.{kind}"


def permute(tensor: Tensor, heads: int) -> Tensor:
    """Neighbouring rows are rotated together in GGUF: (2, half) of each head becomes (half, 2)."""
    return tensor.reshape(heads, 2, -1, *tensor.shape[1:]).swapaxes(1, 2).reshape(tensor.shape)


def write_gguf(
    source: Path, path: Path, kind: gguf.GGMLQuantizationType = F32, *, split: str = "gpt-2", **extra: str
) -> dict[str, Tensor]:
    """Writes the model of ``source``; returns its tensors by Hugging Face name as the file holds them."""
    config = json.loads((source / "config.json").read_text())
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(config["num_attention_heads"])
    writer.add_head_count_kv(config["num_key_value_heads"])
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_rope_freq_base(config["rope_parameters"]["rope_theta"])
    write_tokenizer(writer, source, split)
    for key, value in extra.items():
        writer.add_string(key, value)
    stored = {}
    for name, tensor in load_file(source / "model.safetensors").items():
        for part in "qk":
            if f"{part}_proj" in name:
                heads = config["num_attention_heads" if part == "q" else "num_key_value_heads"]
                permuted = permute(tensor, heads)
                break
        else:
            permuted = tensor
        used = kind if tensor.ndim > 1 and tensor.shape[-1] % 32 == 0 else F32
        data = quantize(permuted.float().numpy(), used)
        writer.add_tensor(gguf_name(name), data, raw_dtype=used)
        stored[name] = torch.from_numpy(
            dequantize(quantize(tensor.float().numpy(), used), used).astype(np.float32)
        )
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return stored


def write_tokenizer(writer: gguf.GGUFWriter, source: Path, split: str) -> None:
    content = json.loads((source / "tokenizer.json").read_text())
    tokens = sorted(content["model"]["vocab"], key=content["model"]["vocab"].get)
    tokens += [f"unused{i}" for i in range(len(tokens), 101)]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(split)
    writer.add_token_list(tokens)
    writer.add_token_types([CONTROL] * 3 + [1] * (len(tokens) - 3))
    writer.add_token_merges([" ".join(merge) for merge in content["model"]["merges"]])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_eot_token_id(7)
    writer.add_eom_token_id(2)
    writer.add_unk_token_id(0)
    writer.add_chat_template((source / "chat_template.jinja").read_text())


def converted(path: Path, tmp_path: Path) -> Path:
    import_from_huggingface(path, str(tmp_path / "x.nemo"))
    export_to_huggingface(tmp_path / "x.nemo", tmp_path / "out")
    return tmp_path / "out"


@pytest.mark.parametrize("name", ["smollm2", "llama2", "llama-bias"])
def test_an_unquantised_file_is_the_model(hf_folder: Callable[..., Path], tmp_path: Path, name: str):
    source = hf_folder(name)
    write_gguf(source, tmp_path / "x.gguf")
    out = converted(tmp_path / "x.gguf", tmp_path)
    tokens = torch.arange(30)[None]
    with torch.no_grad():
        expected, found = (
            AutoModelForCausalLM.from_pretrained(folder)(tokens).logits for folder in (source, out)
        )
    assert torch.equal(found, expected)
    assert json.loads((out / "config.json").read_text())["rms_norm_eps"] in (1e-5, 1e-6)


@pytest.mark.parametrize(
    ("kind", "dtype"),
    [("Q4_0", torch.float32), ("Q4_1", torch.float32), ("Q8_0", torch.float32), ("F16", torch.float32)],
)
def test_quantised_tensors_are_dequantised(
    hf_folder: Callable[..., Path], tmp_path: Path, kind: str, dtype: torch.dtype
):
    stored = write_gguf(hf_folder("smollm2"), tmp_path / "x.gguf", gguf.GGMLQuantizationType[kind])
    found = load_file(converted(tmp_path / "x.gguf", tmp_path) / "model.safetensors")
    assert found.keys() == stored.keys()
    for name, tensor in found.items():
        assert tensor.dtype == dtype
        assert torch.equal(tensor, stored[name]), name


@pytest.mark.parametrize(("kind", "dtype"), [("BF16", torch.bfloat16), ("F16", torch.float16)])
def test_short_dtypes_are_kept_where_they_are_exact(
    hf_folder: Callable[..., Path], tmp_path: Path, kind: str, dtype: torch.dtype
):
    source = hf_folder("llama-square", dtype)
    write_gguf(source, tmp_path / "x.gguf", gguf.GGMLQuantizationType[kind])
    found, expected = (
        load_file(folder / "model.safetensors")
        for folder in (converted(tmp_path / "x.gguf", tmp_path), source)
    )
    for name, tensor in expected.items():
        assert found[name].dtype == dtype
        assert torch.equal(found[name], tensor), name


def test_the_tokenizer_is_rebuilt(hf_folder: Callable[..., Path], tmp_path: Path):
    source = hf_folder("smollm2")
    write_gguf(source, tmp_path / "x.gguf")
    expected, found = (
        AutoTokenizer.from_pretrained(source),
        AutoTokenizer.from_pretrained(converted(tmp_path / "x.gguf", tmp_path)),
    )
    for text in TEXTS:
        ids = expected(text).input_ids
        assert found(text).input_ids == ids
        assert found.decode(ids) == expected.decode(ids)
    assert (found.bos_token, found.eos_token, found.unk_token) == ("<s>", "</s>", "<unk>")
    messages = [{"role": "user", "content": "hi"}]
    assert found.apply_chat_template(messages, tokenize=False) == "hi</s>"
    # The end of a turn ends a text too; that of a message is EOS here.
    assert GenerationConfig.from_pretrained(tmp_path / "out").eos_token_id == [2, 7]


@pytest.mark.parametrize(
    ("split", "pieces"),
    [
        ("gpt-2", ["in", "Ġ12345", "Ċ", "Ċ", "don", "'t"]),
        ("smollm", ["in", "Ġ", "1", "2", "3", "4", "5", "Ċ", "Ċ", "don", "'t"]),
        ("llama-bpe", ["in", "Ġ", "123", "45", "ĊĊ", "don", "'t"]),
    ],
)
def test_text_is_split_as_the_file_says(
    hf_folder: Callable[..., Path], tmp_path: Path, split: str, pieces: list[str]
):
    write_gguf(hf_folder("smollm2"), tmp_path / "x.gguf", split=split)
    tokenizer = AutoTokenizer.from_pretrained(converted(tmp_path / "x.gguf", tmp_path))
    found = tokenizer.backend_tokenizer.pre_tokenizer.pre_tokenize_str("in 12345\n\ndon't")
    assert [piece for piece, _ in found] == pieces


def test_an_unknown_split_passes_without_a_tokenizer(
    hf_folder: Callable[..., Path], tmp_path: Path, caplog: pytest.LogCaptureFixture
):
    write_gguf(hf_folder("smollm2"), tmp_path / "x.gguf", split="deepseek-coder")
    assert import_gguf(tmp_path / "x.gguf").config["tokenizer"] is None
    assert "deepseek-coder cannot be rebuilt" in caplog.text


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        ({"llama.rope.scaling.type": "yarn"}, "rope scaling"),
        ({"llama.expert_count": "8"}, r"llama\.expert_count=8"),
    ],
)
def test_what_is_not_supported_is_refused(
    hf_folder: Callable[..., Path], tmp_path: Path, extra: dict[str, str], message: str
):
    write_gguf(hf_folder("smollm2"), tmp_path / "x.gguf", **extra)
    with pytest.raises(UserError, match=message):
        import_gguf(tmp_path / "x.gguf")


def test_damaged_files_are_refused(hf_folder: Callable[..., Path], tmp_path: Path):
    path = tmp_path / "x.gguf"
    write_gguf(hf_folder("smollm2"), path)
    whole = path.read_bytes()
    for content in (b"", b"GGUF", whole[:100], whole[: len(whole) // 2], b"x" * 1000):
        path.write_bytes(content)
        with pytest.raises(UserError, match=r"x\.gguf"):
            import_gguf(path)
    with pytest.raises(UserError, match="does not exist"):
        import_gguf(tmp_path / "y.gguf")
