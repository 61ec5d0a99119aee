# SPDX-License-Identifier: Apache-2.0
"""Adapters as PEFT keeps them: a folder of adapter_config.json and adapter_model.safetensors."""

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from torch import Tensor

from nemo_aligner.checkpoint.hf_config import family_of
from nemo_aligner.checkpoint.tensor_files import (
    read_safetensors,
    safetensors_shapes,
    save_safetensors,
    shortened,
)
from nemo_aligner.checkpoint.weights import WeightReader
from nemo_aligner.errors import UserError, report_damage
from nemo_aligner.models.gpt.peft_config import PROJECTIONS, LoRAConfig

CONFIG_FILE, WEIGHTS_FILE = "adapter_config.json", "adapter_model.safetensors"
_KEY = "model.peft.restore_from_path"
# What PEFT can do beyond the plain product of A and B, by its settings' names: the value without it.
_PLAIN = {
    "use_rslora": False, "use_dora": False, "rank_pattern": {}, "alpha_pattern": {}, "modules_to_save": None,
    "bias": "none", "layers_to_transform": None, "layer_replication": None, "trainable_token_indices": None,
    "alora_invocation_tokens": None, "use_qalora": False, "lora_bias": False, "target_parameters": None,
    "fan_in_fan_out": False,
}  # fmt: skip


def _places(config: dict[str, Any], where: str) -> Iterator[tuple[str, str]]:
    """(our name, PEFT's) of every A and B that a model can have, without "_a" or ".lora_A.weight"."""
    architecture = (config.get("huggingface") or {}).get("architecture")
    if architecture is None:
        raise UserError(
            f"{where}: the model is of no Hugging Face architecture, whose names PEFT's files have",
            fix="import the model from its Hugging Face folder",
        )
    family = family_of({"architectures": [architecture]}, where)
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
        "base_model_name_or_path": base,
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
            raise UserError(
                f"{_KEY}={folder} has no {CONFIG_FILE} and {WEIGHTS_FILE}",
                fix="give a folder that PEFT's save_pretrained, or a run with model.peft.peft_scheme=lora, has written",
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
                fix="leave these layers out of target_modules, or train PEFT's adapters of q, k and v (of gate and up) "
                "together",
            )
        self.shapes = {ours: stored[name] for ours, name in self._names.items()}
        if unread := stored.keys() - set(self._names.values()):
            raise UserError(
                f"{self._file} holds tensors that the model has no place for: {shortened(unread)}",
                fix="set model.peft.lora_tuning.target_modules to the layers of these adapters, or give others",
            )

    def _check(self, settings: dict[str, Any], lora: LoRAConfig) -> None:
        start = settings.get("init_lora_weights", True)
        if start not in (True, False, "gaussian"):
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
        if (rank, alpha) != (lora.adapter_dim, lora.numerator):
            raise UserError(
                f"{self.where}/{CONFIG_FILE} has r={rank} and lora_alpha={alpha}, and "
                f"model.peft.lora_tuning.adapter_dim={lora.adapter_dim}, alpha={lora.alpha}",
                fix=f"set model.peft.lora_tuning.adapter_dim={rank} and model.peft.lora_tuning.alpha={alpha}",
            )

    def read(self, name: str, start: tuple[int, ...], size: tuple[int, ...]) -> Tensor:
        """The block of tensor ``name`` that begins at ``start``; start and size have one number per axis."""
        block = tuple(slice(at, at + length) for at, length in zip(start, size, strict=True))
        return read_safetensors(self._file, self._names[name], block)
