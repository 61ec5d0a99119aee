# SPDX-License-Identifier: Apache-2.0
"""The wire format of a server and its clients: names, dtypes and layouts, for both sides.

The layout is NeMo-Aligner's: a tensor per token has S - 1 columns, and column t speaks of token t + 1. Ours is
``[B, S]``, and position t speaks of token t. The shift between the two happens here and nowhere else.

Shapes: N rows, S positions, A attributes of a reward.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from nemo_aligner.batch import TokenBatch
from nemo_aligner.errors import UserError
from nemo_aligner.objectives.value import MAX_RETURN
from nemo_aligner.rollout_batch import ValueBatch
from nemo_aligner.serving.checks import (
    TensorSpec,
    check_finite,
    check_lengths,
    check_shapes,
    check_tokens,
    first_index,
    refuse,
)
from nemo_aligner.serving.protocol import PROTOCOL_VERSION, Health, Limits, RequestVersion

HEALTH = "health"
STOP = "stop"

Arrays = Mapping[str, NDArray[Any]]


class Encode(Protocol):
    """Text to token ids."""

    def __call__(self, text: str, /, *, append_eos: bool | None = None) -> Sequence[int]:
        """``append_eos`` None: as the served model was trained."""
        ...


@dataclass(frozen=True, kw_only=True)
class InferRequest:
    """Rows to be scored."""

    batch: TokenBatch
    width: int  # S of the request, and so of its reply
    version: RequestVersion | None
    exceeded: NDArray[np.bool_]  # [N]: which rows were cut to what the model takes


@dataclass(frozen=True, kw_only=True)
class TrainRequest:
    """A whole rollout to learn from."""

    batch: ValueBatch
    version: RequestVersion | None


TEXTS = TensorSpec(name="sentences", dtype=np.bytes_, shape=("N", 1), optional=True)
# NeMo-Aligner 0.1's: whether sentences end with EOS, and which of them were cut.
ADD_EOS = TensorSpec(name="add_EOS", dtype=np.bool_, shape=("N", 1), optional=True)
EXCEEDED = TensorSpec(name="exceeded", dtype=np.int32, shape=("N", 1))
TOKENS = TensorSpec(name="tokens", dtype=np.int64, shape=("N", "S"))
LENGTHS = TensorSpec(name="sequence_lengths", dtype=np.int64, shape=("N", 1), optional=True)
RETURNS = TensorSpec(name="returns", dtype=np.float32, shape=("N", "S-1"))
OLD_VALUES = TensorSpec(name="prev_values", dtype=np.float32, shape=("N", "S-1"))
MASK = TensorSpec(name="mask", dtype=np.float32, shape=("N", "S-1"))
DUMMY = TensorSpec(name="dummy_var", dtype=np.int64, shape=(1,))
VALUES = TensorSpec(name="values", dtype=np.float32, shape=("N", "S"))
LOSS = TensorSpec(name="loss_mean", dtype=np.float32, shape=(1,))
STATUS = TensorSpec(name="status", dtype=np.int64, shape=(1,))
HEALTH_TEXT = TensorSpec(name="health", dtype=np.bytes_, shape=(1,))


def _version_specs(*rows: str) -> tuple[TensorSpec, ...]:
    # Triton gives every input of a batching endpoint the batch's dimension, so there each row repeats the version.
    kinds = {"run_id": np.bytes_, "step": np.int64, "sequence": np.int64}
    return tuple(TensorSpec(name=n, dtype=kind, shape=(*rows, 1), optional=True) for n, kind in kinds.items())


# Of critic_infer and reward_model: texts, or tokens with or without lengths. N is the batch's dimension.
INFER_INPUTS = (TEXTS, ADD_EOS, replace(TOKENS, optional=True), LENGTHS, *_version_specs("N"))
# Of critic_train and critic_save, which do not batch.
TRAIN_INPUTS = (TOKENS, RETURNS, OLD_VALUES, MASK, LENGTHS, *_version_specs())
SAVE_INPUTS = (DUMMY, *_version_specs())


def infer_outputs(*, num_rewards: int, has_values: bool) -> tuple[TensorSpec, ...]:
    """Values [N, S] of a critic and rewards [N, A] of a reward model; of both where they share a job."""
    rewards = TensorSpec(name="rewards", dtype=np.float32, shape=("N", num_rewards))
    return (*([VALUES] if has_values else []), *([rewards] if num_rewards else []), EXCEEDED)


def _version_arrays(version: RequestVersion | None, *rows: int) -> dict[str, NDArray[Any]]:
    if version is None:
        return {}
    shape = (*rows, 1)
    return {
        "run_id": np.full(shape, version.run_id.encode(), dtype=np.object_),
        "step": np.full(shape, version.step, dtype=np.int64),
        "sequence": np.full(shape, version.sequence, dtype=np.int64),
    }


def _read_version(endpoint: str, arrays: Arrays) -> RequestVersion | None:
    found = [name for name in ("run_id", "step", "sequence") if name in arrays]
    if not found:
        return None
    if len(found) < 3:
        raise refuse(endpoint, f"{' and '.join(found)} came alone", "send run_id, step and sequence together")
    first = {name: arrays[name].reshape(-1)[0] for name in found}
    if first["step"] < 0 or first["sequence"] < 0:
        raise refuse(endpoint, "step or sequence is negative", "count both from 0")
    try:
        run_id = bytes(first["run_id"]).decode()
    except UnicodeDecodeError as error:
        raise refuse(endpoint, f"run_id is not UTF-8: {error}", "send UTF-8") from None
    return RequestVersion(run_id=run_id, step=int(first["step"]), sequence=int(first["sequence"]))


def _rows(tokens: NDArray[np.int64], lengths: NDArray[np.int64], limits: Limits) -> TokenBatch:
    """Checked rows as a batch; columns beyond the model's length, which hold padding only, are cut."""
    tokens = tokens[:, : limits.seq_length]
    mask = np.arange(tokens.shape[1]) < lengths[:, None]
    return TokenBatch(
        tokens=torch.from_numpy(tokens.copy()),
        loss_mask=torch.from_numpy(mask),
        lengths=torch.from_numpy(lengths.copy()),
    )


