# SPDX-License-Identifier: Apache-2.0
"""From the settings of generate.py and evaluate.py to what generates, and to what gives a reward to each response."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager

from torch import Tensor

from nemo_aligner.algorithms.episodes import Environments, Episodes
from nemo_aligner.algorithms.generation import Rewarding, TextGenerator
from nemo_aligner.algorithms.ppo_config import RewardConfig
from nemo_aligner.algorithms.rewards import CalledReward, open_called, score_by_functions
from nemo_aligner.algorithms.rollout import trim_padding
from nemo_aligner.builders.connections import connected
from nemo_aligner.builders.models import Pretrained, require_tokenizer
from nemo_aligner.config.generate import GenerateJob
from nemo_aligner.data.records import RecordFile
from nemo_aligner.data.rendering import render_prompt
from nemo_aligner.data.requests import GenerateRequest, tokens_of
from nemo_aligner.data.row import Row
from nemo_aligner.data.tokenizer import Tokenizer, tokenizer_probe
from nemo_aligner.errors import Unwound
from nemo_aligner.models.gpt.policy import GPTPolicy
from nemo_aligner.parallel import world
from nemo_aligner.rollout_batch import Rollout
from nemo_aligner.serving.client import RemoteReward, ServerAddress
from nemo_aligner.serving.compatibility import Actor
from nemo_aligner.serving.proxies import RewardProxy


def text_generator(job: GenerateJob, pretrained: Pretrained[GPTPolicy]) -> TextGenerator:
    """The model, its tokenizer, and the settings of its responses."""
    return TextGenerator(
        policy=pretrained.learner,
        tokenizer=require_tokenizer(job, pretrained),
        sampling=job.sampling_config,
        end_ids=pretrained.learner.end_ids,
        slots=job.batch_size,
    )


@contextmanager
def open_score(
    job: GenerateJob,
    pretrained: Pretrained[GPTPolicy],
    requests: RecordFile[GenerateRequest],
    generator: TextGenerator,
) -> Iterator[Rewarding | None]:
    """Yield what gives the rewards, known to work before anything is generated; None where none are asked for.

    Raises:
        UserError: there is no such function, or no server that fits.
    """
    config = RewardConfig(
        function=job.reward_function,
        environment=job.reward_environment,
        arguments=job.reward_arguments,
        timeout=job.reward_timeout,
        max_turns=job.reward_max_turns,
    )
    if config.called is not None:
        name = f"reward_{config.called[0]}"
        with open_called({name: config}, setting="{}", at_once=job.batch_size) as called:
            make = _by_functions if config.environment is None else _by_environment
            yield make(called, job, requests, generator)
    elif job.reward_model is not None:
        address = ServerAddress(
            setting="reward_model",
            job="serve_reward_model.py",
            ip=job.reward_model.ip,
            port=job.reward_model.port,
        )
        server = RemoteReward(address, name=job.reward_model.name) if world.is_logging_rank() else None
        actor = Actor(
            vocab_size=pretrained.learner.model.gpt_config.vocab_size,
            longest=_longest(job, pretrained, requests, generator.tokenizer),
            tokenizer=tokenizer_probe(generator.tokenizer),
            request_rows=job.batch_size,
            request_rows_setting="batch_size",
            saves=False,
            needs_rewards=False,
            length_settings="sampling.max_length",
        )
        with connected(server, actor, stopped=[server] if server and job.reward_model.stop_at_end else []):
            yield _by_server(RewardProxy(server), rows=job.batch_size)
    else:
        yield None


def _by_functions(
    called: Mapping[str, CalledReward],
    job: GenerateJob,
    requests: RecordFile[GenerateRequest],
    generator: TextGenerator,
) -> Rewarding:
    del job
    (name,) = called

    def score(rollout: Rollout) -> Tensor:
        numbers = range(len(requests))[world.dp_rank() :: world.dp_size()]
        prompts = {number: _row(requests[number], generator.tokenizer) for number in numbers}
        found = score_by_functions(called, rollout, prompts, text=generator.response_text, block="")
        return found.rewards[name]

    return Rewarding(score=_reported(score))


def _reported(score: Callable[[Rollout], Tensor]) -> Callable[[Rollout], Tensor]:
    """``score``, whose error is a person's: there is no run to be saved first."""

    def call(rollout: Rollout) -> Tensor:
        try:
            return score(rollout)
        except Unwound as failed:
            raise failed.error from failed

    return call


def _row(request: GenerateRequest, tokenizer: Tokenizer) -> Row:
    """A request as reward functions see it."""
    prompt = request.prompt
    text = prompt if isinstance(prompt, str) else render_prompt(tokenizer, prompt, request.tools)
    return Row(sequences=(), text=text, extras=request.row)


def _by_environment(
    called: Mapping[str, CalledReward],
    job: GenerateJob,
    requests: RecordFile[GenerateRequest],
    generator: TextGenerator,
) -> Rewarding:
    environments = Environments(
        called=called,
        tokenizer=generator.tokenizer,
        end_ids=generator.end_ids,
        end_strings=generator.sampling.end_strings,
        places=None,
        seed=job.sampling.seed,
        block="",
    )
    rows = {number: _row(requests[number], generator.tokenizer) for number in range(len(requests))}
    episodes = Episodes(environments, rows, draw=0)

    (name,) = called
    return Rewarding(score=_reported(lambda rollout: episodes.rewards(rollout).rewards[name]), turns=episodes)


def _by_server(server: RewardProxy, *, rows: int) -> Rewarding:
    return Rewarding(
        score=_reported(lambda rollout: server.score(trim_padding(rollout, multiple=1), rows=rows).result())
    )


def _longest(
    job: GenerateJob,
    pretrained: Pretrained[GPTPolicy],
    requests: RecordFile[GenerateRequest],
    tokenizer: Tokenizer,
) -> int:
    """Tokens of the longest prompt and response together."""
    asked = (requests[number] for number in range(len(requests)))
    longest = max(len(tokens_of(one.prompt, tokenizer, tools=one.tools)) for one in asked)
    positions = pretrained.learner.model.gpt_config.max_position_embeddings
    return min(longest + job.sampling.max_length, positions)
