# SPDX-License-Identifier: Apache-2.0
"""Import and export against transformers: what it wrote comes back bit for bit, and it computes the same
with it.
"""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    LlamaConfig,
    LlamaForCausalLM,
)

from nemo_aligner.checkpoint.convert import export_to_huggingface, import_from_huggingface
from nemo_aligner.checkpoint.huggingface import export_huggingface, import_huggingface
from nemo_aligner.checkpoint.nemo_archive import open_nemo
from nemo_aligner.checkpoint.weights import WeightReader
from nemo_aligner.errors import UserError

NAMES = [
    *("llama2", "llama3", "llama-linear", "llama-bias", "llama-yarn", "llama-mlp-bias", "smollm2"),
    *("mistral", "mistral-full", "qwen2", "qwen2-yarn", "qwen2-window", "qwen3", "qwen3-yarn", "qwen3-tied"),
    *("nemotron", "nemotron-attention-bias", "nemotron-bias"),
]
TOKENS = torch.arange(40).reshape(1, 40) % 101


def logits(folder: Path) -> torch.Tensor:
    model = AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager").eval()
    with torch.no_grad():
        return model(TOKENS).logits


def settings(folder: Path) -> dict[str, Any]:
    return {k: v for k, v in AutoConfig.from_pretrained(folder).to_dict().items() if k != "_name_or_path"}


def edit_json(path: Path, **values: Any) -> None:
    content = json.loads(path.read_text()) | values
    path.write_text(json.dumps({key: value for key, value in content.items() if value is not ...}))


def state(folder: Path) -> dict[str, torch.Tensor]:
    return {name: value for file in folder.glob("*.safetensors") for name, value in load_file(file).items()}


def assert_same(left: dict[str, torch.Tensor], right: dict[str, torch.Tensor]) -> None:
    assert left.keys() == right.keys()
    for name, value in left.items():
        assert value.dtype == right[name].dtype, name
        assert torch.equal(value, right[name]), name


@pytest.mark.parametrize("name", NAMES)
def test_there_and_back(hf_folder: Callable[..., Path], tmp_path: Path, name: str):
    source, out = hf_folder(name), tmp_path / "out"
    import_from_huggingface(source, str(tmp_path / "x.nemo"))
    export_to_huggingface(tmp_path / "x.nemo", out)

    assert_same(state(source), state(out))
    assert torch.equal(logits(source), logits(out))
    assert settings(source) == settings(out)
    assert (
        GenerationConfig.from_pretrained(source).to_dict() == GenerationConfig.from_pretrained(out).to_dict()
    )

    import_from_huggingface(out, str(tmp_path / "again.nemo"))
    with open_nemo(tmp_path / "x.nemo") as first, open_nemo(tmp_path / "again.nemo") as second:
        one, two = WeightReader(first.weights), WeightReader(second.weights)
        assert_same({n: one.read(n) for n in list(one.shapes)}, {n: two.read(n) for n in list(two.shapes)})
        first.config.pop("huggingface"), second.config.pop("huggingface")
        assert first.config == second.config


def test_qkv_rows_are_interleaved_by_group(hf_folder: Callable[..., Path]):
    source = hf_folder("llama3")
    tensors = dict(import_huggingface(source).weights)
    q, k, v = (state(source)[f"model.layers.1.self_attn.{p}_proj.weight"].split(8) for p in "qkv")
    expected = torch.cat([q[0], q[1], k[0], v[0], q[2], q[3], k[1], v[1]])
    assert torch.equal(tensors["decoder.layers.1.self_attention.linear_qkv.weight"], expected)


