# SPDX-License-Identifier: Apache-2.0
"""What is written: greedy text against transformers.generate, and answers that depend on nothing but their prompt."""

from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
import torch
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    NemotronConfig,
    NemotronForCausalLM,
    PreTrainedModel,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from nemo_aligner.batch import Prompt, Rollout, TokenBatch
from nemo_aligner.errors import UserError
from nemo_aligner.models.gpt.config import GPTConfig
from nemo_aligner.models.gpt.model import GPT
from nemo_aligner.models.gpt.policy import GPTPolicy
from nemo_aligner.models.sampling_config import SamplingConfig

NEW = 40
SIZES = {
    "vocab_size": 101,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "attn_implementation": "eager",
}
MODELS: dict[str, Callable[[], PreTrainedModel]] = {
    "llama": lambda: LlamaForCausalLM(LlamaConfig(**SIZES)),
    "llama-bias": lambda: LlamaForCausalLM(
        LlamaConfig(**SIZES, attention_bias=True, mlp_bias=True, tie_word_embeddings=True)
    ),
    "mistral": lambda: MistralForCausalLM(MistralConfig(**SIZES, sliding_window=5)),
    "qwen3": lambda: Qwen3ForCausalLM(Qwen3Config(**SIZES, head_dim=12)),
    "nemotron": lambda: NemotronForCausalLM(NemotronConfig(**SIZES, partial_rotary_factor=0.5)),
}
GREEDY = SamplingConfig(use_greedy=True, max_length=NEW, min_length=0)


def answers(rollout: Rollout) -> list[list[int]]:
    return [row[mask].tolist() for row, mask in zip(rollout.tokens, rollout.mask, strict=True)]


def numbered(prompts: Sequence[Sequence[int]]) -> list[Prompt]:
    return [Prompt(tokens=tokens, number=number) for number, tokens in enumerate(prompts)]


@pytest.mark.parametrize("name", MODELS)
def test_greedy_is_transformers(
    name: str, tmp_path: Path, imported: Callable[[Path, Path], GPT], random_rows: Callable[..., TokenBatch]
):
    theirs = MODELS[name]().eval()
    draw = torch.Generator().manual_seed(4)
    with torch.no_grad():
        for parameter in theirs.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=draw) * 0.3 + (parameter.ndim == 1))
    theirs.save_pretrained(tmp_path / "hf")
    ours = imported(tmp_path / "hf", tmp_path / "x.nemo")
    batch = random_rows((6, 1, 13, 4))
    prompts = [row[:n].tolist() for row, n in zip(batch.tokens, batch.lengths, strict=True)]

    def continuation(prompt: list[int], eos: int | None) -> list[int]:
        ids = torch.tensor([prompt])
        whole = theirs.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            do_sample=False,
            max_new_tokens=NEW,
            eos_token_id=eos,
            pad_token_id=0,
        )
        return whole[0, len(prompt) :].tolist()

    free = [continuation(prompt, None) for prompt in prompts]
    assert answers(GPTPolicy(ours).generate(numbered(prompts), GREEDY)) == free
    eos = free[0][3]
    ended = [continuation(prompt, eos) for prompt in prompts]
    assert len({len(row) for row in ended}) > 1, "rows must end at different steps"
    for slots in (64, 2, 1):
        found = GPTPolicy(ours, eos_id=eos).generate(numbered(prompts), GREEDY, slots=slots)
        assert answers(found) == ended
        assert found.finished.tolist() == [row[-1] == eos for row in ended]
