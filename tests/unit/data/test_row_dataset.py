# SPDX-License-Identifier: Apache-2.0
"""Data sets of labeled texts and prompts: what fits, what is left out and counted, and how files are joined."""

import json
import logging
import math
from functools import partial

import pytest

from nemo_aligner.data.config import PairDataConfig, PromptDataConfig
from nemo_aligner.data.datasets import open_prompt_rows, open_response_rows
from nemo_aligner.data.row import Row, TokenSequence
from nemo_aligner.data.text_rows import Labels, ResponseFiles, open_labeled, open_pairs
from nemo_aligner.data.tokenizer import load_tokenizer
from nemo_aligner.errors import UserError


def pair_rows(*texts):
    return [{"text": text} for pair in texts for text in pair]


def comparisons(prefix, tokenizer, *, max_length=100, split="train", generates=False, **settings):
    data = PairDataConfig(data_prefix=prefix, **settings)
    return open_response_rows(
        data,
        getattr(data.splits, split),
        tokenizer,
        files=ResponseFiles(open=open_pairs, unit="pairs"),
        max_length=max_length,
        generates=generates,
    )


def labeled_rows(data, tokenizer, *, max_length, **labels):
    return open_response_rows(
        data,
        data.splits.train,
        tokenizer,
        files=ResponseFiles(
            open=partial(open_labeled, labels=Labels(missing=-100, **labels)),
            unit="pairs" if labels.get("paired") else "rows",
        ),
        max_length=max_length,
    )


def tokens(row):
    return [sequence.tokens for sequence in row.sequences]


def judged_whole(ids):
    return TokenSequence(tokens=ids, loss_mask=[False] * (len(ids) - 1) + [True])


def by_name(path):
    return {"train": path if isinstance(path, list) else str(path), "validation": str(path)}


@pytest.mark.parametrize("append_eod", [False, True])
def test_texts_are_encoded_whole(jsonl, bpe, append_eod):
    pairs = comparisons(by_name(jsonl(*pair_rows(("camels use", "use camels")))), bpe, append_eod=append_eod)
    end = [bpe.eos_id] if append_eod else []
    assert len(pairs) == 1
    assert pairs[0].sequences == tuple(
        judged_whole([*bpe.encode(text), *end]) for text in ("camels use", "use camels")
    )


@pytest.mark.parametrize("append_eod", [False, True])
def test_a_pair_is_left_out_whole_and_counted_once(jsonl, bpe, caplog, append_eod):
    limit = 70
    room = limit - append_eod
    # Digits are one token each in the test's vocabulary.
    texts = [("1" * a, "2" * b) for a, b in ((room, room), (room + 1, 5), (5, room + 1), (5, 9), (500, 500))]
    assert [len(bpe.encode(text)) for text in texts[1]] == [room + 1, 5]
    path = jsonl(*pair_rows(*texts))
    with caplog.at_level(logging.INFO):
        pairs = comparisons(by_name(path), bpe, max_length=limit, append_eod=append_eod)
        lengths = [tuple(len(ids) - append_eod for ids in tokens(pairs[i])) for i in range(2)]
    assert lengths == [(room, room), (5, 9)]
    assert (len(pairs), pairs.num_dropped) == (2, 3)
    assert [record.getMessage() for record in caplog.records] == [
        f"{path}: 3 of 5 pairs have more than 70 tokens and are left out: line 3, line 5, line 9"
    ]


@pytest.mark.parametrize("name", ["bpe", "llama_like", "spm"])
def test_what_is_kept_is_what_a_look_at_each_row_keeps(request, jsonl, name):
    tokenizer = request.getfixturevalue(name)
    words = ["camels", "zq", "日本", "é", "1", " ", "ﷺ", "fat in their humps"]
    texts = [(words[i % 8] * (3 * i + 2), words[i % 7] * (2 * i + 3)) for i in range(60)]
    pairs = comparisons(by_name(jsonl(*pair_rows(*texts))), tokenizer, max_length=128, add_bos=False)
    expected = [
        (chosen, rejected)
        for chosen, rejected in texts
        if max(len(tokenizer.encode(chosen)), len(tokenizer.encode(rejected))) <= 128 and chosen != rejected
    ]
    assert 5 < len(expected) < 55
    assert [tokens(pairs[i]) for i in range(len(pairs))] == [
        [tokenizer.encode(chosen), tokenizer.encode(rejected)] for chosen, rejected in expected
    ]


def test_a_file_of_which_nothing_fits(jsonl, bpe):
    path = jsonl(*pair_rows(("1" * 20, "2")), *pair_rows(("1", "2" * 30)))
    with pytest.raises(
        UserError, match="has nothing to learn: of 2 pairs 2 have more than 10 tokens"
    ) as caught:
        comparisons(by_name(path), bpe, max_length=10, append_eod=True)
    assert "seq_length" in caught.value.fix


@pytest.mark.parametrize(("text", "tokens"), [("", 0), ("1", 1), ("</s>", 1)])
def test_a_text_too_short_to_be_judged_names_its_line(jsonl, bpe, text, tokens):
    path = jsonl(*pair_rows(("12", "34"), ("12", text)))
    with pytest.raises(UserError, match=f"line 3: a text has {tokens} tokens, and 2 are the fewest"):
        comparisons(by_name(path), bpe)


