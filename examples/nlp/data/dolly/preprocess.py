# SPDX-License-Identifier: Apache-2.0
"""Convert Databricks Dolly rows to the prompt and response that supervised fine-tuning reads.

    python preprocess.py --input databricks-dolly-15k.jsonl

writes databricks-dolly-15k-output.jsonl beside it.
"""

import argparse
import gzip
import json
import os
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

from nemo_aligner.data.dolly import dolly_to_prompt_response
from nemo_aligner.data.row_files import parse_line
from nemo_aligner.errors import UserError
from nemo_aligner.launch.cli import run_cli


def main() -> None:
    """Run from the command line."""
    parser = argparse.ArgumentParser(description="Convert Dolly rows to {input, output, category}.")
    parser.add_argument("--input", type=Path, required=True, help="Dolly's rows: .jsonl or .jsonl.gz")
    parser.add_argument("--output", type=Path, help="the file to write; default: INPUT-output.jsonl")
    parser.add_argument("--overwrite", action="store_true", help="replace the output if it is there")
    parser.add_argument("--dataset-impl", choices=["text"], default="text", help="only JSON text is written")
    args = parser.parse_args()
    output = args.output or default_output(args.input)
    num_rows = convert(args.input, output, overwrite=args.overwrite)
    sys.stdout.write(f"wrote {num_rows} rows to {output}\n")


def default_output(source: Path) -> Path:
    """``F.jsonl`` and ``F.jsonl.gz`` become ``F-output.jsonl``, beside the source."""
    name = source.name.removesuffix(".gz").removesuffix(".jsonl")
    return source.with_name(f"{name}-output.jsonl")


def convert(source: Path, output: Path, *, overwrite: bool) -> int:
    """Write ``output``, whole or not at all; the number of rows.

    Raises:
        UserError: a bad line, nothing to read, or an output that is there already.
    """
    if not source.is_file():
        raise UserError(f"--input: there is no file {source}", fix="download databricks-dolly-15k.jsonl")
    if output.exists() and not overwrite:
        raise UserError(f"{output} exists", fix="add --overwrite, or name another file with --output")
    if not output.parent.is_dir():
        raise UserError(f"--output: there is no folder {output.parent}", fix=f"mkdir -p {output.parent}")
    num_rows = 0
    descriptor, unfinished = tempfile.mkstemp(dir=output.parent, prefix=f".{output.name}.")
    try:
        with open(descriptor, "w", encoding="utf-8") as file:
            for row in rows(source):
                file.write(json.dumps(row, ensure_ascii=False) + "\n")
                num_rows += 1
        if not num_rows:
            raise UserError(f"{source} has no rows", fix="download databricks-dolly-15k.jsonl again")
        # mkstemp makes files that only their owner may read.
        os.chmod(unfinished, 0o666 & ~_umask())
        os.replace(unfinished, output)
    finally:
        Path(unfinished).unlink(missing_ok=True)
    return num_rows


def rows(source: Path) -> Iterator[dict[str, str]]:
    """The converted rows; UserError naming the line of a bad one."""
    with gzip.open(source, "rb") if source.suffix == ".gz" else source.open("rb") as file:
        for number, line in enumerate(file, start=1):
            if not line.strip():
                continue
            try:
                yield dolly_to_prompt_response(parse_line(line))
            except UserError as error:
                raise UserError(f"{source}, line {number}: {error.problem}", fix=error.fix) from error


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


if __name__ == "__main__":
    run_cli(main)
