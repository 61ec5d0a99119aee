# SPDX-License-Identifier: Apache-2.0
"""Attention of one token on the cache is softmax attention on the keys that its row has, whatever else lies there."""

from collections.abc import Sequence

import pytest
import torch
from torch import Tensor

from nemo_aligner.models.gpt.kv_cache import KVCache
from nemo_aligner.parallel.cpu_speed import HUGE_BYTES

CPU = torch.device("cpu")


def cache(slots: int, groups: int, size: int, *, window: int | None = None, dtype: torch.dtype) -> KVCache:
    return KVCache(
        slots=slots, layers=2, groups=groups, head_dim=size, window=window, dtype=dtype, device=CPU
    )


def expected(texts: Sequence[Tensor], queries: int, window: int | None) -> Tensor:
    """[n, G * R * D] for the last tokens of texts [T, G, R + 2, D], in float64."""
    rows = []
    for text in texts:
        seen = text.double() if window is None else text[-window:].double()
        query, key, value = seen[-1, :, :queries], seen[:, :, queries], seen[:, :, queries + 1]
        weights = (torch.einsum("grd,tgd->grt", query, key) * text.shape[-1] ** -0.5).softmax(-1)
        rows.append(torch.einsum("grt,tgd->grd", weights, value).flatten())
    return torch.stack(rows)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(("groups", "queries", "window"), [(2, 2, None), (3, 1, None), (1, 5, 7)])
def test_a_step_attends_to_its_rows_own_keys(
    groups: int, queries: int, window: int | None, dtype: torch.dtype
):
    """Through growth, a slot that is filled again, and one that is dropped."""
    draw = torch.Generator().manual_seed(0)

    def some(*shape: int) -> Tensor:
        return torch.randn(*shape, groups, queries + 2, 4, generator=draw, dtype=dtype)

    kept = cache(3, groups, 4, window=window, dtype=dtype)
    texts = [some(60), some(9), some(20)]

    def fill(slots: Sequence[int]) -> None:
        lengths = [len(texts[slot]) for slot in slots]
        for slot in slots:
            kept.cut(slot, 0)
        kept.begin_append(slots, lengths)
        for layer in range(2):
            padded = torch.nn.utils.rnn.pad_sequence([texts[slot] for slot in slots], batch_first=True)
            kept.append(layer, padded + layer)

    def step() -> None:
        new = some(len(texts))
        assert kept.begin_step().tolist() == [len(text) for text in texts]
        texts[:] = [torch.cat((text, one[None])) for text, one in zip(texts, new, strict=True)]
        for layer in range(2):
            found = kept.step(layer, new + layer)
            torch.testing.assert_close(
                found.double(), expected([t + layer for t in texts], queries, window), rtol=1e-5, atol=1e-5
            )
        kept.end_step([True] * len(texts))

    fill([0, 1, 2])
    for _ in range(8):
        step()
    texts[0] = some(5)
    fill([0])
    step()
    kept.keep([2, 0])
    texts[:] = [texts[2], texts[0]]
    step()


@pytest.mark.parametrize("window", [None, 7])
@pytest.mark.parametrize("starts", [(6, 6), (3, 11)])
def test_a_text_is_put_behind_what_a_slot_holds(starts: tuple[int, int], window: int | None):
    """Each of its tokens attends to those before it, at whatever place its slot stands; a copy holds the same."""
    draw = torch.Generator().manual_seed(0)
    texts = [torch.randn(start + 5, 2, 4, 4, generator=draw) for start in starts]
    kept = cache(3, 2, 4, window=window, dtype=torch.float32)
    for slot, (text, start) in enumerate(zip(texts, starts, strict=True)):
        kept.begin_append([slot], [start])
        kept.append(0, text[None, :start])
    kept.copy(0, 2, starts[0])
    positions = kept.begin_append([1, 2], [5, 3])
    assert positions.tolist() == [
        [starts[1] + i for i in range(5)],
        [starts[0] + min(i, 2) for i in range(5)],
    ]
    found = kept.append(0, torch.stack((texts[1][starts[1] :], texts[0][starts[0] :])))
    for row, (text, start, count) in enumerate(((texts[1], starts[1], 5), (texts[0], starts[0], 3))):
        for i in range(count):
            wanted = expected([text[: start + i + 1]], 2, window)[0]
            torch.testing.assert_close(found[row, i].double(), wanted, rtol=1e-5, atol=1e-5)
    assert kept.lengths == [starts[0], starts[1] + 5, starts[0] + 3]


def test_a_large_cache_begins_with_zeros_and_keeps_what_it_is_given():
    kept = cache(8, 2, 64, dtype=torch.float32)
    text = torch.randn(8, 1100, 2, 3, 64)
    kept.begin_append(range(8), [1100] * 8)
    kept.append(0, text)
    assert kept.capacity * 8 * 2 * 64 * 4 > HUGE_BYTES
    kept.begin_step()
    new = torch.randn(8, 2, 3, 64)
    whole = torch.cat((text, new[:, None]), 1)
    torch.testing.assert_close(
        kept.step(0, new).double(), expected(list(whole), 1, None), rtol=1e-4, atol=1e-5
    )
    # The other layer was not filled: zeros, each as likely as the new token's key is.
    found = kept.step(1, torch.cat((torch.zeros(8, 2, 2, 64), new[:, :, 2:]), 2))
    torch.testing.assert_close(found, new[:, :, 2].flatten(1) / 1101)