def test_odd_sizes_come_back_in_fp16(tmp_path: Path):
    """A vocabulary of 7, three key/value heads, and heads that together are not as wide as the model."""
    sizes = {"num_attention_heads": 6, "num_key_value_heads": 3, "head_dim": 10, "num_hidden_layers": 2}
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(vocab_size=7, hidden_size=24, intermediate_size=9, **sizes)).half()
    model.save_pretrained(tmp_path / "hf")
    import_from_huggingface(tmp_path / "hf", str(tmp_path / "x.nemo"))
    export_to_huggingface(tmp_path / "x.nemo", tmp_path / "out")
    assert_same(state(tmp_path / "hf"), state(tmp_path / "out"))
    assert settings(tmp_path / "hf") == settings(tmp_path / "out")


@pytest.mark.parametrize(("dtype", "precision"), [(torch.bfloat16, "bf16"), (torch.float16, 16)])
def test_stored_dtype_is_kept(
    hf_folder: Callable[..., Path], tmp_path: Path, dtype: torch.dtype, precision: object
):
    source = hf_folder("smollm2", dtype)
    import_from_huggingface(source, f"{tmp_path}/x/")
    with open_nemo(tmp_path / "x") as archive:
        assert archive.config["precision"] == precision
    export_to_huggingface(tmp_path / "x", tmp_path / "out")
    assert_same(state(source), state(tmp_path / "out"))


def test_tokenizer_comes_along(hf_folder: Callable[..., Path], tmp_path: Path):
    source = hf_folder("llama2")
    import_from_huggingface(source, str(tmp_path / "x.nemo"))
    export_to_huggingface(tmp_path / "x.nemo", tmp_path / "out")
    before, after = AutoTokenizer.from_pretrained(source), AutoTokenizer.from_pretrained(tmp_path / "out")
    assert after("the capital is lit").input_ids == before("the capital is lit").input_ids
    assert after.chat_template == before.chat_template
    assert (after.bos_token, after.eos_token) == ("<s>", "</s>")


def test_no_tokenizer_passes_with_a_warning(
    hf_folder: Callable[..., Path], tmp_path: Path, caplog: pytest.LogCaptureFixture
):
    source = hf_folder("llama2", tokenizer=False)
    (source / "tokenizer_config.json").write_text("{}")
    import_from_huggingface(source, str(tmp_path / "x.nemo"))
    assert "no tokenizer that loads" in caplog.text
    with open_nemo(tmp_path / "x.nemo") as archive:
        assert archive.config["tokenizer"] is None
    export_to_huggingface(tmp_path / "x.nemo", tmp_path / "out")
    assert torch.equal(logits(source), logits(tmp_path / "out"))


def test_shards_are_read_and_written(hf_folder: Callable[..., Path], tmp_path: Path):
    source = hf_folder("llama3", max_shard_size="20KB")
    assert len(list(source.glob("*.safetensors"))) > 2
    import_from_huggingface(source, f"{tmp_path}/x/")
    with open_nemo(tmp_path / "x") as archive:
        export_huggingface(
            archive.config, WeightReader(archive.weights), {}, tmp_path / "out", max_shard_bytes=20_000
        )
    assert len(list((tmp_path / "out").glob("*.safetensors"))) > 2
    assert torch.equal(logits(source), logits(tmp_path / "out"))


def test_the_index_says_which_shard_has_a_tensor(
    hf_folder: Callable[..., Path], caplog: pytest.LogCaptureFixture
):
    source = hf_folder("llama3", max_shard_size="20KB")
    expected = dict(import_huggingface(source).weights)
    first, *_, last = sorted(source.glob("*.safetensors"))
    stale = next(name for name in load_file(first) if name != "lm_head.weight")
    save_file(load_file(last) | {stale: load_file(first)[stale] + 1, "old.weight": torch.ones(1)}, last)
    assert_same(expected, dict(import_huggingface(source).weights))
    assert f"{last} holds tensors that the index does not look for there" in caplog.text
    assert all(name in caplog.text for name in (stale, "old.weight"))
    save_file({name: value for name, value in load_file(first).items() if name != stale}, first)
    with pytest.raises(UserError, match=f"{first} lacks tensors that its index names: {stale}"):
        import_huggingface(source)


