# SPDX-License-Identifier: Apache-2.0
"""Where texts end: by generation_config, the tokenizer and the chat template, in the published templates' forms."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer, GenerationConfig

from nemo_aligner.checkpoint.convert import export_to_huggingface, import_from_huggingface
from nemo_aligner.checkpoint.nemo_archive import open_nemo, write_nemo
from nemo_aligner.checkpoint.stop_tokens import end_of_turn, stop_ids
from nemo_aligner.checkpoint.weights import WeightReader, save_weights
from nemo_aligner.data.tokenizer import Tokenizer, load_tokenizer
from nemo_aligner.errors import UserError

ADDED = ["<|im_start|>", "<|im_end|>", "<|eot_id|>", "<|end|>", "<|start_header_id|>", "<|end_header_id|>"]
CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
TEMPLATES = {
    "ChatML": (CHATML, "<|im_end|>"),
    "Llama 3": (
        "{% for m in messages %}<|start_header_id|>{{ m.role }}<|end_header_id|>\n\n{{ m.content | trim }}<|eot_id|>"
        "{% endfor %}",
        "<|eot_id|>",
    ),
    "Llama 2": (
        "{% for m in messages %}{% if m.role == 'user' %}<s>[INST] {{ m.content }} [/INST]{% else %}"
        " {{ m.content }} </s>{% endif %}{% endfor %}",
        "</s>",
    ),
    "Phi-3": (
        "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|end|>\n{% endfor %}"
        "{% if not add_generation_prompt %}{{ eos_token }}{% endif %}",
        "<|end|>",
    ),
    "no token": ("{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}", None),
    "a word": ("{% for m in messages %}{{ m.content }} and the next one {% endfor %}", None),
    "nothing": ("{% for m in messages %}{{ m.content }}{% endfor %}", None),
    "no assistant": ("{{ raise_exception('I response nobody') }}", None),
}


@pytest.fixture
def tokenizer(hf_folder: Callable[..., Path]) -> Callable[[str | None], Tokenizer]:
    """The toy tokenizer with the turn tokens of many families, and a chat template."""

    def make(template: str | None) -> Tokenizer:
        folder = hf_folder("llama2")
        tokens = AutoTokenizer.from_pretrained(folder)
        tokens.add_special_tokens({"additional_special_tokens": ADDED})
        tokens.chat_template = template
        tokens.save_pretrained(folder)
        return load_tokenizer("huggingface", folder)

    return make


@pytest.mark.parametrize("name", TEMPLATES)
def test_the_template_says_how_a_turn_ends(tokenizer: Callable[..., Tokenizer], name: str):
    template, end = TEMPLATES[name]
    found = tokenizer(template)
    assert end_of_turn(found) == (None if end is None else found.token_id(end))


def test_all_that_ends_a_text(tokenizer: Callable[..., Tokenizer]):
    chat, plain = tokenizer(CHATML), tokenizer(None)
    eos, turn = chat.eos_id, chat.token_id("<|im_end|>")

    def config(generation: Any, model: Any = None) -> dict[str, Any]:
        kept = {"generation_config": {"eos_token_id": generation}, "config": {"eos_token_id": model}}
        return {"vocab_size": 110, "huggingface": kept}

    assert stop_ids({"vocab_size": 110}, plain) == (eos,)
    assert stop_ids({"vocab_size": 110}, chat) == (eos, turn)
    assert stop_ids(config([90, 91], 80), chat) == (90, 91, eos, turn)
    assert stop_ids(config(turn), chat) == (turn, eos)
    assert stop_ids(config(None, 80), plain) == (80, eos)
    assert stop_ids(config([-1, 90, 110]), None) == (90,)
    with pytest.raises(UserError, match=r"generation_config.eos_token_id=\['</s>'\].* no token id"):
        stop_ids(config(["</s>"]), chat)


def test_an_export_ends_where_we_end(hf_folder: Callable[..., Path], tmp_path: Path):
    """A model that NeMo made knows its tokenizer and no generation_config."""
    import_from_huggingface(hf_folder("llama2"), str(tmp_path / "x.nemo"))
    with open_nemo(tmp_path / "x.nemo") as archive:
        config = {key: value for key, value in archive.config.items() if key != "huggingface"}
        reader = WeightReader(archive.weights)
        write_nemo(
            tmp_path / "y.nemo",
            config=config,
            files={
                path.relative_to(archive.folder).as_posix(): path
                for path in archive.folder.glob("tokenizer/*")
            },
            weights=lambda out: save_weights(out, ((n, reader.read(n)) for n in list(reader.shapes)), 3),
        )
    export_to_huggingface(tmp_path / "y.nemo", tmp_path / "out")
    assert GenerationConfig.from_pretrained(tmp_path / "out").eos_token_id == 2


def test_an_export_keeps_what_it_need_not_change(hf_folder: Callable[..., Path], tmp_path: Path):
    source = hf_folder("llama2")
    import_from_huggingface(source, str(tmp_path / "x.nemo"))
    export_to_huggingface(tmp_path / "x.nemo", tmp_path / "out")
    before, after = (
        json.loads((f / "generation_config.json").read_text()) for f in (source, tmp_path / "out")
    )
    assert before == after
