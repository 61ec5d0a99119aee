# SPDX-License-Identifier: Apache-2.0
"""From Hydra's config to typed, frozen settings. A key that nobody knows is an error with the nearest known one.

Each layer owns its block's dataclass; this module composes them into one Job per script.
"""

import builtins
import dataclasses
import difflib
import logging
import types
import typing
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from nemo_aligner.data.config import SFTDataConfig
from nemo_aligner.errors import UserError
from nemo_aligner.models.gpt.config import ARCHITECTURE_KEYS, GPTConfig, precision_name
from nemo_aligner.models.gpt.learning_rate import OptimConfig
from nemo_aligner.models.gpt.recompute import Granularity, Method, Recompute
from nemo_aligner.parallel.ranks import Layout
from nemo_aligner.run.experiment import ExperimentConfig
from nemo_aligner.run.schedule import SupervisedConfig

__all__ = ["ModelConfig", "SFTJob", "TrainerConfig", "log_no_effect", "parse"]

logger = logging.getLogger(__name__)

T = TypeVar("T")


@dataclass(frozen=True, kw_only=True)
class TrainerConfig:
    """The ``trainer`` block."""

    sft: SupervisedConfig = field(default_factory=SupervisedConfig)
    num_nodes: int = 1
    devices: int = 1
    precision: str | int = "bf16"
    collective_timeout: float = 600.0
    max_time: str | None = None


@dataclass(frozen=True, kw_only=True)
class PeftConfig:
    """The ``model.peft`` block."""

    peft_scheme: str = "none"
    restore_from_path: str | None = None
    lora_tuning: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """The ``model`` block, without the architecture's own keys: those stand in ``architecture``."""

    restore_from_path: str
    data: SFTDataConfig
    optim: OptimConfig = field(default_factory=OptimConfig)
    peft: PeftConfig = field(default_factory=PeftConfig)
    architecture: dict[str, Any] = field(default_factory=dict)
    seed: int = 1234
    tensor_model_parallel_size: int = 1
    pipeline_model_parallel_size: int = 1
    virtual_pipeline_model_parallel_size: int | None = None
    context_parallel_size: int = 1
    expert_model_parallel_size: int = 1
    sequence_parallel: bool = False
    answer_only_loss: bool = True
    kept_logits_mib: int = 1024
    use_flash_attention: bool | None = None
    resume_from_checkpoint: str | None = None
    activations_checkpoint_granularity: Granularity | None = None
    activations_checkpoint_method: Method | None = None
    activations_checkpoint_num_layers: int | None = None
    activations_checkpoint_layers_per_pipeline: int | None = None
    ffn_dropout: float = 0.0

    @property
    def layout(self) -> Layout:
        """How the world is to be cut."""
        return Layout(
            tensor=self.tensor_model_parallel_size,
            pipeline=self.pipeline_model_parallel_size,
            virtual_pipeline=self.virtual_pipeline_model_parallel_size or 1,
            context=self.context_parallel_size,
            sequence_parallel=self.sequence_parallel,
        )

    @property
    def recompute(self) -> Recompute:
        """Which activations the backward computes again."""
        return Recompute(
            granularity=self.activations_checkpoint_granularity,
            method=self.activations_checkpoint_method,
            num_layers=self.activations_checkpoint_num_layers,
        )

    @property
    def length_multiple(self) -> int:
        """Padded lengths are multiples of this many tokens: with sequence parallelism each rank has a slice."""
        return self.tensor_model_parallel_size if self.sequence_parallel else 1


