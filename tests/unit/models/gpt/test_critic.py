# SPDX-License-Identifier: Apache-2.0
"""Reward models against transformers' sequence classification: the same rewards, and folders that come back."""

import dataclasses
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from megatron.core.transformer.transformer_layer import TransformerLayer
from safetensors.torch import load_file
from transformers import AutoModelForSequenceClassification, LlamaConfig, PreTrainedConfig, Qwen2Config

from nemo_aligner.batch import TokenBatch
from nemo_aligner.checkpoint.convert import export_to_huggingface, import_from_huggingface
from nemo_aligner.checkpoint.nemo_archive import open_nemo
from nemo_aligner.checkpoint.sharded import load_model, save_model
from nemo_aligner.models.gpt.config import GPTConfig
from nemo_aligner.models.gpt.critic import GPTCritic, RewardScale, RewardWeights
from nemo_aligner.models.gpt.heads import head_config
from nemo_aligner.models.gpt.model import build_gpt
from nemo_aligner.models.gpt.weight_swap import SwappedWeights
from nemo_aligner.parallel.ranks import Layout

PAD = 0
SIZES = {
    "vocab_size": 101,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "pad_token_id": PAD,
}
FAMILIES: dict[str, Callable[[], PreTrainedConfig]] = {
    "llama": lambda: LlamaConfig(**SIZES, num_labels=1),
    "llama-tied": lambda: LlamaConfig(**SIZES, num_labels=1, tie_word_embeddings=True),
    "llama-attributes": lambda: LlamaConfig(**SIZES, num_labels=5),
    "qwen2": lambda: Qwen2Config(**SIZES, num_labels=1),
}


@pytest.fixture
def folder(tmp_path: Path) -> Callable[[str], Path]:
    """A Hugging Face folder with random weights."""

    def make(name: str) -> Path:
        torch.manual_seed(0)
        model = AutoModelForSequenceClassification.from_config(FAMILIES[name]())
        for parameter in model.parameters():
            torch.nn.init.normal_(parameter, 0.7 if parameter.ndim == 1 else 0.0, 0.2)
        model.save_pretrained(tmp_path / name)
        return tmp_path / name

    return make


def critic_of(nemo: Path, scale: RewardScale = RewardScale()) -> GPTCritic:  # noqa: B008 - frozen
    with open_nemo(nemo) as archive:
        head = head_config(archive.config)
        assert head is not None
        model = build_gpt(GPTConfig.from_dict(archive.config), Layout(), torch.float32, head=head).eval()
        load_model(model, archive.weights)
    return GPTCritic(model, head=head, scale=scale)


