# SPDX-License-Identifier: Apache-2.0
"""megatron-core's GPTModel, made to return hidden states; several on a rank where the pipeline interleaves."""

import logging
import warnings
from collections.abc import Iterator, Sequence
from typing import Any, cast

import torch
from megatron.core import tensor_parallel
from megatron.core.models.gpt.gpt_model import GPTModel
from megatron.core.transformer.enums import AttnBackend
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor, nn

from nemo_aligner.batch import TokenBatch
from nemo_aligner.models.gpt.attention import RowParams
from nemo_aligner.models.gpt.config import GPTConfig
from nemo_aligner.models.gpt.heads import HeadConfig, ScalarHead
from nemo_aligner.models.gpt.layers import InputEmbedding, Rotation, RowRotary, added_to_main_grad
from nemo_aligner.models.gpt.lora import ADAPTERS, Adapters
from nemo_aligner.models.gpt.nf4 import NF4
from nemo_aligner.models.gpt.recompute import Recompute
from nemo_aligner.models.gpt.spec import layer_spec
from nemo_aligner.models.gpt.transformer import transformer_config
from nemo_aligner.parallel import cpu_shim, te, world
from nemo_aligner.parallel.ranks import Layout
from nemo_aligner.parallel.vocab import HeadOutput, HeadRequest, head_outputs

logger = logging.getLogger(__name__)


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
        logprob_grad: Tensor | None = None,
        grad_is_exact: bool = False,
    ) -> HeadOutput | Tensor:
        """[n, H] hidden and [n] targets to :class:`HeadOutput`; without targets to [n, V / TP] logits.

        ``grad_is_exact`` says that ``logprob_grad`` is the gradient itself and not only in proportion to it.
        """
        weight = self.weight if weight is None else weight
        assert weight is not None
        if targets is None:
            return hidden @ weight.t()
        assert request is not None
        main_grad: Tensor | None = getattr(weight, "main_grad", None) if grad_is_exact else None
        if main_grad is not None and main_grad.dtype != hidden.dtype:
            main_grad = None
        if main_grad is not None and weight is self.weight:
            # The embedding's, where it is tied, is given a gradient by the embedding.
            weight = added_to_main_grad(weight)
        return head_outputs(
            hidden, weight, targets, request=request, logprob_grad=logprob_grad, main_grad=main_grad
        )


