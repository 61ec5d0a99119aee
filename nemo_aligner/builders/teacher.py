# SPDX-License-Identifier: Apache-2.0
"""From the path of a teacher to batches that know what it holds likely."""

from dataclasses import replace
from functools import partial

from nemo_aligner.algorithms.supervised import SupervisedData
from nemo_aligner.algorithms.teacher import annotate_by_teacher
from nemo_aligner.builders.adapters import ADAPTERS_OF
from nemo_aligner.builders.models import Pretrained
from nemo_aligner.checkpoint.model_nemo import shared_model
from nemo_aligner.checkpoint.sharded import load_model
from nemo_aligner.checkpoint.tokenizer_files import load_archived_tokenizer
from nemo_aligner.config.base import ModelJob
from nemo_aligner.data.tokenizer import tokenizer_probe
from nemo_aligner.errors import UserError
from nemo_aligner.models.gpt.config import GPTConfig
from nemo_aligner.models.gpt.model import build_gpt
from nemo_aligner.models.gpt.policy import GPTPolicy
from nemo_aligner.parallel import world
from nemo_aligner.run.progress import heartbeat


@world.phase("loading the teacher")
def with_teacher(
    job: ModelJob, path: str, pretrained: Pretrained[GPTPolicy], data: SupervisedData, *, top_k: int
) -> SupervisedData:
    """The data, whose batches come with the teacher's ``top_k`` tokens of each place.

    Args:
        path: the teacher's; it takes the student's layout and precision, and is not trained.

    Raises:
        UserError: the teacher is not there, is a reward model, or has other tokens than the student.
    """
    student = pretrained.learner.model
    dtype = student.config.params_dtype
    with shared_model(path) as archive:
        gpt = GPTConfig.from_dict(archive.config)
        named = f"model.knowledge_distillation.teacher={path}"
        if archive.config.get("reward_model_type"):
            raise UserError(f"{named} is a reward model and writes no text", fix="give a language model")
        if archive.config.get(ADAPTERS_OF):
            raise UserError(f"{named} holds adapters alone", fix="give the .nemo of the run's end")
        theirs = load_archived_tokenizer(archive)
        if theirs is None:
            raise UserError(f"{named} has no tokenizer", fix="give a teacher with its tokenizer")
        if tokenizer_probe(theirs) != tokenizer_probe(pretrained.tokenizer):
            raise UserError(
                f"{named} cuts a text into other tokens than the student {job.pretrained[0]}={job.pretrained[1]}",
                fix="give a teacher and a student with one tokenizer",
            )
        if gpt.vocab_size > student.gpt_config.vocab_size:
            raise UserError(
                f"{named} has {gpt.vocab_size} tokens, and the student has {student.gpt_config.vocab_size}",
                fix="give a teacher with as many tokens, or fewer",
            )
        use_flash_attention = job.model.use_flash_attention
        model = build_gpt(gpt, job.model.layout, dtype, use_flash_attention=use_flash_attention)
        with heartbeat("loading the teacher's weights", enabled=world.is_logging_rank()):
            load_model(model, archive.weights)
    top_k = min(top_k, gpt.vocab_size)
    return replace(data, annotate=partial(annotate_by_teacher, GPTPolicy(model), top_k=top_k))
