# SPDX-License-Identifier: Apache-2.0
"""The schedule against its formula, and the optimizer against torch's AdamW."""

import math
from collections.abc import Callable

import pytest
import torch

from nemo_aligner.batch import TokenBatch
from nemo_aligner.errors import UserError
from nemo_aligner.models.gpt.config import GPTConfig
from nemo_aligner.models.gpt.learning_rate import OptimConfig, SchedConfig, learning_rate
from nemo_aligner.models.gpt.model import GPT
from nemo_aligner.models.gpt.policy import GPTPolicy
from nemo_aligner.objectives.nll import NLL
from nemo_aligner.objectives.protocol import Metrics, ModelOutput

CONFIG = {
    "num_layers": 2,
    "hidden_size": 16,
    "ffn_hidden_size": 24,
    "num_attention_heads": 2,
    "vocab_size": 101,
    "activation": "swiglu",
    "position_embedding_type": "rope",
}
CONSTANT = SchedConfig(name="constant", warmup_steps=0)


def curve(max_steps: int, *, peak: float = 1.0, **sched: object) -> list[float]:
    return [
        learning_rate(s, peak=peak, sched=SchedConfig(**sched), max_steps=max_steps) for s in range(max_steps)
    ]


def test_cosine_is_the_formula():
    peak, low, warmup, held, steps = 3e-4, 2e-5, 5, 4, 30
    found = curve(steps, peak=peak, warmup_steps=warmup, constant_steps=held, min_lr=low)
    decay = steps - warmup - held
    for step in range(steps):
        if step < warmup:
            expected = peak * (step + 1) / (warmup + 1)
        elif step < warmup + decay:
            expected = low + (peak - low) * math.cos(math.pi * (step - warmup) / decay / 2) ** 2
        else:
            expected = low
        assert found[step] == pytest.approx(expected, rel=1e-12)
    assert found[warmup] == peak == max(found)
    assert found[-held:] == [low] * held


def test_schedules_at_their_ends():
    assert curve(3, name="constant", warmup_steps=0) == [1.0, 1.0, 1.0]
    assert curve(4, name="constant", warmup_steps=1) == [0.5, 1.0, 1.0, 1.0]
    assert curve(3, warmup_steps=0, constant_steps=0, min_lr=0.1)[0] == 1.0
    # More constant steps than the run has: nothing is left for the cosine.
    assert curve(4, warmup_steps=1, constant_steps=1000, min_lr=0.1) == [0.5, 0.1, 0.1, 0.1]


DECAYS = {
    "linear": lambda x: 1 - x,
    "cosine": lambda x: math.cos(math.pi * x / 2) ** 2,
    "minus_sqrt": lambda x: 1 - x**0.5,
    "exponential": lambda x: 2 ** (1 - x) - 1,
}


@pytest.mark.parametrize("style", DECAYS)
def test_wsd_is_the_formula(style: str):
    peak, low, warmup, decay, held, steps = 3e-4, 2e-5, 5, 8, 3, 30
    found = curve(
        steps,
        peak=peak,
        name="WSD",
        warmup_steps=warmup,
        decay_steps=decay,
        decay_style=style,
        constant_steps=held,
        min_lr=low,
    )
    begin = steps - decay - held
    assert found[:warmup] == pytest.approx([peak * (s + 1) / 6 for s in range(warmup)], rel=1e-12)
    assert found[warmup : begin + 1] == [peak] * (begin + 1 - warmup)
    for step in range(begin, begin + decay):
        expected = low + (peak - low) * DECAYS[style]((step - begin) / decay)
        assert found[step] == pytest.approx(expected, rel=1e-12)
    assert found[-held:] == [low] * held


def test_names_of_nemo():
    """WarmupAnnealing falls linearly from the warm-up's end on; WarmupPolicy and WarmupHoldPolicy stay."""
    found = curve(9, name="WarmupAnnealing", warmup_steps=1, constant_steps=0, min_lr=0.2)
    assert found == pytest.approx([0.5, *(0.2 + 0.8 * (8 - s) / 8 for s in range(8))], rel=1e-12)
    for name in ("WarmupPolicy", "WarmupHoldPolicy"):
        assert curve(5, name=name, warmup_steps=2) == curve(5, name="constant", warmup_steps=2)


