# SPDX-License-Identifier: Apache-2.0
"""The chunked head on one rank against the plain form: values, gradients, padding, and what it never makes."""

from collections.abc import Iterator
from dataclasses import replace

import psutil
import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from nemo_aligner.parallel import world
from nemo_aligner.parallel.cpu_speed import product
from nemo_aligner.parallel.vocab import HeadOutput, HeadRequest, head_outputs

N, HIDDEN, VOCAB, PADDED, K = 40, 6, 11, 16, 3
POISON = 1e4  # in the padding rows of the weight: were they seen, they would win


@pytest.fixture(scope="module", autouse=True)
def one_rank() -> Iterator[None]:
    with world.ensure_single_process():
        yield


def inputs(n: int = N, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor, Tensor]:
    """hidden [n, H], weight [PADDED, H] with poisoned padding, targets [n]."""
    draw = torch.Generator().manual_seed(n)
    hidden = torch.randn(n, HIDDEN, generator=draw, dtype=torch.float64)
    weight = torch.randn(PADDED, HIDDEN, generator=draw, dtype=torch.float64)
    weight[VOCAB:] = POISON
    targets = torch.randint(0, VOCAB, (n,), generator=draw)
    return hidden.to(dtype).requires_grad_(), weight.to(dtype).requires_grad_(), targets


def request(*, rows: int = 1000, kept: bool = True, entropy: bool = True, top_k: int = K) -> HeadRequest:
    """In chunks of ``rows`` rows, which are 16 at least."""
    return HeadRequest(
        vocab_size=VOCAB,
        entropy=entropy,
        top_k=top_k,
        kept_logits_bytes=1 << 30 if kept else 0,
        chunk_bytes=rows * PADDED * 8,
    )


def plain(hidden: Tensor, weight: Tensor, targets: Tensor) -> HeadOutput:
    """The same by torch alone, with all logits at once."""
    logp = (hidden @ weight[:VOCAB].t()).log_softmax(-1)
    best, ids = logp.topk(K, dim=-1)
    return HeadOutput(logp.gather(1, targets[:, None])[:, 0], -(logp.exp() * logp).sum(-1), best, ids)


def gradients(out: HeadOutput, hidden: Tensor, weight: Tensor) -> tuple[Tensor, ...]:
    """Of a loss in which every output has a weight of its own."""
    draw = torch.Generator().manual_seed(1)
    loss = out.logprobs.new_zeros(())
    for x in (out.logprobs, out.entropy, out.topk_logprobs):
        if x is not None:
            loss = loss + (x * torch.randn(x.shape, generator=draw, dtype=x.dtype)).sum()
    return torch.autograd.grad(loss, (hidden, weight))


