# SPDX-License-Identifier: Apache-2.0
"""Models in other forms than .nemo, told by how they look, with the command that imports them. Needs no torch."""

import re
import shlex
from pathlib import Path

from nemo_aligner.checkpoint.nemo_archive import CONFIG_NAME
from nemo_aligner.errors import UserError

__all__ = ["refuse_foreign_model"]

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")  # OWNER/NAME
_WEIGHTS = (".safetensors", ".bin", ".pt", ".pth", ".ckpt")


def refuse_foreign_model(setting: str, path: str) -> None:
    """Raise UserError where ``path``, the value of ``setting``, is or names a model that has to be imported first."""
    given = Path(path)
    if not given.exists():
        if _HUB_ID.fullmatch(path) and given.suffix != ".nemo":
            raise UserError(
                f"{setting}={path} does not exist",
                cure=f"set {setting} to a path that does; a model of the Hugging Face hub is downloaded and imported "
                f"first: hf download {path} --local-dir {given.name}, then {_imported(setting, Path(given.name))}",
            )
        return
    if given.is_dir():
        if (given / "config.json").is_file() and not (given / CONFIG_NAME).exists():
            raise UserError(
                f"{setting}={path} is a Hugging Face folder, and a .nemo is needed",
                cure=f"import it: {_imported(setting, given)}",
            )
        return
    if given.suffix == ".gguf" or _starts_with(given, b"GGUF"):
        raise UserError(
            f"{setting}={path} is a GGUF file, and a .nemo is needed",
            cure=f"import it: {_imported(setting, given)}",
        )
    if given.suffix in _WEIGHTS:
        raise UserError(
            f"{setting}={path} holds weights alone, and a .nemo is needed",
            cure=f"import the Hugging Face folder that it is of: {_imported(setting, given.absolute().parent)}",
        )


def _imported(setting: str, source: Path) -> str:
    target = shlex.quote(f"{source.stem if source.suffix == '.gguf' else source.absolute().name}.nemo")
    return (
        f"python examples/nlp/gpt/import_hf.py --in-file {shlex.quote(str(source))} --out-file {target}, "
        f"then {setting}={target}"
    )


def _starts_with(path: Path, magic: bytes) -> bool:
    with path.open("rb") as file:
        return file.read(len(magic)) == magic
