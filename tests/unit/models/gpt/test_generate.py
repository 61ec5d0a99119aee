# SPDX-License-Identifier: Apache-2.0
"""What is written: greedy text against transformers.generate, and responses that depend on nothing but their prompt."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
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

from nemo_aligner.batch import TokenBatch, Unit
from nemo_aligner.errors import UserError
from nemo_aligner.models.gpt import decoder, engine
from nemo_aligner.models.gpt.config import GPTConfig
from nemo_aligner.models.gpt.head_projection import Projection
from nemo_aligner.models.gpt.model import GPT
from nemo_aligner.models.gpt.policy import GPTPolicy
from nemo_aligner.models.gpt.sampling import SampledDistribution
from nemo_aligner.models.sampling_config import SamplingConfig
from nemo_aligner.objectives.protocol import ModelOutput, Wants
from nemo_aligner.rollout_batch import Prompt, Rollout

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


def responses(rollout: Rollout) -> list[list[int]]:
    return [rollout.response(row) for row in range(rollout.num_rows)]


def numbered(prompts: Sequence[Sequence[int]]) -> list[Prompt]:
    return [Prompt(tokens=tokens, number=number) for number, tokens in enumerate(prompts)]


@pytest.mark.parametrize(
    ("name", "new"), [("llama", 200), *((name, 40) for name in MODELS if name != "llama")]
)
def test_greedy_is_transformers(
    name: str,
    new: int,
    tmp_path: Path,
    imported: Callable[[Path, Path], GPT],
    random_rows: Callable[..., TokenBatch],
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
            max_new_tokens=new,
            eos_token_id=eos,
            pad_token_id=0,
        )
        return whole[0, len(prompt) :].tolist()

    greedy = SamplingConfig(use_greedy=True, max_length=new, min_length=0)
    free = [continuation(prompt, None) for prompt in prompts]
    assert responses(GPTPolicy(ours).generate(numbered(prompts), greedy)) == free
    eos = free[0][3]
    ended = [continuation(prompt, eos) for prompt in prompts]
    assert len({len(row) for row in ended}) > 1, "rows must end at different steps"
    for slots in (64, 2, 1):
        found = GPTPolicy(ours, end_ids=(eos,)).generate(numbered(prompts), greedy, slots=slots)
        assert responses(found) == ended
        assert found.finished.tolist() == [row[-1] == eos for row in ended]


CONFIG = GPTConfig(
    num_layers=2,
    hidden_size=32,
    ffn_hidden_size=48,
    num_attention_heads=4,
    num_query_groups=2,
    vocab_size=101,
    make_vocab_size_divisible_by=8,
    normalization="rmsnorm",
    activation="swiglu",
    position_embedding_type="rope",
    max_position_embeddings=96,
    share_embeddings_and_output_weights=False,
)
EOS = 3


class Letters:
    """A tokenizer whose every token is a letter of its own, two of them special."""

    def decode(self, ids: Sequence[int]) -> str:
        return "".join({EOS: "", 9: "<end>"}.get(i, chr(0x4E00 + i)) for i in ids)

    def token_id(self, token: str) -> int | None:
        return 9 if token == "<end>" else None


@pytest.fixture(scope="module")
def policy(random_model: Callable[..., GPT]) -> GPTPolicy:
    return GPTPolicy(random_model(CONFIG), end_ids=(EOS,), detokenizer=Letters())


@pytest.fixture(scope="module")
def prompts(random_rows: Callable[..., TokenBatch]) -> list[Prompt]:
    batch = random_rows([1 + 5 * i % 13 for i in range(24)], seed=8)
    tokens = [row[:n].tolist() for row, n in zip(batch.tokens, batch.lengths, strict=True)]
    return [Prompt(tokens=t, number=100 + i, sample=i % 3) for i, t in enumerate(tokens)]


SAMPLED = SamplingConfig(max_length=60, temperature=1.3)
SAMPLINGS = {
    "plain": SAMPLED,
    "greedy": SamplingConfig(use_greedy=True, max_length=30),
    "top-p": SamplingConfig(max_length=30, top_p=0.8, min_length=0),
    "all": SamplingConfig(
        max_length=30, temperature=0.9, top_k=40, top_p=0.95, min_p=0.01, repetition_penalty=1.2, min_length=4
    ),
}


def test_a_rollout_says_what_was_written(policy: GPTPolicy, prompts: list[Prompt]):
    rollout = policy.generate(prompts, SAMPLED, slots=5)
    assert rollout.group.tolist() == [prompt.number for prompt in prompts]
    assert rollout.prompt_lengths.tolist() == [len(prompt.tokens) for prompt in prompts]
    lengths = [len(response) for response in responses(rollout)]
    assert (rollout.lengths - rollout.prompt_lengths).tolist() == lengths
    assert len(set(lengths)) > 7, "responses must end at different steps"
    for prompt, row, mask, response, finished in zip(
        prompts, rollout.tokens, rollout.loss_mask, responses(rollout), rollout.finished.tolist(), strict=True
    ):
        assert row[: len(prompt.tokens)].tolist() == list(prompt.tokens)
        assert not mask[: len(prompt.tokens)].any()
        assert finished == (response[-1] == EOS)
        assert EOS not in response[:-1]
        assert finished or len(response) == SAMPLED.max_length
    assert torch.equal(rollout.sampler_logprobs != 0, rollout.loss_mask)


@pytest.mark.parametrize("name", SAMPLINGS)
def test_a_response_depends_on_its_prompt_alone(policy: GPTPolicy, prompts: list[Prompt], name: str):
    """At other numbers of slots, in another order, without its neighbours: refilled slots hide what was in them."""
    expected = responses(policy.generate(prompts, SAMPLINGS[name], slots=64))
    for slots in (1, 3, 10):
        assert responses(policy.generate(prompts, SAMPLINGS[name], slots=slots)) == expected
    some = slice(20, 2, -2)
    assert responses(policy.generate(prompts[some], SAMPLINGS[name], slots=2)) == expected[some]


def test_a_prompt_that_responses_share_is_read_once(policy: GPTPolicy, prompts: list[Prompt]):
    """Whichever slots hold it when a response to it begins."""
    sampling = replace(SAMPLED, max_length=12)
    groups = [replace(prompt, sample=sample) for prompt in prompts[:2] for sample in range(4)]
    again = [*groups, *(replace(prompt, sample=9) for prompt in prompts[:2])]
    alone = [responses(policy.generate([prompt], sampling))[0] for prompt in again]
    for slots in (64, 5, 1):
        assert responses(policy.generate(again, sampling, slots=slots)) == alone


def test_a_group_of_8_costs_the_prefill_of_one(random_model: Callable[..., GPT]):
    """Operations of all products, as torch counts them."""
    config = replace(CONFIG, max_position_embeddings=520)
    policy = GPTPolicy(random_model(config, dtype=torch.float64))
    draw = torch.Generator().manual_seed(0)
    texts = torch.randint(1, 101, (8, 512), generator=draw).tolist()

    def operations(prompts: list[Prompt]) -> int:
        with FlopCounterMode(display=False) as counter:
            policy.generate(prompts, SamplingConfig(max_length=1))
        return counter.get_total_flops()

    group = [Prompt(tokens=texts[0], number=0, sample=sample) for sample in range(8)]
    assert operations(numbered(texts)) > 7 * operations(group)


def test_a_long_prompt_is_read_in_chunks(
    policy: GPTPolicy, prompts: list[Prompt], monkeypatch: pytest.MonkeyPatch
):
    whole = policy.generate(prompts, SAMPLED, slots=5)
    monkeypatch.setattr(decoder, "READ_TOKENS", 4)
    chunked = policy.generate(prompts, SAMPLED, slots=5)
    assert torch.equal(chunked.tokens, whole.tokens)
    torch.testing.assert_close(chunked.sampler_logprobs, whole.sampler_logprobs, rtol=0, atol=1e-4)


def test_the_same_call_gives_the_same_bits(policy: GPTPolicy, prompts: list[Prompt]):
    first, again = (policy.generate(prompts, SAMPLED, slots=7) for _ in range(2))
    assert torch.equal(first.tokens, again.tokens)
    assert torch.equal(first.sampler_logprobs, again.sampler_logprobs)


def test_seed_step_prompt_and_sample_give_other_responses(policy: GPTPolicy):
    one = [Prompt(tokens=[5, 6], number=0)]
    found = [
        responses(policy.generate(one, SAMPLED)),
        responses(policy.generate(one, SAMPLED, step=1)),
        responses(policy.generate(one, replace(SAMPLED, seed=1))),
        responses(policy.generate([replace(one[0], number=1)], SAMPLED)),
        responses(policy.generate([replace(one[0], sample=1)], SAMPLED)),
    ]
    assert len({str(response) for response in found}) == len(found)


@pytest.mark.parametrize("name", SAMPLINGS)
def test_the_trainer_believes_what_the_sampler_did(policy: GPTPolicy, prompts: list[Prompt], name: str):
    rollout = policy.generate(prompts, SAMPLINGS[name], slots=6)
    found = policy.logprobs(rollout, SAMPLINGS[name])
    apart = (found - rollout.sampler_logprobs)[rollout.loss_mask].abs()
    # Where two roundings disagree about a token on the border of the kept, the others share its probability.
    assert float(apart.max()) < 0.02
    assert float((apart < 1e-4).float().mean()) > 0.99
    assert name == "greedy" or not torch.allclose(
        found, policy.logprobs(rollout) * rollout.loss_mask, atol=1e-2
    )


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(random_model: Callable[..., GPT], prompts: list[Prompt], dtype: torch.dtype):
    half = GPTPolicy(random_model(CONFIG, dtype=dtype), end_ids=(EOS,))
    rollout = half.generate(prompts, SAMPLED)
    apart = (half.logprobs(rollout, SAMPLED) - rollout.sampler_logprobs)[rollout.loss_mask].abs()
    assert float(apart.mean()) < 4 * torch.finfo(dtype).eps


def test_first_tokens_are_drawn_as_scoring_says(policy: GPTPolicy):
    """2000 responses of one token to one prompt, by chi-square against the model's own log-probs."""
    n, config = 2000, SamplingConfig(max_length=1, min_length=0)
    prompt = [17, 4, 42]
    first = policy.generate([Prompt(tokens=prompt, number=0, sample=i) for i in range(n)], config).tokens[
        :, 3
    ]
    every = TokenBatch.from_rows([([*prompt, i], [True] * 4) for i in range(101)], pad_id=0, seq_length=4)
    expected = policy.logprobs(every)[:, 3].double().exp() * n
    counts = torch.bincount(first, minlength=101).double()
    rare = expected < 5
    expected = torch.cat((expected[~rare], expected[rare].sum()[None]))
    counts = torch.cat((counts[~rare], counts[rare].sum()[None]))
    distance = ((counts - expected) ** 2 / expected).sum()
    freedom = torch.tensor((counts.numel() - 1) / 2, dtype=torch.float64)
    assert torch.special.gammaincc(freedom, distance / 2) > 1e-3


