# SPDX-License-Identifier: Apache-2.0
"""Make a .nemo that is trained here of one that NeMo wrote: in its old layout (model_weights.ckpt), or with a
distributed checkpoint whose config leaves the vocabulary to the tokenizer.

python examples/nlp/gpt/convert_nemo_gpt_to_mcore.py --in-folder ./model_checkpoint --out-file
./mcore_gpt.nemo
"""

from pathlib import Path

from nemo_aligner.launch.cli import conversion, run_cli


@conversion(__doc__, source="--in-folder", takes="the extracted .nemo; a .nemo file works too")
def main(source: Path, out: str, overwrite: bool) -> None:
    """Converts as the command line says."""
    from nemo_aligner.checkpoint.convert import import_from_legacy

    import_from_legacy(source, out, overwrite=overwrite)


if __name__ == "__main__":
    run_cli(main)
