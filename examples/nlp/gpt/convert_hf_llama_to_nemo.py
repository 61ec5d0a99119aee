# SPDX-License-Identifier: Apache-2.0
"""Make a .nemo of a Llama model in a Hugging Face folder; import_hf.py does the same for other families too.

python examples/nlp/gpt/convert_hf_llama_to_nemo.py --in-file HF_FOLDER --out-file mcore_gpt.nemo
"""

from pathlib import Path

from nemo_aligner.launch.cli import conversion, run_cli


@conversion(__doc__, takes="Hugging Face folder, or a .gguf file")
def main(source: Path, out: str, overwrite: bool) -> None:
    """Converts as the command line says."""
    from nemo_aligner.checkpoint.convert import import_from_huggingface

    import_from_huggingface(source, out, overwrite=overwrite, architecture="LlamaForCausalLM")


if __name__ == "__main__":
    run_cli(main)
