# SPDX-License-Identifier: Apache-2.0
"""The architecture in a checkpoint's model_config.yaml, read into a typed config.

Knows NeMo's names for things; knows no training settings. Imports neither torch nor Megatron, so that settings are
checked before either is loaded.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any, Literal, get_args

from nemo_aligner.errors import UserError
from nemo_aligner.models.gpt.config_types import check_types, is_number
from nemo_aligner.parallel.ranks import Layout

Precision = Literal["32", "bf16", "16"]

Normalization = Literal["rmsnorm", "layernorm", "layernorm1p"]
Activation = Literal[
    "fast-swiglu", "swiglu", "fast-geglu", "geglu", "fast-reglu", "reglu", "squared-relu", "gelu"
]
PositionEmbedding = Literal["rope", "learned_absolute"]
RopeType = Literal["linear", "llama3", "yarn"]

_SIZES = ("num_layers", "hidden_size", "num_attention_heads", "vocab_size")

# Keys of NeMo's that change the computation, with the values that are supported.
SUPPORTED: dict[str, tuple[object, ...]] = {
    "transformer_block_type": (None, "pre_ln"),
    "attention_type": (None, "multihead"),
    "headscale": (None, False),
    "normalize_attention_scores": (None, True),
    "multi_query_attention": (None, False),
    "rotary_interleaved": (None, False),
    "apply_embedding_scaling": (None, False),
    "num_moe_experts": (None, 0),
    "fp8": (None, False),
    "fp32_residual_connection": (None, False),
    "fp16_lm_cross_entropy": (None, False),
}


def precision_name(precision: str | int) -> Precision:
    """A ``precision`` key, with Lightning's spellings, as 32, bf16 or 16."""
    match str(precision).removesuffix("-mixed").removesuffix("-true"):
        case "32" | "fp32":
            return "32"
        case "bf16":
            return "bf16"
        case "16" | "fp16":
            return "16"
    raise UserError(
        f"precision={precision!r} is not a precision", fix="set trainer.precision to 32, bf16, 16 or auto"
    )


@dataclass(frozen=True, kw_only=True)
class RopeScaling:
    """How rotary frequencies are stretched beyond the original context; Hugging Face's names."""

    rope_type: RopeType
    factor: float
    # llama3: turns within the original context from which on frequencies are kept
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0  # llama3: turns up to which they are divided
    original_max_position_embeddings: int = 8192
    beta_fast: float = 32.0  # yarn: turns within the original context from which on frequencies are kept
    beta_slow: float = 1.0  # yarn: turns up to which they are divided
    # yarn: multiplies cosines and sines; null: follows from what stands here
    attention_factor: float | None = None
    # yarn, as DeepSeek's: weights of the two factors that attention_factor is made of
    mscale: float | None = None
    mscale_all_dim: float | None = None
    truncate: bool = True  # yarn: the ramp begins and ends at whole numbers