def test_no_response_is_shorter_than_min_length(policy: GPTPolicy, prompts: list[Prompt]):
    found = responses(policy.generate(prompts, replace(SAMPLED, min_length=12)))
    free = responses(policy.generate(prompts, replace(SAMPLED, min_length=0)))
    assert min(len(response) for response in found) > 12
    assert min(len(response) for response in free) < 12


def test_a_prompt_may_ask_for_fewer_tokens(policy: GPTPolicy, prompts: list[Prompt]):
    limits = [None, 1, 5, 1000] * 6
    asked = [replace(prompt, max_length=limit) for prompt, limit in zip(prompts, limits, strict=True)]
    free, rollout = (policy.generate(some, SAMPLED, slots=4) for some in (prompts, asked))
    for before, response, limit in zip(responses(free), responses(rollout), limits, strict=True):
        assert response == before[:limit]


def test_end_strings_end_responses(policy: GPTPolicy, prompts: list[Prompt]):
    sampled = replace(SAMPLED, min_length=0)
    plain = policy.generate(prompts, sampled)
    longest = max(responses(plain), key=len)
    # Two tokens in the middle of a response, and a token that is a string by itself.
    text = Letters().decode(longest[10:12])
    config = replace(sampled, end_strings=(text, "<end>"))
    rollout = policy.generate(prompts, config, slots=4)
    ended = 0
    for before, response, finished in zip(
        responses(plain), responses(rollout), rollout.finished.tolist(), strict=True
    ):
        cuts = [i + 1 for i, token in enumerate(before) if token == 9]
        cuts += [i + 2 for i in range(len(before)) if before[i : i + 2] == longest[10:12]]
        assert response == before[: min(cuts, default=len(before))]
        assert finished == (bool(cuts) or before[-1] == EOS)
        ended += bool(cuts)
    assert ended > 2
    with pytest.raises(AssertionError):
        GPTPolicy(policy.model).generate(prompts, config)


