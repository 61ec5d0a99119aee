# SPDX-License-Identifier: Apache-2.0
"""Conversations of the policy with people's environments, each episode in a process of its own.

An environment is a class. ``reset(row, seed)`` begins an episode; ``row`` is the prompt's JSON object, and the seed is
the same for all responses to it. ``step(turn) -> (reply, reward)`` takes the text of a turn of the policy. The reply is
a user's text, a list of messages, or None where the episode is over. A response's reward is the sum of its turns'.
"""

import time
import zlib
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch

from nemo_aligner.algorithms.rewards import CalledReward, Found, NamedRewards, gather_rewards, warn_of_lost
from nemo_aligner.algorithms.rollout import text_of_turn
from nemo_aligner.algorithms.turns import tokens_of_reply
from nemo_aligner.data.row import Row
from nemo_aligner.data.tokenizer import Tokenizer
from nemo_aligner.environments.workers import Reply, WorkerPool
from nemo_aligner.errors import UserError
from nemo_aligner.rollout_batch import Prompt, Rollout

_WAIT_SECONDS = 0.5  # for replies, while nothing is generated; with async_turns the first ones
_SLICE = 0.02  # of it, of each of several environments


@dataclass(frozen=True, kw_only=True)
class Environments:
    """The environments of a run, and how the policy speaks with them."""

    called: Mapping[str, CalledReward]  # by name in the settings
    tokenizer: Tokenizer
    end_ids: Sequence[int]  # tokens that end a turn
    end_strings: Sequence[str]  # texts that do
    places: int | None  # positions of a response with its prompt, at most
    seed: int
    # go on with a response as soon as its reply is there; False: once all whose turns have been taken have theirs, so
    # that what is computed together, and with it the last digit, does not depend on the time that replies take
    async_turns: bool = False
    block: str = "trainer.ppo.rewards."  # what stands before a name in messages

    def of(self, row: Row) -> str | None:
        """The name of the one that a row's responses speak with; None: they are of one turn.

        Raises:
            UserError: there are several.
        """
        names = [name for name, one in self.called.items() if one.config.applies_to(row.extras)]
        if len(names) > 1:
            raise UserError(
                f"{self.block}{names[0]} and {self.block}{names[1]} are both environments of the row "
                f"{dict(row.extras)}",
                fix="set the rows of each, so that a row has one",
            )
        return names[0] if names else None


@dataclass
class _Episode:
    """An episode as far as it has come."""

    environment: str
    row: Mapping[str, object]
    reward: float = 0.0
    turns: int = 0
    turn: Sequence[int] = ()  # the tokens of the last one
    lost: str = ""  # why its process was killed, or how it ended


