# SPDX-License-Identifier: Apache-2.0
"""Attributes of responses as labels before them: SteerLM (Dong 2023, arXiv 2310.05344); with one attribute, a reward,
conditional alignment (Hu 2023, arXiv 2308.12050)."""

import json
import logging
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from nemo_aligner.data.config import ChatPromptTokens
from nemo_aligner.data.conversations import Chat
from nemo_aligner.data.records import Records
from nemo_aligner.errors import UserError

logger = logging.getLogger(__name__)

# Of each text its attributes; None: it is too long.
Rate = Callable[[list[str]], Sequence[Sequence[float] | None]]

# What NeMo-Aligner's attribute models give, in their order.
HELPSTEER = (
    *("quality", "toxicity", "humor", "creativity", "helpfulness"),
    *("correctness", "coherence", "complexity", "verbosity"),
)


def texts_to_rate(chat: Chat, tokens: ChatPromptTokens) -> dict[int, str]:
    """Return {place of a turn: the conversation through it, as an attribute model reads it}.

    Turns of ``chat.mask``, whose text is not learned, are not rated. A text ends with ``label_start``, where
    NeMo-Aligner's attribute models have read the attributes in training.
    """
    tokens, found = tokens.unescaped(), {}
    text = tokens.system(chat.system)
    for number, turn in enumerate(chat.turns):
        text += f"{tokens.speaker(turn.speaker)}{turn.text}{tokens.end_of_turn}"
        if turn.speaker != chat.mask:
            found[number] = text + tokens.label_start
    return found


@dataclass(frozen=True, kw_only=True)
class LabelForm:
    """How attributes are written: after their names, rounded, within bounds.

    >>> LabelForm(names=("quality", "toxicity"), bounds=(0, 4)).label([3.6, -1.0])
    'quality:4,toxicity:0'
    """

    names: Sequence[str] = HELPSTEER
    bounds: Sequence[int] = (0, 4)  # lowest and highest number

    def __post_init__(self) -> None:
        low, high = self.bounds
        if low >= high:
            raise UserError(
                f"--bounds {low} {high}: the lowest number of a label is not below the highest",
                fix="give the lowest first, as in --bounds 0 4",
            )

    def label(self, attributes: Sequence[float]) -> str:
        """Return the label of a response.

        Raises:
            UserError: there are more or fewer attributes than names, or one is infinite or NaN.
        """
        if len(attributes) != len(self.names):
            raise UserError(
                f"the model gives {len(attributes)} attributes, and the labels have {len(self.names)}: "
                f"{', '.join(self.names)}",
                fix="give --attributes one name for each attribute of the model, in its order",
            )
        for name, value in zip(self.names, attributes, strict=True):
            if not math.isfinite(value):
                raise UserError(
                    f"the model gives {value} as {name}", fix="serve a model whose training has not diverged"
                )
        low, high = self.bounds
        numbers = (round(min(max(value, low), high)) for value in attributes)
        return ",".join(f"{name}:{number}" for name, number in zip(self.names, numbers, strict=True))


def labeled_row(chat: Chat, labels: Mapping[int, str]) -> dict[str, object]:
    """Return the conversation as a row in which each label stands before its turn's text."""
    return {
        "system": chat.system,
        "mask": chat.mask,
        "type": "VALUE_TO_TEXT",
        "conversations": [
            {"from": turn.speaker, "value": turn.text, "label": labels.get(number)}
            | ({} if turn.trained else {"train": False})
            for number, turn in enumerate(chat.turns)
        ],
    }


def annotate(
    chats: Records[Chat],
    output: Path,
    rate: Rate,
    *,
    form: LabelForm,
    tokens: ChatPromptTokens,
    batch_size: int,
) -> None:
    """Append the labeled rows that ``output`` lacks, so that an annotation which was interrupted goes on.

    Args:
        chats: the conversations.
        output: a file of labeled rows, of the first of them; its last line may lack its end.
        rate: gives the attributes of texts.
        form: of the labels.
        tokens: the text that marks turns, as in the attribute model's training.
        batch_size: conversations that are rated at once.

    Raises:
        UserError: the texts cannot be rated, or have other attributes than the labels.
    """
    content = output.read_bytes() if output.exists() else b""
    with output.open("a", encoding="utf-8") as file:
        file.truncate(content.rfind(b"\n") + 1)
        for start in range(content.count(b"\n"), len(chats), batch_size):
            part = [chats[i] for i in range(start, min(start + batch_size, len(chats)))]
            texts = [texts_to_rate(chat, tokens) for chat in part]
            rated = iter(rate([text for of_chat in texts for text in of_chat.values()]))
            for chat, of_chat in zip(part, texts, strict=True):
                found = {number: next(rated) for number in of_chat}
                labels = {n: form.label(x) for n, x in found.items() if x is not None}
                file.write(json.dumps(labeled_row(chat, labels), ensure_ascii=False) + "\n")
            file.flush()
            logger.info("%d of %d conversations", min(start + batch_size, len(chats)), len(chats))
