# SPDX-License-Identifier: Apache-2.0
"""Files of pairs and of labeled responses: both layouts of pairs, labels, and what is said of bad lines."""

import math

import pytest

from nemo_aligner.data.text_rows import Labels, open_labeled, open_pairs
from nemo_aligner.errors import UserError

TUTORIAL = [
    {"text": "User: What is 6*10?\nAssistant: 60"},
    {"text": "User: What is 6*10?\nAssistant: 90"},
    {"text": "User: Hi\nAssistant: Hello"},
    {"text": "User: Hi\nAssistant: Go away"},
]
ROWS = [
    {"prompt": "User: What is 6*10?\nAssistant:", "chosen": " 60", "rejected": " 90", "source": "x"},
    {"prompt": "User: Hi\nAssistant:", "chosen": " Hello", "rejected": " Go away"},
]


@pytest.mark.parametrize("rows", [TUTORIAL, ROWS])
def test_both_layouts_hold_the_same_pairs(jsonl, rows):
    pairs = open_pairs(jsonl(*rows))
    assert [pairs[i].texts for i in range(len(pairs))] == [
        (TUTORIAL[i]["text"], TUTORIAL[i + 1]["text"]) for i in (0, 2)
    ]
    assert pairs[0].prompt == ("" if rows is TUTORIAL else ROWS[0]["prompt"])
    assert pairs[0].extras == rows[0]


def test_the_names_of_nemo_s_preference_data_are_read(jsonl):
    row = {"prompt": "Hi", "chosen_response": " Hello", "rejected_response": " Go", "chosen_reward": 2}
    pairs = open_pairs(jsonl(row))
    assert (pairs[0].prompt, pairs[0].responses) == ("Hi", (" Hello", " Go"))
    assert pairs[0].extras["chosen_reward"] == 2


@pytest.mark.parametrize("rows", [TUTORIAL[:2], [ROWS[0]]])
def test_given_rewards_are_the_rows_or_the_usual_ones(jsonl, rows):
    path = jsonl(*rows)
    assert open_pairs(path)[0].rewards == (1.0, 0.0)
    assert open_pairs(path, default_rewards=(3.0, 0.5))[0].rewards == (3.0, 0.5)
    path = jsonl(*({**row, "chosen_reward": None, "rejected_reward": -2} for row in rows))
    assert open_pairs(path, default_rewards=(1.0, 0.0))[0].rewards == (1.0, -2.0)
    if len(rows) == 2:
        path = jsonl({**rows[0], "chosen_reward": 5}, {**rows[1], "rejected_reward": 3})
        assert open_pairs(path)[0].rewards == (5.0, 3.0)
    with pytest.raises(UserError, match=r"line 1: key 'chosen_reward' is 1e\+39"):
        open_pairs(jsonl(*({**row, "chosen_reward": 1e39} for row in rows)))
    path = jsonl(*({**row, "chosen_reward": "much"} for row in rows))
    with pytest.raises(UserError, match=r"line 1: key 'chosen_reward' is much"):
        open_pairs(path, default_rewards=(1.0, 0.0))


def test_a_pair_is_found_by_the_number_of_its_line(jsonl):
    path = jsonl(TUTORIAL[0], "", TUTORIAL[1], TUTORIAL[2], "", "", TUTORIAL[3])
    pairs = open_pairs(path)
    assert [pairs.where(i) for i in range(2)] == [f"{path}, line 1", f"{path}, line 4"]