@pytest.mark.parametrize("zipped", [True, False])
def test_pickled_weights_are_read(hf_folder: Callable[..., Path], zipped: bool):
    source = hf_folder("llama3")
    expected = dict(import_huggingface(source).weights)
    tensors = load_file(source / "model.safetensors")
    torch.save(tensors, source / "pytorch_model.bin", _use_new_zipfile_serialization=zipped)
    (source / "model.safetensors").unlink()
    assert_same(expected, dict(import_huggingface(source).weights))


def test_pickled_weights_run_no_code(hf_folder: Callable[..., Path], hostile: object, tmp_path: Path):
    source = hf_folder("llama2")
    torch.save({"model.norm.weight": hostile}, source / "pytorch_model.bin")
    (source / "model.safetensors").unlink()
    with pytest.raises(UserError, match="more than tensors"):
        import_huggingface(source)
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("name", ["llama3", "llama-linear", "qwen2-yarn", "llama-yarn"])
@pytest.mark.parametrize("key", ["rope_type", "type"])
def test_older_rope_keys_are_read(hf_folder: Callable[..., Path], tmp_path: Path, name: str, key: str):
    source = hf_folder(name, tokenizer=False)
    expected = logits(source)
    rope = json.loads((source / "config.json").read_text())["rope_parameters"]
    theta, rope[key] = rope.pop("rope_theta"), rope.pop("rope_type")
    edit_json(source / "config.json", rope_parameters=..., rope_theta=theta, rope_scaling=rope)
    import_from_huggingface(source, str(tmp_path / "x.nemo"))
    export_to_huggingface(tmp_path / "x.nemo", tmp_path / "out")
    assert torch.equal(logits(tmp_path / "out"), expected)


@pytest.mark.parametrize(
    ("stored", "window"),
    [
        ({"use_sliding_window": False, "sliding_window": 9, "max_window_layers": 1}, None),
        ({"use_sliding_window": True, "sliding_window": 9, "max_window_layers": 3}, None),
        ({"use_sliding_window": True, "sliding_window": None, "max_window_layers": 0}, None),
        ({"use_sliding_window": True, "sliding_window": 9, "max_window_layers": 0}, 9),
        ({"use_sliding_window": True, "sliding_window": 9, "layer_types": ["sliding_attention"] * 3}, 9),
    ],
)
def test_sliding_window_of_qwen(hf_folder: Callable[..., Path], stored: dict[str, Any], window: int | None):
    source = hf_folder("qwen2", tokenizer=False)
    edit_json(source / "config.json", **{"layer_types": ...} | stored)
    assert import_huggingface(source).config["window_size"] == window


def test_older_keys_of_nemotron_are_read(hf_folder: Callable[..., Path], tmp_path: Path):
    source = hf_folder("nemotron-bias", tokenizer=False)
    share = {"partial_rotary_factor": 0.25, "rope_theta": 10000.0, "rope_parameters": ...}
    edit_json(source / "config.json", **share)
    assert import_huggingface(source).config["rotary_percentage"] == 0.25
    edit_json(source / "config.json", partial_rotary_factor=...)
    assert import_huggingface(source).config["rotary_percentage"] == 0.5
    import_from_huggingface(source, str(tmp_path / "x.nemo"))
    export_to_huggingface(tmp_path / "x.nemo", tmp_path / "out")
    exported = json.loads((tmp_path / "out/config.json").read_text())
    assert exported["partial_rotary_factor"] == exported["rope_parameters"]["partial_rotary_factor"] == 0.5


def test_no_padding_of_the_vocabulary_is_exported(hf_folder: Callable[..., Path], tmp_path: Path):
    for name in ("qwen2", "qwen3-tied", "nemotron"):
        source, nemo, out = hf_folder(name), tmp_path / f"{name}.nemo", tmp_path / name
        import_from_huggingface(source, str(nemo))
        with open_nemo(nemo) as archive:
            assert WeightReader(archive.weights).shapes["embedding.word_embeddings.weight"] == (128, 32)
        export_to_huggingface(nemo, out)
        assert state(out)["model.embed_tokens.weight"].shape == (101, 32)


