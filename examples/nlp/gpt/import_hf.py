# SPDX-License-Identifier: Apache-2.0
"""Make a .nemo of a Hugging Face folder (Llama, Mistral, Qwen2, Qwen3, Nemotron), a GGUF file or a model of the hub.

The other scripts take all of these as they are; a .nemo is one file, whose digests tell damage.

python examples/nlp/gpt/import_hf.py --in-file MODEL --out-file model.nemo
"""

import argparse
from pathlib import Path

from nemo_aligner.launch.cli import run_cli


def main() -> None:
    """Converts as the command line says."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--in-file",
        type=Path,
        required=True,
        help="a Hugging Face folder, a .gguf file or OWNER/NAME",
    )
    parser.add_argument("--out-file", required=True, help="the .nemo to write; with / at its end, a folder")
    parser.add_argument("--overwrite", action="store_true", help="replace an output that exists")
    args = parser.parse_args()
    from nemo_aligner.checkpoint.convert import import_from_huggingface

    import_from_huggingface(args.in_file, args.out_file, overwrite=args.overwrite)


if __name__ == "__main__":
    run_cli(main)
