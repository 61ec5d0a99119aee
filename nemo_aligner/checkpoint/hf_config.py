# SPDX-License-Identifier: Apache-2.0
"""config.json to model_config.yaml and back, driven by the key tables in ``mappings``.

A setting that would change the computation and that is not supported is refused; what else config.json says
is kept for the way back. Reads and writes no file.
"""

from collections.abc import Callable
from typing import Any

from nemo_aligner.checkpoint.mappings.llama import LLAMA
from nemo_aligner.checkpoint.mappings.mistral import MISTRAL
from nemo_aligner.checkpoint.mappings.nemotron import NEMOTRON
from nemo_aligner.checkpoint.mappings.qwen import QWEN2, QWEN3
from nemo_aligner.checkpoint.mappings.table import DERIVED, REQUIRED, Dims, Family, Key
from nemo_aligner.checkpoint.nemo_config import block
from nemo_aligner.errors import UserError
from nemo_aligner.models.gpt.config import GPTConfig, precision_name, window_tokens
from nemo_aligner.models.gpt.config_types import check_types, is_number, is_size

FAMILIES = (LLAMA, MISTRAL, QWEN2, QWEN3, NEMOTRON)  # the first that fits is what NeMo's models become
_ALL = (*FAMILIES, *(family.with_reward_head() for family in FAMILIES))
_DTYPE_NAMES = {"bf16": "bfloat16", "16": "float16", "32": "float32"}
# What decides the computation, with the value that a model_config.yaml without it means.
_COMPUTATION = {
    "normalization": "layernorm",
    "activation": "gelu",
    "position_embedding_type": "learned_absolute",
    "rotary_percentage": 1.0,
    "bias": True,
    "qkv_bias": False,
    "attention_bias": False,
    "mlp_bias": False,
    "qk_layernorm": False,
    "window_size": None,
}
_NEMO_DEFAULTS = _COMPUTATION | {"share_embeddings_and_output_weights": True}
_NEMO_ROPE_KEYS = ("scale_positional_embedding", "seq_len_interpolation_factor")
_ROPE_KEYS = ("rope_parameters", "rope_theta", "rope_scaling", "partial_rotary_factor")
_WINDOW_KEYS = ("use_sliding_window", "layer_types")
# By rope_type: what config.json must say of it, and what it may say.
_ROPE_SCALING_KEYS = {
    "linear": (("factor",), ()),
    "llama3": (("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"), ()),
    "yarn": (
        ("factor", "original_max_position_embeddings"),
        ("beta_fast", "beta_slow", "attention_factor", "mscale", "mscale_all_dim", "truncate"),
    ),
}

# The form of config.json's keys that are read beyond the families' own.
_Form = tuple[Callable[[Any], bool], str]
_BLOCK: _Form = (lambda value: isinstance(value, dict), "a block of keys")
_TEXT: _Form = (lambda value: isinstance(value, str), "text")
_TEXTS: _Form = (
    lambda value: isinstance(value, list) and all(isinstance(entry, str) for entry in value),
    "a list of texts",
)
_NUMBER: _Form = (is_number, "a finite number")
_COUNT: _Form = (lambda value: is_size(value, at_least=0), "a whole number from 0")
_SWITCH: _Form = (lambda value: isinstance(value, bool), "true or false")
_FORMS = {
    **dict.fromkeys(("rope_parameters", "rope_scaling", "id2label"), _BLOCK),
    **dict.fromkeys(("architectures", "layer_types"), _TEXTS),
    **dict.fromkeys(("rope_theta", "partial_rotary_factor"), _NUMBER),
    **dict.fromkeys(("num_labels", "sliding_window", "max_window_layers"), _COUNT),
    "original_max_position_embeddings": (is_size, "a whole number from 1"),
    **dict.fromkeys(("use_sliding_window", "attention_bias", "mlp_bias"), _SWITCH),
    "model_type": _TEXT,
}
_ROPE_NUMBERS = {"rope_theta", "partial_rotary_factor"}.union(
    *(set(needed) | set(optional) for needed, optional in _ROPE_SCALING_KEYS.values())
) - {"truncate"}


def family_of(hf_config: dict[str, Any], where: str) -> Family:
    """The family that config.json names; UserError, listing those that there are, for any other."""
    _check_forms(hf_config, where)
    architectures = hf_config.get("architectures") or []
    for family in _ALL:
        if family.architecture in architectures or (
            not architectures and hf_config.get("model_type") == family.model_type
        ):
            return family
    found = ", ".join(architectures) or hf_config.get("model_type")
    raise UserError(
        f"{where}: architecture {found} is not supported",
        fix=f"use a model of {' or '.join(family.architecture for family in _ALL)}",
    )


