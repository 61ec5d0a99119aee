# SPDX-License-Identifier: Apache-2.0
"""What both kinds of layers are to do alike: ``python recipe.py WHEEL OUT`` does it with Transformer Engine's.

Writes OUT/te-<family>.pt and OUT/te-<family>/{weights,state}, and goes on from what OUT/local-<family> holds.
"""

import sys
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

LLAMA = {
    "normalization": "rmsnorm",
    "activation": "fast-swiglu",
    "bias": False,
    "position_embedding_type": "rope",
    "share_embeddings_and_output_weights": False,
}
NEMOTRON = {"normalization": "layernorm1p", "activation": "squared-relu", "rotary_percentage": 0.5}
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": LLAMA,
    "qwen2": LLAMA | {"qkv_bias": True, "share_embeddings_and_output_weights": True},
    "qwen3": LLAMA | {"qk_layernorm": True, "share_embeddings_and_output_weights": True},
    "nemotron": LLAMA | NEMOTRON,
    "gpt2": {
        "normalization": "layernorm",
        "activation": "gelu",
        "position_embedding_type": "learned_absolute",
    },
    "window": LLAMA | {"window_size": 5},
}
CROSSED = ("qwen3", "llama")  # saved by one kind and loaded by the other, each in a dtype of its own
VOCAB = 101


def build(family: str, *, scored: bool = False, seed: int = 0) -> Any:
    """A model whose weights are the same whichever modules hold them."""
    from nemo_aligner.models.gpt.config import GPTConfig
    from nemo_aligner.models.gpt.heads import HeadConfig
    from nemo_aligner.models.gpt.model import build_gpt
    from nemo_aligner.parallel.ranks import Layout

    sizes = {"num_layers": 2, "hidden_size": 64, "ffn_hidden_size": 96, "num_attention_heads": 4}
    sizes |= {"num_query_groups": 2, "vocab_size": VOCAB, "max_position_embeddings": 64}
    config = GPTConfig.from_dict(sizes | FAMILIES[family])
    model = build_gpt(config, Layout(), dtype(family), head=HeadConfig() if scored else None)
    draw = torch.Generator().manual_seed(seed)
    one = 0.0 if config.normalization == "layernorm1p" else 1.0
    with torch.no_grad():
        for name, parameter in sorted((_local_name(n), p) for n, p in model.named_parameters()):
            centre = one if "norm" in name and name.endswith("weight") else 0.0
            parameter.copy_(torch.randn(parameter.shape, generator=draw) * 0.1 + centre)
    return model


def dtype(family: str) -> torch.dtype:
    return torch.bfloat16 if family == "llama" else torch.float32


def _local_name(name: str) -> str:
    name = name.replace("self_attention.linear_qkv.layer_norm_", "input_layernorm.")
    return name.replace("mlp.linear_fc1.layer_norm_", "pre_mlp_layernorm.")


def keys(model: Any) -> dict[str, list[Any]]:
    """What is stored of a model: {name: shapes}, without FP8's state."""
    from megatron.core.dist_checkpointing.mapping import ShardedObject, ShardedTensorFactory

    found = {}
    for value in model.sharded_state_dict(prefix="model.").values():
        if not isinstance(value, ShardedObject):
            parts = value.build() if isinstance(value, ShardedTensorFactory) else [value]
            found[value.key] = [list(part.global_shape) for part in parts]
    return found


def rows() -> Any:
    from nemo_aligner.batch import TokenBatch

    tokens = torch.randint(0, VOCAB, (3, 17), generator=torch.Generator().manual_seed(1))
    lengths = torch.tensor([17, 9, 13])
    return TokenBatch(tokens=tokens, loss_mask=torch.arange(17)[None] < lengths[:, None], lengths=lengths)