def test_files_without_weights_are_read_one_after_the_other(jsonl, bpe):
    files = [
        str(jsonl(*pair_rows(*[(f"1{i}{n}", "22") for n in range(size)]), name=f"{i}.jsonl"))
        for i, size in enumerate((3, 1, 2))
    ]
    pairs = comparisons({"train": files, "validation": files[0]}, bpe)
    shown = [bpe.decode(tokens(pairs[i])[0]) for i in range(len(pairs))]
    assert shown == ["100", "101", "102", "110", "120", "121"]
    assert pairs.blend == ()
    with pytest.raises(IndexError):
        pairs[6]


def test_weights_become_a_blend_of_what_fits(jsonl, bpe):
    first = str(jsonl(*pair_rows(("11", "22"), ("1" * 99, "22"), ("33", "44")), name="a.jsonl"))
    second = str(jsonl(*pair_rows(("55", "66")), name="b.jsonl"))
    pairs = comparisons({"train": [3, first, 1, second], "validation": first}, bpe, max_length=50)
    assert [(share.num_rows, share.weight) for share in pairs.blend] == [(2, 0.75), (1, 0.25)]
    assert pairs.num_dropped == 1
    assert len(pairs.fingerprint["rows"]) == 2


def test_one_list_is_cut_by_pairs_before_any_is_left_out(jsonl, bpe):
    texts = [("1" * (60 if i % 2 else 3), f"{i:02}") for i in range(20)]
    path = str(jsonl(*pair_rows(*texts)))
    names = {}
    for split in ("train", "validation", "test"):
        for limit in (50, 99):
            pairs = comparisons(path, bpe, split=split, splits_string="8/1/1", max_length=limit)
            names[split, limit] = [bpe.decode(tokens(pairs[i])[1]) for i in range(len(pairs))]
    assert names["train", 99] == [f"{i:02}" for i in range(16)]
    assert names["validation", 99] == ["16", "17"]
    assert names["test", 99] == ["18", "19"]
    for split in ("train", "validation", "test"):
        assert names[split, 50] == [name for name in names[split, 99] if int(name) % 2 == 0]


def test_a_split_without_rows_is_refused(jsonl, bpe):
    path = str(jsonl(*pair_rows(("11", "22"), ("33", "44"))))
    with pytest.raises(UserError, match="splits_string='98,1,1' leaves none of the 2 pairs of"):
        comparisons(path, bpe, split="validation", splits_string="98,1,1")


def test_the_fingerprint_follows_what_is_kept(jsonl, bpe):
    path = by_name(jsonl(*pair_rows(("11", "22"), ("1" * 80, "22"))))
    short, long, again = (comparisons(path, bpe, max_length=n).fingerprint for n in (50, 100, 99))
    assert short != long
    assert long == again
    assert json.loads(json.dumps(long)) == long


def judged(jsonl, rows):
    return jsonl(*({"text": text, "label": label} for text, label in rows))


def test_labels_follow_their_texts(jsonl, bpe):
    path = judged(jsonl, [("11", [1, -100]), ("2" * 80, [2, 2]), ("33", [-100, 3.5])])
    data = PairDataConfig(data_prefix=by_name(path), append_eod=True)
    rows = labeled_rows(data, bpe, max_length=50, num_attributes=2)
    assert [bpe.decode(rows[i].tokens) for i in range(len(rows))] == ["11</s>", "33</s>"]
    assert rows[0].labels[0] == pytest.approx((1.0, math.nan), nan_ok=True)
    assert rows[1].labels[0] == pytest.approx((math.nan, 3.5), nan_ok=True)
    assert rows.num_dropped == 1


def test_judged_pairs_are_left_out_whole(jsonl, bpe):
    path = judged(jsonl, [("11", [-1]), ("22", [-1]), ("33", [2]), ("4" * 80, [2]), ("55", [3]), ("66", [3])])
    data = PairDataConfig(data_prefix=by_name(path))
    pairs = labeled_rows(data, bpe, max_length=50, num_attributes=1, paired=True)
    shown = [
        (*map(bpe.decode, tokens(pair)), pair.labels[0]) for pair in (pairs[i] for i in range(len(pairs)))
    ]
    assert shown == [("11", "22", (-1.0,)), ("55", "66", (3.0,))]
    assert pairs.num_dropped == 1


def test_a_pair_of_unlike_preferences_names_its_line(jsonl, bpe):
    path = judged(jsonl, [("11", [-1]), ("22", [-1]), ("33", [2]), ("44", [1])])
    data = PairDataConfig(data_prefix=by_name(path))
    with pytest.raises(UserError, match="line 3: the first numbers of the labels of a pair are 2 and 1"):
        labeled_rows(data, bpe, max_length=9, num_attributes=1, paired=True)


