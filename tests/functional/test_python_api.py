# SPDX-License-Identifier: Apache-2.0
"""The Python API, in processes of its own: a world can be made once."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs/python_api.md"
MOST_LINES = 40

ROUND_TRIP = """
import sys
import torch
from transformers import AutoModelForCausalLM
import nemo_aligner as na

size, tp, pp = map(int, sys.argv[2:])
policy = na.load(sys.argv[1], tp=tp, pp=pp)
batch = policy.batch([("thing 1:", " red"), ("thing 22222:", " green")])
policy.prepare_training(1e-3)
losses = []
for _ in range(3):
    losses.append(policy.get_loss_and_metrics([batch], na.NLL())["loss"])
    policy.optimizer_step()
assert losses[2] < losses[0] - 0.3, losses
policy.export("hf")
theirs = AutoModelForCausalLM.from_pretrained("hf")(batch.tokens).logits.log_softmax(-1)
ours = policy.logprobs(batch)
picked = theirs[:, :-1].gather(-1, batch.tokens[:, 1:, None])[..., 0]
assert torch.allclose((ours[:, 1:] * batch.loss_mask[:, 1:]), picked * batch.loss_mask[:, 1:], atol=1e-4)
assert len(policy.texts(policy.generate(["a", "b"], na.SamplingConfig(max_length=2), samples=3))) * (
    size // (tp * pp)
) == 6

judge = na.load_reward_model(sys.argv[1], tp=tp, pp=pp)
pairs = judge.batch([("a good response", "a bad one")])
judge.prepare_training(na.OptimConfig(lr=1e-3), max_steps=100)
for _ in range(3):
    judge.get_loss_and_metrics([pairs], na.BradleyTerry())
    judge.optimizer_step()
chosen, rejected = judge.score(["a good response", "a bad one"])
assert chosen > rejected
judge.save("judge.nemo")
again = na.load_reward_model("judge.nemo", tp=tp, pp=pp)
assert torch.equal(again.score(["x"]), judge.score(["x"]))
print("done")
"""


CONVERSATION = """
import os
import sys
from pathlib import Path
import nemo_aligner as na
from nemo_aligner.data.tokenizer import encode_after

size, tp, pp = map(int, sys.argv[2:])
policy = na.load(sys.argv[1], tp=tp, pp=pp)
sampling = na.SamplingConfig(max_length=24, min_length=3, end_strings=tuple("aeiou "))
heard = {}

def reply(number, sample, turn):
    heard.setdefault((number, sample), []).append(turn)
    return "yes" if len(heard[number, sample]) < 3 else None

found = policy.generate(["a", "bc"], sampling, samples=6, reply=reply)
told = encode_after(policy.tokenizer, "yes")
several = 0
for row in range(found.num_rows):
    text, mask = found.tokens[row].tolist(), found.loss_mask[row].tolist()
    begin, end = int(found.prompt_lengths[row]), int(found.lengths[row])
    said = [token for token, own in zip(text[begin:end], mask[begin:end]) if not own]
    assert said == told * (len(said) // len(told)), said
    several += len(said) > len(told)
    assert sum(mask) <= 24
Path(f"several-{os.environ.get('RANK', 0)}").write_text(str(several))
"""


def run(script: Path, *words: object, starter: tuple[str, ...] = ()) -> str:
    done = subprocess.run(
        [sys.executable, *starter, str(script), *map(str, words)],
        cwd=script.parent,
        env=os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
        timeout=200,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return done.stdout


def blocks() -> list[str]:
    return re.findall(r"```python\n(.*?)```", PAGE.read_text(), re.DOTALL)


def test_the_pages_reinforce_is_short_and_learns(hf_folder: Path, tmp_path: Path):
    code, _ = blocks()
    assert len(code.splitlines()) <= MOST_LINES
    (tmp_path / "model").symlink_to(hf_folder)
    (tmp_path / "reinforce.py").write_text(code)
    told = run(tmp_path / "reinforce.py")
    rewards = [float(reward) for reward in re.findall(r"reward (.*)", told)]
    assert len(rewards) == 30
    assert rewards[-1] > rewards[0] + 2
    assert (tmp_path / "reinforce.nemo").is_file()


@pytest.mark.parametrize(("size", "tp", "pp"), [(1, 1, 1), (2, 2, 1), (2, 1, 2), (2, 1, 1)])
def test_learn_score_write_and_save_at_any_layout(
    size: int, tp: int, pp: int, hf_folder: Path, tmp_path: Path
):
    (tmp_path / "loop.py").write_text(ROUND_TRIP)
    starter = (
        ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(size)) if size > 1 else ()
    )
    assert run(tmp_path / "loop.py", hf_folder, size, tp, pp, starter=starter).count("done") == size


def test_the_pages_conversation_runs(hf_folder: Path, tmp_path: Path):
    _, code = blocks()
    (tmp_path / "model").symlink_to(hf_folder)
    (tmp_path / "talk.py").write_text(code + "assert rollout.num_rows == 8\n")
    run(tmp_path / "talk.py")


@pytest.mark.parametrize(("size", "tp", "pp"), [(1, 1, 1), (2, 2, 1), (2, 1, 2)])
def test_a_function_replies_to_turns(hf_folder: Path, tmp_path: Path, size: int, tp: int, pp: int):
    (tmp_path / "talk.py").write_text(CONVERSATION)
    starter = ("-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={size}") if size > 1 else ()
    run(tmp_path / "talk.py", hf_folder, size, tp, pp, starter=starter)
    several = [int(path.read_text()) for path in tmp_path.glob("several-*")]
    assert several == [several[0]] * size
    assert several[0] > 0
