# SPDX-License-Identifier: Apache-2.0
"""Make a .nemo that is trained here of one that NeMo wrote: in its old layout (model_weights.ckpt), or with a
distributed checkpoint whose config leaves the vocabulary to the tokenizer.

python examples/nlp/gpt/convert_nemo_gpt_to_mcore.py --in-folder ./model_checkpoint --out-file
./mcore_gpt.nemo
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
        "--in-folder", type=Path, required=True, help="the extracted .nemo; a .nemo file works too"
    )
    parser.add_argument("--out-file", required=True, help="the .nemo to write; with / at its end, a folder")
    parser.add_argument("--overwrite", action="store_true", help="replace an output that exists")
    args = parser.parse_args()
    from nemo_aligner.checkpoint.convert import import_from_legacy

    import_from_legacy(args.in_folder, args.out_file, overwrite=args.overwrite)


if __name__ == "__main__":
    run_cli(main)
