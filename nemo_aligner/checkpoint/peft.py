# SPDX-License-Identifier: Apache-2.0
"""Adapters as PEFT keeps them: a folder of adapter_config.json and adapter_model.safetensors."""

import hashlib
import json
import math
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from torch import Tensor

from nemo_aligner.checkpoint.hf_config import family_for_export
from nemo_aligner.checkpoint.nemo_archive import ModelArchive
from nemo_aligner.checkpoint.sources import is_huggingface
from nemo_aligner.checkpoint.tensor_files import (
    read_safetensors,
    safetensors_shapes,
    save_safetensors,
    shortened,
)
from nemo_aligner.checkpoint.weights import WeightReader
from nemo_aligner.errors import UserError, located, report_damage
from nemo_aligner.models.gpt.peft_config import PROJECTIONS, LoRAConfig

CONFIG_FILE, WEIGHTS_FILE = "adapter_config.json", "adapter_model.safetensors"
ADAPTERS_OF = "adapters_of"  # in the model_config.yaml of a checkpoint of adapters: their base
_KEY = "model.peft.restore_from_path"
# Of PEFT's ways to begin, those that leave the base as it is.
_STARTS = (True, False, "gaussian", "orthogonal", "mica")
# What PEFT can do beyond the plain product of A and B, by its settings' names: the value without it.
_PLAIN = {
    "use_dora": False, "rank_pattern": {}, "alpha_pattern": {}, "modules_to_save": None,
    "bias": "none", "layers_to_transform": None, "layer_replication": None, "trainable_token_indices": None,
    "alora_invocation_tokens": None, "use_qalora": False, "lora_bias": False, "target_parameters": None,
    "fan_in_fan_out": False,
}  # fmt: skip


def _places(config: dict[str, Any], where: str) -> Iterator[tuple[str, str]]:
    """(our name, PEFT's) of every A and B that a model can have, without "_a" or ".lora_A.weight".

    Raises:
        UserError: no family of Hugging Face's, whose names PEFT's files have, can express the model.
    """
    with located(lambda: f"{where}: "):
        family, _ = family_for_export(config)
    for layer in range(config["num_layers"]):
        for rule in family.layer:
            names = PROJECTIONS.get(rule.nemo, ())[-len(rule.sources) :]
            for ours, theirs in zip(names, rule.sources, strict=False):
                yield (
                    f"decoder.layers.{layer}.{rule.nemo}.adapters.{ours}",
                    f"base_model.model.model.layers.{layer}.{theirs}",
                )


def write_peft(
    folder: Path, weights: WeightReader, config: dict[str, Any], lora: LoRAConfig, *, base: str
) -> None:
    """Write the adapters of a checkpoint; an earlier folder is replaced once the new one is whole.

    Args:
        folder: where to.
        weights: the checkpoint's.
        config: model_config.yaml of the base.
        lora: the adapters' settings.
        base: the model that they belong to.

    Raises:
        UserError: the base has no form of Hugging Face's.
    """
    places = {ours: theirs for ours, theirs in _places(config, str(folder)) if f"{ours}_a" in weights.shapes}
    tensors = {
        f"{theirs}.lora_{kind}.weight": weights.read(f"{ours}_{kind.lower()}")
        for ours, theirs in places.items()
        for kind in ("A", "B")
    }
    settings = {
        **_PLAIN,
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base if is_huggingface(Path(base)) or not Path(base).exists() else None,
        "r": lora.adapter_dim,
        "lora_alpha": lora.numerator,
        "lora_dropout": lora.adapter_dropout,
        "target_modules": sorted({theirs.rsplit(".", 1)[1] for theirs in places.values()}),
        "inference_mode": True,
    }
    staging = folder.with_name(f".saving-{folder.name}")
    shutil.rmtree(staging, ignore_errors=True)
    staging.mkdir(parents=True)
    save_safetensors(tensors, staging / WEIGHTS_FILE)
    (staging / CONFIG_FILE).write_text(json.dumps(settings, indent=2) + "\n")
    shutil.rmtree(folder, ignore_errors=True)
    staging.rename(folder)


def refuse_adapters(archive: ModelArchive) -> None:
    """Raise UserError for a checkpoint of a run that trains adapters, which is no model by itself."""
    if base := archive.config.get(ADAPTERS_OF):
        raise UserError(
            f"{archive.folder} is a checkpoint of a run that trains adapters: it holds them alone, not {base}",
            fix="give the .nemo that the run has written at its end, which has them merged; to have one of this "
            "checkpoint, start the run in another folder with exp_manager.resume_from_checkpoint set to it and "
            "max_steps to its step",
        )


