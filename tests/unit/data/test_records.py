# SPDX-License-Identifier: Apache-2.0
"""JSONL reading: what is found, and what is said of bad lines."""

import gzip

import pytest

from nemo_aligner.data.conversations import Turn, read_chat
from nemo_aligner.data.records import (
    PromptResponse,
    RecordFile,
    parse_line,
    read_prompt_response,
)
from nemo_aligner.errors import UserError


def read(row):
    return read_prompt_response(row, keys=("input", "output"))


def test_rows_are_found_by_index(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_bytes(
        b'\xef\xbb\xbf{"input": "a", "output": "b", "extra": 1}\r\n\n'
        + '{"input": "é\\n", "output": "ü"}'.encode()
        + b"\n   \n"
        + b'{"input": "", "output": "no newline at the end"}'
    )
    records = RecordFile(path, read)
    assert len(records) == 3
    assert records[1] == PromptResponse(fields={"input": "é\n", "output": "ü"})
    assert [records[i].fields["output"] for i in (2, 0)] == ["no newline at the end", "b"]
    assert [records.where(i) for i in range(3)] == [f"{path}, line {n}" for n in (1, 3, 5)]


GOOD = '{"input": "a", "output": "b"}'


@pytest.mark.parametrize(
    ("line", "problem"),
    [
        (b'{"input": "a", "output": ', "not JSON"),
        (b"[1, 2]", "not a JSON object but list"),
        (b'{"input": "a"}', "key 'output' is missing; the row has ['input']"),
        (b'{"input": "a", "output": 7}', "key 'output' has the value 7"),
        (b'{"input": null, "output": "b"}', "key 'input' has the value null"),
        (b'{"input": "\xff", "output": "b"}', "not UTF-8"),
        (b'{"instruction": "a", "response": ["b"]}', "key 'input' is missing"),
        (
            b'{"messages": [{"role": "user", "content": "a"}]}',
            "the row is a conversation: it has 'messages', and not all of input, output",
        ),
    ],
)
def test_bad_lines_name_file_line_and_cure(tmp_path, line, problem):
    path = tmp_path / "bad.jsonl"
    path.write_bytes(f"{GOOD}\n\n".encode() + line + f"\n{GOOD}\n".encode())
    with pytest.raises(UserError) as caught:
        RecordFile(path, read)
    assert caught.value.problem.startswith(f"{path}, line 3: {problem}")
    assert str(caught.value).splitlines()[-1].startswith("Cure: ")


def test_long_bad_lines_are_shortened():
    with pytest.raises(UserError) as caught:
        parse_line(b"x" * 10_000)
    assert len(str(caught.value)) < 300


def test_missing_empty_and_compressed_files(tmp_path):
    with pytest.raises(UserError, match="no data file"):
        RecordFile(tmp_path / "absent.jsonl", read)
    with pytest.raises(UserError, match="no data file"):
        RecordFile(tmp_path, read)
    for content in (b"", b"\n \n"):
        (tmp_path / "empty.jsonl").write_bytes(content)
        with pytest.raises(UserError, match="has no rows"):
            RecordFile(tmp_path / "empty.jsonl", read)
    with gzip.open(tmp_path / "rows.jsonl.gz", "wt") as file:
        file.write(GOOD)
    with pytest.raises(UserError, match="compressed") as caught:
        RecordFile(tmp_path / "rows.jsonl.gz", read)
    assert caught.value.cure == f"gunzip -k {tmp_path / 'rows.jsonl.gz'}"


NEMO = {
    "system": "Be brief.",
    "conversations": [
        {"from": "User", "value": "Hi"},
        {"from": "Assistant", "value": "Hello", "label": "quality:4"},
    ],
    "mask": "User",
    "type": "VALUE_TO_TEXT",
}


def test_conversations():
    chat = read_chat(NEMO)
    assert (chat.system, chat.mask, chat.kind) == ("Be brief.", "User", "VALUE_TO_TEXT")
    assert chat.turns == (
        Turn(speaker="User", text="Hi"),
        Turn(speaker="Assistant", text="Hello", label="quality:4"),
    )
    assert [chat.learned(i) for i in range(2)] == [False, True]


def test_messages_say_the_same():
    messages = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "Hi"},
        {"role": "assistant", "content": "Hello"},
    ]
    plain = {
        **NEMO,
        "type": None,
        "conversations": [{"from": "User", "value": "Hi"}, {"from": "Assistant", "value": "Hello"}],
    }
    assert read_chat({"messages": messages}) == read_chat(plain)


def test_system_mask_and_type_may_be_left_out():
    chat = read_chat({"conversations": NEMO["conversations"]})
    assert (chat.system, chat.mask, chat.kind) == ("", "User", None)


def test_the_first_turn_is_context_except_where_labels_are_predicted():
    row = {**NEMO, "mask": "Assistant", "conversations": NEMO["conversations"][:2]}
    with pytest.raises(UserError, match="no turn is learned"):
        read_chat(row)
    assert read_chat({**row, "type": "TEXT_TO_VALUE"}).learned(0)


@pytest.mark.parametrize(
    ("row", "problem"),
    [
        ({"input": "a", "output": "b"}, "key 'conversations' is missing"),
        ({**NEMO, "conversations": []}, "key 'conversations' has the value \\[\\]"),
        ({**NEMO, "conversations": ["Hi"]}, "list of JSON objects"),
        ({**NEMO, "conversations": [{"from": "User"}]}, "key 'value' is missing"),
        ({**NEMO, "conversations": NEMO["conversations"][:1]}, "no turn is learned"),
        ({**NEMO, "mask": "Human"}, "key 'mask' is 'Human', but the speakers are"),
        ({**NEMO, "type": "TEXT"}, "key 'type' is 'TEXT'"),
        ({"messages": [{"role": "tool", "content": "x"}]}, "role 'tool'"),
        ({"messages": [{"role": "user", "content": ["x"]}]}, "key 'content' has the value"),
        ({"messages": [{"role": "system", "content": "x"}]}, "no turn is learned"),
        (
            {"messages": [{"role": "user", "content": "x"}, {"role": "system", "content": "y"}]},
            "role 'system' after its first entry",
        ),
    ],
)
def test_bad_conversations(row, problem):
    with pytest.raises(UserError, match=problem):
        read_chat(row)