def test_wsd_of_a_run_that_is_shorter_than_its_decay():
    found = curve(
        4, name="WSD", warmup_steps=0, decay_steps=100, decay_style="linear", constant_steps=0, min_lr=0.0
    )
    assert found == [1.0, 0.75, 0.5, 0.25]


@pytest.mark.parametrize("name", ["CosineAnnealing", "WarmupAnnealing", "WSD"])
def test_shares_of_the_run_are_its_steps(name: str):
    decay = {"decay_steps": 0.3} if name == "WSD" else {}
    shares = curve(20, name=name, warmup_steps=0.1, constant_steps=0.25, min_lr=0.1, **decay)
    decay = {"decay_steps": 6} if name == "WSD" else {}
    assert shares == curve(20, name=name, warmup_steps=2, constant_steps=5, min_lr=0.1, **decay)


@pytest.mark.parametrize(
    ("name", "value"), [("warmup_steps", 1.5), ("constant_steps", -1), ("warmup_steps", -0.1)]
)
def test_neither_steps_nor_a_share_is_refused(name: str, value: float):
    with pytest.raises(UserError, match=rf"model\.optim\.sched\.{name}={value} is neither"):
        OptimConfig(sched=SchedConfig(**{name: value})).check()


@pytest.mark.parametrize(
    ("optim", "setting"),
    [
        (OptimConfig(overlap_param_sync=True), "needs model.optim.overlap_grad_sync"),
        (OptimConfig(bucket_cap_mb=0), "model.optim.bucket_cap_mb=0"),
        (OptimConfig(sched=SchedConfig(name="WSD")), "decay_steps"),
        (OptimConfig(sched=SchedConfig(decay_steps=5)), "decay_steps=5 is for model.optim.sched.name=WSD"),
        (OptimConfig(lr=0.0), "model.optim.lr=0.0"),
        (OptimConfig(lr=1e-7, sched=SchedConfig(min_lr=1e-6)), "model.optim.sched.min_lr=1e-06"),
    ],
)
def test_a_rate_that_trains_the_wrong_way_is_refused(optim: OptimConfig, setting: str):
    with pytest.raises(UserError, match=setting):
        optim.check()


@pytest.mark.parametrize("clip_grad", [1e-2, 1e6], ids=["clipped", "not clipped"])
def test_five_steps_are_torchs_adamw(
    clip_grad: float, random_model: Callable[..., GPT], random_rows: Callable[..., TokenBatch]
):
    """The same gradients into both; torch's in float64. Weight decay on a bias or a norm would show."""
    model = random_model(GPTConfig(**CONFIG))
    optim = OptimConfig(
        lr=3e-2,
        weight_decay=0.5,
        betas=(0.8, 0.95),
        eps=1e-7,
        sched=SchedConfig(warmup_steps=3, constant_steps=1),
    )
    policy = GPTPolicy(model)
    policy.prepare_training(optim, clip_grad=clip_grad, max_steps=5)
    twins = [p.detach().double().requires_grad_() for p in model.parameters()]
    decays = {True: 0.5, False: 0.0}
    theirs = torch.optim.AdamW(
        [
            {"params": [p for p in twins if (p.ndim > 1) is matrix], "weight_decay": decay}
            for matrix, decay in decays.items()
        ],
        betas=(0.8, 0.95),
        eps=1e-7,
    )
    for step in range(5):
        policy.get_loss_and_metrics([random_rows((9, 5, 7), seed=step)], NLL(), forward_only=False)
        for ours, twin in zip(model.parameters(), twins, strict=True):
            twin.grad = ours.main_grad.double()
        found = policy.optimizer_step()

        norm = torch.nn.utils.clip_grad_norm_(twins, clip_grad)
        for group in theirs.param_groups:
            group["lr"] = learning_rate(step, peak=3e-2, sched=optim.sched, max_steps=5)
        theirs.step()
        assert found == pytest.approx(
            {"lr": theirs.param_groups[0]["lr"], "grad_norm": norm.item(), "skipped_steps": 0}, rel=1e-5
        )
        for (name, ours), twin in zip(model.named_parameters(), twins, strict=True):
            torch.testing.assert_close(
                ours.double(), twin, rtol=1e-5, atol=1e-6, msg=lambda m, n=name: f"{n}: {m}"
            )


