# SPDX-License-Identifier: Apache-2.0
"""generate.py as a person runs it: files in and out, and a conversation."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

from nemo_aligner.checkpoint.convert import export_to_huggingface, import_from_huggingface
from nemo_aligner.launch.job_group import free_ports

ROOT = Path(__file__).parents[2]
SCRIPT = ROOT / "examples/nlp/gpt/generate.py"
TEMPLATE = (
    "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}\n{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)
ROWS = [
    {"text": "thing 1:"},
    {"prompt": "another"},
    {"messages": [{"role": "user", "content": "a colour?"}]},
    {"prompt": [{"role": "user", "content": "and now?"}], "kept": "no"},
    {"text": "x" * 40},
]


@pytest.fixture(scope="module")
def chatty(hf_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """The toy model with a chat template and a second end token: the Hugging Face folder and the .nemo."""
    folder = tmp_path_factory.mktemp("chatty")
    model, tokenizer = (
        AutoModelForCausalLM.from_pretrained(hf_folder),
        AutoTokenizer.from_pretrained(hf_folder),
    )
    ids = torch.tensor([tokenizer.encode(ROWS[0]["text"], add_special_tokens=False)])
    whole = model.generate(ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=4)
    # A token that the first response has in its middle.
    model.generation_config.eos_token_id = [tokenizer.eos_token_id, int(whole[0, -1])]
    model.save_pretrained(folder / "hf")
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(folder / "hf")
    import_from_huggingface(folder / "hf", str(folder / "chatty.nemo"))
    return folder / "hf", folder / "chatty.nemo"


@pytest.fixture
def questions(tmp_path: Path) -> Path:
    path = tmp_path / "questions.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    return path


def settings(nemo: Path, questions: Path, output: Path) -> dict[str, object]:
    return {
        "model.restore_from_path": nemo,
        "trainer.precision": 32,
        "input_file": questions,
        "output_file": output,
        "sampling.max_length": 12,
    }


def lines(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_responses_of_a_file_are_transformers(
    chatty: tuple[Path, Path], questions: Path, tmp_path: Path, run: Callable
):
    folder, nemo = chatty
    out = tmp_path / "deep/responses.jsonl"
    asked = settings(nemo, questions, out) | {"sampling.use_greedy": True, "sampling.min_length": 0}
    job = run(asked, command=(SCRIPT,))
    assert job.process.returncode == 0, job.err[-3000:]
    assert "response 5/5" in job.err
    tokenizer, model = AutoTokenizer.from_pretrained(folder), AutoModelForCausalLM.from_pretrained(folder)
    found = lines(out)
    assert [row["prompt"] for row in found] == [next(iter(row.values())) for row in ROWS]
    for row in found:
        prompt = row["prompt"]
        text = (
            prompt
            if isinstance(prompt, str)
            else tokenizer.apply_chat_template(prompt, tokenize=False, add_generation_prompt=True)
        )
        ids = torch.tensor([tokenizer.encode(text, add_special_tokens=False)])
        whole = model.generate(ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=12)
        response = whole[0, ids.shape[1] :]
        ended = int(response[-1]) in model.generation_config.eos_token_id
        assert row["finished"] == ended
        assert row["num_tokens"] == response.numel()
        assert row["answer"] == tokenizer.decode(response[:-1] if ended else response)
        logp = model(whole).logits.log_softmax(-1)[0, ids.shape[1] - 1 : -1].gather(1, response[:, None])
        assert row["logprob"] == pytest.approx(logp.sum().item(), abs=1e-3)
    assert found[0]["finished"]
    assert found[0]["num_tokens"] <= 4


def test_samples_are_the_same_on_two_ranks(
    chatty: tuple[Path, Path], questions: Path, tmp_path: Path, run: Callable
):
    asked = settings(chatty[1], questions, tmp_path / "one.jsonl") | {"num_samples": 3, "batch_size": 4}
    two = asked | {"output_file": tmp_path / "two.jsonl", "trainer.devices": 2}
    for each in (asked, two):
        job = run(each, command=(SCRIPT,))
        assert job.process.returncode == 0, job.err[-3000:]
    one = lines(tmp_path / "one.jsonl")
    assert len(one) == 3 * len(ROWS)
    assert len({row["answer"] for row in one[:3]}) == 3
    for row, other in zip(one, lines(tmp_path / "two.jsonl"), strict=True):
        assert row["logprob"] == pytest.approx(other["logprob"], abs=1e-4)
        assert row | {"logprob": 0} == other | {"logprob": 0}
    again = run(asked, command=(SCRIPT,))
    assert again.process.returncode == 2
    assert "one.jsonl exists" in again.err


def test_the_best_of_several_responses(
    chatty: tuple[Path, Path], questions: Path, tmp_path: Path, run: Callable
):
    """Rewarded by a function, which sees the row; on two ranks, whose rows are interleaved."""
    (tmp_path / "by_length.py").write_text(
        "def score(prompt, response, tokens, row):\n"
        "    assert prompt == row['text'] if 'text' in row else True\n"
        "    return 1 / len(tokens)\n\n"
        "def fails(response, **_):\n    return 1 / 0\n"
    )
    asked = settings(chatty[1], questions, tmp_path / "all.jsonl") | {
        "num_samples": 4,
        "reward_function": "by_length.score",
        "sampling.min_length": 1,
    }
    best = asked | {"output_file": tmp_path / "best.jsonl", "top_n": 2, "trainer.devices": 2}
    for each in (asked, best):
        job = run(each, command=(SCRIPT,))
        assert job.process.returncode == 0, job.err[-3000:]
    every, found = lines(tmp_path / "all.jsonl"), lines(tmp_path / "best.jsonl")
    assert all(row["reward"] == pytest.approx(1 / row["num_tokens"]) for row in every)
    assert (len(every), len(found)) == (4 * len(ROWS), 2 * len(ROWS))
    for number in range(len(ROWS)):
        group = sorted(every[4 * number : 4 * number + 4], key=lambda row: -row["reward"])[:2]
        chosen = found[2 * number : 2 * number + 2]
        assert [row["answer"] for row in chosen] == [row["answer"] for row in group]

    failed = run(
        asked | {"reward_function": "by_length.fails", "output_file": tmp_path / "none.jsonl"},
        command=(SCRIPT,),
    )
    assert failed.process.returncode == 2
    assert "reward_function: ZeroDivisionError" in failed.err
    assert len(lines(tmp_path / "none.without_rewards.jsonl")) == 4 * len(ROWS)
    assert not (tmp_path / "none.jsonl").exists()


def test_a_served_reward_model_rewards(
    reward_nemo: Path,
    nemo: Path,
    questions: Path,
    start: Callable,
    run: Callable,
    short_tmp: Path,
    tmp_path: Path,
):
    questions.write_text("".join(json.dumps({"text": text}) + "\n" for text in ("one:", "two, longer:")))
    port = free_ports(1)[0]
    serving = {"rm_model_file": reward_nemo, "trainer.precision": 32, "inference.port": port}
    server = start(
        serving, command=[ROOT / "examples/nlp/gpt/serve_reward_model.py"], env={"TMPDIR": str(short_tmp)}
    )
    asked = settings(nemo, questions, tmp_path / "out.jsonl") | {
        "num_samples": 16,
        "sampling.max_length": 2,
        "reward_model": f"{{port: {port}, stop_at_end: true}}",
    }
    job = run(asked, command=(SCRIPT,))
    assert job.process.returncode == 0, job.err[-3000:] + server.err[-3000:]
    assert server.wait(timeout=60) == 0
    export_to_huggingface(reward_nemo, tmp_path / "reward")
    model = AutoModelForSequenceClassification.from_pretrained(tmp_path / "reward").eval()
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "reward")
    compared = 0
    for row in lines(tmp_path / "out.jsonl"):
        ids = tokenizer.encode(row["prompt"] + row["answer"], add_special_tokens=False)
        if row["finished"] or len(ids) != len(row["prompt"]) + row["num_tokens"]:
            continue  # the text is not all that was generated
        compared += 1
        with torch.no_grad():
            expected = model(torch.tensor([ids])).logits.item()
        assert row["reward"] == pytest.approx(expected, abs=1e-4)
    assert compared


@pytest.mark.parametrize(
    ("changed", "problem"),
    [
        ({"top_n": 1}, "there are none"),
        (
            {"top_n": 3, "num_samples": 2, "reward_function": "math.fsum"},
            "top_n=3 is more than num_samples=2",
        ),
        ({"reward_function": "math.fsum", "reward_model": "{}"}, "are both set"),
    ],
)
def test_rewards_that_make_no_sense_are_refused(
    nemo: Path, questions: Path, tmp_path: Path, run: Callable, changed: dict[str, object], problem: str
):
    job = run(settings(nemo, questions, tmp_path / "out.jsonl") | changed, command=(SCRIPT,))
    assert job.process.returncode == 2
    assert problem in job.err


@pytest.mark.parametrize("ranks", [1, 2])
def test_a_conversation(chatty: tuple[Path, Path], tmp_path: Path, ranks: int):
    done = subprocess.run(
        [
            *(sys.executable, SCRIPT, f"model.restore_from_path={chatty[1]}", "trainer.precision=32"),
            *(f"trainer.devices={ranks}", f"model.tensor_model_parallel_size={ranks}"),
            *("sampling.max_length=8", "sampling.use_greedy=True"),
        ],
        input="hello\n\nmore\n/new\nhello\n" + "y" * 300 + "\nhello\n/exit\nnever\n",
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    _, text = done.stdout.split("/exit or Ctrl-D ends.\n")
    first, *rest = text.split("Fix: ")
    assert "has 3" in first, "the long line leaves no room"
    assert len(rest) == 1
    hello, more, again, *_ = first.split("\n")
    assert hello == again != more, "a new conversation begins as the first did"
    assert rest[0].split("\n")[2] == hello


def test_what_cannot_be_answered_is_reported(chatty: tuple[Path, Path], tmp_path: Path, run: Callable):
    bad = tmp_path / "bad.jsonl"
    asked = settings(chatty[1], bad, tmp_path / "out.jsonl")
    for text, message in (
        ('{"title": "?"}\n', "bad.jsonl, line 1: the row asks for nothing: it has ['title']"),
        ('{"text": "a"}\n{"messages": []}\n', "bad.jsonl, line 2: key 'messages' holds no list of messages"),
    ):
        bad.write_text(text)
        job = run(asked, command=(SCRIPT,))
        assert job.process.returncode == 2
        assert message in job.err
    job = run(asked | {"sampling.temperature": 0}, command=(SCRIPT,))
    assert "sampling.temperature=0.0 is not above 0" in job.err
    job = run({k: v for k, v in asked.items() if k != "output_file"}, command=(SCRIPT,))
    assert "input_file is set and output_file is not" in job.err