def to_nemo_config(family: Family, hf_config: dict[str, Any], where: str) -> dict[str, Any]:
    """The architecture part of model_config.yaml.

    Raises:
        UserError: config.json asks for something that is not supported; the message begins with ``where``.
    """
    if hf_config.get("quantization_config"):
        raise UserError(
            f"{where}: its weights are quantised (quantization_config)", fix="use the unquantised model"
        )
    for name, value in family.must_be.items():
        if (found := hf_config.get(name, value)) != value:
            raise UserError(
                f"{where}: {name}={found} in config.json is not supported", fix=f"use a model with {value}"
            )
    config = dict(family.nemo)
    for key in family.keys:
        value = hf_config.get(key.hf, key.default)
        if value is REQUIRED:
            raise UserError(f"{where}: config.json has no {key.hf}", fix="download the folder again, whole")
        config[key.nemo] = None if value is DERIVED else value
    check_types(
        {name: value for name, value in config.items() if value is not None},
        GPTConfig,
        where=f"{where}: config.json",
        names={key.nemo: key.hf for key in family.keys},
    )
    heads = config["num_attention_heads"]
    config["num_query_groups"] = config["num_query_groups"] or heads
    config["kv_channels"] = config["kv_channels"] or config["hidden_size"] // heads
    config["encoder_seq_length"] = config["max_position_embeddings"]
    config.setdefault("window_size", _read_window(hf_config, where) if family.window_by_layer else None)
    config |= _read_biases(family, hf_config)
    config |= _read_rope(family, hf_config, where)
    return config | _read_rewards(hf_config) if family.rewards else config


def _check_forms(hf_config: dict[str, Any], where: str) -> None:
    """Raise UserError for values of another form than Hugging Face's; sizes are checked by name later."""

    def refuse(name: str, value: object, wanted: str) -> None:
        raise UserError(
            f"{where}: config.json: {name}={str(value)[:60]} is not {wanted}", fix=f"correct {name} there"
        )

    for name, (fits, wanted) in _FORMS.items():
        if (value := hf_config.get(name)) is not None and not fits(value):
            refuse(name, value, wanted)
    for part in ("rope_parameters", "rope_scaling"):
        for name, value in (hf_config.get(part) or {}).items():
            if name in _ROPE_NUMBERS and value is not None and not (is_number(value) and value > 0):
                refuse(f"{part}.{name}", value, "a number above 0")
            if name in ("rope_type", "type") and not isinstance(value, str):
                refuse(f"{part}.{name}", value, "text")
            if name == "truncate" and not isinstance(value, bool | None):
                refuse(f"{part}.{name}", value, "true or false")


def _read_rewards(hf_config: dict[str, Any]) -> dict[str, Any]:
    """The reward settings of model_config.yaml; config.json names the labels, and has two by default."""
    labels = len(hf_config["id2label"]) if hf_config.get("id2label") else int(hf_config.get("num_labels", 2))
    return {
        "reward_model_type": "binary_ranking" if labels == 1 else "regression",
        "regression": {"num_attributes": labels},
        "use_avg_pool": False,
        "share_embeddings_and_output_weights": False,
    }


def _read_window(hf_config: dict[str, Any], where: str) -> int | None:
    """The sliding window that all layers have, None where none has one."""
    if (
        not hf_config.get("use_sliding_window", False)
        or (window := hf_config.get("sliding_window", 4096)) is None
    ):
        return None
    layers, full = hf_config["num_hidden_layers"], hf_config.get("max_window_layers", 28)
    kinds = hf_config.get("layer_types") or ["full_attention"] * min(full, layers) + ["sliding_attention"] * (
        layers - full
    )
    if len(set(kinds)) > 1:
        raise UserError(
            f"{where}: the sliding window of {window} tokens is on {kinds.count('sliding_attention')} of its "
            f"{layers} layers (use_sliding_window, max_window_layers), which is not supported",
            fix=f'set "use_sliding_window": false and remove "layer_types" in its config.json: up to {window} '
            "tokens the results are the same",
        )
    return window if "sliding_attention" in kinds else None


def _read_biases(family: Family, hf_config: dict[str, Any]) -> dict[str, Any]:
    """Both of config.json's keys are NeMo's ``bias``; one of them alone has a key of the same name."""
    on = [key for key in family.bias_keys if hf_config.get(key, False)]
    return {"bias": True} if len(on) == 2 else {"bias": False, **dict.fromkeys(on, True)}


