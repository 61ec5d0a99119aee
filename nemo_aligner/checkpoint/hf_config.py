# SPDX-License-Identifier: Apache-2.0
"""config.json to model_config.yaml and back, driven by the key tables in ``mappings``.

A setting that would change the computation and that is not supported is refused; what else config.json says
is kept for the way back. Reads and writes no file.
"""

from typing import Any

from nemo_aligner.checkpoint.mappings.llama import LLAMA
from nemo_aligner.checkpoint.mappings.mistral import MISTRAL
from nemo_aligner.checkpoint.mappings.table import REQUIRED, Dims, Family, Key
from nemo_aligner.errors import UserError

__all__ = [
    "FAMILIES",
    "dims_of",
    "extras",
    "family_for_export",
    "family_of",
    "to_hf_config",
    "to_nemo_config",
]

FAMILIES = (LLAMA, MISTRAL)
_DTYPE_NAMES = {"bf16": "bfloat16", "16": "float16", "32": "float32"}
_ROPE_KEYS = ("rope_parameters", "rope_theta", "rope_scaling", "partial_rotary_factor")
_LLAMA3_ROPE_KEYS = ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings")


def family_of(hf_config: dict[str, Any], where: str) -> Family:
    """The family that config.json names; UserError, listing those that there are, for any other."""
    architectures = hf_config.get("architectures") or []
    for family in FAMILIES:
        if family.architecture in architectures or (
            not architectures and hf_config.get("model_type") == family.model_type
        ):
            return family
    found = ", ".join(architectures) or hf_config.get("model_type")
    raise UserError(
        f"{where}: architecture {found} is not supported",
        cure=f"use a model of {' or '.join(family.architecture for family in FAMILIES)}",
    )


def to_nemo_config(family: Family, hf_config: dict[str, Any], where: str) -> dict[str, Any]:
    """The architecture part of model_config.yaml.

    Raises:
        UserError: config.json asks for something that is not supported; the message begins with ``where``.
    """
    if hf_config.get("quantization_config"):
        raise UserError(
            f"{where}: its weights are quantised (quantization_config)", cure="use the unquantised model"
        )
    for name, value in family.must_be.items():
        if (found := hf_config.get(name, value)) != value:
            raise UserError(
                f"{where}: {name}={found} in config.json is not supported", cure=f"use a model with {value}"
            )
    config = dict(family.nemo)
    for key in family.keys:
        value = hf_config.get(key.hf, key.default)
        if value is REQUIRED:
            raise UserError(f"{where}: config.json has no {key.hf}", cure="download the folder again, whole")
        config[key.nemo] = value
    heads = config["num_attention_heads"]
    config["num_query_groups"] = config["num_query_groups"] or heads
    config["kv_channels"] = config["kv_channels"] or config["hidden_size"] // heads
    config["encoder_seq_length"] = config["max_position_embeddings"]
    config.setdefault("window_size", None)
    config["bias"] = _read_biases(family, hf_config, where)
    config["rotary_base"], config["rope_scaling"] = _read_rope(hf_config, where)
    return config


def _read_biases(family: Family, hf_config: dict[str, Any], where: str) -> bool:
    values = {key: bool(hf_config.get(key, False)) for key in family.bias_keys}
    if len(set(values.values())) > 1:
        raise UserError(
            f"{where}: biases in some layers only are not supported: {values}",
            cure="use a model where they are all true or all false",
        )
    return any(values.values())


def _read_rope(hf_config: dict[str, Any], where: str) -> tuple[float, dict[str, Any] | None]:
    """(base, scaling); newer files keep both under rope_parameters, older ones in two keys."""
    rope = hf_config.get("rope_parameters") or hf_config.get("rope_scaling") or {}
    base = float(rope.get("rope_theta", hf_config.get("rope_theta") or 10000.0))
    rotary_share = rope.get("partial_rotary_factor", hf_config.get("partial_rotary_factor"))
    if rotary_share not in (None, 1.0):
        raise UserError(
            f"{where}: partial_rotary_factor={rotary_share} is not supported", cure="use a model with 1.0"
        )
    match rope.get("rope_type", rope.get("type", "default")):
        case "default":
            return base, None
        case "linear":
            return base, {"rope_type": "linear", "factor": float(rope["factor"])}
        case "llama3":
            return base, {"rope_type": "llama3"} | {key: rope[key] for key in _LLAMA3_ROPE_KEYS}
        case other:
            raise UserError(
                f"{where}: rope scaling of type {other} is not supported",
                cure="use a model with default, linear or llama3",
            )


def extras(family: Family, hf_config: dict[str, Any]) -> dict[str, Any]:
    """What config.json says beyond the keys that have a place of their own."""
    owned = {key.hf for key in family.keys} | {*family.bias_keys, *_ROPE_KEYS, "dtype", "torch_dtype"}
    return {name: value for name, value in hf_config.items() if name not in owned}


def to_hf_config(family: Family, config: dict[str, Any]) -> dict[str, Any]:
    """The content of config.json for a model_config.yaml."""
    hf_config = {
        "architectures": [family.architecture],
        "model_type": family.model_type,
        "hidden_act": "silu",
    }
    hf_config |= (config.get("huggingface") or {}).get("config") or {}
    hf_config |= {key.hf: _value_for_export(key, config) for key in family.keys}
    hf_config |= dict.fromkeys(family.bias_keys, bool(config.get("bias", False)))
    rope = {"rope_type": "default"} | (config.get("rope_scaling") or {})
    theta = float(config.get("rotary_base", 10000.0))
    hf_config["rope_parameters"] = rope | {"rope_theta": theta}
    # transformers 4 reads these two and would silently take its default base without them.
    hf_config["rope_theta"] = theta
    if rope["rope_type"] != "default":
        hf_config["rope_scaling"] = rope
    hf_config["dtype"] = _DTYPE_NAMES[str(config["precision"])]
    return hf_config


def _value_for_export(key: Key, config: dict[str, Any]) -> Any:  # noqa: ANN401
    value = config.get(key.nemo, key.default)
    if value is REQUIRED:
        raise UserError(f"model_config.yaml has no {key.nemo}", cure=f"add {key.nemo} to it")
    return value


def family_for_export(config: dict[str, Any]) -> Family:
    """The family that the model came from; for one that NeMo wrote, the one that can express it."""
    for name, value in LLAMA.nemo.items():
        if name == "activation" and config.get(name) == "swiglu":
            continue
        if (
            name not in ("mcore_gpt", "hidden_dropout", "make_vocab_size_divisible_by")
            and config.get(name, value) != value
        ):
            raise UserError(
                f"no supported Hugging Face architecture has {name}={config[name]}",
                cure=f"export a model with {name}={value}",
            )
    named = (config.get("huggingface") or {}).get("architecture")
    for family in FAMILIES:
        if family.architecture == named:
            return family
    return LLAMA if config.get("window_size") is None else MISTRAL


def dims_of(config: dict[str, Any]) -> Dims:
    """The sizes that a model_config.yaml names."""
    heads = int(config["num_attention_heads"])
    return Dims(
        layers=int(config["num_layers"]),
        hidden=int(config["hidden_size"]),
        ffn=int(config["ffn_hidden_size"]),
        heads=heads,
        groups=int(config.get("num_query_groups") or heads),
        head_dim=int(config.get("kv_channels") or config["hidden_size"] // heads),
        vocab=int(config["vocab_size"]),
    )
