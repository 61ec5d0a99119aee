# SPDX-License-Identifier: Apache-2.0
"""NeMo's old folders, written here from a Hugging Face model's weights: converted and exported, it is that
model again.
"""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM

from nemo_aligner.checkpoint.convert import export_to_huggingface, import_from_legacy
from nemo_aligner.checkpoint.huggingface import import_huggingface
from nemo_aligner.checkpoint.nemo_archive import open_nemo
from nemo_aligner.checkpoint.weights import WeightReader
from nemo_aligner.errors import UserError

HEADS, LAYERS, VOCAB, ROWS = 4, 3, 101, 128
CONFIG = {
    "num_layers": LAYERS,
    "hidden_size": 32,
    "ffn_hidden_size": 48,
    "num_attention_heads": HEADS,
    "max_position_embeddings": 64,
    "encoder_seq_length": 64,
    "normalization": "rmsnorm",
    "layernorm_epsilon": 1e-6,
    "activation": "fast-swiglu",
    "bias": False,
    "position_embedding_type": "rope",
    "rotary_percentage": 1.0,
    "share_embeddings_and_output_weights": False,
    "tensor_model_parallel_size": 1,
    "precision": "${trainer.precision}",
    "tokenizer": {"library": "sentencepiece", "type": None, "model": "nemo:abc_tokenizer.model"},
}


def padded(tensor: Tensor) -> Tensor:
    return torch.cat([tensor, torch.ones(ROWS - VOCAB, tensor.shape[1])])


def old_names(hf: dict[str, Tensor], *, fused: bool = True) -> dict[str, Tensor]:
    """The names and layouts of NeMo before Megatron-core."""
    root = "model.language_model"
    old = {
        f"{root}.embedding.word_embeddings.weight": padded(hf["model.embed_tokens.weight"]),
        f"{root}.rotary_pos_emb.inv_freq": torch.ones(4),
        f"{root}.encoder.final_layernorm.weight": hf["model.norm.weight"],
        f"{root}.output_layer.weight": padded(hf["lm_head.weight"]),
    }
    for i in range(LAYERS):
        layer, source = f"{root}.encoder.layers.{i}", f"model.layers.{i}"
        # One head after the other: its q rows, its k rows, its v rows.
        heads = [hf[f"{source}.self_attn.{p}_proj.weight"].chunk(HEADS) for p in "qkv"]
        old[f"{layer}.self_attention.query_key_value.weight"] = torch.cat(
            [rows for head in zip(*heads, strict=True) for rows in head]
        )
        old[f"{layer}.self_attention.dense.weight"] = hf[f"{source}.self_attn.o_proj.weight"]
        old[f"{layer}.input_layernorm.weight"] = hf[f"{source}.input_layernorm.weight"]
        old[f"{layer}.post_attention_layernorm.weight"] = hf[f"{source}.post_attention_layernorm.weight"]
        gate, up = hf[f"{source}.mlp.gate_proj.weight"], hf[f"{source}.mlp.up_proj.weight"]
        if fused:
            old[f"{layer}.mlp.dense_h_to_4h.weight"] = torch.cat([gate, up])
        else:
            old[f"{layer}.mlp.dense_h_to_4h.weight"] = gate
            old[f"{layer}.mlp.dense_h_to_4h_2.weight"] = up
        old[f"{layer}.mlp.dense_4h_to_h.weight"] = hf[f"{source}.mlp.down_proj.weight"]
    return old


@pytest.fixture
def write_old(
    hf_folder: Callable[..., Path], sentencepiece_model: Path, tmp_path: Path
) -> Callable[..., Path]:
    """Writes the old folder of the model "llama2", its weights at ``file``; keywords change the config."""

    def write(file: str, state: dict[str, Any] | None = None, *, fused: bool = True, **config: Any) -> Path:
        folder = tmp_path / "old"
        hf = load_file(hf_folder("llama2") / "model.safetensors")
        (folder / file).parent.mkdir(parents=True, exist_ok=True)
        (folder / "model_config.yaml").write_text(yaml.safe_dump(CONFIG | {"vocab_size": VOCAB} | config))
        shutil.copyfile(sentencepiece_model, folder / "abc_tokenizer.model")
        torch.save(old_names(hf, fused=fused) if state is None else state, folder / file)
        return folder

    return write


def logits(folder: Path) -> Tensor:
    with torch.no_grad():
        return AutoModelForCausalLM.from_pretrained(folder)(torch.arange(30)[None]).logits


