# SPDX-License-Identifier: Apache-2.0
"""Peak memory and time of the language model's head, forward and backward: chunked forms beside the plain one.

    python benchmarks/chunked_head.py --tokens 8192 --vocabulary 128256 --hidden 256

Every form runs in a process of its own, in fp32 on the CPU. Memory is what the process's peak grows by, beyond the
inputs. The plain form makes [tokens, vocabulary] whole, more than once: 12 GiB at the default sizes. Results go to
benchmarks/results/chunked_head.json too.
"""

import argparse
import json
import resource
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from nemo_aligner.parallel import world
from nemo_aligner.parallel.vocab import HeadRequest, head_outputs

RESULTS = Path(__file__).parent / "results" / "chunked_head.json"
Loss = Callable[[Tensor, Tensor, Tensor], Tensor]


def one_pass(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    """The gradient of each chunk is formed in its forward: what a weighted NLL gets."""
    request = HeadRequest(vocab_size=weight.shape[0])
    weights = torch.full(targets.shape, -1 / targets.numel())
    return -head_outputs(hidden, weight, targets, request=request, weights=weights).logprobs.mean()


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


def measure(loss_of: Loss, *, tokens: int, vocabulary: int, hidden: int) -> dict[str, float]:
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


def in_own_process(form: str, sizes: list[str]) -> dict[str, float]:
    """:func:`measure` of ``form`` in a fresh process."""
    command = [sys.executable, __file__, "--form", form, *sizes]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=False)
    if done.returncode:
        sys.exit(
            f"the form '{form}' ended with code {done.returncode}; -9 is out of memory: try fewer --tokens"
        )
    return json.loads(done.stdout.splitlines()[-1])


def main() -> None:
    """Measure all forms, print a line per figure, write the JSON."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--tokens", type=int, default=8192, help="rows of the head [8192]")
    parser.add_argument(
        "--vocabulary", type=int, default=128256, help="columns of the head [128256, Llama 3's]"
    )
    parser.add_argument("--hidden", type=int, default=256, help="hidden size [256]")
    parser.add_argument("--form", choices=FORMS, help="measure one form in this process and print its JSON")
    options = parser.parse_args()
    sizes = {"tokens": options.tokens, "vocabulary": options.vocabulary, "hidden": options.hidden}
    if options.form:
        print(json.dumps(measure(FORMS[options.form], **sizes)))
        return
    print(
        ", ".join(f"{name} {size}" for name, size in sizes.items()),
        f"threads {torch.get_num_threads()}",
        sep=", ",
    )
    flags = [word for name, size in sizes.items() for word in (f"--{name}", str(size))]
    figures = {}
    for form in FORMS:
        figures[form] = found = in_own_process(form, flags)
        print(f"{form}: peak memory {found['peak_bytes'] / 2**20:.0f} MiB")
        print(f"{form}: time {found['seconds']:.2f} s", flush=True)
    for name in ("loss", "grad_norm_hidden", "grad_norm_weight"):
        values = [found[name] for found in figures.values()]
        print(
            f"{name}: {values[0]:.6g}, largest relative difference {(max(values) - min(values)) / values[0]:.1e}"
        )
    RESULTS.parent.mkdir(exist_ok=True)
    RESULTS.write_text(
        json.dumps(sizes | {"threads": torch.get_num_threads(), "forms": figures}, indent=2) + "\n"
    )
    print(f"written to {RESULTS}")


if __name__ == "__main__":
    main()
