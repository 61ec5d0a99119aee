# SPDX-License-Identifier: Apache-2.0
"""The conversions behind the scripts: each joins a reader and a writer. Outputs are checked before inputs
are read.
"""

import logging
from pathlib import Path
from typing import Any

from nemo_aligner.checkpoint.huggingface import ImportedModel, check_export_folder, export_huggingface
from nemo_aligner.checkpoint.legacy import import_legacy
from nemo_aligner.checkpoint.nemo_archive import check_output, open_nemo, write_nemo
from nemo_aligner.checkpoint.open_model import read_model
from nemo_aligner.checkpoint.peft import refuse_adapters
from nemo_aligner.checkpoint.reward_tokens import reward_tokens
from nemo_aligner.checkpoint.sources import find_model, is_gguf, is_huggingface
from nemo_aligner.checkpoint.stop_tokens import with_stops
from nemo_aligner.checkpoint.tokenizer_files import archived_tokenizer_files, load_archived_tokenizer
from nemo_aligner.checkpoint.weights import WeightReader, save_weights
from nemo_aligner.errors import UserError
from nemo_aligner.run.progress import heartbeat

_log = logging.getLogger(__name__)


def import_from_huggingface(
    source: Path, out: str, *, overwrite: bool = False, architecture: str | None = None
) -> None:
    """A Hugging Face folder, a .gguf file or a model of the hub to a .nemo.

    Args:
        source: the folder, the file or the OWNER/NAME of the hub.
        out: the .nemo; with a "/" at its end, the extracted folder.
        overwrite: whether an existing output is replaced.
        architecture: refuse any other than this one.

    Raises:
        UserError: see the readers and ``write_nemo``.
    """
    check_output(out, overwrite=overwrite)
    with heartbeat(f"importing {source}"):
        model = read_model(find_model(str(source)))
        found = model.config["huggingface"]["architecture"]
        if architecture is not None and found != architecture:
            raise UserError(
                f"{source} is a {found}, not a {architecture}", fix="use examples/nlp/gpt/import_hf.py"
            )
        _write(model, out, overwrite=overwrite)


def import_from_legacy(source: Path, out: str, *, overwrite: bool = False) -> None:
    """An extracted .nemo in one of NeMo's old layouts to a .nemo that this package trains.

    Raises:
        UserError: see ``import_legacy`` and ``write_nemo``.
    """
    check_output(out, overwrite=overwrite)
    with heartbeat(f"converting {source}"), open_nemo(source, old_layouts=True) as archive:
        _write(import_legacy(archive), out, overwrite=overwrite)


def export_to_huggingface(source: Path, out: Path, *, overwrite: bool = False) -> None:
    """A .nemo or its extracted folder to a Hugging Face folder.

    Raises:
        UserError: ``source`` is another form of a model; and see ``open_nemo`` and ``export_huggingface``.
    """
    _refuse_other_forms(source)
    check_export_folder(out, overwrite=overwrite)
    with heartbeat(f"exporting {source}"), open_nemo(source) as archive:
        refuse_adapters(archive)
        reader, files = WeightReader(archive.weights), archived_tokenizer_files(archive)
        tokenizer = load_archived_tokenizer(archive) if files else None
        if not archive.config.get("reward_model_type"):
            config = with_stops(archive.config, tokenizer)
            export_huggingface(config, reader, files, out, overwrite=overwrite)
            return
        _warn_unscaled(archive.config)
        tokens = reward_tokens(archive.config, files, tokenizer)
        kept = archive.config.get("huggingface") or {}
        kept = {**kept, "config": {**(kept.get("config") or {}), **tokens.settings}}
        config = {**archive.config, "huggingface": kept}
        export_huggingface(
            config, reader, tokens.files, out, vocab_size=tokens.vocab_size, overwrite=overwrite
        )


def _refuse_other_forms(source: Path) -> None:
    form = "a Hugging Face folder" if is_huggingface(source) else "a GGUF file" if is_gguf(source) else None
    if form is not None:
        raise UserError(
            f"{source} is {form}, and a .nemo is exported",
            fix=f"make one of it first: nemo-aligner import model={source} out=model.nemo",
        )


def _warn_unscaled(config: dict[str, Any]) -> None:
    """Warn that a Hugging Face folder cannot hold the scale of a reward model's outputs."""
    regression, standard = config.get("regression") or {}, config.get("reward_standardization") or {}
    made = {
        "reward_standardization": standard.get("enable"),
        "regression.merge_attributes": regression.get("merge_attributes"),
    }
    if on := [name for name, value in made.items() if value]:
        _log.warning(
            "transformers gives the rewards as they are before %s of model_config.yaml", " and ".join(on)
        )


def _write(model: ImportedModel, out: str, *, overwrite: bool) -> None:
    def weights(folder: Path) -> None:
        multiple = model.config["make_vocab_size_divisible_by"]
        save_weights(folder, model.weights, model.config["num_layers"], vocab_multiple=multiple)

    write_nemo(out, config=model.config, files=model.files, weights=weights, overwrite=overwrite)
