# SPDX-License-Identifier: Apache-2.0
"""How a language model is to write: what every sampler takes, whatever runs it. Imports no torch."""

from dataclasses import dataclass

from nemo_aligner.bounds import bounded, check_bounds
from nemo_aligner.errors import UserError

_MEANS_NOTHING = ("{key}={value} is not {range}", "set {key} to a value that is")


@dataclass(frozen=True, kw_only=True)
class DrawConfig:
    """How the next token is drawn. The defaults draw from the model's own distribution."""

    # take the most likely token; temperature, top_k, top_p and min_p then do nothing
    use_greedy: bool = False
    # logits are divided by it
    temperature: float = bounded(
        1.0, above=0, to="above 0; for the most likely token set use_greedy", message=_MEANS_NOTHING
    )
    top_k: int = bounded(0, at_least=0, message=_MEANS_NOTHING)  # only the k most likely tokens; 0: all
    # only the most likely tokens that together have this probability; 0 or 1: all
    top_p: float = bounded(1.0, at_least=0, at_most=1, to="from 0 to 1", message=_MEANS_NOTHING)
    # only tokens at least this likely as a share of the most likely one's probability; 0: all
    min_p: float = bounded(0.0, at_least=0, below=1, to="0 or more and below 1", message=_MEANS_NOTHING)
    # above 1: tokens that stand in the prompt or the response become less likely
    repetition_penalty: float = bounded(1.0, above=0, to="above 0", message=_MEANS_NOTHING)


@dataclass(frozen=True, kw_only=True)
class SamplingConfig(DrawConfig):
    """How the next token is drawn, and when a response ends."""

    max_length: int = bounded(256, at_least=1, message=_MEANS_NOTHING)  # tokens of a response, at most
    min_length: int = 1  # tokens of a response before its end token, at least
    # texts that end a response, as the model's own end tokens do, e.g. ["<extra_id_1>"]; escapes are understood
    end_strings: tuple[str, ...] = ()
    seed: int = 1234  # of the draws: a response is a function of it, the prompt's line and the weights

    @property
    def truncates(self) -> bool:
        """True if tokens are left out for being unlikely."""
        return not self.use_greedy and (self.top_k > 0 or 0 < self.top_p < 1 or self.min_p > 0)

    @property
    def scale(self) -> float:
        """The divisor of logits."""
        return 1.0 if self.use_greedy else self.temperature

    def check(self, block: str) -> None:
        """Raise UserError for values out of range.

        Args:
            block: where these settings stand, as in "sampling", for the message.

        Raises:
            UserError: naming the setting, its value and the values that go.
        """
        check_bounds(self, block)
        for name, value, fits, allowed in (
            ("min_length", self.min_length, 0 <= self.min_length <= self.max_length, "from 0 to max_length"),
            ("end_strings", self.end_strings, all(self.end_strings), "of texts that are not empty"),
        ):
            if not fits:
                raise UserError(
                    f"{block}.{name}={value} is not {allowed}", fix=f"set {block}.{name} to a value that is"
                )
