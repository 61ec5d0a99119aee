# SPDX-License-Identifier: Apache-2.0
"""The common settings of all scripts, and their checks."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

from nemo_aligner.bounds import check_bounds, only
from nemo_aligner.checkpoint.sources import peek_model
from nemo_aligner.config.resume import Rule
from nemo_aligner.data.hub import is_dataset
from nemo_aligner.errors import UserError
from nemo_aligner.models.gpt.config import GPTConfig, precision_name
from nemo_aligner.models.gpt.learning_rate import OptimConfig
from nemo_aligner.models.gpt.peft_config import PeftConfig
from nemo_aligner.models.gpt.recompute import Granularity, Method, Recompute
from nemo_aligner.parallel.ranks import Layout
from nemo_aligner.paths import PathText
from nemo_aligner.run.experiment import ExperimentConfig
from nemo_aligner.run.schedule import LoopConfig, SupervisedConfig


@dataclass(frozen=True, kw_only=True)
class TrainerConfig:
    """The ``trainer`` block, without the algorithm's own."""

    num_nodes: int = 1  # machines of the job
    # ranks on each machine: its GPUs, or CPU processes; without torchrun or srun the script starts them
    devices: int = 1
    # dtype of weights and matmuls: bf16, 16, 32 or auto (bf16 on a GPU, 32 on a CPU); the optimizer keeps fp32 copies
    precision: str | int | None = "auto"
    # seconds until a collective that other ranks do not join ends the job
    collective_timeout: float = 600.0
    max_time: str | None = None  # as exp_manager.max_time_per_run: days:hours:minutes:seconds

    @property
    def chooses_precision(self) -> bool:
        """True if the device decides."""
        return self.precision in (None, "auto")


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """The keys of every ``model`` block; the architecture's own keys stand in ``architecture``."""

    optim: OptimConfig = field(default_factory=OptimConfig)  # the optimizer
    peft: PeftConfig = field(default_factory=PeftConfig)  # parameter-efficient tuning
    architecture: dict[str, Any] = field(default_factory=dict)
    seed: int = 1234  # of all draws: the order of data, dropout, a new head, responses
    tensor_model_parallel_size: int = 1  # ranks that share each layer
    pipeline_model_parallel_size: int = 1  # ranks that share the stack of layers
    # chunks of layers on each of these ranks; a batch passes a rank once for each chunk
    virtual_pipeline_model_parallel_size: int | None = None
    context_parallel_size: int = only(1, what="context parallelism")  # ranks that share each sequence; only 1
    # ranks that share the experts of a layer; only 1
    expert_model_parallel_size: int = only(1, what="expert parallelism")
    # with tensor parallelism: norms and dropout on a slice of the sequence each
    sequence_parallel: bool = False
    # logits above this many MiB are computed again in the backward (losses other than plain NLL)
    kept_logits_mib: int = 1024
    # with Transformer Engine: True is flash-attn or else cuDNN's kernel, False neither
    use_flash_attention: bool | None = None
    resume_from_checkpoint: PathText | None = None  # as exp_manager.resume_from_checkpoint
    # recompute in the backward: selective (attention) or full (whole layers); null: nothing
    activations_checkpoint_granularity: Granularity | None = None
    # of full: uniform (all layers, in groups) or block (the first ones of a stage)
    activations_checkpoint_method: Method | None = None
    activations_checkpoint_num_layers: int | None = None  # of full: layers of a group, or of the block
    # only null: stages recompute alike
    activations_checkpoint_layers_per_pipeline: int | None = only(
        None, what="recomputing fewer layers on later stages"
    )
    ffn_dropout: float = only(0.0, what="dropout inside the MLP")  # only 0.0

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

    @property
    def saved_keys(self) -> dict[str, Any]:
        """The keys of the saved model_config.yaml beyond the checkpoint's own and ``architecture``."""
        return {}


@dataclass(frozen=True, kw_only=True)
class PretrainedConfig:
    """The ``pretrained_checkpoint`` block."""

    # a language model (of PPO's actor also the initial policy) or a reward model: a .nemo, a checkpoint, a Hugging Face
    # folder, a GGUF file or OWNER/NAME of the hub
    restore_from_path: PathText


@dataclass(frozen=True, kw_only=True)
class ModelJob:
    """All settings of a script that has a model."""

    # what stands here overrides the checkpoint's model_config.yaml; null leaves its value in place
    model: ModelConfig
    trainer: TrainerConfig  # ranks, precision and the loop

    @property
    def pretrained(self) -> tuple[str, str]:
        """(the setting that names the checkpoint to start from, its value)."""
        raise NotImplementedError

    @property
    def files(self) -> Mapping[str, Sequence[str]]:
        """{setting: the data files that it names}."""
        raise NotImplementedError

    def check(self, world_size: int | None = None) -> None:
        """Raise UserError for mistakes that need neither file nor rank to be seen.

        Args:
            world_size: ranks that an outer starter made; None where we start them.
        """
        check_bounds(self)
        trainer, model = self.trainer, self.model
        if not trainer.chooses_precision:
            precision_name(trainer.precision or "")
        model.peft.check()
        model.layout.check_fits(num_nodes=trainer.num_nodes, devices=trainer.devices, world_size=world_size)

    def check_paths(self) -> None:
        """Raise UserError for a missing input or an existing output, before ranks start and weights are read."""
        key, value = self.pretrained
        config = peek_model(key, value)
        adapters = self.model.peft.restore_from_path
        given = {"model.peft.restore_from_path": (adapters,)} if adapters else {}
        for setting, paths in (*self.files.items(), *given.items()):
            for path in paths:
                if not (path and (Path(path).exists() or (setting in self.files and is_dataset(path)))):
                    raise UserError(
                        f"{setting}={path} does not exist", fix=f"set {setting} to a path that does"
                    )
        if config:
            GPTConfig.from_dict({**config, **self.model.architecture}).check_layout(self.model.layout)
        self.check_rows()

    def check_rows(self) -> None:
        """Raise UserError if the first rows of a data file cannot be read."""


