# SPDX-License-Identifier: Apache-2.0
"""Online learning (PPO, GRPO, RLOO, rejection sampling, distillation, DPO): sample, score, credit, update.

Sees models through their interfaces, and the critic's job through its link; where the estimator needs no critic there
is none.
"""

import logging
import signal
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace

from nemo_aligner.algorithms.collector import Collected, Collector
from nemo_aligner.algorithms.critic_link import CriticLink, PPOState
from nemo_aligner.algorithms.ppo_config import PPOConfig
from nemo_aligner.algorithms.rollout import PromptSource, RolloutSettings
from nemo_aligner.algorithms.rollout_metrics import learning_metrics, rollout_metrics, summary, table_rows
from nemo_aligner.algorithms.run_lifecycle import RunLifecycle
from nemo_aligner.algorithms.sampler import Sampler
from nemo_aligner.algorithms.scoring import RewardSources, Scorer
from nemo_aligner.algorithms.skips import NotFinite, check_finite
from nemo_aligner.algorithms.updates import Updates
from nemo_aligner.batch import ReferencedPairs, TokenBatch
from nemo_aligner.checkpoint.trainer_state import Checkpoint, TrainerState, read_extra
from nemo_aligner.checkpoint.training import TrainingCheckpoints, monitor_name
from nemo_aligner.models.alignable_interface import AlignableGenerativeInterface, TeacherInterface
from nemo_aligner.objectives.adaptive import RewardScaling
from nemo_aligner.objectives.credit import (
    credit,
    kl_controller,
    statistics,
    update_reward_scaling,
    value_batch,
)
from nemo_aligner.objectives.protocol import Objective
from nemo_aligner.objectives.value import MAX_RETURN
from nemo_aligner.parallel import collectives, world
from nemo_aligner.rollout_batch import ScoredRollout
from nemo_aligner.run.experiment import Experiment
from nemo_aligner.run.progress import ProgressBar
from nemo_aligner.run.schedule import make_plan
from nemo_aligner.run.stop import StoppedEarly, StopRequest
from nemo_aligner.run.stopwatch import Stopwatch
from nemo_aligner.serving.proxies import CriticUnavailable, WaitCancelled

logger = logging.getLogger(__name__)

VALIDATION_DRAW = 1 << 30  # the same each time, and that of no step


@dataclass(frozen=True, kw_only=True)
class OnlineObjective:
    """The loss of a policy that writes what it learns from, and what a rollout must be scored by for it."""

    loss: Objective
    # makes one pair of the responses to each prompt, which the loss is of; None: it is of credited responses
    pairs: Callable[[ScoredRollout], ReferencedPairs] | None = None
    with_reference: bool = False  # whether the initial policy is asked for log-probs
    teacher: TeacherInterface | None = None  # is asked in the initial policy's place


def make_collector(
    config: PPOConfig,
    rollouts: RolloutSettings,
    policy: AlignableGenerativeInterface,
    objective: OnlineObjective,
    sources: RewardSources,
    *,
    give_up: Callable[[], bool],
) -> Collector:
    """A collector of responses of ``policy``; ``give_up`` is asked on rank 0 while it waits for a server."""
    sampler = Sampler(
        policy=policy,
        rollouts=rollouts,
        seq_length=config.rollout_batch_seq_length,
        environments=sources.environments,
    )
    scorer = Scorer(
        policy=policy,
        rollouts=rollouts,
        sources=sources,
        served=config.served_reward,
        rewards=config.rewards,
        give_up=give_up,
        with_reference=objective.with_reference,
        teacher=objective.teacher,
    )
    return Collector(sampler=sampler, scorer=scorer, most_rounds=config.max_sampling_rounds)


