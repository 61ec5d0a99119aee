# SPDX-License-Identifier: Apache-2.0
"""What an actor accepts of a server, what it warns of, and what it refuses."""

from dataclasses import replace

import pytest

from nemo_aligner.errors import UserError
from nemo_aligner.serving.compatibility import Actor, compare
from nemo_aligner.serving.protocol import Health

SERVER = Health(
    model="critic",
    step=0,
    vocab_size=100,
    seq_length=64,
    settings={
        "trainer.ppo.max_request_rows": 64,
        "trainer.ppo.inference_micro_batch_size": 4,
        "data_parallel_size": 2,
        "combine_rm_and_critic_server": True,
        "tokenizer": "abc",
        "saves": True,
    },
)
ACTOR = Actor(
    vocab_size=100,
    longest=64,
    tokenizer="abc",
    request_rows=8,
    request_rows_setting="model.ppo.num_rollout_samples",
    saves=True,
    needs_rewards=True,
)


def test_jobs_that_fit_have_nothing_to_say():
    assert compare("critic", SERVER, ACTOR) == []


def test_idle_ranks_are_reported_with_both_numbers():
    (told,) = compare("critic", SERVER, replace(ACTOR, request_rows=6))
    assert "inference_micro_batch_size=4 x 2" in told
    assert "model.ppo.num_rollout_samples=6" in told


def test_a_server_may_know_more_tokens_of_the_same_tokenizer():
    assert compare("critic", SERVER, replace(ACTOR, vocab_size=99)) == []


def test_a_server_that_tells_no_settings_is_taken_as_it_is():
    assert compare("critic", replace(SERVER, settings={}), ACTOR) == []


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        ({"vocab_size": 101}, "model of 100 tokens, and the actor's vocabulary has 101"),
        ({"vocab_size": 99, "tokenizer": ""}, "model of 100 tokens, and the actor's vocabulary has 99"),
        ({"longest": 65}, "takes 64 tokens, and the actor may send 65"),
        ({"tokenizer": "xyz"}, "another tokenizer"),
        ({"request_rows": 65}, "max_request_rows=64 rows in a request, and the actor sends .*=65"),
    ],
)
def test_what_would_change_results_is_refused(changed: dict[str, object], words: str):
    with pytest.raises(UserError, match=words):
        compare("critic", SERVER, replace(ACTOR, **changed))


@pytest.mark.parametrize(
    ("setting", "words"), [("combine_rm_and_critic_server", "no reward model"), ("saves", "saves nothing")]
)
def test_halves_of_a_setting_that_differ_are_refused(setting: str, words: str):
    server = replace(SERVER, settings={**SERVER.settings, setting: False})
    with pytest.raises(UserError, match=words):
        compare("critic", server, ACTOR)
