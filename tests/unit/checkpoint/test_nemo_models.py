# SPDX-License-Identifier: Apache-2.0
"""Models as NeMo wrote them, with all that their model_config.yaml says, against transformers' modules."""

import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import whole_logits
import yaml
from sentencepiece import SentencePieceProcessor
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    LlamaConfig,
    NemotronConfig,
    NemotronForCausalLM,
    PreTrainedModel,
)
from transformers.models.llama.modeling_llama import LlamaMLP

from nemo_aligner.batch import TokenBatch
from nemo_aligner.checkpoint.convert import export_to_huggingface, import_from_huggingface, import_from_legacy
from nemo_aligner.checkpoint.huggingface import import_huggingface
from nemo_aligner.checkpoint.nemo_archive import open_nemo
from nemo_aligner.checkpoint.sharded import load_model
from nemo_aligner.data.tokenizer import load_tokenizer
from nemo_aligner.errors import UserError
from nemo_aligner.models.gpt.config import GPTConfig
from nemo_aligner.models.gpt.model import build_gpt
from nemo_aligner.parallel import world
from nemo_aligner.parallel.ranks import Layout

LAYERS, HEADS = 3, 4
TOKENS = torch.arange(40).reshape(2, 20) * 7 % 31
SIZES = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": HEADS,
    "num_key_value_heads": HEADS,
    "max_position_embeddings": 64,
    "attn_implementation": "eager",
}
# The model block of a pretraining run of the time of GPT-2B-001.
GPT_2B = """
mcore_gpt: false
micro_batch_size: 4
global_batch_size: 512
rampup_batch_size: null
tensor_model_parallel_size: 1
pipeline_model_parallel_size: 1
virtual_pipeline_model_parallel_size: null
resume_from_checkpoint: null
encoder_seq_length: 64
max_position_embeddings: 64
num_layers: 3
hidden_size: 32
ffn_hidden_size: 48
num_attention_heads: 4
init_method_std: 0.014
use_scaled_init_method: true
hidden_dropout: 0.0
attention_dropout: 0.0
ffn_dropout: 0.0
kv_channels: null
apply_query_key_layer_scaling: true
normalization: layernorm1p
layernorm_epsilon: 1.0e-05
do_layer_norm_weight_decay: false
make_vocab_size_divisible_by: 128
pre_process: true
post_process: true
persist_layer_norm: true
bias: false
activation: fast-swiglu
headscale: false
transformer_block_type: pre_ln
openai_gelu: false
normalize_attention_scores: true
position_embedding_type: rope
rotary_percentage: 0.5
attention_type: multihead
share_embeddings_and_output_weights: false
overlap_p2p_comm: false
batch_p2p_comm: true
seq_len_interpolation_factor: null
num_query_groups: null
tokenizer:
  library: sentencepiece
  type: null
  model: nemo:2b3f_tokenizer.model
  vocab_file: null
  merge_file: null
  delimiter: null
  sentencepiece_legacy: false
native_amp_init_scale: 4294967296
hysteresis: 2
fp32_residual_connection: false
fp16_lm_cross_entropy: false
megatron_amp_O2: true
grad_allreduce_chunk_size_mb: 125
grad_div_ar_fusion: true
gradient_accumulation_fusion: true
bias_activation_fusion: true
bias_dropout_add_fusion: true
masked_softmax_fusion: true
seed: 1234
use_cpu_initialization: false
onnx_safe: false
apex_transformer_log_level: 30
gradient_as_bucket_view: true
sync_batch_comm: false
activations_checkpoint_granularity: null
sequence_parallel: false
transformer_engine: true
fp8: false
use_emha: false
nsys_profile: {enabled: false, ranks: [0]}
optim: {name: distributed_fused_adam, lr: 0.0002, sched: {name: CosineAnnealing, warmup_steps: 500}}
data: {data_prefix: [1.0, /data/part], splits_string: '99,1,0', seq_length: 64}
precision: ${trainer.precision}
target: nemo.collections.nlp.models.language_modeling.megatron_gpt_model.MegatronGPTModel
nemo_version: 1.18.0
"""


@pytest.fixture(scope="module", autouse=True)
def one_rank() -> Iterator[None]:
    with world.ensure_single_process():
        yield


def randomize(model: PreTrainedModel) -> PreTrainedModel:
    draw = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=draw) * 0.25 + 0.3 * (parameter.ndim == 1))
    return model.eval()


