# SPDX-License-Identifier: Apache-2.0
"""Prompt tokens, from training to the response: generate.py and transformers ask as training did."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from nemo_aligner.checkpoint.convert import export_to_huggingface, import_from_huggingface

ROOT = Path(__file__).parents[2]
MESSAGES = [{"role": "user", "content": "Which colour?"}]
PROMPT = "\x00System\n\n\x11User\nWhich colour?\n\x11Assistant\n"


@pytest.fixture
def chats(tmp_path: Path) -> Path:
    path = tmp_path / "chats.jsonl"
    rows = [{"messages": [*MESSAGES, {"role": "assistant", "content": "red"}]}] * 4
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_markers_travel_with_the_model(
    settings: dict[str, object], chats: Path, tmp_path: Path, run: Callable
):
    trained = tmp_path / "run"
    job = run(
        settings
        | {
            "model.data.chat": True,
            "model.data.train_ds.file_path": chats,
            "model.data.validation_ds.file_path": chats,
            "model.data.train_ds.global_batch_size": 4,
        }
    )
    assert job.process.returncode == 0, job.err[-3000:]
    log = (trained / "log.txt").read_bytes()
    assert b"\0" not in log
    assert rb"\x11Assistant" in log
    [result] = trained.rglob("*.nemo")
    asked = tmp_path / "asked.jsonl"
    asked.write_text(json.dumps({"messages": MESSAGES}) + "\n")
    responses = tmp_path / "responses.jsonl"
    job = run(
        {
            "model.restore_from_path": result,
            "trainer.precision": 32,
            "input_file": asked,
            "output_file": responses,
            "sampling.use_greedy": True,
            "sampling.max_length": 8,
        },
        command=(ROOT / "examples/nlp/gpt/generate.py",),
    )
    assert job.process.returncode == 0, job.err[-3000:]
    export_to_huggingface(result, tmp_path / "hf")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "hf")
    assert tokenizer.apply_chat_template(MESSAGES, tokenize=False, add_generation_prompt=True) == PROMPT
    ids = torch.tensor([tokenizer.encode(PROMPT, add_special_tokens=False)])
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "hf")
    logp = model(ids).logits[0, -1].log_softmax(-1)
    [row] = [json.loads(line) for line in responses.read_text().split("\n")[:-1]]
    written = tokenizer.encode(row["answer"], add_special_tokens=False)
    assert written[0] == int(logp.argmax())


DATED = (
    "{{ strftime_now('%Y-%m-%d') }} {% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}</s>{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)
# Their days are never the same.
EARLY, LATE = {"TZ": "Etc/GMT+12"}, {"TZ": "Etc/GMT-14"}


def test_a_run_that_goes_on_another_day_reads_the_day_it_began(
    settings: dict[str, object], chats: Path, hf_folder: Path, tmp_path: Path, start: Callable
):
    tokenizer = AutoTokenizer.from_pretrained(hf_folder)
    tokenizer.chat_template = DATED
    tokenizer.save_pretrained(tmp_path / "dated")
    for name in ("config.json", "model.safetensors"):
        (tmp_path / "dated" / name).symlink_to(hf_folder / name)
    import_from_huggingface(tmp_path / "dated", str(tmp_path / "dated.nemo"))

    def losses(name: str, *lives: tuple[int, dict[str, str]]) -> list[float]:
        for steps, day in lives:
            job = start(
                settings
                | {
                    "model.restore_from_path": tmp_path / "dated.nemo",
                    "model.data.chat": True,
                    "model.data.train_ds.file_path": chats,
                    "model.data.validation_ds.file_path": chats,
                    "model.data.train_ds.global_batch_size": 4,
                    "model.answer_only_loss": False,
                    "trainer.sft.max_epochs": 4,
                    "trainer.sft.max_steps": steps,
                    "exp_manager.explicit_log_dir": tmp_path / name,
                    "exp_manager.checkpoint_callback_params.save_nemo_on_train_end": False,
                },
                env=day,
            )
            assert job.wait() == 0, job.err[-3000:]
        lines = [json.loads(line) for line in (tmp_path / name / "metrics.jsonl").open()]
        return [line["train/loss"] for line in lines if "train/loss" in line]

    whole = losses("whole", (4, EARLY))
    assert losses("resumed", (2, EARLY), (4, LATE)) == whole
    assert losses("late", (4, LATE)) != whole