def _encode(
    endpoint: str, arrays: Arrays, limits: Limits, encode: Encode | None
) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.bool_]]:
    """(tokens [N, S], lengths [N], exceeded [N]) of sentences."""
    if encode is None:
        raise refuse(endpoint, "this server has no tokenizer for sentences", "send tokens")
    rows, exceeded = [], []
    for row, text in enumerate(arrays[TEXTS.name].reshape(-1)):
        try:
            decoded = bytes(text).decode()
        except UnicodeDecodeError as error:
            raise refuse(endpoint, f"sentences[{row}] is not UTF-8: {error}", "send UTF-8") from None
        if ADD_EOS.name in arrays:
            ids = list(encode(decoded, append_eos=bool(arrays[ADD_EOS.name][row, 0])))
            # As the release that had this input: over-long sentences are cut, and the reply says which.
            exceeded.append(len(ids) > limits.seq_length)
            rows.append(ids[: limits.seq_length])
        else:
            exceeded.append(False)
            rows.append(list(encode(decoded)))
    lengths = np.array([len(row) for row in rows], dtype=np.int64)
    tokens = np.zeros((len(rows), int(lengths.max())), dtype=np.int64)
    for row, ids in enumerate(rows):
        tokens[row, : len(ids)] = ids
    return tokens, lengths, np.array(exceeded)


def infer_arrays(
    batch: TokenBatch, *, pad_to_length: int | None = None, version: RequestVersion | None = None
) -> dict[str, NDArray[Any]]:
    """A request to score a batch's rows, padded with 0 to ``pad_to_length`` columns."""
    width = pad_to_length or batch.seq_length
    assert batch.cu_seqlens is None and batch.seq_length <= width, (batch.seq_length, width)
    tokens = np.zeros((batch.num_rows, width), dtype=np.int64)
    tokens[:, : batch.seq_length] = batch.tokens.cpu().numpy()
    lengths = batch.lengths.cpu().numpy().astype(np.int64)[:, None]
    return {TOKENS.name: tokens, LENGTHS.name: lengths, **_version_arrays(version, batch.num_rows)}


