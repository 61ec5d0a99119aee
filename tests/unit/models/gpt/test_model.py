# SPDX-License-Identifier: Apache-2.0
"""Architecture options against the transformers model that has them, weights copied by canonical name."""

from collections.abc import Callable

import pytest
import torch
import whole_logits
from torch import Tensor
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    NemotronConfig,
    NemotronForCausalLM,
    PreTrainedModel,
)

from nemo_aligner.batch import TokenBatch
from nemo_aligner.models.gpt import engine
from nemo_aligner.models.gpt.config import GPTConfig
from nemo_aligner.models.gpt.model import GPT
from nemo_aligner.models.gpt.policy import GPTPolicy
from nemo_aligner.objectives.nll import NLL
from nemo_aligner.run.metrics import means

LAYERS, HIDDEN, FFN, HEADS, VOCAB, POSITIONS = 2, 32, 48, 4, 101, 64
SIZES = {
    "num_layers": LAYERS,
    "hidden_size": HIDDEN,
    "ffn_hidden_size": FFN,
    "num_attention_heads": HEADS,
    "vocab_size": VOCAB,
    "max_position_embeddings": POSITIONS,
    "precision": "32",
}
THEIRS = {
    "vocab_size": VOCAB,
    "hidden_size": HIDDEN,
    "intermediate_size": FFN,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": HEADS,
    "max_position_embeddings": POSITIONS,
    "attn_implementation": "eager",
}
Weights = dict[str, Tensor]
NORM_QKV, NORM_MLP = "self_attention.linear_qkv.layer_norm", "mlp.linear_fc1.layer_norm"


def by_group(q: Tensor, k: Tensor, v: Tensor, *, groups: int) -> Tensor:
    """Query, key and value rows of each group side by side, as Megatron's fused projection has them."""
    return torch.cat(
        [part for group in zip(*(x.chunk(groups) for x in (q, k, v)), strict=True) for part in group]
    )


def collect(
    state: Weights, names: dict[str, str], layer: Callable[[Weights, str], Weights], prefix: str
) -> Weights:
    """Canonical weights from ``names`` (ours: theirs) and, per layer, from ``layer(state, its prefix)``."""
    found = {ours: state[theirs] for ours, theirs in names.items()}
    for i in range(LAYERS):
        found |= {f"decoder.layers.{i}.{name}": x for name, x in layer(state, f"{prefix}.{i}.").items()}
    return {name: x.contiguous() for name, x in found.items()}


def gpt2() -> tuple[PreTrainedModel, GPTConfig, Callable[[Weights], Weights]]:
    """LayerNorm, biases, learned positions, gelu's tanh approximation, a tied head."""
    theirs = GPT2LMHeadModel(
        GPT2Config(
            vocab_size=VOCAB,
            n_embd=HIDDEN,
            n_layer=LAYERS,
            n_head=HEADS,
            n_inner=FFN,
            n_positions=POSITIONS,
            activation_function="gelu_new",
            attn_implementation="eager",
        )
    )
    ours = GPTConfig(**SIZES, position_embedding_type="learned_absolute", activation="gelu", bias=True)

    def layer(state: Weights, p: str) -> Weights:
        # GPT-2 keeps its matrices transposed.
        found = {
            "self_attention.linear_qkv.weight": by_group(
                *state[p + "attn.c_attn.weight"].t().chunk(3), groups=HEADS
            ),
            "self_attention.linear_qkv.bias": by_group(*state[p + "attn.c_attn.bias"].chunk(3), groups=HEADS),
        }
        for name, source in (
            ("self_attention.linear_proj", "attn.c_proj"),
            ("mlp.linear_fc1", "mlp.c_fc"),
            ("mlp.linear_fc2", "mlp.c_proj"),
        ):
            found[name + ".weight"] = state[p + source + ".weight"].t()
            found[name + ".bias"] = state[p + source + ".bias"]
        for kind in ("weight", "bias"):
            found[f"{NORM_QKV}_{kind}"] = state[p + f"ln_1.{kind}"]
            found[f"{NORM_MLP}_{kind}"] = state[p + f"ln_2.{kind}"]
        return found

    names = {
        "embedding.word_embeddings.weight": "transformer.wte.weight",
        "embedding.position_embeddings.weight": "transformer.wpe.weight",
        "decoder.final_layernorm.weight": "transformer.ln_f.weight",
        "decoder.final_layernorm.bias": "transformer.ln_f.bias",
    }
    return theirs, ours, lambda state: collect(state, names, layer, "transformer.h")