@dataclass(frozen=True, kw_only=True)
class TrainingJob(ModelJob):
    """All settings of a script that trains."""

    # of settings that change on resume, before those of config/resume.py
    resume_rules: ClassVar[tuple[Rule, ...]] = ()

    exp_manager: ExperimentConfig = field(default_factory=ExperimentConfig)  # what is written, and where
    name: str  # the run's name

    @property
    def loop(self) -> LoopConfig | None:
        """The algorithm's block under ``trainer``; None where another job decides how long the run is."""
        return next((block for block in vars(self.trainer).values() if isinstance(block, LoopConfig)), None)

    @property
    def batches(self) -> dict[str, tuple[int, int]]:
        """{block of settings: (global_batch_size, micro_batch_size)}."""
        raise NotImplementedError

    @property
    def validates(self) -> bool:
        """True if there is validation data, whose metrics rank checkpoints."""
        return True

    def check(self, world_size: int | None = None) -> None:
        """See ModelJob."""
        ModelJob.check(self, world_size)
        trainer, model = self.trainer, self.model
        if self.loop is not None:
            self.loop.check(self.loop.block)
        if not self.validates:
            self._refuse_to_validate()
        if model.peft.lora and self.exp_manager.checkpoint_callback_params.always_save_nemo:
            raise UserError(
                f"exp_manager.checkpoint_callback_params.always_save_nemo=True, and with model.peft.peft_scheme="
                f"{model.peft.peft_scheme} checkpoints hold adapters alone",
                fix="set always_save_nemo=False: the .nemo that is written at the end has them merged",
            )
        model.optim.check()
        model.recompute.check()
        self.exp_manager.check()
        ranks = model.layout.data_parallel_size(trainer.num_nodes * trainer.devices)
        for block, (whole, micro) in self.batches.items():
            unit = micro * ranks
            if whole % unit:
                raise UserError(
                    f"{block}.global_batch_size={whole} is not a multiple of micro_batch_size={micro} x {ranks} data "
                    f"parallel ranks = {unit}",
                    fix=f"set {block}.global_batch_size={-(-whole // unit) * unit}",
                )

    def _refuse_to_validate(self) -> None:
        """Raise UserError for settings that need validation data, where there is none."""
        params, loop = self.exp_manager.checkpoint_callback_params, self.loop
        asked: list[tuple[str, int]] = [
            ("exp_manager.checkpoint_callback_params.save_best_model", params.save_best_model)
        ]
        if loop is not None:
            asked.append((f"{loop.block}.val_before_train", loop.val_before_train))
        if isinstance(loop, SupervisedConfig):
            asked.append((f"{loop.block}.val_responses", loop.val_responses))
        for key, value in asked:
            if value:
                raise UserError(
                    f"{key}={value} needs validation data, and there is none",
                    fix=f"name validation data, or set {key}={type(value)(0)}",
                )

    def check_paths(self) -> None:
        """See ModelJob."""
        ModelJob.check_paths(self)
        self.exp_manager.check_folder()
        given, folder = self.model.peft.restore_from_path, self.exp_manager.explicit_log_dir
        if given and folder:
            own = self.exp_manager.adapters_path(Path(folder)).resolve()
            if own in (Path(given).resolve(), *Path(given).resolve().parents):
                raise UserError(
                    f"model.peft.restore_from_path={given} is where this run writes its adapters at its end",
                    fix="set exp_manager.explicit_log_dir to another folder",
                )


@dataclass(frozen=True, kw_only=True)
class BatchedModelConfig(ModelConfig):
    """A ``model`` block with the sizes of batches in it."""

    micro_batch_size: int = 1  # samples of one forward and backward pass on one rank
    global_batch_size: int = 64  # samples of one optimizer step over all ranks


@dataclass(frozen=True, kw_only=True)
class PretrainedJob(TrainingJob):
    """All settings of a script that names its checkpoint in ``pretrained_checkpoint``, and its batches in ``model``."""

    model: BatchedModelConfig
    pretrained_checkpoint: PretrainedConfig  # where to start

    @property
    def pretrained(self) -> tuple[str, str]:
        """See TrainingJob."""
        return "pretrained_checkpoint.restore_from_path", self.pretrained_checkpoint.restore_from_path

    @property
    def batches(self) -> dict[str, tuple[int, int]]:
        """See TrainingJob."""
        return {"model": (self.model.global_batch_size, self.model.micro_batch_size)}