def peft_digest(folder: Path) -> str:
    """By which the adapters of a folder are known again, wherever it lies; "" where there are none."""
    files = [folder / CONFIG_FILE, folder / WEIGHTS_FILE]
    if not all(path.is_file() for path in files):
        return ""  # as their reader will say
    return hashlib.sha256(b"".join(path.read_bytes() for path in files)).hexdigest()[:16]


class PeftWeights:
    """The adapters of a folder as PEFT writes it, by canonical name.

    Args:
        folder: as PEFT's save_pretrained writes it.
        config: model_config.yaml of the base.
        lora: the adapters that the model has.

    Raises:
        UserError: the folder is none, is damaged, or has other adapters.
    """

    def __init__(self, folder: Path, config: dict[str, Any], lora: LoRAConfig) -> None:
        self.where, self._file = str(folder), folder / WEIGHTS_FILE
        if not (self._file.exists() and (folder / CONFIG_FILE).exists()):
            pickled = (folder / WEIGHTS_FILE).with_suffix(".bin").exists()
            raise UserError(
                f"{_KEY}={folder} has no {CONFIG_FILE} and {WEIGHTS_FILE}",
                fix="have PEFT save its .bin again, with safe_serialization=True"
                if pickled
                else "give a folder of PEFT's save_pretrained, or what a run with peft_scheme=lora leaves in NAME_peft",
            )
        with report_damage(
            f"{folder / CONFIG_FILE} is damaged", fix="get the folder again from where it came"
        ):
            settings = dict(json.loads((folder / CONFIG_FILE).read_bytes()))
        self._check(settings, lora)
        stored = safetensors_shapes(self._file)
        self._names = {
            f"{ours}_{kind.lower()}": f"{theirs}.lora_{kind}.weight"
            for ours, theirs in _places(config, self.where)
            for kind in ("A", "B")
            if any(f".{place}." in ours for place in lora.linears)
        }
        if missing := set(self._names.values()) - stored.keys():
            raise UserError(
                f"{self._file} lacks adapters of model.peft.lora_tuning.target_modules="
                f"{list(lora.target_modules)}: {shortened(missing)}",
                fix="leave what has no adapters out of target_modules; PEFT's are to be of every layer of the model, "
                "and of q, k and v (of gate and up) together",
            )
        self.shapes = {ours: stored[name] for ours, name in self._names.items()}
        if unread := stored.keys() - set(self._names.values()):
            raise UserError(
                f"{self._file} holds tensors that the model has no place for: {shortened(unread)}",
                fix="set model.peft.lora_tuning.target_modules to the layers of these adapters, or give others",
            )

    def _check(self, settings: dict[str, Any], lora: LoRAConfig) -> None:
        start = settings.get("init_lora_weights", True)
        if start not in _STARTS:
            raise UserError(
                f"{self.where}/{CONFIG_FILE}: init_lora_weights={start} goes with a base that PEFT has changed",
                fix="have PEFT convert them: save_pretrained(path_initial_model_for_weight_conversion=...)",
            )
        for name, plain in _PLAIN.items():
            if (settings.get(name) or plain) != plain:
                raise UserError(
                    f"{self.where}/{CONFIG_FILE}: {name}={settings[name]} is not supported",
                    fix=f"train the adapters with {name}={plain}",
                )
        if settings.get("peft_type") != "LORA":
            raise UserError(
                f"{self.where}/{CONFIG_FILE}: peft_type={settings.get('peft_type')} is not supported",
                fix="give adapters of peft_type=LORA",
            )
        rank, alpha = settings.get("r"), settings.get("lora_alpha")
        if not (isinstance(rank, int) and isinstance(alpha, int | float) and rank > 0):
            raise UserError(
                f"{self.where}/{CONFIG_FILE}: r={rank} and lora_alpha={alpha} are not two numbers",
                fix="get the folder again from where it came",
            )
        said = f"r={rank} and lora_alpha={alpha}"
        if settings.get("use_rslora"):  # Kalajdzievski 2023: the product counts alpha / sqrt(r) times
            said, alpha = f"{said}, use_rslora=True", alpha * math.sqrt(rank)
        if rank != lora.adapter_dim or not math.isclose(alpha, lora.numerator, rel_tol=1e-6):
            raise UserError(
                f"{self.where}/{CONFIG_FILE} has {said}, and "
                f"model.peft.lora_tuning.adapter_dim={lora.adapter_dim}, alpha={lora.alpha}",
                fix=f"set model.peft.lora_tuning.adapter_dim={rank} and model.peft.lora_tuning.alpha={alpha}",
            )

    def read(self, name: str, start: tuple[int, ...], size: tuple[int, ...]) -> Tensor:
        """The block of tensor ``name`` that begins at ``start``; start and size have one number per axis."""
        block = tuple(slice(at, at + length) for at, length in zip(start, size, strict=True))
        return read_safetensors(self._file, self._names[name], block)
