# SPDX-License-Identifier: Apache-2.0
import json

import numpy as np
import pytest
import torch

from nemo_aligner.batch import TokenBatch
from nemo_aligner.errors import UserError
from nemo_aligner.rollout_batch import ValueBatch
from nemo_aligner.serving import wire
from nemo_aligner.serving.protocol import Health, Limits, Refusal, RequestVersion, Trouble

LIMITS = Limits(vocab_size=50, seq_length=6)
TICKET = RequestVersion(run_id="run é", step=3, sequence=7)


def batch() -> TokenBatch:
    tokens = torch.tensor([[5, 6, 7, 0], [8, 9, 0, 0]])
    return TokenBatch(tokens=tokens, loss_mask=tokens > 0, lengths=torch.tensor([3, 2]))


def value_batch() -> ValueBatch:
    rows = batch()
    return ValueBatch(
        tokens=rows.tokens,
        loss_mask=torch.tensor([[False, True, True, False], [False, True, False, False]]),
        lengths=rows.lengths,
        values=torch.tensor([[0.0, 0.1, 0.2, 0.0], [0.0, 0.3, 0.0, 0.0]]),
        returns=torch.tensor([[0.0, 1.0, 2.0, 0.0], [0.0, 3.0, 0.0, 0.0]]),
    )


def test_a_request_has_the_names_dtypes_and_shapes_of_nemo_aligner() -> None:
    sent = wire.infer_arrays(batch(), pad_to_length=5)
    assert {name: (array.dtype, array.shape) for name, array in sent.items()} == {
        "tokens": (np.int64, (2, 5)),
        "sequence_lengths": (np.int64, (2, 1)),
    }
    assert sent["tokens"].tolist() == [[5, 6, 7, 0, 0], [8, 9, 0, 0, 0]]
    sent = wire.train_arrays(value_batch())
    assert {name: (array.dtype, array.shape) for name, array in sent.items()} == {
        "tokens": (np.int64, (2, 4)),
        "returns": (np.float32, (2, 3)),
        "prev_values": (np.float32, (2, 3)),
        "mask": (np.float32, (2, 3)),
        "sequence_lengths": (np.int64, (2, 1)),
    }


def test_what_is_said_of_token_t_crosses_in_column_t_minus_one() -> None:
    sent = wire.train_arrays(value_batch())
    assert sent["returns"].tolist() == [[1, 2, 0], [3, 0, 0]]
    assert sent["mask"].tolist() == [[1, 1, 0], [1, 0, 0]]
    request = wire.read_infer("critic_infer", wire.infer_arrays(batch(), pad_to_length=5), LIMITS)
    values = torch.tensor([[9.0, 1.0, 2.0, 9.0], [9.0, 3.0, 9.0, 9.0]])
    reply = wire.infer_reply(request, torch.tensor([4.0, 5.0]), values)
    assert reply["values"].tolist() == [[1, 2, 0, 0, 0], [3, 0, 0, 0, 0]]
    assert reply["rewards"].tolist() == [[4], [5]]


@pytest.mark.parametrize("version", [None, TICKET])
@pytest.mark.parametrize("width", [None, 4, 6])
def test_rows_and_their_judgement_come_back_as_they_went(
    version: RequestVersion | None, width: int | None
) -> None:
    request = wire.read_infer(
        "critic_infer", wire.infer_arrays(batch(), pad_to_length=width, version=version), LIMITS
    )
    assert request.version == version
    assert request.width == (width or 4)
    assert torch.equal(request.batch.tokens[:, :4], batch().tokens)
    assert torch.equal(request.batch.loss_mask[:, :4], batch().loss_mask)
    assert request.batch.lengths.tolist() == [3, 2]
    values = torch.where(batch().loss_mask, torch.rand(2, 4), 0.0)
    values[:, 0] = 0
    padded = torch.nn.functional.pad(values, (0, request.batch.seq_length - 4))
    rewards = torch.tensor([0.5, -0.5])
    found = wire.read_infer_reply(wire.infer_reply(request, rewards, padded), batch())
    assert found[0] is not None
    assert torch.equal(found[0], rewards)
    assert found[1] is not None
    assert torch.equal(found[1], values)


def test_rewards_of_several_attributes_keep_them() -> None:
    request = wire.read_infer("reward_model", wire.infer_arrays(batch()), LIMITS)
    rewards = torch.rand(2, 3)
    reply = wire.infer_reply(request, rewards, None)
    assert list(reply) == ["rewards", "exceeded"]
    found, values = wire.read_infer_reply(reply, batch())
    assert values is None
    assert found is not None
    assert torch.equal(found, rewards)


@pytest.mark.parametrize("version", [None, TICKET])
def test_a_lesson_comes_back_as_it_went(version: RequestVersion | None) -> None:
    sent = value_batch()
    request = wire.read_train("critic_train", wire.train_arrays(sent, version), LIMITS)
    assert request.version == version
    for name in ("tokens", "loss_mask", "lengths", "values", "returns"):
        assert torch.equal(getattr(request.batch, name), getattr(sent, name)), name


def test_without_lengths_a_row_ends_with_its_last_learned_token() -> None:
    sent = wire.train_arrays(value_batch())
    del sent["sequence_lengths"]
    assert wire.read_train("critic_train", sent, LIMITS).batch.lengths.tolist() == [3, 2]
    sent["mask"][1] = 0  # such as the padding rows of a batch
    assert wire.read_train("critic_train", sent, LIMITS).batch.lengths.tolist() == [3, 1]


