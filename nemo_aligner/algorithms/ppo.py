# SPDX-License-Identifier: Apache-2.0
"""Proximal Policy Optimization: generate, score, credit, update. Sees the model through its interface only."""

import logging
import signal
import time
from collections.abc import Iterator
from dataclasses import fields, replace
from typing import Any

import numpy as np

from nemo_aligner.algorithms.milestones import Milestones
from nemo_aligner.algorithms.ppo_config import PPOConfig
from nemo_aligner.algorithms.rollout import Prompts, Rollouts, collect, cut, deal, lengths_of
from nemo_aligner.algorithms.rollout_metrics import learning_metrics, rollout_metrics, summary
from nemo_aligner.algorithms.scoring import Scorer
from nemo_aligner.algorithms.skips import NotFinite, check_finite, counted, refuse_to_end
from nemo_aligner.batch import Experience, Prompt, Rollout, Scored
from nemo_aligner.checkpoint.trainer_state import Checkpoint, TrainerState, read_extra
from nemo_aligner.checkpoint.training import TrainingCheckpoints, monitor_name
from nemo_aligner.models.alignable_interface import AlignableGenerativeInterface
from nemo_aligner.objectives.adaptive import RewardScaling
from nemo_aligner.objectives.credit import credit, kl_controller, observe, statistics, value_batch
from nemo_aligner.objectives.protocol import Objective
from nemo_aligner.objectives.value import MAX_RETURN
from nemo_aligner.parallel import collectives, world
from nemo_aligner.run.experiment import Experiment
from nemo_aligner.run.progress import ProgressBar
from nemo_aligner.run.schedule import make_plan
from nemo_aligner.run.stop import StoppedEarly, StopRequest
from nemo_aligner.run.stopwatch import Stopwatch
from nemo_aligner.serving.shared import CriticLost, Pending, SharedCritic, WaitEnded

__all__ = ["PPOTrainer"]

logger = logging.getLogger(__name__)

VALIDATION_DRAW = 1 << 30  # the same each time, and that of no step
SIGNAL_SECONDS = 15.0  # that a critic has to save after a signal
TABLE_ROWS = 4  # answers of each rollout that are written down


