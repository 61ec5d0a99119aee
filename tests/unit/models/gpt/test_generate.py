# SPDX-License-Identifier: Apache-2.0
"""Greedy text against transformers.generate, on prompts of unequal length, EOS included."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM, MistralConfig, MistralForCausalLM

from nemo_aligner.batch import TokenBatch
from nemo_aligner.errors import UserError
from nemo_aligner.models.gpt.config import GPTConfig
from nemo_aligner.models.gpt.model import GPT
from nemo_aligner.models.gpt.policy import GPTPolicy

NEW = 16
SIZES = {
    "vocab_size": 101,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "attn_implementation": "eager",
}
MODELS = {
    "llama": lambda: LlamaForCausalLM(LlamaConfig(**SIZES)),
    "mistral": lambda: MistralForCausalLM(MistralConfig(**SIZES, sliding_window=5)),
}


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
    assert GPTPolicy(ours).generate(prompts, max_new_tokens=NEW) == free
    eos = free[0][3]
    ended = [continuation(prompt, eos) for prompt in prompts]
    assert len({len(row) for row in ended}) > 1, "rows must end at different steps"
    assert GPTPolicy(ours, eos_id=eos).generate(prompts, max_new_tokens=NEW) == ended


def test_learned_positions_bound_the_text(random_model: Callable[[GPTConfig], GPT]):
    model = random_model(
        GPTConfig(
            num_layers=1,
            hidden_size=32,
            ffn_hidden_size=48,
            num_attention_heads=4,
            vocab_size=101,
            position_embedding_type="learned_absolute",
            max_position_embeddings=8,
        )
    )
    policy = GPTPolicy(model)
    assert len(policy.generate([[1, 2, 3]], max_new_tokens=5)[0]) == 5
    with pytest.raises(UserError, match=r"9 tokens.*8 learned positions[\s\S]*lower max_new_tokens by 1"):
        policy.generate([[1], [1, 2, 3]], max_new_tokens=6)
