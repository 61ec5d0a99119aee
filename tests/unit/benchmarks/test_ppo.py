# SPDX-License-Identifier: Apache-2.0
"""Phases add up to the step; what both jobs do at once, and what the server takes, on hand-made logs."""

import pytest

from benchmarks.ppo import OVERHEAD_CEILING, OVERLAP_FLOOR, RUN, Step, figures_of, measured_steps
from benchmarks.processes import ALLOCATORS

# A step of 10 s that ends at 100: responses for 3 s, log-probs for 2 s, learning for 4 s, half a second of waiting.
TIMERS = {
    "step_time": 10.0,
    "rollout_time": 5.25,
    "generate": 3.0,
    "logprobs": 1.0,
    "init_logprobs": 1.0,
    "critic_wait": 0.125,
    "critic_infer_time": 2.125,
    "train_time": 4.0,
    "critic_train_wait": 0.5,
    "critic_train_time": 4.5,
}
ACTOR = {"step": 1, "time": 100.0, "train_optim/loss": 1.0} | {f"timers/{k}": v for k, v in TIMERS.items()}
# Two steps of the critic, from 95 to 97 and from 97.5 to 99.75; the actor learns from 95.5 to 99.5.
CRITIC = [
    {"step": 1, "time": 97.0, "train/step_time": 2.0, "timers/infer_time": 2.0},
    {"step": 2, "time": 99.75, "train/step_time": 2.25},
]


@pytest.fixture
def step() -> Step:
    early = [{**line, "time": 0.0} for line in CRITIC]
    (found,) = measured_steps([ACTOR, ACTOR], [*early, *CRITIC], warm_up=1)
    return found


def test_phases_add_up(step: Step):
    phases = step.phases()
    assert sum(phases.values()) == pytest.approx(step.whole) == 10.0
    assert phases["the rest of the rollout"] == pytest.approx(0.125)
    assert phases["the rest"] == pytest.approx(0.25)


def test_both_learn_at_once_where_their_times_meet(step: Step):
    assert step.critic_learning == 4.25
    # 95.5 to 97 and 97.5 to 99.5, of the actor's 4 s.
    assert step.overlap == pytest.approx(3.5 / 4.0)


def test_the_servers_overhead_is_what_the_critic_does_not_compute(step: Step):
    assert step.overhead == pytest.approx((2.125 - 2.0) + (4.5 - 4.25))


def test_a_log_of_another_shape_is_noticed():
    with pytest.raises(AssertionError):
        measured_steps([ACTOR, ACTOR], CRITIC[:1], warm_up=0)
    with pytest.raises(AssertionError):
        measured_steps([ACTOR, ACTOR], [*CRITIC, CRITIC[0]], warm_up=0)


def test_limits_stand_beside_the_default_allocators_figures(step: Step):
    found = figures_of({allocator: [step] * 2 for allocator in ALLOCATORS})
    limits = {figure.metric: figure for figure in found if figure.metric.startswith("at ")}
    assert {name: figure.values for name, figure in limits.items()} == {
        "at least": (OVERLAP_FLOOR,),
        "at most": (OVERHEAD_CEILING,),
    }
    assert all("default allocator" in figure.subject for figure in limits.values())
    shares = [f for f in found if f.subject == "the server's overhead, keeping allocator"]
    assert [figure.values for figure in shares] == [(0.0375, 0.0375)]


def test_batches_are_whole():
    assert RUN.responses % RUN.learned_at_once == RUN.learned_at_once % RUN.micro_batch == 0
    assert RUN.prompt + RUN.response <= RUN.model.encoder_seq_length
