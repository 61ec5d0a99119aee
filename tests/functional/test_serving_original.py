# SPDX-License-Identifier: Apache-2.0
"""Requests as NeMo-Aligner's clients write them, over raw HTTP: JSON, binary and gzip; and its annotation script's."""

import gzip
import json
import struct
from collections.abc import Iterator

import numpy as np
import pytest
from pytriton.client import FuturesModelClient

from tests.functional.serving_child import EOS, SEQ_LENGTH, VOCAB_SIZE
from tests.functional.serving_job import Job, running

INFER = "/v2/models/critic_infer/infer"


@pytest.fixture(scope="module")
def server() -> Iterator[Job]:
    with running() as job:
        yield job


def as_json(**arrays: np.ndarray) -> bytes:
    kinds = {"int64": "INT64", "float32": "FP32", "bool": "BOOL"}
    return json.dumps(
        {
            "inputs": [
                {
                    "name": name,
                    "shape": list(array.shape),
                    "datatype": kinds[str(array.dtype)],
                    "data": array.tolist(),
                }
                for name, array in arrays.items()
            ]
        }
    ).encode()


def as_binary(tokens: np.ndarray, lengths: np.ndarray) -> tuple[bytes, int]:
    """A body by the standard's words: a JSON header, then the bytes of each tensor."""
    blobs = {"tokens": tokens.tobytes(), "sequence_lengths": lengths.tobytes()}
    shapes = {"tokens": tokens.shape, "sequence_lengths": lengths.shape}
    inputs = [
        {
            "name": name,
            "shape": list(shapes[name]),
            "datatype": "INT64",
            "parameters": {"binary_data_size": len(blob)},
        }
        for name, blob in blobs.items()
    ]
    header = json.dumps({"inputs": inputs, "parameters": {"binary_data_output": True}}).encode()
    return header + b"".join(blobs.values()), len(header)


# Wider than the model's 16 columns: the original pads to pad_to_length.
TOKENS = np.zeros((2, 24), dtype=np.int64)
TOKENS[0, :3], TOKENS[1, :2] = [5, 6, 7], [8, 9]
LENGTHS = np.array([[3], [2]])
VALUES = np.zeros((2, 24), dtype=np.float32)
VALUES[0, :2], VALUES[1, 0] = [6, 7], 9


def test_json(server: Job) -> None:
    body = as_json(tokens=TOKENS, sequence_lengths=LENGTHS)
    status, headers, reply = server.raw("POST", INFER, body, {"Content-Type": "application/json"})
    assert (status, headers["content-type"]) == (200, "application/json")
    found = {output["name"]: output for output in json.loads(reply)["outputs"]}
    assert found["rewards"]["data"] == [18.125, 17.125]
    assert np.array_equal(np.reshape(found["values"]["data"], (2, 24)), VALUES)
    assert (found["exceeded"]["datatype"], found["exceeded"]["shape"]) == ("INT32", [2, 1])


@pytest.mark.parametrize("packed", [False, True])
def test_binary(server: Job, packed: bool) -> None:
    body, size = as_binary(TOKENS, LENGTHS)
    headers = {"Inference-Header-Content-Length": str(size), "Content-Type": "application/octet-stream"}
    if packed:
        body = gzip.compress(body)
        headers |= {"Content-Encoding": "gzip", "Accept-Encoding": "gzip"}
    status, told, reply = server.raw("POST", INFER, body, headers)
    assert status == 200, reply
    assert (told.get("content-encoding") == "gzip") == packed
    reply = gzip.decompress(reply) if packed else reply
    size = int(told["inference-header-content-length"])
    outputs, place = json.loads(reply[:size])["outputs"], size
    found = {}
    for output in outputs:
        count = output["parameters"]["binary_data_size"]
        kind = {"FP32": "f", "INT32": "i"}[output["datatype"]]
        found[output["name"]] = struct.unpack(f"<{count // 4}{kind}", reply[place : place + count])
        place += count
    assert place == len(reply)
    assert found["rewards"] == (18.125, 17.125)
    assert found["exceeded"] == (0, 0)
    assert np.array_equal(np.reshape(found["values"], (2, 24)), VALUES)


def test_train_of_exactly_four_tensors_and_save(server: Job) -> None:
    """After this test the weights are others, but no test beside it looks at them."""
    per_token = {name: np.full((2, 23), 0.5, np.float32) for name in ("returns", "prev_values")}
    mask = np.zeros((2, 23), np.float32)
    mask[0, :2] = mask[1, :1] = 1
    body = as_json(tokens=TOKENS, **per_token, mask=mask)
    status, _, reply = server.raw("POST", "/v2/models/critic_train/infer", body)
    assert status == 200, reply
    (loss,) = json.loads(reply)["outputs"]
    assert (loss["name"], loss["datatype"], loss["shape"]) == ("loss_mean", "FP32", [1])
    status, _, reply = server.raw(
        "POST", "/v2/models/critic_save/infer", as_json(dummy_var=np.array([0], dtype=np.int64))
    )
    (saved,) = json.loads(reply)["outputs"]
    assert (status, saved["name"], saved["shape"], saved["data"]) == (200, "status", [1], [0])


def test_the_annotation_script_asks_as_it_did(server: Job) -> None:
    """Its get_reward: one request a sentence, add_EOS beside it; an over-long one is cut and told."""
    texts = ["hello", "x" * (SEQ_LENGTH + 5), "y" * SEQ_LENGTH]
    sentences = np.char.encode(np.array(texts)[..., np.newaxis], "utf-8")
    for add_eos in (False, True):
        rewards, exceeded = [], []
        with FuturesModelClient(f"{server.ip}:{server.port}", "critic_infer") as client:
            asked = [
                client.infer_batch(sentences=one, add_EOS=np.ones_like(one, dtype=bool) * add_eos)
                for one in np.split(sentences, sentences.shape[0])
            ]
            for reply in [future.result() for future in asked]:
                rewards.append(reply["rewards"].flatten().tolist())
                exceeded += reply["exceeded"].tolist()
                assert reply["exceeded"].dtype == np.int32
        assert exceeded == [[0], [1], [int(add_eos)]]
        ids = [[ord(letter) % VOCAB_SIZE for letter in text] + [EOS] * add_eos for text in texts]
        sums = [sum(row[:SEQ_LENGTH]) for row in ids]
        # What the toy adds to each reward depends on what it was taught before.
        assert np.diff(np.ravel(rewards)).tolist() == np.diff(sums).tolist()


def test_an_over_long_sentence_is_refused_where_nobody_asks_for_a_cut(server: Job) -> None:
    text = {"name": "sentences", "shape": [1, 1], "datatype": "BYTES", "data": ["x" * (SEQ_LENGTH + 1)]}
    status, _, reply = server.raw("POST", INFER, json.dumps({"inputs": [text]}).encode())
    assert status == 400
    assert "row 0 is over-long" in json.loads(reply)["error"]