def test_progress_is_reported(policy: GPTPolicy, prompts: list[Prompt]):
    ended: list[int] = []
    tokens: list[int] = []

    def watch(responses: int, step: Sequence[int]) -> None:
        ended.append(responses)
        tokens.extend(step)

    rollout = policy.generate(prompts, SAMPLED, slots=4, watch=watch)
    assert ended == sorted(ended)
    assert ended[-1] == len(prompts)
    assert sorted(tokens) == rollout.tokens[rollout.loss_mask].sort().values.tolist()


def test_no_prompts_make_an_empty_rollout(policy: GPTPolicy):
    assert policy.generate([], SAMPLED).num_rows == 0


@pytest.mark.parametrize("positions", ["rope", "learned_absolute"])
def test_the_models_positions_bound_the_text(random_model: Callable[..., GPT], positions: str):
    config = replace(
        CONFIG, position_embedding_type=positions, max_position_embeddings=8, normalization="layernorm"
    )
    policy = GPTPolicy(random_model(config))
    greedy = SamplingConfig(use_greedy=True, max_length=6)
    rollout = policy.generate(numbered([[1, 2, 3], [1], [1, 2, 3, 4, 5, 6, 7]]), greedy)
    assert rollout.lengths.tolist() == [8, 7, 8]
    assert not rollout.finished.any()
    with pytest.raises(UserError, match=r"prompt 1 has 8 tokens.*8 positions[\s\S]*7 tokens or fewer"):
        policy.generate(numbered([[1], [1] * 8]), greedy)
    with pytest.raises(UserError, match="prompt 0 has no tokens"):
        policy.generate(numbered([[]]), greedy)


