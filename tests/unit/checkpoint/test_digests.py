# SPDX-License-Identifier: Apache-2.0
"""Damage to any file is told by the file's name; whole files are told whole."""

import hashlib
import json
import os
from pathlib import Path

import pytest

from nemo_aligner.checkpoint import digests
from nemo_aligner.checkpoint.digests import digests_of, find_damage, refuse_damage, write_digests
from nemo_aligner.errors import UserError

CHUNK = 1000


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Files of no, less than one, just one and several chunks, with their digests."""
    monkeypatch.setattr(digests, "_CHUNK_BYTES", CHUNK)
    (tmp_path / "weights").mkdir()
    for name, size in (("empty", 0), ("small", 7), ("weights/one", CHUNK), ("weights/.many", 3 * CHUNK + 1)):
        (tmp_path / name).write_bytes(os.urandom(size))
    write_digests(tmp_path)
    return tmp_path


def test_a_digest_is_blake2b_of_the_chunks_digests(folder: Path):
    def blake(data: bytes) -> bytes:
        return hashlib.blake2b(data, digest_size=16).digest()

    content = (folder / "weights/.many").read_bytes()
    parts = b"".join(blake(content[i : i + CHUNK]) for i in range(0, len(content), CHUNK))
    assert digests_of(folder, ["weights/.many"]) == {"weights/.many": f"{len(content)} {blake(parts).hex()}"}


def test_what_is_whole_has_no_damage(folder: Path):
    (folder / "later").write_text("not part of it")
    assert find_damage(folder) == []
    refuse_damage(folder, [])
    assert json.loads((folder / "digests.json").read_text()).keys() == {
        "empty",
        "small",
        "weights/one",
        "weights/.many",
    }


def test_known_digests_are_taken_over_and_files_that_are_gone_are_not(folder: Path):
    write_digests(folder, {"small": "7 ab", "gone": "1 cd"})
    stored = json.loads((folder / "digests.json").read_text())
    assert stored["small"] == "7 ab"
    assert "gone" not in stored
    assert find_damage(folder) == ["small differs from its digest"]


@pytest.mark.parametrize("of", [1, 3])
@pytest.mark.parametrize(
    ("name", "change", "words"),
    [
        ("weights/.many", lambda data: data[:-1] + bytes([data[-1] ^ 1]), "differs from its digest"),
        ("weights/.many", lambda data: bytes([data[0] ^ 128]) + data[1:], "differs from its digest"),
        ("weights/one", lambda data: data[::-1], "differs from its digest"),
        ("small", lambda data: data[:-1], "has 6 bytes, not 7"),
        ("empty", lambda data: data + b"\0", "has 1 bytes, not 0"),
    ],
)
def test_damage_has_a_name(folder: Path, name: str, change, words: str, of: int):
    path = folder / name
    path.write_bytes(change(path.read_bytes()))
    found = [one for share in range(of) for one in find_damage(folder, share=share, of=of) or ()]
    assert found == [f"{name} {words}"]
    with pytest.raises(UserError, match=f"is damaged: {name} {words}"):
        refuse_damage(folder, found)


def test_a_file_that_is_gone_has_a_name(folder: Path):
    (folder / "weights/one").unlink()
    assert find_damage(folder) == ["weights/one is missing"]


@pytest.mark.parametrize(
    "content", [b"", b"{", b"[]", b"null", b'{"a": ""}', b'{"a": 1, "b": "x y"}', b"\xff", b"[" * 100_000]
)
def test_damaged_digests_are_damage(folder: Path, content: bytes):
    (folder / "digests.json").write_bytes(content)
    assert find_damage(folder) == ["digests.json is damaged"]


def test_without_digests_nothing_is_known(folder: Path, caplog: pytest.LogCaptureFixture):
    (folder / "digests.json").unlink()
    assert find_damage(folder) is None
    with caplog.at_level("INFO"):
        refuse_damage(folder, None)
    assert "without digests" in caplog.text
