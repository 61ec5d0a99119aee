# SPDX-License-Identifier: Apache-2.0
"""What is asked fits, what the server notes is per request; figures tell the overhead from the computing."""

from dataclasses import replace

from benchmarks.serving import MODELS, SMOLLM2, TINY, Asked, Measured, Watched, batch, figures_of
from benchmarks.sft import random_model
from nemo_aligner.models.gpt.critic import GPTCritic
from nemo_aligner.models.gpt.heads import HeadConfig
from nemo_aligner.parallel import world
from nemo_aligner.serving.protocol import Limits


def test_one_client_waits_for_the_computing_and_the_overhead():
    slow = Measured(
        round_trips=[10.0] * 9 + [90.0], computing=[4.0] * 9 + [80.0], alone=[5.0], per_second=None
    )
    fast = replace(slow, round_trips=[8.0] * 10, computing=[4.0] * 10, per_second=120.0)
    found = {
        figure.metric: figure.values
        for figure in figures_of({("m", "default allocator"): [{"1 x 16": slow}, {"1 x 16": fast}]})
    }
    assert found == {
        "ms per request": (10, 8),
        "ms within which 90% are answered": (10, 8),
        "ms computing": (4, 4),
        "ms computing alone": (5, 5),
        "overhead in ms": (6, 4),
        "overhead as a share of the round trip": (0.6, 0.5),
        "requests/s with 8 clients": (120,),
    }


def test_smollm2s_shape_has_its_weights():
    gpt = MODELS[SMOLLM2].model
    keys = gpt.query_groups * gpt.head_dim
    layer = 2 * gpt.hidden_size * (gpt.hidden_size + keys) + 3 * gpt.hidden_size * gpt.ffn_hidden_size
    # The checkpoint's, whose head is its embedding.
    norms = (2 * gpt.num_layers + 1) * gpt.hidden_size
    assert gpt.vocab_size * gpt.hidden_size + gpt.num_layers * layer + norms == 134_515_008


def test_the_server_notes_how_long_each_request_took():
    served = MODELS[TINY]
    head = HeadConfig()
    with world.ensure_single_process():
        server = Watched(
            model=GPTCritic(random_model(served.model, head=head), head=head),
            name="random",
            limits=Limits(vocab_size=served.model.vocab_size, seq_length=served.model.encoder_seq_length),
            rows=4,
            multiple=1,
            settings={},
        )
        for asked in (Asked(rows=1, tokens=16, times=1), Asked(rows=3, tokens=5, times=1)):
            scores = server.infer(batch(served.model, asked))
            assert scores.rewards is not None
            assert scores.rewards.shape == (asked.rows,)
    assert list(server.computing) == ["1 x 16", "3 x 5"]
    assert all(0 < ms < 60_000 for (ms,) in server.computing.values())


def test_requests_fit_the_models():
    for served in MODELS.values():
        assert all(asked.tokens <= served.model.encoder_seq_length for asked in served.asked)