def gpt_neox() -> tuple[PreTrainedModel, GPTConfig, Callable[[Weights], Weights]]:
    """Rotary positions on a part of each head, LayerNorm, biases, exact gelu, a head of its own."""
    rope = {"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.25}
    theirs = GPTNeoXForCausalLM(GPTNeoXConfig(**THEIRS, use_parallel_residual=False, rope_parameters=rope))
    ours = GPTConfig(
        **SIZES,
        position_embedding_type="rope",
        rotary_percentage=0.25,
        share_embeddings_and_output_weights=False,
        bias_activation_fusion=False,
    )

    def layer(state: Weights, p: str) -> Weights:
        found = {}
        for kind in ("weight", "bias"):
            # Its fused projection is already by head: query, key, value.
            for name, source in (
                ("self_attention.linear_qkv", "attention.query_key_value"),
                ("self_attention.linear_proj", "attention.dense"),
                ("mlp.linear_fc1", "mlp.dense_h_to_4h"),
                ("mlp.linear_fc2", "mlp.dense_4h_to_h"),
            ):
                found[f"{name}.{kind}"] = state[p + f"{source}.{kind}"]
            found[f"{NORM_QKV}_{kind}"] = state[p + f"input_layernorm.{kind}"]
            found[f"{NORM_MLP}_{kind}"] = state[p + f"post_attention_layernorm.{kind}"]
        return found

    names = {
        "embedding.word_embeddings.weight": "gpt_neox.embed_in.weight",
        "decoder.final_layernorm.weight": "gpt_neox.final_layer_norm.weight",
        "decoder.final_layernorm.bias": "gpt_neox.final_layer_norm.bias",
        "output_layer.weight": "lm_head.weight",
    }
    return theirs, ours, lambda state: collect(state, names, layer, "gpt_neox.layers")


LLAMA_NAMES = {
    "embedding.word_embeddings.weight": "model.embed_tokens.weight",
    "decoder.final_layernorm.weight": "model.norm.weight",
    "output_layer.weight": "lm_head.weight",
}


def attention_of_llama(state: Weights, p: str, groups: int) -> Weights:
    q, k, v = (state[p + f"self_attn.{x}_proj.weight"] for x in "qkv")
    return {
        "self_attention.linear_qkv.weight": by_group(q, k, v, groups=groups),
        "self_attention.linear_proj.weight": state[p + "self_attn.o_proj.weight"],
        f"{NORM_QKV}_weight": state[p + "input_layernorm.weight"],
        f"{NORM_MLP}_weight": state[p + "post_attention_layernorm.weight"],
        "mlp.linear_fc2.weight": state[p + "mlp.down_proj.weight"],
    }


def nemotron() -> tuple[PreTrainedModel, GPTConfig, Callable[[Weights], Weights]]:
    """layernorm1p, squared ReLU, rotary positions on half of each head, grouped queries, no biases."""
    rope = {"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.5}
    theirs = NemotronForCausalLM(NemotronConfig(**THEIRS, num_key_value_heads=2, rope_parameters=rope))
    ours = GPTConfig(
        **SIZES,
        num_query_groups=2,
        normalization="layernorm1p",
        activation="squared-relu",
        bias=False,
        position_embedding_type="rope",
        rotary_percentage=0.5,
        share_embeddings_and_output_weights=False,
    )

    def layer(state: Weights, p: str) -> Weights:
        return attention_of_llama(state, p, groups=2) | {
            f"{NORM_QKV}_bias": state[p + "input_layernorm.bias"],
            f"{NORM_MLP}_bias": state[p + "post_attention_layernorm.bias"],
            "mlp.linear_fc1.weight": state[p + "mlp.up_proj.weight"],
        }

    names = LLAMA_NAMES | {"decoder.final_layernorm.bias": "model.norm.bias"}
    return theirs, ours, lambda state: collect(state, names, layer, "model.layers")


def gated(
    activation: str, theirs_has: str, **options: object
) -> tuple[PreTrainedModel, GPTConfig, Callable[[Weights], Weights]]:
    """A Llama with another gated activation."""
    theirs = LlamaForCausalLM(LlamaConfig(**THEIRS, hidden_act=theirs_has, rms_norm_eps=1e-5))
    ours = GPTConfig(
        **SIZES,
        normalization="rmsnorm",
        activation=activation,
        bias=False,
        position_embedding_type="rope",
        share_embeddings_and_output_weights=False,
        **options,
    )

    def layer(state: Weights, p: str) -> Weights:
        gate, up = (state[p + f"mlp.{x}_proj.weight"] for x in ("gate", "up"))
        return attention_of_llama(state, p, groups=HEADS) | {"mlp.linear_fc1.weight": torch.cat([gate, up])}

    return theirs, ours, lambda state: collect(state, LLAMA_NAMES, layer, "model.layers")


ARCHITECTURES = {
    "gpt2": gpt2,
    "gpt-neox": gpt_neox,
    "nemotron": nemotron,
    "geglu": lambda: gated("geglu", "gelu", bias_activation_fusion=False),
    "fast-geglu": lambda: gated("fast-geglu", "gelu_pytorch_tanh"),
    "openai_gelu": lambda: gated("geglu", "gelu_new", openai_gelu=True, bias_activation_fusion=False),
    "reglu": lambda: gated("reglu", "relu"),
    "fast-reglu": lambda: gated("fast-reglu", "relu"),
    "a window longer than the row": lambda: gated("swiglu", "silu", window_size=1000),
}


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_logits_are_transformers(
    name: str, model_of: Callable[[GPTConfig, Weights], GPT], random_rows: Callable[..., TokenBatch]
):
    theirs, config, canonical = ARCHITECTURES[name]()
    draw = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in theirs.parameters():
            centre = 0.3 if parameter.ndim == 1 else 0.0
            parameter.copy_(torch.randn(parameter.shape, generator=draw) * 0.25 + centre)
    ours = model_of(config, canonical(theirs.state_dict()))
    batch = random_rows((POSITIONS, 20))
    with torch.no_grad():
        expected = theirs.eval()(batch.tokens).logits
    assert expected.std() > 0.3, "logits near zero would prove nothing"
    torch.testing.assert_close(whole_logits.logits(ours, batch), expected, rtol=0, atol=1e-4)


@pytest.mark.parametrize("option", ["hidden_dropout", "attention_dropout"])
def test_dropout_is_on_in_training_alone(
    option: str, random_model: Callable[..., GPT], random_rows: Callable[..., TokenBatch]
):
    batch = random_rows((12, 9))
    plain = GPTPolicy(random_model(GPTConfig(**SIZES)))
    model = random_model(GPTConfig(**SIZES, **{option: 0.5}))
    policy = GPTPolicy(model)

    def training_loss() -> float:
        return means(engine.forward_backward(model.train(), [batch], NLL(), forward_only=True))["loss"]

    # Scoring turns dropout off by itself, whatever mode the model is in, and leaves the mode as it was.
    model.train()
    assert torch.equal(policy.logprobs(batch), plain.logprobs(batch))
    assert model.training
    without = means(engine.forward_backward(plain.model.eval(), [batch], NLL(), forward_only=True))["loss"]
    first, second = training_loss(), training_loss()
    assert len({without, first, second}) == 3
    model.eval()
    assert means(engine.forward_backward(model, [batch], NLL(), forward_only=True))["loss"] == without


def test_the_view_is_the_plain_loss(random_model: Callable[..., GPT], random_rows: Callable[..., TokenBatch]):
    """Selected, chunked log-probs and their gradient against every logit and torch's cross entropy."""
    model = random_model(GPTConfig(**SIZES))
    batch = random_rows((12, 9, 5))
    draw = torch.Generator().manual_seed(1)
    mask = batch.loss_mask & (torch.rand(batch.loss_mask.shape, generator=draw) < 0.6)
    batch = TokenBatch(tokens=batch.tokens, loss_mask=mask, lengths=batch.lengths)

    hidden = model(**model.inputs(batch))
    logits = model.head(hidden)[..., :VOCAB].transpose(0, 1)
    labels = batch.tokens.where(mask, -100)
    expected = torch.nn.functional.cross_entropy(
        logits[:, :-1].reshape(-1, VOCAB), labels[:, 1:].reshape(-1), ignore_index=-100
    )
    expected.backward()
    gradients = {name: parameter.grad.clone() for name, parameter in model.named_parameters()}
    model.zero_grad()

    found = means(engine.forward_backward(model, [batch], NLL(), forward_only=False))["loss"]
    assert found == pytest.approx(expected.item(), rel=1e-6)
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.grad, gradients[name], rtol=1e-4, atol=1e-6)