def test_padding_beyond_the_models_length_is_cut_and_made_up_for_in_the_reply() -> None:
    request = wire.read_infer("critic_infer", wire.infer_arrays(batch(), pad_to_length=9), LIMITS)
    assert request.batch.seq_length == 6
    assert wire.infer_reply(request, None, torch.ones(2, 6))["values"].shape == (2, 9)


def test_texts_are_encoded_by_the_server() -> None:
    texts = {"sentences": np.array([[b"ab"], ["ä".encode()]], dtype=np.object_)}
    request = wire.read_infer(
        "reward_model", texts, LIMITS, lambda text: [ord(letter) % 50 for letter in text]
    )
    assert request.batch.tokens.tolist() == [[47, 48], [28, 0]]
    assert request.batch.lengths.tolist() == [2, 1]
    with pytest.raises(UserError, match="no tokenizer"):
        wire.read_infer("reward_model", texts, LIMITS)


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"tokens": np.ones((2, 4), np.int32)}, "tokens is int32, not int64"),
        ({"tokens": np.ones(4, np.int64)}, r"tokens is \[4\]"),
        ({"tokens": np.full((2, 4), 50)}, r"tokens\[0, 0\] is 50, outside the vocabulary of 50"),
        ({"tokens": np.full((2, 4), -1)}, r"tokens\[0, 0\] is -1"),
        (
            {"tokens": np.ones((2, 7), np.int64), "sequence_lengths": np.array([[7], [1]])},
            "row 0 is over-long: 7",
        ),
        ({"sequence_lengths": np.array([[1], [-1]])}, r"sequence_lengths\[1\] is -1, a negative length"),
        ({"sequence_lengths": np.array([[1], [0]])}, "row 1 is empty"),
        ({"sequence_lengths": np.array([[5], [1]])}, "but tokens has 4 columns"),
        ({"sequence_lengths": np.array([[3]])}, r"sequence_lengths is \[1, 1\]"),
        (
            {"tokens": np.ones((0, 4), np.int64), "sequence_lengths": np.ones((0, 1), np.int64)},
            "tokens is empty",
        ),
        ({"sentences": np.array([[b"a"], [b"b"]])}, "both came"),
        ({"run_id": np.array([[b"r"], [b"r"]])}, "run_id came alone"),
    ],
)
def test_a_bad_request_is_refused_by_name(change: dict[str, np.ndarray], named: str) -> None:
    with pytest.raises(UserError, match=f"^critic_infer: .*{named}"):
        wire.read_infer("critic_infer", wire.infer_arrays(batch()) | change, LIMITS)


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"returns": np.full((2, 3), np.nan, np.float32)}, r"returns\[0, 0\] is nan"),
        ({"prev_values": np.full((2, 3), np.inf, np.float32)}, r"prev_values\[0, 0\] is inf"),
        # Finite, and its square is not.
        (
            {"returns": np.full((2, 3), 3e38, np.float32)},
            r"returns\[0, 0\] is 3e\+38\nFix: .*within \+-1e\+15",
        ),
        ({"prev_values": np.full((2, 3), -3e38, np.float32)}, r"prev_values\[0, 0\] is -3e\+38"),
        ({"returns": np.ones((2, 4), np.float32)}, r"returns is \[2, 4\]\nFix: its shape is \[2, 3\]"),
        ({"returns": np.ones((2, 3))}, "returns is float64, not float32"),
        ({"mask": np.full((2, 3), 0.5, np.float32)}, r"mask\[0, 0\] is 0.5"),
        ({"mask": np.ones((2, 3), np.float32)}, r"mask\[0\] learns from tokens beyond the row's 3"),
    ],
)
def test_a_bad_lesson_is_refused_by_name(change: dict[str, np.ndarray], named: str) -> None:
    with pytest.raises(UserError, match=f"^critic_train: {named}"):
        wire.read_train("critic_train", wire.train_arrays(value_batch()) | change, LIMITS)


def test_a_lesson_lacks_nothing() -> None:
    sent = wire.train_arrays(value_batch())
    del sent["mask"]
    with pytest.raises(UserError, match="mask is missing"):
        wire.read_train("critic_train", sent, LIMITS)


def test_saving_and_its_ticket() -> None:
    assert wire.read_save("critic_save", {"dummy_var": np.array([0])}) is None
    assert wire.read_save("critic_save", wire.save_arrays(TICKET)) == TICKET


def test_health_comes_back_as_it_went_and_an_older_client_is_reported() -> None:
    health = Health(
        model="m",
        step=2,
        vocab_size=50,
        seq_length=6,
        settings={"a": 1, "b": None},
        run_id="r",
        last_loss=0.5,
    )
    told = wire.health_reply(health)
    assert wire.read_health(told) == health
    newer = json.loads(told["health"][0]) | {"protocol": 99}
    with pytest.raises(UserError, match="version 99 of the protocol"):
        wire.read_health({"health": np.array([json.dumps(newer).encode()])})


@pytest.mark.parametrize("trouble", list(Trouble))
def test_a_refusal_is_read_from_its_text(trouble: Trouble) -> None:
    found = Refusal.parse(str(Refusal(trouble, "a: b\nFix: c")))
    assert found is not None
    assert (found.trouble, found.message) == (trouble, "a: b\nFix: c")
    assert Refusal.parse("This API is restricted") is None
