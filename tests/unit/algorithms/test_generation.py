# SPDX-License-Identifier: Apache-2.0
"""What a person sees of a response while it is written: never what a later token takes back."""

from collections.abc import Sequence

import pytest
from tokenizers import Tokenizer as Rust
from tokenizers import decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from nemo_aligner.algorithms.generation import StreamedResponse
from nemo_aligner.data.tokenizer import Tokenizer, load_tokenizer


@pytest.fixture(scope="module")
def byte_tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    """A token for each byte, and </s> as 0."""
    rust = Rust(models.BPE())
    rust.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    rust.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    rust.train_from_iterator(
        [],
        trainers.BpeTrainer(
            vocab_size=257, special_tokens=["</s>"], initial_alphabet=alphabet, show_progress=False
        ),
    )
    folder = tmp_path_factory.mktemp("bytes")
    PreTrainedTokenizerFast(tokenizer_object=rust, eos_token="</s>").save_pretrained(folder)
    return load_tokenizer("huggingface", folder)


@pytest.mark.parametrize(
    ("text", "end_strings", "response"),
    [
        ("two words", (), "two words"),
        ("  white space\n\n around \n", (), "white space\n\n around"),
        ("na\u00efve \u65e5\u672c \U0001f600!", (), "na\u00efve \u65e5\u672c \U0001f600!"),
        ("yes<end>", ("<end>",), "yes"),
        ("a < b <en> yes <end>", ("<end>", "\n\nHuman:"), "a < b <en> yes"),
        ("x\n\nHuma", ("<end>", "\n\nHuman:"), "x\n\nHuma"),
        ("", (), ""),
    ],
)
def test_pieces_are_the_response(
    byte_tokenizer: Tokenizer, text: str, end_strings: Sequence[str], response: str
):
    stream = StreamedResponse(byte_tokenizer, [0], end_strings)
    pieces = [stream.more([token]) for token in [*byte_tokenizer.encode(text), 0]]
    shown = "".join(pieces)
    assert response.startswith(shown)
    assert len(shown) > len(response) - 8, "little is held back"
    assert shown + stream.rest(response) == response


def test_a_response_that_came_out_otherwise_is_shown_whole(byte_tokenizer: Tokenizer):
    stream = StreamedResponse(byte_tokenizer, [0], ())
    assert stream.more(byte_tokenizer.encode("one")) == "one"
    assert stream.rest("another") == "\nanother"
