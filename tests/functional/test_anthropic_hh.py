# SPDX-License-Identifier: Apache-2.0
"""Anthropic HH to pairs and prompts: the script as a person runs it, on files and over HTTP on this machine."""

import contextlib
import gzip
import hashlib
import json
import os
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest
import torch
from pytriton.client import ModelClient
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from nemo_aligner.checkpoint.convert import export_to_huggingface, import_from_huggingface
from nemo_aligner.data.text_rows import open_pairs
from nemo_aligner.launch.job_group import free_ports

ROOT = Path(__file__).parents[2]
GPT = ROOT / "examples/nlp/gpt"
SCRIPT = ROOT / "examples/nlp/data/anthropic_hh/download_and_process.py"
SUBSETS = ("harmless-base", "helpful-base", "helpful-online", "helpful-rejection-sampled")
OUTPUTS = ["test_comparisons.jsonl", "test_prompts.jsonl", "train_comparisons.jsonl", "train_prompts.jsonl"]


def row(name: str) -> dict[str, str]:
    head = f"\n\nHuman: Is {name} good?\n\nAssistant: Which é one?\n\nHuman: The second.\n\nAssistant:"
    return {"chosen": f"{head} Yes, {name}.", "rejected": f"{head} No."}


def prompt(name: str) -> str:
    return f"User: Is {name} good?\n\nAssistant: Which é one?\n\nUser: The second.\n\nAssistant:"


def write(path: Path, *rows: object) -> Path:
    text = "".join((line if isinstance(line, str) else json.dumps(line)) + "\n" for line in rows)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(gzip.compress(text.encode()) if path.suffix == ".gz" else text.encode())
    return path


def process(*words: object, cwd: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, SCRIPT, *map(str, words)]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    return subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, timeout=60)


def texts(path: Path) -> list[str]:
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    assert all(set(row) == {"text"} for row in rows)
    return [row["text"] for row in rows]


