# SPDX-License-Identifier: Apache-2.0
"""The Python API: a model that learns, writes, scores and is saved, on one rank or on those that torchrun made.

No trainer and no configuration file: the loop is the caller's. ``import nemo_aligner`` has all of these names.
"""

import atexit
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor

from nemo_aligner import builders
from nemo_aligner.algorithms.rollout import text_of_response
from nemo_aligner.algorithms.turns import Replies, Reply
from nemo_aligner.batch import PreferenceBatch, TokenBatch, Unit
from nemo_aligner.builders import servers
from nemo_aligner.checkpoint.convert import export_to_huggingface
from nemo_aligner.checkpoint.sources import peek_model
from nemo_aligner.config.base import ModelJob, PretrainedConfig, TrainerConfig
from nemo_aligner.config.generate import GenerateJob, GenerateModelConfig
from nemo_aligner.config.reward import RMJob, RMModelConfig, RMTrainerConfig
from nemo_aligner.config.serve import RewardServerJob, ServedModelConfig
from nemo_aligner.data.config import PairDataConfig
from nemo_aligner.data.reading import Reading
from nemo_aligner.data.records import USUAL_REWARDS
from nemo_aligner.data.requests import tokens_of
from nemo_aligner.data.row import TextEncoder
from nemo_aligner.data.tokenizer import Message, Tokenizer, encode_after
from nemo_aligner.errors import UserError
from nemo_aligner.models.gpt.critic import GPTCritic
from nemo_aligner.models.gpt.learner import GPTLearner
from nemo_aligner.models.gpt.learning_rate import OptimConfig, SchedConfig
from nemo_aligner.models.gpt.policy import GPTPolicy
from nemo_aligner.models.sampling_config import SamplingConfig
from nemo_aligner.objectives.nll import NLL
from nemo_aligner.objectives.protocol import Metrics, ModelOutput, Objective, Wants
from nemo_aligner.objectives.reward import BradleyTerry
from nemo_aligner.parallel import collectives, world
from nemo_aligner.parallel.ranks import discover
from nemo_aligner.rollout_batch import Prompt, Rollout
from nemo_aligner.run.metrics import means

__all__ = [
    "NLL", "BradleyTerry", "LanguageModel", "Metrics", "ModelOutput", "Objective", "OptimConfig", "PreferenceBatch",
    "RewardModel", "Rollout", "SamplingConfig", "SchedConfig", "TokenBatch", "Unit", "Wants",
    "load", "load_reward_model",
]  # fmt: skip

Text = str | Sequence[Message]  # a text, or a conversation that the tokenizer's chat template writes
L = TypeVar("L", bound=GPTLearner)


@dataclass(frozen=True, kw_only=True)
class _Loaded(Generic[L]):
    """The common part of both kinds of model. Every method is called by every rank."""

    pretrained: builders.Pretrained[L]
    tokenizer: Tokenizer

    @property
    def learner(self) -> L:
        """The model behind the interface that trainers see."""
        return self.pretrained.learner

    def prepare_training(
        self, optim: OptimConfig | float, *, max_steps: int = 1, clip_grad: float = 1.0
    ) -> None:
        """Make gradients and AdamW's state. A number is a constant learning rate, for as many steps as you like."""
        if not isinstance(optim, OptimConfig):
            optim = OptimConfig(lr=optim, sched=SchedConfig(name="constant", warmup_steps=0))
        optim.check()
        self.learner.prepare_training(optim, clip_grad=clip_grad, max_steps=max_steps)

    def get_loss_and_metrics(
        self, batches: Sequence[TokenBatch], objective: Objective, *, forward_only: bool = False
    ) -> dict[str, float]:
        """Forward and backward of this data parallel rank's micro-batches; means over all of them."""
        here = [batch.to(world.device()) for batch in batches]
        return means(self.learner.get_loss_and_metrics(here, objective, forward_only=forward_only))

    def optimizer_step(self) -> dict[str, float]:
        """Learn from the gradients: "lr", "grad_norm", "skipped_steps"."""
        return self.learner.optimizer_step()

    def save(self, path: Path | str, *, overwrite: bool = False) -> None:
        """Write a .nemo file."""
        self.pretrained.save(Path(path), overwrite=overwrite)

    def export(self, folder: Path | str, *, overwrite: bool = False) -> None:
        """Write a folder for transformers."""
        between = Path(f"{folder}.export.nemo")
        self.save(between, overwrite=True)
        if world.is_logging_rank():
            try:
                export_to_huggingface(between, Path(folder), overwrite=overwrite)
            finally:
                between.unlink()
        world.barrier()

    def _padded(self, rows: Sequence[tuple[Sequence[int], Sequence[bool]]]) -> TokenBatch:
        """Rows of (tokens, which are learned)."""
        longest = max(len(tokens) for tokens, _ in rows)
        longest += -longest % world.tp_size()
        return TokenBatch.from_rows(rows, pad_id=self.tokenizer.pad_id, seq_length=longest).to(world.device())


