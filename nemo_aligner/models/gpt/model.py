# SPDX-License-Identifier: Apache-2.0
"""megatron-core's GPTModel, made to return hidden states; and the layer specs it is built from."""

import logging
from typing import Any

import torch
from megatron.core import tensor_parallel
from megatron.core.models.gpt.gpt_model import GPTModel
from megatron.core.transformer.enums import AttnBackend
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

from nemo_aligner.batch import TokenBatch
from nemo_aligner.models.gpt.attention import KVCache, RowParams
from nemo_aligner.models.gpt.config import GPTConfig
from nemo_aligner.models.gpt.layers import RowRotary
from nemo_aligner.models.gpt.spec import have_transformer_engine, layer_spec
from nemo_aligner.models.gpt.transformer import transformer_config
from nemo_aligner.parallel import cpu_shim, world
from nemo_aligner.parallel.ranks import Layout
from nemo_aligner.parallel.vocab import HeadOutput, HeadRequest, head_outputs

__all__ = ["GPT", "VocabHead", "build_gpt"]

logger = logging.getLogger(__name__)


# By model.use_flash_attention; torch's own attention chooses by itself.
ATTENTION_BACKENDS = {None: AttnBackend.auto, True: AttnBackend.flash, False: AttnBackend.unfused}


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
        assert weight is not None
        if targets is None:
            return hidden @ weight.t()
        assert request is not None
        return head_outputs(hidden, weight, targets, request=request, weights=weights)


class GPT(GPTModel):
    """GPTModel whose last stage returns hidden states [S, B, H], and whose RoPE goes by each row's positions."""

    def __init__(self, gpt: GPTConfig, config: TransformerConfig, spec: Any) -> None:  # noqa: ANN401 - see layer_spec
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

    def _preprocess(
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
        embedded = (
            self.embedding(input_ids=input_ids, position_ids=position_ids) if self.pre_process else None
        )
        rope = self.rotary_pos_emb(position_ids) if self.position_embedding_type == "rope" else None
        return embedded, rope, None, None, None, padding_mask

    def _postprocess(self, hidden_states: Tensor, **_: object) -> Tensor:
        return hidden_states

    def head(self, hidden: Tensor, targets: Tensor | None = None, **options: object) -> HeadOutput | Tensor:
        """The output layer on selected hidden states, with the tied weight where it is tied."""
        weight = (
            self.shared_embedding_or_output_weight() if self.share_embeddings_and_output_weights else None
        )
        return self.output_layer(hidden, targets, weight, **options)


def build_gpt(
    gpt: GPTConfig, layout: Layout, dtype: torch.dtype, *, use_flash_attention: bool | None = None
) -> GPT:
    """This rank's part of the model, its weights not yet loaded.

    Args:
        use_flash_attention: with Transformer Engine, True or False forces the backend; None lets it choose.

    Raises:
        UserError: the architecture cannot be cut by ``layout``.
    """
    gpt.check_layout(layout)
    config = transformer_config(gpt, layout, dtype)
    config.attention_backend = ATTENTION_BACKENDS[use_flash_attention]
    cpu_shim.install()
    if world.is_logging_rank():
        kernels = (
            f"Transformer Engine, {config.attention_backend.name}"
            if have_transformer_engine()
            else "torch SDPA"
        )
        logger.info("attention: %s", kernels)
    model = GPT(gpt, config, layer_spec(config))
    return model.to(world.device())