def test_a_stored_copy_of_a_tied_head_is_accepted_if_equal(hf_folder: Callable[..., Path]):
    source = hf_folder("smollm2")
    tensors = load_file(source / "model.safetensors")
    head = tensors["model.embed_tokens.weight"].clone()
    save_file(tensors | {"lm_head.weight": head}, source / "model.safetensors")
    assert "output_layer.weight" not in dict(import_huggingface(source).weights)
    save_file(tensors | {"lm_head.weight": head + 1}, source / "model.safetensors")
    with pytest.raises(UserError, match=r"lm_head\.weight differs"):
        import_huggingface(source)


@pytest.mark.parametrize(
    ("name", "changes", "message"),
    [
        (
            "llama2",
            {"architectures": ["BertModel"]},
            r"BertModel is not supported[\s\S]*LlamaForCausalLM or Mistral",
        ),
        ("llama2", {"hidden_act": "gelu"}, "hidden_act=gelu"),
        ("llama2", {"quantization_config": {"bits": 4}}, "quantised"),
        ("llama2", {"attention_bias": True}, r"missing: model\.layers\.0\.self_attn\.k_proj\.bias"),
        ("llama2", {"rope_parameters": {"rope_type": "dynamic", "factor": 2.0}}, "type dynamic"),
        ("llama2", {"rope_scaling": {"type": "longrope", "factor": 2.0}}, "type longrope"),
        ("llama2", {"rope_scaling": {"type": "yarn"}}, "type yarn lacks .*factor"),
        ("llama2", {"rope_parameters": {"rope_type": "llama3", "factor": 2.0}}, "lacks .*low_freq_factor"),
        ("llama2", {"partial_rotary_factor": 0.5}, "partial_rotary_factor=0.5"),
        ("llama2", {"hidden_size": ...}, "no hidden_size"),
        ("llama2", {"num_hidden_layers": 4}, r"missing: model\.layers\.3"),
        ("llama2", {"num_hidden_layers": 2}, r"does not have: model\.layers\.2"),
        ("llama2", {"vocab_size": 100}, r"embed_tokens\.weight has shape \(101, 32\)"),
        ("mistral", {"layer_types": ["full_attention"]}, "layer_types"),
        (
            "qwen2",
            {"use_sliding_window": True, "sliding_window": 9, "max_window_layers": 1, "layer_types": None},
            r"9 tokens is on 2 of its 3 layers[\s\S]*\"use_sliding_window\": false",
        ),
        (
            "qwen3",
            {
                "use_sliding_window": True,
                "sliding_window": 9,
                "layer_types": ["full_attention", "sliding_attention", "sliding_attention"],
            },
            "on 2 of its 3 layers",
        ),
        ("qwen3", {"attention_bias": True}, r"missing: model\.layers\.0\.self_attn\.k_proj\.bias"),
        ("nemotron", {"hidden_act": "silu"}, "hidden_act=silu"),
        ("nemotron-bias", {"mlp_bias": False}, r"does not have: model\.layers\.0\.mlp\.down_proj\.bias"),
    ],
)
def test_what_cannot_be_imported_is_refused(
    hf_folder: Callable[..., Path], name: str, changes: dict[str, Any], message: str
):
    source = hf_folder(name, tokenizer=False)
    edit_json(source / "config.json", **changes)
    with pytest.raises(UserError, match=message):
        import_huggingface(source)


