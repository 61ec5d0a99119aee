# SPDX-License-Identifier: Apache-2.0
"""The same logits as transformers, from folders that its save_pretrained wrote and our import read."""

import json
import os
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import whole_logits
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    LlamaConfig,
    MistralConfig,
    NemotronConfig,
    PreTrainedConfig,
    PreTrainedModel,
    Qwen2Config,
    Qwen3Config,
)

from nemo_aligner.batch import TokenBatch
from nemo_aligner.checkpoint.convert import export_to_huggingface
from nemo_aligner.checkpoint.nemo_archive import open_nemo, write_nemo
from nemo_aligner.checkpoint.sharded import save_model
from nemo_aligner.models.gpt.model import GPT
from nemo_aligner.models.gpt.policy import GPTPolicy
from nemo_aligner.models.sampling_config import SamplingConfig
from nemo_aligner.rollout_batch import Prompt

SIZES = {
    "vocab_size": 101,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "max_position_embeddings": 128,
    "attn_implementation": "eager",
}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 500000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}
YARN = {"rope_type": "yarn", "rope_theta": 1000000.0, "factor": 4.0, "original_max_position_embeddings": 16}
YARN_DEEPSEEK = YARN | {"factor": 40.0, "mscale": 1.0, "mscale_all_dim": 0.707, "beta_slow": 2.0}
LINEAR = {"rope_type": "linear", "rope_theta": 10000.0, "factor": 2.0}
FAMILIES: dict[str, Callable[[], PreTrainedConfig]] = {
    "llama2": lambda: LlamaConfig(**SIZES),
    "llama3": lambda: LlamaConfig(**SIZES, num_key_value_heads=2, rope_parameters=LLAMA3),
    "llama-linear": lambda: LlamaConfig(**SIZES, rope_parameters=LINEAR),
    "llama-head-dim": lambda: LlamaConfig(**SIZES, num_key_value_heads=2, head_dim=12),
    "llama-bias": lambda: LlamaConfig(**SIZES, num_key_value_heads=1, attention_bias=True, mlp_bias=True),
    "llama-yarn": lambda: LlamaConfig(
        **SIZES, num_key_value_heads=2, rope_parameters=YARN_DEEPSEEK, attention_bias=True
    ),
    "llama-mlp-bias": lambda: LlamaConfig(**SIZES, num_key_value_heads=2, mlp_bias=True),
    "smollm2": lambda: LlamaConfig(
        **SIZES, num_key_value_heads=2, tie_word_embeddings=True, rms_norm_eps=1e-5
    ),
    "mistral": lambda: MistralConfig(**SIZES, num_key_value_heads=2, sliding_window=7, head_dim=16),
    "qwen2": lambda: Qwen2Config(**SIZES, num_key_value_heads=2, rope_parameters=LINEAR),
    "qwen2-yarn": lambda: Qwen2Config(
        **SIZES, num_key_value_heads=2, rope_parameters=YARN, tie_word_embeddings=True
    ),
    "qwen2-window": lambda: Qwen2Config(
        **SIZES, num_key_value_heads=4, use_sliding_window=True, sliding_window=7, max_window_layers=0
    ),
    "qwen3": lambda: Qwen3Config(**SIZES, num_key_value_heads=2, head_dim=12, rope_parameters=LLAMA3),
    "qwen3-yarn": lambda: Qwen3Config(
        **SIZES,
        num_key_value_heads=2,
        head_dim=12,
        attention_bias=True,
        rope_parameters=YARN | {"attention_factor": 0.9, "beta_fast": 8.0, "truncate": False},
    ),
    "qwen3-tied": lambda: Qwen3Config(**SIZES, num_key_value_heads=4, head_dim=8, tie_word_embeddings=True),
    "nemotron": lambda: NemotronConfig(**SIZES, num_key_value_heads=2, rope_parameters=dict(LLAMA3)),
    "nemotron-attention-bias": lambda: NemotronConfig(**SIZES, num_key_value_heads=2, attention_bias=True),
    "nemotron-bias": lambda: NemotronConfig(
        **SIZES,
        num_key_value_heads=4,
        attention_bias=True,
        mlp_bias=True,
        head_dim=16,
        partial_rotary_factor=0.25,
    ),
}
LENGTHS = (60, 3, 41)  # beyond the original context of the stretched ropes and beyond the sliding window


def reference(config: PreTrainedConfig) -> PreTrainedModel:
    """transformers' model with weights at another scale than the initial one, norms and biases not trivial."""
    model = AutoModelForCausalLM.from_config(config)
    draw = torch.Generator().manual_seed(11)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=draw) * 0.25 + (parameter.ndim == 1))
    return model.eval()


@torch.no_grad()
def logits_of(model: PreTrainedModel, batch: TokenBatch) -> torch.Tensor:
    return model(batch.tokens).logits


def real(batch: TokenBatch) -> torch.Tensor:
    """[B, S] bool: not padding."""
    return torch.arange(batch.seq_length)[None] < batch.lengths[:, None]


@pytest.fixture(scope="module", params=FAMILIES)
def both(
    request: pytest.FixtureRequest,
    tmp_path_factory: pytest.TempPathFactory,
    imported: Callable[[Path, Path], GPT],
) -> tuple[PreTrainedModel, GPT]:
    """transformers' model of a family, and ours from the folder that it wrote."""
    out = tmp_path_factory.mktemp(request.param)
    theirs = reference(FAMILIES[request.param]())
    theirs.save_pretrained(out / "hf")
    return theirs, imported(out / "hf", out / "x.nemo")


