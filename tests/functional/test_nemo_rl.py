# SPDX-License-Identifier: Apache-2.0
"""The commands of NeMo RL with its settings, at toy size: they run, and what they can't do is said."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from omegaconf import OmegaConf
from transformers import AutoModelForCausalLM, AutoTokenizer

from nemo_aligner.config.ppo import CriticFreeJob
from nemo_aligner.config.resume import flat
from nemo_aligner.config.sft import SFTJob
from nemo_aligner.errors import UserError
from nemo_aligner.launch.command import find_commands, load_script
from nemo_aligner.launch.nemo_rl import COMMANDS, FIXED, ours
from nemo_aligner.launch.script import compose
from nemo_aligner.settings import parse, refuse_unknown
from tests.functional.conftest import ROOT
from tests.functional.run_folder import metrics

CONFIGS = ROOT / "examples/configs"
CHAT = (
    "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)
SMALL = [
    "policy.precision=float32",
    "policy.max_total_sequence_length=256",
    "logger.tensorboard_enabled=False",
]


@pytest.fixture(scope="module")
def model(hf_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The toy model with a chat template."""
    folder = tmp_path_factory.mktemp("model")
    AutoModelForCausalLM.from_pretrained(hf_folder).save_pretrained(folder)
    tokenizer = AutoTokenizer.from_pretrained(hf_folder)
    tokenizer.chat_template = CHAT
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture
def squad(tmp_path: Path) -> Path:
    rows = [
        {"id": str(i), "title": "t", "context": f"Ann has {i} cats.", "question": "How many?",
         "answers": {"text": [str(i), "some"], "answer_start": [8, 0]}}
        for i in range(16)
    ]  # fmt: skip
    path = tmp_path / "squad.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture
def problems(tmp_path: Path) -> Path:
    """As OpenMathInstruct-2 has them."""
    rows = [
        {"problem": f"What is {i} + 1?", "generated_solution": f"It is \\boxed{{{i + 1}}}.",
         "expected_answer": str(i + 1), "problem_source": "augmented_math"}
        for i in range(24)
    ]  # fmt: skip
    path = tmp_path / "problems.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def start(script: str, *words: object, cwd: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, ROOT / "examples" / script, *map(str, words)],
        cwd=cwd,
        env=os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=200,
        check=False,
    )