def test_damaged_and_foreign_folders_are_refused(hf_folder: Callable[..., Path], tmp_path: Path):
    with pytest.raises(UserError, match="not a folder"):
        import_huggingface(tmp_path / "nothing")
    meta = tmp_path / "meta"
    meta.mkdir()
    (meta / "consolidated.00.pth").touch()
    with pytest.raises(UserError, match=r"Meta's own layout[\s\S]*convert_llama_weights_to_hf"):
        import_huggingface(meta)
    source = hf_folder("llama2")
    weights = source / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    with pytest.raises(UserError, match="not a whole safetensors file"):
        import_huggingface(source)
    weights.unlink()
    with pytest.raises(UserError, match="holds no weights"):
        import_huggingface(source)
    (source / "model.safetensors.index.json").write_text('{"weight_map": {"a": "../hf/config.json"}}')
    with pytest.raises(UserError, match="which is not in"):
        import_huggingface(source)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"normalization": "layernorm1p"}, "normalization=layernorm1p"),
        ({"activation": "squared-relu"}, "activation=squared-relu"),
        ({"window_size": 5}, r"window_size=5[\s\S]*huggingface\.architecture: MistralForCausalLM"),
        ({"qkv_bias": True}, r"qkv_bias=True[\s\S]*Qwen2ForCausalLM"),
        ({"qk_layernorm": True}, r"qk_layernorm=True[\s\S]*Qwen3ForCausalLM"),
        ({"rotary_percentage": 0.5}, r"rotary_percentage=0\.5, it has 1\.0[\s\S]*Fix: .*NemotronForCausalLM"),
        ({"seq_len_interpolation_factor": 2}, "seq_len_interpolation_factor=2"),
        ({"vocab_size": 300}, "embedding.word_embeddings.weight has shape"),
        ({"num_layers": 4}, r"lacks tensors: decoder\.layers\.3"),
        ({"share_embeddings_and_output_weights": True}, r"cannot be exported: output_layer\.weight"),
        ({"vocab_size": None}, "no vocab_size"),
    ],
)
def test_what_cannot_be_exported_is_refused(
    hf_folder: Callable[..., Path], tmp_path: Path, changes: dict[str, Any], message: str
):
    import_from_huggingface(hf_folder("llama2", tokenizer=False), f"{tmp_path}/x/")
    with open_nemo(tmp_path / "x") as archive, pytest.raises(UserError, match=message):
        export_huggingface(archive.config | changes, WeightReader(archive.weights), {}, tmp_path / "out")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["hf", "x"]


@pytest.mark.parametrize("name", ["mistral", "qwen2", "qwen2-window", "qwen3", "nemotron", "nemotron-bias"])
def test_a_model_that_names_no_family_is_exported(hf_folder: Callable[..., Path], tmp_path: Path, name: str):
    source = hf_folder(name)
    import_from_huggingface(source, f"{tmp_path}/x/")
    with open_nemo(tmp_path / "x") as archive:
        del archive.config["huggingface"]
        export_huggingface(archive.config, WeightReader(archive.weights), {}, tmp_path / "out")
    assert torch.equal(logits(source), logits(tmp_path / "out"))


def test_export_overwrites_only_when_told_and_only_its_own_kind(
    hf_folder: Callable[..., Path], tmp_path: Path
):
    source = hf_folder("smollm2")
    import_from_huggingface(source, str(tmp_path / "x.nemo"))
    out = tmp_path / "out"
    out.mkdir()
    (out / "diary.txt").write_text("mine")
    with pytest.raises(UserError, match="exists"):
        export_to_huggingface(tmp_path / "x.nemo", out)
    with pytest.raises(UserError, match="not a Hugging Face folder"):
        export_to_huggingface(tmp_path / "x.nemo", out, overwrite=True)
    assert (out / "diary.txt").read_text() == "mine"
    export_to_huggingface(tmp_path / "x.nemo", source, overwrite=True)
    assert list(source.glob("*.safetensors"))


def test_the_llama_script_refuses_other_families(hf_folder: Callable[..., Path], tmp_path: Path):
    source, out = hf_folder("mistral"), tmp_path / "x.nemo"
    with pytest.raises(UserError, match=r"is a MistralForCausalLM[\s\S]*import_hf\.py"):
        import_from_huggingface(source, str(out), architecture="LlamaForCausalLM")
    assert not out.exists()
