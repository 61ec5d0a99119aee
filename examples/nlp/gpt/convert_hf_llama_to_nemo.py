# SPDX-License-Identifier: Apache-2.0
"""Make a .nemo of a Llama model in a Hugging Face folder; import_hf.py does the same for other families too.

python examples/nlp/gpt/convert_hf_llama_to_nemo.py --in-file HF_FOLDER --out-file mcore_gpt.nemo
"""

import argparse
from pathlib import Path

from nemo_aligner.launch.cli import run_cli


def main() -> None:
    """Converts as the command line says."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--in-file", type=Path, required=True, help="Hugging Face folder, or a .gguf file")
    parser.add_argument("--out-file", required=True, help="the .nemo to write; with / at its end, a folder")
    parser.add_argument("--overwrite", action="store_true", help="replace an output that exists")
    args = parser.parse_args()
    from nemo_aligner.checkpoint.convert import import_from_huggingface

    import_from_huggingface(
        args.in_file, args.out_file, overwrite=args.overwrite, architecture="LlamaForCausalLM"
    )


if __name__ == "__main__":
    run_cli(main)
