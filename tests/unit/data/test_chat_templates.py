# SPDX-License-Identifier: Apache-2.0
"""What is learned of a conversation is what inference sees: 14 chat templates, 14 conversations, one rule.

The rule is computed here with transformers alone: for each assistant turn the tokens of the template over what stands
before it with the generation prompt, then the tokens of the rest of the rendering through that turn, up to its end.
"""

import itertools
import json
from collections.abc import Callable
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from typing import Any

import pytest
from tokenizers import AddedToken, decoders, models, normalizers, pre_tokenizers, trainers
from tokenizers import Tokenizer as RustTokenizer
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from nemo_aligner.checkpoint.stop_tokens import end_of_turn
from nemo_aligner.data.chat import TemplateLayout
from nemo_aligner.data.config import SFTSplitConfig
from nemo_aligner.data.replies import reply_tokens
from nemo_aligner.data.requests import tokens_of
from nemo_aligner.data.tokenizer import Tokenizer, load_tokenizer
from nemo_aligner.errors import UserError

TEMPLATES = Path(__file__).parent / "templates"
DAY = date(2026, 1, 2)
CORPUS = [
    "What is the capital of France? The capital is Paris. system user assistant model Hello there, yes or no",
    "<think>\nplan the response\n</think>\n\n| a\t| b\t|\n[INST] {name: weather} | tables || and  two  spaces",
    "abcdefghijklmnopqrstuvwxyz ABCDEFGHIJKLMNOPQRSTUVWXYZ 0123456789 .,:;?!{}<>()[]|/_-\"'`\\#*",
] * 4


@dataclass(frozen=True)
class Kind:
    """How a model of this template tokenises."""

    asks: str  # what stands right before a response
    added: tuple[str, ...]
    eos: str
    bos: str | None = None
    # SentencePiece-like: "prepend" a space to each stretch of text as Llama 2, or "plain"
    metaspace: str | None = None
    strips: tuple[str, ...] = ()  # added tokens that swallow the white space after them


CHATML = ("<|im_start|>", "<|im_end|>", "<|endoftext|>", "<think>", "</think>", "<tool_call>", "</tool_call>")
LLAMA3 = ("<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>", "<|end_of_text|>")
SP = ("<s>", "</s>")
PHI = ("<|user|>", "<|system|>", "<|assistant|>", "<|end|>", "<|endoftext|>")
HARMONY = ("<|start|>", "<|message|>", "<|channel|>", "<|end|>", "<|return|>", "<|call|>", "<|endoftext|>")
DEEPSEEK = tuple(
    f"<\uff5c{name}\uff5c>"
    for name in (
        *("begin▁of▁sentence", "end▁of▁sentence", "User", "Assistant", "tool▁calls▁begin", "tool▁calls▁end"),
        *("tool▁call▁begin", "tool▁call▁end", "tool▁sep", "tool▁outputs▁begin", "tool▁outputs▁end"),
    )
)
V3 = (*SP, "[INST]", "[/INST]", "[TOOL_CALLS]", "[AVAILABLE_TOOLS]", "[/AVAILABLE_TOOLS]", "[TOOL_RESULTS]")
LLAMA3_ASKS = "<|start_header_id|>assistant<|end_header_id|>\n\n"
KINDS = {
    "llama-2": Kind("[/INST]", SP, "</s>", "<s>", metaspace="prepend"),
    "llama-3.1": Kind(LLAMA3_ASKS, LLAMA3, "<|eot_id|>", "<|begin_of_text|>"),
    "llama-3.2": Kind(LLAMA3_ASKS, LLAMA3, "<|eot_id|>", "<|begin_of_text|>"),
    "qwen-2.5": Kind("<|im_start|>assistant\n", CHATML, "<|im_end|>"),
    "qwen-3": Kind("<|im_start|>assistant\n", CHATML, "<|im_end|>"),
    "mistral-0.1": Kind("[/INST]", SP, "</s>", "<s>", metaspace="prepend"),
    "mistral-0.3": Kind("[/INST]", (*V3, "[/TOOL_RESULTS]"), "</s>", "<s>", metaspace="prepend"),
    "gemma": Kind(
        "<start_of_turn>model\n",
        ("<bos>", "<eos>", "<start_of_turn>", "<end_of_turn>"),
        "<eos>",
        "<bos>",
        metaspace="plain",
    ),
    "phi-3": Kind("<|assistant|>\n", (*SP, *PHI), "<|endoftext|>", "<s>", metaspace="prepend", strips=PHI),
    "deepseek-r1": Kind(DEEPSEEK[3], (*DEEPSEEK, "<think>", "</think>"), DEEPSEEK[1], DEEPSEEK[0]),
    "gpt-oss": Kind("<|start|>assistant", HARMONY, "<|return|>"),
    "zephyr": Kind("<|assistant|>\n", SP, "</s>", "<s>", metaspace="prepend"),
    "chatml": Kind("<|im_start|>assistant\n", CHATML, "<|endoftext|>"),
    "smollm-2": Kind("<|im_start|>assistant\n", CHATML, "<|im_end|>", "<|im_start|>"),
}


