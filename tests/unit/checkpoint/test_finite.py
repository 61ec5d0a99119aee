# SPDX-License-Identifier: Apache-2.0
"""Weights that are infinite or NaN are refused by name wherever they would be saved, loaded or converted."""

import json
import math
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import LlamaConfig, LlamaForCausalLM

from nemo_aligner.checkpoint.convert import export_to_huggingface, import_from_huggingface
from nemo_aligner.checkpoint.finite import is_finite, refuse_non_finite
from nemo_aligner.checkpoint.model_nemo import save_nemo
from nemo_aligner.checkpoint.nemo_archive import open_nemo
from nemo_aligner.checkpoint.sharded import load_model, save_model
from nemo_aligner.checkpoint.weights import WeightReader
from nemo_aligner.errors import UserError
from nemo_aligner.models.gpt.config import GPTConfig
from nemo_aligner.models.gpt.model import GPT, build_gpt
from nemo_aligner.parallel import world
from nemo_aligner.parallel.ranks import Layout

BROKEN = "decoder.layers.1.mlp.linear_fc2.weight"


@pytest.fixture(scope="module", autouse=True)
def _one_rank() -> Iterator[None]:
    with world.ensure_single_process():
        yield


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Hugging Face folder of two layers."""
    path = tmp_path_factory.mktemp("finite") / "hf"
    torch.manual_seed(0)
    sizes = {"vocab_size": 32, "hidden_size": 16, "intermediate_size": 24, "num_attention_heads": 2}
    LlamaForCausalLM(LlamaConfig(**sizes, num_hidden_layers=2, num_key_value_heads=2)).save_pretrained(path)
    return path


@pytest.fixture
def model(folder: Path, tmp_path: Path) -> GPT:
    import_from_huggingface(folder, f"{tmp_path}/sound/")
    with open_nemo(tmp_path / "sound") as archive:
        built = build_gpt(GPTConfig.from_dict(archive.config), Layout(), torch.float32)
        load_model(built, archive.weights)
    return built


def spoil(model: GPT, number: float = math.nan) -> None:
    with torch.no_grad():
        model.get_parameter(BROKEN)[3, 5] = number


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("number", [math.nan, math.inf, -math.inf])
def test_one_number_among_many_is_found(dtype: torch.dtype, number: float):
    tensors = [torch.full((7, 1031), torch.finfo(dtype).max, dtype=dtype), torch.empty(0, dtype=dtype)]
    assert is_finite(tensors)
    tensors[0][5, 1030] = number
    assert not is_finite(tensors)


@pytest.mark.parametrize("number", [math.nan, math.inf])
def test_a_model_is_not_saved(model: GPT, tmp_path: Path, number: float):
    spoil(model, number)
    with pytest.raises(UserError, match=f"x.nemo is not made of them: {BROKEN} is not finite"):
        save_nemo(model, tmp_path / "x.nemo", config={}, files={})
    assert not (tmp_path / "x.nemo").exists()
    refuse_non_finite(model, problem="", fix="", but="decoder")


def test_weights_are_neither_loaded_nor_exported(model: GPT, tmp_path: Path):
    spoil(model)
    weights = tmp_path / "sound/model_weights"
    weights.rename(tmp_path / "set aside")
    save_model(model, weights)
    (tmp_path / "sound/digests.json").unlink()
    spoil(model, 0.0)
    with pytest.raises(UserError, match=rf"the weights in {weights} are broken: {BROKEN} is not finite"):
        load_model(model, weights)
    with pytest.raises(UserError, match=f"{BROKEN} holds numbers that are infinite or NaN"):
        export_to_huggingface(tmp_path / "sound", tmp_path / "out")
    assert not (tmp_path / "out").exists()
    assert not WeightReader(weights).read(BROKEN).isfinite().all()


def test_a_folder_of_hugging_face_is_not_imported(folder: Path, tmp_path: Path):
    tensors = load_file(folder / "model.safetensors")
    tensors["model.norm.weight"][2] = math.inf
    broken = tmp_path / "broken"
    broken.mkdir()
    (broken / "config.json").write_text(json.dumps(json.loads((folder / "config.json").read_text())))
    save_file(tensors, broken / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UserError, match=r"decoder\.final_layernorm\.weight holds"):
        import_from_huggingface(broken, str(tmp_path / "x.nemo"))
    assert not (tmp_path / "x.nemo").exists()
