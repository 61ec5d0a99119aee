# SPDX-License-Identifier: Apache-2.0
"""Responses that are good or bad, each by itself, in the forms that data sets have."""

import pytest

from nemo_aligner.data.rated_rows import check_first_rated, open_rated
from nemo_aligner.data.tokenizer import load_tokenizer
from nemo_aligner.errors import UserError
from tests.unit.data.conftest import CHATML


@pytest.fixture(scope="module")
def tokenizer(make_hf):
    return load_tokenizer("huggingface", make_hf(chat_template=CHATML, eos_token="<|im_end|>", adds_bos=True))


@pytest.mark.parametrize(
    ("row", "reward"),
    [
        ({"response": " b", "label": True}, 1.0),
        ({"completion": " b", "label": False}, 0.0),
        ({"response": " b", "preference": "chosen"}, 1.0),
        ({"response": " b", "preference": "rejected"}, 0.0),
        ({"response": " b", "reward": -0.5}, -0.5),
    ],
)
def test_texts(jsonl, row, reward):
    path = jsonl({"prompt": "a", **row})
    (found,) = list(open_rated(path))
    assert (found.prompt, found.responses, found.rewards) == ("a", (" b",), (reward,))
    check_first_rated(path, most=20)


ASKED = [{"role": "user", "content": "2 + 2?"}]
ANSWER = [{"role": "assistant", "content": "4"}]


@pytest.mark.parametrize(
    "row",
    [
        {"prompt": ASKED, "completion": ANSWER},
        {"prompt": ASKED, "response": "4"},
        {"prompt": "2 + 2?", "response": ANSWER},
        {"messages": [*ASKED, *ANSWER]},
    ],
)
def test_messages_are_laid_out_by_the_template(jsonl, tokenizer, row):
    (found,) = list(open_rated(jsonl({**row, "label": True}), tokenizer))
    assert found.rendered
    assert "2 + 2?" in found.prompt
    assert found.responses[0].startswith("4")


@pytest.mark.parametrize(
    ("row", "problem"),
    [
        ({"response": "b"}, "no key says if the response is good: "),
        ({"response": "b", "label": 1}, "key 'label' is 1"),
        ({"response": "b", "preference": "Chosen"}, "key 'preference' is Chosen"),
        ({"response": "b", "reward": True}, "key 'reward' is true"),
        ({"response": "b", "reward": "high"}, "key 'reward' is high"),
        ({"response": "b", "label": True, "reward": 1}, "the row has 'label' and 'reward'"),
        ({"label": True}, "key 'response' is missing"),
        ({"response": "", "label": True}, "key 'response' is empty"),
        ({"prompt": "", "response": "b", "label": True}, "key 'prompt' is empty"),
        ({"response": "b", "label": True, "system": "Be brief."}, "key 'system' has the value"),
    ],
)
def test_bad_rows_are_refused_by_line_also_before_torch(jsonl, row, problem):
    path = jsonl({"prompt": "a", "response": "b", "label": True}, {"prompt": "a", **row})
    for read in (open_rated, lambda path: check_first_rated(path, most=20)):
        with pytest.raises(UserError) as caught:
            read(path)
        assert problem in caught.value.problem
        assert "line 2" in caught.value.problem


@pytest.mark.parametrize(
    ("row", "problem"),
    [
        ({"prompt": ASKED}, "key 'response' is missing"),
        ({"prompt": ASKED, "response": [*ASKED, *ANSWER]}, "key 'response' begins with the role 'user'"),
        ({"response": ANSWER}, "the last message has the role 'assistant'"),
        ({"messages": ASKED}, "the last message has the role 'user'"),
    ],
)
def test_bad_conversations_are_refused(jsonl, tokenizer, row, problem):
    with pytest.raises(UserError) as caught:
        open_rated(jsonl({**row, "label": True}), tokenizer)
    assert problem in caught.value.problem