def _read_rope(family: Family, hf_config: dict[str, Any], where: str) -> dict[str, Any]:
    """NeMo's keys of rotary positions; newer files keep all under rope_parameters, older ones in three keys.

    Where a file has both, transformers takes the older one.
    """
    rope = hf_config.get("rope_scaling") or hf_config.get("rope_parameters") or {}
    share = rope.get("partial_rotary_factor", hf_config.get("partial_rotary_factor", family.rotary_share))
    if family.rotary_share is None and share not in (None, 1.0):
        raise UserError(
            f"{where}: partial_rotary_factor={share} is not supported for {family.architecture}",
            fix="use a model with 1.0",
        )
    return {
        "rotary_base": float(rope.get("rope_theta") or hf_config.get("rope_theta") or 10000.0),
        "rotary_percentage": 1.0 if share is None else share,
        "rope_scaling": _read_rope_scaling(rope, hf_config, where),
    }


def _read_rope_scaling(rope: dict[str, Any], hf_config: dict[str, Any], where: str) -> dict[str, Any] | None:
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind == "default":
        return None
    if kind not in _ROPE_SCALING_KEYS:
        raise UserError(
            f"{where}: rope scaling of type {kind} is not supported",
            fix=f"use a model with default, {', '.join(_ROPE_SCALING_KEYS)}",
        )
    needed, optional = _ROPE_SCALING_KEYS[kind]
    given = {key: rope[key] for key in (*needed, *optional) if rope.get(key) is not None}
    if kind != "linear":
        # As transformers: config.json's own key first, then the block's, then the positions that the model has.
        positions = given.get("original_max_position_embeddings", hf_config.get("max_position_embeddings"))
        original = hf_config.get("original_max_position_embeddings") or positions
        given["original_max_position_embeddings"] = original
        if kind == "yarn" and original and "factor" in rope and "factor" not in given:
            given["factor"] = hf_config.get("max_position_embeddings", original) / original
    if missing := [key for key in needed if given.get(key) is None]:
        raise UserError(f"{where}: rope scaling of type {kind} lacks {missing}", fix="correct config.json")
    return {"rope_type": kind, **given}


def extras(family: Family, hf_config: dict[str, Any]) -> dict[str, Any]:
    """The keys of config.json beyond those that have a place of their own."""
    owned = {key.hf for key in family.keys} | {*family.bias_keys, *_ROPE_KEYS, *_WINDOW_KEYS}
    owned |= {"architectures", "model_type", "dtype", "torch_dtype"}
    return {name: value for name, value in hf_config.items() if name not in owned}


def to_hf_config(family: Family, config: dict[str, Any]) -> dict[str, Any]:
    """The content of config.json for a model_config.yaml."""
    hf_config = dict(block(block(config, "huggingface"), "config"))
    hf_config |= {"architectures": [family.architecture], "model_type": family.model_type}
    hf_config |= {name: value for name, value in family.must_be.items() if value is not None}
    hf_config |= {
        key.hf: value for key in family.keys if (value := _value_for_export(key, config)) is not DERIVED
    }
    hf_config |= {key: bool(config["bias"] or config[key]) for key in family.bias_keys}
    if family.window_by_layer:
        window = config["window_size"]
        hf_config["use_sliding_window"] = window is not None
        if window is not None:
            hf_config |= {"sliding_window": window, "max_window_layers": 0}
    hf_config |= _rope_for_export(family, config)
    hf_config["dtype"] = _DTYPE_NAMES[precision_name(config.get("precision", "bf16"))]
    if family.rewards:
        names = {str(label): f"LABEL_{label}" for label in range(dims_of(config).labels)}
        hf_config |= {"id2label": names, "label2id": {name: int(label) for label, name in names.items()}}
    return hf_config


def _value_for_export(key: Key, config: dict[str, Any]) -> Any:  # noqa: ANN401
    value = config.get(key.nemo, key.default)
    if value is REQUIRED:
        raise UserError(f"model_config.yaml has no {key.nemo}", fix=f"add {key.nemo} to it")
    if key.default is DERIVED and value == config["hidden_size"] // config["num_attention_heads"]:
        return DERIVED
    return value


def _rope_for_export(family: Family, config: dict[str, Any]) -> dict[str, Any]:
    scaling = {"rope_type": "default"} | block(config, "rope_scaling")
    # transformers 4 reads these beside rope_parameters and would silently take its defaults without them.
    older: dict[str, Any] = {"rope_theta": float(config.get("rotary_base", 10000.0))}
    if family.rotary_share is not None:
        older["partial_rotary_factor"] = config["rotary_percentage"]
    rope = {"rope_parameters": scaling | older} | older
    return rope if scaling["rope_type"] == "default" else rope | {"rope_scaling": scaling | older}