def test_logits(both: tuple[PreTrainedModel, GPT], random_rows: Callable[..., TokenBatch]):
    theirs, ours = both
    batch = random_rows(LENGTHS)
    expected, found = logits_of(theirs, batch), whole_logits.logits(ours, batch)
    assert expected.std() > 0.5, "logits near zero would prove nothing"
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-4)


def test_logprobs(both: tuple[PreTrainedModel, GPT], random_rows: Callable[..., TokenBatch]):
    theirs, ours = both
    batch = random_rows(LENGTHS, seed=1)
    everywhere = logits_of(theirs, batch).log_softmax(-1)[:, :-1]
    expected = torch.zeros(batch.tokens.shape)
    expected[:, 1:] = everywhere.gather(2, batch.tokens[:, 1:, None])[..., 0]
    found = GPTPolicy(ours).logprobs(batch)
    torch.testing.assert_close(found, expected * real(batch), rtol=0, atol=1e-4)


def test_responses_are_what_transformers_finds_most_likely(
    both: tuple[PreTrainedModel, GPT], random_rows: Callable[..., TokenBatch]
):
    """Token by token from the cache, past the original context of the stretched ropes."""
    theirs, ours = both
    prompts = random_rows((25, 4), seed=2)
    asked = [Prompt(tokens=prompts.tokens[i, :n].tolist(), number=i) for i, n in enumerate((25, 4))]
    rollout = GPTPolicy(ours).generate(asked, SamplingConfig(use_greedy=True, max_length=40))
    expected = logits_of(theirs, rollout).argmax(-1)[:, :-1]
    written = rollout.loss_mask[:, 1:]
    assert int(written.sum()) == 80
    assert torch.equal(rollout.tokens[:, 1:][written], expected[written])


def test_rows_depend_neither_on_padding_nor_on_neighbours(
    both: tuple[PreTrainedModel, GPT], random_rows: Callable[..., TokenBatch]
):
    _, ours = both
    batch, other = random_rows(LENGTHS), random_rows(LENGTHS, seed=5)
    seen = real(batch)
    tokens = batch.tokens.where(seen, 77)
    tokens[0] = other.tokens[0]
    changed = TokenBatch(tokens=tokens, loss_mask=batch.loss_mask, lengths=batch.lengths)
    before, after = (GPTPolicy(ours).logprobs(x) for x in (batch, changed))
    assert torch.equal(before[1:], after[1:])
    assert not torch.equal(before[0], after[0])
    for row, length in enumerate(LENGTHS):
        alone = TokenBatch.from_rows(
            [(batch.tokens[row, :length].tolist(), [True] * length)], pad_id=0, seq_length=length
        )
        torch.testing.assert_close(
            GPTPolicy(ours).logprobs(alone)[0], before[row, :length], rtol=1e-5, atol=1e-5
        )


@pytest.mark.parametrize("family", ["llama3", "smollm2", "mistral", "qwen2", "qwen3", "nemotron"])
def test_what_we_saved_gives_transformers_the_same_logits(
    family: str, tmp_path: Path, imported: Callable[[Path, Path], GPT], random_rows: Callable[..., TokenBatch]
):
    """Through our model and back, as after a training run: not only the files of an import are exported."""
    batch = random_rows(LENGTHS)
    theirs = reference(FAMILIES[family]())
    theirs.save_pretrained(tmp_path / "hf")
    ours = imported(tmp_path / "hf", tmp_path / "x.nemo")
    with open_nemo(tmp_path / "x.nemo") as archive:
        config = archive.config
    write_nemo(
        f"{tmp_path}/y/",
        config=config,
        files={},
        weights=lambda folder: save_model(ours, folder).result(),
        overwrite=False,
    )
    export_to_huggingface(tmp_path / "y", tmp_path / "out")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "out", attn_implementation="eager").eval()
    assert torch.equal(logits_of(again, batch), logits_of(theirs, batch))


def test_a_published_model_responses_as_published(tmp_path: Path, imported: Callable[[Path, Path], GPT]):
    data = os.environ.get("NEMO_ALIGNER_TEST_DATA")
    if not data or not (folder := Path(data, "stories260k_hf")).is_dir():
        pytest.skip("NEMO_ALIGNER_TEST_DATA names no folder with stories260k_hf, which is optional data")
    expected = json.loads((folder / "reference_outputs.json").read_text())
    ours = imported(folder, tmp_path / "x.nemo")
    ids = expected["ids"]
    batch = TokenBatch.from_rows([(ids, [True] * len(ids))], pad_id=0, seq_length=len(ids))
    last = whole_logits.logits(ours, batch)[0, -1]
    top = last.topk(len(expected["last_logits_top5"]))
    assert top.indices.tolist() == expected["last_logits_top5_ids"]
    assert top.values.tolist() == pytest.approx(expected["last_logits_top5"], abs=1e-4)
    greedy = SamplingConfig(use_greedy=True, max_length=200, min_length=0)
    written = GPTPolicy(ours).generate([Prompt(tokens=ids, number=0)], greedy).tokens[0]
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert tokenizer.decode(written, skip_special_tokens=True).strip() == expected["greedy_200"].strip()