@pytest.mark.parametrize("kept", [True, False], ids=["kept", "recomputed"])
@pytest.mark.parametrize("rows", [16, 17, 39, 40, 1000])
def test_values_and_gradients_are_the_plain_ones(rows: int, kept: bool):
    hidden, weight, targets = inputs()
    found = head_outputs(hidden, weight, targets, request=request(rows=rows, kept=kept))
    expected = plain(hidden, weight, targets)
    assert torch.equal(found.topk_ids, expected.topk_ids)
    for name in ("logprobs", "entropy", "topk_logprobs"):
        torch.testing.assert_close(getattr(found, name), getattr(expected, name), rtol=1e-12, atol=1e-12)
    for ours, theirs in zip(
        gradients(found, hidden, weight), gradients(expected, hidden, weight), strict=True
    ):
        torch.testing.assert_close(ours, theirs, rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("kept", [True, False], ids=["kept", "recomputed"])
def test_log_probs_of_given_tokens(kept: bool):
    """Some of them the target, and none of them the most likely."""
    hidden, weight, targets = inputs()
    ids = torch.stack([(targets + step) % VOCAB for step in (0, 3, 8)], dim=1)
    asked = replace(request(rows=16, kept=kept, entropy=False, top_k=0), ids=ids)
    found = head_outputs(hidden, weight, targets, request=asked)
    logp = (hidden @ weight[:VOCAB].t()).log_softmax(-1)
    expected = HeadOutput(logp.gather(1, targets[:, None])[:, 0], None, logp.gather(1, ids), ids)
    torch.testing.assert_close(found.topk_logprobs, expected.topk_logprobs, rtol=1e-12, atol=1e-12)
    for ours, theirs in zip(
        gradients(found, hidden, weight), gradients(expected, hidden, weight), strict=True
    ):
        torch.testing.assert_close(ours, theirs, rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("kept", [True, False], ids=["kept", "recomputed"])
@pytest.mark.parametrize("field", ["logprobs", "entropy", "topk_logprobs"])
def test_gradcheck(field: str, kept: bool):
    hidden, weight, targets = inputs(19)
    weight = weight.detach()[:VOCAB].requires_grad_()

    def output(hidden: Tensor, weight: Tensor) -> Tensor:
        asked = request(rows=16, kept=kept)
        return getattr(head_outputs(hidden, weight, targets, request=asked), field)

    assert torch.autograd.gradcheck(output, (hidden, weight))


def test_only_what_was_asked_for_is_made():
    hidden, weight, targets = inputs()
    found = head_outputs(hidden, weight, targets, request=request(entropy=False, top_k=0))
    assert (found.entropy, found.topk_logprobs, found.topk_ids) == (None, None, None)
    expected = plain(hidden, weight, targets)
    alone = HeadOutput(expected.logprobs, None, None, None)
    torch.testing.assert_close(gradients(found, hidden, weight), gradients(alone, hidden, weight))


@pytest.mark.parametrize("rows", [16, 1000])
@pytest.mark.parametrize("factor", [1.0, -0.25, 65536.0])
def test_one_pass_is_autograd(rows: int, factor: float):
    """Weights as uneven as a weighted loss has them, some of them 0, and any factor in front of the loss."""
    hidden, weight, targets = inputs()
    weights = torch.randn(N, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    weights[::5] = 0
    asked = request(rows=rows, entropy=False, top_k=0)
    found = head_outputs(hidden, weight, targets, request=asked, logprob_grad=weights).logprobs
    expected = plain(hidden, weight, targets).logprobs
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)
    for ours, theirs in zip(
        torch.autograd.grad(factor * (found * weights).sum(), (hidden, weight)),
        torch.autograd.grad(factor * (expected * weights).sum(), (hidden, weight)),
        strict=True,
    ):
        torch.testing.assert_close(ours, theirs, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("rows", [16, 1000])
def test_one_pass_adds_to_a_buffer(rows: int):
    hidden, weight, targets = inputs()
    weights = torch.randn(N, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    before = torch.randn(weight.shape, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    gathered, asked = before.clone(), request(rows=rows, entropy=False, top_k=0)
    found = head_outputs(
        hidden, weight, targets, request=asked, logprob_grad=weights, main_grad=gathered
    ).logprobs
    loss = (found * weights).sum()
    grad_hidden, grad_weight = torch.autograd.grad(loss, (hidden, weight), allow_unused=True)
    assert grad_weight is None
    expected = (plain(hidden, weight, targets).logprobs * weights).sum()
    exact_hidden, exact_weight = torch.autograd.grad(expected, (hidden, weight))
    torch.testing.assert_close(grad_hidden, exact_hidden, rtol=1e-11, atol=1e-11)
    torch.testing.assert_close(gathered, before + exact_weight, rtol=1e-11, atol=1e-11)


def test_a_buffer_is_given_the_gradient_itself():
    hidden, weight, targets = inputs()
    weights, asked = torch.ones(N, dtype=torch.float64), request(entropy=False, top_k=0)
    gathered = torch.zeros_like(weight)
    out = head_outputs(
        hidden, weight, targets, request=asked, logprob_grad=weights, main_grad=gathered
    ).logprobs
    with pytest.raises(RuntimeError, match="the loss is 2 times the scale that the head was given"):
        (2 * out).sum().backward()


def test_one_pass_with_nothing_to_learn_gives_no_gradient():
    hidden, weight, targets = inputs()
    weights = torch.zeros(N)
    asked = request(entropy=False, top_k=0)
    out = head_outputs(hidden, weight, targets, request=asked, logprob_grad=weights).logprobs
    for gradient in torch.autograd.grad((out * weights).sum(), (hidden, weight)):
        assert not gradient.any()


@pytest.mark.parametrize("changed", ["one sign", "one token more", "all but in proportion"])
def test_weights_that_are_not_the_gradient_are_refused(changed: str):
    hidden, weight, targets = inputs()
    weights = -torch.ones(N, dtype=torch.float64)
    weights[:4] = 0
    used = weights.clone()
    match changed:
        case "one sign":
            used[9] = 1
        case "one token more":
            used[0] = -1
        case "all but in proportion":
            used *= torch.linspace(1, 1.01, N, dtype=torch.float64)
    asked = request(entropy=False, top_k=0)
    out = head_outputs(hidden, weight, targets, request=asked, logprob_grad=weights).logprobs
    with pytest.raises(RuntimeError, match=r"logprob_grad\(\) is not its gradient"):
        (out * used).sum().backward()


def test_padded_ids_have_no_probability():
    hidden, weight, targets = inputs()
    everything = torch.arange(VOCAB).repeat(N)
    out = head_outputs(hidden.repeat_interleave(VOCAB, 0), weight, everything, request=request(top_k=VOCAB))
    torch.testing.assert_close(out.logprobs.exp().view(N, VOCAB).sum(1), torch.ones(N, dtype=torch.float64))
    assert int(out.topk_ids.max()) == VOCAB - 1
    assert torch.isfinite(out.topk_logprobs).all()
    (gradient,) = torch.autograd.grad(out.logprobs.sum() + out.entropy.sum(), weight)
    assert gradient[:VOCAB].any()
    assert not gradient[VOCAB:].any()
    asked = request(entropy=False, top_k=0)
    known = head_outputs(hidden, weight, targets, request=asked, logprob_grad=torch.ones(N)).logprobs
    (gradient,) = torch.autograd.grad(known.sum(), weight)
    assert not gradient[VOCAB:].any()


@pytest.mark.parametrize("known", [True, False])
def test_an_empty_selection(known: bool):
    hidden, weight, targets = inputs(0)
    asked = request(entropy=not known, top_k=0 if known else K)
    weights = torch.zeros(0) if known else None
    out = head_outputs(hidden, weight, targets, request=asked, logprob_grad=weights)
    assert out.logprobs.shape == (0,)
    if not known:
        assert (out.entropy.shape, out.topk_logprobs.shape, out.topk_ids.shape) == ((0,), (0, K), (0, K))
    grad_hidden, grad_weight = torch.autograd.grad(out.logprobs.sum(), (hidden, weight))
    assert grad_hidden.shape == (0, HIDDEN)
    assert not grad_weight.any()


@pytest.mark.parametrize("known", [True, False])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_finite_and_near(dtype: torch.dtype, known: bool):
    """Logits in the hundreds: a softmax that kept the stored precision would overflow."""
    hidden, weight, targets = inputs(dtype=dtype)
    with torch.no_grad():
        hidden *= 40
        weight[VOCAB:] = 100
    weights = -torch.ones(N) if known else None
    asked = request(entropy=not known, top_k=0 if known else K)
    out = head_outputs(hidden, weight, targets, request=asked, logprob_grad=weights)
    assert out.logprobs.dtype == torch.float32
    exact_hidden, exact_weight = (x.detach().double().requires_grad_() for x in (hidden, weight))
    exact = plain(exact_hidden, exact_weight, targets)
    # The logits themselves are rounded to the stored precision.
    logit_step = float((exact_hidden @ exact_weight[:VOCAB].t()).abs().max()) * torch.finfo(dtype).eps
    torch.testing.assert_close(out.logprobs.double(), exact.logprobs, rtol=0, atol=2 * logit_step)
    for gradient in torch.autograd.grad(-out.logprobs.sum(), (hidden, weight)):
        assert gradient.dtype == dtype
        assert torch.isfinite(gradient).all()


class _Largest(TorchDispatchMode):
    """Records the largest tensor that any operation returns."""

    def __init__(self) -> None:
        super().__init__()
        self.numel = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **kwargs or {})
        for x in torch.utils._pytree.tree_leaves(out):
            if isinstance(x, Tensor):
                self.numel = max(self.numel, x.numel())
        return out


@pytest.mark.parametrize("form", ["one pass", "recomputed"])
def test_tokens_by_vocabulary_never_exists(form: str):
    n, vocab, hidden_size, rows = 512, 640, 8, 16
    draw = torch.Generator().manual_seed(0)
    hidden = torch.randn(n, hidden_size, generator=draw).requires_grad_()
    weight = torch.randn(vocab, hidden_size, generator=draw).requires_grad_()
    targets = torch.randint(0, vocab, (n,), generator=draw)
    known = form == "one pass"
    asked = HeadRequest(
        vocab_size=vocab,
        entropy=not known,
        top_k=0 if known else K,
        kept_logits_bytes=0,
        chunk_bytes=rows * vocab * 4,
    )
    with _Largest() as largest:
        weights = -torch.ones(n) if known else None
        out = head_outputs(hidden, weight, targets, request=asked, logprob_grad=weights)
        (-out.logprobs.sum()).backward()
    assert largest.numel == rows * vocab
    with _Largest() as whole:
        (-(hidden @ weight.t()).log_softmax(-1).gather(1, targets[:, None]).sum()).backward()
    assert whole.numel == n * vocab


class _Products(TorchDispatchMode):
    """Counts matrix products."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.count += function.overloadpacket in (
            torch.ops.aten.mm,
            torch.ops.aten.addmm,
            torch.ops.aten.addmm_,
        )
        return function(*args, **kwargs or {})


@pytest.mark.parametrize(
    ("spare_bytes", "products"), [(0, 3), (-1, 4)], ids=["within the budget", "above the budget"]
)
def test_logits_are_kept_within_the_budget_alone(spare_bytes: int, products: int):
    """Three products a chunk, forward and backward, where its logits were kept; a fourth makes them again."""
    hidden, weight, targets = inputs()
    asked = replace(request(rows=16), kept_logits_bytes=N * PADDED * 8 + spare_bytes)
    with _Products() as found:
        head_outputs(hidden, weight, targets, request=asked).logprobs.sum().backward()
    assert found.count == products * 3


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("sizes", [(0, 8, 5), (3, 8, 0), (3, 0, 5), (70, 33, 129)], ids=str)
def test_products(sizes: tuple[int, int, int], dtype: torch.dtype):
    n, k, m = sizes
    draw = torch.Generator().manual_seed(0)
    x, weight = (torch.randn(rows, k, generator=draw).to(dtype) for rows in (n, m))
    exact = (x.double() @ weight.double().t()).to(dtype)
    strided = weight.t().contiguous().t()
    for found in (product(x, weight), product(x, strided)):
        torch.testing.assert_close(found, exact)


def test_products_of_many_shapes_leave_no_memory_behind():
    hidden, weight = torch.ones(128, 96), torch.ones(320, 96)
    process = psutil.Process()
    product(hidden, weight)
    before = process.memory_info().rss
    for rows in range(1, 129):
        assert product(hidden[:rows], weight).unique().tolist() == [96.0]
    assert process.memory_info().rss - before < 32 << 20


@pytest.mark.parametrize("known", [True, False])
def test_a_frozen_head_computes_no_weight_gradient(known: bool):
    hidden, weight, targets = inputs()
    given = torch.linspace(-1, 1, N, dtype=torch.float64)
    asked = request(rows=16, entropy=False, top_k=0)
    grads, products = [], []
    for trains in (True, False):
        head = weight.detach().requires_grad_(trains)
        with _Products() as found:
            weights = given if known else None
            out = head_outputs(hidden, head, targets, request=asked, logprob_grad=weights).logprobs
            grads += torch.autograd.grad((out * given).sum(), hidden)
        products.append(found.count)
    assert torch.equal(*grads)
    assert products == [3 * 3, 2 * 3]