@dataclass(frozen=True, kw_only=True)
class LanguageModel(_Loaded[GPTPolicy]):
    """Learns, gives log-probs and writes."""

    def batch(self, rows: Sequence[tuple[Text, str]]) -> TokenBatch:
        """Prompts and responses as rows whose responses, their end token included, are learned."""
        found = []
        for prompt, response in rows:
            asked = tokens_of(prompt, self.tokenizer)
            learned = [*encode_after(self.tokenizer, response), self.tokenizer.eos_id]
            found.append((asked + learned, [False] * len(asked) + [True] * len(learned)))
        return self._padded(found)

    def logprobs(self, batch: TokenBatch) -> Tensor:
        """[B, S]: log p(token t | tokens before t), 0 at the first token and in the padding."""
        batch = batch.to(world.device())
        return collectives.broadcast_from_last_stage(self.learner.logprobs(batch), tuple(batch.tokens.shape))

    def generate(
        self,
        prompts: Sequence[Text],
        sampling: SamplingConfig = SamplingConfig(),  # noqa: B008 - frozen
        *,
        samples: int = 1,
        step: int = 0,
        reply: Reply | None = None,
    ) -> Rollout:
        """Responses to this data parallel rank's part of the prompts, ``samples`` to each, one after the other.

        Args:
            prompts: of all ranks.
            sampling: how tokens are drawn.
            samples: to each prompt.
            step: one more word of the random draws' seed: other responses each step.
            reply: what says a turn's reply by the prompt's number, the sample and the turn's text, and None at the end.
                It is called on one rank of each of the model's copies. ``loss_mask`` marks the model's own tokens.
        """
        sampling.check("sampling")
        if not prompts or len(prompts) % world.dp_size():
            raise UserError(
                f"{len(prompts)} prompts cannot be shared by {world.dp_size()} data parallel ranks",
                fix="give as many to each rank, and each at least one",
            )
        mine = [
            Prompt(tokens=tokens_of(prompts[number], self.tokenizer), number=number, sample=sample)
            for number in range(world.dp_rank(), len(prompts), world.dp_size())
            for sample in range(samples)
        ]
        turns = (
            None
            if reply is None
            else Replies(reply, self.tokenizer, self.learner.end_ids, sampling.end_strings)
        )
        return self.learner.generate(mine, sampling, step=step, turns=turns)

    def texts(self, rollout: Rollout, *, end_strings: tuple[str, ...] = ()) -> list[str]:
        """The responses, without what ended them."""
        ends, decode = (self.learner.end_ids, end_strings), self.tokenizer.decode
        return [text_of_response(rollout, row, *ends, decode=decode) for row in range(rollout.num_rows)]