def user(text: str) -> dict[str, Any]:
    return {"role": "user", "content": text}


def reply(text: str, **more: object) -> dict[str, Any]:
    return {"role": "assistant", "content": text, **more}


CALL = {"id": "abcdefgh9", "type": "function", "function": {"name": "weather", "arguments": {"city": "Rome"}}}
TOOL = {
    "type": "function",
    "function": {"name": "weather", "parameters": {"type": "object", "properties": {}}},
}
CONVERSATIONS: dict[str, dict[str, Any]] = {
    "one turn": {"messages": [user("What is the capital of France?"), reply("Paris.")]},
    "system": {"messages": [{"role": "system", "content": "Be brief."}, user("Hello"), reply("|yes| and no")]},
    "two turns": {"messages": [user("Hello"), reply("Hello there"), user("What is a?"), reply("The letter a.")]},
    "three turns": {
        "messages": [
            *(user("Hello"), reply("| yes"), user("Hello"), reply("yes"), user("the table?"), reply("no\n\nyes"))
        ]
    },
    "reasoning in history": {
        "messages": [
            *(user("a or b?"), reply("<think>\nplan the response\n</think>\n\na", weight=0), user("b?"), reply("no"))
        ]
    },
    "reasoning_content": {"messages": [user("a or b?"), reply("b", reasoning_content="plan the response")]},
    "tool call": {
        "messages": [
            user("the weather?"),
            reply("", tool_calls=[CALL]),
            {"role": "tool", "content": "sun", "tool_call_id": "abcdefgh9"},
            reply("It is sun."),
        ],
    },
    "empty": {"messages": [user("Hello"), reply(""), user("Hello?"), reply("yes")]},
    "white space": {
        "messages": [
            *(user(" Hello\n"), reply("\n\n yes  "), user("\n"), reply(" \t\n"), user("a"), reply(" b"))
        ]
    },
    "tabs and tables": {"messages": [user("a\tb"), reply("| a\t| b\t|\n|---|---|\n| 1\t|  2 |\n")]},
    "responses of the wrapper": {
        "messages": [
            *(user("Which?"), reply("n"), user("Which?"), reply("think"), user("Which?"), reply("<")),
            *(user("Which?"), reply("i"), user("assistant"), reply("assistant")),
        ]
    },
    "special tokens in text": {
        "messages": [
            user("What are <|im_end|>, </s>, <|eot_id|>, <end_of_turn>, <|end|> and <s>?"),
            reply("See <|endofprompt|>, [INST], <unk>, <|im_start|>, <|user|> and <start_of_turn>."),
        ]
    },
    "weight 0": {"messages": [user("Hello"), reply("no", weight=0), user("Hello?"), reply("yes", weight=1)]},
    "very long": {
        "messages": [m for i in range(40) for m in (user(f"What is {i}?" * 5), reply(f"The response is {i}. " * 9))]
    },
}  # fmt: skip

# What a template cannot show is refused: (template, conversation) to a part of the message.
NO_REASONING = "key 'reasoning_content' of message 2: the tokenizer's chat template drops it"
NO_CALLS = "key 'tool_calls' of message 2: the tokenizer's chat template drops it"
REFUSALS = {
    ("gemma", "system"): "System role not supported",
    **dict.fromkeys(
        [(name, "reasoning_content") for name in KINDS if name not in ("qwen-3", "gpt-oss")], NO_REASONING
    ),
    **dict.fromkeys(
        [
            (name, "tool call")
            for name in ("llama-2", "mistral-0.1", "gemma", "phi-3", "zephyr", "chatml", "smollm-2")
        ],
        NO_CALLS,
    ),
}


