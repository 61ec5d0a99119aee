# SPDX-License-Identifier: Apache-2.0
"""JSONL reading: what is found, and what is said of bad lines."""

import gzip
import json

import pytest

from nemo_aligner.data.records import PromptResponse, RecordFile, read_prompt_response
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
def test_bad_lines_name_file_line_and_fix(tmp_path, line, problem):
    path = tmp_path / "bad.jsonl"
    path.write_bytes(f"{GOOD}\n\n".encode() + line + f"\n{GOOD}\n".encode())
    with pytest.raises(UserError) as caught:
        RecordFile(path, read)
    assert caught.value.problem.startswith(f"{path}, line 3: {problem}")
    assert str(caught.value).splitlines()[-1].startswith("Fix: ")


def test_missing_and_empty_files(tmp_path):
    with pytest.raises(UserError, match="no data file"):
        RecordFile(tmp_path / "absent.jsonl", read)
    with pytest.raises(UserError, match="no data file"):
        RecordFile(tmp_path, read)
    for content in (b"", b"\n \n", b"[]", b" [\n]\n", b"\xef\xbb\xbf"):
        (tmp_path / "empty.jsonl").write_bytes(content)
        with pytest.raises(UserError, match="has no rows"):
            RecordFile(tmp_path / "empty.jsonl", read)


ROWS = [{"input": f"line\u2028{i}\u2029\x85\x0b\x0c", "output": '[{\\",' * i} for i in range(4)]


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("indent", [None, 0, 4])
@pytest.mark.parametrize("ascii_only", [False, True])
def test_one_array_and_gzip_hold_the_same_rows(tmp_path, packed, indent, ascii_only):
    lines = "".join(json.dumps(row, ensure_ascii=ascii_only) + "\n" for row in ROWS)
    array = "\ufeff\n" + json.dumps(ROWS, ensure_ascii=ascii_only, indent=indent) + "\n"
    for text in (lines, array):
        content = text.encode()
        path = tmp_path / "rows"
        path.write_bytes(gzip.compress(content) if packed else content)
        records = RecordFile(path, read)
        assert [records[i].fields for i in range(len(records))] == ROWS


def test_the_line_of_an_arrays_entry_is_named(tmp_path):
    path = tmp_path / "rows.json"
    path.write_text('[\n{"input": "a",\n "output": "b"},\n\n {"input": "a"}\n]')
    with pytest.raises(UserError, match="line 5: key 'output' is missing"):
        RecordFile(path, read)


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        (f"[{GOOD},\n", "line 2: the JSON array that begins the file does not end"),
        (f'[{GOOD},\n{{"input": "', "line 2: the JSON array that begins the file does not end"),
        (f"[{GOOD}]\n\n[{GOOD}]", "line 3: something follows the JSON array"),
        (f"[{GOOD},\n]", "line 2: not JSON"),
        ("[1]", "line 1: not a JSON object but int"),
        (f"[{GOOD}, ]", "line 1: not JSON"),
        (f"[{GOOD}\n{GOOD}]", "line 1: not JSON"),
    ],
)
def test_a_bad_array_names_its_line(tmp_path, content, problem):
    path = tmp_path / "rows.json"
    path.write_text(content)
    with pytest.raises(UserError) as caught:
        RecordFile(path, read)
    assert caught.value.problem.startswith(f"{path}, {problem}")


@pytest.mark.parametrize(
    ("content", "problem", "fix"),
    [
        (gzip.compress(b"x" * 999, mtime=0)[:-9], "is not a whole gzip file", "again"),
        (b"\x1f\x8bnot gzip", "is not a whole gzip file", "again"),
        (b"PAR1\x15\x04", "is a Parquet file", "read_parquet"),
        (b"\x28\xb5\x2f\xfd123", "is compressed by zstd", "unzstd"),
    ],
)
def test_other_formats_are_named(tmp_path, content, problem, fix):
    path = tmp_path / "rows.jsonl"
    path.write_bytes(content)
    with pytest.raises(UserError, match=problem) as caught:
        RecordFile(path, read)
    assert fix in caught.value.fix


def test_any_edit_changes_the_fingerprint(tmp_path):
    lines = [b'{"input": "%09d"}' % i for i in range(110_000)]
    content, width = bytearray(b"\n".join(lines)), len(lines[0]) + 1
    path = tmp_path / "rows.jsonl"
    prints = set()
    for row in (None, 0, 55_000, 109_999):
        if row is not None:
            content[row * width + 15] ^= 1
        path.write_bytes(content)
        prints.add(RecordFile(path, dict).fingerprint)
    assert len(content) > 2 << 20
    assert len(prints) == 4


@pytest.mark.parametrize("code", [0xD800, 0xD83D, 0xDFFF])
@pytest.mark.parametrize("raw", [False, True])
def test_text_that_is_no_text_is_refused_by_key(tmp_path, code, raw):
    character = chr(code)
    line = json.dumps({"input": "ok", "output": f"abc{character}d"})
    path = tmp_path / "rows.jsonl"
    content = line.encode()
    if raw:
        content = content.replace(
            json.dumps(character)[1:-1].encode(), character.encode("utf-8", "surrogatepass")
        )
    path.write_bytes(f"{GOOD}\n".encode() + content)
    problem = "not UTF-8" if raw else "key 'output' holds half of a surrogate pair, .* at character 4"
    with pytest.raises(UserError, match=f"line 2: {problem}"):
        RecordFile(path, read)
