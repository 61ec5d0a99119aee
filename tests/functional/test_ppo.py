# SPDX-License-Identifier: Apache-2.0
"""Both jobs of PPO as processes: at other layouts, with a reward model in a third job, and what they refuse."""

import json
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from pytriton.client import ModelClient
from transformers import LlamaForSequenceClassification

from nemo_aligner.checkpoint.convert import import_from_huggingface
from nemo_aligner.checkpoint.nemo_archive import open_nemo
from nemo_aligner.checkpoint.tokenizer_files import load_archived_tokenizer
from nemo_aligner.launch.job_group import free_ports
from tests.functional.conftest import toy_config, write_toy_tokenizer
from tests.functional.ppo_pair import LONG, Pair
from tests.functional.run_folder import metrics


@pytest.fixture
def pairs(start: Callable, nemo: Path, reward_nemo: Path, tmp_path: Path) -> Callable[..., Pair]:
    """Makes a pair of jobs below a folder of the name."""

    def make(name: str, *, critic: dict[str, object], actor: dict[str, object]) -> Pair:
        return Pair(
            folder=tmp_path / name,
            start=start,
            nemo=nemo,
            reward_nemo=reward_nemo,
            critic_settings=critic,
            actor_settings=actor,
        )

    return make


FEW = {
    "trainer.ppo.max_steps": 2,
    "trainer.ppo.save_interval": 0,
    "trainer.ppo.val_check_interval": 2,
    "model.ppo.entropy_bonus": 0.01,
    "model.optim.lr": 1e-4,
}
STILL = {"model.hidden_dropout": 0.0, "model.optim.lr": 1e-4}  # dropout draws differ between layouts

LAYOUTS = {
    "actor TP2, critic PP2": (
        {"trainer.devices": 2, "model.tensor_model_parallel_size": 2, "model.sequence_parallel": True},
        {"trainer.devices": 2, "model.pipeline_model_parallel_size": 2, "model.micro_batch_size": 2},
    ),
    "actor PP2 x DP2, critic DP2": (
        {"trainer.devices": 4, "model.pipeline_model_parallel_size": 2, "model.micro_batch_size": 2},
        {"trainer.devices": 2, "trainer.ppo.inference_micro_batch_size": 3},
    ),
}


@pytest.fixture(scope="session")
def made() -> dict[str, Path]:
    """The folder of a run that several tests look at, made when first asked for."""
    return {}


@pytest.fixture
def one_rank(pairs: Callable[..., Pair], made: dict[str, Path]) -> Path:
    """The folder of a run with one rank in each job."""
    if not made:
        alone = pairs("one", critic=STILL, actor=FEW)
        alone.run()
        made["folder"] = alone.folder
    return made["folder"]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_results_do_not_depend_on_the_layout(pairs: Callable[..., Pair], one_rank: Path, layout: str):
    actor, critic = LAYOUTS[layout]
    many = pairs("many", critic=STILL | critic, actor=FEW | actor)
    many.run()
    for job in ("actor", "critic"):
        ours, theirs = metrics(many.folder / job), metrics(one_rank / job)
        assert len(ours) == len(theirs)
        for left, right in zip(ours, theirs, strict=True):
            assert left.keys() == right.keys()
            for name in left:
                # Rounding in the generator moves a sum of tiny differences more than anything else.
                bound = 2e-5 if "logprob_difference" in name or "kl" in name else 1e-6
                assert left[name] == pytest.approx(right[name], rel=2e-4, abs=bound), (job, name)


def test_it_learns_says_what_it_does_and_leaves_a_model(pairs: Callable[..., Pair]):
    pair = pairs("run", critic={}, actor=FEW)
    pair.run()
    steps = [line for line in metrics(pair.actor_folder) if "train_optim/loss" in line]
    assert [line["step"] for line in steps] == [1, 2]
    assert steps[0]["train_rollouts/rollout_size"] == 16
    assert steps[0]["train_rollouts/logprob_difference_max"] < 1e-4
    assert steps[0]["train_rollouts/init_policy_kl"] == pytest.approx(0, abs=1e-6)
    assert steps[1]["train_rollouts/init_policy_kl"] > 1e-5
    assert steps[1]["train_optim/optim_step"] == 8
    assert {line["step"] for line in metrics(pair.critic_folder)} == {1, 2, 3, 4}
    page = (Path(__file__).parents[2] / "docs/RLHFTraining.md").read_text()
    for folder in (pair.actor_folder, pair.critic_folder):
        lines = (folder / "metrics.jsonl").read_text().splitlines()
        logged = {name for line in lines for name in json.loads(line)} - {"step", "time"}
        # What is logged of a validation stands there without its group.
        assert [name for name in logged if f"`{name.removeprefix('val_rollouts/')}`" not in page] == []
    rows = [json.loads(line) for line in (pair.actor_folder / "table_train_rollouts.jsonl").open()]
    assert len(rows) == 8
    assert all(row["prompt"].endswith("Assistant:") and "reward" in row for row in rows)
    for folder, name in (
        (pair.actor_folder, "megatron_gpt_ppo_actor"),
        (pair.critic_folder, "megatron_gpt_critic"),
    ):
        with open_nemo(folder / f"checkpoints/{name}.nemo") as archive:
            assert archive.config["precision"] == "32"