def read_infer(endpoint: str, arrays: Arrays, limits: Limits, encode: Encode | None = None) -> InferRequest:
    """A request that has been checked; every token up to a row's length is a loss token.

    Args:
        encode: text to token ids; None refuses texts.

    Raises:
        UserError: what is wrong with the request, and where.
    """
    check_shapes(endpoint, arrays, INFER_INPUTS)
    match TEXTS.name in arrays, TOKENS.name in arrays:
        case True, False:
            tokens, lengths, exceeded = _encode(endpoint, arrays, limits, encode)
        case False, True:
            tokens = arrays[TOKENS.name]
            exceeded = np.zeros(tokens.shape[0], dtype=np.bool_)
            lengths = np.full(tokens.shape[0], tokens.shape[1], dtype=np.int64)
            if LENGTHS.name in arrays:
                lengths = arrays[LENGTHS.name][:, 0]
        case both, _:
            found = "both came" if both else "none came"
            raise refuse(endpoint, f"of sentences and tokens {found}", "send one of the two")
    check_lengths(endpoint, lengths, tokens.shape[1], limits)
    check_tokens(endpoint, tokens, limits)
    return InferRequest(
        batch=_rows(tokens, lengths, limits),
        width=tokens.shape[1],
        version=_read_version(endpoint, arrays),
        exceeded=exceeded,
    )


def infer_reply(request: InferRequest, rewards: Tensor | None, values: Tensor | None) -> dict[str, NDArray]:
    """The reply to a request.

    Args:
        rewards: [N] or [N, A], or None of a critic.
        values: [N, any width that holds the rows], or None of a reward model. Of them token t + 1's is sent in
            column t; 0 follows each row's last, and fills up to the request's width.
    """
    reply: dict[str, NDArray] = {}
    if values is not None:
        sent = np.zeros((request.batch.num_rows, request.width), dtype=np.float32)
        width = min(values.shape[1], request.batch.seq_length)
        known = torch.where(request.batch.loss_mask[:, :width], values[:, :width].cpu().float(), 0.0)
        sent[:, : known.shape[1] - 1] = known[:, 1:].numpy()
        reply[VALUES.name] = sent
    if rewards is not None:
        reply["rewards"] = rewards.detach().cpu().float().reshape(request.batch.num_rows, -1).numpy()
    return reply | {EXCEEDED.name: request.exceeded[:, None].astype(np.int32)}


def read_infer_reply(arrays: Arrays, batch: TokenBatch) -> tuple[Tensor | None, Tensor | None]:
    """(rewards [B] or, of several attributes, [B, A]; values [B, S] of the state before each token).

    Values are 0 at the first token, which no state precedes, and at padding. None stands for what did not come.
    """
    rewards = values = None
    if "rewards" in arrays:
        rewards = torch.from_numpy(arrays["rewards"].copy())
        rewards = rewards[:, 0] if rewards.shape[1] == 1 else rewards
    if VALUES.name in arrays:
        values = torch.zeros(batch.tokens.shape)
        values[:, 1:] = torch.from_numpy(arrays[VALUES.name][:, : batch.seq_length - 1].copy())
        inside = torch.arange(batch.seq_length) < batch.lengths.cpu()[:, None]
        values = torch.where(inside, values, 0.0)
    return rewards, values


def train_arrays(batch: ValueBatch, version: RequestVersion | None = None) -> dict[str, NDArray[Any]]:
    """A request to learn from a rollout."""

    def shifted(x: Tensor) -> NDArray[np.float32]:
        return np.ascontiguousarray(x[:, 1:].detach().cpu().float().numpy())

    return {
        TOKENS.name: batch.tokens.cpu().numpy().astype(np.int64),
        RETURNS.name: shifted(batch.returns),
        OLD_VALUES.name: shifted(batch.values),
        MASK.name: shifted(batch.loss_mask),
        LENGTHS.name: batch.lengths.cpu().numpy().astype(np.int64)[:, None],
        **_version_arrays(version),
    }