@dataclass(frozen=True, kw_only=True)
class RewardModel(_Loaded[GPTCritic]):
    """Learns to score, and scores."""

    def batch(self, rows: Sequence[tuple[str, str]]) -> PreferenceBatch:
        """Pairs of whole texts, the chosen one and the rejected one."""
        whole, usual = self._read([text for row in rows for text in row]), USUAL_REWARDS * len(rows)
        return whole.extended(PreferenceBatch, given_rewards=torch.tensor(usual, device=world.device()))

    def score(self, texts: Sequence[str]) -> Tensor:
        """[N] rewards of whole texts, or [N, A] where several attributes are not merged."""
        return self.learner.infer(self._read(texts))

    def _read(self, texts: Sequence[str]) -> TokenBatch:
        reading = Reading.of(self.pretrained.config) or Reading()
        encode = TextEncoder(tokenizer=self.tokenizer, add_bos=reading.add_bos, append_eos=reading.append_eod)
        rows = [encode(text) for text in texts]
        return self._padded([(ids, [False] * (len(ids) - 1) + [True]) for ids in rows])


def load(
    path: Path | str, *, tp: int = 1, pp: int = 1, precision: str = "auto", seed: int = 1234
) -> LanguageModel:
    """A language model: a .nemo, a checkpoint, a Hugging Face folder, a GGUF file or OWNER/NAME of the hub.

    Args:
        path: the model.
        tp: ranks that share each layer; with ``pp``, torchrun's ranks are cut into copies of the model.
        pp: ranks that share the stack of layers.
        precision: 32, bf16, 16, or auto: bf16 on a GPU, else 32.
        seed: of dropout.

    Raises:
        UserError: there is no such model, or it does not fit.
    """
    model = GenerateModelConfig(restore_from_path=str(path), **_layout(tp, pp, seed))
    job = GenerateJob(model=model, trainer=TrainerConfig(precision=precision))
    _join(job)
    pretrained = builders.load_policy(job)
    return LanguageModel(pretrained=pretrained, tokenizer=builders.require_tokenizer(job, pretrained))


def load_reward_model(
    path: Path | str, *, tp: int = 1, pp: int = 1, precision: str = "auto", seed: int = 1234
) -> RewardModel:
    """A reward model, or a language model with a new head that gives rewards. See :func:`load`."""
    job: RewardServerJob | RMJob
    if "reward_model_type" in (peek_model("path", str(path)) or {}):
        model = ServedModelConfig(**_layout(tp, pp, seed))
        trainer = TrainerConfig(precision=precision)
        job = RewardServerJob(model=model, rm_model_file=str(path), trainer=trainer)
        _join(job)
        pretrained = servers.load_served_reward_model(job)
    else:
        unread = PairDataConfig(data_prefix={"train": ["unread"]})
        job = RMJob(
            model=RMModelConfig(data=unread, **_layout(tp, pp, seed)),
            trainer=RMTrainerConfig(precision=precision),
            pretrained_checkpoint=PretrainedConfig(restore_from_path=str(path)),
        )
        _join(job)
        pretrained = builders.load_reward_model(job)
    return RewardModel(pretrained=pretrained, tokenizer=builders.require_tokenizer(job, pretrained))


def _layout(tp: int, pp: int, seed: int) -> dict[str, Any]:
    return {"tensor_model_parallel_size": tp, "pipeline_model_parallel_size": pp, "seed": seed}


def _join(job: ModelJob) -> None:
    """Make the world of this process or of torchrun's; a further model joins the one that stands."""
    layout, ranks = job.model.layout, discover()
    size = ranks.world_size if ranks else 1
    layout.check_fits(num_nodes=1, devices=size, world_size=size)
    peek_model("path", job.pretrained[1])
    if not world.stands():
        world.start(ranks, layout=layout, seed=job.model.seed)
        atexit.register(world.stop)
    elif (world.tp_size(), world.pp_size()) != (layout.tensor, layout.pipeline):
        raise UserError(
            f"tp={layout.tensor} pp={layout.pipeline}, and an earlier model of this process has tp={world.tp_size()} "
            f"pp={world.pp_size()}",
            fix="load all models of a process at one layout",
        )
