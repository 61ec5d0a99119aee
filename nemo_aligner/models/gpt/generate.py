# SPDX-License-Identifier: Apache-2.0
"""Generation: a few slots, each of which takes the next prompt when its response has ended.

Every rank of a model's copy goes through the same steps: the last pipeline stage samples the tokens and says
which responses have ended, and all else follows from that. Data parallel ranks know nothing of each other.

Shapes: n slots, H hidden size, B responses, S tokens of the longest prompt and response.
"""

from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from nemo_aligner.errors import UserError
from nemo_aligner.models.alignable_interface import Turns
from nemo_aligner.models.gpt.decoder import Decoder
from nemo_aligner.models.gpt.model import GPT, InterleavedGPT
from nemo_aligner.models.gpt.sampling import History, choose, random_uniforms, transform
from nemo_aligner.models.gpt.stops import Stops
from nemo_aligner.models.sampling_config import SamplingConfig
from nemo_aligner.parallel import collectives, world
from nemo_aligner.rollout_batch import Prompt, Rollout

Watch = Callable[[int, Sequence[int]], None]  # after each step: the responses that have ended, and its tokens

WORTH_PACKING = 32  # steps; a decoder's copy of the weights costs the time that some twenty of them save


@dataclass(frozen=True, kw_only=True)
class Draws:
    """How tokens are drawn, and where responses and their turns end."""

    config: SamplingConfig
    stops: Stops
    step: int = 0  # of training


@dataclass
class _Response:
    """A response while it is generated."""

    prompt: Prompt
    limit: int  # tokens of the model's own
    places: int  # of prompt and response
    tokens: list[int] = field(default_factory=list)
    own: list[int] = field(default_factory=list)  # places of the model's own among them
    logprobs: list[float] = field(default_factory=list)  # of its own, on the last pipeline stage
    turn: int = 0  # the place where the present turn begins
    paused: bool = False  # waits for a reply
    finished: bool = False  # by an end, not by the limit

    @property
    def has_room(self) -> bool:
        return len(self.own) < self.limit and len(self.prompt.tokens) + len(self.tokens) < self.places

    @property
    def alive(self) -> bool:
        return not self.finished and not self.paused and self.has_room

    def write(self, token: int) -> None:
        self.own.append(len(self.tokens))
        self.tokens.append(token)

    def takes(self, reply: Sequence[int]) -> bool:
        """True if the reply leaves room for a token of the model's own."""
        room = self.places - len(self.prompt.tokens) - len(self.tokens)
        return len(reply) < room and len(self.own) < self.limit

    def read(self, reply: Sequence[int]) -> None:
        self.tokens += reply
        self.turn, self.paused = len(self.tokens), False


@torch.no_grad()
@world.phase("generating responses")
def generate(
    model: GPT | InterleavedGPT,
    prompts: Sequence[Prompt],
    draws: Draws,
    *,
    slots: int,
    watch: Watch | None = None,
    turns: Turns | None = None,
) -> Rollout:
    """One response to each of this data parallel rank's prompts, on the CPU, the same on every rank of its model.

    The draws are a function of (the seed, the step, the prompt's number, its sample, the token's place in the
    response), so which prompts share a rank or a batch changes no response but by the rounding of products.

    Args:
        draws: of this call.
        slots: responses that are generated at once, at most.
        watch: see AlignableGenerativeInterface.
        turns: see AlignableGenerativeInterface.

    Raises:
        UserError: a prompt is empty, or leaves no room for a token.
    """
    places = model.gpt_config.max_position_embeddings
    if turns is not None and turns.places is not None:
        places = min(places, turns.places)
    responses = [_Response(p, _limit(p, draws.config, places), places) for p in prompts]
    waiting = deque(responses)
    if responses:
        slots = min(slots, len(responses))
        steps = draws.config.max_length * len(responses) // slots
        decoder = Decoder(model, slots=slots, packs=steps >= WORTH_PACKING)
        batch = _GenerationBatch(decoder, draws, turns)
        while waiting or any(batch.busy):
            hidden = batch.hear(batch.refill(waiting, batch.advance()))
            tokens = batch.draw(hidden)
            if watch is not None:
                watch(len(responses) - len(waiting) - sum(batch.busy), tokens)
            if not waiting:
                batch.shrink()
    return _rollout(responses)