class PPOTrainer:
    """Trains ``policy`` on its own answers, which ``critic`` judges.

    Args:
        objective: of the policy.
        prompts: of training, and of validation; None: there is none.
        checkpoints: where to save; None: nowhere.
    """

    def __init__(
        self,
        config: PPOConfig,
        rollouts: Rollouts,
        policy: AlignableGenerativeInterface,
        objective: Objective,
        prompts: tuple[Prompts, Prompts | None],
        run: Experiment,
        checkpoints: TrainingCheckpoints | None,
    ) -> None:
        self.config, self.rollouts, self.policy = config, rollouts, policy
        self.objective, self.run = objective, run
        self.train, self.validation = prompts
        self.plan = make_plan(
            config,
            batches_per_epoch=self.train.batches_per_epoch,
            val_batches=1 if self.validation else 0,
        )
        self.milestones = Milestones(self.plan, run, checkpoints, block=config.block, save=self._save)
        self.kl, self.scaling = kl_controller(config), RewardScaling()
        self._critic_lacks_lessons = False
        self.state = TrainerState(
            data=self.train.fingerprint | {"steps_per_epoch": self.plan.steps_per_epoch},
            algorithm={"ppo_optimization_step": 0},
        )

    @property
    def updates_per_step(self) -> int:
        """Optimizer steps on one rollout."""
        size = self.rollouts.config.num_rollout_samples
        return self.config.num_ppo_epochs * size // self.rollouts.global_batch_size

    def resume(self, start: Checkpoint) -> None:
        """Go on from ``start``, whose weights the policy has.

        Raises:
            UserError: ``start`` is at the end of the plan, or its run had other prompts.
        """
        self.state = self.milestones.restore(start, self.state.data)
        self.kl = self.kl.restored(start.stored("kl"))
        self.scaling = self.scaling.restored(start.stored("reward_scaling"))
        self._critic_lacks_lessons = read_extra(start) is not None

    def fit(self, critic: SharedCritic) -> None:
        """Train to the end of the plan.

        Raises:
            StoppedEarly: a signal or the time limit ended the run; what there was after the first step is saved.
            UserError: the critic is lost, or numbers of a rollout are not finite, and the run is saved as it was at the
                last step; or losses or gradients are no longer finite.
        """
        self.critic = critic
        self.scorer = Scorer(self.policy, critic, self.rollouts, give_up=lambda: self._request.number != 0)
        self.milestones.check_room()
        self.run.begin(self.state.step, max_steps=self.plan.max_steps)
        bar = ProgressBar(
            total=self.plan.max_steps, start=self.state.step, enabled=world.is_logging_rank(), name="ppo"
        )
        try:
            with StopRequest(interrupts=True, tells=world.is_logging_rank()) as self._request:
                try:
                    self._loop(bar)
                except (CriticLost, NotFinite, WaitEnded) as error:
                    self._save_alone()
                    if not isinstance(error, WaitEnded):
                        raise error.error from error
                    # Only rank 0 has seen the signal for sure.
                    raise self.milestones.stopped(self.state.step, self._request.number or 15) from error
        finally:
            bar.close()

    def _loop(self, bar: ProgressBar) -> None:
        if self.state.step == 0:
            for round_ in range(self.config.critic_warmup_steps):
                self._warm_up(round_)
        elif self._critic_lacks_lessons:
            self._catch_up()
        while self.state.step < self.plan.max_steps:
            with world.phase(f"step {self.state.step + 1}"):
                self._advance(bar)
            self.milestones.stop_if_diverged(self.state, limit=self.config.max_skipped_steps)
            if self.plan.validates_after(self.state.step):
                self._validate()
            self.milestones.after(self.state.step, self._request)
        if self.milestones.checkpoints is not None:
            self.milestones.checkpoints.finish()
        refuse_to_end(self.state)

    def _catch_up(self) -> None:
        """After a step that was saved without the critic: it is taught, and what else was due is done."""
        self._reply(self.critic.save())
        step = self.state.step
        if self.plan.validates_after(step) and self.state.algorithm.get("validated_step") != step:
            self._validate()

    def _warm_up(self, round_: int) -> None:
        """A rollout that only the critic learns from."""
        watch = Stopwatch()
        # Draws of steps that the run does not have.
        scored = self._scored(self._answers(self.train, round_, self.plan.max_steps + round_, watch), watch)
        pending = self._teach(scored, self._credit(scored), step=0)
        loss, rounds = self._reply(pending), self.config.critic_warmup_steps
        if world.is_logging_rank():
            logger.info("critic warm-up %d/%d: loss %.4f", round_ + 1, rounds, loss)
        (number,) = collectives.maxima([self._request.number])
        if number:
            raise StoppedEarly(
                f"stopped in round {round_ + 1} of {rounds} of the critic's warm-up; the same command begins anew",
                reason=signal.Signals(int(number)).name,
                exit_code=128 + int(number),
            )

    def _advance(self, bar: ProgressBar) -> None:
        """One step: answers, what they are worth, and an update."""
        watch, step, began = Stopwatch(), self.state.step + 1, time.perf_counter()
        with watch("rollout_time"):
            rollout = self._answers(self.train, self.state.step, self.state.step, watch)
            scored = self._scored(rollout, watch)
            experience = self._credit(scored)
        taught = self._teach(scored, experience, step=step)
        metrics = self._rollout_metrics(scored, experience)
        with watch("train_time"):
            metrics |= self._update(experience, step)
        self._note_step(step, scored, metrics)
        try:
            with watch("critic_train_wait"):
                metrics["train_critic/loss"] = self._reply(taught)
            watch.note("critic_train_time", taught.seconds)
            if self.milestones.checkpoints is None:
                # Nobody goes on from before this.
                self.critic.committed(self.critic.state_dict().get("critic_sequence", 0))
        finally:
            # The step is done where the critic is lost, too.
            watch.note("step_time", time.perf_counter() - began)
            self._tell(scored, metrics, watch, bar)

    def _tell(self, scored: Scored, metrics: dict[str, float], watch: Stopwatch, bar: ProgressBar) -> None:
        step, seconds = self.state.step, watch.seconds["step_time"]
        metrics |= {f"timers/{name}": value for name, value in watch.seconds.items()}
        metrics["timers/samples_per_gpu_per_s"] = scored.num_rows / seconds / world.world_size()
        self.milestones.limit.note("step", seconds)
        self.run.log(metrics, step=step)
        self._write_down("train_rollouts", scored, step)
        bar.show(step, summary(metrics))

    def _note_step(self, step: int, scored: Scored, metrics: dict[str, float]) -> None:
        """The policy has learned from a step's rollout; the critic is about to."""
        consumed = self.state.consumed_samples + scored.num_rows
        self.kl = self.kl.update(metrics["train_rollouts/answer_kl"], scored.num_rows)
        done = self.state.algorithm["ppo_optimization_step"] + self.updates_per_step
        self.state = replace(
            self.state,
            step=step,
            consumed_samples=consumed,
            algorithm=self.state.algorithm
            | {
                "ppo_optimization_step": done,
                "kl": self.kl.state_dict(),
                "reward_scaling": self.scaling.state_dict(),
            },
        )
        metrics |= {
            "train_rollouts/consumed_samples": consumed,
            "train_rollouts/epoch": 1 + (step - 1) // self.plan.steps_per_epoch,
            "train_optim/optim_step": done,
        }

    def _answers(self, source: Prompts, index: int, draw: int, watch: Stopwatch) -> Rollout:
        config, ranks = self.rollouts.config, world.dp_size()
        with watch("batch_iterator_init"):
            texts = [text for texts in source.batch(index) for text in texts]
        first = world.dp_rank() * -(-source.rows_per_batch // ranks)
        prompts = [Prompt(tokens=text.tokens, number=first + i) for i, text in enumerate(texts)]
        slots = config.rollout_micro_batch_size
        if source is not self.train:
            slots = config.val_rollout_micro_batch_size or slots
        with watch("prepare_for_inference"):
            if config.offload_adam_states:
                self.policy.offload_optimizer()
        with watch("generate"):
            rollout = collect(
                self.policy,
                prompts,
                self.rollouts.sampling,
                draw=draw,
                slots=slots,
                seq_length=self.config.rollout_batch_seq_length,
            )
        self.rollouts.warn_of_cut(rollout)
        return rollout

    def _scored(self, rollout: Rollout, watch: Stopwatch) -> Scored:
        return self.scorer.score(rollout, watch, with_reference=bool(self.kl.coefficient))

    def _credit(self, scored: Scored) -> Experience:
        coefficient = self.kl.coefficient
        scaling = observe(self.scaling, scored, self.config, kl_coefficient=coefficient)
        found = credit(scored, self.config, kl_coefficient=coefficient, scaling=scaling)
        cure = "look at the reward model; set trainer.ppo.reward_clip, or trainer.ppo.scale_rewards=True"
        check_finite({"advantages": found.advantages, "returns": found.returns}, most=MAX_RETURN, cure=cure)
        self.scaling = scaling
        return found

    def _teach(self, scored: Scored, experience: Experience, *, step: int) -> Pending[float]:
        return self.critic.train(value_batch(scored, experience), step=step)

    def _reply(self, pending: Pending[Any]) -> Any:  # noqa: ANN401 - what is waited for
        return pending.result(give_up=lambda: self._request.number != 0)

    def _update(self, experience: Experience, step: int) -> dict[str, float]:
        """Optimizer steps on a rollout; means over those that were not skipped, and the number of those that were."""
        found: list[dict[str, float]] = []
        empty: list[dict[str, float]] = []  # steps on nothing but answers that are left out
        skipped: list[dict[str, float]] = []
        for rows in self._global_batches(experience.num_rows, step):
            part = experience.take(rows)
            batches = self._micro_batches(part)
            metrics = self.policy.get_loss_and_metrics(
                batches, self.objective, forward_only=False, sampling=self.rollouts.sampling
            )
            metrics |= self.policy.optimizer_step()
            number = (
                self.state.algorithm["ppo_optimization_step"] + len(found) + len(empty) + len(skipped) + 1
            )
            self.state = counted(self.state, metrics, step=number)
            kept = skipped if metrics["skipped_steps"] else found if part.learned().any() else empty
            kept.append(metrics)
        world.synchronize()
        if empty and world.is_logging_rank():
            logger.warning(
                "nothing was learned in %d of %d updates: none of their answers ended within "
                "model.ppo.length_params.max_length=%d tokens, and trainer.ppo.mask_unfinished=True",
                *(len(empty), self.updates_per_step, self.rollouts.sampling.max_length),
            )
        of = found or empty or skipped
        means = {f"train_optim/{name}": sum(m[name] for m in of) / len(of) for name in of[0]}
        return means | {"train_optim/skipped_steps": float(len(skipped))}

    def _global_batches(self, num_rows: int, step: int) -> Iterator[list[int]]:
        size = self.rollouts.global_batch_size
        for epoch in range(self.config.num_ppo_epochs):
            draw = np.random.default_rng([self.rollouts.seed, step, epoch])
            order = [int(row) for row in draw.permutation(num_rows)]
            yield from (order[i : i + size] for i in range(0, num_rows, size))

    def _micro_batches(self, batch: Experience) -> list[Experience]:
        """This rank's micro-batches of a global batch that every rank has."""
        rollouts, multiple = self.rollouts, self.rollouts.length_multiple
        lengths = lengths_of(batch)
        shares = deal(lengths, rows=rollouts.micro_batch_size, ranks=world.dp_size())
        # Pipeline stages exchange one shape.
        longest = max(lengths) if world.pp_size() > 1 else None
        return [cut(batch.take(rows), multiple=multiple, longest=longest) for rows in shares[world.dp_rank()]]

    def _rollout_metrics(self, scored: Scored, experience: Experience) -> dict[str, float]:
        return rollout_metrics("train_rollouts", scored) | {
            f"train_rollouts/{name}": value
            for name, value in learning_metrics(
                statistics(scored, experience, self.config, kl_coefficient=self.kl.coefficient),
                self.kl.coefficient,
            ).items()
        }

    def _validate(self) -> None:
        """Answers to prompts that nothing is learned from."""
        assert self.validation is not None
        watch, step = Stopwatch(), self.state.step
        with world.phase(f"validation after step {step}"), watch("validation_time"):
            rollout = self._answers(self.validation, 0, VALIDATION_DRAW, watch)
            rewards, values = self.scorer.judgement(self.scorer.ask(rollout), rollout)
        scored = Scored(
            **{field.name: getattr(rollout, field.name) for field in fields(rollout)},
            logprobs=rollout.sampler_logprobs,
            reference_logprobs=rollout.sampler_logprobs,
            rewards=rewards,
            values=values,
        )
        metrics = rollout_metrics("val_rollouts", scored, trained=False)
        self.run.log(metrics | {"timers/validation_time": watch.seconds["validation_time"]}, step=step)
        self._write_down("val_rollouts", scored, step)
        self.milestones.limit.note("validation", watch.seconds["validation_time"])
        self.state = replace(
            self.state,
            metrics={monitor_name(name): value for name, value in metrics.items()},
            algorithm=self.state.algorithm | {"validated_step": step},
        )
        if world.is_logging_rank():
            logger.info("validation: reward %.4f", metrics["val_rollouts/rewards"])

    def _write_down(self, table: str, scored: Scored, step: int) -> None:
        if not world.is_logging_rank():
            return
        rows = [
            {
                "prompt": self.rollouts.decode(scored.prompt(i)),
                "response": self.rollouts.decode(scored.answer(i)),
                "reward": float(scored.rewards[i]),
            }
            for i in range(min(TABLE_ROWS, scored.num_rows))
        ]
        self.run.log_rows(table, rows, step=step)

    def _save(self, checkpoints: TrainingCheckpoints) -> None:
        """The actor's half of a pair becomes a checkpoint when the critic's is one."""
        pending, began = self.critic.save(), time.monotonic()
        self._remember_critic()
        # Of this moment: with async_save the pair may be complete some steps later.
        sequence = self.state.algorithm.get("critic_sequence", 0)

        def both_saved() -> None:
            # A signal leaves it some time; then this half is saved with what the critic lacks.
            pending.result(
                give_up=lambda: self._request.number != 0 and time.monotonic() - began > SIGNAL_SECONDS
            )
            self.critic.committed(sequence)

        checkpoints.save(self.state, steps_per_epoch=self.plan.steps_per_epoch, also=both_saved)

    def _save_alone(self) -> None:
        """Without the critic: with what it is to be taught when it comes back."""
        checkpoints = self.milestones.checkpoints
        if checkpoints is None or self.state.step == 0:
            return
        checkpoints.discard(lambda _: False)
        if checkpoints.holds(self.state.step):
            return
        self._remember_critic()
        checkpoints.save(
            self.state, steps_per_epoch=self.plan.steps_per_epoch, extra=self.critic.unsaved_lessons()
        )
        checkpoints.finish()

    def _remember_critic(self) -> None:
        self.state = replace(self.state, algorithm=self.state.algorithm | self.critic.state_dict())