class PPOTrainer:
    """Trains ``policy`` on its own responses.

    Args:
        objective: of the policy.
        prompts: of training, and of validation if there is any.
    """

    def __init__(
        self,
        config: PPOConfig,
        rollouts: RolloutSettings,
        policy: AlignableGenerativeInterface,
        objective: OnlineObjective,
        prompts: tuple[PromptSource, PromptSource | None],
        run: Experiment,
        checkpoints: TrainingCheckpoints | None,
    ) -> None:
        self.config, self.rollouts, self.policy, self.run = config, rollouts, policy, run
        self.train, self.validation = prompts
        self.objective = objective
        self.updates = Updates(
            policy=policy, objective=objective.loss, rollouts=rollouts, num_epochs=config.num_ppo_epochs
        )
        self.plan = plan = make_plan(
            config, batches_per_epoch=self.train.batches_per_epoch, val_batches=1 if self.validation else 0
        )
        self.lifecycle = RunLifecycle(plan, run, checkpoints, block=config.block, save=self._save)
        self.kl, self.scaling = kl_controller(config), RewardScaling()
        self.critic: CriticLink | None = None
        self._needs_replay = False
        self.state = TrainerState(data=self.train.fingerprint | {"steps_per_epoch": plan.steps_per_epoch})
        self.own = PPOState(kl=self.kl.state_dict(), reward_scaling=self.scaling.state_dict())

    def resume(self, start: Checkpoint) -> None:
        """Go on from ``start``, whose weights the policy has.

        Raises:
            UserError: ``start`` is at the end of the plan, or its run had other prompts.
        """
        self.state = self.lifecycle.restore(start, self.state.data)
        self.own = start.algorithm(PPOState)
        self.kl, self.scaling = self.kl.restored(self.own.kl), self.scaling.restored(self.own.reward_scaling)
        self._needs_replay = read_extra(start) is not None

    def fit(self, sources: RewardSources) -> None:
        """Train to the end of the plan.

        Raises:
            StoppedEarly: a signal or the time limit ended the run; what there was after the first step is saved.
            UserError: a server is lost, or numbers of a rollout are not finite, and the run is saved as it was at the
                last step; or losses or gradients are no longer finite.
        """
        if sources.critic is not None:
            self.critic = CriticLink(
                critic=sources.critic, give_up=self._gives_up, steps_per_epoch=self.plan.steps_per_epoch
            )
        self.collector = make_collector(
            self.config, self.rollouts, self.policy, self.objective, sources, give_up=self._gives_up
        )
        self.lifecycle.check_room()
        self.run.begin(self.state.step, max_steps=self.plan.max_steps)
        bar = ProgressBar(
            total=self.plan.max_steps, start=self.state.step, enabled=world.is_logging_rank(), name="ppo"
        )
        try:
            with StopRequest(interrupts=True, logs=world.is_logging_rank()) as self._request:
                try:
                    self._loop(bar)
                except (CriticUnavailable, NotFinite, WaitCancelled) as error:
                    self._save_alone()
                    if not isinstance(error, WaitCancelled):
                        raise error.error from error
                    # Only rank 0 has seen the signal for sure.
                    raise self.lifecycle.stopped(self.state.step, self._request.number or 15) from error
        finally:
            bar.close()

    def _gives_up(self) -> bool:
        return self._request.number != 0

    def _loop(self, bar: ProgressBar) -> None:
        self._begin()
        while self.state.step < self.plan.max_steps:
            with world.phase(f"step {self.state.step + 1}"):
                self._advance(bar)
            self.lifecycle.stop_if_diverged(self.state, limit=self.config.max_skipped_steps)
            if self.plan.validates_after(self.state.step):
                self._validate()
            self.lifecycle.after(self.state.step, self._request)
        self.lifecycle.end(self.state)

    def _advance(self, bar: ProgressBar) -> None:
        """One step: generate, score, credit, update."""
        watch, step = Stopwatch(), self.state.step + 1
        with watch("rollout_time"):
            index = step - 1 + self.own.further_rounds
            found = self.collector.collect(self.train, index, step - 1, watch=watch)
            learned, self.scaling = self._credit(found.scored)
        pending = self.critic.train(value_batch(found.scored, learned), step=step) if self.critic else None
        metrics = self._update(found, learned, watch)
        try:
            if self.critic is not None and pending is not None:
                metrics |= self.critic.timed_loss(
                    pending, watch, saves=self.lifecycle.checkpoints is not None
                )
        except (CriticUnavailable, WaitCancelled):
            self.own = replace(self.own, lacks_critic_loss=True)
            raise
        finally:
            # The step is done where the critic is lost, too.
            self._report(found, metrics, watch, bar)

    def _credit(self, scored: ScoredRollout) -> tuple[TokenBatch, RewardScaling]:
        """An Experience, or pairs; and the scaling of rewards with this rollout's in it."""
        if self.objective.pairs is not None:
            return self.objective.pairs(scored), self.scaling
        coefficient = self.kl.coefficient
        scaling = update_reward_scaling(self.scaling, scored, self.config, kl_coefficient=coefficient)
        found = credit(scored, self.config, kl_coefficient=coefficient, scaling=scaling)
        fix = "look at the rewards; set trainer.ppo.reward_clip, or trainer.ppo.scale_rewards=True"
        check_finite({"advantages": found.advantages, "returns": found.returns}, most=MAX_RETURN, fix=fix)
        return found, scaling

    def _update(self, found: Collected, learned: TokenBatch, watch: Stopwatch) -> dict[str, float]:
        """Train the policy on a rollout; the step is done then, and the critic's may still be on its way."""
        step, before, scored = self.state.step + 1, self.own.ppo_optimization_step, found.scored
        moments = statistics(scored, learned, self.config, kl_coefficient=self.kl.coefficient)
        metrics = learning_metrics("train_rollouts", found, moments, self.kl.coefficient)
        with watch("train_time"):
            updated, state = self.updates.update(learned, self.state, step=step, done=before)
        consumed, done = state.consumed_samples + scored.num_rows, before + self.updates.per_rollout
        self.kl = self.kl.update(metrics["train_rollouts/answer_kl"], scored.num_rows)
        self.state = replace(state, step=step, consumed_samples=consumed)
        kl, scaling = self.kl.state_dict(), self.scaling.state_dict()
        batches = step + self.own.further_rounds + found.rounds - 1
        self.own = replace(
            self.own, kl=kl, reward_scaling=scaling, ppo_optimization_step=done, further_rounds=batches - step
        )
        return {
            **metrics,
            **updated,
            "train_rollouts/consumed_samples": consumed,
            "train_rollouts/epoch": 1 + (batches - 1) // self.plan.steps_per_epoch,
            "train_optim/optim_step": done,
        }

    def _report(
        self, found: Collected, metrics: dict[str, float], watch: Stopwatch, bar: ProgressBar
    ) -> None:
        step, seconds = self.state.step, watch.elapsed
        timers = {**watch.seconds, "step_time": seconds}
        timers["samples_per_gpu_per_s"] = found.scored.num_rows / seconds / world.world_size()
        metrics |= {f"timers/{name}": value for name, value in timers.items()}
        self.lifecycle.limit.note("step", seconds)
        self.run.log(metrics, step=step)
        rows = table_rows(
            found.scored, found.scores.rewards, self.rollouts.decode, most=self.config.table_rows
        )
        self.run.log_rows("train_rollouts", rows, step=step)
        bar.show(step, summary(metrics))

    def _begin(self) -> None:
        """Do what comes before the next step: the critic's warm-up, or what the last step was saved without."""
        if self.state.step == 0:
            if self.config.val_before_train and self.validation:
                self._validate()
            for round_ in range(self.config.critic_warmup_steps):
                self._warm_up(round_)
        elif self.critic is not None and self._needs_replay:
            # The last step was saved without the critic: it is saved now, and a validation that was due is done.
            step = self.state.step
            if self.own.lacks_critic_loss:
                self.run.log(self.critic.last_loss(), step=step)
                self.own = replace(self.own, lacks_critic_loss=False)
            self.critic.save_critic()
            if self.plan.validates_after(step) and self.own.validated_step != step:
                self._validate()

    def _warm_up(self, round_: int) -> None:
        """A rollout that only the critic learns from."""
        assert self.critic is not None, "settings without a critic have no warm-up"
        # Draws of steps that the run does not have.
        watch, draw = Stopwatch(), self.plan.max_steps + round_
        scored = self.collector.collect_once(self.train, round_, draw, watch=watch).scored
        learned, self.scaling = self._credit(scored)
        pending = self.critic.train(value_batch(scored, learned), step=0)
        loss, rounds = self.critic.loss(pending), self.config.critic_warmup_steps
        if world.is_logging_rank():
            logger.info("critic warm-up %d/%d: loss %.4f", round_ + 1, rounds, loss)
        (number,) = collectives.all_reduce_max([self._request.number])
        if number:
            raise StoppedEarly(
                f"stopped in round {round_ + 1} of {rounds} of the critic's warm-up; the same command begins anew",
                reason=signal.Signals(int(number)).name,
                exit_code=128 + int(number),
            )

    def _validate(self) -> None:
        """Responses to prompts that nothing is learned from."""
        assert self.validation is not None
        watch, step = Stopwatch(), self.state.step
        with world.phase(f"validation after step {step}"), watch("validation_time"):
            sampled = self.collector.sampler.sample(
                self.validation, 0, VALIDATION_DRAW, watch=watch, validates=True
            )
            scores = self.collector.scorer.score_validation(sampled, watch)
        data = self.validation.fingerprint
        self.own = self.own.validated(step, scores.rewards, data)
        metrics = rollout_metrics(
            "val_rollouts", sampled.rollout, scores, initial=self.own.initial_rewards(data)
        )
        seconds = watch.seconds["validation_time"]
        self.run.log(metrics | {"timers/validation_time": seconds}, step=step)
        rows = table_rows(sampled.rollout, scores.rewards, self.rollouts.decode, most=self.config.table_rows)
        self.run.log_rows("val_rollouts", rows, step=step)
        self.lifecycle.limit.note("validation", seconds)
        self.state = replace(self.state, metrics={monitor_name(name): x for name, x in metrics.items()})
        if world.is_logging_rank():
            logger.info("validation: reward %.4f", metrics["val_rollouts/rewards"])

    def _save(self, checkpoints: TrainingCheckpoints) -> None:
        if self.critic is not None:
            self.critic.save(checkpoints, self.state, self.own)
        else:
            state = replace(self.state, algorithm=asdict(self.own))
            checkpoints.save(state, steps_per_epoch=self.plan.steps_per_epoch)

    def _save_alone(self) -> None:
        """Save the run as it was at its last step, after a server is lost or a rollout is not finite."""
        checkpoints = self.lifecycle.checkpoints
        if checkpoints is None or self.state.step == 0:
            return
        checkpoints.discard(lambda _: False)
        if checkpoints.holds(self.state.step):
            return
        if self.critic is not None:
            self.critic.save_alone(checkpoints, self.state, self.own)
        else:
            self._save(checkpoints)
        checkpoints.finish()
