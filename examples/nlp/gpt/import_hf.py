# SPDX-License-Identifier: Apache-2.0
"""Make a .nemo of a Hugging Face folder (Llama, Mistral, Qwen2, Qwen3, Nemotron), a GGUF file or a model of the hub.

The other scripts take all of these as they are; a .nemo is one file, whose digests show damage.

python examples/nlp/gpt/import_hf.py --in-file MODEL --out-file model.nemo
"""

from pathlib import Path

from nemo_aligner.launch.cli import conversion, run_cli


@conversion(__doc__, takes="a Hugging Face folder, a .gguf file or OWNER/NAME")
def main(source: Path, out: str, overwrite: bool) -> None:
    """Converts as the command line says."""
    from nemo_aligner.checkpoint.convert import import_from_huggingface

    import_from_huggingface(source, out, overwrite=overwrite)


if __name__ == "__main__":
    run_cli(main)