def test_a_reward_model_in_a_job_of_its_own(pairs: Callable[..., Pair], one_rank: Path):
    port = free_ports(1)[0]
    apart = {
        "remote_critic_rm.combine_rm_and_critic_server": False,
        "remote_critic_rm.reward_model.port": port,
    }
    pair = pairs(
        "apart",
        critic={"trainer.ppo.combine_rm_and_critic_server": False} | STILL,
        actor=FEW | apart | {"remote_critic_rm.reward_model.stop_at_end": True},
    )
    reward = pair.serve_reward_model(port)
    pair.run()
    assert reward.wait(timeout=60) == 0, reward.err
    assert metrics(pair.actor_folder) == metrics(one_rank / "actor")


def test_a_reward_server_of_several_ranks_reads_texts_as_it_is_reported_and_ends_at_sigterm(
    pairs: Callable[..., Pair],
):
    pair, port = pairs("reward", critic={}, actor={}), free_ports(1)[0]
    layout = {"trainer.devices": 2, "model.tensor_model_parallel_size": 2, "trainer.collective_timeout": 20}
    job = pair.serve_reward_model(port, **layout, **{"model.data.append_eod": True})
    job.wait_for("serving at 127.0.0.1")
    time.sleep(25)  # rank 1 waits for longer than a collective may take
    assert (
        "read with append_eod=True, add_bos=null, and the reward model was trained with append_eod=False"
        in job.err
    )
    texts = ["thing 1?", "no"]
    with open_nemo(pair.reward_nemo) as archive:
        tokenizer = load_archived_tokenizer(archive)
    rows = [[*tokenizer.encode(text), tokenizer.eos_id] for text in texts]
    padded = np.array([row + [0] * (9 - len(row)) for row in rows])
    with ModelClient(f"http://127.0.0.1:{port}", "reward_model", inference_timeout_s=60) as client:
        by_text = client.infer_batch(sentences=np.char.encode([[text] for text in texts], "utf-8"))
        lengths = np.array([[len(row)] for row in rows])
        by_token = client.infer_batch(tokens=padded, sequence_lengths=lengths)
    assert by_text["rewards"].tolist() == by_token["rewards"].tolist()
    job.process.terminate()
    assert job.wait(timeout=30) == 0, job.err


def test_a_step_of_jobs_that_save_nothing_by_a_critic_with_a_token_more(
    pairs: Callable[..., Pair], tmp_path: Path
):
    """A reward model that went to Hugging Face was given a token for padding there."""
    torch.manual_seed(1)
    wide = LlamaForSequenceClassification(toy_config(num_labels=1, vocab_size=260, pad_token_id=259))
    wide.save_pretrained(tmp_path / "hf")
    write_toy_tokenizer(tmp_path / "hf")
    import_from_huggingface(tmp_path / "hf", str(tmp_path / "wide.nemo"))
    nothing = {"exp_manager.create_checkpoint_callback": False}
    many_rows = {"trainer.ppo.inference_micro_batch_size": 20}
    made = pairs("wide", critic=nothing | many_rows, actor=FEW | nothing | {"trainer.ppo.max_steps": 1})
    pair = replace(made, reward_nemo=tmp_path / "wide.nemo")
    actor = pair.run()
    # What only costs time is a warning with both numbers.
    assert "trainer.ppo.inference_micro_batch_size=20 x 1 data parallel ranks = 20 rows at once" in actor.err
    assert "set model.ppo.num_rollout_samples=20 or more" in actor.err
    # How long the critic judged stands beside the first of its steps in each of the actor's.
    told = [json.loads(line) for line in (pair.critic_folder / "metrics.jsonl").open()]
    assert ["timers/infer_time" in line for line in told] == [True, False]
    assert 0 < told[0]["timers/infer_time"] < LONG
    # The results are written all the same.
    assert [path.name for path in (pair.critic_folder / "checkpoints").iterdir()] == [
        "megatron_gpt_critic.nemo"
    ]


@pytest.mark.parametrize(
    ("critic", "actors"),
    [
        (
            {"model.encoder_seq_length": 64, "trainer.ppo.combine_rm_and_critic_server": False},
            [
                ({}, ["takes 64 tokens, and the actor may send 256"]),
                (
                    {"model.encoder_seq_length": 64},
                    ["has no reward model", "remote_critic_rm.combine_rm_and_critic_server=True"],
                ),
            ],
        ),
        ({"exp_manager.create_checkpoint_callback": False}, [({}, ["saves nothing"])]),
        (
            {},
            [
                (
                    {"model.ppo.num_rollout_samples": 64},
                    ["has 48 prompts for training", "model.ppo.num_rollout_samples"],
                ),
                ({"remote_critic_rm.critic.name.infer": "asked"}, ["no endpoint asked"]),
            ],
        ),
    ],
    ids=["short and alone", "saves nothing", "usual"],
)
def test_actors_that_their_critic_does_not_fit_are_refused(
    pairs: Callable[..., Pair], critic: dict[str, object], actors: list[tuple[dict[str, object], list[str]]]
):
    pair = pairs("unfit", critic=critic, actor={})
    server = pair.start_critic()
    for settings, words in actors:
        job = pair.start_actor(**settings)
        assert job.wait(timeout=LONG) == 2, job.err
        told = "\n".join(job.err.splitlines()[-2:])
        assert "\nFix: " in told
        for word in words:
            assert word in told
    assert server.process.poll() is None, server.err
    server.process.terminate()
    server.wait(timeout=30)