def test_a_step_costs_no_more_than_the_longest_response_asks_for(policy: GPTPolicy):
    """The cache grows with what is written, not with what might be."""
    writer = decoder.Decoder(policy.model, slots=2, packs=False)
    with torch.no_grad():
        writer.append([0, 1], [[1, 2, 3], [4]])
        for _ in range(70):
            writer.step(torch.tensor([1, 2]), [True, False])
    assert writer.cache.lengths == [73, 1]
    assert writer.cache.capacity == 128
    writer.cache.cut(0, 3)
    writer.cache.begin_step()
    assert writer.cache.lengths == [3, 1]


def test_gradients_are_of_the_distribution_that_was_drawn_from(
    random_model: Callable[..., GPT], prompts: list[Prompt]
):
    """The head in chunks against plain torch on all logits, for a loss of log-probs and entropy."""
    model = random_model(CONFIG, dtype=torch.float32)
    sampling = SAMPLINGS["all"]
    rollout = GPTPolicy(model, end_ids=(EOS,)).generate(prompts[:5], sampling)
    objective = LogprobsAndEntropy()
    sampled = SampledDistribution(config=sampling, end_ids=(EOS,))
    engine.forward_backward(
        model, [rollout], objective, forward_only=False, projection=Projection(sampled=sampled)
    )
    found = model.output_layer.weight.grad.clone()
    model.zero_grad()
    row, position = rollout.loss_mask.nonzero(as_tuple=True)
    hidden = model(**model.inputs(rollout)).transpose(0, 1)[row, position - 1]
    z = (hidden @ model.output_layer.weight.t())[:, :101]
    taken = rollout.tokens[row, position]
    logp = sampled.transform(rollout, row, position, first=0)(z, slice(None), taken).log_softmax(-1)
    loss = logp.gather(1, taken[:, None]).sum() + (logp.exp() * logp).sum()
    (expected,) = torch.autograd.grad(loss / rollout.loss_mask.sum(), model.output_layer.weight)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


class LogprobsAndEntropy:
    wants = frozenset({Wants.LOGPROBS, Wants.ENTROPY})
    unit = Unit.TOKEN
    metrics = ()

    def __call__(self, output: ModelOutput, batch: TokenBatch) -> tuple[torch.Tensor, dict]:  # noqa: ARG002
        return output.logprobs.sum() - output.entropy.sum(), {}