@pytest.mark.parametrize(
    ("rows", "line", "problem", "fix"),
    [
        (TUTORIAL[:3], 3, "two lines make a pair, and the last of 3 has no other", "add the other response"),
        (TUTORIAL[:1], 1, "two lines make a pair", "add the other response"),
        ([*TUTORIAL[:2], ROWS[0]], 3, "has \\['chosen', 'prompt', .* unlike the file's first", "not both"),
        ([*ROWS, TUTORIAL[0]], 3, "the row has \\['text'\\], unlike the file's first", "not both"),
        ([TUTORIAL[0], {"txt": "a"}], 2, "no pair and no text; it has \\['txt'\\]", "alternate lines"),
        ([{"chosen": "a", "rejected": "b"}], 1, "'prompt' is missing", "anthropic_hh"),
        ([{"prompt": "a", "chosen": "b"}], 1, "no pair and no text", "rejected"),
        ([{"text": 5}], 1, "key 'text' has the value 5", "a string"),
        ([{**ROWS[0], "rejected": None}], 1, "key 'rejected' has the value null", "a string"),
        (["{broken"], 1, "not JSON", "one whole JSON object"),
    ],
)
def test_bad_pairs_name_their_line(jsonl, rows, line, problem, fix):
    path = jsonl(*rows)
    with pytest.raises(UserError, match=problem) as caught:
        open_pairs(path)
    assert caught.value.problem.startswith(f"{path}, line {line}: ")
    assert fix in caught.value.fix


def test_labels(jsonl):
    path = jsonl({"text": "a", "label": [4, -100, 0.5]}, {"text": "b", "label": [-100, -100, 1]})
    labeled = open_labeled(path, labels=Labels(num_attributes=3, missing=-100))
    assert labeled[0].texts == ("a",)
    for row, expected in ((0, (4.0, math.nan, 0.5)), (1, (math.nan, math.nan, 1.0))):
        assert labeled[row].labels[0] == pytest.approx(expected, nan_ok=True)


@pytest.mark.parametrize(
    ("row", "problem"),
    [
        ({"text": "a"}, "key 'label' is missing"),
        ({"label": [1, 2]}, "key 'text' is missing"),
        ({"text": "a", "label": 3}, "key 'label' is 3"),
        ({"text": "a", "label": []}, "key 'label' is \\[\\]"),
        ({"text": "a", "label": [1, None]}, "key 'label' is \\[1, null\\]"),
        ({"text": "a", "label": [1, True]}, "key 'label' is \\[1, true\\]"),
        ('{"text": "a", "label": [1, NaN]}', "key 'label' is \\[1, NaN\\]"),
        ({"text": "a", "label": [1]}, "has 1 numbers, but model.regression.num_attributes=2"),
        ({"text": "a", "label": [1, 2, 3]}, "has 3 numbers"),
        ({"text": "a", "label": [-100, -100.0]}, "every number of key 'label' is -100"),
    ],
)
def test_bad_labels_name_their_line(jsonl, row, problem):
    path = jsonl({"text": "good", "label": [1, 2]}, row)
    with pytest.raises(UserError, match=problem) as caught:
        open_labeled(path, labels=Labels(num_attributes=2, missing=-100))
    assert caught.value.problem.startswith(f"{path}, line 2: ")


def test_two_labeled_responses_make_a_pair(jsonl):
    rows = [{"text": text, "label": [k, -100]} for text, k in (("a", -2), ("b", -2), ("c", 1), ("d", 1))]
    pairs = open_labeled(jsonl(*rows), labels=Labels(num_attributes=2, missing=-100, paired=True))
    assert len(pairs) == 2
    assert pairs[1].texts == ("c", "d")
    assert [pair.labels[0][0] for pair in (pairs[0], pairs[1])] == [-2, 1]


@pytest.mark.parametrize("labels", [([-2, 0], [2, 0]), ([-100, 1], [-100, 1])])
def test_a_pair_has_one_preference(jsonl, labels):
    rows = ({"text": "a", "label": label} for label in labels)
    pairs = open_labeled(jsonl(*rows), labels=Labels(num_attributes=2, missing=-100, paired=True))
    with pytest.raises(UserError, match="the first numbers of the labels of a pair are") as caught:
        pairs[0]
    assert "below 0 if the first is better" in caught.value.fix


def test_the_fingerprint_changes_with_the_rows(jsonl):
    prints = {
        open_pairs(jsonl(*rows, name=f"{i}.jsonl")).fingerprint
        for i, rows in enumerate((TUTORIAL, TUTORIAL[2:], ROWS))
    }
    assert len(prints) == 3