@dataclass(frozen=True, kw_only=True)
class SFTJob:
    """All settings of train_gpt_sft.py."""

    model: ModelConfig
    trainer: TrainerConfig = field(default_factory=TrainerConfig)
    exp_manager: ExperimentConfig = field(default_factory=ExperimentConfig)
    name: str = "megatron_gpt_sft"

    def check(self, world_size: int | None = None) -> None:
        """Refuse what needs neither file nor rank to be seen as wrong.

        Args:
            world_size: ranks that an outer starter made; None where we start them.
        """
        trainer, model = self.trainer, self.model
        precision_name(trainer.precision)
        model.layout.check_fits(num_nodes=trainer.num_nodes, devices=trainer.devices, world_size=world_size)
        model.optim.check()
        model.recompute.check()
        self.exp_manager.check()
        trainer.sft.check("trainer.sft")
        for key, value, off, what in (
            (
                "model.peft.peft_scheme",
                model.peft.peft_scheme,
                ("none", None, ""),
                "parameter-efficient tuning",
            ),
            ("model.context_parallel_size", model.context_parallel_size, (1,), "context parallelism"),
            (
                "model.expert_model_parallel_size",
                model.expert_model_parallel_size,
                (1,),
                "expert parallelism",
            ),
            ("model.data.sample", model.data.sample, (False,), "drawing rows with replacement"),
            ("model.ffn_dropout", model.ffn_dropout, (0.0,), "dropout inside the MLP"),
            (
                "model.activations_checkpoint_layers_per_pipeline",
                model.activations_checkpoint_layers_per_pipeline,
                (None,),
                "recomputing fewer layers on later stages",
            ),
        ):
            if value not in off:
                cure = f"set {key}={'null' if off[0] is None else off[0]}"
                raise UserError(f"{key}={value}: {what} is not supported", cure=cure)
        ranks = model.layout.data_parallel_size(trainer.num_nodes * trainer.devices)
        for name, split in (("train_ds", model.data.train_ds), ("validation_ds", model.data.validation_ds)):
            unit = split.micro_batch_size * ranks
            if split.global_batch_size % unit:
                fit = -(-split.global_batch_size // unit) * unit
                raise UserError(
                    f"model.data.{name}.global_batch_size={split.global_batch_size} is not a multiple of "
                    f"micro_batch_size={split.micro_batch_size} x {ranks} data parallel ranks = {unit}",
                    cure=f"set model.data.{name}.global_batch_size={fit}",
                )

    def check_paths(self) -> None:
        """Refuse files that are not there, and an output that is, before ranks start and weights are read."""
        model = self.model
        paths = {
            "model.restore_from_path": model.restore_from_path,
            "model.data.train_ds.file_path": model.data.train_ds.file_path,
            "model.data.validation_ds.file_path": model.data.validation_ds.file_path,
        }
        for key, path in paths.items():
            if not Path(path).exists():
                raise UserError(f"{key}={path} does not exist", cure=f"set {key} to a path that does")
        self.exp_manager.check_folder()


# Settings that are accepted and change nothing: (key, values that ask for nothing, what happens instead). No key that
# changes numbers may stand here.
NO_EFFECT: tuple[tuple[str, tuple[object, ...], str], ...] = (
    ("trainer.accelerator", ("gpu",), "a GPU is used where there is one, else the CPU"),
    ("trainer.logger", (False,), "exp_manager makes the loggers"),
    ("trainer.enable_checkpointing", (False,), "exp_manager saves"),
    ("trainer.use_distributed_sampler", (False,), "the loader deals batches out to ranks"),
    ("trainer.max_epochs", (), "trainer.sft.max_epochs counts"),
    ("trainer.max_steps", (), "trainer.sft.max_steps counts"),
    ("model.global_batch_size", (), "model.data.train_ds.global_batch_size counts"),
    ("model.micro_batch_size", (), "model.data.train_ds.micro_batch_size counts"),
    ("model.mcore_gpt", (True,), "models always are megatron-core's"),
    ("model.megatron_amp_O2", (False,), "weights are in trainer.precision, the optimizer keeps fp32 copies"),
    (
        "model.save_nemo_on_validation_end",
        (False,),
        "every checkpoint is a model; the .nemo is written at the end",
    ),
    ("model.steerlm2", ({},), "supervised fine-tuning reads none of it"),
    *(
        (f"model.data.{split}.{name}", idle, instead)
        for split in ("train_ds", "validation_ds")
        for name, idle, instead in (
            ("memmap_workers", (), "one pass over the file finds its lines"),
            ("min_seq_length", (0, 1), "a sample of any length is used"),
            ("index_mapping_dir", (), "the index of lines is kept in memory"),
            ("hf_dataset", (False,), "the file is read as JSONL either way"),
            ("output_original_text", (True,), "samples carry tokens only"),
        )
    ),
    ("model.data.skip_warmup", (True,), "files are read when rows are asked for"),
    ("model.data.index_mapping_dir", (), "the index of lines is kept in memory"),
    ("model.data.eod_mask_loss", (False,), "what is learned goes by position, never by token"),
    ("model.overwrite_base_config", ({"data": {"data_prefix": True}},), "a checkpoint's data are not read"),
    ("exp_manager.checkpoint_callback_params.model_parallel_size", (), "a checkpoint loads at any layout"),
    *(
        (f"model.{name}", (False,), "the kernels follow from what is installed")
        for name in (
            "transformer_engine",
            "apply_rope_fusion",
            "bias_dropout_add_fusion",
            "masked_softmax_fusion",
            "gradient_accumulation_fusion",
            "persist_layer_norm",
        )
    ),
    *(
        (
            f"model.{name}",
            (False,),
            "Megatron's schedules and its distributed optimizer decide how ranks exchange tensors",
        )
        for name in (
            "sync_batch_comm",
            "gradient_as_bucket_view",
            "grad_div_ar_fusion",
            "grad_allreduce_chunk_size_mb",
            "async_grad_allreduce",
            "overlap_p2p_comm",
            "batch_p2p_comm",
            "ub_tp_comm_overlap",
            "ub_tp_comm_overlap_cfg",
            "defer_embedding_wgrad_compute",
        )
    ),
    *(
        (
            f"model.dist_ckpt_{name}",
            (),
            "checkpoints are written in parallel by all ranks, in the torch_dist format",
        )
        for name in (
            "format",
            "load_on_device",
            "parallel_save",
            "parallel_save_within_dp",
            "parallel_load",
            "parallel_dist_opt",
            "torch_dist_multiproc",
            "assume_constant_structure",
        )
    ),
    ("model.use_cpu_initialization", (False,), "weights come from the checkpoint"),
    ("model.nsys_profile", ({},), "there is no profiler within"),
)
ACCEPTED = frozenset(key for key, _, _ in NO_EFFECT)


def log_no_effect(config: DictConfig) -> None:
    """One line for each setting of ``config``, as Hydra composed it, that asks for an effect it does not have."""
    for key, idle, instead in NO_EFFECT:
        parent, _, name = key.rpartition(".")
        block = OmegaConf.select(config, parent)
        # An interpolation only repeats another setting.
        if block is None or name not in block or OmegaConf.is_interpolation(block, name):
            continue
        value = OmegaConf.select(config, key)
        if value not in (None, *idle):
            logger.info("%s=%s has no effect: %s", key, value, instead)


def parse(config: DictConfig, kind: type[T]) -> T:
    """``config`` as a ``kind``.

    Raises:
        UserError: a key is unknown (with the nearest known one), missing, or has a value of the wrong type.
    """
    try:
        values = OmegaConf.to_container(config, resolve=True, throw_on_missing=False)
    except OmegaConfBaseException as error:
        line = str(error).splitlines()[0]
        raise UserError(
            f"the configuration does not resolve: {line}", cure="correct the key it names"
        ) from error
    assert isinstance(values, dict)
    values = {str(k): v for k, v in values.items() if k != "hydra"}
    model = values.get("model")
    if isinstance(model, dict):
        # null leaves the checkpoint's own value in place.
        hints = typing.get_type_hints(GPTConfig)
        given = {k: v for k, v in model.items() if k in ARCHITECTURE_KEYS and v is not None}
        for key in given.keys() & hints.keys():
            converted = _convert(given[key], hints[key], f"model.{key}")
            # A block is checked and stays as model_config.yaml has it.
            given[key] = given[key] if dataclasses.is_dataclass(converted) else converted
        values["model"] = {k: v for k, v in model.items() if k not in ARCHITECTURE_KEYS} | {
            "architecture": given
        }
    return _build(values, kind, "")


def _build(values: Mapping[str, Any], kind: type[T], path: str) -> T:
    hints = typing.get_type_hints(kind)
    known = {f.name: f for f in dataclasses.fields(kind)}  # type: ignore[arg-type]
    for key in values:
        if key not in known and f"{path}{key}" not in ACCEPTED:
            _refuse_unknown(f"{path}{key}", key, [*known, *(ARCHITECTURE_KEYS if path == "model." else ())])
    given = {}
    for name, spec in known.items():
        required = spec.default is dataclasses.MISSING and spec.default_factory is dataclasses.MISSING
        if name in values and values[name] != "???":
            given[name] = _convert(values[name], hints[name], f"{path}{name}")
        elif required or name in values:
            raise UserError(f"{path}{name} is not set", cure=f"add {path}{name}=... to the command line")
    return kind(**given)


def _refuse_unknown(key: str, name: str, known: list[str]) -> typing.NoReturn:
    near = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
    prefix = key[: -len(name)]
    cure = (
        f"did you mean {prefix}{near[0]}?"
        if near
        else f"known keys: {', '.join(prefix + k for k in sorted(known))}"
    )
    raise UserError(f"unknown key {key}", cure=cure)


def _convert(value: Any, hint: Any, key: str) -> Any:  # noqa: ANN401 - values of a YAML file
    if isinstance(hint, type) and dataclasses.is_dataclass(hint):
        if not isinstance(value, dict):
            raise UserError(
                f"{key}={value!r} is not a block of keys", cure=f"set keys below it, as in {key}.NAME=..."
            )
        return _build(value, hint, f"{key}.")
    args = typing.get_args(hint)
    match typing.get_origin(hint):
        case typing.Union | types.UnionType:
            return _convert_union(value, args, key)
        case typing.Literal:
            if value in args:
                return value
            raise UserError(f"{key}={value!r} is not known", cure=f"use one of {', '.join(map(str, args))}")
        case builtins.tuple if isinstance(value, list) and len(value) == len(args):
            return tuple(
                _convert(v, a, f"{key}[{i}]") for i, (v, a) in enumerate(zip(value, args, strict=True))
            )
        case builtins.dict if isinstance(value, dict):
            return value
    return _convert_plain(value, hint, key)


def _convert_union(value: Any, options: tuple[Any, ...], key: str) -> Any:  # noqa: ANN401
    if value is None and type(None) in options:
        return None
    kinds = [option for option in options if option is not type(None)]
    if any(_is_exactly(value, kind) for kind in kinds):
        return value
    return _convert(value, kinds[0], key)


def _convert_plain(value: Any, hint: Any, key: str) -> Any:  # noqa: ANN401
    if _is_exactly(value, hint):
        return value
    if hint is float and isinstance(value, int | str) and not isinstance(value, bool):
        return _number(value, key)
    if hint is str and isinstance(value, int | float):
        return str(value)
    name = hint.__name__ if isinstance(hint, type) else str(hint)
    raise UserError(f"{key}={value!r} is not of type {name}", cure=f"give {key} a value of type {name}")


def _is_exactly(value: object, hint: object) -> bool:
    return (
        isinstance(hint, type)
        and isinstance(value, hint)
        and not (isinstance(value, bool) and hint is not bool)
    )


def _number(value: int | str, key: str) -> float:
    try:
        # YAML 1.1 reads 5e-6 as a string.
        return float(value)
    except ValueError as error:
        raise UserError(f"{key}={value!r} is not a number", cure=f"set {key} to a number") from error