@pytest.mark.parametrize("ranks", [1, 2])
def test_sft_learns_squad(model: Path, squad: Path, tmp_path: Path, ranks: int):
    done = start(
        "run_sft.py",
        *(f"policy.model_name={model}", f"data.dataset_name={squad}", f"data.validation={squad}"),
        *(
            "policy.train_global_batch_size=4",
            "sft.val_global_batch_size=2",
            f"cluster.gpus_per_node={ranks}",
        ),
        *("sft.max_num_steps=3", "sft.val_period=2", "checkpointing.checkpoint_dir=results/sft", *SMALL),
        cwd=tmp_path,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    lines = metrics(tmp_path / "results/sft")
    assert [line["step"] for line in lines if "train/loss" in line] == [1, 2, 3]
    assert {line["step"] for line in lines if "validation/loss" in line} == {0, 2, 3}
    assert done.stderr.count("the same as: nemo-aligner sft ") == 1
    assert "SQuAD's rows" in done.stderr


def test_grpo_asks_problems_in_the_chat_template(model: Path, problems: Path, tmp_path: Path):
    done = start(
        "run_grpo_math.py",
        "--config",
        *(CONFIGS / "grpo_math_8B.yaml", f"policy.model_name={model}", f"data.dataset_name={problems}"),
        *("grpo.num_prompts_per_step=4", "grpo.num_generations_per_prompt=2", "grpo.max_num_steps=2"),
        *("policy.train_global_batch_size=8", "policy.generation.max_new_tokens=8", "grpo.max_val_samples=1"),
        *("cluster.gpus_per_node=1", "policy.tensor_model_parallel_size=1", "env.math.num_workers=1"),
        *("checkpointing.checkpoint_dir=results/grpo", "logger.num_val_samples_to_print=1", *SMALL),
        f"data.prompt_file={ROOT / 'examples/prompts/cot.txt'}",
        cwd=tmp_path,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    steps = [line for line in metrics(tmp_path / "results/grpo") if "train_optim/loss" in line]
    assert [line["train_rollouts/rollout_size"] for line in steps] == [8, 8]
    assert all("train_rollouts/rewards/math" in line for line in steps)
    (row, _) = map(json.loads, (tmp_path / "results/grpo/table_train_rollouts.jsonl").open())
    assert re.match(
        r"<user>Solve this math problem .*\n\nWhat is \d+ \+ 1\?<assistant>$", row["prompt"], re.DOTALL
    )


# The command lines of the seed, with what they name.
PRINTED = [
    ("sft", ""),
    (
        "sft",
        "policy.model_name=meta-llama/Meta-Llama-3-8B policy.train_global_batch_size=128 "
        "sft.val_global_batch_size=128 cluster.gpus_per_node=8",
    ),
    (
        "sft",
        "--config examples/configs/sft.yaml cluster.num_nodes=2 cluster.gpus_per_node=8 "
        "checkpointing.checkpoint_dir=results/sft_llama8b_2nodes logger.wandb_enabled=True "
        "logger.wandb.name=sft-llama8b",
    ),
    ("grpo", ""),
    ("grpo", "cluster.gpus_per_node=8"),
    (
        "grpo",
        "policy.model_name=Qwen/Qwen2-1.5B checkpointing.checkpoint_dir=results/qwen1_5b_math "
        "logger.wandb_enabled=True logger.wandb.name=grpo-qwen1_5b_math logger.num_val_samples_to_print=10",
    ),
    (
        "grpo",
        "--config examples/configs/grpo_math_8B.yaml cluster.num_nodes=2 "
        "checkpointing.checkpoint_dir=results/llama8b_2nodes logger.wandb_enabled=True "
        "logger.wandb.name=grpo-llama8b_math",
    ),
]


@pytest.mark.parametrize(("name", "words"), PRINTED)
def test_what_the_seed_prints_is_a_job(name: str, words: str, monkeypatch: pytest.MonkeyPatch):
    """All of its settings are ours, and make a job that is checked."""

    monkeypatch.chdir(ROOT)
    script = load_script(find_commands()[name])
    found = ours(COMMANDS[name], words.split(), CONFIGS)
    job = parse(OmegaConf.create(compose(script, found)), script.kind)
    job.check()


@pytest.mark.parametrize(("name", "kind"), [("sft", SFTJob), ("grpo", CriticFreeJob)])
def test_every_key_is_one_of_ours(name: str, kind: type):
    keys = [*COMMANDS[name].keys.values(), *FIXED[name]]
    refuse_unknown(OmegaConf.to_container(OmegaConf.from_dotlist([f"{key}=1" for key in keys])), kind)


@pytest.mark.parametrize("path", sorted(CONFIGS.glob("*.yaml")), ids=lambda path: path.name)
def test_every_setting_of_a_file_is_known(path: Path):
    command = COMMANDS["sft" if path.name.startswith("sft") else "grpo"]
    assert set(flat(yaml.safe_load(path.read_text()))) <= {*command.keys, *command.rules}


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (
            "policy.modle_name=x",
            "there is no setting policy.modle_name\nFix: did you mean policy.model_name?",
        ),
        ("policy.precision=int8", "policy.precision=int8 is none of bfloat16, float32, float16"),
        ("policy.optimizer.name=torch.optim.SGD", "the optimizer is AdamW"),
        ("--config nowhere.yaml", "--config nowhere.yaml: there is no such file"),
        ("cluster", "cluster is no setting"),
        ("--verbose", "--verbose is no setting"),
    ],
)
def test_what_is_not_there_is_named(words: str, message: str, tmp_path: Path):
    done = start("run_sft.py", *words.split(), cwd=tmp_path)
    assert done.returncode == 2
    assert message in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("grpo.num_prompts_per_step=null", "grpo.num_prompts_per_step=None cannot be used"),
        ("grpo.num_prompts_per_step=abc", "are whole numbers"),
        ("policy.precision=[a]", "policy.precision=['a'] cannot be used"),
        ("data.dataset_name=[a.jsonl,b.jsonl]", "data.dataset_name=['a.jsonl', 'b.jsonl'] cannot be used"),
        ("data.prompt_file=5", "data.prompt_file=5 cannot be used"),
        ("logger.log_directory=x", "there is no setting logger.log_directory"),
        ("policy.generation.backend=vllm", "the model that learns writes its responses"),
    ],
)
def test_a_value_of_another_type_is_named(words: str, message: str):
    with pytest.raises(UserError) as found:
        ours(COMMANDS["grpo"], [words], CONFIGS)
    assert message in found.value.problem


def test_a_prompt_file_has_one_place_and_doubled_braces(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "cot.txt"
    path.write_text("Write \\boxed{{}} for {}.\n")
    words = ours(COMMANDS["grpo"], [f"data.prompt_file={path}"], CONFIGS)
    assert any("boxed{} for {prompt}." in word for word in words)
    path.write_text("Write \\boxed{} for {}.\n")
    with pytest.raises(UserError, match=r"has not one \{\} for a problem"):
        ours(COMMANDS["grpo"], [f"data.prompt_file={path}"], CONFIGS)
    assert ours(COMMANDS["grpo"], [], CONFIGS), "the default is found from anywhere"
