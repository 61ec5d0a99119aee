# SPDX-License-Identifier: Apache-2.0
"""Generation without training: for a file of prompts, or for a person at the terminal."""

import contextlib
import itertools
import json
import logging
import math
import queue
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from nemo_aligner.algorithms.rollout import text_of_response
from nemo_aligner.batch import concatenated
from nemo_aligner.data.records import RecordFile
from nemo_aligner.data.requests import GenerateRequest, tokens_of
from nemo_aligner.data.tokenizer import Message, Tokenizer
from nemo_aligner.errors import UserError, located
from nemo_aligner.models.alignable_interface import AlignableGenerativeInterface, Turns
from nemo_aligner.models.sampling_config import SamplingConfig
from nemo_aligner.parallel import collectives, world
from nemo_aligner.rollout_batch import Prompt, Rollout
from nemo_aligner.run.progress import ProgressBar

logger = logging.getLogger(__name__)

# ranks that wait for a person hear so often from the one who listens, so no collective times out
TICK_SECONDS = 10.0
PROMPT_SIGN = "> "
HELP = "Type to the model; /new starts another conversation, /exit or Ctrl-D ends."


@dataclass(frozen=True, kw_only=True)
class Rewarding:
    """The source of rewards."""

    # gives the [N] rewards of responses that every rank has; called by all ranks
    score: Callable[[Rollout], Tensor]
    turns: Turns | None = None  # replies to the model's turns; None: a response is one