def family_for_export(config: dict[str, Any]) -> tuple[Family, dict[str, Any]]:
    """The family that a model_config.yaml is exported as, and the config with NeMo's defaults filled in.

    A model that NeMo made, which names no family, becomes the first one that can express it.

    Raises:
        UserError: no family can, or the one that is named cannot.
    """
    config = _NEMO_DEFAULTS | config
    check_types(
        {name: value for name, value in config.items() if value is not None and name != "window_size"},
        GPTConfig,
        where="model_config.yaml",
    )
    for name in ("huggingface", "rope_scaling", "regression"):
        block(config, name)
    dims = dims_of(config)
    config |= {"kv_channels": dims.head_dim, "num_query_groups": dims.groups}
    config["window_size"] = window_tokens(config["window_size"])
    for name in _NEMO_ROPE_KEYS:
        if config.get(name):
            raise UserError(
                f"{name}={config[name]} has no place in config.json", fix="write it as rope_scaling"
            )
    families = [family for family in _ALL if family.rewards == bool(config.get("reward_model_type"))]
    obstacles = {family.architecture: _obstacles(family, config) for family in families}
    fitting = [architecture for architecture, found in obstacles.items() if not found]
    nearest = min(obstacles, key=lambda architecture: len(obstacles[architecture]))
    wanted = block(config, "huggingface").get("architecture") or nearest
    if not isinstance(wanted, str):
        raise UserError(
            f"model_config.yaml: huggingface.architecture={wanted!r} is not text",
            fix="name an architecture there",
        )
    if config.get("reward_model_type"):
        # A reward model names the language model that it was made of.
        wanted = wanted.replace("ForCausalLM", "ForSequenceClassification")
    if not (found := obstacles.get(wanted, ["the architecture is not known here"])):
        return next(family for family in families if family.architecture == wanted), config
    raise UserError(
        f"{wanted} cannot express this model: {'; '.join(found)}",
        fix=f"set huggingface.architecture: {fitting[0]} in model_config.yaml"
        if fitting
        else f"export a model of one of the supported architectures: {', '.join(obstacles)}",
    )


def _obstacles(family: Family, config: dict[str, Any]) -> list[str]:
    """The parts of the computation that ``family`` cannot express."""
    # A bias on every layer is one on query, key and value too.
    found = {name: config[name] for name in _COMPUTATION} | {
        "qkv_bias": config["qkv_bias"] and not (config["bias"] or config["attention_bias"])
    }
    fixed = _COMPUTATION | {"bias": False, "qkv_bias": False} | family.nemo
    if family.rewards:
        found["use_avg_pool"], fixed["use_avg_pool"] = bool(config.get("use_avg_pool")), False
    return [
        f"{name}={value}, it has {wanted}"
        for name, value in found.items()
        if name not in family.free and _same(value) != _same(wanted := fixed[name])
    ]


def _same(value: object) -> object:
    """One value for the names of one computation."""
    return value.removeprefix("fast-") if isinstance(value, str) else value


def dims_of(config: dict[str, Any]) -> Dims:
    """The sizes that a model_config.yaml names."""
    needed = ("num_layers", "hidden_size", "ffn_hidden_size", "num_attention_heads", "vocab_size")
    if missing := [name for name in needed if config.get(name) is None]:
        raise UserError(f"model_config.yaml has no {', '.join(missing)}", fix="add what is missing to it")
    check_types({name: config[name] for name in needed}, GPTConfig, where="model_config.yaml")
    heads = config["num_attention_heads"]
    return Dims(
        layers=config["num_layers"],
        hidden=config["hidden_size"],
        ffn=config["ffn_hidden_size"],
        heads=heads,
        groups=config.get("num_query_groups") or heads,
        head_dim=config.get("kv_channels") or config["hidden_size"] // heads,
        vocab=config["vocab_size"],
        labels=_labels(config),
    )


def _labels(config: dict[str, Any]) -> int:
    if config.get("reward_model_type") != "regression":
        return 1
    labels = block(config, "regression").get("num_attributes", 1)
    if not is_size(labels):
        raise UserError(
            f"model_config.yaml: regression.num_attributes={str(labels)[:60]} is no whole number from 1",
            fix="correct regression.num_attributes there",
        )
    return labels