def test_prompts_leave_room_for_a_response(jsonl, llama_like, caplog):
    path = jsonl({"text": "User: camels?\n\nAssistant:", "source": 1}, {"text": "1" * 90}, {"text": "22"})
    data = PromptDataConfig(data_prefix=by_name(path))
    with caplog.at_level(logging.INFO):
        prompts = open_prompt_rows(data, data.splits.train, llama_like, max_length=64)
    text = "User: camels?\n\nAssistant:"
    ids = [llama_like.bos_id, *llama_like.encode(text)]
    assert prompts[0] == Row(
        sequences=(TokenSequence(tokens=ids, loss_mask=[False] * len(ids)),),
        text=text,
        extras={"text": text, "source": 1},
    )
    assert (len(prompts), prompts.num_dropped) == (2, 1)
    assert "1 of 3 prompts have more than 64 tokens" in caplog.text


def test_a_template_stands_around_prompts_and_a_chat_around_both(jsonl, make_hf):
    template = "<{{ messages[0]['role'] }}>{{ messages[0]['content'] }}|"
    tokenizer = load_tokenizer("huggingface", make_hf(chat_template=template, eos_token="<|im_end|>"))
    path = jsonl({"problem": "1 {x}"}, {"messages": [{"role": "user", "content": "2"}]})
    found = []
    for chat in (False, True):
        data = PromptDataConfig(data_prefix=by_name(path), chat=chat, prompt_template=r"Solve.\n{prompt}!")
        prompts = open_prompt_rows(data, data.splits.train, tokenizer, max_length=64)
        found.append([prompts[i].text for i in range(2)])
    assert found == [["Solve.\n1 {x}!", "<user>2|"], ["<user>Solve.\n1 {x}!|", "<user>2|"]]
    with pytest.raises(UserError, match=r"model\.data\.prompt_template='Solve\.' has no {prompt}"):
        PromptDataConfig(data_prefix=by_name(path), prompt_template="Solve.")


@pytest.mark.parametrize(
    ("row", "problem"),
    [({"txt": "a"}, "line 1: key 'text' is missing"), ({"text": ""}, "line 1: a text has 0 tokens")],
)
def test_bad_prompts_name_their_line(jsonl, bpe, row, problem):
    data = PromptDataConfig(data_prefix=by_name(jsonl(row)))
    with pytest.raises(UserError, match=problem):
        open_prompt_rows(data, data.splits.train, bpe, max_length=64)


def test_a_missing_file_is_named(bpe, tmp_path):
    with pytest.raises(UserError, match=r"there is no data file .*absent\.jsonl") as caught:
        comparisons(by_name(tmp_path / "absent.jsonl"), bpe)
    assert "under model.data" in caught.value.fix


def test_generated_responses_stand_after_the_tokens_of_their_prompt(jsonl, llama_like):
    prompt, good, bad = "camels use fat", " in their humps", "ter"
    rows = comparisons(
        by_name(jsonl({"prompt": prompt, "chosen": good, "rejected": bad})),
        llama_like,
        generates=True,
        append_eod=True,
    )
    asked = [llama_like.bos_id, *llama_like.encode(prompt)]
    for sequence, response in zip(rows[0].sequences, (good, bad), strict=True):
        start = sequence.loss_mask.index(True)
        assert sequence.tokens[:start] == asked  # also where the whole text has a token across the border
        assert all(sequence.loss_mask[start:])
        assert sequence.tokens[-1] == llama_like.eos_id
        assert llama_like.decode(sequence.tokens[1:-1]) == prompt + response


def test_an_instruction_beside_a_prompt_is_not_lost(jsonl, bpe):
    pair = {"prompt": "Q: why?", "chosen": " so", "rejected": " no"}
    for instruction, lost in (("why?", False), ("answer in French", True)):
        path = jsonl(pair | {"instruction": instruction})
        if not lost:
            open_pairs(path, bpe)
            continue
        with pytest.raises(UserError, match="line 1: key 'instruction' has the value answer in French"):
            open_pairs(path, bpe)


def test_an_empty_response_is_learned_by_its_end_alone(jsonl, bpe):
    files = dict.fromkeys(
        ("train", "validation"), str(jsonl({"prompt": "a" * 99, "chosen": " b", "rejected": ""}))
    )
    rows = comparisons(files, bpe, max_length=400, append_eod=True, generates=True)
    assert sum(rows[0].sequences[1].loss_mask) == 1
    with pytest.raises(UserError, match="line 1: an empty response has no token to learn"):
        comparisons(files, bpe, max_length=400, append_eod=False, generates=True)


def test_an_empty_response_names_its_line(jsonl, bpe):
    with pytest.raises(UserError, match="line 1: a text has 0 tokens"):
        comparisons(by_name(jsonl(*pair_rows(("", "12")))), bpe, generates=True)


def test_responses_without_a_border_part_where_their_tokens_do(jsonl, bpe):
    rows = comparisons(by_name(jsonl(*pair_rows(("1234", "1256"), ("12", "123")))), bpe, generates=True)
    masks = [[sequence.loss_mask for sequence in rows[i].sequences] for i in range(2)]
    assert masks[0] == [[False, False, True, True]] * 2
    assert masks[1] == [[False, True], [False, True, True]]
