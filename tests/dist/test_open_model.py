# SPDX-License-Identifier: Apache-2.0
"""Weights that ranks read where they are, are those of a .nemo made first: at every layout, bit for bit."""

from pathlib import Path

import fork
import gguf
import open_model_worker
import torch
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    LlamaForSequenceClassification,
    NemotronConfig,
    NemotronForCausalLM,
    PreTrainedModel,
    Qwen2Config,
    Qwen2ForSequenceClassification,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from nemo_aligner.checkpoint.convert import import_from_huggingface
from tests.unit.checkpoint.conftest import build_tokenizer
from tests.unit.checkpoint.test_gguf import write_gguf

SIZES = {
    "vocab_size": 101,  # odd, so that every tensor parallel size pads it
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,  # fewer than some layouts have tensor parallel ranks
    "max_position_embeddings": 64,
    "pad_token_id": 0,
}


def randomized(model: PreTrainedModel, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    draw = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=draw) * 0.2 + (parameter.ndim == 1))
    return model.to(dtype)


def test_weights_are_those_of_a_nemo_made_first(tmp_path: Path):
    def write(name: str, model: PreTrainedModel, **options: object) -> None:
        model.save_pretrained(tmp_path / name, **options)

    biased = {"attention_bias": True, "mlp_bias": True, "num_key_value_heads": 1}
    write("biased", randomized(LlamaForCausalLM(LlamaConfig(**SIZES | biased))))
    tied = randomized(LlamaForCausalLM(LlamaConfig(**SIZES, tie_word_embeddings=True)), torch.bfloat16)
    write("tied", tied, max_shard_size="20KB")
    write("nemotron", randomized(NemotronForCausalLM(NemotronConfig(**SIZES))))
    write("qwen3", randomized(Qwen3ForCausalLM(Qwen3Config(**SIZES, head_dim=12)), torch.float16))
    write("reward", randomized(LlamaForSequenceClassification(LlamaConfig(**SIZES, num_labels=1))))
    write("attributes", randomized(Qwen2ForSequenceClassification(Qwen2Config(**SIZES, num_labels=5))))
    plain = randomized(LlamaForCausalLM(LlamaConfig(**SIZES)))
    write("plain", plain)
    build_tokenizer().save_pretrained(tmp_path / "plain")
    write_gguf(tmp_path / "plain", tmp_path / "quantised.gguf", gguf.GGMLQuantizationType["Q8_0"])
    write("pickled", plain)
    (tmp_path / "pickled/model.safetensors").unlink()
    torch.save(plain.state_dict(), tmp_path / "pickled/pytorch_model.bin")
    for source in list(tmp_path.iterdir()):
        import_from_huggingface(source, f"{source}.nemo")
    fork.run_script(open_model_worker.__file__, tmp_path, ranks=4)
    assert len(list(tmp_path.glob("done-*"))) == len(open_model_worker.LAYOUTS)
