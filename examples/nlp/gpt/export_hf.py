# SPDX-License-Identifier: Apache-2.0
"""Make a Hugging Face folder, which transformers loads, of a .nemo.

python examples/nlp/gpt/export_hf.py --in-file model.nemo --out-file HF_FOLDER
"""

from pathlib import Path

from nemo_aligner.launch.cli import conversion, run_cli


@conversion(__doc__, takes="a .nemo, or the folder it was extracted to")
def main(source: Path, out: str, overwrite: bool) -> None:
    """Converts as the command line says."""
    from nemo_aligner.checkpoint.convert import export_to_huggingface

    export_to_huggingface(source, Path(out), overwrite=overwrite)


if __name__ == "__main__":
    run_cli(main)
