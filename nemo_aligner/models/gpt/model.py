# SPDX-License-Identifier: Apache-2.0
"""megatron-core's GPTModel, made to return hidden states; and the layer specs it is built from."""

import importlib
import logging
from dataclasses import replace

import torch
from megatron.core import parallel_state, tensor_parallel
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
from megatron.core.models.gpt.gpt_model import GPTModel
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules, get_num_layers_to_build
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

from nemo_aligner.batch import TokenBatch
from nemo_aligner.models.gpt.attention import KVCache, RowParams, SDPACoreAttention
from nemo_aligner.models.gpt.config import GPTConfig
from nemo_aligner.models.gpt.layers import Norm, RowRotary
from nemo_aligner.parallel import cpu_shim, world
from nemo_aligner.parallel.ranks import Layout
from nemo_aligner.parallel.vocab import HeadOutput, HeadRequest, head_outputs

__all__ = ["GPT", "VocabHead", "build_gpt", "have_transformer_engine"]

logger = logging.getLogger(__name__)


def have_transformer_engine() -> bool:
    """Whether Transformer Engine is installed and there is a GPU for it."""
    if world.device().type != "cuda":
        return False
    try:
        importlib.import_module("transformer_engine.pytorch")
    except (ImportError, RuntimeError, OSError) as error:
        # Its empty meta package raises RuntimeError, a build for another CUDA raises OSError.
        logger.info("Transformer Engine is not usable (%s): torch's kernels are used", error)
        return False
    return True


class VocabHead(tensor_parallel.ColumnParallelLinear):
    """The output layer, called with targets: log-probs and their kin, never a whole [tokens, vocabulary] tensor.

    A call of the module, so that hooks on it (the distributed optimizer's parameter gather) fire.
    """

    def forward(
        self,
        hidden: Tensor,
        targets: Tensor | None = None,
        weight: Tensor | None = None,
        *,
        request: HeadRequest | None = None,
        weights: Tensor | None = None,
    ) -> HeadOutput | Tensor:
        """[n, H] hidden and [n] targets to :class:`HeadOutput`; without targets to [n, V / TP] logits."""
        weight = self.weight if weight is None else weight
        if targets is None:
            return hidden @ weight.t()
        assert request is not None
        return head_outputs(hidden, weight, targets, request=request, weights=weights)


class GPT(GPTModel):
    """GPTModel whose last stage returns hidden states [S, B, H], and whose RoPE goes by each row's positions."""

    def __init__(self, gpt: GPTConfig, config: TransformerConfig, spec: TransformerBlockSubmodules) -> None:
        super().__init__(
            config,
            spec,
            vocab_size=gpt.padded_vocab_size(config.tensor_model_parallel_size),
            max_sequence_length=gpt.max_position_embeddings,
            pre_process=world.is_first_stage(),
            post_process=world.is_last_stage(),
            share_embeddings_and_output_weights=gpt.share_embeddings_and_output_weights,
            position_embedding_type=gpt.position_embedding_type,
        )
        self.gpt_config = gpt
        if gpt.position_embedding_type == "rope":
            self.rotary_pos_emb = RowRotary(gpt, world.device())
        if self.post_process:
            # GPTModel names ColumnParallelLinear itself; the parameters and their marks stay as it made them.
            self.output_layer.__class__ = VocabHead

    def inputs(self, batch: TokenBatch, cache: KVCache | None = None) -> dict[str, object]:
        """The arguments of a call of this module (or of the DDP around it) on ``batch``.

        The call returns hidden states [S, B, H], or [S / TP, B, H] with sequence parallelism; before the last stage,
        what the next one takes.
        """
        positions = batch.positions()
        if cache is not None:
            positions = positions + cache.lengths[:, None]
        boundaries = None if batch.cu_seqlens is None else tuple(batch.cu_seqlens.tolist())
        return {
            "input_ids": batch.tokens,
            "position_ids": positions,
            "attention_mask": None,
            "packed_seq_params": RowParams(boundaries=boundaries, cache=cache),
        }

    def _preprocess(  # noqa: PLR0913 - Megatron's signature
        self,
        input_ids: Tensor,
        position_ids: Tensor,
        decoder_input: Tensor | None = None,
        inference_context: None = None,
        packed_seq_params: RowParams | None = None,
        padding_mask: Tensor | None = None,
    ) -> tuple[Tensor | None, ...]:
        assert inference_context is None and decoder_input is None, "the cache travels in RowParams"
        del packed_seq_params
        embedded = self.embedding(input_ids=input_ids, position_ids=position_ids) if self.pre_process else None
        rope = self.rotary_pos_emb(position_ids) if self.position_embedding_type == "rope" else None
        return embedded, rope, None, None, None, padding_mask

    def _postprocess(self, hidden_states: Tensor, **_: object) -> Tensor:
        return hidden_states

    def head(self, hidden: Tensor, targets: Tensor | None = None, **options: object) -> HeadOutput | Tensor:
        """The output layer on selected hidden states, with the tied weight where it is tied."""
        weight = self.shared_embedding_or_output_weight() if self.share_embeddings_and_output_weights else None
        return self.output_layer(hidden, targets, weight, **options)


def layer_spec(gpt: GPTConfig, config: TransformerConfig) -> TransformerBlockSubmodules:
    """Megatron's local layers with our norm and attention, for this pipeline stage."""
    layer = get_gpt_layer_local_spec(normalization=config.normalization)
    attention = replace(layer.submodules.self_attention.submodules, core_attention=SDPACoreAttention)
    submodules = replace(
        layer.submodules,
        input_layernorm=Norm,
        pre_mlp_layernorm=Norm,
        self_attention=ModuleSpec(
            module=layer.submodules.self_attention.module,
            params=layer.submodules.self_attention.params,
            submodules=attention,
        ),
    )
    layer = ModuleSpec(module=layer.module, params=layer.params, submodules=submodules)
    count = get_num_layers_to_build(config, None, parallel_state.get_pipeline_model_parallel_rank())
    return TransformerBlockSubmodules(layer_specs=[layer] * count, layer_norm=Norm)


def build_gpt(gpt: GPTConfig, layout: Layout, dtype: torch.dtype) -> GPT:
    """This rank's part of the model, its weights not yet loaded.

    Raises:
        UserError: the architecture cannot be cut by ``layout``.
    """
    gpt.check_layout(layout)
    config = gpt.transformer_config(layout, dtype)
    cpu_shim.install()
    model = GPT(gpt, config, layer_spec(gpt, config))
    return model.to(world.device())
