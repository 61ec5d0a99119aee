# SPDX-License-Identifier: Apache-2.0
"""Make a Hugging Face folder, which transformers loads, of a .nemo.

python examples/nlp/gpt/export_hf.py --in-file model.nemo --out-file HF_FOLDER
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
        "--in-file", type=Path, required=True, help="a .nemo, or the folder it was extracted to"
    )
    parser.add_argument("--out-file", type=Path, required=True, help="the folder to write")
    parser.add_argument("--overwrite", action="store_true", help="replace an output that exists")
    args = parser.parse_args()
    from nemo_aligner.checkpoint.convert import export_to_huggingface

    export_to_huggingface(args.in_file, args.out_file, overwrite=args.overwrite)


if __name__ == "__main__":
    run_cli(main)
