# SPDX-License-Identifier: Apache-2.0
"""Peak memory and time of the language model's head, forward and backward: chunked forms beside the plain one.

`python -m benchmarks.chunked_head --form plain` measures one form in this process, on the CPU in fp32;
`python -m benchmarks.run head` alternates them.
"""

import argparse
import importlib.metadata
import json
import resource
import time
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.figures import Figure, Part, ratio
from benchmarks.processes import THREADS, conditions, measure
from nemo_aligner.parallel import world
from nemo_aligner.parallel.vocab import HeadRequest, head_outputs

__all__ = ["part"]

REPEATS = 3
TOKENS, VOCABULARY, HIDDEN = 8192, 128256, 256  # the vocabulary is Llama 3's
Loss = Callable[[Tensor, Tensor, Tensor], Tensor]


def one_pass(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    """The gradient of each chunk is formed in its forward: what a weighted NLL gets."""
    request = HeadRequest(vocab_size=weight.shape[0])
    weights = torch.full(targets.shape, -1 / targets.numel())
    return -head_outputs(hidden, weight, targets, request=request, logprob_grad=weights).logprobs.mean()


def recomputed(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    """The backward makes each chunk's logits again: what any other loss gets above model.kept_logits_mib."""
    request = HeadRequest(vocab_size=weight.shape[0], kept_logits_bytes=0)
    return -head_outputs(hidden, weight, targets, request=request).logprobs.mean()


def plain(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    """Every logit at once, and torch's cross entropy."""
    return F.cross_entropy(hidden @ weight.t(), targets)


FORMS: dict[str, Loss] = {"one pass": one_pass, "recomputed": recomputed, "plain": plain}


def peak_bytes() -> int:
    """The most memory that this process has held, as the kernel counts it."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def forward_backward(loss_of: Loss, *, tokens: int, vocabulary: int, hidden: int) -> dict[str, float]:
    """One forward and backward in this process, after a small one that loads the kernels."""
    draw = torch.Generator().manual_seed(0)

    def inputs(tokens: int, vocabulary: int) -> tuple[Tensor, Tensor, Tensor]:
        states = torch.randn(tokens, hidden, generator=draw).requires_grad_()
        weight = torch.randn(vocabulary, hidden, generator=draw).mul_(hidden**-0.5).requires_grad_()
        return states, weight, torch.randint(0, vocabulary, (tokens,), generator=draw)

    with world.ensure_single_process():
        loss_of(*inputs(32, 512)).backward()
        states, weight, targets = inputs(tokens, vocabulary)
        before, start = peak_bytes(), time.perf_counter()
        loss = loss_of(states, weight, targets)
        loss.backward()
        seconds, peak = time.perf_counter() - start, peak_bytes() - before
    assert states.grad is not None
    assert weight.grad is not None
    return {
        "peak_bytes": peak,
        "seconds": seconds,
        "loss": loss.item(),
        "grad_norm_hidden": states.grad.norm().item(),
        "grad_norm_weight": weight.grad.norm().item(),
    }


def part() -> Part:
    """All forms in turn, several times over."""
    found: dict[str, list[dict[str, float]]] = {form: [] for form in FORMS}
    for repeat in range(REPEATS):
        for form, measured in found.items():
            one = json.loads(measure(["-m", "benchmarks.chunked_head", "--form", form]).splitlines()[-1])
            measured.append(one)
            print(f"head: repeat {repeat + 1} of {REPEATS}, {form}: {one['seconds']:.1f} s", flush=True)
    return Part(title="The head", about=ABOUT, conditions=_conditions(found), figures=_figures(found))


ABOUT = """\
The language model's head and its loss, forward and backward, on random hidden states in fp32. The plain form makes
[tokens, vocabulary] whole, more than once. The chunked ones never do: in one pass (the gradient of each chunk is
formed in its forward, which a weighted negative log-likelihood allows), or recomputed (the backward makes each
chunk's logits again: any other loss, above `model.kept_logits_mib`). Memory is what the process's peak grows by,
beyond the inputs.
"""


def _conditions(found: dict[str, list[dict[str, float]]]) -> dict[str, str]:
    agreement = {}
    for name in ("loss", "grad_norm_hidden", "grad_norm_weight"):
        values = [one[name] for measured in found.values() for one in measured]
        agreement[name] = (max(values) - min(values)) / max(values)
    return conditions() | {
        "torch": importlib.metadata.version("torch"),
        "repeats": str(REPEATS),
        "sizes": f"{TOKENS} tokens, vocabulary {VOCABULARY}, hidden {HIDDEN}",
        "largest relative difference between the forms": ", ".join(
            f"{name.replace('_', ' ')} {value:.0e}" for name, value in agreement.items()
        ),
    }


def _figures(found: dict[str, list[dict[str, float]]]) -> tuple[Figure, ...]:
    figures, ratios = [], []
    for metric, name, unit in (("seconds", "seconds", 1), ("peak memory in MiB", "peak_bytes", 1 << 20)):
        of = {
            form: Figure(
                table="Forms", subject=form, metric=metric, values=tuple(one[name] / unit for one in measured)
            )
            for form, measured in found.items()
        }
        figures += of.values()
        ratios += [
            ratio("Ratios", f"{form} / plain", figure, of["plain"])
            for form, figure in of.items()
            if form != "plain"
        ]
    return (*figures, *ratios)


def main() -> None:
    """Measure one form in this process and print its JSON."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--form", choices=FORMS, required=True, help="what to measure")
    parser.add_argument("--tokens", type=int, default=TOKENS, help=f"rows of the head [{TOKENS}]")
    parser.add_argument(
        "--vocabulary", type=int, default=VOCABULARY, help=f"columns of the head [{VOCABULARY}]"
    )
    parser.add_argument("--hidden", type=int, default=HIDDEN, help=f"hidden size [{HIDDEN}]")
    options = parser.parse_args()
    torch.set_num_threads(THREADS)
    sizes = {"tokens": options.tokens, "vocabulary": options.vocabulary, "hidden": options.hidden}
    print(json.dumps(forward_backward(FORMS[options.form], **sizes)))


if __name__ == "__main__":
    main()
