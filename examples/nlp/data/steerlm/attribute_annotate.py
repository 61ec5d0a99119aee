# SPDX-License-Identifier: Apache-2.0
"""Label the responses of conversations with the attributes that a served attribute model gives them.

    python attribute_annotate.py --input-file chats.jsonl --output-file labeled.jsonl --port 5555

The labels stand before the responses of ``labeled.jsonl``: train_gpt_sft.py with model.data.chat=True learns from them.
An annotation that was interrupted goes on where it stopped.
"""

import argparse
import hashlib
import logging
import sys
from dataclasses import fields
from pathlib import Path

import numpy as np

from nemo_aligner.data.attributes import HELPSTEER, LabelForm, Rate, annotate
from nemo_aligner.data.chat import read_markable_chat
from nemo_aligner.data.common_rows import Recognised
from nemo_aligner.data.config import ChatPromptTokens
from nemo_aligner.data.records import RecordFile
from nemo_aligner.errors import UserError
from nemo_aligner.launch.cli import run_cli
from nemo_aligner.serving.http_client import HttpClient, ServerAddress

logger = logging.getLogger(__name__)


def main() -> None:
    """Run from the command line."""
    parser = argparse.ArgumentParser(description="Label responses with a served model's attributes.")
    parser.add_argument("--input-file", type=Path, required=True, help="conversations: .jsonl, or .jsonl.gz")
    parser.add_argument("--output-file", type=Path, required=True, help="the file to write")
    parser.add_argument("--host", default="localhost", help="where serve_reward_model.py runs")
    parser.add_argument("--port", type=int, default=5555, help="its inference.port")
    parser.add_argument("--model_name", default="reward_model", help="its inference.model_name")
    parser.add_argument("--batch-size", type=int, default=32, help="conversations that are rated at once")
    parser.add_argument("--attributes", nargs="+", default=HELPSTEER, help="the model's, in its order")
    parser.add_argument(
        "--bounds", nargs=2, type=int, default=(0, 4), help="lowest and highest number of a label"
    )
    tokens = [field.name for field in fields(ChatPromptTokens)]
    parser.add_argument(
        "--chat-prompt-tokens",
        nargs="*",
        default=[],
        metavar="NAME=TEXT",
        help=f"what marks turns, as in the model's training, if not as by default: {', '.join(tokens)}",
    )
    parser.add_argument(
        "--add-eos",
        action="store_true",
        help="end each text with EOS, as model.data.append_eod=True did in the attribute model's training",
    )
    parser.add_argument("--overwrite", action="store_true", help="replace the output if it is there")
    args = parser.parse_args()
    if args.output_file.exists() and not args.overwrite:
        raise UserError(f"{args.output_file} exists", fix="add --overwrite, or name another --output-file")
    if args.batch_size < 1:
        raise UserError(f"--batch-size {args.batch_size} is out of range", fix="set it to 1 or more")
    marks = dict(word.partition("=")[::2] for word in args.chat_prompt_tokens)
    if unknown := sorted(marks.keys() - set(tokens)):
        raise UserError(f"--chat-prompt-tokens: there is no {unknown[0]}", fix=f"use {', '.join(tokens)}")
    prompt_tokens = ChatPromptTokens(**marks)
    recognised, form = Recognised(args.input_file), LabelForm(names=args.attributes, bounds=args.bounds)
    chats = RecordFile(args.input_file, lambda row: read_markable_chat(row, recognised))
    server = ServerAddress(
        setting="attribute_annotate.py", job="serve_reward_model.py", ip=args.host, port=args.port
    )
    # Of other conversations, or with other labels, nothing is gone on with.
    digest = hashlib.sha256(
        f"{chats.fingerprint} {form} {prompt_tokens} {args.add_eos}".encode()
    ).hexdigest()[:8]
    unfinished = args.output_file.with_name(f".{args.output_file.name}.{digest}")
    rate = rater(HttpClient(server), args.model_name, add_eos=args.add_eos)
    annotate(chats, unfinished, rate, form=form, tokens=prompt_tokens, batch_size=args.batch_size)
    unfinished.replace(args.output_file)
    sys.stdout.write(f"wrote {len(chats)} conversations to {args.output_file}\n")


def rater(server: HttpClient, endpoint: str, *, add_eos: bool) -> Rate:
    """A function that asks the server for the attributes of texts."""

    def rate(texts: list[str]) -> list[list[float] | None]:
        sentences = np.array([[text.encode()] for text in texts], dtype=np.object_)
        reply = server.call(endpoint, {"sentences": sentences, "add_EOS": np.full((len(texts), 1), add_eos)})
        cut = reply["exceeded"][:, 0]
        if cut.any():
            logger.warning("%d responses are longer than the model takes, and get no label", cut.sum())
        return [None if long else x for x, long in zip(reply["rewards"].tolist(), cut, strict=True)]

    return rate


if __name__ == "__main__":
    run_cli(main)
