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
_COMPUTATION_KEYS = ("normalization", "activation", "position_embedding_type", "rotary_percentage")
_SAME_COMPUTATION = {"activation": ("fast-swiglu", "swiglu")}
_NEMO_DEFAULTS = {
    "normalization": "layernorm",
    "activation": "gelu",
    "position_embedding_type": "learned_absolute",
    "rotary_percentage": 1.0,
    "bias": True,
    "share_embeddings_and_output_weights": True,
    "window_size": None,
}
_NEMO_ROPE_KEYS = ("scale_positional_embedding", "seq_len_interpolation_factor")
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
        case "linear" | "llama3" as kind:
            needed = _LLAMA3_ROPE_KEYS if kind == "llama3" else ("factor",)
            if missing := [key for key in needed if key not in rope]:
                raise UserError(
                    f"{where}: rope scaling of type {kind} lacks {missing}", cure="correct config.json"
                )
            return base, {"rope_type": kind} | {key: rope[key] for key in needed}
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
    hf_config |= dict.fromkeys(family.bias_keys, bool(config["bias"]))
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


def family_for_export(config: dict[str, Any]) -> tuple[Family, dict[str, Any]]:
    """The family that a model_config.yaml is exported as, and the config with NeMo's defaults filled in.

    A model that NeMo made, which names no family, becomes the one that can express it.

    Raises:
        UserError: no family can.
    """
    config = _NEMO_DEFAULTS | config
    for name in _COMPUTATION_KEYS:
        if (found := config.get(name)) not in (wanted := _SAME_COMPUTATION.get(name, (LLAMA.nemo[name],))):
            raise UserError(
                f"no supported Hugging Face architecture has {name}={found}",
                cure=f"export a model with {wanted[0]}",
            )
    for name in _NEMO_ROPE_KEYS:
        if config.get(name):
            raise UserError(
                f"{name}={config[name]} has no place in config.json", cure="write it as rope_scaling"
            )
    named = (config.get("huggingface") or {}).get("architecture")
    inferred = LLAMA if config["window_size"] is None else MISTRAL
    family = next((family for family in FAMILIES if family.architecture == named), inferred)
    if config["bias"] and not family.bias_keys:
        raise UserError(
            f"{family.architecture} has no biases, the model has", cure="export a model with bias=false"
        )
    if config["window_size"] is not None and all(key.nemo != "window_size" for key in family.keys):
        raise UserError(
            f"{family.architecture} has no window_size, the model has {config['window_size']}",
            cure="set huggingface.architecture: MistralForCausalLM in model_config.yaml",
        )
    return family, config


def dims_of(config: dict[str, Any]) -> Dims:
    """The sizes that a model_config.yaml names."""
    needed = ("num_layers", "hidden_size", "ffn_hidden_size", "num_attention_heads", "vocab_size")
    if missing := [name for name in needed if config.get(name) is None]:
        raise UserError(f"model_config.yaml has no {', '.join(missing)}", cure="add what is missing to it")
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
