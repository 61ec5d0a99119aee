# SPDX-License-Identifier: Apache-2.0
"""The forms of a model that a setting can name, recognised by their content, and their errors. Needs no torch."""

import json
import re
from pathlib import Path
from typing import Any

from nemo_aligner.checkpoint.gguf_file import read_gguf
from nemo_aligner.checkpoint.hf_config import family_of, to_nemo_config
from nemo_aligner.checkpoint.nemo_archive import CONFIG_NAME, peek_config
from nemo_aligner.errors import UserError, report_damage

GET_AGAIN = "download the folder again, whole"
_HF_CONFIG = "config.json"
_FORMS = "a .nemo file or its folder, a checkpoint of a run, a Hugging Face folder or a .gguf file"
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")  # OWNER/NAME
_PARTS = (".safetensors", ".bin", ".pt", ".pth", ".ckpt")
_SAFETENSORS, _PICKLED = "model*.safetensors", "pytorch_model*.bin"
_SMALL_FILES = ("*.json", "*.jinja", "*.model", "*.txt")


def find_model(named: str) -> Path:
    """Where the model is; one that is no file but a name of the hub is downloaded, unless it is in the hub's cache.

    Raises:
        UserError: it cannot be downloaded.
    """
    if not _is_hub_id(named):
        return Path(named)
    folder = _download(named, *_SMALL_FILES, _SAFETENSORS)
    return folder if any(folder.glob(_SAFETENSORS)) else _download(named, *_SMALL_FILES, _PICKLED)


def peek_model(setting: str, named: str) -> dict[str, Any] | None:
    """model_config.yaml of the model that ``setting`` names, or what stands for it; of the hub only that is downloaded.

    Returns:
        None where it cannot be had without unpacking.

    Raises:
        UserError: there is no such model, it is of no known form or family, or a file is missing.
    """
    where, is_remote = f"{setting}={named}", _is_hub_id(named)
    path = _download(named, _HF_CONFIG, where=where) if is_remote else Path(named)
    if not (named and path.exists()):
        raise UserError(f"{where} does not exist", fix=f"set {setting} to a path that does")
    if path.is_file() and path.suffix in _PARTS:
        raise UserError(
            f"{where} holds weights alone", fix=f"give the folder that it is of: {path.absolute().parent}"
        )
    if is_gguf(path):
        hf_config = read_gguf(path).hf_config
    elif path.is_file() or (path / CONFIG_NAME).is_file():
        return peek_config(path)
    else:
        hf_config = read_hf_config(path)
    config = to_nemo_config(family_of(hf_config, where), hf_config, where)
    if path.is_dir() and not is_remote:
        weight_files(path)
    return config


def is_huggingface(path: Path) -> bool:
    """True if it is a folder of transformers' and not of a .nemo."""
    return (path / _HF_CONFIG).is_file() and not (path / CONFIG_NAME).exists()


def is_gguf(path: Path) -> bool:
    """True if it is a GGUF file."""
    if path.suffix == ".gguf":
        return not path.is_dir()
    if not path.is_file():
        return False
    with path.open("rb") as file:
        return file.read(4) == b"GGUF"


def read_hf_config(folder: Path) -> dict[str, Any]:
    """The content of config.json.

    Raises:
        UserError: there is none.
    """
    if any(folder.glob("consolidated.*.pth")) and not (folder / _HF_CONFIG).is_file():
        raise UserError(
            f"{folder} is in Meta's own layout (consolidated.*.pth)",
            fix="download the model's -hf form, or convert it with "
            "python -m transformers.models.llama.convert_llama_weights_to_hf --input_dir IN --output_dir OUT",
        )
    if not (folder / _HF_CONFIG).is_file():
        raise UserError(
            f"{folder} has no config.json, as a Hugging Face folder has, and no {CONFIG_NAME}, as a .nemo has",
            fix=f"give {_FORMS}",
        )
    return read_json(folder / _HF_CONFIG)


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object of a Hugging Face folder."""
    with report_damage(f"{path} is not JSON", fix=GET_AGAIN):
        content = json.loads(path.read_text(encoding="utf-8"))
    if not isinstance(content, dict):
        raise UserError(f"{path} is not a JSON object", fix=GET_AGAIN)
    return content


def weight_files(folder: Path) -> tuple[list[Path], dict[str, Path] | None]:
    """The weight files, of one form, and where an index says which has which tensor; safetensors are preferred, as in
    transformers.

    Raises:
        UserError: there are none, or one that the index names is missing.
    """
    for stem, suffix in (("model", ".safetensors"), ("pytorch_model", ".bin")):
        if (folder / f"{stem}{suffix}").is_file():
            return [folder / f"{stem}{suffix}"], None
        index = folder / f"{stem}{suffix}.index.json"
        if index.is_file():
            place = _indexed_files(index)
            return sorted(set(place.values())), place
    raise UserError(
        f"{folder} holds no weights: no model.safetensors, no pytorch_model.bin, and no index of either",
        fix="give a folder that transformers' save_pretrained wrote, or that was downloaded whole",
    )


def _indexed_files(index: Path) -> dict[str, Path]:
    """Tensor name to file."""
    with report_damage(f"{index} is not a weight index", fix=GET_AGAIN):
        place: dict[str, str] = dict(json.loads(index.read_text(encoding="utf-8"))["weight_map"])
        names = sorted(set(place.values()))
    there = {path.name for path in index.parent.iterdir() if path.is_file()}
    for name in names:
        if name not in there:
            raise UserError(f"{index} names {name}, which is not in {index.parent}", fix=GET_AGAIN)
    return {tensor: index.parent / name for tensor, name in place.items()}


def _is_hub_id(named: str) -> bool:
    return (
        bool(_HUB_ID.fullmatch(named)) and not Path(named).exists() and not named.endswith((".nemo", ".gguf"))
    )


def _download(name: str, *patterns: str, where: str = "") -> Path:
    """The folder of the hub's cache with the files of a model that fit the patterns; ``where`` names the model."""
    with report_damage(
        f"{where or name} is no file or folder here, and cannot be downloaded from the Hugging Face hub",
        fix=f"give {_FORMS}; or the OWNER/NAME of a model of the hub, where the machine is online or has it in its "
        "cache, and log in (hf auth login) if its owner asks for that",
    ):
        from huggingface_hub import snapshot_download

        return Path(snapshot_download(name, allow_patterns=list(patterns)))
