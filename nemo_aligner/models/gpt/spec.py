# SPDX-License-Identifier: Apache-2.0
"""The modules of a layer: Transformer Engine's, or Megatron's with our norm."""

import functools
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from megatron.core import parallel_state
from megatron.core.models.gpt.gpt_layer_specs import (
    get_gpt_layer_local_spec,
    get_gpt_layer_with_transformer_engine_spec,
)
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules, get_num_layers_to_build
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.transformer_layer import TransformerLayer
from torch import Tensor

from nemo_aligner.models.gpt.attention import SDPACoreAttention
from nemo_aligner.models.gpt.config import GPTConfig
from nemo_aligner.models.gpt.layers import ColumnLinear, GatedActivation, Norm, RowLinear


class Layer(TransformerLayer):
    """After the last layer's attention no position sees another: its MLP is computed for those that are read."""

    def forward(self, hidden_states: Tensor, **options: Any) -> tuple[Any, Tensor | None]:  # noqa: ANN401
        """[S, B, H] to the same; of the last layer to [n, 1, H] where ``RowParams.selected`` has n places."""
        hidden, context = self._forward_attention(hidden_states, **options)
        rows = options["packed_seq_params"]
        if self.layer_number == self.config.num_layers and rows is not None and rows.selected is not None:
            hidden = hidden.flatten(0, 1).index_select(0, rows.selected)[:, None]
        return self._forward_mlp(hidden, padding_mask=options["padding_mask"]), context


def layer_spec(gpt: GPTConfig, config: TransformerConfig, *, with_te: bool) -> TransformerBlockSubmodules:
    """The layers of this pipeline stage, and the norm after the last one."""
    layer, norm = _te_layer(config) if with_te else _local_layer(config)
    layer = _with_biases(layer, gpt.biased)
    # Has Megatron call the layer's activation_func on all of fc1's output. Set here, as its own check of the setting
    # admits Transformer Engine's functions only.
    config.use_te_activation_func = config.gated_linear_unit
    count = get_num_layers_to_build(config, None, parallel_state.get_pipeline_model_parallel_rank())
    return TransformerBlockSubmodules(layer_specs=[layer] * count, layer_norm=norm)


def _te_layer(config: TransformerConfig) -> tuple[ModuleSpec, Any]:
    # Imported here: both need Transformer Engine.
    from megatron.core.extensions.transformer_engine import TENorm

    from nemo_aligner.models.gpt.attention_te import TECoreAttention

    layer = get_gpt_layer_with_transformer_engine_spec(qk_layernorm=config.qk_layernorm)
    return _with(layer, core_attention=TECoreAttention), TENorm


def _local_layer(config: TransformerConfig) -> tuple[ModuleSpec, Any]:
    head_norms = {"q_layernorm": Norm, "k_layernorm": Norm} if config.qk_layernorm else {}
    layer = _with(
        get_gpt_layer_local_spec(normalization=config.normalization),
        core_attention=SDPACoreAttention,
        **head_norms,
    )
    submodules: Any = layer.submodules  # Megatron types them as object
    attention, mlp = submodules.self_attention, submodules.mlp
    submodules = replace(
        submodules,
        input_layernorm=Norm,
        pre_mlp_layernorm=Norm,
        self_attention=_changed(attention, linear_qkv=ColumnLinear, linear_proj=RowLinear),
        mlp=_changed(mlp, linear_fc1=ColumnLinear, linear_fc2=RowLinear),
    )
    return replace(layer, submodules=submodules), Norm


def _with(layer: ModuleSpec, **modules: type) -> ModuleSpec:
    """Our layer with ``modules`` for parts of its attention, and our gated activation where it has one."""
    submodules: Any = layer.submodules
    attention, mlp = submodules.self_attention, submodules.mlp
    attention = _changed(attention, **modules)
    mlp = _changed(mlp, activation_func=GatedActivation)
    return replace(layer, module=Layer, submodules=replace(submodules, self_attention=attention, mlp=mlp))


def _with_biases(layer: ModuleSpec, biased: Mapping[str, bool]) -> ModuleSpec:
    """The same layer; Megatron has one setting for all biases, so linear layers that lack one are handled here."""
    if not any(biased.values()):
        return layer
    submodules: Any = layer.submodules
    changed = {}
    for name in ("self_attention", "mlp"):
        module = getattr(submodules, name)
        parts = _submodules(module)
        linear = [part for part in biased if hasattr(parts, part) and not biased[part]]
        changed[name] = _changed(module, **{part: _without_bias(getattr(parts, part)) for part in linear})
    return replace(layer, submodules=replace(submodules, **changed))


@functools.cache
def _without_bias(linear: type) -> type:
    def init(self: Any, *args: Any, **options: Any) -> None:  # noqa: ANN401 - Megatron's
        super(plain, self).__init__(*args, **options | {"bias": False})

    plain = type(linear.__name__, (linear,), {"__init__": init})
    return plain


def _changed(module: Any, **parts: type) -> Any:  # noqa: ANN401 - Megatron types submodules as object
    """The same module with other ``parts``."""
    submodules = replace(_submodules(module), **parts)
    if isinstance(module, functools.partial):
        return functools.partial(module.func, *module.args, **module.keywords | {"submodules": submodules})
    return replace(module, submodules=submodules)


def _submodules(module: Any) -> Any:  # noqa: ANN401 - as above
    # From megatron-core 0.19 on, an MLP's builder is a partial.
    return module.keywords["submodules"] if isinstance(module, functools.partial) else module.submodules