def read_train(endpoint: str, arrays: Arrays, limits: Limits) -> TrainRequest:
    """A request that has been checked. Without lengths, as from NeMo-Aligner, a row ends with its last loss token.

    Raises:
        UserError: what is wrong with the request, and where.
    """
    check_shapes(endpoint, arrays, TRAIN_INPUTS)
    tokens, mask = arrays[TOKENS.name], arrays[MASK.name]
    for spec in (RETURNS, OLD_VALUES, MASK):
        check_finite(endpoint, spec.name, arrays[spec.name], most=MAX_RETURN)
    odd = (mask != 0) & (mask != 1)
    if odd.any():
        at = first_index(odd)
        raise refuse(endpoint, f"mask{list(at)} is {mask[at]}", "send 0 or 1")
    # Column t of the mask is token t + 1: a row whose last loss token is in column t has t + 2 tokens.
    learned_end = np.where(mask.any(1), mask.shape[1] - np.argmax(mask[:, ::-1], axis=1) + 1, 1)
    lengths = arrays[LENGTHS.name][:, 0] if LENGTHS.name in arrays else learned_end.astype(np.int64)
    check_lengths(endpoint, lengths, tokens.shape[1], limits)
    check_tokens(endpoint, tokens, limits)
    if (learned_end > lengths).any():
        row = int(np.argmax(learned_end > lengths))
        problem = f"mask[{row}] learns from tokens beyond the row's {lengths[row]}"
        raise refuse(endpoint, problem, "send 0 there")
    rows = _rows(tokens, lengths, limits)

    def unshifted(name: str) -> Tensor:
        x = torch.zeros(rows.tokens.shape)
        x[:, 1:] = torch.from_numpy(arrays[name][:, : rows.seq_length - 1].copy())
        return x

    batch = ValueBatch(
        tokens=rows.tokens,
        loss_mask=unshifted(MASK.name).bool(),
        lengths=rows.lengths,
        values=unshifted(OLD_VALUES.name),
        returns=unshifted(RETURNS.name),
    )
    return TrainRequest(batch=batch, version=_read_version(endpoint, arrays))


def save_arrays(version: RequestVersion | None = None) -> dict[str, NDArray[Any]]:
    """A request to save the model."""
    return {DUMMY.name: np.zeros(1, dtype=np.int64), **_version_arrays(version)}


def read_save(endpoint: str, arrays: Arrays) -> RequestVersion | None:
    """The version of a request to save.

    Raises:
        UserError: what is wrong with the request.
    """
    check_shapes(endpoint, arrays, SAVE_INPUTS)
    return _read_version(endpoint, arrays)


def save_reply() -> dict[str, NDArray[Any]]:
    """Status 0: it is done."""
    return {STATUS.name: np.zeros(1, dtype=np.int64)}


def loss_reply(loss: float) -> dict[str, NDArray[Any]]:
    """The reply to a request to learn."""
    return {LOSS.name: np.array([loss], dtype=np.float32)}


def read_loss(arrays: Arrays) -> float:
    """The inverse."""
    return float(arrays[LOSS.name].reshape(-1)[0])


def health_reply(health: Health) -> dict[str, NDArray]:
    """One JSON text."""
    return {HEALTH_TEXT.name: np.array([json.dumps(asdict(health)).encode()], dtype=np.bytes_)}


def read_health(arrays: Arrays) -> Health:
    """The inverse.

    Raises:
        UserError: the server speaks another version of the protocol.
    """
    report = json.loads(bytes(arrays[HEALTH_TEXT.name].reshape(-1)[0]))
    if report["protocol"] != PROTOCOL_VERSION:
        raise UserError(
            f"the server speaks version {report['protocol']} of the protocol, this job version {PROTOCOL_VERSION}",
            fix="start both jobs from the same version of NeMo-Aligner",
        )
    known = {f.name for f in fields(Health)}
    return Health(**{name: value for name, value in report.items() if name in known})
