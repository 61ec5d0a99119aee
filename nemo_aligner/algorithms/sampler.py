# SPDX-License-Identifier: Apache-2.0
"""From prompts to responses: a rollout of the policy as it is now."""

from collections.abc import Mapping
from dataclasses import dataclass, field

from nemo_aligner.algorithms.episodes import Environments, Episodes
from nemo_aligner.algorithms.rewards import NamedRewards
from nemo_aligner.algorithms.rollout import PromptSource, RolloutSettings, gather_rollouts
from nemo_aligner.data.row import Row
from nemo_aligner.models.alignable_interface import AlignableGenerativeInterface
from nemo_aligner.parallel import world
from nemo_aligner.rollout_batch import Prompt, Rollout
from nemo_aligner.run.stopwatch import Stopwatch


@dataclass(frozen=True, kw_only=True)
class Sampled:
    """Responses, and what was said of them meanwhile."""

    rollout: Rollout  # the whole one
    prompts: Mapping[int, Row]  # of this data parallel rank, by number
    episodes: NamedRewards = field(default_factory=NamedRewards)  # the rewards of environments


@dataclass(frozen=True, kw_only=True)
class Sampler:
    """Draws responses to prompts from ``policy``."""

    policy: AlignableGenerativeInterface
    rollouts: RolloutSettings
    seq_length: int | None  # the least that rollouts are padded to; None: their longest
    environments: Environments | None = None  # what replies to the policy; None: a response is one turn

    def sample(
        self,
        source: PromptSource,
        index: int,
        draw: int,
        *,
        watch: Stopwatch,
        validates: bool = False,
        round_: int = 0,
    ) -> Sampled:
        """Responses to batch ``index`` of the prompts, on every rank.

        Args:
            draw: with it the responses' random numbers change.
            validates: whether it is one response to each prompt, and nothing is learned of it.
            round_: of the step; prompts are numbered on from round to round.

        Raises:
            NotFinite: a log-prob is infinite or NaN, or an environment failed.
        """
        config = self.rollouts.config
        responses, slots = config.num_responses_per_prompt, config.rollout_micro_batch_size
        if validates:
            responses, slots = 1, config.val_rollout_micro_batch_size or slots
        with watch("batch_iterator_init"):
            texts = [text for texts in source.batch(index) for text in texts]
        each = -(-source.rows_per_batch // world.dp_size())
        first = round_ * source.rows_per_batch + world.dp_rank() * each
        prompts = [
            Prompt(tokens=text.tokens, number=first + i, sample=sample)
            for i, text in enumerate(texts)
            for sample in range(responses)
        ]
        with watch("prepare_for_inference"):
            if config.offload_adam_states:
                self.policy.offload_optimizer()
        rows = {first + i: text for i, text in enumerate(texts)}
        episodes = Episodes(self.environments, rows, draw) if self.environments else None
        with watch("generate"):
            rollout = gather_rollouts(
                self.policy,
                prompts,
                self.rollouts.sampling,
                draw=draw,
                slots=slots,
                seq_length=self.seq_length,
                turns=episodes,
            )
            rewards = episodes.rewards(rollout) if episodes else NamedRewards()
        self.rollouts.warn_of_cut(rollout)
        return Sampled(rollout=rollout, prompts=rows, episodes=rewards)
