# SPDX-License-Identifier: Apache-2.0
"""From our architecture and layout to Megatron's TransformerConfig."""

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

from nemo_aligner.models.gpt.config import GPTConfig, precision_name
from nemo_aligner.models.gpt.recompute import Recompute
from nemo_aligner.models.gpt.rope import rotation_scale
from nemo_aligner.parallel import world
from nemo_aligner.parallel.ranks import Layout

DTYPES = {"32": torch.float32, "bf16": torch.bfloat16, "16": torch.float16}


def squared_relu(x: Tensor) -> Tensor:
    """relu(x)^2 (So et al. 2021, Primer)."""
    return F.relu(x).square()


def tanh_gelu(x: Tensor) -> Tensor:
    """Gelu's tanh approximation (Hendrycks and Gimpel 2016)."""
    return F.gelu(x, approximate="tanh")


ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "fast-swiglu": F.silu,
    "swiglu": F.silu,
    "fast-geglu": F.gelu,
    "geglu": F.gelu,
    "fast-reglu": F.relu,
    "reglu": F.relu,
    "squared-relu": squared_relu,
    "gelu": F.gelu,
}


def dtype_of(precision: str | int) -> torch.dtype:
    """The dtype that a ``precision`` key names."""
    return DTYPES[precision_name(precision)]


def transformer_config(
    gpt: GPTConfig,
    layout: Layout,
    dtype: torch.dtype,
    recompute: Recompute = Recompute(),  # noqa: B008 - frozen
) -> TransformerConfig:
    """Megatron's config for ``gpt``, cut by ``layout``, computing in ``dtype``."""
    interleaved, cuda = layout.virtual_pipeline > 1, world.device().type == "cuda"
    config = TransformerConfig(
        num_layers=gpt.num_layers,
        hidden_size=gpt.hidden_size,
        ffn_hidden_size=gpt.ffn_hidden_size,
        num_attention_heads=gpt.num_attention_heads,
        num_query_groups=gpt.query_groups,
        kv_channels=gpt.head_dim,
        normalization="RMSNorm" if gpt.normalization == "rmsnorm" else "LayerNorm",
        layernorm_epsilon=gpt.layernorm_epsilon,
        layernorm_zero_centered_gamma=gpt.normalization == "layernorm1p",
        gated_linear_unit=gpt.gated,
        activation_func=_activation(gpt),
        add_bias_linear=any(gpt.biased.values()),  # spec.py makes the layers that have none
        qk_layernorm=gpt.qk_layernorm,
        window_size=(gpt.window_size - 1, 0) if gpt.window_size else None,
        init_method_std=gpt.init_method_std,
        hidden_dropout=gpt.hidden_dropout,
        attention_dropout=gpt.attention_dropout,
        tensor_model_parallel_size=layout.tensor,
        pipeline_model_parallel_size=layout.pipeline,
        virtual_pipeline_model_parallel_size=layout.virtual_pipeline if interleaved else None,
        context_parallel_size=layout.context,
        sequence_parallel=layout.sequence_parallel,
        params_dtype=dtype,
        pipeline_dtype=dtype,
        bf16=dtype == torch.bfloat16,
        fp16=dtype == torch.float16,
        # The weights come from a checkpoint. Megatron marks tensor parallel weights while it initialises them,
        # so the initialisation stays on and does nothing.
        init_method=_leave,
        output_layer_init_method=_leave,
        embedding_init_method=_leave,
        use_cpu_initialization=False,
        # Fused kernels that need Transformer Engine or apex; its spec turns on its own.
        bias_dropout_fusion=False,
        bias_activation_fusion=False,
        masked_softmax_fusion=False,
        gradient_accumulation_fusion=False,
        apply_rope_fusion=False,
        persist_layer_norm=False,
        deallocate_pipeline_outputs=True,
        recompute_granularity=recompute.granularity,
        recompute_method=recompute.method if recompute.granularity == "full" else None,
        recompute_num_layers=recompute.num_layers if recompute.granularity == "full" else None,
        # Batched sends and receives between the same two ranks cross: over gloo always, over NCCL where an interleaved
        # pipeline sends both ways at once. One by one they do not.
        batch_p2p_comm=cuda and not interleaved,
        overlap_p2p_comm=cuda and interleaved,
    )
    _set_rotation_scale(config, rotation_scale(gpt))
    return config


def _set_rotation_scale(config: TransformerConfig, scale: float) -> None:
    """Have Megatron, where it turns queries and keys itself, multiply cosines and sines by ``scale``.

    It makes the scale of yarn's settings, 0.1 * mscale * log(factor) + 1, and knows no other way to say it.
    """
    if scale != 1.0:
        own = {
            "yarn_rotary_scaling_factor": math.e,
            "yarn_mscale": 10 * (scale - 1),
            "yarn_mscale_all_dim": 0.0,
        }
        for name, value in own.items():
            setattr(config, name, value)


def _activation(gpt: GPTConfig) -> Callable[[Tensor], Tensor]:
    function = ACTIVATIONS[gpt.activation]
    return tanh_gelu if function is F.gelu and gpt.tanh_gelu else function


def _leave(weight: Tensor) -> Tensor:
    return weight
