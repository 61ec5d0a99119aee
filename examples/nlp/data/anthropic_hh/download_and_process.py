# SPDX-License-Identifier: Apache-2.0
"""Make the pairs that a reward model learns from, and the prompts for PPO, of Anthropic's HH-RLHF.

    python download_and_process.py

downloads the data set and writes {train,test}_comparisons.jsonl and {train,test}_prompts.jsonl. Where it lies on
this machine already, ``--input-dir`` names the folders of its *.jsonl or *.jsonl.gz.
"""

import argparse
import contextlib
import gzip
import hashlib
import http.client
import json
import os
import shutil
import sys
import tempfile
import urllib.request
import zlib
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TextIO

from nemo_aligner.data.records import text_field
from nemo_aligner.data.row_files import parse_line
from nemo_aligner.errors import UserError
from nemo_aligner.launch.cli import run_cli

URL = "https://huggingface.co/datasets/Anthropic/hh-rlhf/resolve/main"
SUBSETS = ("harmless-base", "helpful-base", "helpful-online", "helpful-rejection-sampled")
SPLITS = ("train", "test")
KINDS = ("comparisons", "prompts")
OUTPUTS = tuple(f"{split}_{kind}.jsonl" for split in SPLITS for kind in KINDS)
HUMAN, ASSISTANT = "\n\nHuman: ", "\n\nAssistant: "
TEST_SHARE = 10  # one dialogue in so many, where file names say nothing of splits
DOWNLOAD_TIMEOUT = 60  # seconds without a byte


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """Two responses to one prompt."""

    prompt: str  # ends with "Assistant:"
    chosen: str
    rejected: str


def main() -> None:
    """Run from the command line."""
    parser = argparse.ArgumentParser(description="Make pairs and prompts of Anthropic's HH-RLHF dialogues.")
    parser.add_argument("--output-dir", type=Path, default=Path("./"), help="where to write; default: ./")
    parser.add_argument(
        "--input-dir", type=Path, nargs="+", help="folders of *.jsonl[.gz] to read; default: download"
    )
    parser.add_argument("--overwrite", action="store_true", help="replace the outputs if they are there")
    parser.add_argument("--url", default=URL, help=f"where to download from; default: {URL}")
    args = parser.parse_args()
    check_output(args.output_dir, overwrite=args.overwrite)
    with contextlib.ExitStack() as stack:
        if args.input_dir:
            files = [file for folder in args.input_dir for file in find_files(folder)]
        else:
            folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="nemo_aligner_hh_")))
            files = download(args.url, folder)
        counts = convert(files, args.output_dir)
    sys.stdout.write(report(counts, args.output_dir))


def check_output(folder: Path, *, overwrite: bool) -> None:
    """Make the folder; UserError if one of the outputs is in it and may not be replaced."""
    folder.mkdir(parents=True, exist_ok=True)
    there = [name for name in OUTPUTS if (folder / name).exists()]
    if there and not overwrite:
        raise UserError(
            f"{folder / there[0]} exists", fix="add --overwrite, or name another folder with --output-dir"
        )


def find_files(folder: Path) -> list[Path]:
    """The *.jsonl[.gz] of a folder, but for what this script has written there.

    Raises:
        UserError: there are none.
    """
    found = [path for pattern in ("*.jsonl", "*.jsonl.gz") for path in folder.glob(pattern)]
    files = sorted(path for path in found if path.name not in OUTPUTS)
    if not files:
        raise UserError(
            f"--input-dir: there is no *.jsonl or *.jsonl.gz in {folder}",
            fix="name the folders that hold the files themselves, such as hh-rlhf/harmless-base",
        )
    return files


def download(url: str, folder: Path) -> list[Path]:
    """Fetch the files of all subsets into ``folder``.

    Raises:
        UserError: one cannot be fetched.
    """
    files = []
    for name in (f"{subset}/{split}.jsonl.gz" for split in SPLITS for subset in SUBSETS):
        path = folder / name
        path.parent.mkdir(exist_ok=True)
        sys.stderr.write(f"downloading {url}/{name}\n")
        try:
            with (
                urllib.request.urlopen(f"{url}/{name}", timeout=DOWNLOAD_TIMEOUT) as response,
                path.open("wb") as file,
            ):
                shutil.copyfileobj(response, file)
        except (OSError, http.client.HTTPException, ValueError) as error:
            raise UserError(
                f"{url}/{name} cannot be downloaded: {error}",
                fix="download its folders by other means and name them with --input-dir",
            ) from error
        files.append(path)
    return files


