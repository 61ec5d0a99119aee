# SPDX-License-Identifier: Apache-2.0
"""How a sample is shown."""

import pytest

from nemo_aligner.data.sample import Sample, describe


@pytest.mark.parametrize("name", ["bpe", "llama_like", "spm"])
def test_learned_tokens_are_marked(request, name):
    tokenizer = request.getfixturevalue(name)
    prompt, answer = tokenizer.encode("camels use"), tokenizer.encode("camels use fat")
    answer = answer[len(prompt) :]
    sample = Sample(
        tokens=prompt + answer, mask=[False] * len(prompt) + [True] * len(answer), truncated=False
    )
    assert describe(sample, tokenizer) == "camels use⟦ fat⟧"


def test_long_runs_are_shortened(bpe):
    tokens = bpe.encode("1" * 5000)
    shown = describe(Sample(tokens=tokens, mask=[False] * 5000, truncated=False), bpe)
    assert shown == "1" * 500 + " [... 4000 characters ...] " + "1" * 500
