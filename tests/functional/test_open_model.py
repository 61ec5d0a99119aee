# SPDX-License-Identifier: Apache-2.0
"""Each script starts from a Hugging Face folder, a GGUF file or a hub id as from a .nemo made of it first."""

import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import hydra
import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    LlamaForSequenceClassification,
)

from nemo_aligner.batch import TokenBatch
from nemo_aligner.builders import servers
from nemo_aligner.checkpoint.convert import export_to_huggingface, import_from_huggingface
from nemo_aligner.checkpoint.nemo_archive import open_nemo
from nemo_aligner.checkpoint.weights import WeightReader
from nemo_aligner.config.serve import CriticJob, RewardServerJob
from nemo_aligner.errors import UserError
from nemo_aligner.parallel import world
from nemo_aligner.settings import parse
from tests.functional.conftest import SCRIPT, toy_config, write_toy_tokenizer
from tests.functional.ppo_pair import Pair
from tests.functional.run_folder import metrics
from tests.hub import serving
from tests.unit.checkpoint.conftest import build_tokenizer
from tests.unit.checkpoint.test_gguf import write_gguf

GPT = SCRIPT.parent
TEMPLATE = "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}</s>{% endfor %}"


@pytest.fixture(scope="module")
def chatty(hf_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The toy with a chat template and a second end token."""
    folder = tmp_path_factory.mktemp("chatty") / "hf"
    model, tokenizer = (
        AutoModelForCausalLM.from_pretrained(hf_folder),
        AutoTokenizer.from_pretrained(hf_folder),
    )
    model.generation_config.eos_token_id = [2, 77]
    model.save_pretrained(folder)
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(folder)
    return folder


def content(nemo: Path) -> dict[str, Any]:
    """All that a .nemo holds."""
    with open_nemo(nemo) as archive:
        reader = WeightReader(archive.weights)
        files = {
            path.relative_to(archive.folder).as_posix(): path.read_bytes()
            for path in archive.folder.glob("tokenizer/**/*")
            if path.is_file()
        }
        return {
            "config": archive.config,
            "files": files,
            "weights": {name: reader.read(name) for name in list(reader.shapes)},
        }


def assert_same(found: Path, expected: Path) -> None:
    one, two = content(found), content(expected)
    assert one["config"] == two["config"]
    assert one["files"] == two["files"]
    assert one["files"]
    assert one["weights"].keys() == two["weights"].keys()
    for name, weight in one["weights"].items():
        assert torch.equal(weight, two["weights"][name]), name


def test_sft_goes_on_as_from_a_nemo_and_resumes(
    run: Callable, settings: dict[str, object], chatty: Path, tmp_path: Path
):
    import_from_huggingface(chatty, str(tmp_path / "chatty.nemo"))
    two_ranks = settings | {"trainer.devices": 2, "model.tensor_model_parallel_size": 2}
    for source, steps in ((chatty, (1, 2)), (tmp_path / "chatty.nemo", (2,))):
        for last in steps:
            job = run(
                two_ranks
                | {
                    "model.restore_from_path": source,
                    "trainer.sft.max_steps": last,
                    "trainer.sft.save_interval": 1,
                    "exp_manager.explicit_log_dir": tmp_path / f"run-{source.suffix}",
                }
            )
            assert job.process.returncode == 0, job.err[-3000:]
    assert "resuming from" in (tmp_path / "run-/log.txt").read_text()
    found = tmp_path / "run-/checkpoints/megatron_gpt_sft.nemo"
    assert_same(found, tmp_path / "run-.nemo/checkpoints/megatron_gpt_sft.nemo")
    export_to_huggingface(found, tmp_path / "out")
    exported = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert exported.generation_config.eos_token_id == [2, 77]
    assert AutoTokenizer.from_pretrained(tmp_path / "out").chat_template == TEMPLATE

    changed = tmp_path / "changed"
    exported.save_pretrained(changed)
    write_toy_tokenizer(changed)
    refused = run(
        two_ranks
        | {
            "model.restore_from_path": changed,
            "trainer.sft.max_steps": 3,
            "exp_manager.explicit_log_dir": tmp_path / "run-",
        }
    )
    assert refused.process.returncode == 2
    assert "holds another model than the one that the run began with" in refused.err


def test_generation_from_a_gguf_file_and_from_the_hub(start: Callable, chatty: Path, tmp_path: Path):
    shutil.copytree(chatty, tmp_path / "merged")
    build_tokenizer().save_pretrained(tmp_path / "merged")  # llama.cpp wants merges, and the toy's has none
    write_gguf(tmp_path / "merged", tmp_path / "toy.gguf")
    import_from_huggingface(tmp_path / "toy.gguf", str(tmp_path / "gguf.nemo"))
    import_from_huggingface(chatty, str(tmp_path / "hub.nemo"))
    (tmp_path / "prompts.jsonl").write_text('{"text": "thing 1:"}\n{"text": "another"}\n')

    def responses(source: object, env: dict[str, str] | None = None) -> str:
        out = tmp_path / f"answers-{str(source).replace('/', '_')}.jsonl"
        asked = {
            "model.restore_from_path": source,
            "trainer.precision": 32,
            "input_file": tmp_path / "prompts.jsonl",
            "output_file": out,
            "sampling.max_length": 12,
        }
        job = start(asked, command=(GPT / "generate.py",), env=env)
        assert job.wait() == 0, job.err[-3000:]
        return out.read_text()

    assert responses(tmp_path / "toy.gguf") == responses(tmp_path / "gguf.nemo")
    with serving("org/toy", chatty) as env:
        assert responses("org/toy", env | {"HF_HOME": str(tmp_path / "home")}) == responses(
            tmp_path / "hub.nemo"
        )


def test_a_reward_model_is_made_of_a_folder_at_two_stages(run: Callable, chatty: Path, tmp_path: Path):
    import_from_huggingface(chatty, str(tmp_path / "chatty.nemo"))
    rows = [{"text": f"thing {i}: {end}"} for i in range(16) for end in ("red", "blue")]
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    for source in (chatty, tmp_path / "chatty.nemo"):
        job = run(
            {
                "pretrained_checkpoint.restore_from_path": source,
                "model.data.data_prefix": f"{{train: [{tmp_path}/pairs.jsonl], validation: [{tmp_path}/pairs.jsonl]}}",
                "model.micro_batch_size": 2,
                "model.global_batch_size": 4,
                "model.pipeline_model_parallel_size": 2,
                "model.optim.sched.constant_steps": 0,
                "trainer.precision": 32,
                "trainer.devices": 2,
                "trainer.rm.max_steps": 2,
                "exp_manager.explicit_log_dir": tmp_path / f"run-{source.suffix}",
                "exp_manager.create_tensorboard_logger": False,
            },
            command=(GPT / "train_reward_model.py",),
        )
        assert job.process.returncode == 0, job.err[-3000:]
    assert_same(
        tmp_path / "run-/checkpoints/megatron_gpt.nemo", tmp_path / "run-.nemo/checkpoints/megatron_gpt.nemo"
    )


def test_both_jobs_of_ppo_go_as_from_nemos(
    start: Callable, hf_folder: Path, nemo: Path, reward_nemo: Path, tmp_path: Path
):
    few = {
        "trainer.ppo.max_steps": 2,
        "trainer.ppo.save_interval": 0,
        "trainer.ppo.val_check_interval": 2,
        "trainer.devices": 2,
        "model.tensor_model_parallel_size": 2,
    }
    stages = {"trainer.devices": 2, "model.pipeline_model_parallel_size": 2, "model.hidden_dropout": 0.0}
    found = []
    for name, policy, reward in (
        ("nemos", nemo, reward_nemo),
        ("folders", hf_folder, reward_nemo.parent / "hf"),
    ):
        pair = Pair(
            folder=tmp_path / name,
            start=start,
            nemo=policy,
            reward_nemo=reward,
            critic_settings=stages,
            actor_settings=few,
        )
        pair.run()
        found.append([metrics(folder) for folder in (pair.actor_folder, pair.critic_folder)])
    assert found[0] == found[1]


@pytest.fixture
def one_rank() -> Iterator[None]:
    with world.ensure_single_process():
        yield


@pytest.mark.usefixtures("one_rank")
def test_servers_score_as_transformers(tmp_path: Path):
    torch.manual_seed(1)
    config = toy_config(num_labels=1, pad_token_id=0, initializer_range=0.1)
    LlamaForSequenceClassification(config).save_pretrained(tmp_path / "reward")
    write_toy_tokenizer(tmp_path / "reward")
    rows = [[5, 6, 7, 8], [9, 10, 11, 12]]
    with hydra.initialize_config_dir(str(GPT / "conf"), version_base="1.3"):
        served = parse(
            hydra.compose("inference_rm", [f"rm_model_file={tmp_path}/reward", "trainer.precision=32"]),
            RewardServerJob,
        )
        critic = parse(
            hydra.compose(
                "gpt_ppo_critic",
                [f"pretrained_checkpoint.restore_from_path={tmp_path}/reward", "trainer.precision=32"],
            ),
            CriticJob,
        )
    batch = TokenBatch.from_rows([(row, [True] * 4) for row in rows], pad_id=0, seq_length=4)
    with torch.no_grad():
        model = AutoModelForSequenceClassification.from_pretrained(tmp_path / "reward").eval()
        expected = model(torch.tensor(rows)).logits[:, 0]
    reward_model = servers.load_served_reward_model(served)
    torch.testing.assert_close(reward_model.learner.infer(batch), expected, rtol=0, atol=1e-5)
    assert reward_model.config["data"] == {"append_eod": False, "add_bos": None}
    loaded = servers.load_critic(critic)
    before = {name: value.clone() for name, value in loaded.learner.model.named_parameters()}
    with torch.no_grad():
        for value in loaded.learner.model.parameters():
            value.zero_()
    loaded.start_again()
    for name, value in loaded.learner.model.named_parameters():
        assert torch.equal(value, before[name]) or "rm_head" in name, name


def test_what_is_no_nemo_is_not_exported(hf_folder: Path, tmp_path: Path):
    with pytest.raises(UserError, match=r"is a Hugging Face folder, and a \.nemo is exported") as caught:
        export_to_huggingface(hf_folder, tmp_path / "out")
    assert f"nemo-aligner import model={hf_folder}" in caught.value.fix
    assert not (tmp_path / "out").exists()