class Episodes:
    """The other side of a rollout's conversations; see ``alignable_interface.Turns``.

    An error ends all conversations; :meth:`rewards` raises it on every rank.

    Args:
        environments: of the run.
        prompts: by number, those of this data parallel rank at least.
        draw: the rollout's, with which seeds change.
    """

    def __init__(self, environments: Environments, prompts: Mapping[int, Row], draw: int) -> None:
        self._environments, self._prompts, self._draw = environments, prompts, draw
        self._episodes: dict[tuple[int, int], _Episode] = {}
        self._written: set[tuple[int, int]] = set()  # the responses of this data parallel rank
        self._asked: set[tuple[int, int]] = set()  # those whose reply is to come
        self._over: list[tuple[int, int]] = []  # those that nobody replies to
        self._come: dict[tuple[int, int], Sequence[int] | None] = {}
        self._error: UserError | None = None
        self._names: dict[int, str | None] = {}
        try:
            self._names = {number: environments.of(row) for number, row in prompts.items()}
        except UserError as error:
            self._error = error

    @property
    def places(self) -> int | None:
        """See Turns."""
        return self._environments.places

    def ended(self, prompt: Prompt, turn: Sequence[int]) -> None:
        """See Turns."""
        key = prompt.number, prompt.sample
        self._written.add(key)
        name = self._names.get(prompt.number)
        if name is None or self._error is not None:
            self._over.append(key)
            return
        own = self._environments
        called, row = own.called[name], self._prompts[prompt.number].extras
        episode = self._episodes.setdefault(key, _Episode(name, row))
        call: dict[str, object] = {
            "turn": text_of_turn(turn, own.end_ids, own.end_strings, decode=own.tokenizer.decode)
        }
        if not episode.turns:
            seed = zlib.crc32(repr((own.seed, self._draw, prompt.number)).encode())
            call["begin"] = {"arguments": called.config.arguments, "row": dict(row), "seed": seed}
        episode.turns, episode.turn = episode.turns + 1, turn
        assert called.pool is not None, "turns are known where environments are called"
        self._asked.add(key)
        try:
            called.pool.send(key, call)
        except UserError as error:
            self._end_all(error)

    def cut(self, prompt: Prompt) -> None:
        """See Turns."""
        key = prompt.number, prompt.sample
        self._written.add(key)
        if key in self._episodes:
            self._release(key)

    def replies(self, *, wait: bool) -> Mapping[tuple[int, int], Sequence[int] | None]:
        """See Turns."""
        pools = [called.pool for called in self._environments.called.values() if called.pool is not None]
        until = time.monotonic() + (_WAIT_SECONDS if wait else 0.0)
        try:
            self._hear(pools, until)
            # Those that wait for a process get theirs when others have gone on to their end.
            while time.monotonic() < until and self._waits(pools):
                self._hear(pools, until)
        except UserError as error:
            self._end_all(error)
        come, self._over = dict.fromkeys(self._over), []
        if self._environments.async_turns or (wait and not self._waits(pools)):
            come, self._come = come | self._come, {}
        return dict(sorted(come.items()))

    def _waits(self, pools: Sequence[WorkerPool]) -> bool:
        """True while replies must come before a response goes on."""
        if self._environments.async_turns and (self._come or self._over):
            return False
        return any(pool.is_busy for pool in pools)

    def _hear(self, pools: Sequence[WorkerPool], until: float) -> None:
        for pool in pools:
            seconds = min(max(0.0, until - time.monotonic()), _WAIT_SECONDS if len(pools) == 1 else _SLICE)
            for key, reply in pool.heard(seconds=seconds).items():
                if key in self._asked:
                    self._take(key, reply)

    def _take(self, key: tuple[int, int], reply: Reply) -> None:
        self._asked.remove(key)
        self._come[key] = found = self._read(self._episodes[key], reply)
        if found is None:
            self._release(key)

    def _end_all(self, error: UserError) -> None:
        """End what waits for a reply, as there is none to come."""
        self._error = self._error or error
        self._come |= dict.fromkeys(self._asked)
        self._asked.clear()

    def _release(self, key: tuple[int, int]) -> None:
        pool = self._environments.called[self._episodes[key].environment].pool
        if pool is not None:
            pool.release(key)

    def _read(self, episode: _Episode, reply: Reply) -> Sequence[int] | None:
        """The tokens of a reply; None where the episode is over."""
        if reply.lost or self._error is not None:
            episode.lost = reply.lost
            return None
        own = self._environments
        fix = "correct the environment: step(turn) returns (reply, reward)"
        try:
            if reply.error:
                raise UserError(reply.error, fix=fix)
            said, reward = reply.value
            episode.reward += reward
            most = own.called[episode.environment].config.max_turns
            if said is None or episode.turns == most:
                return None
            return tokens_of_reply(own.tokenizer, said, turn=episode.turn)
        except UserError as error:
            where = f"{own.block}{episode.environment}: {error.problem}; the row: {dict(episode.row)}"
            self._error = UserError(where, fix=error.fix)
            return None

    def rewards(self, rollout: Rollout) -> NamedRewards:
        """Return the rewards of the whole rollout's rows, on every rank. Called by all ranks.

        Raises:
            NotFinite: an environment failed, or its reward is no finite number.
        """
        called = self._environments.called
        found = gather_rewards(self._error or self._found(rollout), called, num_rows=rollout.num_rows)
        own = rollout.loss_mask.float()
        begins = own.diff(dim=1, prepend=own.new_zeros(rollout.num_rows, 1)) > 0
        turns = {
            f"{name}_turns": torch.where(reward.isnan(), torch.nan, begins.sum(1))
            for name, reward in found.rewards.items()
        }
        return replace(found, reported={**found.reported, **turns})

    def _found(self, rollout: Rollout) -> Found:
        found: Found = {name: {} for name in self._environments.called}
        lost: dict[str, list[tuple[str, Mapping[str, object]]]] = {name: [] for name in found}
        samples = Counter[int]()
        for row, number in enumerate(map(int, rollout.group)):
            key = number, samples[number]
            samples[number] += 1
            if (name := self._names.get(number)) is None or key not in self._written:
                continue
            episode = self._episodes.get(key, _Episode(name, {}))
            found[name][row] = None if episode.lost else episode.reward
            if episode.lost:
                lost[name].append((episode.lost, episode.row))
        for name, several in lost.items():
            config = self._environments.called[name].config
            warn_of_lost(f"{self._environments.block}{name}", config, several, of=len(found[name]))
        return found
