# SPDX-License-Identifier: Apache-2.0
"""A model with its gradients and its optimizer: all that learning needs of it, whatever its head gives."""

import contextlib
import math
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from megatron.core.distributed import DistributedDataParallel, finalize_model_grads
from megatron.core.optimizer import MegatronOptimizer
from torch import Tensor

from nemo_aligner.batch import TokenBatch, Unit
from nemo_aligner.models.gpt import engine
from nemo_aligner.models.gpt.head_projection import Projection
from nemo_aligner.models.gpt.learning_rate import OptimConfig, learning_rate
from nemo_aligner.models.gpt.model import GPT, InterleavedGPT
from nemo_aligner.models.gpt.optim import (
    StepResult,
    build_optimizer,
    inner_optimizer,
    load_optimizer,
    make_moments,
    optimizer_shards,
    take_step,
    wrap,
    zero_moments,
)
from nemo_aligner.models.gpt.sampling import SampledDistribution
from nemo_aligner.objectives.protocol import Metrics, ModelOutput, Objective, Sums, Wants
from nemo_aligner.parallel import world


class _ForwardOnly:
    """The objective of asking: it wants one thing of the head and has no loss."""

    unit = Unit.TOKEN
    metrics: tuple[str, ...] = ()

    def __init__(self, wants: Wants, *, top_k: int = 0) -> None:
        self.wants, self.top_k = frozenset({wants}), top_k

    def __call__(self, output: ModelOutput, batch: TokenBatch) -> tuple[Tensor, Metrics]:  # noqa: ARG002
        return torch.zeros((), device=world.device()), {}