def gpt_2b(vocab_size: int) -> PreTrainedModel:
    """Nemotron with the gated MLP of a Llama: the architecture of GPT-2B-001."""
    model = NemotronForCausalLM(NemotronConfig(**SIZES, vocab_size=vocab_size, partial_rotary_factor=0.5))
    for layer in model.model.layers:
        layer.mlp = LlamaMLP(LlamaConfig(**SIZES, hidden_act="silu"))
    return randomize(model)


def nemotron(vocab_size: int, *, bias: bool) -> PreTrainedModel:
    config = NemotronConfig(**SIZES, vocab_size=vocab_size, attention_bias=bias, mlp_bias=bias)
    return randomize(NemotronForCausalLM(config))


def padded(tensor: Tensor) -> Tensor:
    return torch.cat([tensor, torch.ones(-len(tensor) % 128, tensor.shape[1])])


def old_names(hf: dict[str, Tensor]) -> dict[str, Tensor]:
    """The names and layouts of NeMo before Megatron-core; the heads' query, key and value rows interleave."""
    root = "model.language_model"
    old = {
        f"{root}.embedding.word_embeddings.weight": padded(hf["model.embed_tokens.weight"]),
        f"{root}.output_layer.weight": padded(hf["lm_head.weight"]),
    }
    for name, tensor in hf.items():
        parent, _, kind = name.rpartition(".")
        if parent == "model.norm":
            old[f"{root}.encoder.final_layernorm.{kind}"] = tensor
        if not parent.startswith("model.layers."):
            continue
        number, _, part = parent.removeprefix("model.layers.").partition(".")
        layer = f"{root}.encoder.layers.{number}"
        match part:
            case "self_attn.q_proj":
                rows = [hf[f"{parent[:-6]}{p}_proj.{kind}"].chunk(HEADS) for p in "qkv"]
                fused = torch.cat([part for head in zip(*rows, strict=True) for part in head])
                old[f"{layer}.self_attention.query_key_value.{kind}"] = fused
            case "self_attn.o_proj":
                old[f"{layer}.self_attention.dense.{kind}"] = tensor
            case "mlp.up_proj":
                gate = hf.get(f"{parent[:-7]}gate_proj.{kind}")
                up = tensor if gate is None else torch.cat([gate, tensor])
                old[f"{layer}.mlp.dense_h_to_4h.{kind}"] = up
            case "mlp.down_proj":
                old[f"{layer}.mlp.dense_4h_to_h.{kind}"] = tensor
            case "input_layernorm" | "post_attention_layernorm":
                old[f"{layer}.{part}.{kind}"] = tensor
    return old


def our_logits(nemo: Path) -> Tensor:
    with open_nemo(nemo) as archive:
        model = build_gpt(GPTConfig.from_dict(archive.config), Layout(), torch.float32).eval()
        load_model(model, archive.weights)
    lengths = torch.full((TOKENS.shape[0],), TOKENS.shape[1])
    found = whole_logits.logits(
        model, TokenBatch(tokens=TOKENS, loss_mask=torch.ones_like(TOKENS).bool(), lengths=lengths)
    )
    assert found is not None
    return found


@torch.no_grad()
def logits(model: PreTrainedModel) -> Tensor:
    return model(TOKENS).logits


def write_nemo_folder(folder: Path, config: dict[str, Any], state: dict[str, Tensor], **files: Path) -> Path:
    folder.mkdir()
    (folder / "model_config.yaml").write_text(yaml.safe_dump(config))
    torch.save(state, folder / "model_weights.ckpt")
    for name, path in files.items():
        shutil.copyfile(path, folder / name)
    return folder


def test_gpt_2b_001(tmp_path: Path, sentencepiece_model: Path):
    vocab_size = SentencePieceProcessor(model_file=str(sentencepiece_model)).get_piece_size()
    theirs = gpt_2b(vocab_size)
    old = write_nemo_folder(tmp_path / "old", yaml.safe_load(GPT_2B), old_names(theirs.state_dict()))
    shutil.copyfile(sentencepiece_model, old / "2b3f_tokenizer.model")
    import_from_legacy(old, str(tmp_path / "new.nemo"))
    with open_nemo(tmp_path / "new.nemo") as archive:
        assert archive.config["vocab_size"] == vocab_size
        assert archive.config["optim"]["sched"]["warmup_steps"] == 500
    torch.testing.assert_close(our_logits(tmp_path / "new.nemo"), logits(theirs), rtol=0, atol=1e-4)
    with pytest.raises(
        UserError, match=r"NemotronForCausalLM cannot .*activation=fast-swiglu, it has squared-relu"
    ):
        export_to_huggingface(tmp_path / "new.nemo", tmp_path / "out")