@dataclass(frozen=True, kw_only=True)
class GPTConfig:
    """Architecture of a GPT, as model_config.yaml spells it."""

    num_layers: int
    hidden_size: int
    ffn_hidden_size: int
    num_attention_heads: int
    vocab_size: int  # true vocabulary, without padding
    num_query_groups: int | None = None  # key/value heads; null: as many as attention heads
    kv_channels: int | None = None  # size of one head; null: hidden_size / num_attention_heads
    encoder_seq_length: int = 4096  # longest sequence, prompt and response together, in tokens
    max_position_embeddings: int = 4096  # longest sequence that the model was made for
    make_vocab_size_divisible_by: int = 128
    normalization: Normalization = "layernorm"
    layernorm_epsilon: float = 1e-5
    activation: Activation = "gelu"
    bias: bool = True  # on every linear layer
    qkv_bias: bool = False  # on query, key and value where ``bias`` is off
    attention_bias: bool = False  # on attention's four where ``bias`` is off
    mlp_bias: bool = False  # on the MLP's where ``bias`` is off
    qk_layernorm: bool = False  # a norm on each query and key head
    openai_gelu: bool = False  # gelu by its tanh approximation
    bias_activation_fusion: bool = True  # NeMo's fused kernels approximate gelu so too; others are exact
    position_embedding_type: PositionEmbedding = "learned_absolute"
    rotary_percentage: float = 1.0
    rotary_base: float = 10000.0
    rope_scaling: RopeScaling | None = None
    share_embeddings_and_output_weights: bool = True
    window_size: int | None = None  # a query sees itself and window_size - 1 tokens before it
    init_method_std: float = 0.02
    hidden_dropout: float = 0.0  # dropout of embeddings and residual branches
    attention_dropout: float = 0.0  # dropout of attention weights
    precision: str = "bf16"  # dtype of the stored weights
    apply_query_key_layer_scaling: bool = False  # kept for fp16 by NeMo; the result is the same

    @classmethod
    def from_dict(cls, config: Mapping[str, Any]) -> GPTConfig:
        """From model_config.yaml; keys that are not architecture are left to others.

        Raises:
            UserError: a needed key is missing, a value is not one of the known ones, or sizes do not divide.
        """
        known = {f.name for f in fields(cls)}
        values = {k: v for k, v in config.items() if k in known}
        check_types(
            {k: v for k, v in values.items() if (v is not None or k in _SIZES) and k != "window_size"},
            cls,
            where="model_config.yaml",
        )
        missing = [name for name in _SIZES if name not in values]
        if missing:
            raise UserError(
                f"model_config.yaml lacks {', '.join(missing)}",
                fix="convert the checkpoint anew with import_hf.py or convert_nemo_gpt_to_mcore.py",
            )
        for name, supported in SUPPORTED.items():
            if (found := config.get(name)) not in supported:
                raise UserError(
                    f"model.{name}={found!r} is not supported",
                    fix=f"use a model whose model_config.yaml has {name}: {supported[-1]}",
                )
        values["window_size"] = window_tokens(values.get("window_size"))
        if scaling := _rope_scaling(config):
            values["rope_scaling"] = RopeScaling(**scaling)
        if values.get("ffn_hidden_size") is None:
            values["ffn_hidden_size"] = 4 * values["hidden_size"]
        values["precision"] = str(values.get("precision", "bf16"))
        built = cls(**values)
        built._check()
        return built

    def _check(self) -> None:
        for name, kind in (
            ("normalization", Normalization),
            ("activation", Activation),
            ("position_embedding_type", PositionEmbedding),
        ):
            if getattr(self, name) not in get_args(kind):
                raise UserError(
                    f"model.{name}={getattr(self, name)!r} in model_config.yaml is not supported",
                    fix=f"known values: {', '.join(get_args(kind))}",
                )
        if self.kv_channels is None and self.hidden_size % self.num_attention_heads:
            raise UserError(
                f"model.hidden_size={self.hidden_size} does not divide by model.num_attention_heads="
                f"{self.num_attention_heads}",
                fix="set model.kv_channels to the size of one head",
            )
        if self.num_attention_heads % self.query_groups:
            raise UserError(
                f"model.num_attention_heads={self.num_attention_heads} does not divide by model.num_query_groups="
                f"{self.query_groups}",
                fix="set model.num_query_groups to a divisor of the attention heads",
            )

    @property
    def query_groups(self) -> int:
        """Key/value heads."""
        return self.num_query_groups or self.num_attention_heads

    @property
    def head_dim(self) -> int:
        """Size of one head."""
        return self.kv_channels or self.hidden_size // self.num_attention_heads

    @property
    def gated(self) -> bool:
        """True if the MLP multiplies its activation by a second projection."""
        return self.activation.endswith("glu")

    @property
    def biased(self) -> dict[str, bool]:
        """Megatron's linear layers of a transformer layer, and whether each has a bias."""
        attention, mlp = self.bias or self.attention_bias, self.bias or self.mlp_bias
        qkv = attention or self.qkv_bias
        return {"linear_qkv": qkv, "linear_proj": attention, "linear_fc1": mlp, "linear_fc2": mlp}

    @property
    def tanh_gelu(self) -> bool:
        """True if gelu is computed by its tanh approximation, as NeMo's model was."""
        return self.openai_gelu or self.bias_activation_fusion

    def padded_vocab_size(self, tensor_parallel: int) -> int:
        """The vocabulary rounded up so that every tensor parallel rank holds an equal, well-shaped slice."""
        unit = self.make_vocab_size_divisible_by * tensor_parallel
        return -(-self.vocab_size // unit) * unit

    def check_layout(self, layout: Layout) -> None:
        """Raise UserError for a layout that this architecture cannot be split into.

        Raises:
            UserError: naming the model's size, the layout's, and values that fit.
        """
        if uncut := self._uncut(layout.tensor):
            fits = [n for n in range(1, self.num_attention_heads + 1) if not self._uncut(n)]
            raise UserError(
                f"model.tensor_model_parallel_size={layout.tensor} does not divide the model's {uncut[0]}",
                fix=f"set model.tensor_model_parallel_size to one of {fits}",
            )
        if self.num_layers % layout.pipeline:
            raise UserError(
                f"model.pipeline_model_parallel_size={layout.pipeline} does not divide the model's "
                f"num_layers={self.num_layers}",
                fix=f"set model.pipeline_model_parallel_size to one of {_divisors(self.num_layers)}",
            )
        layers = self.num_layers // layout.pipeline
        if layers % layout.virtual_pipeline:
            raise UserError(
                f"model.virtual_pipeline_model_parallel_size={layout.virtual_pipeline} does not divide the {layers} "
                f"layers of a pipeline rank (num_layers={self.num_layers} / model.pipeline_model_parallel_size="
                f"{layout.pipeline})",
                fix=f"set model.virtual_pipeline_model_parallel_size to one of {_divisors(layers)}",
            )

    def _uncut(self, ranks: int) -> list[str]:
        """The sizes that ``ranks`` ranks cannot share; key/value heads that are fewer go to several ranks each."""
        groups, fused = self.query_groups, (self.num_attention_heads + 2 * self.query_groups) * self.head_dim
        wrong = {
            f"num_attention_heads={self.num_attention_heads}": self.num_attention_heads % ranks,
            f"num_query_groups={groups}": (groups % ranks and ranks % groups) or fused % ranks,
            f"ffn_hidden_size={self.ffn_hidden_size}": self.ffn_hidden_size % ranks,
        }
        return [size for size, rest in wrong.items() if rest]


# What a configuration may say of the architecture: our fields, and NeMo's names for rope_scaling.
ARCHITECTURE_KEYS = frozenset(
    {f.name for f in fields(GPTConfig)}
    | {"scale_positional_embedding", "scale_factor", "seq_len_interpolation_factor"}
    | SUPPORTED.keys()
)


def unread_keys(config: Mapping[str, Any]) -> list[str]:
    """The keys of a model_config.yaml that nothing reads; they are kept when the model is saved."""
    return sorted(config.keys() - ARCHITECTURE_KEYS - {"tokenizer", "huggingface", "mcore_gpt"})


def window_tokens(window: int | Sequence[int] | None) -> int | None:
    """How many tokens a query sees, itself included; NeMo's pairs count those [before, behind] it."""
    if window is None or isinstance(window, int):
        return window
    match tuple(window) if isinstance(window, Sequence) else window:
        case (-1, -1 | 0):
            return None
        case (int(before), 0):
            return before + 1
    raise UserError(
        f"window_size={window} in model_config.yaml is not supported", fix="use a pair that ends with 0"
    )


def _divisors(number: int) -> list[int]:
    return [n for n in range(1, number + 1) if number % n == 0]


def _rope_scaling(config: Mapping[str, Any]) -> dict[str, Any] | None:
    """Our ``rope_scaling`` block, or NeMo's ``scale_positional_embedding`` and ``seq_len_interpolation_factor``."""
    names = ("rope_scaling", "scale_positional_embedding", "seq_len_interpolation_factor")
    asked = {name: config[name] for name in names if config.get(name)}
    if len(asked) > 1:
        raise UserError(
            f"rotary positions are scaled twice: {asked}",
            fix="keep one of them: leave yours out, or take the checkpoint's out of its model_config.yaml",
        )
    scaling = config.get("rope_scaling")
    if scaling:
        if not isinstance(scaling, Mapping):
            raise UserError(
                f"rope_scaling={scaling!r} in model_config.yaml is no block of keys",
                fix="write rope_type and factor below it, or null",
            )
        check_types(
            {k: v for k, v in scaling.items() if v is not None},
            RopeScaling,
            where="model_config.yaml: rope_scaling",
        )
        if scaling.get("rope_type") not in get_args(RopeType):
            raise UserError(
                f"rope_scaling.rope_type={scaling.get('rope_type')!r} in model_config.yaml is not supported",
                fix=f"known values: {', '.join(get_args(RopeType))}",
            )
        if not is_number(factor := scaling.get("factor")) or factor <= 0:
            raise UserError(
                f"rope_scaling.factor={factor!r} in model_config.yaml is no number above 0",
                fix="set it to how many times the original context is stretched",
            )
        return {k: v for k, v in scaling.items() if k in RopeScaling.__dataclass_fields__}
    if config.get("scale_positional_embedding"):
        return {"rope_type": "llama3", "factor": _factor(config, "scale_factor", 8.0)}
    if config.get("seq_len_interpolation_factor"):
        return {"rope_type": "linear", "factor": _factor(config, "seq_len_interpolation_factor", None)}
    return None


def _factor(config: Mapping[str, Any], name: str, default: float | None) -> float:
    factor = config.get(name, default)
    if not is_number(factor) or factor <= 0:
        raise UserError(
            f"{name}={factor!r} in model_config.yaml is no number above 0", fix=f"correct {name} there"
        )
    return factor
