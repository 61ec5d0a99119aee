# SPDX-License-Identifier: Apache-2.0
"""SteerLM: a served attribute model labels conversations; the labels stand before the responses that are learned."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from transformers import AutoTokenizer, LlamaForSequenceClassification

from nemo_aligner.checkpoint.convert import import_from_huggingface
from nemo_aligner.data.attributes import HELPSTEER
from nemo_aligner.launch.job_group import free_ports
from tests.functional.conftest import ROOT, toy_config, write_toy_tokenizer

ANNOTATE = ROOT / "examples/nlp/data/steerlm/attribute_annotate.py"
SERVE = ROOT / "examples/nlp/gpt/serve_reward_model.py"
MARKS = {"system_turn_start": "<extra_id_0>", "turn_start": "<extra_id_1>", "label_start": "<extra_id_2>"}
SYSTEM = "<extra_id_0>System\n\n<extra_id_1>User\n"


@pytest.fixture
def attribute_model(tmp_path: Path) -> Path:
    """The folder of a model with HelpSteer's attributes, as transformers has it."""
    torch.manual_seed(1)
    config = toy_config(num_labels=len(HELPSTEER), pad_token_id=0, initializer_range=0.3)
    LlamaForSequenceClassification(config).save_pretrained(tmp_path / "attributes")
    write_toy_tokenizer(tmp_path / "attributes")
    return tmp_path / "attributes"


def test_responses_are_labeled_and_learned(
    attribute_model: Path, start: Callable, run: Callable, nemo: Path, short_tmp: Path, tmp_path: Path
):
    rows: list[dict[str, object]] = [{"prompt": f"q{i}", "response": "yes" * i} for i in range(1, 7)]
    (tmp_path / "chats.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    import_from_huggingface(attribute_model, str(tmp_path / "attributes.nemo"))
    port = free_ports(1)[0]
    serving = {"rm_model_file": tmp_path / "attributes.nemo", "trainer.precision": 32, "inference.port": port}
    server = start(serving, command=[SERVE], env={"TMPDIR": str(short_tmp)})

    def annotate(out: str, *more: object):
        words = ["--input-file", "chats.jsonl", "--output-file", out, "--port", port, "--batch-size", 4]
        marks = (f"{name}={text}" for name, text in MARKS.items())
        return run([*words, *more, "--chat-prompt-tokens", *marks], command=[ANNOTATE])

    job = annotate("labeled.jsonl")
    assert job.process.returncode == 0, job.err + server.err[-3000:]
    lines = (tmp_path / "labeled.jsonl").read_text().splitlines()
    turns = [json.loads(line)["conversations"] for line in lines]
    assert [(asked["value"], told["value"]) for asked, told in turns] == [
        (row["prompt"], row["response"]) for row in rows
    ]
    assert all(asked["label"] is None for asked, _ in turns)

    model = LlamaForSequenceClassification.from_pretrained(attribute_model).eval()
    tokenizer = AutoTokenizer.from_pretrained(attribute_model)
    for asked, told in turns:
        text = f"{SYSTEM}{asked['value']}\n<extra_id_1>Assistant\n{told['value']}\n<extra_id_2>"
        with torch.no_grad():
            scores = model(**tokenizer(text, return_tensors="pt")).logits[0]
        numbers = scores.clamp(0, 4).round().int().tolist()
        assert told["label"] == ",".join(f"{n}:{x}" for n, x in zip(HELPSTEER, numbers, strict=True))
    assert len({told["label"] for _, told in turns}) > 1

    assert "labeled.jsonl exists" in annotate("labeled.jsonl").err
    job = annotate("other.jsonl", "--attributes", "quality", "toxicity")
    assert job.process.returncode == 2
    assert "the model gives 9 attributes, and the labels have 2: quality, toxicity" in job.err
    server.process.terminate()
    server.wait(timeout=30)

    learning = {
        "model.restore_from_path": nemo,
        "model.data.chat": True,
        **{f"model.data.chat_prompt_tokens.{name}": text for name, text in MARKS.items()},
        "model.data.train_ds.file_path": tmp_path / "labeled.jsonl",
        "model.data.train_ds.global_batch_size": 6,
        "model.data.train_ds.micro_batch_size": 3,
        "trainer.precision": 32,
        "trainer.sft.max_steps": 1,
        "exp_manager.explicit_log_dir": tmp_path / "run",
    }
    job = run(learning)
    assert job.process.returncode == 0, job.err
    assert f"Assistant\n<extra_id_2>{turns[0][1]['label']}\n⟦yes" in job.err
