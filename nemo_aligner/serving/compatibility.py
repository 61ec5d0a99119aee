# SPDX-License-Identifier: Apache-2.0
"""A check that an actor and its servers are compatible, by what each reports at the start."""

from dataclasses import dataclass

from nemo_aligner.errors import UserError
from nemo_aligner.serving.protocol import Health


@dataclass(frozen=True, kw_only=True)
class Actor:
    """The settings of an actor that servers must fit."""

    vocab_size: int
    longest: int  # tokens of the longest prompt and response together
    tokenizer: str  # a digest; "" where there is none
    request_rows: int  # of a request to infer
    request_rows_setting: str
    saves: bool
    needs_rewards: bool  # from the critic's job
    # what makes a prompt and its response shorter
    length_settings: str = "model.ppo.length_params.max_length and model.data.seq_length"


def compare(name: str, server: Health, actor: Actor) -> list[str]:
    """Warnings about what only costs time; ``name`` is the server's, for messages.

    Raises:
        UserError: results would be wrong, or requests refused.
    """
    settings = server.settings
    tokenizer = settings.get("tokenizer")
    # With one tokenizer a server may know more, such as a token for padding.
    knows = server.vocab_size > actor.vocab_size and tokenizer and actor.tokenizer
    if not knows and server.vocab_size != actor.vocab_size:
        raise UserError(
            f"{name} serves a model of {server.vocab_size} tokens, and the actor's vocabulary has {actor.vocab_size}",
            fix="serve a model with the actor's tokenizer, and as many tokens or more",
        )
    if tokenizer and actor.tokenizer and tokenizer != actor.tokenizer:
        raise UserError(
            f"{name} serves a model with another tokenizer than the actor's: both cut one text differently",
            fix="start actor and critic from models with the same tokenizer",
        )
    if server.seq_length < actor.longest:
        raise UserError(
            f"{name} takes {server.seq_length} tokens, and the actor may send {actor.longest}",
            fix=f"set model.encoder_seq_length={server.seq_length} in the actor's job, or a smaller "
            f"{actor.length_settings}",
        )
    attributes = settings.get("num_rewards")
    if isinstance(attributes, int) and attributes > 1:
        raise UserError(
            f"{name} gives {attributes} attributes, and PPO learns from one reward",
            fix="set model.regression.merge_attributes=True there, and model.regression.attribute_weights",
        )
    for setting, most in settings.items():
        if setting.endswith(".max_request_rows") and isinstance(most, int) and actor.request_rows > most:
            raise UserError(
                f"{name} takes {setting}={most} rows in a request, and the actor sends "
                f"{actor.request_rows_setting}={actor.request_rows}",
                fix=f"set {setting}={actor.request_rows} there, or {actor.request_rows_setting} lower",
            )
    combined = settings.get("combine_rm_and_critic_server")
    if combined is False and actor.needs_rewards:
        raise UserError(
            f"{name} has no reward model (trainer.ppo.combine_rm_and_critic_server=False there), and "
            "remote_critic_rm.combine_rm_and_critic_server=True here",
            fix="set both alike; where they are False, start serve_reward_model.py too",
        )
    if settings.get("saves") is False and actor.saves:
        raise UserError(
            f"{name} saves nothing (exp_manager.create_checkpoint_callback=False there), and the actor does",
            fix="set exp_manager.create_checkpoint_callback alike in both jobs",
        )
    return _slow(name, server, actor)


def _slow(name: str, server: Health, actor: Actor) -> list[str]:
    if server.settings.get("combine_rm_and_critic_server") and not actor.needs_rewards:
        return [
            f"{name} computes rewards that nobody reads: trainer.ppo.combine_rm_and_critic_server=True there, and "
            "remote_critic_rm.combine_rm_and_critic_server=False here; set both alike"
        ]
    for setting, rows in server.settings.items():
        ranks = server.settings.get("data_parallel_size")
        if not (setting.endswith(".inference_micro_batch_size") and isinstance(rows, int)):
            continue
        if isinstance(ranks, int) and rows * ranks > actor.request_rows:
            return [
                f"{name} computes {setting}={rows} x {ranks} data parallel ranks = {rows * ranks} rows at once, and "
                f"gets {actor.request_rows_setting}={actor.request_rows} of them in a request: ranks of it idle; "
                f"set {actor.request_rows_setting}={rows * ranks} or more"
            ]
    return []