class GPTLearner:
    """A GPT and, once :meth:`prepare_training` was called, its gradients and optimizer.

    ``seed`` is that of dropout.
    """

    def __init__(
        self, model: GPT | InterleavedGPT, *, kept_logits_bytes: int = 1 << 30, seed: int = 1234
    ) -> None:
        self._model = model
        self.kept_logits_bytes = kept_logits_bytes
        self.seed = seed
        self._ddp: list[DistributedDataParallel] = []
        self._optimizer: MegatronOptimizer | None = None
        self._optimizer_steps = 0  # the schedule's place: all but those that looked for fp16's loss scale
        self._backwards = 0  # done: what random draws are a function of; a step may be left out after one
        self._loss = 0.0  # of the last backward
        self.changes = 0  # of the weights, by steps, restarts and what was loaded
        self._gathers_later = False  # whether other ranks' new weights are yet to come

    @property
    def model(self) -> GPT | InterleavedGPT:
        """The model with its weights up to date; where ranks gather them late (overlap_param_sync), a collective."""
        if self._gathers_later:
            for chunk in self._ddp:
                chunk.start_param_sync(force_sync=True)
            self._gathers_later = False
        return self._model

    def prepare_training(self, optim: OptimConfig, *, clip_grad: float, max_steps: int) -> None:
        """Make gradient buffers and optimizer state; before it nothing can be learned."""
        self._optim, self._max_steps = optim, max_steps
        config = self._model.config
        self._ddp = wrap(self._model.chunks, optim)
        self._optimizer = build_optimizer(optim, self._ddp, dtype=config.params_dtype, clip_grad=clip_grad)
        config.finalize_model_grads_func = finalize_model_grads
        if config.fp16:
            config.grad_scale_func = self._optimizer.scale_loss

    def restart_training(self) -> None:
        """Forget what was learned: once the weights are those of the beginning, the next step is the first."""
        assert self._optimizer is not None, "prepare_training comes first"
        zero_moments(self._optimizer)
        for group in inner_optimizer(self._optimizer).param_groups:
            if "step" in group:
                group["step"] = 0
        self._optimizer.reload_model_params()
        self.changes += 1
        self._optimizer_steps = self._backwards = 0

    def get_loss_and_metrics(
        self, batches: Sequence[TokenBatch], objective: Objective, *, forward_only: bool
    ) -> Sums:
        """See :class:`~nemo_aligner.models.alignable_interface.SupervisedInterface`."""
        return self._run(batches, objective, forward_only=forward_only, sampled=None)

    def _run(
        self,
        batches: Sequence[TokenBatch],
        objective: Objective,
        *,
        forward_only: bool,
        sampled: SampledDistribution | None,
    ) -> Sums:
        with self.inference() if forward_only else self._gradients():
            metrics = engine.forward_backward(
                self._model,
                batches,
                objective,
                forward_only=forward_only,
                wrapped=None if forward_only else self._ddp,
                projection=Projection(kept_logits_bytes=self.kept_logits_bytes, sampled=sampled),
            )
        if not forward_only:
            total, count = metrics["loss"]
            self._loss = total / max(count, 1)
        return metrics

    @contextlib.contextmanager
    def _gradients(self) -> Iterator[None]:
        """Around the forward and backward of a training step."""
        assert self._optimizer is not None, "prepare_training comes first"
        world.seed_step(self.seed, self._backwards)
        self._move_moments(world.device())
        for chunk in self._ddp:
            chunk.train()
            chunk.zero_grad_buffer()
        self._optimizer.zero_grad()
        yield
        self._backwards += 1
        # The forward has waited for what it used, which is all of it.
        self._gathers_later = False

    def optimizer_step(self) -> dict[str, float]:
        """See :class:`~nemo_aligner.models.alignable_interface.SupervisedInterface`."""
        assert self._optimizer is not None, "prepare_training comes first"
        lr = learning_rate(
            self._optimizer_steps, peak=self._optim.lr, sched=self._optim.sched, max_steps=self._max_steps
        )
        for group in self._optimizer.param_groups:
            group["lr"] = lr
        # Every rank has the same loss and the same norm, so all of them leave the step out, or none.
        taken = (
            take_step(self._optimizer)
            if math.isfinite(self._loss)
            else StepResult(done=False, grad_norm=math.nan)
        )
        self._optimizer_steps += not taken.seeks_scale
        self.changes += 1
        self._gathers_later = self._optim.overlap_param_sync
        skipped = not (taken.done or taken.seeks_scale)
        return {"lr": lr, "grad_norm": taken.grad_norm, "skipped_steps": float(skipped)}

    def offload_optimizer(self) -> None:
        """Move the optimizer's moments to CPU memory, until they are needed."""
        self._move_moments(torch.device("cpu"))

    def _move_moments(self, device: torch.device) -> None:
        assert self._optimizer is not None, "prepare_training comes first"
        for moments in inner_optimizer(self._optimizer).state.values():
            for name, value in moments.items():
                if isinstance(value, Tensor) and value.ndim and value.device != device:
                    moments[name] = value.to(device)

    def training_state(self) -> dict[str, Any]:
        """The optimizer's state and counters, without the weights: to save, or to load into.

        It may be loaded at another layout than it was saved at.
        """
        assert self._optimizer is not None, "prepare_training comes first"
        self._move_moments(world.device())
        make_moments(self._optimizer)
        return {
            "optimizer": self._optimizer.state_dict(),
            "shards": optimizer_shards(self._optimizer, self.model.sharded_state_dict(prefix="model.")),
            "optimizer_steps": self._optimizer_steps,
            "backwards": self._backwards,
        }

    def load_training_state(self, state: dict[str, Any]) -> None:
        """Take over what was loaded into :meth:`training_state`; weights are loaded before."""
        assert self._optimizer is not None, "prepare_training comes first"
        load_optimizer(self._optim, self._optimizer, state["optimizer"])
        self.changes += 1
        self._optimizer_steps, self._backwards = state["optimizer_steps"], state["backwards"]

    def _ask(
        self,
        batches: Sequence[TokenBatch],
        wants: Wants,
        *,
        sampled: SampledDistribution | None = None,
        top_k: int = 0,
        known_ids: int | None = None,
    ) -> list[ModelOutput]:
        """The head's output of each micro-batch, on the last pipeline stage's ranks; [] elsewhere."""
        outputs: list[ModelOutput] = []
        with self.inference():
            projection = Projection(sampled=sampled, known_ids=known_ids)
            asks = _ForwardOnly(wants, top_k=top_k)
            engine.forward_backward(
                self._model, batches, asks, forward_only=True, projection=projection, outputs=outputs
            )
        return outputs

    @contextlib.contextmanager
    def inference(self) -> Iterator[None]:
        """Within it, dropout is off and no gradients are kept."""
        model = self.model
        was_training = model.training
        model.eval()
        try:
            with torch.no_grad():
                yield
        finally:
            model.train(was_training)
