# SPDX-License-Identifier: Apache-2.0
"""An actor and a critic of toy size, as processes of their own that talk over a real Triton."""

import json
import os
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from tritonclient.http import InferenceServerClient, InferInput

from nemo_aligner.launch.job_group import free_ports

EXAMPLES = Path(__file__).parents[2] / "examples/nlp/gpt"
ACTOR, CRITIC = EXAMPLES / "train_gpt_ppo_actor.py", EXAMPLES / "serve_ppo_critic.py"
LONG = 240.0  # seconds, for both jobs on a busy machine


def write_prompts(path: Path, count: int) -> Path:
    # Of many lengths, so that rows differ in what they take.
    rows = [{"text": f"User: thing {i}{'!' * (i % 7)}?\n\nAssistant:"} for i in range(count)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@dataclass(kw_only=True)
class Pair:
    """Two jobs below one folder; each can be started, and started again."""

    folder: Path
    start: Callable
    nemo: Path
    reward_nemo: Path
    critic_settings: dict[str, object] = field(default_factory=dict)
    actor_settings: dict[str, object] = field(default_factory=dict)
    port: int = field(default_factory=lambda: free_ports(1)[0])

    def __post_init__(self) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)

    @property
    def actor_folder(self) -> Path:
        return self.folder / "actor"

    @property
    def critic_folder(self) -> Path:
        return self.folder / "critic"

    def start_critic(self, **changed: object):
        return self._start(CRITIC, self._critic() | self.critic_settings | changed)

    def start_actor(self, **changed: object):
        return self._start(ACTOR, self._actor() | self.actor_settings | changed)

    def serve_reward_model(self, port: int, **changed: object):
        settings = {
            "rm_model_file": self.reward_nemo,
            "trainer.precision": 32,
            "inference.port": port,
            "model.forward_micro_batch_size": 1,
        }
        return self._start(EXAMPLES / "serve_reward_model.py", settings | changed)

    def _start(self, script: Path, settings: dict[str, object]):
        # Its temporary files in a short path: those of sockets are.
        tmp = Path("/tmp") / f"nap{self.port}"
        tmp.mkdir(exist_ok=True)
        hidden = {name: "" for name in os.environ if name.startswith("SLURM")}
        return self.start(settings, command=[script], env={"TMPDIR": str(tmp)} | hidden)

    def run(self):
        """Both, to the end; the actor's job."""
        critic, actor = self.start_critic(), self.start_actor()
        assert actor.wait(timeout=LONG) == 0, critic.err[-3000:] + actor.err[-3000:]
        assert critic.wait(timeout=60) == 0, critic.err[-3000:]
        return actor

    def _critic(self) -> dict[str, object]:
        return {
            "pretrained_checkpoint.restore_from_path": self.reward_nemo,
            "trainer.precision": 32,
            "trainer.ppo.port": self.port,
            "trainer.ppo.inference_micro_batch_size": 1,
            "model.global_batch_size": 8,
            "model.micro_batch_size": 1,
            "model.optim.lr": 1e-3,
            "model.optim.sched.warmup_steps": 2,
            "model.hidden_dropout": 0.1,
            "exp_manager.explicit_log_dir": self.critic_folder,
            "exp_manager.create_tensorboard_logger": False,
        }

    def _actor(self) -> dict[str, object]:
        prompts = write_prompts(self.folder / "prompts.jsonl", 48)
        return {
            "pretrained_checkpoint.restore_from_path": self.nemo,
            "model.data.data_prefix": f"{{train: [{prompts}], validation: [{prompts}], test: [{prompts}]}}",
            "remote_critic_rm.critic.ip": "127.0.0.1",
            "remote_critic_rm.critic.port": self.port,
            "remote_critic_rm.return_timeout": 120,
            "trainer.precision": 32,
            "trainer.ppo.max_steps": 5,
            "trainer.ppo.max_epochs": 9,
            "trainer.ppo.save_interval": 2,
            "trainer.ppo.val_check_interval": 4,
            "trainer.ppo.initial_policy_kl_penalty": 0.05,
            "trainer.ppo.mask_unfinished": False,
            "trainer.ppo.adaptive_kl_target": 0.1,
            "trainer.ppo.adaptive_kl_horizon": 100,
            "trainer.ppo.scale_rewards": True,
            "trainer.ppo.num_ppo_epochs": 2,
            "model.global_batch_size": 8,
            "model.micro_batch_size": 1,
            "model.ppo.num_rollout_samples": 16,
            "model.ppo.num_val_samples": 8,
            "model.ppo.rollout_micro_batch_size": 4,
            "model.ppo.length_params.max_length": 16,
            "model.optim.lr": 1e-3,
            "model.optim.sched.warmup_steps": 2,
            "model.optim.sched.constant_steps": 0,
            "exp_manager.explicit_log_dir": self.actor_folder,
            "exp_manager.create_tensorboard_logger": False,
        }

    def busy(self) -> tuple[str, int]:
        """What the critic says that it is doing, and from how many train requests it has learned."""
        dummy = InferInput("dummy_var", [1], "INT64")
        dummy.set_data_from_numpy(np.zeros(1, dtype=np.int64))
        with InferenceServerClient(f"127.0.0.1:{self.port}", network_timeout=5.0) as client:
            told = client.infer("health", [dummy]).as_numpy("health")
        assert told is not None
        health = json.loads(told[0])
        return health["busy"], health["sequence"]