def convert(files: Sequence[Path], folder: Path) -> Counter[str]:
    """Write the four outputs, all or none of them; how many pairs each split has, and what was left out.

    Raises:
        UserError: a line cannot be read, or no pair is left.
    """
    counts: Counter[str] = Counter({split: 0 for split in SPLITS})
    with unfinished(folder) as outputs:
        for path in files:
            named = next((split for split in SPLITS if path.name.startswith(split)), None)
            for found in comparisons(path):
                if isinstance(found, str):
                    counts[found] += 1
                    continue
                split = named or hashed_split(found.prompt)
                counts[split] += 1
                write(outputs[f"{split}_comparisons.jsonl"], f"{found.prompt} {found.chosen}")
                write(outputs[f"{split}_comparisons.jsonl"], f"{found.prompt} {found.rejected}")
                write(outputs[f"{split}_prompts.jsonl"], found.prompt)
        if not any(counts[split] for split in SPLITS):
            raise UserError(
                f"no pair is left of {', '.join(map(str, files))}: {dict(counts)}",
                fix="give files of Anthropic's HH-RLHF as they were published",
            )
    return counts


def compare(row: Mapping[str, object]) -> Comparison | str:
    """The comparison of a row {chosen, rejected}, or why there is none."""
    chosen, rejected = (dialogue(text_field(row, key)) for key in ("chosen", "rejected"))
    if chosen is None or rejected is None:
        return "malformed"
    if chosen[0] != rejected[0]:
        return "unlike"
    return Comparison(prompt=chosen[0], chosen=chosen[1], rejected=rejected[1])


def dialogue(text: str) -> tuple[str, str] | None:
    r"""Prompt and last response of a dialogue; None unless each turn of Human has one of Assistant after it.

    >>> dialogue("\n\nHuman: Hi\n\nAssistant: Hello\n\nHuman: Bye\n\nAssistant: Goodbye")
    ('User: Hi\n\nAssistant: Hello\n\nUser: Bye\n\nAssistant:', 'Goodbye')
    """
    before, *turns = text.split(HUMAN)
    exchanges = [turn.split(ASSISTANT) for turn in turns]
    if before or not exchanges or any(len(exchange) != 2 for exchange in exchanges):
        return None
    *earlier, (question, response) = exchanges
    parts = [f"User: {asked}\n\nAssistant: {answered}" for asked, answered in earlier]
    return "\n\n".join([*parts, f"User: {question}\n\nAssistant:"]), response


def hashed_split(prompt: str) -> str:
    """The split of a prompt, the same for all pairs that share it."""
    digest = hashlib.sha256(prompt.encode()).digest()
    return "test" if int.from_bytes(digest[:8], "big") % TEST_SHARE == 0 else "train"


def comparisons(path: Path) -> Iterator[Comparison | str]:
    """The rows of a file as ``compare`` sees them; UserError naming the line of a bad one."""
    number = 0
    try:
        with gzip.open(path, "rb") if path.suffix == ".gz" else path.open("rb") as file:
            for line in file:
                number += 1
                if line.strip():
                    yield compare(parse_line(line))
    except UserError as error:
        raise UserError(f"{path}, line {number}: {error.problem}", fix=error.fix) from error
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise UserError(f"{path} is damaged after line {number}: {error}", fix="fetch it again") from error


def write(file: TextIO, text: str) -> None:
    """One line."""
    file.write(json.dumps({"text": text}, ensure_ascii=False) + "\n")


@contextlib.contextmanager
def unfinished(folder: Path) -> Iterator[dict[str, TextIO]]:
    """The outputs under hidden names, which become their own where all goes well and vanish where it does not."""
    hidden = {name: folder / f".{name}.{os.getpid()}" for name in OUTPUTS}
    try:
        with contextlib.ExitStack() as stack:
            yield {
                name: stack.enter_context(path.open("w", encoding="utf-8")) for name, path in hidden.items()
            }
        for name, path in hidden.items():
            path.replace(folder / name)
    finally:
        for path in hidden.values():
            path.unlink(missing_ok=True)


def report(counts: Mapping[str, int], folder: Path) -> str:
    """A summary of what was written and what was left out."""
    return (
        f"wrote {counts['train']} train and {counts['test']} test pairs and their prompts to {folder}\n"
        f"left out {counts['malformed']} dialogues with malformed turns "
        f"and {counts['unlike']} whose responses are to different prompts\n"
    )


if __name__ == "__main__":
    run_cli(main)