class GPT(GPTModel):
    """GPTModel whose last stage returns hidden states [S, B, H], and whose RoPE goes by each row's positions.

    ``chunk`` numbers the parts that a rank has of an interleaved pipeline's model; None where it has one. With ``head``
    it is a reward model or a critic, and has no output layer.
    """

    def __init__(
        self,
        gpt: GPTConfig,
        config: TransformerConfig,
        spec: Any,  # noqa: ANN401 - see layer_spec
        chunk: int | None = None,
        head: HeadConfig | None = None,
    ) -> None:
        last = (config.virtual_pipeline_model_parallel_size or 1) - 1
        super().__init__(
            config,
            spec,
            vocab_size=gpt.padded_vocab_size(config.tensor_model_parallel_size),
            max_sequence_length=gpt.max_position_embeddings,
            pre_process=world.is_first_stage() and chunk in (None, 0),
            post_process=world.is_last_stage() and chunk in (None, last),
            # A tied model's embedding would be summed over the stages with a head that is not it.
            share_embeddings_and_output_weights=gpt.share_embeddings_and_output_weights and head is None,
            position_embedding_type=gpt.position_embedding_type,
            vp_stage=chunk,
        )
        self.gpt_config = gpt
        if gpt.position_embedding_type == "rope":
            self.rotary_pos_emb = RowRotary(gpt, world.device())
        if self.pre_process and not self.share_embeddings_and_output_weights:
            # As below: GPTModel names it itself.
            self.embedding.word_embeddings.__class__ = InputEmbedding
        self.rm_head: ScalarHead | None = None
        if self.post_process and head is not None:
            del self.output_layer
            # In Megatron's GPTModel this says that there is an output layer to save.
            self.post_process = False
            self.rm_head = ScalarHead(head, config)
        elif self.post_process:
            # GPTModel names ColumnParallelLinear itself; the parameters and their marks stay as it made them.
            cast(nn.Module, self.output_layer).__class__ = VocabHead

    @property
    def chunks(self) -> Sequence["GPT"]:
        """This rank's parts of the model, in the order in which a batch passes them: this one."""
        return [self]

    def inputs(self, batch: TokenBatch, selected: Tensor | None = None) -> dict[str, object]:
        """The arguments of a call of this module (or of the DDP around it) on ``batch``.

        The call returns hidden states [S, B, H], or [S / TP, B, H] with sequence parallelism; before the last stage,
        what the next one takes.

        Args:
            selected: [n] places in [S * B]: the call returns the hidden states of these alone, [n, 1, H].
        """
        boundaries = None if batch.cu_seqlens is None else tuple(batch.cu_seqlens.tolist())
        return {
            "input_ids": batch.tokens,
            "position_ids": batch.positions(),
            "attention_mask": None,
            "packed_seq_params": RowParams(boundaries=boundaries, selected=selected),
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
        assert inference_context is None and decoder_input is None, "writing is the decoder's"
        embedded = (
            self.embedding(input_ids=input_ids, position_ids=position_ids) if self.pre_process else None
        )
        if embedded is not None and torch.is_grad_enabled() and not embedded.requires_grad:
            # Megatron recomputes layers for a gradient of their input alone; beside adapters nothing is learned of it.
            embedded.requires_grad_(self.config.recompute_granularity == "full")
        rope = self.rotary_pos_emb(position_ids) if self.position_embedding_type == "rope" else None
        if rope is not None and packed_seq_params is not None:
            # Ours, once for all layers; Megatron takes the cosines anew in each.
            scale, dtype = self.rotary_pos_emb.scale, self.config.params_dtype
            packed_seq_params.rotation, rope = Rotation.of(rope, dtype, scale=scale), None
        return embedded, rope, None, None, None, padding_mask

    def _postprocess(self, hidden_states: Tensor, **_: object) -> Tensor:
        return hidden_states

    def head(self, hidden: Tensor, targets: Tensor | None = None, **options: object) -> HeadOutput | Tensor:
        """The output layer on selected hidden states, with the tied weight where it is tied."""
        weight = (
            self.shared_embedding_or_output_weight() if self.share_embeddings_and_output_weights else None
        )
        return self.output_layer(hidden, targets, weight, **options)


class InterleavedGPT(MegatronModule):
    """A rank's parts of a model whose pipeline passes each rank more than once; saved and loaded like one model."""

    def __init__(self, chunks: Sequence[GPT]) -> None:
        super().__init__(chunks[0].config)
        self.parts = torch.nn.ModuleList(chunks)
        self.gpt_config = chunks[0].gpt_config

    @property
    def chunks(self) -> Sequence[GPT]:
        """This rank's parts of the model, in the order in which a batch passes them."""
        return list(self.parts)  # type: ignore[arg-type]

    def sharded_state_dict(
        self, prefix: str = "", sharded_offsets: tuple[()] = (), metadata: dict[str, Any] | None = None
    ) -> dict[str, Any]:
        """Megatron's sharded tensors by this module's names for them; their keys are those of a model in one part."""
        return {
            f"{prefix}parts.{number}.{name.removeprefix(prefix)}": value
            for number, chunk in enumerate(self.chunks)
            for name, value in chunk.sharded_state_dict(prefix, sharded_offsets, metadata).items()
        }


def weights_in_effect(module: nn.Module) -> dict[str, Tensor]:
    """Return what a module computes with, by name, adapters merged; Transformer Engine's empty biases are left out.

    Whoever reads a model's weights to compute or to write asks here.
    """
    weights = {
        name: weight.detach()
        for name, weight in module.named_parameters()
        if weight.numel() and ADAPTERS not in name.split(".")
    }
    return weights | {f"{name}.weight".lstrip("."): weight for name, weight in changed_weights(module)}


def changed_weights(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """(name, weight in effect) of each linear layer with adapters or a weight in four bits, made when asked for."""
    for name, one in module.named_modules():
        adapters = getattr(one, ADAPTERS, None)
        if isinstance(adapters, Adapters):
            yield name, adapters.merged(cast(Tensor, one.weight))
        elif isinstance(getattr(one, "nf4", None), NF4):
            yield name, cast(Tensor, one.weight)


def attention_backend(use_flash_attention: bool | None) -> AttnBackend:
    """Of Transformer Engine; torch's own attention chooses by itself.

    True is the flash-attn package or, where that is not installed, cuDNN's kernel of the same kind; False is neither;
    None lets Transformer Engine choose.
    """
    match use_flash_attention:
        case None:
            return AttnBackend.auto
        case False:
            return AttnBackend.unfused
        case True:
            return AttnBackend.flash if te.has_flash_attn() else AttnBackend.fused


def build_gpt(
    gpt: GPTConfig,
    layout: Layout,
    dtype: torch.dtype,
    *,
    use_flash_attention: bool | None = None,
    recompute: Recompute = Recompute(),  # noqa: B008 - frozen
    head: HeadConfig | None = None,
    adapted: bool = False,
) -> GPT | InterleavedGPT:
    """This rank's part of the model, its weights not yet loaded; several parts where the pipeline interleaves.

    Args:
        head: of a reward model or a critic; None for a language model.
        use_flash_attention: see :func:`attention_backend`.
        recompute: activations that the backward computes again.
        adapted: whether it is to have adapters. Transformer Engine's layers do not give what their norms give.

    Raises:
        UserError: the architecture cannot be cut by ``layout``.
    """
    gpt.check_layout(layout)
    recompute.check_layers(gpt.num_layers // layout.pipeline // layout.virtual_pipeline)
    # Said of selective recompute on every rank; docs/training.md says it.
    warnings.filterwarnings("ignore", message="[\\s\\S]*core_attn is from transformer_engine")
    config = transformer_config(gpt, layout, dtype, recompute)
    config.attention_backend = attention_backend(use_flash_attention)
    cpu_shim.install()
    with_te = te.usable() and not adapted
    if world.is_logging_rank():
        kernels = f"Transformer Engine, {config.attention_backend.name}" if with_te else "torch SDPA"
        logger.info("attention: %s", kernels)
    spec = layer_spec(gpt, config, with_te=with_te)
    if layout.virtual_pipeline == 1:
        return GPT(gpt, config, spec, head=head).to(world.device())
    chunks = [GPT(gpt, config, spec, chunk, head) for chunk in range(layout.virtual_pipeline)]
    return InterleavedGPT(chunks).to(world.device())