def test_named_splits_become_pairs_and_prompts(tmp_path):
    write(tmp_path / "in/train.jsonl.gz", row("a"), "", row("b"))
    write(tmp_path / "in/test-1.jsonl", row("c"))
    (tmp_path / "in/README.md").write_text("not data")
    done = process("--input-dir", tmp_path / "in", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "wrote 2 train and 1 test pairs" in done.stdout
    assert sorted(path.name for path in tmp_path.glob("*") if path.is_file()) == OUTPUTS
    assert texts(tmp_path / "train_comparisons.jsonl") == [
        f"{prompt(name)} {response}" for name in "ab" for response in (f"Yes, {name}.", "No.")
    ]
    assert texts(tmp_path / "train_prompts.jsonl") == [prompt("a"), prompt("b")]
    assert texts(tmp_path / "test_prompts.jsonl") == [prompt("c")]
    pairs = open_pairs(tmp_path / "test_comparisons.jsonl")
    assert (len(pairs), *pairs[0].texts) == (1, f"{prompt('c')} Yes, c.", f"{prompt('c')} No.")


def test_a_hash_of_the_prompt_splits_other_files(tmp_path):
    names = [f"thing {i}" for i in range(300)]
    write(tmp_path / "a/hh.jsonl", *map(row, names[:200]))
    write(tmp_path / "b/more.jsonl.gz", *map(row, names[200:] + names[:50]))
    words = ("--input-dir", tmp_path / "a", tmp_path / "b", "--output-dir", tmp_path / "out/hh")
    assert process(*words, cwd=tmp_path).returncode == 0
    train, test = (texts(tmp_path / "out/hh" / f"{split}_prompts.jsonl") for split in ("train", "test"))
    assert len(train) + len(test) == 350
    assert not set(train) & set(test)
    assert 15 <= len(set(test)) <= 45
    for text in test:
        assert int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") % 10 == 0


def test_malformed_dialogues_are_counted_and_left_out(tmp_path):
    good = row("a")
    bad = [
        {**good, "rejected": good["rejected"].replace("\n\nHuman: The second.", "")},
        {**good, "chosen": "Human: Hi\n\nAssistant: Hello"},
        {**good, "chosen": "\n\nHuman: Hi"},
        {**good, "chosen": "\n\nHuman: Hi\n\nHuman: Hello?\n\nAssistant: Yes"},
        {**good, "chosen": ""},
    ]
    write(tmp_path / "train.jsonl", *bad, good, {**good, "rejected": row("b")["rejected"]})
    done = process("--input-dir", tmp_path, "--output-dir", tmp_path / "out", cwd=tmp_path)
    assert done.stdout.splitlines() == [
        f"wrote 1 train and 0 test pairs and their prompts to {tmp_path / 'out'}",
        "left out 5 dialogues with malformed turns and 1 whose responses are to different prompts",
    ]
    assert texts(tmp_path / "out/train_prompts.jsonl") == [prompt("a")]
    assert texts(tmp_path / "out/test_prompts.jsonl") == []


def test_nothing_is_overwritten_unasked(tmp_path):
    write(tmp_path / "hh.jsonl", *(row(str(i)) for i in range(30)))
    kept = write(tmp_path / "test_prompts.jsonl", {"text": "precious"})
    refused = process("--input-dir", tmp_path, cwd=tmp_path)
    assert refused.returncode == 2
    assert (
        refused.stderr
        == "error: test_prompts.jsonl exists\nFix: add --overwrite, or name another folder with --output-dir\n"
    )
    assert texts(kept) == ["precious"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["hh.jsonl", "test_prompts.jsonl"]
    # Its own outputs are never its input, though they lie in the same folder.
    for _ in range(2):
        done = process("--input-dir", tmp_path, "--overwrite", cwd=tmp_path)
        assert done.returncode == 0, done.stderr
        assert sum(len(texts(tmp_path / f"{split}_prompts.jsonl")) for split in ("train", "test")) == 30


@pytest.mark.parametrize(
    ("line", "problem"),
    [
        ("{broken", "line 2: not JSON"),
        ({"chosen": "a"}, "line 2: key 'rejected' is missing"),
        ({"chosen": "a", "rejected": ["b"]}, "line 2: key 'rejected' has the value"),
    ],
)
def test_a_bad_line_stops_the_script_and_leaves_nothing(tmp_path, line, problem):
    source = write(tmp_path / "in/train.jsonl", row("a"), line)
    done = process("--input-dir", source.parent, "--output-dir", tmp_path / "out", cwd=tmp_path)
    assert done.returncode == 2
    assert done.stderr.startswith(f"error: {source}, {problem}")
    assert "Traceback" not in done.stderr
    assert list((tmp_path / "out").iterdir()) == []


def test_damaged_and_absent_files_are_reported(tmp_path):
    source = write(tmp_path / "in/train.jsonl.gz", *(row(str(i)) for i in range(50)))
    source.write_bytes(source.read_bytes()[:-20])
    damaged = process("--input-dir", source.parent, cwd=tmp_path)
    assert damaged.returncode == 2
    assert f"{source} is damaged after line" in damaged.stderr
    empty = process("--input-dir", tmp_path, cwd=tmp_path)
    assert (empty.returncode, "there is no *.jsonl or *.jsonl.gz in" in empty.stderr) == (2, True)
    write(tmp_path / "bad/train.jsonl", {"chosen": "x", "rejected": "y"})
    nothing = process("--input-dir", tmp_path / "bad", cwd=tmp_path)
    assert (nothing.returncode, "no pair is left of" in nothing.stderr) == (2, True)
    assert not list(tmp_path.glob("*.jsonl"))


@contextlib.contextmanager
def serve(folder: Path) -> Iterator[str]:
    """The folder's files over HTTP, at a free port of this machine."""

    class Quiet(SimpleHTTPRequestHandler):
        def log_message(self, *_: object) -> None:
            """Nothing is printed."""

    with ThreadingHTTPServer(("127.0.0.1", 0), partial(Quiet, directory=str(folder))) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.server_port}/hh"
        finally:
            server.shutdown()
            thread.join(timeout=10)


def test_it_downloads_all_subsets(tmp_path):
    for number, subset in enumerate(SUBSETS):
        write(tmp_path / f"www/hh/{subset}/train.jsonl.gz", row(f"{number}a"), row(f"{number}b"))
        write(tmp_path / f"www/hh/{subset}/test.jsonl.gz", row(f"{number}c"))
    (tmp_path / "out").mkdir()
    with serve(tmp_path / "www") as url:
        done = process("--url", url, cwd=tmp_path / "out")
        assert done.returncode == 0, done.stderr
        missing = process("--url", f"{url}/elsewhere", "--output-dir", tmp_path / "none", cwd=tmp_path)
    assert done.stderr.count("downloading") == 8
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == OUTPUTS
    expected = [prompt(f"{number}{name}") for number in range(4) for name in "ab"]
    assert texts(tmp_path / "out/train_prompts.jsonl") == expected
    assert missing.returncode == 2
    assert "cannot be downloaded: HTTP Error 404" in missing.stderr
    assert "name them with --input-dir" in missing.stderr
    assert list((tmp_path / "none").iterdir()) == []


@pytest.fixture(scope="module")
def published(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the pairs and prompts of published dialogues."""
    data = os.environ.get("NEMO_ALIGNER_TEST_DATA")
    if data is None or not (Path(data) / "hh_harmless.jsonl.gz").is_file():
        pytest.skip(
            "NEMO_ALIGNER_TEST_DATA names no folder with hh_harmless.jsonl.gz, which is optional data"
        )
    folder = tmp_path_factory.mktemp("published")
    (folder / "in").mkdir()
    (folder / "in/test.jsonl.gz").symlink_to(Path(data).resolve() / "hh_harmless.jsonl.gz")
    done = process("--input-dir", folder / "in", cwd=folder)
    assert done.returncode == 0, done.stderr
    return folder


def test_real_dialogues(published: Path):
    pairs = open_pairs(published / "test_comparisons.jsonl")
    prompts = texts(published / "test_prompts.jsonl")
    assert len(pairs) == len(prompts) > 1700
    for i, text in enumerate(prompts):
        assert text.startswith("User: ")
        assert text.endswith("\n\nAssistant:")
        assert all(response.startswith(f"{text} ") for response in pairs[i].texts)
        assert not any("\n\nHuman: " in response for response in pairs[i].texts)


@pytest.mark.parametrize("append_eod", [True, False])
def test_real_dialogues_have_the_same_rewards_everywhere(
    published: Path, tmp_path: Path, short_tmp: Path, run: Callable, start: Callable, append_eod: bool
):
    """As texts and as tokens from the server, and from transformers, which scores the export in batches of 8."""
    import_from_huggingface(
        Path(os.environ["NEMO_ALIGNER_TEST_DATA"]) / "stories260k_hf", str(tmp_path / "base.nemo")
    )
    pairs = published / "test_comparisons.jsonl"
    learning = {
        "pretrained_checkpoint.restore_from_path": tmp_path / "base.nemo",
        "model.data.data_prefix": f"{{train: [{pairs}], validation: [{pairs}], test: [{pairs}]}}",
        "model.data.append_eod": append_eod,
        "model.encoder_seq_length": 256,
        "model.micro_batch_size": 4,
        "model.global_batch_size": 16,
        "model.optim.lr": 1e-3,
        "model.optim.sched.warmup_steps": 1,
        "trainer.precision": 32,
        "trainer.rm.max_steps": 12,
        "trainer.rm.limit_val_batches": 1,
        "exp_manager.explicit_log_dir": tmp_path / "run",
    }
    job = run(learning, command=[GPT / "train_reward_model.py"])
    assert job.process.returncode == 0, job.err
    nemo = tmp_path / "run/checkpoints/megatron_gpt.nemo"
    export_to_huggingface(nemo, tmp_path / "hf")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "hf")
    asked = [text for text in texts(pairs)[:64] if len(tokenizer(text).input_ids) <= 256]
    rows = [tokenizer(text).input_ids for text in asked]
    assert len(rows) > 24
    assert (rows[0][-1] == tokenizer.eos_token_id) == append_eod

    port = free_ports(1)[0]
    serving = {"rm_model_file": nemo, "trainer.precision": 32, "inference.port": port}
    job = start(serving, command=[GPT / "serve_reward_model.py"], env={"TMPDIR": str(short_tmp)})
    job.wait_for("serving at 127.0.0.1")
    lengths = np.array([[len(row)] for row in rows])
    padded = np.array([row + [0] * (lengths.max() - len(row)) for row in rows])
    with ModelClient(f"http://127.0.0.1:{port}", "reward_model", inference_timeout_s=120) as client:
        by_text = client.infer_batch(sentences=np.char.encode([[text] for text in asked], "utf-8"))["rewards"]
        by_token = client.infer_batch(tokens=padded, sequence_lengths=lengths)["rewards"]
    assert by_text.tolist() == by_token.tolist()
    assert by_text.std() > 0.1

    model = AutoModelForSequenceClassification.from_pretrained(tmp_path / "hf").eval()
    with torch.no_grad():
        scores = [
            model(**tokenizer(asked[i : i + 8], padding=True, return_tensors="pt")).logits
            for i in range(0, len(asked), 8)
        ]
    np.testing.assert_allclose(by_text[:, 0], torch.cat(scores)[:, 0].numpy(), rtol=0, atol=2e-5)
