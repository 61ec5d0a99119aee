# SPDX-License-Identifier: Apache-2.0
"""The language model's head: from hidden states to log-probabilities, entropy and top-k, with their gradients.

Projects in chunks of rows, each tensor parallel rank its own slice of the vocabulary, so that [rows, vocabulary]
never exists whole. Knows no batch and no objective.

Shapes: n rows, H hidden size, V the true vocabulary, V_local this rank's slice without padding, K top-k.
With z = hidden @ weight.T and p = softmax(z):
    logprob = z[target] - lse(z)             d/dz = onehot(target) - p
    entropy = lse(z) - sum(p * z)            d/dz = -p * (z - lse(z) + entropy)
    top-k   = z[ids] - lse(z)                d/dz = onehot(ids) - p  for each id, of the most likely or of given ones
A request may have the logits transformed before all of this.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
from torch import Tensor

from nemo_aligner.parallel import world
from nemo_aligner.parallel.collectives import (
    gather_over_tensor_parallel,
    max_over_tensor_parallel,
    sum_over_tensor_parallel,
)
from nemo_aligner.parallel.cpu_speed import CPU_ROWS, product

Context: TypeAlias = Any  # torch puts any attribute on an autograd context

Transform: TypeAlias = Callable[[Tensor, slice, Tensor], Tensor]
"""(logits [c, V_local] of this rank, which of the n rows they are, the targets' columns here [c], -1 where another rank
owns them) to logits of the same shape, differentiably; what it drops gets a finite logit."""

CHUNK_BYTES = 512 << 20  # of logits, on a device


@dataclass(frozen=True, kw_only=True)
class HeadRequest:
    """The outputs to compute from the logits, and how."""

    vocab_size: int  # V: ids from here on are padding and have no probability
    entropy: bool = False
    top_k: int = 0
    ids: Tensor | None = None  # [n, K] int64: the tokens of topk_logprobs; None: the top_k most likely ones
    kept_logits_bytes: int = 1 << 30  # above this, the backward recomputes each chunk's logits
    chunk_bytes: int | None = None  # logits of one chunk, at least 16 rows; None: what suits the device
    transform: Transform | None = None


@dataclass(frozen=True)
class HeadOutput:
    """The outputs that were asked for; the other fields are None."""

    logprobs: Tensor  # [n] float
    entropy: Tensor | None  # [n] float
    topk_logprobs: Tensor | None  # [n, K] float, descending, or in the order of HeadRequest.ids
    topk_ids: Tensor | None  # [n, K] int64


@dataclass
class _Chunk:
    """One chunk of rows on its way through softmax."""

    rows: slice
    raw: Tensor  # [c, V_local] float, before the transform; the same as ``logits`` where there is none
    logits: Tensor  # [c, V_local] float
    lse: Tensor  # [c]
    local: Tensor  # [c] int64: the target's column here, 0 where another rank owns it
    owned: Tensor  # [c] bool: this rank owns the target


class _Head:
    """The head's arithmetic for one call: chunks, softmax statistics, gradients with respect to the logits."""

    def __init__(self, hidden: Tensor, weight: Tensor, targets: Tensor, request: HeadRequest) -> None:
        self.first = world.tp_rank() * weight.shape[0]
        self.hidden, self.targets, self.request = hidden, targets, request
        self.weight = weight[: max(0, min(weight.shape[0], request.vocab_size - self.first))]
        self.dtype = torch.float64 if hidden.dtype == torch.float64 else torch.float32
        # Padding counts: every rank must cut the same chunks, or their collectives would not match.
        row_bytes = weight.shape[0] * self.dtype.itemsize
        self.logits_bytes = hidden.shape[0] * row_bytes
        self.chunk_rows = max(16, (request.chunk_bytes or CHUNK_BYTES) // row_bytes)
        if request.chunk_bytes is None and hidden.device.type == "cpu":
            self.chunk_rows = CPU_ROWS

    def rows(self) -> Iterator[slice]:
        for start in range(0, self.hidden.shape[0], self.chunk_rows):
            yield slice(start, min(start + self.chunk_rows, self.hidden.shape[0]))

    def scratch(self) -> Tensor:
        # One for all chunks: what is freed and taken again costs a page fault for every 4 KiB.
        rows = min(self.chunk_rows, self.hidden.shape[0])
        return torch.empty(rows, self.weight.shape[0], dtype=self.dtype, device=self.hidden.device)

    def project(self, rows: slice) -> Tensor:
        return product(self.hidden[rows], self.weight).to(self.dtype)

    def target(self, rows: slice) -> tuple[Tensor, Tensor]:
        """The targets' columns here, and whether this rank owns them: see :class:`_Chunk`."""
        local = self.targets[rows] - self.first
        owned = (local >= 0) & (local < self.weight.shape[0])
        return local.where(owned, 0), owned

    def transformed(self, z: Tensor, rows: slice) -> Tensor:
        if self.request.transform is None:
            return z
        local, owned = self.target(rows)
        return self.request.transform(z, rows, local.where(owned, -1))

    def peak(self, z: Tensor) -> Tensor:
        return max_over_tensor_parallel(z.amax(1) if z.shape[1] else z.new_full(z.shape[:1], -torch.inf))

    def at_target(self, z: Tensor, local: Tensor, owned: Tensor) -> Tensor:
        if z.shape[1] == 0:
            return sum_over_tensor_parallel(z.new_zeros(z.shape[0]))
        return sum_over_tensor_parallel(z.gather(1, local[:, None])[:, 0].where(owned, 0))

    def softmax_(self, z: Tensor) -> tuple[Tensor, Tensor]:
        """The softmax [c, V_local], in the place of ``z``, and the logarithm of the sum that it divides by [c]."""
        if z.shape[1] == 0:
            lse = z.new_full(z.shape[:1], -torch.inf)
        else:
            peak = z.amax(1)
            torch.softmax(z, 1, out=z)
            lse = peak - z.amax(1).log()
        if world.tp_size() > 1:
            mine, most = lse, max_over_tensor_parallel(lse.clone())
            lse = most + sum_over_tensor_parallel((mine - most).exp()).log()
            z.mul_((mine - lse).exp()[:, None])
        return z, lse

    def chunks(self) -> Iterator[_Chunk]:
        scratch = self.scratch()
        for rows in self.rows():
            raw = self.project(rows)
            z = self.transformed(raw, rows)
            peak = self.peak(z)
            total = torch.sub(z, peak[:, None], out=scratch[: z.shape[0]]).exp_().sum(1)
            lse = sum_over_tensor_parallel(total).log_().add_(peak)
            yield _Chunk(rows, raw, z, lse, *self.target(rows))

    def logprobs(self, chunk: _Chunk) -> Tensor:
        return self.at_target(chunk.logits, chunk.local, chunk.owned) - chunk.lse

    def entropy(self, chunk: _Chunk) -> Tensor:
        expected = (torch.exp(chunk.logits - chunk.lse[:, None]) * chunk.logits).sum(1)
        return chunk.lse - sum_over_tensor_parallel(expected)

    def topk(self, chunk: _Chunk, k: int) -> tuple[Tensor, Tensor]:
        values, ids = chunk.logits.topk(min(k, chunk.logits.shape[1]), dim=1)
        if short := k - values.shape[1]:
            # A rank whose slice is smaller than k offers candidates that can't win.
            values = torch.nn.functional.pad(values, (0, short), value=-torch.inf)
            ids = torch.nn.functional.pad(ids, (0, short))
        values = gather_over_tensor_parallel(values)
        ids = gather_over_tensor_parallel(ids + self.first)
        best, order = values.topk(k, dim=1)
        return best - chunk.lse[:, None], ids.gather(1, order)

    def at_ids(self, chunk: _Chunk, ids: Tensor) -> Tensor:
        column = ids - self.first
        here = (column >= 0) & (column < chunk.logits.shape[1])
        found = chunk.logits.new_zeros(ids.shape)
        if chunk.logits.shape[1]:
            found = chunk.logits.gather(1, column.where(here, 0)).where(here, 0)
        return sum_over_tensor_parallel(found) - chunk.lse[:, None]

    def add_at_targets(self, dlogits: Tensor, local: Tensor, grad: Tensor) -> None:
        """Add ``grad`` [c], 0 where another rank owns the column, at the columns ``local`` [c]."""
        if dlogits.shape[1]:
            dlogits.scatter_add_(1, local[:, None], grad[:, None])

    def new_grad_weight(self, weight: Tensor, *, needed: bool) -> Tensor | None:
        """For :meth:`project_back`, whose first chunk overwrites all but the padding; None of a frozen weight."""
        if not needed:
            return None
        if self.hidden.shape[0] == 0:
            return torch.zeros_like(weight)
        grad = torch.empty_like(weight)
        grad[self.weight.shape[0] :] = 0
        return grad

    def project_back(
        self, dlogits: Tensor, rows: slice, grad_hidden: Tensor, grad_weight: Tensor | None
    ) -> None:
        dlogits = dlogits.to(self.hidden.dtype)
        grad_hidden[rows] = product(dlogits, self.weight.t())
        self._add_to(grad_weight, dlogits, self.hidden[rows], first=rows.start == 0)

    def project_scaled(
        self,
        dlogits: Tensor,
        scale: Tensor,
        rows: slice,
        grad_hidden: Tensor,
        grad_weight: Tensor | None,
        *,
        adds: bool,
    ) -> None:
        """As :meth:`project_back` of ``scale[:, None] * dlogits``; ``adds`` to what ``grad_weight`` holds."""
        if dlogits.dtype != self.hidden.dtype:
            assert not adds
            self.project_back(dlogits.mul_(scale[:, None]), rows, grad_hidden, grad_weight)
            return
        # Hidden states are smaller than logits.
        scale = scale[:, None]
        grad_hidden[rows] = product(dlogits, self.weight.t()).mul_(scale)
        self._add_to(grad_weight, dlogits, self.hidden[rows] * scale, first=rows.start == 0 and not adds)

    def _add_to(self, grad_weight: Tensor | None, dlogits: Tensor, hidden: Tensor, *, first: bool) -> None:
        if grad_weight is not None:
            grad_weight[: self.weight.shape[0]].addmm_(dlogits.t(), hidden, beta=0 if first else 1)


class _KnownGrad(torch.autograd.Function):
    """Log-probs whose gradient is known up to a factor before the forward: both are formed in one pass.

    ``logprob_grad`` [n] is dL/dlogprob up to a common factor that the backward reads off; no logits are kept and none
    are computed twice. With ``main_grad`` the factor is 1, and the weight's gradient is added there at once.
    """

    @staticmethod
    def forward(
        ctx: Context,
        hidden: Tensor,
        weight: Tensor,
        targets: Tensor,
        logprob_grad: Tensor,
        request: HeadRequest,
        main_grad: Tensor | None,
    ) -> Tensor:
        head = _Head(hidden, weight, targets, request)
        logprobs = torch.empty(hidden.shape[0], dtype=head.dtype, device=hidden.device)
        grad_hidden = torch.empty_like(hidden)
        needed = ctx.needs_input_grad[1]
        grad_weight = head.new_grad_weight(weight, needed=needed) if main_grad is None else main_grad
        for rows in head.rows():
            z = head.project(rows)
            local, owned = head.target(rows)
            at_target = head.at_target(z, local, owned)
            p, lse = head.softmax_(z)
            logprobs[rows] = at_target - lse
            head.add_at_targets(p, local, -owned.to(head.dtype))
            scale = -logprob_grad[rows].to(head.dtype)
            head.project_scaled(p, scale, rows, grad_hidden, grad_weight, adds=main_grad is not None)
        ctx.save_for_backward(logprob_grad)
        # Buffers, not graph tensors: the backward hands them out, so nothing may hold them for a second backward.
        ctx.grads, ctx.is_gathered = (grad_hidden, grad_weight), main_grad is not None
        return logprobs

    @staticmethod
    def backward(ctx: Context, grad: Tensor) -> tuple[Tensor | None, ...]:
        (logprob_grad,) = ctx.saved_tensors
        logprob_grad = logprob_grad.to(grad.dtype)
        size = (logprob_grad * logprob_grad).sum()
        factor = (grad * logprob_grad).sum() / size.clamp(min=torch.finfo(size.dtype).tiny)
        off = (grad - factor * logprob_grad).square().sum()
        if off > 1e-8 * factor.square() * size:
            raise RuntimeError("the objective's logprob_grad() is not its gradient by the log-probs")
        grad_hidden, grad_weight = ctx.grads
        ctx.grads = None
        if ctx.is_gathered:
            if (factor - 1).abs() > 1e-4 and size > 0:
                raise RuntimeError(f"the loss is {factor.item():g} times the scale that the head was given")
            return grad_hidden, *[None] * 5
        grad_weight = None if grad_weight is None else grad_weight.mul_(factor)
        return grad_hidden.mul_(factor.to(grad_hidden.dtype)), grad_weight, *[None] * 4


class _Outputs(torch.autograd.Function):
    """Log-probs, entropy and top-k with any gradient; the backward reads kept logits or recomputes them."""

    @staticmethod
    def forward(
        ctx: Context, hidden: Tensor, weight: Tensor, targets: Tensor, request: HeadRequest
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        head = _Head(hidden, weight, targets, request)
        n, k = hidden.shape[0], request.top_k if request.ids is None else request.ids.shape[1]
        new = {"dtype": head.dtype, "device": hidden.device}
        logprobs, lse = torch.empty(n, **new), torch.empty(n, **new)
        entropy = torch.empty(n if request.entropy else 0, **new)
        topk = torch.empty(n, k, **new)
        ids = (
            torch.empty(n, k, dtype=torch.int64, device=hidden.device) if request.ids is None else request.ids
        )
        kept: list[Tensor] = []
        for chunk in head.chunks():
            logprobs[chunk.rows], lse[chunk.rows] = head.logprobs(chunk), chunk.lse
            if request.entropy:
                entropy[chunk.rows] = head.entropy(chunk)
            if request.ids is not None:
                topk[chunk.rows] = head.at_ids(chunk, ids[chunk.rows])
            elif k:
                topk[chunk.rows], ids[chunk.rows] = head.topk(chunk, k)
            if any(ctx.needs_input_grad) and head.logits_bytes <= request.kept_logits_bytes:
                kept.append(chunk.raw)
        ctx.request, ctx.kept = request, kept
        ctx.save_for_backward(hidden, weight, targets, lse, entropy, ids)
        ctx.mark_non_differentiable(ids)
        return logprobs, entropy, topk, ids

    @staticmethod
    def backward(
        ctx: Context, grad_logprobs: Tensor, grad_entropy: Tensor, grad_topk: Tensor, _: Tensor
    ) -> tuple[Tensor | None, ...]:
        hidden, weight, targets, lse, entropy, ids = ctx.saved_tensors
        head = _Head(hidden, weight, targets, ctx.request)
        grad_hidden = torch.empty_like(hidden)
        grad_weight = head.new_grad_weight(weight, needed=ctx.needs_input_grad[1])
        scratch = head.scratch()
        for i, rows in enumerate(head.rows()):
            raw = ctx.kept[i] if ctx.kept else head.project(rows)
            local, owned = head.target(rows)
            with torch.enable_grad():
                z = head.transformed(raw.requires_grad_(head.request.transform is not None), rows)
            logp = z.detach().sub_(lse[rows][:, None])
            dlogits = torch.exp(logp, out=scratch[: z.shape[0]])
            towards = -(grad_logprobs[rows] + grad_topk[rows].sum(1))[:, None]
            if ctx.request.entropy:
                towards = towards - grad_entropy[rows][:, None] * logp.add_(entropy[rows][:, None])
            dlogits.mul_(towards)
            head.add_at_targets(dlogits, local, grad_logprobs[rows].where(owned, 0))
            if ids.shape[1] and dlogits.shape[1]:
                column = ids[rows] - head.first
                here = (column >= 0) & (column < dlogits.shape[1])
                dlogits.scatter_add_(1, column.where(here, 0), grad_topk[rows].where(here, 0))
            if z is not raw:
                (dlogits,) = torch.autograd.grad(z, raw, dlogits)
            head.project_back(dlogits, rows, grad_hidden, grad_weight)
        ctx.kept = None
        return grad_hidden, grad_weight, None, None


def head_outputs(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    request: HeadRequest,
    logprob_grad: Tensor | None = None,
    main_grad: Tensor | None = None,
) -> HeadOutput:
    """The outputs of the head for ``targets``, from the last hidden states.

    Args:
        hidden: [n, H]; the gradient that comes back is this rank's part of a sum over tensor parallel ranks.
        weight: [rows per rank, H], this rank's slice of the padded vocabulary.
        targets: [n] int64, ids below ``request.vocab_size``.
        logprob_grad: [n], dL/dlogprob up to a common factor, where it is known beforehand; it buys the one-pass head
            where neither entropy nor top-k nor a transform is asked for.
        main_grad: [rows per rank, H], to which the one-pass head adds the weight's gradient in the forward, and which
            backward then leaves alone; ``logprob_grad`` is then the gradient itself.
    """
    wants_topk = bool(request.top_k) or request.ids is not None
    plain = not request.entropy and not wants_topk and request.transform is None
    if logprob_grad is not None and torch.is_grad_enabled() and plain:
        return HeadOutput(
            _KnownGrad.apply(hidden, weight, targets, logprob_grad, request, main_grad), None, None, None
        )
    logprobs, entropy, topk, ids = _Outputs.apply(hidden, weight, targets, request)
    return HeadOutput(
        logprobs,
        entropy if request.entropy else None,
        topk if wants_topk else None,
        ids if wants_topk else None,
    )