def test_steps_too_small_for_bf16_are_not_lost(
    random_model: Callable[..., GPT], random_rows: Callable[..., TokenBatch]
):
    """One step moves a weight by less than bf16 resolves; the fp32 copies add them up."""
    model = random_model(GPTConfig(**CONFIG), dtype=torch.bfloat16)
    before = {name: p.detach().float().clone() for name, p in model.named_parameters()}
    policy = GPTPolicy(model)
    policy.prepare_training(
        OptimConfig(lr=1e-4, weight_decay=0.0, sched=CONSTANT), clip_grad=1.0, max_steps=30
    )
    for _ in range(30):
        policy.get_loss_and_metrics([random_rows((9, 5, 7))], NLL(), forward_only=False)
        policy.optimizer_step()
    norms = [n for n in before if n.endswith("layernorm.weight")]
    assert norms
    moved = [(model.get_parameter(n).float() - before[n]).abs().mean() for n in norms]
    # Adam on one batch moves by nearly the learning rate a step: 3e-3 in all, bf16's step near 0.7 is 4e-3.
    assert 1e-3 < torch.stack(moved).mean() < 4e-3


class _Spoiled:
    """NLL whose value, or only its gradient, is multiplied with a number; its gradient is not known before."""

    wants, unit, metrics = NLL.wants, NLL.unit, NLL.metrics

    def __init__(self, factor: float, *, gradient_only: bool) -> None:
        self.factor, self.gradient_only = factor, gradient_only

    def __call__(self, output: ModelOutput, batch: TokenBatch) -> tuple[torch.Tensor, Metrics]:
        loss, metrics = NLL()(output, batch)
        spoiled = loss * self.factor
        return spoiled, metrics if self.gradient_only else {"loss": (spoiled.detach(), metrics["loss"][1])}


@pytest.mark.parametrize("factor", [math.nan, math.inf, 1e38], ids=["nan", "inf", "overflow"])
@pytest.mark.parametrize("gradient_only", [False, True], ids=["loss", "gradient"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_a_step_that_is_not_finite_changes_nothing_but_the_schedule(
    random_model: Callable[..., GPT],
    random_rows: Callable[..., TokenBatch],
    factor: float,
    gradient_only: bool,
    dtype: torch.dtype,
):
    optim = OptimConfig(lr=1e-2, sched=SchedConfig(warmup_steps=5, constant_steps=0))
    policies = [GPTPolicy(random_model(GPTConfig(**CONFIG), dtype=dtype)) for _ in range(2)]
    for policy in policies:
        policy.prepare_training(optim, clip_grad=1.0, max_steps=9)
    steps = [policy.optimizer_step() for policy in policies if _learn(policy, random_rows, NLL())]
    assert [step["skipped_steps"] for step in steps] == [0, 0]
    spoiled, calm = policies
    before = [p.detach().clone() for p in spoiled.model.parameters()]
    _learn(spoiled, random_rows, _Spoiled(factor, gradient_only=gradient_only))
    skipped = spoiled.optimizer_step()
    assert skipped["skipped_steps"] == 1
    assert not math.isfinite(skipped["grad_norm"])
    assert skipped["lr"] == learning_rate(1, peak=1e-2, sched=optim.sched, max_steps=9)
    assert all(torch.equal(a, b) for a, b in zip(before, spoiled.model.parameters(), strict=True))
    # The moments too are as they were: the next step is that of a run which had none in between, but for its rate.
    calm._optimizer_steps += 1
    for policy in policies:
        _learn(policy, random_rows, NLL())
        policy.optimizer_step()
    pairs = zip(spoiled.model.parameters(), calm.model.parameters(), strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)


def _learn(policy: GPTPolicy, random_rows: Callable[..., TokenBatch], objective: NLL) -> bool:
    policy.get_loss_and_metrics([random_rows((9, 5, 7))], objective, forward_only=False)
    return True