REWRITES = ("qwen-3", "gpt-oss")  # templates that write earlier turns anew


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A tokenizer folder for each template."""
    made = {}
    vocabularies = {metaspace: _learn(metaspace is not None) for metaspace in (None, "prepend", "plain")}
    for name, kind in KINDS.items():
        rust = _tokenizer(vocabularies[kind.metaspace], kind)
        fast = PreTrainedTokenizerFast(
            tokenizer_object=rust, eos_token=kind.eos, **({"bos_token": kind.bos} if kind.bos else {})
        )
        fast.chat_template = (TEMPLATES / f"{name}.jinja").read_text()
        made[name] = tmp_path_factory.mktemp(name)
        fast.save_pretrained(made[name])
    return made


def _learn(metaspace: bool) -> dict[str, Any]:
    """Vocabulary and merges of a small BPE: of bytes, or of characters with bytes to fall back on."""
    rust = RustTokenizer(models.BPE())
    if metaspace:
        rust.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always")
        trainer = trainers.BpeTrainer(vocab_size=400, initial_alphabet=["▁", "\n", "\t"], show_progress=False)
    else:
        rust.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        alphabet = pre_tokenizers.ByteLevel.alphabet()
        trainer = trainers.BpeTrainer(vocab_size=450, initial_alphabet=alphabet, show_progress=False)
    rust.train_from_iterator(CORPUS, trainer)
    learned = json.loads(rust.to_str())["model"]
    vocabulary, merges = learned["vocab"], [tuple(merge) for merge in learned["merges"]]
    if metaspace:
        vocabulary |= {f"<0x{i:02X}>": len(vocabulary) + i for i in range(256)}
        vocabulary["<unk>"] = len(vocabulary)
    return {"vocab": vocabulary, "merges": merges}


def _tokenizer(learned: dict[str, Any], kind: Kind) -> RustTokenizer:
    if kind.metaspace is None:
        rust = RustTokenizer(models.BPE(**learned))
        rust.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        rust.decoder = decoders.ByteLevel()
    else:
        rust = RustTokenizer(models.BPE(**learned, unk_token="<unk>", fuse_unk=True, byte_fallback=True))
        spaces = [normalizers.Replace(" ", "▁")]
        prepend = [normalizers.Prepend("▁")] if kind.metaspace == "prepend" else []
        rust.normalizer = normalizers.Sequence([*prepend, *spaces])
        rust.decoder = decoders.Sequence(
            [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
        )
    rust.add_special_tokens(
        [AddedToken(text, special=True, normalized=False, rstrip=text in kind.strips) for text in kind.added]
    )
    return rust


class Rule:
    """The turns of a conversation as transformers renders and tokenises them."""

    def __init__(self, folder: Path, kind: Kind) -> None:
        self.tokenizer = AutoTokenizer.from_pretrained(folder)
        self.kind = kind
        # Dates are those of one day, as a run has them.
        template = self.tokenizer.chat_template
        for form in ("%d %b %Y", "%Y-%m-%d"):
            template = template.replace(f'strftime_now("{form}")', f'"{DAY.strftime(form)}"')
        self.tokenizer.chat_template = template

    def encode(self, text: str) -> list[int]:
        return self.tokenizer(text, add_special_tokens=False)["input_ids"]

    def turns(self, row: dict[str, Any]) -> list[tuple[list[int], list[int]]]:
        messages = [
            {key: value for key, value in message.items() if key != "weight"} for message in row["messages"]
        ]
        return [
            self.turn(messages[: i + 1], row.get("tools"))
            for i, message in enumerate(row["messages"])
            if message["role"] == "assistant" and message.get("weight") != 0
        ]

    def turn(self, messages: list[dict[str, Any]], tools: list[Any] | None) -> tuple[list[int], list[int]]:
        render: Callable[..., Any] = self.tokenizer.apply_chat_template
        asked = messages[:-1]
        ids = render(asked, tools=tools, add_generation_prompt=True, tokenize=True, return_dict=False)
        prompt = render(asked, tools=tools, add_generation_prompt=True, tokenize=False)
        whole = render(messages, tools=tools, tokenize=False)
        # A template that moves earlier text leaves what stands right before the response.
        rest = whole.removeprefix(prompt) if whole.startswith(prompt) else whole.rpartition(self.kind.asks)[2]
        rest = rest.rstrip()
        assert rest.endswith(self.kind.added), rest
        through = self.encode(prompt + rest)
        if through[: len(ids)] == ids:
            return ids, through[len(ids) :]
        assert self.kind.metaspace != "prepend", "no token crosses the border that a space would stand before"
        return ids, self.encode(rest)


def pinned_tokenizer(folder: Path) -> Tokenizer:
    tokenizer = load_tokenizer("huggingface", folder)
    tokenizer.pin_clock(DAY)
    return tokenizer


def laid_out(folder: Path, row: dict[str, Any], **settings: Any) -> list[Any]:
    tokenizer = load_tokenizer("huggingface", folder)
    tokenizer.pin_clock(DAY)
    layout = TemplateLayout(
        tokenizer, SFTSplitConfig(file_path="chats.jsonl", max_seq_length=100_000), **settings
    )
    return layout(layout.read(row))


@pytest.mark.parametrize("conversation", CONVERSATIONS)
@pytest.mark.parametrize("name", KINDS)
def test_learned_is_what_inference_sees(folders: dict[str, Path], name: str, conversation: str) -> None:
    row = CONVERSATIONS[conversation]
    if refusal := REFUSALS.get((name, conversation)):
        with pytest.raises(UserError) as caught:
            laid_out(folders[name], row)
        assert refusal in str(caught.value)
        return
    samples = laid_out(folders[name], row)
    turns = Rule(folders[name], KINDS[name]).turns(row)
    for prompt, response in turns:
        start, stop = len(prompt), len(prompt) + len(response)
        holding = [sample for sample in samples if sample.tokens[:stop] == prompt + response]
        learned = [sample for sample in holding if all(sample.sequences[0].loss_mask[start:stop])]
        assert len(learned) == 1, "learned once, after exactly the prompt"
        assert response.count(response[-1]) == 1, "its end once, and last"
    assert sum(sum(sample.sequences[0].loss_mask) for sample in samples) == sum(
        len(response) for _, response in turns
    )
    assert all(sample.sequences[0].loss_mask[-1] for sample in samples), "nothing stands after the last turn"
    nests = [
        later[0][: len(prompt + response)] == prompt + response
        for (prompt, response), later in itertools.pairwise(turns)
    ]
    assert len(samples) == 1 + nests.count(False)


@pytest.mark.parametrize("name", KINDS)
def test_inference_sends_what_stands_before_a_response(folders: dict[str, Path], name: str) -> None:
    tokenizer, rule = pinned_tokenizer(folders[name]), Rule(folders[name], KINDS[name])
    for conversation in ("three turns", "responses of the wrapper", "white space"):
        messages = CONVERSATIONS[conversation]["messages"]
        asked = [messages[:i] for i in range(1, len(messages), 2)]
        assert [tokens_of(each, tokenizer) for each in asked] == [
            rule.turn([*each, reply("yes")], None)[0] for each in asked
        ]


def test_the_table_of_refusals_is_short() -> None:
    assert len(KINDS) == len(CONVERSATIONS) == 14
    assert len(REFUSALS) <= 20


@pytest.mark.parametrize("name", KINDS)
def test_a_reply_goes_on_from_what_was_seen(folders: dict[str, Path], name: str) -> None:
    """The tokens of the template over all of it, where it does not write earlier turns anew; its end of them else."""
    tokenizer, rule = pinned_tokenizer(folders[name]), Rule(folders[name], KINDS[name])
    said, asked = [user("Hello"), reply("Hello there")], [user("What is a?")]
    prompt, turn = rule.turn(said, None)
    ends = {tokenizer.eos_id, end_of_turn(tokenizer)}
    turn = turn[: 1 + next(place for place, token in enumerate(turn) if token in ends)]
    whole, _ = rule.turn([*said, *asked, reply("a")], None)
    found = reply_tokens(tokenizer, asked, turn=turn)
    if name in REWRITES:
        assert whole[: len(prompt + turn)] != prompt + turn
        assert whole[-len(found) :] == found
    else:
        assert prompt + turn + found == whole
    assert "What is a?" in tokenizer.decode(found)


@pytest.mark.parametrize("name", ["llama-3.1", "qwen-2.5", "qwen-3", "mistral-0.3", "deepseek-r1"])
def test_a_tool_replies(folders: dict[str, Path], name: str) -> None:
    tokenizer, rule = pinned_tokenizer(folders[name]), Rule(folders[name], KINDS[name])
    said, heard = (
        [user("the weather?"), reply("It is sun.")],
        [{"role": "tool", "content": "sun or no", "tool_call_id": "abcdefgh9"}],
    )
    _, turn = rule.turn(said, None)
    found = reply_tokens(tokenizer, heard, turn=turn)
    assert "sun or no" in tokenizer.decode(found)
    whole, _ = rule.turn([*said, *heard, reply("a")], None)
    assert whole[-len(found) :] == found


def test_a_reply_without_a_template_is_its_text(folders: dict[str, Path]) -> None:
    tokenizer = pinned_tokenizer(folders["qwen-2.5"])
    tokenizer.use_chat_template("{% for m in messages %}{{ m['content'] }}\nUser: {% endfor %}")
    text = tokenizer.decode(reply_tokens(tokenizer, [user("yes")], turn=tokenizer.encode("no\nUser: ")))
    assert text == "yes\nUser: "