@pytest.mark.parametrize("bias", [False, True])
def test_nemotron_with_gpt2_s_tokenizer(tmp_path: Path, gpt2_files: tuple[Path, Path], bias: bool):
    theirs = nemotron(len(json.loads(gpt2_files[0].read_text())), bias=bias)
    tokenizer = {"library": "megatron", "type": "GPT2BPETokenizer", "model": None}
    tokenizer |= {"vocab_file": "nemo:1a_vocab.json", "merge_file": "nemo:1b_merges.txt"}
    config = yaml.safe_load(GPT_2B) | {"activation": "squared-relu", "tokenizer": tokenizer, "bias": bias}
    old = write_nemo_folder(tmp_path / "old", config, old_names(theirs.state_dict()))
    for name, path in zip(("1a_vocab.json", "1b_merges.txt"), gpt2_files, strict=True):
        shutil.copyfile(path, old / name)
    import_from_legacy(old, str(tmp_path / "new.nemo"))
    with open_nemo(tmp_path / "new.nemo") as archive:
        block = archive.config["tokenizer"]
        ours = load_tokenizer(block["library"], archive.file(block["type"]))
    torch.testing.assert_close(our_logits(tmp_path / "new.nemo"), logits(theirs), rtol=0, atol=1e-4)
    export_to_huggingface(tmp_path / "new.nemo", tmp_path / "out")
    assert AutoTokenizer.from_pretrained(tmp_path / "out")("one two").input_ids == ours.encode("one two")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "out", attn_implementation="eager")
    assert torch.equal(logits(again.eval()), logits(theirs))


@pytest.mark.parametrize("name", ["qwen2", "qwen3", "nemotron-bias"])
def test_mcore_s_names_in_one_file(hf_folder: Callable[..., Path], tmp_path: Path, name: str):
    source = hf_folder(name)
    imported = import_huggingface(source)
    config = {key: value for key, value in imported.config.items() if key not in ("huggingface", "tokenizer")}
    old = write_nemo_folder(tmp_path / "old", config, {f"model.{n}": x for n, x in imported.weights})
    import_from_legacy(old, str(tmp_path / "new.nemo"))
    export_to_huggingface(tmp_path / "new.nemo", tmp_path / "out")
    before, after = (
        AutoModelForCausalLM.from_pretrained(folder).eval() for folder in (source, tmp_path / "out")
    )
    assert torch.equal(logits(after), logits(before))
    assert type(after) is type(before)


def test_a_distributed_checkpoint_takes_its_vocabulary_from_the_tokenizer(
    hf_folder: Callable[..., Path], tmp_path: Path
):
    source = hf_folder("qwen3")
    import_from_huggingface(source, f"{tmp_path}/nemo/")
    with pytest.raises(UserError, match="already"):
        import_from_legacy(tmp_path / "nemo", str(tmp_path / "new.nemo"))
    path = tmp_path / "nemo/model_config.yaml"
    config = yaml.safe_load(path.read_text())
    # As NeMo saves it.
    path.write_text(
        yaml.safe_dump({k: v for k, v in config.items() if k not in ("vocab_size", "huggingface")})
    )
    with (
        open_nemo(tmp_path / "nemo") as archive,
        pytest.raises(UserError, match=r"lacks vocab_size[\s\S]*mcore"),
    ):
        GPTConfig.from_dict(archive.config)
    import_from_legacy(tmp_path / "nemo", str(tmp_path / "new.nemo"))
    export_to_huggingface(tmp_path / "new.nemo", tmp_path / "out")
    before, after = (
        AutoModelForCausalLM.from_pretrained(folder).eval() for folder in (source, tmp_path / "out")
    )
    rows = after.config.vocab_size
    assert rows == len(AutoTokenizer.from_pretrained(source)) < before.config.vocab_size
    assert torch.equal(logits(after), logits(before)[..., :rows])