@pytest.mark.parametrize(
    ("file", "fused"),
    [
        ("model_weights.ckpt", True),
        ("mp_rank_00/model_weights.ckpt", True),
        ("tp_rank_00_pp_rank_000/model_weights.ckpt", False),
    ],
)
def test_an_old_folder_becomes_the_same_model(
    write_old: Callable[..., Path], sentencepiece_model: Path, tmp_path: Path, file: str, fused: bool
):
    old = write_old(file, fused=fused, activation="fast-swiglu" if fused else "swiglu")
    import_from_legacy(old, str(tmp_path / "new.nemo"))
    with open_nemo(tmp_path / "new.nemo") as archive:
        assert archive.config["precision"] == 32
        moved = archive.file(archive.config["tokenizer"]["model"])
        assert moved.read_bytes() == sentencepiece_model.read_bytes()
        assert not WeightReader(archive.weights).read("output_layer.weight")[VOCAB:].any()
    export_to_huggingface(tmp_path / "new.nemo", tmp_path / "out")
    assert torch.equal(logits(tmp_path / "out"), logits(tmp_path / "hf"))
    assert (tmp_path / "out" / "tokenizer.model").read_bytes() == sentencepiece_model.read_bytes()


def test_norms_and_biases_of_layernorm1p_are_copied(write_old: Callable[..., Path], tmp_path: Path):
    names = {
        "input_layernorm.bias": "self_attention.linear_qkv.layer_norm_bias",
        "self_attention.query_key_value.bias": "self_attention.linear_qkv.bias",
        "self_attention.dense.bias": "self_attention.linear_proj.bias",
        "post_attention_layernorm.bias": "mlp.linear_fc1.layer_norm_bias",
        "mlp.dense_h_to_4h.bias": "mlp.linear_fc1.bias",
        "mlp.dense_4h_to_h.bias": "mlp.linear_fc2.bias",
    }
    biases = {f"{layer}.{old}": torch.randn(8) for old in names for layer in range(LAYERS)}
    old = write_old("model_weights.ckpt", normalization="layernorm1p", bias=True)
    state = torch.load(old / "model_weights.ckpt")
    state |= {f"model.language_model.encoder.layers.{name}": value for name, value in biases.items()}
    torch.save(state, old / "model_weights.ckpt")
    import_from_legacy(old, f"{tmp_path}/new/")
    with open_nemo(tmp_path / "new") as archive:
        assert archive.config["normalization"] == "layernorm1p"
        assert archive.config["mcore_gpt"] is True
        reader = WeightReader(archive.weights)
        for name, new in names.items():
            assert torch.equal(reader.read(f"decoder.layers.1.{new}"), biases[f"1.{name}"])


def test_names_that_are_mcore_s_already_are_kept(
    write_old: Callable[..., Path], hf_folder: Callable[..., Path], tmp_path: Path
):
    weights = dict(import_huggingface(hf_folder("llama2")).weights)
    for root in ("model.", "model.module."):
        state = {root + name: tensor for name, tensor in weights.items()}
        state[f"{root}decoder.layers.0.mlp.linear_fc1._extra_state"] = torch.empty(0)
        import_from_legacy(write_old("model_weights.ckpt", state), f"{tmp_path}/new/", overwrite=True)
        with open_nemo(tmp_path / "new") as archive:
            reader = WeightReader(archive.weights)
            assert set(list(reader.shapes)) == set(weights)
            for name, tensor in weights.items():
                assert torch.equal(reader.read(name)[: len(tensor)], tensor)


def test_what_cannot_be_converted_is_refused(write_old: Callable[..., Path], tmp_path: Path, hostile: object):
    out = f"{tmp_path}/new.nemo"
    word = {"model.language_model.embedding.word_embeddings.weight": torch.randn(128, 8)}
    for state, message in (
        ({"model.encoder.weight": torch.zeros(1)}, r"encoder\.weight is no tensor"),
        ({"x": hostile}, "more than tensors"),
        (word, r"tensors are missing, the first is decoder\.final_layernorm"),
    ):
        with pytest.raises(UserError, match=message):
            import_from_legacy(write_old("model_weights.ckpt", state), out)
    for config, message in (
        ({"megatron_legacy": True}, "megatron_legacy"),
        ({"num_layers": 2}, "more layers than num_layers=2"),
        ({"num_layers": 4}, r"first is decoder\.layers\.3"),
        ({"num_layers": None}, "num_layers=None"),
    ):
        with pytest.raises(UserError, match=message):
            import_from_legacy(write_old("model_weights.ckpt", **config), out)
    (tmp_path / "old" / "model_weights.ckpt").unlink()
    with pytest.raises(UserError, match=r"holds no model_weights\.ckpt"):
        import_from_legacy(tmp_path / "old", out)
    write_old("mp_rank_00/model_weights.ckpt", word)
    with pytest.raises(UserError, match=r"split over 2 ranks[\s\S]*merge"):
        import_from_legacy(write_old("mp_rank_01/model_weights.ckpt", word), out)
    assert not (tmp_path / "new.nemo").exists()
    assert not (tmp_path / "ran").exists()
