# SPDX-License-Identifier: Apache-2.0
"""Prompts, and responses after their prompts, to tokens. What is too long is left out whole."""

from dataclasses import dataclass

from nemo_aligner.data.records import TextRow
from nemo_aligner.data.row import Row, TextEncoder, TokenSequence, most_tokens
from nemo_aligner.data.turns import continuation, end_of_turn
from nemo_aligner.errors import UserError

_CERTAINLY_ENOUGH = 64  # bytes of a text that is taken to have enough tokens without a look


@dataclass(frozen=True, slots=True, kw_only=True)
class TextLayout:
    """Makes one row of a record: a sequence for each response, or of the prompt alone."""

    encode: TextEncoder
    lengths: range  # tokens that a sequence may have
    unit: str  # what a record is called in messages, in the plural
    # True: the loss is of the response's tokens, after exactly the tokens that the prompt alone has;
    # False: it is read at the last token of the whole text
    generates: bool = False

    @property
    def limit(self) -> str:
        """See RowLayout."""
        return f"{self.lengths[-1]} tokens"

    @property
    def too_long(self) -> tuple[str, str]:
        """See RowLayout."""
        return (
            f"have more than {self.limit}",
            "raise model.data.seq_length or model.encoder_seq_length, or give shorter and different texts",
        )

    def left_out(self, record: TextRow) -> str | None:
        """See RowLayout."""
        if self.generates and not record.same_context:
            raise UserError(
                "the conversations of 'chosen' and 'rejected' differ before their last turns",
                fix="let both be one turn of the assistant, after the same prompt",
            )
        if self.generates and record.prompt and "" in record.responses and not self.encode.append_eos:
            raise UserError(
                "an empty response has no token to learn",
                fix="set model.data.append_eod=True, and its end is learned, or remove the row",
            )
        same = len(set(record.texts)) < len(record.texts)
        return "are of the same text twice, which has no training signal," if same else None

    def surely_fits(self, record: TextRow) -> bool:
        """See RowLayout."""
        return all(_CERTAINLY_ENOUGH <= most_tokens(text) <= self.lengths[-1] for text in record.texts)

    def __call__(self, record: TextRow) -> list[Row]:
        """See RowLayout."""
        if self.generates and record.responses:
            sequences = self._after_prompt(record)
        else:
            sequences = [self._whole(text, record) for text in record.texts]
        counts = [len(sequence.tokens) for sequence in sequences]
        if min(counts) < self.lengths[0]:
            raise UserError(
                f"a text has {min(counts)} tokens, and {self.lengths[0]} are the fewest",
                fix="write a longer text, or remove the row",
            )
        if max(counts) > self.lengths[-1]:
            return []
        prompt = "" if record.responses else record.prompt
        return [
            Row(
                sequences=tuple(sequences),
                labels=record.labels,
                rewards=record.rewards,
                text=prompt,
                extras=record.extras,
            )
        ]

    def _whole(self, text: str, record: TextRow) -> TokenSequence:
        """The tokens of a text; of a response the last one counts, where its reward is read."""
        ids = self.encode(text, rendered=record.rendered)
        mask = [False] * len(ids)
        if len(ids) > 1 and record.responses:
            mask[-1] = True
        return TokenSequence(tokens=ids, loss_mask=mask)

    def _after_prompt(self, record: TextRow) -> list[TokenSequence]:
        if not record.prompt:
            return self._where_they_part(record)
        tokenizer, prompt = self.encode.tokenizer, record.prompt
        ids = self.encode(prompt, rendered=record.rendered, append_eos=False)
        asked = tokenizer.encode(prompt)
        sequences = []
        for response in record.responses:
            own = continuation(tokenizer, prompt, asked, response)
            if stop := end_of_turn(tokenizer, own):
                own = own[:stop]
            elif self.encode.append_eos:
                own = [*own, tokenizer.eos_id]
            mask = [False] * len(ids) + [True] * len(own)
            sequences.append(TokenSequence(tokens=[*ids, *own], loss_mask=mask))
        return sequences

    def _where_they_part(self, record: TextRow) -> list[TokenSequence]:
        """A row without a border: what all of its texts begin with counts as the prompt."""
        texts = [self.encode(text, rendered=record.rendered) for text in record.texts]
        shared = 0
        while shared < min(map(len, texts)) - 1 and len({ids[shared] for ids in texts}) == 1:
            shared += 1
        # Nothing predicts the first token.
        border = max(shared, 1)
        return [TokenSequence(tokens=ids, loss_mask=[i >= border for i in range(len(ids))]) for ids in texts]
