# SPDX-License-Identifier: Apache-2.0
"""A PPO step, phase by phase: the actor and the critic as jobs of their own that talk over the real server.

`python -m benchmarks.run ppo` measures it.
"""

import importlib.metadata
import json
import os
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    LlamaForSequenceClassification,
    PreTrainedTokenizerFast,
)

from benchmarks import sft
from benchmarks.figures import Figure, Part, checked
from benchmarks.generation import sizes
from benchmarks.processes import ALLOCATORS, ROOT, conditions, started, wait_for
from nemo_aligner.checkpoint.convert import import_from_huggingface
from nemo_aligner.launch.job_group import free_ports
from nemo_aligner.models.gpt.config import GPTConfig

__all__ = ["RUN", "Run", "Step", "figures_of", "measured_steps", "part", "run", "save_models"]

SCRIPTS = ROOT / "examples/nlp/gpt"
SPECIAL = ["<pad>", "<s>", "</s>", "<unk>"]
THREADS_OF_A_JOB = max(1, (os.cpu_count() or 1) // 2)
START_SECONDS, REPLY_SECONDS, END_SECONDS = 180, 120, 600
OVERLAP_FLOOR = 0.6  # of the shorter phase, learning of the actor or of the critic
OVERHEAD_CEILING = 0.1  # of the step
ACTOR, CRITIC = "actor", "critic"


@dataclass(frozen=True, kw_only=True)
class Run:
    """What both jobs are to do."""

    model: GPTConfig = sft.MODEL
    prompt: int = 64  # tokens
    response: int = 64
    responses: int = 32  # of a rollout
    learned_at_once: int = 16  # responses of an optimizer step, of either job
    micro_batch: int = 8
    slots: int = 16  # responses written at once, and rows of a request
    warm_up: int = 2  # steps
    measured: int = 8


RUN = Run()


def save_models(run: Run, folder: Path) -> None:
    """``policy.nemo`` and ``reward.nemo``, with random weights and a token for each word."""
    described = {**sizes(run.model), "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    config = LlamaConfig.from_dict(described)
    reward_config = LlamaConfig.from_dict({**described, "num_labels": 1, "id2label": {0: "reward"}})
    torch.manual_seed(0)
    for name, model in (
        ("policy", LlamaForCausalLM(config)),
        ("reward", LlamaForSequenceClassification(reward_config)),
    ):
        model.save_pretrained(folder / name)
        _tokenizer(run.model.vocab_size).save_pretrained(folder / name)
        import_from_huggingface(folder / name, str(folder / f"{name}.nemo"))


def _tokenizer(vocab_size: int) -> PreTrainedTokenizerFast:
    words = SPECIAL + [f"w{i}" for i in range(len(SPECIAL), vocab_size)]
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    )


def _write_prompts(run: Run, path: Path) -> None:
    draw = torch.Generator().manual_seed(0)
    shape = (2 * run.responses, run.prompt)
    words = torch.randint(len(SPECIAL), run.model.vocab_size, shape, generator=draw).tolist()
    rows = [{"text": " ".join(f"w{i}" for i in row)} for row in words]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def _settings(run: Run, folder: Path, port: int) -> dict[str, dict[str, object]]:
    """Of both jobs, by name."""
    both = {
        "trainer.precision": 32,
        "model.micro_batch_size": run.micro_batch,
        "model.global_batch_size": run.learned_at_once,
        "exp_manager.explicit_log_dir": "run",
        "exp_manager.create_tensorboard_logger": False,
        "exp_manager.create_checkpoint_callback": False,
        "exp_manager.checkpoint_callback_params.save_nemo_on_train_end": False,
    }
    prompts = folder / "prompts.jsonl"
    critic = {
        "pretrained_checkpoint.restore_from_path": folder / "reward.nemo",
        "trainer.ppo.port": port,
        "trainer.ppo.inference_micro_batch_size": run.slots,
    }
    actor = {
        "pretrained_checkpoint.restore_from_path": folder / "policy.nemo",
        "model.data.data_prefix": f"{{train: [{prompts}], validation: [{prompts}], test: [{prompts}]}}",
        "remote_critic_rm.critic.ip": "127.0.0.1",
        "remote_critic_rm.critic.port": port,
        "remote_critic_rm.start_timeout": START_SECONDS,
        "remote_critic_rm.return_timeout": 10,
        "remote_critic_rm.reply_timeout": REPLY_SECONDS,
        "trainer.ppo.max_steps": run.warm_up + run.measured,
        "trainer.ppo.max_epochs": run.warm_up + run.measured,
        "trainer.ppo.val_check_interval": 0,
        # Random weights never end a response.
        "trainer.ppo.mask_unfinished": False,
        "model.ppo.num_rollout_samples": run.responses,
        "model.ppo.rollout_micro_batch_size": run.slots,
        "model.ppo.length_params.max_length": run.response,
        "model.ppo.length_params.min_length": run.response,
    }
    return {CRITIC: critic | both, ACTOR: actor | both}


def run(run: Run, models_folder: Path, folder: Path, *, allocator: str) -> list["Step"]:
    """Both jobs from their start to their end; the measured steps.

    Args:
        models_folder: as :func:`save_models` left it.
        folder: to be made, for what the jobs write.
    """
    folder.mkdir()
    _write_prompts(run, models_folder / "prompts.jsonl")
    settings = _settings(run, models_folder, free_ports(1)[0])

    def command(script: str, job: str) -> list[str]:
        return [str(SCRIPTS / script), *(f"{key}={value}" for key, value in settings[job].items())]

    threads = THREADS_OF_A_JOB
    with (
        started(
            command("serve_ppo_critic.py", CRITIC), folder / CRITIC, allocator=allocator, threads=threads
        ) as critic,
        started(
            command("train_gpt_ppo_actor.py", ACTOR), folder / ACTOR, allocator=allocator, threads=threads
        ) as actor,
    ):
        wait_for((critic, actor), seconds=END_SECONDS)
    logs = [
        [json.loads(line) for line in (folder / job / "run/metrics.jsonl").read_text().splitlines()]
        for job in (ACTOR, CRITIC)
    ]
    return measured_steps(*logs, warm_up=run.warm_up)


@dataclass(frozen=True, kw_only=True)
class Step:
    """A step of the actor, and what the critic did in it. Seconds; moments are of one clock."""

    timers: Mapping[str, float]  # the actor's
    ended: float
    judging: float  # the critic's own time
    learning: Sequence[tuple[float, float]]  # the critic's optimizer steps, from and to

    @property
    def whole(self) -> float:
        """All of it."""
        return self.timers["step_time"]

    @property
    def critic_learning(self) -> float:
        """The critic's own time."""
        return sum(to - start for start, to in self.learning)

    @property
    def overlap(self) -> float:
        """The time in which both learn, as a share of the shorter of the two."""
        to = self.ended - self.timers["critic_train_wait"]
        start = to - self.timers["train_time"]
        both = sum(max(0.0, min(to, end) - max(start, begin)) for begin, end in self.learning)
        return both / min(self.timers["train_time"], self.critic_learning)

    @property
    def overhead(self) -> float:
        """What the critic's replies take beyond its own work, whether the actor waits for it or not."""
        seen = self.timers["critic_infer_time"] + self.timers["critic_train_time"]
        return seen - self.judging - self.critic_learning

    def phases(self) -> dict[str, float]:
        """The actor's time, by what it does; the sum is :attr:`whole`."""
        of = self.timers
        rollout = ("generate", "logprobs", "init_logprobs", "critic_wait")
        after = ("train_time", "critic_train_wait")
        return {
            "writing answers": of["generate"],
            "log-probs": of["logprobs"],
            "log-probs of the initial policy": of["init_logprobs"],
            "waiting for rewards and values": of["critic_wait"],
            "the rest of the rollout": of["rollout_time"] - sum(of[name] for name in rollout),
            "learning": of["train_time"],
            "waiting for the critic to learn": of["critic_train_wait"],
            "the rest": self.whole - of["rollout_time"] - sum(of[name] for name in after),
        }


def measured_steps(
    actor: Sequence[Mapping[str, Any]], critic: Sequence[Mapping[str, Any]], *, warm_up: int
) -> list[Step]:
    """From the lines of both metrics.jsonl, without the first steps.

    The critic takes equally many optimizer steps in each of the actor's, and ``time`` is the moment each was done.
    """
    share, rest = divmod(len(critic), len(actor))
    assert share, (len(actor), len(critic))
    assert not rest, (len(actor), len(critic))
    found = []
    for i, line in enumerate(actor):
        own = critic[i * share : (i + 1) * share]
        found.append(
            Step(
                timers={k.removeprefix("timers/"): v for k, v in line.items() if k.startswith("timers/")},
                ended=line["time"],
                judging=own[0]["timers/infer_time"],
                learning=[(step["time"] - step["train/step_time"], step["time"]) for step in own],
            )
        )
    return found[warm_up:]


def part() -> Part:
    """Both jobs, with either allocator."""
    found: dict[str, list[Step]] = {}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        save_models(RUN, folder)
        for number, allocator in enumerate(ALLOCATORS):
            began = time.perf_counter()
            found[allocator] = run(RUN, folder, folder / f"jobs{number}", allocator=allocator)
            print(
                f"ppo: {allocator}: {time.perf_counter() - began:.0f} s, load {os.getloadavg()[0]:.2f}",
                flush=True,
            )
    return Part(
        title="A PPO step",
        about=ABOUT,
        conditions=conditions()
        | {
            "torch": importlib.metadata.version("torch"),
            "threads": f"{THREADS_OF_A_JOB} of each job",
            "repeats": f"{RUN.measured} steps after {RUN.warm_up} others",
        },
        figures=figures_of(found),
    )


ABOUT = f"""\
`train_gpt_ppo_actor.py` and `serve_ppo_critic.py` as two processes, the reward model beside the critic; the model of
fine-tuning above with random weights, the critic with a scalar head in the place of its vocabulary's. A step writes
{RUN.responses} answers of {RUN.response} tokens to prompts of {RUN.prompt}, {RUN.slots} at once, and both jobs learn
from them in {RUN.responses // RUN.learned_at_once} optimizer steps of {RUN.learned_at_once} answers, in fp32. Repeats
are steps of one run: a cell is their median, with the shortest and the longest. The script is
[ppo.py](/benchmarks/ppo.py); every number comes from the metrics.jsonl of the two jobs.

The actor's phases follow each other and add up to the step. The critic judges while the actor computes log-probs, and
learns while it learns. Its own time is that of computing; the server's overhead is what its replies take the actor
beyond that, from asking to having the reply, whether the actor waits meanwhile or works. Learning at once is the time
in which both compute their updates, as a share of the shorter one's.
"""


def figures_of(found: Mapping[str, Sequence[Step]]) -> tuple[Figure, ...]:
    """By allocator, of each step."""
    figures: list[Figure] = []
    for allocator, steps in found.items():
        for subject, seconds in _rows(steps[0]).items():
            figures += _timed(allocator, subject, steps, seconds)
    for allocator, steps in found.items():
        overlap = Figure(
            table="Both jobs",
            subject=f"learning at once, {allocator}",
            metric="share of the shorter",
            values=tuple(step.overlap for step in steps),
        )
        overhead = Figure(
            table="Both jobs",
            subject=f"the server's overhead, {allocator}",
            metric="share of the step",
            values=tuple(step.overhead / step.whole for step in steps),
        )
        figures += checked(overlap, "at least", OVERLAP_FLOOR, allocator)
        figures += checked(overhead, "at most", OVERHEAD_CEILING, allocator)
    return tuple(figures)


def _rows(step: Step) -> dict[str, Callable[[Step], float]]:
    def phase(name: str) -> Callable[[Step], float]:
        return lambda step: step.phases()[name]

    return {f"actor: {name}": phase(name) for name in step.phases()} | {
        "the whole step": lambda step: step.whole,
        "critic: judging": lambda step: step.judging,
        "critic: judging, from asking to the reply": lambda step: step.timers["critic_infer_time"],
        "critic: learning": lambda step: step.critic_learning,
        "critic: learning, from asking to the reply": lambda step: step.timers["critic_train_time"],
    }


def _timed(
    allocator: str, subject: str, steps: Sequence[Step], seconds: Callable[[Step], float]
) -> list[Figure]:
    values = {
        "seconds": [seconds(step) for step in steps],
        "share of the step": [seconds(step) / step.whole for step in steps],
    }
    return [
        Figure(table=allocator.capitalize(), subject=subject, metric=metric, values=tuple(each))
        for metric, each in values.items()
    ]