def _limit(prompt: Prompt, config: SamplingConfig, places: int) -> int:
    """The most tokens that the response to ``prompt`` may have."""
    if not prompt.tokens:
        raise UserError(f"prompt {prompt.number} has no tokens", fix="give it a text, or BOS")
    if len(prompt.tokens) >= places:
        raise UserError(
            f"prompt {prompt.number} has {len(prompt.tokens)} tokens, and the model has {places} positions for it and "
            "its response",
            fix=f"shorten it to {places - 1} tokens or fewer",
        )
    wanted = config.max_length if prompt.max_length is None else min(prompt.max_length, config.max_length)
    return min(wanted, places - len(prompt.tokens))


class _GenerationBatch:
    """The slots, the responses in them, and the state that their next draw depends on."""

    def __init__(self, decoder: Decoder, draws: Draws, turns: Turns | None) -> None:
        self.decoder, self.turns = decoder, turns
        self.config, self.stops, self.step = draws.config, draws.stops, draws.step
        config = draws.config
        n, device = len(decoder.cache.lengths), world.device()
        self.responses: list[_Response | None] = [None] * n
        self.alive = [False] * n
        self.held: list[Sequence[int]] = [()] * n  # the prompt of each slot, which stays in the cache
        # [n, H]: from which the first token of a response to it is predicted; on the last pipeline stage
        self.prompt_ends = torch.zeros(
            n, decoder.config.hidden_size, dtype=decoder.config.params_dtype, device=device
        )
        self.tokens = torch.zeros(n, dtype=torch.int64, device=device)  # the last of each slot
        random = decoder.writes and not config.use_greedy
        self.uniform = torch.zeros(n, config.max_length if random else 0, dtype=torch.float64, device=device)
        # One column more, for tokens that are other ranks'.
        width = decoder.vocab_width + 1 if decoder.writes and config.repetition_penalty != 1 else 0
        self.seen = torch.zeros(n, width, dtype=torch.bool, device=device)

    @property
    def busy(self) -> list[bool]:
        """Of each slot: whether its response goes on, now or after a reply."""
        if self.turns is None:
            return self.alive
        return [one is not None and (one.alive or one.paused) for one in self.responses]

    def advance(self) -> Tensor | None:
        """Put the last tokens through the model: [n, H] on the last stage; None where no response is begun."""
        return self.decoder.step(self.tokens, self.alive) if any(self.alive) else None

    def refill(self, waiting: deque[_Response], hidden: Tensor | None) -> Tensor | None:
        """Give free slots to responses that wait, and their prompts' [H] their places in ``hidden``."""
        if not waiting:
            return hidden
        free = [slot for slot, busy in enumerate(self.busy) if not busy]
        # A prompt alone takes nearly as long to read as several: a few slots wait for one another.
        if len(free) < min(len(waiting), max(1, len(self.alive) // 8)):
            return hidden
        placed = self._place(waiting, free)
        return self._put(hidden, placed, self.prompt_ends[placed] if self.decoder.writes else None)

    def _place(self, waiting: deque[_Response], free: list[int]) -> list[int]:
        """Put responses into free slots, which are returned; a prompt that a slot holds is copied, not read again."""
        placed: list[int] = []
        read: dict[int, Sequence[int]] = {}
        copies: dict[int, int] = {}  # to a slot, from another one, when prompts are read
        while free and waiting:
            response = waiting.popleft()
            text = response.prompt.tokens
            holders = [slot for slot, held in enumerate(self.held) if held == text]
            slot = next((slot for slot in holders if slot in free), free[0])
            if not holders:
                read[slot] = text
            elif slot not in holders:
                if holders[0] in read or holders[0] in copies:
                    copies[slot] = holders[0]
                else:
                    self._share(holders[0], slot)
            free.remove(slot)
            placed.append(slot)
            self._assign(slot, response)
        if read:
            for slot in read:
                self.decoder.cache.cut(slot, 0)
            hidden = self.decoder.append([*read], [*read.values()])
            if hidden is not None:
                self.prompt_ends[[*read]] = hidden
        for slot, source in copies.items():
            self._share(source, slot)
        return placed

    def _share(self, source: int, slot: int) -> None:
        """Give a slot the prompt that another one holds."""
        self.decoder.cache.copy(source, slot, len(self.held[source]))
        self.prompt_ends[slot] = self.prompt_ends[source]

    def _assign(self, slot: int, response: _Response) -> None:
        prompt = response.prompt
        self.responses[slot], self.alive[slot], self.held[slot] = response, True, prompt.tokens
        if self.uniform.shape[1]:
            self.uniform[slot, : response.limit] = random_uniforms(
                self.config.seed, self.step, number=prompt.number, sample=prompt.sample, count=response.limit
            )
        if self.seen.shape[1]:
            self.seen[slot] = False
        self._mark_seen(slot, prompt.tokens)

    def hear(self, hidden: Tensor | None) -> Tensor | None:
        """Put the replies that have come behind the turns that wait for them, and their [H] into ``hidden``."""
        turns = self.turns
        if turns is None:
            return hidden
        paused = {
            (one.prompt.number, one.prompt.sample): slot
            for slot, one in enumerate(self.responses)
            if one is not None and one.paused
        }
        if not paused:
            return hidden
        idle = not any(self.alive)
        replies = collectives.from_first_of_model(lambda: turns.replies(wait=idle))
        read: dict[int, list[int]] = {}
        for key, reply in replies.items():
            response = self.responses[slot := paused[key]]
            assert response is not None
            last, response.paused, response.finished = response.tokens[-1], False, reply is None
            if reply is not None and response.takes(reply):
                response.read(reply)
                read[slot] = [last, *reply]
            else:
                self._free(slot, response)
            self.alive[slot] = response.alive
        if not read:
            return hidden
        for slot, text in read.items():
            self._mark_seen(slot, text)
        return self._put(hidden, [*read], self.decoder.append([*read], [*read.values()]))

    def _mark_seen(self, slot: int, text: Sequence[int]) -> None:
        """Count tokens as written before, where a setting asks for it."""
        if self.seen.shape[1]:
            self.seen[slot, self.decoder.column(torch.tensor(text, device=self.seen.device))] = True

    def _put(self, hidden: Tensor | None, slots: Sequence[int], ends: Tensor | None) -> Tensor | None:
        """``hidden`` [n, H] with ``ends`` in the places of ``slots``; None before the last pipeline stage."""
        if ends is None:
            return None
        hidden = torch.zeros_like(self.prompt_ends) if hidden is None else hidden
        hidden[slots] = ends
        return hidden

    def draw(self, hidden: Tensor | None) -> list[int]:
        """The next token of every response, by the last stage; all stages learn it, and which responses have ended."""
        news, sampled, alive = None, [], list(self.alive)
        if not any(alive):
            return sampled
        if hidden is not None:
            ids, logprobs = self._sample(hidden)
            ended = self._ended(ids.tolist(), logprobs.tolist())
            news = torch.stack((ids, torch.tensor(ended, device=ids.device)))
        ids, ended = collectives.broadcast_from_last_stage(news, (2, len(self.alive)), dtype=torch.int64)
        self.tokens = ids
        for slot, (token, end) in enumerate(zip(ids.tolist(), ended.tolist(), strict=True)):
            response = self.responses[slot]
            if response is not None and self.alive[slot]:
                sampled.append(token)
                response.write(token)
                if end:
                    self._end_turn(response)
                self.alive[slot] = response.alive
                if not (response.alive or response.paused):
                    self._free(slot, response)
        if self.seen.shape[1]:
            drawn = torch.tensor(alive, device=ids.device)
            column = self.decoder.column(ids).where(drawn, self.seen.shape[1] - 1)
            self.seen.scatter_(1, column[:, None], True)
        return sampled

    def _free(self, slot: int, response: _Response) -> None:
        """Keep of a response that goes on no further the prompt, which others may share."""
        response.limit = len(response.own)
        self.decoder.cache.cut(slot, len(self.held[slot]))
        if self.turns is not None and not response.finished and world.is_first_of_model():
            self.turns.cut(response.prompt)

    def _end_turn(self, response: _Response) -> None:
        """The model has ended a turn: the other side has the next one, where there is one."""
        if self.turns is None:
            response.finished = True
            return
        response.paused = True
        if world.is_first_of_model():
            self.turns.ended(response.prompt, response.tokens[response.turn :])

    def _sample(self, hidden: Tensor) -> tuple[Tensor, Tensor]:
        counts = [0 if response is None else len(response.own) for response in self.responses]
        turns = [
            0 if response is None else len(response.tokens) - response.turn for response in self.responses
        ]
        below_min_length = [count < self.config.min_length for count in turns]
        history = History(
            seen=self.seen[:, :-1] if self.seen.shape[1] else None,
            below_min_length=torch.tensor(below_min_length, device=hidden.device)
            if any(below_min_length)
            else None,
            end_ids=self.stops.ids,
        )
        z = transform(self.decoder.logits(hidden), self.config, history, first=self.decoder.first_id)
        uniform = None
        if not self.config.use_greedy:
            at = torch.tensor(counts, device=hidden.device).clamp_(max=self.config.max_length - 1)
            uniform = self.uniform.gather(1, at[:, None])[:, 0]
        return choose(z, uniform, first=self.decoder.first_id)

    def _ended(self, ids: Sequence[int], logprobs: Sequence[float]) -> list[int]:
        """1 for each slot whose response ends with its token, else 0; the log-probs are kept too."""
        ended = [0] * len(ids)
        for slot, response in enumerate(self.responses):
            if response is not None and self.alive[slot]:
                response.logprobs.append(logprobs[slot])
                # A long response is not copied for each of its tokens.
                turn = response.tokens[response.turn :] if response.turn else response.tokens
                ended[slot] = int(len(turn) >= self.config.min_length and self.stops(turn, ids[slot]))
        return ended

    def shrink(self) -> None:
        """Where nothing waits and half of the slots are free, go on without these."""
        kept = [slot for slot, busy in enumerate(self.busy) if busy]
        if not 0 < len(kept) <= len(self.alive) // 2:
            return
        self.decoder.cache.keep(kept)
        self.responses = [self.responses[slot] for slot in kept]
        self.alive = [self.alive[slot] for slot in kept]
        self.held = [self.held[slot] for slot in kept]
        self.tokens, self.uniform, self.seen = (x[kept] for x in (self.tokens, self.uniform, self.seen))
        self.prompt_ends = self.prompt_ends[kept]


def _rollout(responses: Sequence[_Response]) -> Rollout:
    starts = [len(response.prompt.tokens) for response in responses]
    ends = [start + len(response.tokens) for start, response in zip(starts, responses, strict=True)]
    shape = (len(responses), max(ends, default=1))
    tokens = torch.zeros(shape, dtype=torch.int64)
    mask = torch.zeros(shape, dtype=torch.bool)
    logprobs = torch.zeros(shape)
    for row, (response, start, end) in enumerate(zip(responses, starts, ends, strict=True)):
        tokens[row, :end] = torch.tensor([*response.prompt.tokens, *response.tokens])
        own = start + torch.tensor(response.own, dtype=torch.int64)
        mask[row, own] = True
        if world.is_last_stage():
            logprobs[row, own] = torch.tensor(response.logprobs)
    if responses:
        logprobs = collectives.broadcast_from_last_stage(
            logprobs if world.is_last_stage() else None, shape
        ).cpu()
    return Rollout(
        tokens=tokens,
        loss_mask=mask,
        lengths=torch.tensor(ends, dtype=torch.int64),
        prompt_lengths=torch.tensor(starts, dtype=torch.int64),
        finished=torch.tensor([response.finished for response in responses], dtype=torch.bool),
        group=torch.tensor([response.prompt.number for response in responses], dtype=torch.int64),
        sampler_logprobs=logprobs,
    )
