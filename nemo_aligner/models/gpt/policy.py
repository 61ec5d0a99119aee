# SPDX-License-Identifier: Apache-2.0
"""A GPT that trains, scores and writes, behind the alignable interface."""

import contextlib
import math
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import torch
from megatron.core.distributed import DistributedDataParallel, finalize_model_grads
from megatron.core.optimizer import MegatronOptimizer
from megatron.core.transformer.module import MegatronModule
from torch import Tensor

from nemo_aligner.batch import TokenBatch, Unit
from nemo_aligner.models.gpt import engine
from nemo_aligner.models.gpt.generate import greedy
from nemo_aligner.models.gpt.learning_rate import OptimConfig, learning_rate
from nemo_aligner.models.gpt.model import GPT
from nemo_aligner.models.gpt.optim import build_optimizer, wrap
from nemo_aligner.objectives.protocol import Metrics, ModelOutput, Objective, Wants
from nemo_aligner.parallel import world

__all__ = ["GPTPolicy"]


class _Score:
    """The objective of scoring: it wants log-probs and has no loss."""

    wants = frozenset({Wants.LOGPROBS})
    top_k = 0
    unit = Unit.TOKEN
    metrics: tuple[str, ...] = ()

    def weights(self, batch: TokenBatch) -> None:  # noqa: ARG002 - the protocol's
        return None

    def __call__(self, output: ModelOutput, batch: TokenBatch) -> tuple[Tensor, Metrics]:  # noqa: ARG002
        assert output.logprobs is not None
        return output.logprobs.sum(), {}


class GPTPolicy:
    """A GPT and, once :meth:`prepare_training` was called, its gradients and optimizer."""

    def __init__(self, model: GPT, *, eos_id: int | None = None, kept_logits_bytes: int = 1 << 30) -> None:
        self.model = model
        self.eos_id = eos_id
        self.kept_logits_bytes = kept_logits_bytes
        self._ddp: DistributedDataParallel | None = None
        self._optimizer: MegatronOptimizer | None = None
        self._step = 0

    def prepare_training(self, optim: OptimConfig, *, clip_grad: float, max_steps: int) -> None:
        """Make gradient buffers and optimizer state; before it, the policy can only score and write."""
        self._optim, self._max_steps = optim, max_steps
        config = self.model.config
        (self._ddp,) = wrap([self.model], optim)
        self._optimizer = build_optimizer(optim, [self._ddp], dtype=config.params_dtype, clip_grad=clip_grad)
        config.finalize_model_grads_func = finalize_model_grads
        if optim.overlap_grad_sync:
            config.no_sync_func = self._ddp.no_sync
        config.grad_scale_func = self._optimizer.scale_loss

    def get_loss_and_metrics(
        self, batches: Sequence[TokenBatch], objective: Objective, *, forward_only: bool
    ) -> dict[str, float]:
        """See :class:`~nemo_aligner.models.alignable_interface.SupervisedInterface`."""
        with self.inference() if forward_only else contextlib.nullcontext():
            module: MegatronModule = self.model
            if not forward_only:
                assert self._ddp is not None and self._optimizer is not None, "prepare_training comes first"
                module = self._ddp
                module.train()
                module.zero_grad_buffer()
                self._optimizer.zero_grad()
            return engine.run(
                module,
                self.model,
                batches,
                objective,
                forward_only=forward_only,
                kept_logits_bytes=self.kept_logits_bytes,
            )

    def optimizer_step(self) -> dict[str, float]:
        """See :class:`~nemo_aligner.models.alignable_interface.SupervisedInterface`."""
        assert self._optimizer is not None, "prepare_training comes first"
        lr = learning_rate(
            self._step, peak=self._optim.lr, sched=self._optim.sched, max_steps=self._max_steps
        )
        for group in self._optimizer.param_groups:
            group["lr"] = lr
        stepped: Any = self._optimizer.step()
        done, grad_norm, _ = stepped
        self._step += bool(done)
        # fp16 skips a step whose gradients overflow its loss scale, and then has no norm.
        return {"lr": lr, "grad_norm": math.nan if grad_norm is None else float(grad_norm)}

    def training_state(self, *, loading: bool) -> dict[str, Any]:
        """Megatron's sharded state of the optimizer and the schedule, beside the weights: to save, or to load into."""
        assert self._optimizer is not None, "prepare_training comes first"
        weights = self.model.sharded_state_dict(prefix="model.")
        optimizer = self._optimizer.sharded_state_dict(
            weights, is_loading=loading, metadata={"distrib_optim_sharding_type": "fully_reshardable"}
        )
        return {"optimizer": optimizer, "schedule_step": self._step}

    def load_training_state(self, state: dict[str, Any]) -> None:
        """Take over what was loaded into :meth:`training_state`."""
        assert self._optimizer is not None, "prepare_training comes first"
        self._optimizer.load_state_dict(state["optimizer"])
        self._step = state["schedule_step"]

    @contextlib.contextmanager
    def inference(self) -> Iterator[None]:
        """Within it, dropout is off and no gradients are kept."""
        was_training = self.model.training
        self.model.eval()
        try:
            with torch.no_grad():
                yield
        finally:
            self.model.train(was_training)

    def logprobs(self, batch: TokenBatch) -> Tensor:
        """[B, S] float on the last pipeline stage's ranks, zeros elsewhere: log-probs of all tokens but the first."""
        ends = batch.lengths[:, None] if batch.cu_seqlens is None else batch.cu_seqlens[-1]
        batch = replace(batch, mask=torch.arange(batch.seq_length, device=ends.device)[None] < ends)
        outputs: list[ModelOutput] = []
        with self.inference():
            engine.run(self.model, self.model, [batch], _Score(), forward_only=True, outputs=outputs)
        if not outputs:
            return torch.zeros(batch.tokens.shape, device=world.device())
        assert outputs[0].logprobs is not None
        return outputs[0].logprobs

    infer = logprobs

    def generate(self, prompts: Sequence[Sequence[int]], *, max_new_tokens: int) -> list[list[int]]:
        """See :class:`~nemo_aligner.models.alignable_interface.AlignableGenerativeInterface`."""
        with self.inference():
            return greedy(self.model, prompts, max_new_tokens=max_new_tokens, eos_id=self.eos_id)
