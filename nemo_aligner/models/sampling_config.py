# SPDX-License-Identifier: Apache-2.0
"""How a language model is to write: what every sampler takes, whatever runs it. Imports no torch."""

from dataclasses import dataclass

from nemo_aligner.errors import UserError

__all__ = ["SamplingConfig"]


@dataclass(frozen=True, kw_only=True)
class SamplingConfig:
    """How the next token is drawn, and when an answer ends. The defaults draw from the model's own distribution."""

    use_greedy: bool = (
        False  # take the most likely token; temperature, top_k, top_p and min_p then do nothing
    )
    temperature: float = 1.0  # logits are divided by it
    top_k: int = 0  # only the k most likely tokens; 0: all
    top_p: float = 1.0  # only the most likely tokens that together have this probability; 0 or 1: all
    min_p: float = (
        0.0  # only tokens at least this likely as a share of the most likely one's probability; 0: all
    )
    repetition_penalty: float = (
        1.0  # tokens that stand in the prompt or the answer become less likely; 1: never
    )
    max_length: int = 256  # tokens of an answer
    min_length: int = 1  # no answer ends before it has this many tokens, its end token not counted
    end_strings: tuple[str, ...] = ()  # text that ends an answer, as the model's own end tokens do
    seed: int = 1234  # of the draws

    @property
    def truncates(self) -> bool:
        """Whether tokens are left out for being unlikely."""
        return not self.use_greedy and (self.top_k > 0 or 0 < self.top_p < 1 or self.min_p > 0)

    @property
    def scale(self) -> float:
        """What logits are divided by."""
        return 1.0 if self.use_greedy else self.temperature

    def check(self, block: str) -> None:
        """Refuse values that mean nothing.

        Args:
            block: where these settings stand, as in "sampling", for the message.

        Raises:
            UserError: naming the setting, its value and the values that go.
        """
        for name, value, fits, allowed in (
            (
                "temperature",
                self.temperature,
                self.temperature > 0,
                "above 0; for the most likely token set use_greedy",
            ),
            ("top_k", self.top_k, self.top_k >= 0, "0 or more"),
            ("top_p", self.top_p, 0 <= self.top_p <= 1, "from 0 to 1"),
            ("min_p", self.min_p, 0 <= self.min_p < 1, "0 or more and below 1"),
            ("repetition_penalty", self.repetition_penalty, self.repetition_penalty > 0, "above 0"),
            ("max_length", self.max_length, self.max_length > 0, "1 or more"),
            ("min_length", self.min_length, 0 <= self.min_length <= self.max_length, "from 0 to max_length"),
            ("end_strings", self.end_strings, all(self.end_strings), "of texts that are not empty"),
        ):
            if not fits:
                raise UserError(
                    f"{block}.{name}={value} is not {allowed}", cure=f"set {block}.{name} to a value that is"
                )