def packed_rows() -> Any:
    from nemo_aligner.batch import TokenBatch

    batch = rows()
    bounds = [0, 17, 26, 39]
    tokens = torch.cat(
        [*(t[:n] for t, n in zip(batch.tokens, batch.lengths, strict=True)), torch.zeros(4).long()]
    )
    return TokenBatch(
        tokens=tokens[None],
        loss_mask=(torch.arange(43) < 39)[None],
        lengths=batch.lengths,
        cu_seqlens=torch.tensor(bounds, dtype=torch.int32),
    )


def policy_of(model: Any) -> Any:
    from nemo_aligner.models.gpt.policy import GPTPolicy

    return GPTPolicy(model, end_ids=(VOCAB - 1,))


def prepare(policy: Any) -> None:
    from nemo_aligner.models.gpt.learning_rate import OptimConfig, SchedConfig

    constant = SchedConfig(name="constant", warmup_steps=0)
    policy.prepare_training(OptimConfig(lr=1e-3, sched=constant), clip_grad=1.0, max_steps=10)


def train(policy: Any, steps: int) -> Tensor:
    """[steps, 2]: loss and gradient norm of each."""
    from nemo_aligner.objectives.nll import NLL
    from nemo_aligner.run.metrics import means

    found = []
    for _ in range(steps):
        metrics = means(policy.get_loss_and_metrics(rows().split(1), NLL(), forward_only=False))
        found.append((metrics["loss"], policy.optimizer_step()["grad_norm"]))
    return torch.tensor(found)


def measure(family: str, folder: Path) -> dict[str, Any]:
    """Keys, log-probs of padded and packed rows, responses, and training steps, after two of which all is saved."""
    from nemo_aligner.checkpoint.sharded import save_model, save_state
    from nemo_aligner.models.sampling_config import SamplingConfig
    from nemo_aligner.rollout_batch import Prompt

    policy = policy_of(build(family))
    prompts = [Prompt(tokens=row[:5].tolist(), number=i) for i, row in enumerate(rows().tokens)]
    responses = policy.generate(prompts, SamplingConfig(max_length=12, min_length=3), slots=2)
    found = {
        "keys": keys(policy.model),
        "keys of a reward model": keys(build(family, scored=True)),
        "logprobs": policy.logprobs(rows()).float(),
        "packed": policy.logprobs(packed_rows()).float(),
        "answers": responses.tokens,
        "their logprobs": responses.sampler_logprobs,
    }
    prepare(policy)
    found["steps"] = train(policy, 2)
    if family in CROSSED:
        save_model(policy.model, folder / "weights")
        save_state(policy.training_state(), folder / "state")
    found["later steps"] = train(policy, 2)
    found["logprobs after"] = policy.logprobs(rows()).float()
    return found


def go_on(family: str, folder: Path) -> Tensor:
    """The steps that follow those that ``folder`` was saved after."""
    from nemo_aligner.checkpoint.sharded import load_model, load_state

    policy = policy_of(build(family, seed=1))
    prepare(policy)
    load_model(policy.model, folder / "weights")
    policy.load_training_state(load_state(policy.training_state(), folder / "state", remedy="-"))
    return train(policy, 2)


def main(wheel: Path, out: Path) -> None:
    import compiled

    compiled.install(wheel)
    really, torch.cuda.is_available = torch.cuda.is_available, lambda: True
    from nemo_aligner.parallel import te

    assert te.usable()
    torch.cuda.is_available = really
    from nemo_aligner.models.gpt.optim import inner_optimizer
    from nemo_aligner.parallel import world

    with world.ensure_single_process():
        for family in FAMILIES:
            found = measure(family, out / f"te-{family}")
            if family in CROSSED:
                found["from local"] = go_on(family, out / f"local-{family}")
            torch.save(found, out / f"te-{family}.pt")
        policy = policy_of(build("llama"))
        prepare(policy)
        used = (policy.model.decoder.final_layernorm, inner_optimizer(policy._optimizer))
    (out / "used").write_text(" ".join(type(part).__module__.partition(".")[0] for part in used))


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