@dataclass(frozen=True, kw_only=True)
class TextGenerator:
    """A model, its tokenizer, and the settings of its responses."""

    policy: AlignableGenerativeInterface
    tokenizer: Tokenizer
    sampling: SamplingConfig
    end_ids: Sequence[int]  # tokens that end a response
    slots: int  # responses that each data parallel rank generates at once

    def generate_file(
        self,
        requests: RecordFile[GenerateRequest],
        output: Path,
        *,
        num_samples: int,
        rewarding: Rewarding | None = None,
        top_n: int | None = None,
    ) -> list[dict[str, Any]]:
        """Generate responses to every request, write a line of JSON for each, in the requests' order, and return them.

        Its keys: prompt, answer, finished (False where max_length or the model's positions cut it), logprob (the sum
        over the response's tokens, of the distribution that they were drawn from), num_tokens; conversation, of several
        turns; reward.

        Args:
            requests: the prompts.
            output: the file to write.
            num_samples: responses to each prompt.
            rewarding: gives the rewards; None: there are none.
            top_n: of the responses to a prompt, those that are written, by reward; None: all.

        Raises:
            UserError: a prompt leaves no room for a response, or its response has no finite log-prob; naming its line.
                Or there is a response without a reward.
        """
        turns = None if rewarding is None else rewarding.turns
        every, ranks = range(len(requests) * num_samples), world.dp_size()
        # An environment is where all responses to a prompt are.
        each = 1 if turns is None else num_samples
        shares = [[i for i in every if i // each % ranks == rank] for rank in range(ranks)]
        prompts = [self._prompt(requests, *divmod(i, num_samples)) for i in shares[world.dp_rank()]]
        rollout = concatenated(collectives.all_gather_objects_dp(self._generate(prompts, turns)))
        order = list(itertools.chain(*shares))
        rows = dict(zip(order, self._rows(requests, rollout), strict=True))
        for i, row in rows.items():
            if not math.isfinite(row["logprob"]):
                raise _not_finite(requests.where(i // num_samples))
        if turns is not None:
            for row, i in enumerate(order):
                rows[i]["conversation"] = self.tokenizer.decode(rollout.conversation(row))
        if rewarding is not None:
            try:
                rewards = [float(reward) for reward in rewarding.score(rollout)]
            except UserError:
                _write_rows(output.with_name(f"{output.stem}.without_rewards{output.suffix}"), rows, every)
                raise
            for i, reward in zip(order, rewards, strict=True):
                rows[i]["reward"] = reward
        chosen = every if top_n is None else _best(rows, num_samples=num_samples, top_n=top_n)
        _write_rows(output, rows, chosen)
        return [rows[i] for i in chosen]

    def _generate(self, prompts: Sequence[Prompt], turns: Turns | None) -> Rollout:
        """This data parallel rank's responses; a bar says how many have ended."""
        bar = ProgressBar(
            total=len(prompts), enabled=world.is_logging_rank(), name="response", unit="response"
        )
        began, written = time.monotonic(), 0

        def watch(ended: int, tokens: Sequence[int]) -> None:
            nonlocal written
            written += len(tokens)
            bar.show(ended, f"{written / (time.monotonic() - began):.0f} tokens/s")

        try:
            with world.phase("generation"), world.at_own_pace():
                return self.policy.generate(
                    prompts, self.sampling, slots=self.slots, watch=watch, turns=turns
                )
        finally:
            bar.close()

    def _prompt(self, requests: RecordFile[GenerateRequest], number: int, sample: int) -> Prompt:
        with located(lambda: f"{requests.where(number)}: "):
            request = requests[number]
            tokens = tokens_of(request.prompt, self.tokenizer, tools=request.tools)
        return Prompt(tokens=tokens, number=number, sample=sample)

    def _rows(self, requests: RecordFile[GenerateRequest], rollout: Rollout) -> Iterator[dict[str, Any]]:
        sums = rollout.per_sequence(rollout.sampler_logprobs.double())
        for row in range(rollout.num_rows):
            yield {
                "prompt": requests[int(rollout.group[row])].prompt,
                "answer": self.response_text(rollout, row),
                "finished": bool(rollout.finished[row]),
                "logprob": float(sums[row]),
                "num_tokens": len(rollout.response(row)),
            }

    def response_text(self, rollout: Rollout, row: int) -> str:
        """The text of a response, without what ended it."""
        ends = self.end_ids, self.sampling.end_strings
        return text_of_response(rollout, row, *ends, decode=self.tokenizer.decode)

    def converse(self) -> None:
        """Talk with a person on stdin and stdout, who has the first word and the last.

        In the tokenizer's chat template; without one each line is a text of its own that the model goes on with.
        """
        _write(f"{HELP}\n")
        if self.tokenizer.chat_template is None:
            _write("The tokenizer has no chat template: the model goes on with each line.\n")
        messages: list[Message] = []
        _invite()
        for turn, line in enumerate(_lines()):
            if line == "/new":
                messages = []
                _invite()
                continue
            try:
                self._reply(messages, line, turn)
            except UserError as error:
                messages = []
                _write(f"{error}\nThis is a new conversation.\n")
            _invite()

    def _reply(self, messages: list[Message], line: str, turn: int) -> None:
        """Write the response to ``line``, piece by piece; both are added to ``messages``."""
        chats = self.tokenizer.chat_template is not None
        asked: list[Message] = [*messages, {"role": "user", "content": line}]
        prompt = Prompt(tokens=tokens_of(asked if chats else line, self.tokenizer), number=turn)
        stream = StreamedResponse(self.tokenizer, self.end_ids, self.sampling.end_strings)

        def watch(_: int, tokens: Sequence[int]) -> None:
            _write(stream.more(tokens))

        rollout = self.policy.generate([prompt], self.sampling, slots=1, watch=watch)
        if not rollout.sampler_logprobs.isfinite().all():
            raise _not_finite("this turn")
        response = self.response_text(rollout, 0)
        _write(f"{stream.rest(response)}\n")
        messages[:] = [*asked, {"role": "assistant", "content": response}]


def _best(rows: Mapping[int, Mapping[str, Any]], *, num_samples: int, top_n: int) -> list[int]:
    """Of each prompt's rows the ``top_n`` of the highest rewards, the best first; of equal ones the first."""
    groups = (range(start, start + num_samples) for start in range(0, len(rows), num_samples))
    return [i for group in groups for i in sorted(group, key=lambda i: -rows[i]["reward"])[:top_n]]


def _write_rows(path: Path, rows: Mapping[int, Mapping[str, Any]], chosen: Iterable[int]) -> None:
    if world.is_logging_rank():
        lines = [json.dumps(rows[i], ensure_ascii=False) + "\n" for i in chosen]
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("".join(lines), encoding="utf-8")
        logger.info("%d responses in %s", len(lines), path)


class StreamedResponse:
    """A response that is shown while it is generated: the part that no later token can change."""

    def __init__(self, tokenizer: Tokenizer, end_ids: Sequence[int], end_strings: Sequence[str]) -> None:
        self._tokenizer, self._end_ids, self._end_strings = tokenizer, end_ids, end_strings
        self._tokens: list[int] = []
        self._shown = ""

    def more(self, tokens: Sequence[int]) -> str:
        """Return the text that ``tokens`` add to what is shown."""
        self._tokens += [token for token in tokens if token not in self._end_ids]
        # The rest of a character that takes several tokens may come, of an end string, or nothing after white space.
        text = self._tokenizer.decode(self._tokens).rstrip("\ufffd")
        for end in self._end_strings:
            sure = text.find(end)
            if sure < 0:
                begun = (n for n in range(len(end) - 1, 0, -1) if text.endswith(end[:n]))
                sure = len(text) - next(begun, 0)
            text = text[:sure]
        text = text.strip()
        if not text.startswith(self._shown):
            return ""
        news, self._shown = text[len(self._shown) :], text
        return news

    def rest(self, response: str) -> str:
        """The part of the ``response`` that is not shown yet; all of it, on a new line, if it came out otherwise."""
        response = response.strip()
        return response[len(self._shown) :] if response.startswith(self._shown) else f"\n{response}"


def _write(text: str) -> None:
    """Show a person ``text`` at once."""
    if world.is_logging_rank():
        sys.stdout.write(text)
        sys.stdout.flush()


def _invite() -> None:
    """Show a person at a terminal that it is their turn."""
    if sys.stdin.isatty():
        _write(PROMPT_SIGN)


def _not_finite(where: str) -> UserError:
    return UserError(
        f"{where}: the model's log-probs are infinite or NaN",
        fix="take an earlier checkpoint; with trainer.precision=16 try bf16 or 32",
    )


def _lines() -> Iterator[str]:
    """The lines that the person types, on every rank, until the end of the input or /exit."""
    typed: queue.Queue[str | None] = queue.Queue()
    if world.is_logging_rank():
        threading.Thread(target=_listen, args=(typed,), daemon=True).start()
    while True:
        ticks, line = True, None
        if world.is_logging_rank():
            with contextlib.suppress(queue.Empty):
                line, ticks = typed.get(timeout=TICK_SECONDS), False
        ticks, line = collectives.broadcast_object((ticks, line))
        if ticks:
            continue
        if line is None or line.strip() == "/exit":
            return
        if line.strip():
            yield line.strip()


def _listen(typed: queue.Queue[str | None]) -> None:
    """Hand on each line of stdin; its end is None."""
    for line in sys.stdin:
        typed.put(line)
    typed.put(None)