@pytest.mark.parametrize("name", FAMILIES)
def test_rewards_are_those_of_transformers(
    folder: Callable[[str], Path], tmp_path: Path, random_rows: Callable[..., TokenBatch], name: str
):
    source = folder(name)
    import_from_huggingface(source, str(tmp_path / "rm.nemo"))
    # No token but padding is PAD: transformers finds the end of a row by it, we by the length.
    batch = random_rows([9, 1, 17, 5], pad_id=PAD)
    real = torch.arange(17)[None] < batch.lengths[:, None]
    tokens = batch.tokens.clamp(min=1) * real
    batch = TokenBatch(tokens=tokens, loss_mask=batch.loss_mask, lengths=batch.lengths)
    theirs = AutoModelForSequenceClassification.from_pretrained(source).eval()
    with torch.no_grad():
        expected = theirs(tokens, attention_mask=real.long()).logits
    found = critic_of(tmp_path / "rm.nemo").infer(batch)
    torch.testing.assert_close(found.reshape(4, -1), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", FAMILIES)
def test_there_and_back(folder: Callable[[str], Path], tmp_path: Path, name: str):
    source = folder(name)
    import_from_huggingface(source, str(tmp_path / "rm.nemo"))
    export_to_huggingface(tmp_path / "rm.nemo", tmp_path / "out")
    one, two = (load_file(path / "model.safetensors") for path in (source, tmp_path / "out"))
    assert one.keys() == two.keys()
    assert all(torch.equal(one[key], two[key]) for key in one)
    assert AutoModelForSequenceClassification.from_pretrained(tmp_path / "out").config.num_labels == (
        5 if name == "llama-attributes" else 1
    )


def test_packed_rows_give_the_same_rewards_and_values(folder: Callable[[str], Path], tmp_path: Path):
    import_from_huggingface(folder("llama"), str(tmp_path / "rm.nemo"))
    critic = critic_of(tmp_path / "rm.nemo")
    rows = [torch.randint(1, 101, (n,)).tolist() for n in (4, 7, 2)]
    padded = TokenBatch.from_rows([(row, [True] * len(row)) for row in rows], pad_id=PAD, seq_length=7)
    packed = TokenBatch(
        tokens=torch.tensor([[token for row in rows for token in row]]),
        loss_mask=torch.ones(1, 13, dtype=torch.bool),
        lengths=padded.lengths,
        cu_seqlens=torch.tensor([0, 4, 11, 13], dtype=torch.int32),
    )
    torch.testing.assert_close(critic.infer(packed), critic.infer(padded), rtol=1e-5, atol=1e-5)
    values = critic.values(padded)
    torch.testing.assert_close(
        critic.values(packed)[0],
        values[padded.loss_mask.logical_and(torch.arange(7) < padded.lengths[:, None])],
        rtol=1e-5,
        atol=1e-5,
    )
    # The value before a token is the reward of the row that ends there.
    ends = TokenBatch.from_rows([(rows[1][:3], [True] * 3)], pad_id=PAD, seq_length=3)
    torch.testing.assert_close(values[1, 3], critic.infer(ends)[0], rtol=1e-5, atol=1e-5)


def test_the_average_of_all_states(folder: Callable[[str], Path], tmp_path: Path):
    source = folder("llama")
    import_from_huggingface(source, str(tmp_path / "rm.nemo"))
    theirs = AutoModelForSequenceClassification.from_pretrained(source).eval()
    rows = [torch.randint(1, 101, (n,)).tolist() for n in (4, 7)]
    with torch.no_grad():
        states = [theirs.model(torch.tensor([row])).last_hidden_state[0].mean(0) for row in rows]
        expected = theirs.score(torch.stack(states))[:, 0]
    critic = critic_of(tmp_path / "rm.nemo")
    assert critic.model.rm_head is not None
    critic.model.rm_head.head = dataclasses.replace(critic.head, average=True)
    batch = TokenBatch.from_rows([(row, [True] * len(row)) for row in rows], pad_id=PAD, seq_length=7)
    torch.testing.assert_close(critic.infer(batch), expected, rtol=1e-4, atol=1e-4)


def test_the_served_reward():
    x = torch.tensor([[1.0, 3.0], [5.0, 7.0]])
    assert RewardScale(weights=(0.5, 0.5))(x).tolist() == [2.0, 6.0]
    assert RewardScale(mean=1.0, std=2.0)(x[:, :1]).tolist() == [0.0, 2.0]
    assert RewardScale()(x).tolist() == x.tolist()


def test_saved_and_loaded(folder: Callable[[str], Path], tmp_path: Path):
    import_from_huggingface(folder("llama"), str(tmp_path / "rm.nemo"))
    critic, other = (critic_of(tmp_path / "rm.nemo") for _ in range(2))
    assert other.model.rm_head is not None
    other.model.rm_head.draw(seed=1, std=1.0)
    save_model(critic.model, tmp_path / "weights")
    load_model(other.model, tmp_path / "weights")
    for name, value in critic.model.state_dict().items():
        assert value is None or torch.equal(value, other.model.state_dict()[name]), name


def test_a_request_swaps_the_reward_model_in_once_and_out_once(
    folder: Callable[[str], Path], tmp_path: Path, random_rows: Callable[..., TokenBatch]
):
    """All values come first. Where a layer finds its weights tells which set is in place at each forward pass."""
    import_from_huggingface(folder("llama"), str(tmp_path / "rm.nemo"))
    alone = critic_of(tmp_path / "rm.nemo")
    reward = RewardWeights(weights=SwappedWeights(alone.model), outputs=1)
    critic = GPTCritic(alone.model, head=alone.head, reward=reward)
    batch = random_rows([9, 3, 17, 5, 11, 8], pad_id=PAD)
    expected = alone.infer(batch, micro_batch_size=2)
    with torch.no_grad():
        for weights in critic.model.parameters():
            weights.mul_(1.25)
    places: list[int] = []
    layer = next(part for part in critic.model.modules() if isinstance(part, TransformerLayer))
    layer.register_forward_pre_hook(lambda part, _: places.append(next(part.parameters()).data_ptr()))
    for _ in range(2):
        places.clear()
        rewards, values = critic.infer_rm_critic(batch, micro_batch_size=2)
        own, other = places[0], places[-1]
        assert places == [own] * 3 + [other] * 3
        assert own != other
        assert next(layer.parameters()).data_ptr() == own
        torch.testing.assert_close(rewards, expected)
        torch.testing.assert_close(values, critic.values(batch))
