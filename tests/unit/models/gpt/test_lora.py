# SPDX-License-Identifier: Apache-2.0
"""Adapters beside PEFT's own: logits, gradients and files; and what reads the weights that are in effect."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import peft
import pytest
import torch
import whole_logits
from safetensors.torch import load_file
from transformers import LlamaConfig, LlamaForCausalLM, NemotronConfig, NemotronForCausalLM, PreTrainedModel

from nemo_aligner.batch import TokenBatch
from nemo_aligner.checkpoint.huggingface import import_huggingface
from nemo_aligner.checkpoint.peft import PeftWeights, write_peft
from nemo_aligner.checkpoint.sharded import load_model, model_state, save_model, save_state
from nemo_aligner.checkpoint.weights import WeightReader
from nemo_aligner.errors import UserError
from nemo_aligner.models.gpt.config import GPTConfig
from nemo_aligner.models.gpt.learning_rate import OptimConfig, SchedConfig
from nemo_aligner.models.gpt.lora import adapters_of, add_adapters
from nemo_aligner.models.gpt.model import GPT, build_gpt
from nemo_aligner.models.gpt.peft_config import LoRAConfig
from nemo_aligner.models.gpt.policy import GPTPolicy
from nemo_aligner.models.sampling_config import SamplingConfig
from nemo_aligner.objectives.nll import NLL
from nemo_aligner.parallel.ranks import Layout
from nemo_aligner.rollout_batch import Prompt
from nemo_aligner.run.metrics import means

LORA = LoRAConfig(target_modules=("all",), adapter_dim=4, alpha=6.0)
SIZES = {
    "vocab_size": 101,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
FAMILIES: dict[str, Callable[[], PreTrainedModel]] = {
    "llama": lambda: LlamaForCausalLM(LlamaConfig(**SIZES, tie_word_embeddings=True)),
    "nemotron": lambda: NemotronForCausalLM(NemotronConfig(**SIZES)),  # no gate
}


@pytest.fixture(params=FAMILIES)
def theirs(request: pytest.FixtureRequest, tmp_path: Path) -> PreTrainedModel:
    torch.manual_seed(0)
    model = FAMILIES[request.param]().eval()
    model.save_pretrained(tmp_path / "base")
    return model


@pytest.fixture
def ours(theirs: PreTrainedModel, tmp_path: Path) -> tuple[GPT, dict]:  # noqa: ARG001 - written by it
    """The same base with adapters, and its model_config.yaml."""
    imported = import_huggingface(tmp_path / "base")
    model = build_gpt(GPTConfig.from_dict(imported.config), Layout(), torch.float32)
    load_model(model, imported.weights)
    before = {name: x.detach().clone() for name, x in model.named_parameters()}
    add_adapters(model, LORA, seed=1)
    assert all(torch.equal(x, dict(model.named_parameters())[name]) for name, x in before.items())
    return model, imported.config


@pytest.fixture
def batch(random_rows: Callable[..., TokenBatch]) -> TokenBatch:
    return random_rows([9, 14, 6])


def drawn(model: GPT) -> None:
    """Adapters that change what the model computes."""
    draw = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for adapters in adapters_of(model):
            for _, b in adapters.pairs():
                b.copy_(torch.randn(b.shape, generator=draw) * 0.1)


def with_peft(base: PreTrainedModel, folder: Path) -> peft.PeftModel:
    return peft.PeftModel.from_pretrained(base, folder, is_trainable=True)


def written(model: GPT, config: dict, folder: Path) -> Path:
    save_state(model_state(model), folder / "weights").result()
    write_peft(folder / "peft", WeightReader(folder / "weights"), config, LORA, base="base")
    return folder / "peft"


def test_new_adapters_change_nothing_and_are_all_that_is_trained(ours, theirs, batch):
    model, _ = ours
    found = whole_logits.logits(model, batch)
    torch.testing.assert_close(found, theirs(batch.tokens).logits, rtol=0, atol=1e-4)
    trained = {name for name, x in model.named_parameters() if x.requires_grad}
    assert trained
    assert all(".adapters." in name for name in trained)


def test_logits_and_gradients_are_pefts(ours, theirs, batch, tmp_path):
    model, config = ours
    drawn(model)
    other = with_peft(theirs, written(model, config, tmp_path))
    real = torch.arange(batch.seq_length) < batch.lengths[:, None]
    out = other(batch.tokens, attention_mask=real.long()).logits
    torch.testing.assert_close(whole_logits.logits(model, batch)[real], out[real], rtol=0, atol=1e-4)

    policy = GPTPolicy(model)
    policy.prepare_training(OptimConfig(lr=1e-3), clip_grad=0.0, max_steps=2)
    loss = means(policy.get_loss_and_metrics([batch], NLL(), forward_only=False))["loss"]
    logprobs = out.log_softmax(-1)[:, :-1].gather(2, batch.tokens[:, 1:, None])[..., 0]
    wanted = -logprobs[real[:, 1:]].mean()
    wanted.backward()
    assert loss == pytest.approx(wanted.item(), rel=1e-5)
    norm = torch.cat([p.grad.flatten() for p in other.parameters() if p.grad is not None]).norm().item()
    assert policy.optimizer_step()["grad_norm"] == pytest.approx(norm, rel=1e-4)


@pytest.mark.parametrize(
    ("lora_alpha", "more"),
    [(6, {}), (3, {"use_rslora": True}), (6, {"init_lora_weights": "orthogonal"})],
    ids=str,
)
def test_files_of_peft_are_read(ours, theirs, batch, tmp_path, lora_alpha, more):
    """What PEFT drew, trained and saved; 3 / sqrt(4) is 6 / 4."""
    names = ["q_proj", "k_proj", "v_proj", "o_proj", "up_proj", "down_proj"]
    if hasattr(theirs.model.layers[0].mlp, "gate_proj"):
        names.append("gate_proj")
    settings = peft.LoraConfig(r=4, lora_alpha=lora_alpha, target_modules=names, **more)
    other = peft.get_peft_model(theirs, settings)
    with torch.no_grad():
        for name, x in other.named_parameters():
            if "lora_B" in name:
                x.normal_(std=0.1)
    other.save_pretrained(tmp_path / "adapters")
    model, config = ours
    load_model(model, PeftWeights(tmp_path / "adapters", config, LORA))
    out = other(batch.tokens).logits
    torch.testing.assert_close(whole_logits.logits(model, batch)[0, :9], out[0, :9], rtol=0, atol=1e-4)
    # And written again they are the same numbers under the same names.
    again = load_file(written(model, config, tmp_path) / "adapter_model.safetensors")
    first = load_file(tmp_path / "adapters/adapter_model.safetensors")
    assert again.keys() == first.keys()
    assert all(torch.equal(again[name], x) for name, x in first.items())


def test_what_is_saved_and_generated_has_the_adapters_merged(ours, batch, tmp_path):
    model, config = ours
    drawn(model)
    save_model(model, tmp_path / "merged")
    plain = build_gpt(GPTConfig.from_dict(config), Layout(), torch.float32)
    load_model(plain, tmp_path / "merged")
    found, wanted = whole_logits.logits(plain, batch), whole_logits.logits(model, batch)
    torch.testing.assert_close(found, wanted, rtol=0, atol=1e-4)
    prompts = [Prompt(tokens=row[:4].tolist(), number=i) for i, row in enumerate(batch.tokens)]
    sampling = SamplingConfig(max_length=8, seed=5)
    policy = GPTPolicy(model)
    rollout = policy.generate(prompts, sampling)
    scored = policy.logprobs(rollout, sampling)
    torch.testing.assert_close(scored, rollout.sampler_logprobs, rtol=0, atol=1e-4)
    assert torch.equal(rollout.tokens, GPTPolicy(plain).generate(prompts, sampling).tokens)


def test_the_reference_has_the_adapters_of_the_beginning(ours, batch):
    model, _ = ours
    policy = GPTPolicy(model)
    before = policy.logprobs(batch)
    policy.keep_reference()
    optim = OptimConfig(lr=1e-2, sched=SchedConfig(name="constant", warmup_steps=0))
    policy.prepare_training(optim, clip_grad=0.0, max_steps=2)
    policy.get_loss_and_metrics([batch], NLL(), forward_only=False)
    policy.optimizer_step()
    after = policy.logprobs(batch)
    assert (after - before).abs().max() > 1e-2
    with policy.as_reference():
        assert torch.equal(policy.logprobs(batch), before)
    assert torch.equal(policy.logprobs(batch), after)


@pytest.mark.parametrize(
    ("changed", "problem", "fix"),
    [
        ({"r": 8}, "r=8 and lora_alpha=6.0", "adapter_dim=8"),
        ({"use_dora": True}, "use_dora=True is not supported", "use_dora=False"),
        ({"rank_pattern": {"q_proj": 2}}, "rank_pattern=", "rank_pattern={}"),
        ({"peft_type": "IA3"}, "peft_type=IA3 is not supported", "LORA"),
        ({"r": None}, "r=None and lora_alpha=6.0 are not two numbers", "again"),
        ({"use_rslora": True}, "r=4 and lora_alpha=6.0, use_rslora=True", "alpha=12.0"),
        ({"init_lora_weights": "pissa"}, "init_lora_weights=pissa goes with a base", "convert"),
    ],
)
def test_other_adapters_are_refused(ours, tmp_path, changed, problem, fix):
    model, config = ours
    folder = written(model, config, tmp_path)
    settings = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps(settings | changed))
    with pytest.raises(UserError) as caught:
        PeftWeights(folder, config, LORA)
    assert problem in caught.value.problem
    assert fix in caught.value.fix


@pytest.mark.parametrize(
    ("targets", "problem"),
    [(("attention_qkv",), "has no place for"), (("attention_qkv", "mlp"), "has no place for")],
)
def test_no_adapter_of_a_file_is_left_out(ours, tmp_path, targets, problem):
    model, config = ours
    folder = written(model, config, tmp_path)
    with pytest.raises(UserError, match=problem):
        PeftWeights(folder, config, replace(LORA, target_modules=targets))


def test_a_file_without_some_of_the_adapters_is_refused(ours, theirs, tmp_path):
    """PEFT's usual q and v alone."""
    _, config = ours
    names = peft.LoraConfig(r=4, lora_alpha=6, target_modules=["q_proj", "v_proj"])
    peft.get_peft_model(theirs, names).save_pretrained(tmp_path / "adapters")
    with pytest.raises(UserError, match=r"lacks adapters .*k_proj") as caught:
        PeftWeights(tmp_path / "adapters", config, replace(LORA, target_modules=("attention_qkv",)))
    assert "q, k and v" in caught.value.fix
